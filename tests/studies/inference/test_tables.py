"""Rows of a table: predicted and evaluated as in the run, with the statistics of its training rows."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from polyclinic.errors import ConfigError, DataError
from polyclinic.evaluation.records.run_reader import read_run
from polyclinic.studies.config.study_config import parse
from polyclinic.studies.inference.frozen_evaluation import evaluate_frozen, study_for, summary
from polyclinic.studies.inference.models import trained_model
from polyclinic.studies.inference.predict import Predicted, Work
from polyclinic.studies.inference.predictor import Predictor
from polyclinic.studies.run.data_identity import read_again
from tests.studies.inference.conftest import finish

STUDY = """
name = "rows"
rounds = 2
seeds = [0, 1]
[data]
kind = "table"
path = "{path}"
label = "ill"
categories = ["pain"]
site = "hospital"
patient = "none"
split = [0.5, 0.2, 0.3]
min_patients = 1
statistics = "{statistics}"
[task]
network = "mlp"
options = {{ width = 8 }}
[[methods]]
name = "fedavg"
[engine]
kind = "in-process"
"""


def write(file: Path, rows: list[dict[str, str]], without: tuple[str, ...] = ()) -> Path:
    """Write rows as a table without some columns."""
    columns = [column for column in rows[0] if column not in without]
    with open(file, "w", newline="") as opened:
        writer = csv.DictWriter(opened, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return file


def patients(count: int, seed: int) -> list[dict[str, str]]:
    """Return rows with a quantity that is missing in some, and a category."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        ill = int(rng.uniform() < 0.5)
        weight = f"{rng.normal(70 + 9 * ill, 8):.1f}" if rng.uniform() > 0.1 else ""
        pain = ("none", "some", "much")[min(2, int(rng.integers(0, 2)) + ill)]
        row = {"height": f"{rng.normal(170, 9):.1f}", "weight": weight, "pain": pain}
        rows.append({**row, "hospital": ("north", "south")[i % 2], "ill": str(ill)})
    return rows


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished run of a table, and the table."""
    folder = tmp_path_factory.mktemp("rows")
    table = write(folder / "table.csv", patients(80, 0))
    return finish(STUDY.format(path=table, statistics="federation"), folder / "run"), table


def predicted(run: Path, table: Path, out: Path, seeds: tuple[int, ...] = (), site: str = "") -> list[Predicted]:
    return list(Work(Predictor(trained_model(run, seeds=seeds, site=site)), table, out).run())


def test_rows_without_labels_have_the_probabilities_of_the_run(rows: tuple[Path, Path], tmp_path: Path) -> None:
    """For each seed with the means of its own training rows, also if these are gone."""
    run, _ = rows
    new = write(tmp_path / "new.csv", patients(80, 0), without=("ill", "hospital"))
    each = [predicted(run, new, tmp_path / f"out{seed}", (seed,)) for seed in (0, 1)]
    for seed, found in enumerate(each):
        values = {p.id: p.row for p in found}
        _, _, split = read_again(read_run(run), seed)
        stored = load_file(run / "arms" / f"fedavg-seed{seed}" / "predictions.safetensors")
        for site in ("north", "south"):
            mine = [[values[name][f"p_{label}"] for label in "01"] for name in split.sites[site]["test"].ids]
            np.testing.assert_allclose(mine, stored[f"{site}/score"], atol=1e-6)
    both = predicted(run, new, tmp_path / "both")
    logits = [[np.log(p.row["p_1"] / p.row["p_0"]) for p in found] for found in (*each, both)]
    np.testing.assert_allclose(np.mean(logits[:2], axis=0), logits[2], atol=1e-5)
    assert [p.resumed for p in predicted(run, new, tmp_path / "both")] == [True] * 80
    assert (tmp_path / "both" / "predictions.csv").read_text().startswith("id,file,class,p_0,p_1,entropy,disagreement")


def test_rows_that_training_never_saw_are_named(rows: tuple[Path, Path], tmp_path: Path) -> None:
    run, _ = rows
    new = patients(4, 1)
    new[1]["pain"], new[2]["height"] = "sudden", "tall"
    found = predicted(run, write(tmp_path / "new.csv", new), tmp_path / "out", (0,))
    assert [p.problem for p in found] == [
        "",
        "row 3 has 'sudden' in pain, which did not occur in training",
        "row 4 has 'tall' in height, which is not a number",
        "",
    ]
    with pytest.raises(DataError, match="weight"):
        predicted(run, write(tmp_path / "less.csv", new, without=("weight",)), tmp_path / "less", (0,))
    with pytest.raises(ConfigError, match="takes rows of a table: name a CSV or Parquet file"):
        predicted(run, tmp_path, tmp_path / "folder", (0,))


def test_evaluation_on_other_rows_uses_the_statistics_of_training(rows: tuple[Path, Path], tmp_path: Path) -> None:
    """Scaled by other means, the same rows would get other scores."""
    run, table = rows
    others = patients(60, 2)
    for row in others:
        row["height"] = str(float(row["height"]) - 40)
    new = write(tmp_path / "new.csv", others)
    study = study_for(trained_model(run), STUDY.format(path=new, statistics="federation"), tmp_path / "study.toml")
    result = evaluate_frozen([trained_model(run)], study, everything=True)
    mine = {p.id: p.row["p_1"] for p in predicted(run, new, tmp_path / "out", (0,))}
    found = np.concatenate([result.predictions["fedavg", 0][s]["score"][:, 1].numpy() for s in ("north", "south")])
    np.testing.assert_allclose(np.sort(found), np.sort(list(mine.values())), atol=1e-6)
    own = study_for(trained_model(run), STUDY.format(path=table, statistics="federation"), run / "study.toml")
    again = summary(evaluate_frozen([trained_model(run)], own))
    report = {m.label: m for m in evaluate_run_of(run)}
    assert again["results"][0]["mean_over_sites"]["value"] == pytest.approx(report["fedavg"].macro.value)


def evaluate_run_of(run: Path) -> Any:
    from polyclinic.evaluation.run_evaluation import evaluate

    return evaluate(read_run(run)).methods


def test_a_site_with_its_own_statistics_is_chosen(tmp_path: Path) -> None:
    table = write(tmp_path / "table.csv", patients(60, 0))
    text = STUDY.format(path=table, statistics="site").replace("seeds = [0, 1]", "seeds = [0]")
    run = finish(text.replace("rounds = 2", "rounds = 1"), tmp_path / "run")
    with pytest.raises(ConfigError, match="choose those of one with --site"):
        predicted(run, table, tmp_path / "out")
    north = predicted(run, table, tmp_path / "north", site="north")
    south = predicted(run, table, tmp_path / "south", site="south")
    stored = load_file(run / "arms" / "fedavg-seed0" / "predictions.safetensors")
    _, _, split = read_again(read_run(run), 0)
    assert parse(text).data.options["statistics"] == "site"
    for site, found in (("north", north), ("south", south)):
        values = {p.id: p.row["p_1"] for p in found}
        mine = [values[name] for name in split.sites[site]["test"].ids]
        np.testing.assert_allclose(mine, stored[f"{site}/score"][:, 1], atol=1e-6)


@pytest.mark.parametrize(
    ("hazards", "columns"),
    [
        ("discrete", "survival_2,survival_5"),
        pytest.param("proportional", "longer_survival", marks=pytest.mark.slow),
    ],
)
def test_survival_is_predicted_at_the_times_of_the_study(tmp_path: Path, hazards: str, columns: str) -> None:
    """Also for rows without times and events, in the scores of the run."""
    rng = np.random.default_rng(1)
    people = [
        row | {"ill": f"{rng.exponential(4) + 0.1:.2f}", "dead": str(i % 3 % 2)}
        for i, row in enumerate(patients(60, 0))
    ]
    table = write(tmp_path / "table.csv", people)
    text = STUDY.format(path=table, statistics="federation").replace('label = "ill"', 'label = "ill"\nevent = "dead"')
    text = text.replace("[task]", f'[task]\nkind = "survival"\ncuts = [2, 5]\nhazards = "{hazards}"')
    run = finish(text.replace("seeds = [0, 1]", "seeds = [0]"), tmp_path / "run")
    new = write(tmp_path / "new.csv", people, without=("ill", "dead", "hospital"))
    values = {p.id: list(p.row.values())[2:] for p in predicted(run, new, tmp_path / "out")}
    assert (tmp_path / "out" / "predictions.csv").read_text().startswith(f"id,file,{columns}\n")
    _, _, split = read_again(read_run(run), 0)
    stored = load_file(run / "arms" / "fedavg-seed0" / "predictions.safetensors")["north/score"]
    np.testing.assert_allclose([values[name] for name in split.sites["north"]["test"].ids], stored, atol=1e-6)

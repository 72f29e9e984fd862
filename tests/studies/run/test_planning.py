"""A plan comes from sums over training data, is a file that people edit, and does to data what it says."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from polyclinic.data.examples import DataError
from polyclinic.data.federation import DataSpec, federate
from polyclinic.data.fingerprint.preprocessing_plan import DataPlan
from polyclinic.studies.run.planning import class_names, drifts, plan, sites_of
from tests.data.catalog.test_dataset_catalog import picture, volume
from tests.support.data_sets import loaded
from tests.support.known import known


def registry(root: Path, rows: int = 120, missing: bool = True) -> dict[str, Any]:
    """A table of three hospitals whose values differ."""
    rng = np.random.default_rng(1)
    lines = ["site,age,dose,kind,y"]
    for i in range(rows):
        dose = "" if missing and i % 7 == 0 else f"{rng.gamma(2, 50):.3f}"
        lines.append(f"{'abc'[i % 3]},{rng.normal(50 + 5 * (i % 3), 9):.2f},{dose},{'xyz'[i // 3 % 3]},{i // 5 % 2}")
    (root / "t.csv").write_text("\n".join(lines))
    return {"kind": "table", "path": str(root / "t.csv"), "label": "y", "categories": ["kind"]}


def written(found: DataPlan, root: Path) -> str:
    (root / "p.toml").write_text(found.text())
    return str(root / "p.toml")


@pytest.mark.parametrize("external", [[], ["c"]])
def test_a_tables_plan_does_what_pooled_statistics_do(tmp_path: Path, external: list[str]) -> None:
    """To rounding, with nothing but sums from each site; and an external site adds nothing to them."""
    table: dict[str, Any] = {**registry(tmp_path), "external": external}
    path = written(plan(DataSpec(**table), "s"), tmp_path)
    pooled, planned = federate(DataSpec(**table)), federate(DataSpec(**table, plan=path))
    assert planned.sites.keys() == pooled.sites.keys()
    for site, roles in pooled.sites.items():
        for role, examples in roles.items():
            torch.testing.assert_close(
                loaded(planned.sites[site][role]).inputs, loaded(examples).inputs, rtol=1e-5, atol=1e-5
            )


def test_only_training_rows_of_training_sites_are_counted(tmp_path: Path) -> None:
    spec = DataSpec(**registry(tmp_path), external=("c",))
    found, data = sites_of(spec, 0), federate(spec, 0)
    assert {name: len(rows) for name, rows in found.items()} == {
        name: len(data.sites[name]["train"]) for name in ("a", "b")
    }
    made = plan(spec, "s")
    assert made.everywhere.examples == sum(map(len, found.values()))
    pooled = torch.cat([rows.rows for rows in found.values()])
    for i, name in enumerate(next(iter(found.values())).names):
        column, values = made.everywhere.columns[name], pooled[:, i][pooled[:, i].isfinite()]
        assert column.mean == pytest.approx(float(values.mean()), rel=1e-6, abs=1e-6)
        assert column.deviation == pytest.approx(float(values.std(correction=0)), rel=1e-6, abs=1e-6)
        assert column.missing == pytest.approx(1 - len(values) / len(pooled))


def test_no_group_holds_few_and_small_sites_are_not_described(tmp_path: Path) -> None:
    """Each share of the file is of at least ten patients."""
    table = registry(tmp_path)
    with open(tmp_path / "t.csv", "a") as file:
        file.write("\n" + "\n".join(f"tiny,{i},{i},x,{i % 2}" for i in range(12)))
    made = plan(DataSpec(**table), "s", by_site=True)
    assert set(made.sites) == {"a", "b", "c"}  # of tiny's 12 patients 7 train
    for reference in (made.everywhere, *made.sites.values()):
        for column in reference.columns.values():
            present = reference.examples * (1 - column.missing)
            assert all(share * present >= 9.9 for share in column.shares)
            assert sum(column.shares) == pytest.approx(1, abs=0.002) if column.shares else True
    with pytest.raises(DataError, match="too few to be described"):
        plan(DataSpec(**table, external=("a", "b", "c")), "s")


def test_volumes_of_two_spacings_become_alike_by_the_plan(tmp_path: Path) -> None:
    """Without steps they cannot be stacked; with the plan's they can, in the spacing that most have."""
    for i in range(24):
        size = (20, 24, 14) if i % 3 else (20, 24, 7)
        for folder, labels in (("imagesTr", ()), ("labelsTr", (0, 1))):
            volume(tmp_path / folder / f"c{i:02d}.nii.gz", labels, size)  # 2 x 2 x 3 mm
    _stretch(tmp_path)
    table: dict[str, Any] = {
        "kind": "pairs",
        "path": str(tmp_path),
        "classes": ["rest", "organ"],
        "sites": {"partition": "iid", "count": 2},
    }
    with pytest.raises(DataError, match="different shapes"):
        federate(DataSpec(**table))
    made = plan(DataSpec(**table), "s")
    assert [step["step"] for step in made.steps] == ["resample", "zscore", "crop_pad"]
    assert made.steps[0]["mm"] == pytest.approx([3.0, 2.0, 2.0], rel=0.02)
    data = federate(DataSpec(**table, plan=written(made, tmp_path)))
    assert data.shape == (1, *made.steps[2]["size"])
    again = federate(DataSpec.model_validate({**table, "steps": [dict(step) for step in made.steps]}))
    assert data.fingerprint == again.fingerprint  # what enters the study's identity is what the plan does, not its path


def _stretch(root: Path) -> None:
    """Gives every third volume, of half as many slices, twice the distance between them."""
    import nibabel

    for i in range(0, 24, 3):
        for folder in ("imagesTr", "labelsTr"):
            path = root / folder / f"c{i:02d}.nii.gz"
            array = np.asarray(nibabel.load(path).dataobj)
            nibabel.save(nibabel.Nifti1Image(array, np.diag([2.0, 2.0, 6.0, 1.0])), path)


def test_pictures_get_the_mean_and_deviation_of_all_sites(tmp_path: Path) -> None:
    for i in range(40):
        picture(tmp_path / "ab"[i % 2] / f"{i}.png", (32, 48))
    table: dict[str, Any] = {"kind": "folders", "path": str(tmp_path), "sites": {"partition": "iid", "count": 2}}
    made = plan(DataSpec(**table), "s")
    assert [step["step"] for step in made.steps] == ["scale"]  # all are of one size, and a good one
    data = federate(DataSpec(**table, plan=written(made, tmp_path)))
    x = torch.cat([loaded(roles["train"]).inputs for roles in data.sites.values()])
    assert float(x.mean()) == pytest.approx(0, abs=1e-3)
    assert float(x.std()) == pytest.approx(1, abs=1e-3)


def test_ct_is_clipped_to_the_middle_of_the_foreground(tmp_path: Path) -> None:
    from polyclinic.data.fingerprint.preprocessing_plan import Column, Reference
    from polyclinic.data.fingerprint.preprocessing_planner import steps

    flat = Column(0, 1, 0, (0,) * 9)
    columns = {
        "pixels along z": Column(64, 0, 0, (64,) * 9),
        "pixels along y": Column(64, 0, 0, (64,) * 9),
        "pixels along x": Column(64, 0, 0, (64,) * 9),
        "mean": flat,
        "deviation": flat,
        "0.5 % quantile of the foreground": Column(-80, 9, 0, (-80,) * 9),
        "99.5 % quantile of the foreground": Column(320, 9, 0, (320,) * 9),
    }
    chosen, why = steps(Reference(9, 9, {}, columns), "CT")
    assert chosen == ({"step": "window", "center": 120.0, "width": 400.0},)
    assert "Hounsfield" in why[0]


def test_a_plan_survives_its_file_and_a_persons_hand(tmp_path: Path) -> None:
    table = registry(tmp_path)
    made = plan(DataSpec(**table), "s", by_site=True)
    path = Path(written(made, tmp_path))
    assert DataPlan.read(path).text() == dataclasses.replace(made, why=()).text()  # comments are not read back
    text = path.read_text()
    assert '"age" = {' in text
    path.write_text(text.replace('"age" = { center = ', '"age" = { center = 1', 1))
    assert (
        federate(DataSpec(**table, plan=str(path))).fingerprint
        != federate(DataSpec(**table, plan=written(made, tmp_path))).fingerprint
    )


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("version = 1", "version = 9", "not a plan of this version"),
        ("[use.inputs]", "[use.other]", "either steps .* or inputs"),
        ("spread = ", "spread = -", "needs center, spread"),
        ("mean = ", 'mean = "x" #', "cannot be read"),
        ("patients = ", "patient = ", "damaged below"),
        ("shares = [", "shares = [0.5, ", "damaged"),
    ],
)
def test_a_damaged_plan_is_refused_in_a_sentence(tmp_path: Path, old: str, new: str, says: str) -> None:
    table = registry(tmp_path)
    path = Path(written(plan(DataSpec(**table), "s"), tmp_path))
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(DataError, match=says):
        federate(DataSpec(**table, plan=str(path)))


def test_a_plan_beside_steps_or_of_another_kind_is_refused(tmp_path: Path) -> None:
    table = registry(tmp_path)
    path = written(plan(DataSpec(**table), "s"), tmp_path)
    with pytest.raises(ValidationError, match="and so does statistics"):
        DataSpec.model_validate({**table, "plan": path, "statistics": "site"})
    picture(tmp_path / "x" / "a" / "1.png")
    with pytest.raises(DataError, match="made for a table, which this data is not"):
        federate(DataSpec(kind="folders", path=str(tmp_path / "x"), plan=path))
    with pytest.raises(DataError, match=r'"nowhere\.toml": there is nothing'):
        federate(DataSpec(**table, plan="nowhere.toml"))


def wide(root: Path, **more: Any) -> dict[str, Any]:
    """A table with an amount, an amount that never varies, one that is sometimes missing, and a column of 0 and 1."""
    rng = np.random.default_rng(2)
    lines = ["site,id,age,same,dose,smokes,y"]
    for i in range(150):
        dose = "" if i % 5 == 0 else f"{rng.gamma(2, 50):.3f}"
        lines.append(f"{'abc'[i % 3]},p{i // 6 * 3 + i % 3},{rng.normal(50, 9):.2f},7,{dose},{i // 4 % 2},{i // 3 % 2}")
    (root / "w.csv").write_text("\n".join(lines))
    return {"kind": "table", "path": str(root / "w.csv"), "label": "y", "patient": "id", "site": "site", **more}


@pytest.mark.parametrize("options", [{}, {"fill": "zero"}, {"scale": False}, {"fill": "zero", "scale": False}])
def test_a_table_is_filled_and_scaled_as_it_says(tmp_path: Path, options: dict[str, Any]) -> None:
    table = wide(tmp_path, **options)
    made = plan(DataSpec(**table), "s", 4)
    pooled = federate(DataSpec(**table), 4)
    (fit,) = {one.text(): one for one in pooled.statistics.values()}.values()
    inputs = known(made.inputs)
    assert inputs.names == fit.names
    for key in ("center", "spread", "fill"):
        np.testing.assert_allclose(getattr(inputs, key), getattr(fit, key), rtol=1e-6, atol=1e-9)
    planned = federate(DataSpec(**table, plan=written(made, tmp_path)), 4)
    for site, roles in pooled.sites.items():
        for role, examples in roles.items():
            x = loaded(planned.sites[site][role]).inputs
            torch.testing.assert_close(x, loaded(examples).inputs, rtol=1e-5, atol=1e-5)
            assert bool(x.isfinite().all())


def test_a_plan_says_of_what_it_was_made(tmp_path: Path) -> None:
    """The study, the seed of its split, the data, and how many training patients of which classes."""
    table = wide(tmp_path)
    made = plan(DataSpec(**table), "my study", 4, by_site=True)
    data = federate(DataSpec(**table), 4)
    train = {site: roles["train"] for site, roles in data.sites.items()}
    assert (made.study, made.seed, made.data) == ("my study", 4, DataSpec(**table).source().fingerprint)
    assert made.why == (f"from the sums of {sum(map(len, train.values()))} rows",)
    everyone = [patient for examples in train.values() for patient in examples.patients]
    assert made.everywhere.patients == len(set(everyone)) < len(everyone) == made.everywhere.examples
    targets = {site: loaded(examples).targets for site, examples in train.items()}
    assert set(made.sites) == set("abc")
    for reference, of in (
        (made.everywhere, torch.cat(list(targets.values()))),
        *((made.sites[s], targets[s]) for s in "abc"),
    ):
        assert reference.classes == {"0": int((of == 0).sum()), "1": int((of == 1).sum())}
    assert {site: one.patients for site, one in made.sites.items()} == {
        s: len(set(e.patients)) for s, e in train.items()
    }
    assert plan(DataSpec(**table), "s").sites == {}


def test_all_that_is_at_a_site_is_compared_with_the_plan(tmp_path: Path) -> None:
    """Each site's training, validation and test rows, also of a site that does not train; small sites are left out."""
    table = wide(tmp_path)
    with open(tmp_path / "w.csv", "a") as file:
        file.write("\n" + "\n".join(f"tiny,t{i},50,7,1,0,{i % 2}" for i in range(9)))
    made = plan(DataSpec(**table), "s", by_site=True)
    given = DataSpec(**table, min_patients=3, external=("c",), unlabeled=0.3, split=(0.2, 0.2, 0.6))
    found = drifts(made, given)
    assert {one.site: one.patients for one in found} == dict.fromkeys("abc", 25)
    assert all(one.against == f"its own {made.sites[one.site].patients} training patients" for one in found)
    assert {moved.name for moved in found[0].found} >= {"dose"}
    assert any(moved.name.startswith("share of") for moved in found[0].found)
    assert not any(one.alarm for one in found)


@pytest.mark.parametrize("sites", [{"partition": "iid", "count": 3}, "natural"])
def test_sites_that_are_simulated_or_unknown_are_compared_as_one(tmp_path: Path, sites: Any) -> None:
    table = wide(tmp_path)
    made = plan(DataSpec(**table), "s")
    if sites == "natural":
        del table["site"]
        text = (tmp_path / "w.csv").read_text()
        (tmp_path / "w.csv").write_text(text.replace("site,id", "place,id", 1))
        table["features"] = ["age", "same", "dose", "smokes"]
    (found,) = drifts(made, DataSpec(**table, sites=sites))
    assert (found.site, found.patients) == ("all of it", 75)
    assert found.against == f"the {made.everywhere.patients} training patients of all sites"


def test_classes_have_the_names_that_the_data_say_or_their_numbers(tmp_path: Path) -> None:
    source = DataSpec(**wide(tmp_path)).source()
    assert class_names(source, torch.tensor([0, 1])) == ("0", "1")
    assert class_names(source, torch.tensor([0, 3])) == ("0", "1", "class 2", "class 3")
    assert class_names(source, torch.zeros(2, 3)) == ("0", "1", "class 2")
    time = DataSpec(**wide(tmp_path) | {"label": "age", "regression": True}).source()
    assert class_names(time, torch.tensor([0.5, 70.0])) == ()


def test_what_is_neither_images_nor_a_table_needs_no_plan() -> None:
    with pytest.raises(DataError, match="is neither images nor a table of columns: there is nothing to prepare"):
        plan(DataSpec(kind="roi-phantom", sites="site"), "s")


def test_rows_without_labels_are_measured_too(tmp_path: Path) -> None:
    spec = DataSpec(**wide(tmp_path), unlabeled=0.5)
    data = federate(spec, 2)
    rows = {site: len(roles["train"]) + len(roles["unlabeled"]) for site, roles in data.sites.items()}
    assert {site: len(found) for site, found in sites_of(spec, 2).items()} == rows
    assert rows == {site: len(found) for site, found in sites_of(DataSpec(**wide(tmp_path)), 2).items()}

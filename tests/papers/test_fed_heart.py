"""Fed-Heart-Disease of FLamby from a study file: every cell within one patient of the published one."""

import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from polyclinic.evaluation.records.run_reader import read_run
from polyclinic.learning.weights import store
from polyclinic.studies.config.scenarios import read_all
from polyclinic.studies.run.scheduler import run

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
pytestmark = pytest.mark.slow
STUDY = ROOT / "benchmarks/studies/fed-heart.toml"
NEVER_PUBLISHED = "cyclic"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, real_data: Path) -> Iterator[Path]:
    """The folder of the tables, and the environment that the study needs."""
    import fed_heart

    folder = tmp_path_factory.mktemp("fed-heart")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FED_HEART", str(folder))
        patch.setenv(store.VARIABLE, str(folder / "weights"))
        fed_heart.prepare(real_data / "uci_heart_4hospitals/heart_4sites.csv", folder)
        yield folder


def test_patients_are_those_of_the_published_split(prepared: Path, real_data: Path) -> None:
    import fed_heart

    data = fed_heart.patients(real_data / "uci_heart_4hospitals/heart_4sites.csv")
    counts = [
        [int(((data["site"] == site) & (data["split"] == part)).sum()) for part in ("train", "test")]
        for site in fed_heart.SITES
    ]
    assert counts == [[199, 104], [172, 89], [30, 16], [85, 45]]
    for name, (rows, features) in fed_heart.tables(real_data / "uci_heart_4hospitals/heart_4sites.csv").items():
        for site in fed_heart.SITES:
            chosen = rows["split"] == "train"
            if name != "pooled":
                chosen = chosen & (rows["site"] == site)
            if chosen.sum() > 1:
                assert np.allclose(features[chosen].mean(0), 0, atol=1e-5)
                varies = features[chosen].std(0) > 0
                assert np.allclose(features[chosen].std(0, ddof=1)[varies], 1, atol=1e-4)


@pytest.mark.parametrize("kind", ["cleveland", "local", "pooled", "rounds"])
def test_every_cell_is_within_one_patient(kind: str, prepared: Path, tmp_path: Path) -> None:
    """The median of three orders of batches, for each start weights, method and hospital."""
    import fed_heart

    published = tomllib.loads(STUDY.with_name("fed-heart-published.toml").read_text(encoding="utf-8"))
    scenarios = read_all(STUDY, {"engine.kind": "in-process"})
    apart: dict[str, int] = {}
    for scenario in scenarios:
        name, _, seed = scenario.name.partition("-")
        if name != kind:
            continue
        folder = scenario.folder(tmp_path)
        for _ in run(scenario.study, scenario.text, folder):
            pass
        correct = fed_heart.correct(read_run(folder))
        for label, found in correct.items():
            if label == NEVER_PUBLISHED:
                continue
            expected = published[kind if kind == "cleveland" else label][int(seed) - 42]
            for site, counts, wanted in zip(fed_heart.SITES, found, expected, strict=True):
                apart[f"{scenario.name} {label} {site}"] = int(np.median(counts)) - wanted
    assert len(apart) == {"rounds": 120}.get(kind, 20)
    assert not {cell: difference for cell, difference in apart.items() if abs(difference) > 1}

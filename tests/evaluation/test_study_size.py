"""The size of a study from a pilot run, and the command."""

import json
from pathlib import Path

import numpy as np
import pytest

from polyclinic.cli import results
from polyclinic.errors import ConfigError
from polyclinic.evaluation.metric_functions import metrics_for
from polyclinic.evaluation.records.run_reader import read_run
from polyclinic.evaluation.sample import sample
from polyclinic.evaluation.study_size import pilot
from tests.support.known import known
from tests.support.synthetic_run import write_run

SITES = {"ada": ("training", 60, 0.4, 0.0, 0.0), "bo": ("training", 40, 0.4, 0.2, 0.1)}


def test_a_pilots_variation_is_that_of_its_difference(tmp_path: Path) -> None:
    path = write_run(tmp_path / "r", sites=SITES, methods=("fedavg", "fedprox"), seeds=(0, 1, 2), task="segmentation")
    found = pilot(path)
    assert (found.metric, found.sites, found.patients, found.seeds) == ("dice", 2, 100, 3)
    data = sample(read_run(path), 0.95)
    dice = metrics_for("segmentation")["dice"]
    each = [
        np.mean(
            [data.cases["fedprox", s][k].values["dice"] - data.cases["fedavg", s][k].values["dice"] for s in range(3)],
            axis=0,
        )[:, 0]
        for k in SITES
    ]
    expected = sum(len(d) * d.var(ddof=1) for d in each) / 100
    assert found.sd == pytest.approx(expected**0.5)
    values = data.by_split("fedprox", "fedavg", list(SITES), dice)
    assert found.seed_sd == pytest.approx(np.std(values, ddof=1))
    assert found.planned_sd > found.sd
    assert found.planned_seed_sd > 2 * known(found.seed_sd)


def test_pilots_that_cannot_serve_say_why(tmp_path: Path) -> None:
    path = write_run(tmp_path / "r", sites=SITES, methods=("fedavg", "fedprox"), seeds=(0,))
    with pytest.raises(ConfigError, match=r'no tested method "fedbn"\. There are: fedavg, fedprox'):
        pilot(path, "fedbn")
    with pytest.raises(ConfigError, match="both fedavg"):
        pilot(path, "fedavg", "fedavg")
    tiny = write_run(tmp_path / "t", sites={"ada": ("training", 12, 0.5, 0.0, 0.0)}, methods=("fedavg", "fedprox"))
    with pytest.raises(ConfigError, match="12 test patients are too few for a pilot; 20 are needed"):
        pilot(tiny)
    single = write_run(tmp_path / "s", sites={"ada": ("training", 40, 0.0, 0.0, 0.0)}, methods=("fedavg", "fedprox"))
    with pytest.raises(ConfigError, match="undefined for one of the two methods at every site"):
        pilot(single)


def test_the_command_plans_from_a_pilot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_run(tmp_path / "r", sites=SITES, methods=("fedavg", "fedprox"), seeds=(0,))
    results.plan_size(path, kind="non-inferiority", margin=0.05, sites=[4], json_=True)
    answer = json.loads(capsys.readouterr().out)
    (plan,) = answer["plans"]
    assert plan["sites"] == 4
    assert plan["patients"] == 4 * plan["patients_per_site"]
    assert 0.8 <= plan["power"] < 0.85
    assert answer["pilot"]["sites"] == 2
    results.plan_size(path, kind="non-inferiority", margin=0.05, sites=[4])
    assert "Pilot: 100 test patients at 2 sites" in capsys.readouterr().out


def test_every_mistake_of_the_command_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        results.plan_size(sd=-1.0, auc=2.0, power=3.0, sites=[0], seeds=0, correlation=1.0)
    said = str(error.value)
    for words in ("--difference: give", "--power 3", "--sites 0", "--seeds 0", "--sd and --auc", "--sd -1", "--auc 2"):
        assert words in said
    with pytest.raises(ConfigError, match="give a pilot run, or one of"):
        results.plan_size(difference=0.02)
    with pytest.raises(ConfigError, match="cannot be shown"):
        results.plan_size(sd=0.1, kind="non-inferiority", margin=0.02, difference=-0.03)
    with pytest.raises(ConfigError, match="needs a positive margin"):
        results.plan_size(sd=0.1, kind="equivalence")

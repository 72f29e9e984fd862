"""Duplicates across hospitals: the exchange of a deployment gives the counts of one machine, if policies allow it."""

import json
from pathlib import Path

import numpy as np
import pytest

from polyclinic.cli.data import duplicates
from polyclinic.core import serialization as states
from polyclinic.engines.flare.protocol.paths import SiteFolder
from polyclinic.engines.flare.protocol.run_request import RunRequest
from polyclinic.engines.policy import site_policy as policies
from polyclinic.methods.statistics.duplicate_search import shared_by
from polyclinic.studies.audits import duplicate_counts
from polyclinic.studies.config import study_config
from polyclinic.studies.run import deployment
from tests.conftest import little_sites
from tests.support.local_deployment import LocalCarrier, approve, coordinator, make_site, order

ALLOWED = policies.DEFAULT.replace('gather = ["score", "describe"]', 'gather = ["score", "describe", "duplicates"]')
METHOD = "duplicate-search"
STUDY = """
name = "copies"
rounds = 1
[data]
kind = "npz"
path = "PATH"
[task]
kind = "classification"
network = "cnn"
[[methods]]
name = "duplicate-search"
"""


def houses(root: Path, policy: str = ALLOWED) -> dict[str, SiteFolder]:
    """Three hospitals. The second tests on 7 training images of the first; the third has 2 of them."""
    homes = {name: make_site(root / name, name, site, policy) for name, site in little_sites(count=3).items()}
    train = np.load(root / "site-0" / "data" / "train.npz")["inputs"]
    for name, count in (("site-1", 7), ("site-2", 2)):
        path = root / name / "data" / "test.npz"
        with np.load(path) as own:
            arrays = dict(own)
        arrays["inputs"][:count] = train[:count]
        np.savez(path, **arrays)
    return homes


def ran(root: Path, homes: dict[str, SiteFolder], an: RunRequest) -> str:
    for home in homes.values():
        approve(home, an)
    return coordinator(root, an, LocalCarrier(homes, an)).run()


def test_hospitals_find_what_they_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    homes, an = houses(tmp_path), order(METHOD, rounds=1)
    assert ran(tmp_path, homes, an) == "finished"
    checkpoint = tmp_path / "server" / an.run / "checkpoint.safetensors"
    state = duplicate_counts.read(checkpoint)
    expected = {("site-0", "site-1"): 7, ("site-0", "site-2"): 2, ("site-1", "site-2"): 2}
    assert shared_by(state, "exact") == shared_by(state, "near") == expected
    assert not state.points
    for home in homes.values():  # the scalar is gone, so that no second list is compared
        assert not [file for file in home.memory(an.run).rglob("*.safetensors") if "blinding" in states.load(file)]
    file = tmp_path / "study.toml"
    file.write_text(STUDY.replace("PATH", str(tmp_path / "site-0" / "data" / "train.npz")))
    capsys.readouterr()
    with pytest.raises(SystemExit, match="1"):
        duplicates(file, checkpoint=checkpoint, json_=True)
    first, second, _ = json.loads(capsys.readouterr().out)
    assert first == {
        "sites": ["site-0", "site-1"],
        "equal": 7,
        "nearly_equal": 7,
        "compared": True,
        "min_count": 5,
    }
    assert second["equal"] is None  # as if there were none
    with pytest.raises(SystemExit, match="1"):
        duplicates(file, checkpoint=checkpoint)
    assert "site-0 and site-2: fewer than 5 equal, fewer than 5 nearly equal" in capsys.readouterr().out


def test_a_hospital_takes_part_only_if_its_policy_says_so(tmp_path: Path) -> None:
    homes, an = houses(tmp_path, policies.DEFAULT), order(METHOD, rounds=1)
    assert ran(tmp_path, homes, an) != "finished"
    why = json.loads((tmp_path / "server" / an.run / "status.json").read_text())["why"]
    assert "'duplicates' would leave as a PerSite" in why
    assert "allow.gather" in why


def test_a_privacy_budget_refuses_exact_counts(tmp_path: Path) -> None:
    policy = policies.parse(f"{ALLOWED}\n[privacy]\nepsilon = 1.0\ndelta = 1e-5\n".encode())
    assert any("privacy" in reason for reason in policy.refusals(order(METHOD, rounds=1).build_plan()))


def test_the_study_is_not_scored(tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    file.write_text(STUDY.replace("PATH", str(tmp_path / "site-0" / "data" / "train.npz")))
    how = deployment.how(study_config.read(file))
    assert (how["score_every"], how["test"], how["best"]) == (0, "", {})

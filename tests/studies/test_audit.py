"""A run's audit: what it finds in a model that memorised, what it writes, and when it refuses."""

import json

import pytest

from polyclinic.cli import audit as cli
from polyclinic.studies.audit import NotAudited, audit_run
from polyclinic.studies.records import NotARun
from tests.studies.test_runner import go, npz, study


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run of one method that had time to learn by heart."""
    folder = tmp_path_factory.mktemp("run")
    npz(folder)
    text = study(folder).split("[[methods]]")[0].replace("seeds = [0, 1]", "seeds = [0]")
    text = text.replace("[training]", '[training]\nepochs = 3\nlr = 0.01\noptimiser = "adam"').replace(
        "dropout = 0.2", ""
    )
    text = text.replace("depth = 2, ", "depth = 2").replace("[training]", '[evaluation]\nselect = "last"\n\n[training]')
    go(text + '[[methods]]\nname = "single"\n\n[[methods]]\nname = "fedavg"\n', folder / "run")
    return folder


def test_an_audit_says_what_it_found_beside_its_controls(done, capsys):
    cli.audit(done / "run", steps=5, restarts=1)
    said, written = capsys.readouterr().out, json.loads((done / "run" / "arms" / "fedavg-seed0" / "audit.json").read_text())
    assert written["method"] == "fedavg"
    assert list(written["membership"]["sites"]) == ["a", "b", "c"]
    assert written["membership"]["control"]["auc"] > 0.7
    assert written["inversion"]["control"]["psnr_db"] > 20
    assert said.count("control") == 2
    for part in ("membership", "inversion"):
        assert written[part]["says"] in said


@pytest.mark.slow
def test_the_same_audit_finds_the_same(done):
    first, again = (audit_run(done / "run", limit=10, steps=1, restarts=1).to_json() for _ in range(2))
    assert first == again
    assert all(one["members"] == 10 for one in first["membership"]["sites"].values())


def test_what_cannot_be_audited_is_refused(done, tmp_path):
    with pytest.raises(NotARun):
        audit_run(tmp_path)
    with pytest.raises(NotAudited, match=r"there is no method 'x' with seed 0\. Methods: "):
        audit_run(done / "run", "x")
    npz(done, labels=__import__("numpy").arange(160) % 2)
    with pytest.raises(NotAudited, match="the data have changed since the run"):
        audit_run(done / "run")

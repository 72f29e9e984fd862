"""A run's audit: what it finds in a model that memorized, what it writes, and when it refuses."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from polyclinic.cli import audit as cli
from polyclinic.evaluation.records.record_schema import Round, rounded_up
from polyclinic.evaluation.records.run_reader import NotARun, read_run
from polyclinic.evaluation.run_evaluation import Options
from polyclinic.learning.training.local import LocalTraining
from polyclinic.report import build_report
from polyclinic.studies.audits import run_audit
from polyclinic.studies.audits.audit_file import Inverted, Leak, NotAnAudit, read_audit
from polyclinic.studies.audits.run_audit import NotAudited, audit_run
from polyclinic.studies.run.data_identity import DataChanged
from polyclinic.studies.run.run_directory import write_tensors
from tests.support.known import known
from tests.support.small_runs import go, npz, study


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of one method that had time to learn by heart."""
    folder = tmp_path_factory.mktemp("run")
    npz(folder)
    text = study(folder).split("[[methods]]")[0].replace("seeds = [0, 1]", "seeds = [0]")
    text = text.replace("[training]", '[training]\nepochs = 3\nlr = 0.01\noptimizer = "adam"').replace(
        "dropout = 0.2", ""
    )
    text = text.replace("depth = 2, ", "depth = 2").replace("[training]", '[evaluation]\nselect = "last"\n\n[training]')
    go(
        text + '[[methods]]\nname = "local"\n\n[[methods]]\nname = "fedavg"\n\n[[methods]]\nname = "pooled"\n',
        folder / "run",
    )
    return folder


@pytest.fixture
def not_inverted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the search for an image, which takes most of the time."""
    leak = Leak(1.0, 1.0, 0.0)
    monkeypatch.setattr(
        run_audit, "_inverted", lambda target, site, limit, how: Inverted(site, leak, leak, "Not tried.")
    )


def test_an_audit_says_what_it_found_beside_its_controls(done: Any, capsys: pytest.CaptureFixture[str]) -> None:
    cli.audit(done / "run", steps=3, restarts=1)
    said, written = (
        capsys.readouterr().out,
        json.loads((done / "run" / "arms" / "fedavg-seed0" / "audit.json").read_text()),
    )
    assert written["method"] == "fedavg"
    assert list(written["membership"]["sites"]) == ["a", "b", "c"]
    assert list(written["membership"]["sites"]["a"]) == ["loss"]
    assert written["membership"]["control"]["auc"] > 0.7
    assert written["inversion"]["control"]["psnr_db"] > 20
    assert said.count("control") == 2
    for part in ("membership", "inversion"):
        assert written[part]["says"] in said
    assert written["privacy"] is None
    assert [text in said for text in written["not_done"]] == [True, True]
    assert "--attack all" in written["not_done"][0]
    assert "the canary audit is of training with DP-SGD" in written["not_done"][1]
    read = read_audit(done / "run" / "arms" / "fedavg-seed0" / "audit.json")
    assert read.to_json() == written


def test_shadow_models_are_trained_once_and_kept(
    done: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, not_inverted: Any
) -> None:
    """LiRA and RMIA, with 4 shadow models and then 6; what was trained is not trained again, and gives the same."""
    trained, told = list[str](), list[Any]()
    usual = LocalTraining.fit

    def fit(self: LocalTraining, *a: Any, **k: Any) -> Any:
        trained.append(a[2].name)
        return usual(self, *a, **k)

    monkeypatch.setattr(LocalTraining, "fit", fit)

    def go_on(count: Any, attack: Any) -> Any:
        trained.clear()
        return audit_run(
            done / "run",
            attack=attack,
            shadow_models=count,
            steps=1,
            restarts=1,
            site="b",
            progress=lambda *what: told.append(what),
        )

    first = go_on(4, "all")
    rounds = 4
    assert sum(name != "control" for name in trained) == 4 * rounds * 3
    assert told == [("shadow models", k, 4) for k in (1, 2, 3, 4)]
    assert list(first.membership.sites) == ["b"]
    assert list(first.membership.sites["b"]) == ["loss", "LiRA", "LiRA offline", "RMIA"]
    assert first.membership.shadows == 4
    assert first.not_done == ("No lower bound on ε: the canary audit is of training with DP-SGD.",)
    again = go_on(4, "rmia")
    assert sum(name != "control" for name in trained) == 0
    assert again.membership.sites["b"]["RMIA"] == first.membership.sites["b"]["RMIA"]
    assert again.not_done[0] == "The loss attack and LiRA were not tried."
    go_on(6, "lira")
    assert sum(name != "control" for name in trained) == 2 * rounds * 3
    file = done / "run" / "arms" / "fedavg-seed0" / "shadows" / "0.safetensors"
    write_tensors(file, {"loss": torch.zeros(3)}, {"key": "another study's"})
    assert go_on(4, "all").membership == first.membership  # what does not belong here is trained again
    cli.audit(done / "run", steps=1, restarts=1, json_=True)
    assert json.loads(capsys.readouterr().out)["method"] == "fedavg"


def test_shadows_of_one_place_that_holds_all_data(done: Any, not_inverted: Any) -> None:
    """Mix trains in one place; its shadow models do, too."""
    found = audit_run(done / "run", "pooled", attack="rmia", shadow_models=4, steps=1, restarts=1)
    assert all(one["RMIA"].members > 1 for one in found.membership.sites.values())


def test_a_private_run_is_trained_once_more_with_canaries(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], not_inverted: Any
) -> None:
    """The claim is the run's own; the report shows it next to the bound."""
    npz(tmp_path)
    text = study(tmp_path).split("[[methods]]")[0].replace("seeds = [0, 1]", "seeds = [0]")
    text = text.replace("width = 4, depth = 2, dropout = 0.2", "width = 16").replace(
        "[task]", '[task]\nnetwork = "mlp"'
    )
    text = text.replace("rounds = 4", "rounds = 2") + (
        '[privacy]\nepsilon = 8.0\ndelta = 1e-5\n\n[[methods]]\nname = "fedavg"\n'
        "training = { private = { noise = 4.0, bound = 1.0 } }\n"
    )
    path = tmp_path / "run"
    go(text, path)
    cli.audit(path, steps=1, restarts=1, canaries=60, site="b")
    written = json.loads((path / "arms" / "fedavg-seed0" / "audit.json").read_text())
    claim = [p for p in read_run(path).privacy if p.site == "b"][-1]
    assert (written["privacy"]["claimed"], written["privacy"]["delta"]) == (claim.epsilon, claim.delta)
    assert written["privacy"]["unit"] == claim.unit == "patient"
    assert written["privacy"]["rounds"] == 2
    assert written["privacy"]["canaries"] == 60
    assert written["privacy_site"] == "b"
    assert written["privacy"]["at_least"] <= claim.epsilon
    assert written["privacy"]["says"] in capsys.readouterr().out
    page = build_report(path, options=Options()).read_text(encoding="utf-8")
    section = page[page.index('id="privacy"') :].split("</section>")[0]
    table = known(re.search(r"Claimed ε and audited lower bound.*?</table>", section, re.S))[0]
    cells = [re.sub(r"<[^>]+>", "", cell).strip() for cell in re.findall(r"<t[dh].*?</t[dh]>", table, re.S)]
    assert "b" in cells
    assert f"{written['privacy']['at_least']:.2f}" in cells
    assert rounded_up(known(claim.epsilon)) in cells
    assert "Membership inference: which patients can be identified as training patients." in section
    assert "TPR at 0.1 % FPR" in section
    assert "Not done for FedAvg." in section
    left = audit_run(path, steps=1, restarts=1, canaries=0)
    assert left.privacy is None
    assert "no canaries were asked for" in left.not_done[-1]


def test_rounds_in_which_a_site_did_not_train_are_not_counted(monkeypatch: pytest.MonkeyPatch, done: Any) -> None:
    """With a cohort a site pays for its own rounds only, and its audit trains as many."""
    run = read_run(done / "run")
    lines = [
        line.model_copy(update={"lost": {"a": "away"}}) if isinstance(line, Round) and line.round < 3 else line
        for line in run.lines
    ]
    asked = list[int]()

    def stopped(*_: Any, **k: Any) -> None:
        asked.append(k["rounds"])
        raise NotAudited("stopped here")

    monkeypatch.setattr(run_audit, "audit_training", stopped)
    target = run_audit._target(run, "fedavg", 0)
    private = replace(target.plan, training={**target.plan.training, "private": {"noise": 1.0}})
    for site, wanted in (("a", 2), ("b", 4)):
        told = run_audit._privacy(
            replace(run, lines=tuple(lines)), replace(target, plan=private), "fedavg", site, None, print
        )
        assert asked[-1] == wanted
        assert told == (None, "", "No lower bound on ε: stopped here.")


def test_a_damaged_audit_is_named_in_the_report(done: Any) -> None:
    file = done / "run" / "arms" / "local-seed0" / "audit.json"
    for text, why in (
        ("{", "a damaged audit"),
        ("{}", "not an audit of this version"),
        ("[1]", "not an audit of this"),
        ('{"format": 2}', "a damaged audit"),
    ):
        file.write_text(text)
        with pytest.raises(NotAnAudit, match=why):
            read_audit(file)
    page = build_report(done / "run", options=Options()).read_text(encoding="utf-8")
    file.unlink()
    assert "a damaged audit: delete it" in page


@pytest.mark.slow
def test_the_same_audit_finds_the_same(done: Any) -> None:
    first, again = (audit_run(done / "run", limit=10, steps=1, restarts=1).to_json() for _ in range(2))
    assert first == again
    assert all(one["loss"]["members"] == 10 for one in first["membership"]["sites"].values())


def test_what_cannot_be_audited_is_refused(done: Any, tmp_path: Path) -> None:
    with pytest.raises(NotARun):
        audit_run(tmp_path)
    with pytest.raises(NotAudited, match=r"there is no method 'x' with seed 0\. Methods: "):
        audit_run(done / "run", "x")
    with pytest.raises(NotAudited, match=r"nowhere is no site with training and test data\. There are a, b, c"):
        audit_run(done / "run", site="nowhere")
    with pytest.raises(NotAudited, match="no attack is called 'guess'; there are loss, lira, rmia and all"):
        audit_run(done / "run", attack="guess")
    with pytest.raises(ValueError, match="4, 6, 8"):
        audit_run(done / "run", attack="lira", shadow_models=3)
    npz(done, labels=__import__("numpy").arange(160) % 2)
    with pytest.raises(DataChanged, match=r"the data have changed since the run began:\n  a: .*\d+ labels changed"):
        audit_run(done / "run")

"""``--json``: every command that reports has it, and prints one JSON document and nothing else."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cyclopts import App
from pydicom.dataset import Dataset

from polyclinic.cli import app, rendering
from polyclinic.engines.flare.client.reviews import Reviews
from polyclinic.engines.flare.protocol.paths import ServerFolder
from polyclinic.engines.flare.server.job_queue import FINISHED, Queue
from polyclinic.learning.weights.store import VARIABLE
from tests.support.image_files import image, save
from tests.support.local_deployment import hospital, order
from tests.support.small_runs import npz
from tests.support.synthetic_run import write_run

EXCEPTIONS = {  # with the reason; docs/reference/cli-json.md lists the same
    "server start": "runs until it is stopped",
    "site start": "runs until it is stopped",
    "server unit": "prints the text of a systemd unit",
    "site unit": "prints the text of a systemd unit",
    "console": "runs until it is stopped",
    "server console": "runs until it is stopped",
    "site console": "runs until it is stopped",
}
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "cli-json.md"
LITTLE = {"ada": ("training", 40, 0.5, 0.0, 0.0), "bo": ("training", 30, 0.4, 0.2, 0.1)}
STUDY = """
name = "little"
rounds = 1
seeds = [0]
[data]
path = "small.npz"
kind = "npz"
sites = "site"
[task]
network = "mlp"
options = { width = 4, depth = 1 }
[engine]
kind = "in-process"
[[methods]]
name = "fedavg"
"""
OTHERS = {  # commands that are not called here, and the tests that read their JSON, or why none does
    "outliers": "test_outliers",
    "plan-size": "tests/evaluation/test_study_size",
    "data drift": "test_data_commands",
    "data duplicates": "tests/studies/audits/test_duplicate_counts",
    "audit": "tests/studies/audits/test_run_audit",
    "audit release": "tests/studies/audits/test_release_command",
    "plan": "tests/studies/run/test_case_planning",
    "explain": "needs captum",
    "predict": "tests/studies/inference/test_predict",
    "evaluate": "tests/studies/inference/test_frozen_evaluation",
    "data deidentify": "needs pydicom",
    "vectors make": "tests/studies/export/test_vector_exchange",
    "vectors merge": "tests/studies/export/test_vector_exchange",
    "vectors remove": "tests/studies/export/test_vector_exchange",
    "vectors show": "tests/studies/export/test_vector_exchange",
    "site join": "needs a certificate of a running server; tests/engines/flare/test_guide calls it without --json",
    "server export": "needs a finished run between hospitals; tests/engines/flare/test_guide calls it without --json",
}


def commands(at: App = app.app, name: str = "") -> Iterator[tuple[str, App]]:
    """Every command with its name, without those of the group ``study``, which are the same."""
    for word in at:
        if not word.startswith("-") and (full := f"{name} {word}".strip()) != "study":
            if at[word].default_command is not None:
                yield full, at[word]
            yield from commands(at[word], full)


def options(command: App) -> set[str]:
    return {n for argument in command.assemble_argument_collection(parse_docstring=True) for n in argument.names}


def test_every_command_takes_json_or_is_a_named_exception() -> None:
    without = {name for name, command in commands() if "--json" not in options(command)}
    assert without == set(EXCEPTIONS)


def test_the_page_describes_every_command() -> None:
    rows = re.findall(r"^\| `([^`]+)` \| (.+) \|$", PAGE.read_text(encoding="utf-8"), re.M)
    assert sorted(name for name, _ in rows) == sorted(name for name, _ in commands())
    assert {name for name, _ in rows if name in EXCEPTIONS} == set(EXCEPTIONS)


Call = Callable[..., Any]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command in ``tmp_path`` with ``--json`` and return the document."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "store"))  # commands of a site change it
    called: set[str] = set()

    def run(*words: str, code: int = 0) -> Any:
        called.add(" ".join(words))
        monkeypatch.setattr(sys, "argv", ["polyclinic", *words, "--json"])
        capsys.readouterr()
        ended = 0
        try:
            app.main()
        except SystemExit as end:
            ended = int(end.code or 0)
        output = capsys.readouterr()
        assert ended == code, (words, output)
        return json.loads(output.out, parse_constant=lambda name: pytest.fail(f"{words}: {name} is not JSON"))

    run.called = called  # type: ignore[attr-defined]
    return run


def test_each_prints_one_document_and_nothing_else(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    studies(call, tmp_path)
    replaced(call, tmp_path, monkeypatch)
    catalogs_and_data(call, tmp_path)
    weights(call, tmp_path)
    server(call, tmp_path)
    site(call, tmp_path)
    names = {name for name, _ in commands()}
    tried = {name for name in names for words in call.called if f"{words} ".startswith(f"{name} ")}  # type: ignore[attr-defined]
    assert names - tried - set(EXCEPTIONS) - set(OTHERS) == set()


def studies(call: Call, tmp_path: Path) -> None:
    npz(tmp_path)
    assert call("new", "new.toml") == {"study": "new.toml"}
    (tmp_path / "s.toml").write_text(STUDY)
    (result,) = call("run", "s.toml")
    assert result["methods"][0]["method"] == "fedavg"
    assert set(result["tested"][0]["scores"]) >= {result["methods"][0]["worst_site"]}
    assert result["training"]["fedavg"]["lr"] > 0
    assert call("data", "look", "s.toml", "--images", "2", "--samples", "1")["samples"] == 1
    run = result["run"]
    assert call("status", run)[0]["methods"][0]["status"] == "tested"
    assert call("stop", run, code=1)["process"] is None
    assert Path(call("export", run, "m.safetensors", "--form", "safetensors")["path"]).is_file()
    assert call("journal", "verify", f"{run}/journal.jsonl")["entries"] > 0
    a, b = (write_run(tmp_path / n, sites=LITTLE, seeds=(0,), methods=("local", "fedavg")) for n in "ab")
    assert Path(call("report", str(a))["report"]).is_file()
    assert {row["verdict"] for row in call("compare", str(a), str(b))} >= {"reference"}
    assert len(call("panel", str(a), str(b))["methods"]) == 4


def replaced(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands whose work is replaced, since it takes long, or needs a network or packages."""
    from polyclinic.cli import results, run
    from polyclinic.data.catalog import dataset_catalog
    from polyclinic.studies.export import tracking
    from polyclinic.studies.run import case_pictures

    def work(*given: Any) -> list[dict[str, Any]]:
        print("text")
        return [{"run": given[4]}]

    with monkeypatch.context() as patch:
        patch.setattr(run, "run_all", work)
        patch.setattr(results, "run_all", work)
        patch.setattr(dataset_catalog, "get", lambda *given: Path("set.npz"))
        patch.setattr(tracking, "track", lambda *given: "sqlite:///mlflow.db")
        assert call("demo", "--out", "d") == [{"run": "d"}]
        assert call("panel", "run", "s.toml", "--out", "p") == [{"run": "p"}]
        assert call("data", "get", "pneumoniamnist") == {"name": "pneumoniamnist", "path": "set.npz"}
        patch.setattr(case_pictures, "draw", lambda *given: (Path("cases.npz"), {"lyon": "not allowed"}))
        assert call("pictures", "a") == {"refused": {"lyon": "not allowed"}, "path": "cases.npz"}
        assert call("track", "a", "--to", "mlflow")["where"] == "sqlite:///mlflow.db"
    (tmp_path / "t.toml").write_text(STUDY)
    assert Path(call("data", "plan", "t.toml")["plan"]).is_file()


def catalogs_and_data(call: Call, tmp_path: Path) -> None:
    segments = image(np.zeros((2, 2), np.uint8), "SEG", SegmentSequence=[])
    segments.SegmentSequence.append(Dataset())
    segments.SegmentSequence[0].SegmentNumber, segments.SegmentSequence[0].SegmentLabel = 1, "Liver"
    save(segments, tmp_path / "seg.dcm")
    assert call("data", "segments", "seg.dcm")["segments"] == {"1": "Liver"}
    assert "Federated optimization" in call("methods")
    assert call("methods", "show", "fedprox")["options"]["mu"]["default"] == 0.01
    assert "unet" in call("networks")
    assert "clip" in call("transforms")
    assert {"lidc-nodules"} <= {one["name"] for one in call("data", "list")}
    assert call("data", "show", "lidc-nodules")
    assert call("data", "check", "small.npz", code=call_code(tmp_path))["examples"] > 0
    (row,) = call("privacy", "plan", "--patients", "100", "--rounds", "2", "--delta", "1e-4", "--epsilon", "8")
    assert row["noise"] > 0
    from polyclinic.privacy.ledger import Ledger

    Ledger(tmp_path / "x.jsonl").begin(site="ada", data="d", unit="patient", epsilon=1.0, delta=1e-5)
    assert call("privacy", "ledger", "x.jsonl")[0]["left"] == 1.0


def weights(call: Call, tmp_path: Path) -> None:
    """Commands on the model that ``studies`` exported."""
    added = call("weights", "add", "m.safetensors", "--name", "start", "--license", "MIT")
    assert added["tensors"] == 4
    assert call("weights", "list")[0]["sha256"] == added["sha256"]
    assert len(call("weights", "show", "start")["tensors"]) == 4
    (tmp_path / "w.toml").write_text(STUDY.replace("[engine]", '[task.weights]\nfile = "start"\nhead = true\n[engine]'))
    assert len(call("weights", "check", "w.toml")["loaded"]) == 4
    home = ("--home", str(hospital(tmp_path / "weights", count=1)["site-0"].path))
    at_site = call("site", "weights", "add", "m.safetensors", "--name", "start", "--license", "MIT", *home)
    assert at_site["sha256"] == added["sha256"]
    assert call("site", "weights", "list", *home)[0]["name"] == "start"
    assert call("weights", "remove", "start", "--yes") == {"name": "start", "sha256": added["sha256"]}


def call_code(tmp_path: Path) -> int:
    from polyclinic.data.quality.site_check import check_folder

    return 0 if check_folder(str(tmp_path / "small.npz")).ok else 1


def server(call: Call, tmp_path: Path) -> None:
    at = ("--home", "coordinator")
    made = call("server", "init", "--project", "p", "--host", "localhost", "--organization", "o", *at)
    assert call("server", "fingerprint", *at) == {"fingerprint": made["fingerprint"]}
    assert call("server", "sites", *at) == []
    request = call("site", "init", "--name", "ada", "--organization", "o", "--home", "ada")["request"]
    assert call("server", "admit", request, *at)["site"] == "ada"
    assert call("server", "revoke", "ada", *at)["state"] == "revoked"
    assert call("server", "sites", *at)[0]["state"] == "revoked"
    assert call("server", "reinstate", "ada", *at)["state"] == "admitted"
    assert call("server", "renew", *at)["days"] == 730
    (queued,) = call("server", "rehearse", "--name", "first", *at)["queued"]
    (tmp_path / "r.json").write_text(json.dumps({**json.loads(order(sites=["ada"]).to_json()), "run": "second"}))
    assert call("server", "run", "r.json", *at)["queued"] == ["second"]
    assert call("server", "cancel", "second", *at)["state"] == "canceled"
    Queue(ServerFolder(tmp_path / "coordinator")).change(queued, state=FINISHED)
    assert call("server", "wait", queued, *at)["states"] == {queued: FINISHED}
    assert call("server", "status", *at, code=1)["runs"].keys() == {"first", "second"}
    assert call("server", "stop", *at) == {"stopped": False}
    (tmp_path / "coordinator" / "notify.toml").write_text('[desktop]\ncommand = ["true"]\n')
    assert call("server", "notify", *at) == {"failures": []}


def site(call: Call, tmp_path: Path) -> None:
    home = hospital(tmp_path / "h", count=1)["site-0"]
    at = ("--home", str(home.path))
    assert call("site", "policy", *at)["policy"]
    assert call("site", "diagnose", *at, code=1)[0]["ok"] is False
    assert call("site", "status", *at, code=1)["site"] == "site-0"
    Reviews(home.reviews).offer(order(), ())
    (waiting,) = call("site", "review", *at)
    assert waiting["run"] == "run-1"
    shown = call("site", "review", "run-1", *at)
    assert "What would leave this site" in shown["text"]
    assert call("site", "approve", "run-1", "--reason", "IRB", "--hash", shown["shown"], *at)[0]["state"] == "approved"
    assert call("site", "refuse", "run-1", "--reason", "no", *at)[0]["state"] == "refused"
    assert call("site", "log", *at)["entries"] == len(call("site", "log", *at)["last"])
    home.memory("run-1").mkdir(parents=True)
    assert call("site", "forget", "run-1", "--yes", *at)["deleted"]
    assert call("site", "stop", *at) == {"stopped": False}
    (home.path / "notify.toml").write_text('[desktop]\ncommand = ["/no/such/command"]\n')
    assert call("site", "notify", *at, code=1)["failures"][0].startswith("desktop:")
    assert call("site", "leave", "--yes", *at) == {"left": True}


def test_a_mistake_leaves_standard_output_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (["run", "none.toml"], ["status", "."], ["methods", "show", "fedproxx"], ["run", "--what"]):
        monkeypatch.setattr(sys, "argv", ["polyclinic", *words, "--json"])
        with pytest.raises(SystemExit) as end:
            app.main()
        output = capsys.readouterr()
        assert (end.value.code, output.out) == (2, ""), words
        assert output.err


def test_numbers_that_are_not_finite_are_null(capsys: pytest.CaptureFixture[str]) -> None:
    with rendering.document(True) as emit:
        print("text")
        rendering.hint("progress")
        emit({"value": float("nan"), "path": Path("a"), "pair": (1, float("inf"))})
    output = capsys.readouterr()
    assert json.loads(output.out) == {"value": None, "path": "a", "pair": [1, None]}
    assert output.err == "progress\n"

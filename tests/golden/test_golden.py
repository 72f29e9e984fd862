"""Files that were written before code moved are read after it: no format depends on where the code lies."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from polyclinic.core import serialization
from polyclinic.core.audit_log import Broken, verify
from polyclinic.engines.flare.protocol import tensor_file
from polyclinic.engines.flare.protocol.run_request import RunRequest
from polyclinic.engines.plan import Plan
from polyclinic.evaluation.records.run_reader import read_run
from polyclinic.methods import registry
from polyclinic.methods.catalog import METHODS
from polyclinic.privacy.ledger import Ledger
from polyclinic.studies.run.run_directory import read_tensors
from polyclinic.testing import equal
from tests.golden import make

HERE = Path(__file__).parent
FILES = sorted(f for f in HERE.rglob("*") if f.is_file() and f.suffix not in (".py", ".pyc"))


def test_all_kinds_of_files_are_there_and_small() -> None:
    names = {f.relative_to(HERE).as_posix() for f in FILES}
    assert names >= {
        "checkpoint.safetensors",
        "deployment.safetensors",
        "reply.safetensors",
        "request.safetensors",
        "secure.safetensors",
        "order.json",
        "journal.jsonl",
        "ledger.jsonl",
        "ledger.jsonl.head",
        "run/run.json",
        "run/records.jsonl",
        "run/journal.jsonl",
        "run/arms/fedavg-seed0/checkpoint.safetensors",
    }
    assert all(f.stat().st_size < 8000 for f in FILES)


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.relative_to(HERE).as_posix())
def test_no_file_names_a_module(file: Path) -> None:
    content = file.read_bytes()
    assert b"polyclinic." not in content
    for folder in (b"core.state", b"core.stats", b"core.method", b"methods.", b"studies.", b"engines.", b"transforms."):
        assert folder not in content


@pytest.mark.parametrize(
    ("name", "made"),
    [("checkpoint", make.checkpoint), ("deployment", make.deployment)],
)
def test_a_checkpoint_is_read_and_written_the_same(name: str, made: Callable[[], object]) -> None:
    file = HERE / f"{name}.safetensors"
    found = serialization.load(file)
    assert type(found) is type(made())
    assert equal(found, made())
    assert serialization.encode(found) == file.read_bytes()


def test_a_checkpoint_holds_what_it_held() -> None:
    found = serialization.load(HERE / "checkpoint.safetensors")
    assert (found.round, found.records, found.best_round, found.best_score, found.done, found.clock) == (
        2,
        345,
        1,
        float("-inf"),
        False,
        1.25,
    )
    assert found.state.params["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found.state.notes["lyon"].excluded == "too long"
    assert found.memory["lyon"]["optimizer"]["n"] == 7


def test_a_reply_is_read_and_written_the_same() -> None:
    file = HERE / "reply.safetensors"
    found = tensor_file.read_reply(file)
    assert sorted(found.parts) == ["fisher", "models", "packed", "scores", "update"]
    assert found.mean("update").weight == 12.0
    assert found.mean("update").total["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert equal(tensor_file.read(file), make.reply())
    assert serialization.encode(make.reply()) == file.read_bytes()


def test_a_request_is_read_and_written_the_same() -> None:
    file = HERE / "request.safetensors"
    found = tensor_file.read_request(file)
    assert (found.round, found.job, found.secure, found.recipients) == (4, "train", True, ("lyon", "oslo"))
    assert torch.equal(found.trees["params"]["w"], torch.arange(6.0).reshape(2, 3))
    assert serialization.encode(make.ask()) == file.read_bytes()


def test_a_message_of_a_secure_sum_is_read() -> None:
    (advert,) = serialization.load(HERE / "secure.safetensors")
    assert (advert.site, advert.cipher_key, advert.signature) == ("lyon", "aa", "dd")


def test_an_order_is_read_and_keeps_its_hash() -> None:
    text = (HERE / "order.json").read_text(encoding="utf-8").strip()
    order = RunRequest.from_json(text)
    assert order == make.order()
    assert order.to_json() == text
    assert order.hash == "d6d533b1ddbe42285b574f2078d27bcfb7a2d7385e34a885c3714f3d54a8fae6"
    method: Any = order.build_plan().build_method()
    assert method.inner.task.network.name == "cnn"


def test_a_journal_is_read_and_holds_its_chain(tmp_path: Path) -> None:
    entries = list(verify(HERE / "journal.jsonl"))
    assert [entry["event"] for entry in entries] == ["begun", "answered"]
    assert entries[1]["parts"] == [{"part": "update", "kind": "WeightedMean"}]
    assert entries[1]["hash"] == "4bfd95df843f2ae181abbc4b3afc9078b45a0c1d30d0e59cc852a3d1c234a52f"
    (tmp_path / "journal.jsonl").write_bytes((HERE / "journal.jsonl").read_bytes().replace(b"oslo", b"olso"))
    with pytest.raises(Broken):
        list(verify(tmp_path / "journal.jsonl"))


def test_a_ledger_is_read_and_goes_on(tmp_path: Path) -> None:
    for name in ("ledger.jsonl", "ledger.jsonl.head"):
        (tmp_path / name).write_bytes((HERE / name).read_bytes())
    ledger = Ledger(tmp_path / "ledger.jsonl")
    assert ledger.budget()["data"] == "nodules"
    (spend,) = ledger.spends()
    assert (spend.multiplier, spend.rate, spend.steps, spend.unit) == (8.0, 0.1, 10, "patient")
    assert 0 < ledger.spent().epsilon < 3
    assert ledger.reserve([spend]) > 0


def test_a_run_s_folder_is_read() -> None:
    run = read_run(HERE / "run")
    assert (run.info.name, run.info.rounds, run.info.seeds) == ("golden", 2, (0,))
    assert [site.name for site in run.info.sites] == ["lyon", "oslo"]
    arm = HERE / "run/arms/fedavg-seed0"
    end = serialization.load(arm / "checkpoint.safetensors")
    assert (end.round, end.done) == (2, True)
    plan = Plan.from_json(_meta(arm / "model.safetensors")["plan"])
    task = plan.build_task()
    model = read_tensors(arm / "model.safetensors")
    assert {name: leaf.shape for name, leaf in model.items()} == {
        name: leaf.shape for name, leaf in task.first(0).items()
    }
    assert next(entry["event"] for entry in verify(HERE / "run/journal.jsonl")) == "begun"


def _meta(file: Path) -> dict[str, str]:
    content = file.read_bytes()
    header: dict[str, dict[str, str]] = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return header["__metadata__"]


def test_every_tag_is_independent_of_the_module_that_defines_it() -> None:
    registry.import_methods()
    ours = {tag: cls for tag, cls in serialization._CLASSES.items() if cls.__module__.startswith("polyclinic.")}
    assert len(ours) > 60
    folders = {"polyclinic", "methods", "stats", "state", "studies", "engines", "transforms", "audits", "tasks"}
    assert not [tag for tag in ours if folders & set(tag.split("."))]
    heads = {tag.partition(".")[0] for tag, cls in ours.items() if ".methods." in cls.__module__}
    shared = {
        "local",
        "personal",
        "phases",
        "prepared",
        "robust",
        "teacher-student",
        "dataset-fingerprint",
        "fedopt",
        "relative-weights",
        "style-exchange",
    }
    assert heads - shared <= METHODS.keys()

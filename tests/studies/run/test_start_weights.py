"""Studies with start weights: what is checked, what is recorded, and what is exported."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from polyclinic.cli import weights as commands
from polyclinic.evaluation.records.run_reader import read_run
from polyclinic.evaluation.run_evaluation import evaluate
from polyclinic.learning.networks.model_tree import load
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.weights import conversion, importer, store
from polyclinic.learning.weights.store import Card
from polyclinic.report.report_builder import build_report
from polyclinic.studies.config.diagnostics import BadStudy
from polyclinic.studies.config.study_config import parse
from polyclinic.studies.export.model_export import NotExported, export, network
from polyclinic.studies.run.run_directory import read_plan, read_tensors
from polyclinic.studies.run.scheduler import run
from tests.support.small_runs import npz
from tests.support.start_weights import random_state, weights_of

NET = Network("cnn", (1, 8, 8), 2, (("width", 4), ("depth", 2)))
STUDY = """\
name = "tuned"
rounds = 2
[data]
path = "{path}"
kind = "npz"
sites = "site"
[task]
options = {{ width = 4, depth = 2 }}
{task}
[training]
batch_size = 8
[engine]
kind = "in-process"
{methods}
"""
ROLORA = '[[methods]]\nname = "rolora"\n'
LORA = 'weights = "given"\nlora = { rank = 2 }'


@pytest.fixture(autouse=True)
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYCLINIC_WEIGHTS", str(tmp_path / "weights"))


def study(folder: Path, task: str, methods: str = '[[methods]]\nname = "fedavg"\n') -> str:
    path = folder / "small.npz"
    return STUDY.format(path=path if path.exists() else npz(folder), task=task, methods=methods)


def done(folder: Path, text: str) -> Path:
    for _ in run(parse(text), text, folder / "run"):
        pass
    return folder / "run"


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ('train = ["head"]', "task  train needs weights: what is not trained would keep random values"),
        ("lora = { rank = 2 }", "task  lora needs weights: what is not trained would keep random values"),
        ('weights = "unknown"', "no start weights are called 'unknown'"),
        ("weights = { strip = 'a.' }", "needs file, the name of weights in the store, or sha256"),
        (f'weights = {{ file = "given", sha256 = "{"0" * 64}" }}', "in the store has the hash"),
        ('weights = { file = "given", stem = "max" }', "stem"),
        ('weights = "given"\ntrain = []', "train"),
        ('weights = "given"\nlora = { rank = 0 }', "rank"),
    ],
)
def test_what_makes_no_sense_is_refused_when_the_study_is_read(task: str, message: str, tmp_path: Path) -> None:
    weights_of(NET)
    with pytest.raises(BadStudy, match=message):
        parse(study(tmp_path, task))


@pytest.mark.parametrize(
    ("task", "methods", "message"),
    [
        ('weights = "given"\ntrain = ["heads.*"]', "fedavg", "'heads.\\*' matches no tensor of cnn"),
        ('weights = "given"\nlora = { rank = 2, where = ["x"] }', "fedavg", "'x' matches no linear layer"),
        ('weights = "other"', "fedavg", "other does not fit the network cnn"),
        ('weights = "given"\ntrain = ["head"]', "fedbn", "fedbn needs trained normalization layers"),
        ('weights = "given"', "rolora", r"rolora needs trained adapters \(\[task.lora\]\)"),
    ],
)
def test_what_does_not_fit_the_data_and_network_is_refused_before_the_first_round(
    task: str, methods: str, message: str, tmp_path: Path
) -> None:
    weights_of(NET)
    weights_of(Network("mlp", (4,), 2), "other")
    with pytest.raises(BadStudy, match=message):
        done(tmp_path, study(tmp_path, task, f'[[methods]]\nname = "{methods}"\n'))


def test_the_hash_of_a_study_is_that_of_its_weights_and_not_of_their_name(tmp_path: Path) -> None:
    given = weights_of(NET)
    weights_of(NET, "other", seed=6)
    named = parse(study(tmp_path, 'weights = "given"'))
    assert named.task.weights is not None
    assert named.task.weights.sha256 == given.sha256
    assert parse(study(tmp_path, f'weights = {{ sha256 = "{given.sha256}" }}')).hash == named.hash
    others = [
        'weights = "other"',
        'weights = "given"\ntrain = ["head"]',
        LORA,
        'weights = { file = "given", head = true }',
        "",
    ]
    assert len({named.hash, *(parse(study(tmp_path, task)).hash for task in others)}) == len(others) + 1
    whole = parse(study(tmp_path, 'weights = "given"\ntrain = ["*"]'))
    assert whole.hash == named.hash


def test_a_run_with_adapters_records_its_weights_and_exports_the_whole_network(tmp_path: Path) -> None:
    weights_of(NET)
    folder = done(tmp_path, study(tmp_path, LORA, ROLORA))
    info = json.loads((folder / "run.json").read_text())
    start = info["start"]
    assert (start["name"], start["license"], start["train"]) == ("given", "MIT", ["adapters", "head"])
    assert info["parameters"] == start["trained"] < start["numbers"]
    file = next((folder / "arms").glob("*/model.safetensors"))
    trained, plan = read_tensors(file), read_plan(file)
    assert all(name.startswith("head.") or ".lora_" in name for name in trained)
    whole = read_tensors(export(folder, "safetensors", tmp_path / "whole.safetensors"))
    state = random_state(NET)
    assert whole.keys() == state.keys()
    assert torch.equal(whole["encoder.1.running_mean"], state["encoder.1.running_mean"])
    x = torch.randn(5, 1, 8, 8)
    adapted = load(network(json.loads(plan.to_json())), trained).eval()
    plain = load(NET(), whole).eval()
    torch.testing.assert_close(plain(x), adapted(x), atol=1e-5, rtol=0)
    page = build_report(folder)
    text = Path(page).read_text(encoding="utf-8") if isinstance(page, str | Path) else ""
    card = (folder / "report" / "model_card.md").read_text()
    assert "Start weights: given, license MIT" in card
    assert "Trained in this study: adapters, head" in card
    assert "Start weights of the network." in (text or (folder / "report" / "report.html").read_text())
    assert evaluate(read_run(folder)).headline == "rolora"
    # the exported network is start weights again, while the model of trained tensors alone is refused
    again = importer.add(tmp_path / "whole.safetensors", Card("again", "MIT"))
    assert again.tensors == len(state)
    with pytest.raises(conversion.Refused, match="trained tensors of a network with start weights only"):
        conversion.convert(file, tmp_path / "x.safetensors")


def test_weights_that_may_not_be_passed_on_are_not_exported(tmp_path: Path) -> None:
    given = weights_of(NET)
    item = store.find(given.sha256)
    source = tmp_path / "copy.safetensors"
    source.write_bytes(item.path.read_bytes())
    store.add(source, Card("given", "CC-BY-NC-ND-4.0", redistribute=False))
    folder = done(tmp_path, study(tmp_path, LORA, ROLORA))
    for form in ("safetensors", "pt2", "bundle"):
        with pytest.raises(NotExported, match=r"given \(CC-BY-NC-ND-4.0\) forbids to pass them on"):
            export(folder, form, tmp_path / "out")
    out = export(folder, "peft", tmp_path / "adapters")
    leaves, config = (
        read_tensors(out / "adapter_model.safetensors"),
        json.loads((out / "adapter_config.json").read_text()),
    )
    assert "base_model.model.encoder.0.lora_A.weight" in leaves
    assert leaves["base_model.model.encoder.0.lora_B.weight"].shape == (4, 2, 1, 1)
    assert config["target_modules"] == ["encoder.0", "encoder.4"]
    assert (config["r"], config["lora_alpha"], config["modules_to_save"]) == (2, 16.0, ["head"])


def test_weights_check_accounts_for_every_tensor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights_of(NET)
    file = tmp_path / "study.toml"
    file.write_text(study(tmp_path, LORA))
    commands.check(file)
    text = " ".join(capsys.readouterr().out.split())
    assert "10 of 12 tensors loaded" in text
    assert "trained: 6 tensors, 132 of 504 numbers" in text
    commands.check(file, json_=True)
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert facts["new"] == ["head.weight", "head.bias"]
    assert len(facts["trained"]) == 6
    file.write_text(study(tmp_path, ""))
    with pytest.raises(ValueError, match="sets no start weights"):
        commands.check(file)


def test_weights_are_added_listed_shown_and_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(NET().state_dict(), tmp_path / "My Net.pt")
    with pytest.raises(ValueError, match="give the license"):
        commands.add(tmp_path / "My Net.pt")
    commands.add(tmp_path / "My Net.pt", license="MIT", trained_on="phantoms")
    text = capsys.readouterr().out
    assert "added    my-net: 12 tensors" in text
    assert 'file = "my-net"' in text
    commands.list_()
    assert "my-net" in capsys.readouterr().out
    commands.show("my-net", tensors=True)
    text = capsys.readouterr().out
    assert "phantoms" in text
    assert "encoder.0.weight" in text
    commands.remove("my-net", yes=True)
    commands.list_()
    assert "no weights in" in capsys.readouterr().out

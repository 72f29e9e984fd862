"""Runs with augmentation, prefetch threads, kept optimizers and early stopping, and pictures of samples."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from polyclinic.cli.data import app
from polyclinic.core import serialization as states
from polyclinic.errors import ConfigError
from polyclinic.studies.config.diagnostics import BadStudy
from polyclinic.studies.config.study_config import Study, parse
from polyclinic.studies.run.sample_pictures import SampleRow, picture, sample_rows
from polyclinic.studies.run.scheduler import run
from polyclinic.testing import equal
from tests.studies.run.test_planning import registry
from tests.support import clinics

STUDY = (
    (
        clinics.STUDY.replace("rounds = 2", "rounds = {rounds}").replace(
            "lr = 0.1",
            'lr = 0.01\nmomentum = 0.97\nnesterov = true\nschedule = "poly"\nbalance = 0.5\n\n[augmentation]\n'
            'recipe = "picture"\nrotation = {{ probability = 0.5 }}\n\n[engine]\nkind = "in-process"\nthreads = {threads}',
        )
    )
    .replace("{ width = 4", "{{ width = 4")
    .replace('norm = "batch" }', 'norm = "batch" }}')
)


def study(root: Path, rounds: int = 2, threads: int = 0, more: str = "") -> tuple[Study, str]:
    text = STUDY.format(rounds=rounds, threads=threads).replace("PATH", str(root / "all.npz")) + more
    return parse(text), text


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("clinics")
    clinics.make(root)
    return root


def test_a_run_is_the_same_with_threads_in_workers_and_resumed(data: Path, tmp_path: Path) -> None:
    def done(name: str, threads: int, kind: str = "in-process", stop: int | None = None) -> dict[str, Any]:
        one, text = study(data, threads=threads)
        one = one.model_copy(update={"engine": one.engine.model_copy(update={"kind": kind, "workers": 2})})
        for i, _ in enumerate(run(one, text, tmp_path / name, resume=stop is None)):
            if stop is not None and i == stop:
                break
        ends = {
            file.parent.name: states.load(file) for file in (tmp_path / name / "arms").glob("*/checkpoint.safetensors")
        }
        return {arm: (end.state, end.memory, end.best_round, end.best_score) for arm, end in ends.items()}

    whole = done("whole", 0)
    assert set(whole) == {"local-seed3", "pooled-seed3", "ditto-seed3"}
    done("stopped", 3, stop=6)
    for found in (done("stopped", 1), done("workers", 2, "workers")):
        assert equal(found, whole)
    info = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert info["training"]["local"]["augmentation"]["rotation"] == {"probability": 0.5}
    assert info["training"]["local"]["schedule_rounds"] == 2
    kept = states.load(tmp_path / "whole" / "arms" / "local-seed3" / "checkpoint.safetensors").memory
    assert any(name.startswith("optimizer:") for memory in kept.values() for name in memory)


def test_baselines_end_after_rounds_without_improvement_and_federated_methods_do_not(
    data: Path, tmp_path: Path
) -> None:
    one, text = study(data, rounds=12, more="\n[evaluation]\npatience = 2\n")
    last, ended = dict[str, int](), dict[str, int]()
    for event in run(one, text, tmp_path / "run"):
        if event.what == "round":
            last[event.label] = event.round
    for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if entry["event"] == "no improvement":
            ended[entry["method"]] = entry["round"] - entry["best"]
    assert last["ditto"] == 12
    assert min(last["local"], last["pooled"]) < 12
    assert set(ended) == {label for label in ("local", "pooled") if last[label] < 12}
    assert set(ended.values()) == {2}
    before = (tmp_path / "run" / "records.jsonl").read_bytes()
    list(run(one, text, tmp_path / "run", resume=True))
    assert (tmp_path / "run" / "records.jsonl").read_bytes() == before


def test_patches_are_needed_for_foreground_and_images_for_augmentation(data: Path, tmp_path: Path) -> None:
    one, text = study(data)
    wrong = one.model_copy(update={"training": one.training.model_copy(update={"foreground": 0.3})})
    with pytest.raises(BadStudy, match="foreground is for random patches"):
        list(run(wrong, text, tmp_path / "a"))
    registry(tmp_path, 120)
    table = text.replace('kind = "npz"', 'kind = "table"\nlabel = "y"\ncategories = ["kind"]')
    table = table.replace(str(data / "all.npz"), str(tmp_path / "t.csv")).replace('external = ["osaka"]\n', "")
    table = table.replace('patient = "patient"\n', "").replace('network = "cnn"', 'network = "mlp"')
    table = table.replace('options = { width = 4, depth = 2, norm = "batch" }', "")
    with pytest.raises(BadStudy, match="augmentation is for images and volumes"):
        list(run(parse(table), table, tmp_path / "b"))


def test_a_missing_gpu_is_told_before_data_are_read(tmp_path: Path) -> None:
    text = STUDY.format(rounds=2, threads=0).replace("PATH", str(tmp_path / "nowhere.npz"))
    text = text.replace("threads = 0", 'threads = 0\ndevice = "cuda:7"')
    with pytest.raises(ConfigError, match=r'device = "cuda:7": .*(without CUDA|no GPU|GPUs here)'):
        list(run(parse(text), text, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_samples_are_pictured_with_their_masks(data: Path, tmp_path: Path) -> None:
    one, _ = study(data)
    rows, notes = sample_rows(one, "local", images=5, samples=3)
    assert not notes
    assert [len(row.samples) for row in rows] == [3] * 5
    assert len({row.caption for row in rows}) == 5
    again, _ = sample_rows(one, "local", images=5, samples=3)
    assert all(torch.equal(a.samples[2][0], b.samples[2][0]) for a, b in zip(rows, again, strict=True))
    image = Image.open(io.BytesIO(picture(rows)))
    assert image.width > 3 * 170
    mask = torch.zeros(9, 16, 16, dtype=torch.long)
    mask[6, 4:12, 4:12] = 1
    volume = SampleRow("a volume", (mask[None].float(), mask), ())
    pixels = np.asarray(Image.open(io.BytesIO(picture([volume]))).convert("RGB"))
    assert (pixels == (230, 80, 60)).all(-1).sum() > 100  # the slice with the mask, outlined
    with pytest.raises(ConfigError, match="no such method; there are local, pooled"):
        sample_rows(one, "fedavg")


def test_the_command_writes_a_private_picture(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.toml").write_text(study(data)[1])
    words = ["look", "s.toml", "--images", "2", "--samples", "1", "--set", "augmentation.recipe=none", "--json"]
    app([*words, "--set", "augmentation.rotation.probability=0"], result_action="return_value")
    told = json.loads(capsys.readouterr().out)
    assert told["notes"] == ["no augmentation is set: samples differ only where patches are random"]
    file = tmp_path / "spots.samples.png"
    assert file.stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match="--samples 0"):
        app(["look", "s.toml", "--samples", "0"], result_action="return_value")
    with pytest.raises(ConfigError, match="a folder that exists"):
        app(["look", "s.toml", "--out", "nowhere/x.png"], result_action="return_value")

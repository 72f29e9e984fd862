"""Studies of images of unequal shapes: the same bits in every engine and after a stop, and real data end to end."""

import os
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from polyclinic.data.cases.cases import Cases
from polyclinic.data.federation import federate
from polyclinic.methods.catalog import METHODS
from polyclinic.studies.config.diagnostics import BadStudy
from polyclinic.studies.config.study_config import parse
from polyclinic.studies.inference.models import trained_model
from polyclinic.studies.inference.predict import Work
from polyclinic.studies.inference.predictor import Predictor
from polyclinic.studies.run.run_directory import Stopped, read_tensors
from polyclinic.studies.run.run_lock import ask_to_stop
from polyclinic.studies.run.scheduler import run
from tests.data.sources.test_folders import nifti, picture
from tests.support.small_runs import facts, same, tensors

STUDY = """\
name = "patches"
rounds = 2

[data]
kind = "pairs"
path = "volumes"
patch = [16, 16, 16]
steps = [{ step = "zscore" }]
sites = { partition = "iid", count = 3 }
split = [0.5, 0.25, 0.25]
min_patients = 1

[task]
kind = "segmentation"
network = "segresnet"
options = { init_filters = 8, blocks_down = [1, 1], blocks_up = [1] }

[training]
batch_size = 2
steps = 1
lr = 0.01
foreground = 0.5

[augmentation]
recipe = "nnunet"

[engine]
kind = "in-process"
parallel = "sites"

[[methods]]
name = "fedavg"
"""
HIPPOCAMPUS = Path(os.environ.get("POLYCLINIC_DATA", "")) / "msd_hippocampus" / "msd_task04_hippocampus_260.zip"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nine volumes of different shapes with a bright ball each, smaller and larger than the patch."""
    monkeypatch.setenv("POLYCLINIC_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write_volumes(tmp_path / "volumes", 9)
    return tmp_path


def write_volumes(folder: Path, count: int) -> None:
    """Write volumes of different shapes with a bright ball each, and their masks."""
    rng = np.random.default_rng(0)
    for i in range(count):
        size = rng.integers(12, 22, 3)
        center, grid = size / 2, np.indices(size.tolist()).transpose(1, 2, 3, 0)
        mask = (((grid - center) ** 2).sum(-1) < 25).astype(np.uint8)
        values = rng.normal(100, 10, size) + 60 * mask
        nifti(folder / "images" / f"ball{i:02}.nii.gz", values.astype(np.float32))
        nifti(folder / "labels" / f"ball{i:02}.nii.gz", mask)


def of(engine: str, **changes: str) -> str:
    """The study with another engine."""
    text = STUDY.replace('kind = "in-process"', engine)
    for old, new in changes.items():
        text = re.sub(rf"^{old} = .*$", new, text, flags=re.MULTILINE)
    return text


def test_the_same_bits_with_workers_threads_and_in_process(here: Path) -> None:
    """Workers inherit the places of the files; they and their threads read them by themselves."""
    engines = {"none": 'kind = "in-process"', "workers": 'kind = "workers"\nworkers = 3\nthreads = 2'}
    for name, engine in engines.items():
        list(run(parse(of(engine)), of(engine), here / name))
    assert tensors(here / "none")
    assert same(here / "workers", here / "none")


def test_a_stopped_run_goes_on_to_the_same_bits(here: Path) -> None:
    """Also if the store was lost in between, and is built again."""
    text = of('kind = "in-process"', rounds="rounds = 3")
    list(run(parse(text), text, here / "whole"))
    events = run(parse(text), text, here / "cut")
    while (event := next(events)).what != "round" or event.round < 1:
        pass
    ask_to_stop(here / "cut")
    with pytest.raises(Stopped):
        list(events)
    for file in (here / "cache" / "cases").rglob("*.safetensors"):
        file.unlink()
    list(run(parse(text), text, here / "cut", resume=True))
    a, b = tensors(here / "whole"), tensors(here / "cut")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert facts(here / "whole") == facts(here / "cut")


def test_the_test_is_of_complete_images_as_predict_sees_them(here: Path) -> None:
    """Every test case has one row of scores, and the mask that predict writes for its file has the same Dice."""
    text = of('kind = "in-process"')
    list(run(parse(text), text, here / "run"))
    sites = federate(parse(text).data, 0).sites
    stored = read_tensors(here / "run" / "arms" / "fedavg-seed0" / "predictions.safetensors")
    predictor = Predictor(trained_model(here / "run"))
    images = here / "volumes" / "images"
    assert not any(done.problem for done in Work(predictor, images, here / "out").run())
    for site, roles in sites.items():
        cases = roles["test"]
        found = []
        for name in cases.ids:
            p, t = (np.asarray(nib.load(here / at / f"{name}.nii.gz").dataobj) for at in ("out", "volumes/labels"))
            assert p.shape == t.shape != cases.shape[1:]
            found.append(2.0 * (p & t).sum() / max(p.sum() + t.sum(), 1))
        assert stored[f"{site}/dice"].flatten().tolist() == pytest.approx(found, abs=1e-6)
        assert max(found) > 0


def test_pictures_of_many_sizes_with_a_method_for_each_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Classification of color pictures that no step makes alike."""
    monkeypatch.setenv("POLYCLINIC_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for i in range(48):
        picture(tmp_path / "pictures" / "ab"[i % 2] / f"p{i}.png", (12 + i % 7, 20 - i % 5), color=True)
    text = """\
name = "sizes"
rounds = 1
[data]
kind = "folders"
path = "pictures"
patch = [8, 8]
sites = { partition = "iid", count = 2 }
min_patients = 1
[task]
options = { width = 4, depth = 2 }
[training]
balance = 1.0
[augmentation]
recipe = "picture"
[engine]
kind = "in-process"
[[methods]]
name = "scaffold"
[[methods]]
name = "zscore"
[[methods]]
name = "fedsld"
[[methods]]
name = "ditto"
"""
    list(run(parse(text), text, tmp_path / "run"))
    assert len({name.split("/")[0] for name in tensors(tmp_path / "run")}) == 4


@pytest.mark.parametrize("method", ["combat", "vafl"])
def test_methods_that_take_all_images_at_once_are_refused(here: Path, method: str) -> None:
    """At the line of the method, before any image is read."""
    text = of('kind = "in-process"').replace('name = "fedavg"', f'name = "{method}"')
    with pytest.raises(BadStudy, match=f"{method} takes all images of a site at once, and patch in .data. leaves"):
        parse(text)


@pytest.mark.skipif(not HIPPOCAMPUS.is_file(), reason="needs POLYCLINIC_DATA with msd_hippocampus")
@pytest.mark.slow
def test_hippocampus_without_a_resize(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """260 cases of 236 shapes are read as they are and trained for a few steps."""
    monkeypatch.setenv("POLYCLINIC_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    text = of(
        'kind = "workers"\nworkers = 2',
        path=f'path = "{HIPPOCAMPUS}"',
        patch="patch = [40, 56, 40]",
        split="split = [0.7, 0.05, 0.25]",
        rounds="rounds = 1",
    )
    study = parse(text)
    data = federate(study.data, 0)
    cases = [examples for roles in data.sites.values() for examples in roles.values()]
    sizes = [file.size for part in cases if isinstance(part, Cases) for file in part.files]
    assert len(sizes) == 260
    assert len(set(sizes)) == 236
    list(run(study, text, tmp_path / "run"))
    dice = {name: leaf for name, leaf in tensors(tmp_path / "run").items() if name.endswith("dice")}
    held_out = sum(len(roles["test"]) for roles in data.sites.values())
    assert 60 <= held_out <= 70
    assert sum(len(leaf) for name, leaf in dice.items() if name.startswith("fedavg")) == held_out


def test_a_patch_of_a_plan_is_no_way_around_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan brings the patch when the data are read; the methods are then compared with the data."""
    text = of('kind = "in-process"').replace('name = "fedavg"', 'name = "vafl"')
    monkeypatch.setattr("polyclinic.studies.config.study_config.methods.entry", lambda _: METHODS["fedavg"])
    study = parse(text)
    monkeypatch.undo()
    monkeypatch.setenv("POLYCLINIC_CACHE", str(here / "cache"))
    monkeypatch.chdir(here)
    with pytest.raises(BadStudy, match="vafl takes all images of a site at once, and the patch of the plan"):
        next(run(study, text, here / "run"))

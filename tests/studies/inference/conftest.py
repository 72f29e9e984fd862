"""A finished study of masks, on volumes that preprocessing resamples and crops."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from polyclinic.studies.config.study_config import parse
from polyclinic.studies.run.scheduler import run

STUDY = """
name = "boxes"
rounds = 1
seeds = [0, 1]
[data]
kind = "pairs"
path = "{path}"
classes = ["background", "one", "two"]
patient = "(.*)"
sites = {{ partition = "iid", count = 2 }}
min_patients = 1
split = [0.5, 0.2, 0.3]
steps = [{{ step = "resample", mm = 2.0 }}, {{ step = "zscore" }}, {{ step = "crop_pad", size = 16 }}]
[task]
kind = "segmentation"
network = "unet"
options = {{ width = 4, norm = "batch" }}
[training]
steps = 5
batch_size = 4
optimizer = "adam"
lr = 0.01
[[methods]]
name = "fedavg"
[[methods]]
name = "ditto"
[engine]
kind = "in-process"
"""
AFFINE = np.array([[-1.1, 0.1, 0.0, 30.0], [0.1, 1.7, 0.0, -20.5], [0.0, 0.0, 1.5, 7.25], [0, 0, 0, 1]])


def write_pairs(folder: Path, count: int = 14) -> Path:
    """Write images of two bright boxes with noise, and their masks, in an oblique geometry."""
    rng, size = np.random.default_rng(0), (26, 16, 20)
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    for i in range(count):
        mask = np.zeros(size, np.uint8)
        for label in (1, 2):
            low = [int(rng.integers(2, n // 4)) for n in size]
            low[0] += (label - 1) * 12
            mask[tuple(slice(a, a + int(rng.integers(5, 8))) for a in low)] = label
        image = (mask * 100.0 + rng.normal(0, 5, size)).astype(np.float32)
        for name, array in (("images", image), ("labels", mask)):
            made = nib.Nifti1Image(array, AFFINE)
            made.set_qform(AFFINE, 1)
            made.set_sform(AFFINE, 2)
            nib.save(made, folder / name / f"case{i:02}.nii.gz")
    return folder


def finish(text: str, folder: Path) -> Path:
    """Run a study to its end."""
    study = parse(text)
    for _ in run(study, text, folder):
        pass
    return folder


PICTURES = """
name = "pictures"
rounds = 1
[data]
kind = "npz"
path = "{path}"
sites = {{ partition = "iid", count = 2 }}
min_patients = 1
split = [0.5, 0.2, 0.3]
[task]
network = "cnn"
options = {{ width = 4, depth = 2 }}
[[methods]]
name = "fedavg"
[engine]
kind = "in-process"
"""


@pytest.fixture(scope="package")
def classified(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished run of pictures with classes, and its archive, whose names are hostile."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 60)
    images = (rng.integers(0, 90, (60, 16, 16)) + 60 * labels[:, None, None]).astype(np.uint8)
    names = np.array([f"../../out-{i:02}" for i in range(60)])
    np.savez(folder / "pictures.npz", images=images, labels=labels, names=names)
    return finish(PICTURES.format(path=folder / "pictures.npz"), folder / "run"), folder / "pictures.npz"


@pytest.fixture(scope="package")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished run, and the folder of its images."""
    folder = tmp_path_factory.mktemp("boxes")
    data = write_pairs(folder / "data")
    return finish(STUDY.format(path=data), folder / "run"), data


RECONSTRUCTED = """
name = "fast"
rounds = 1
seeds = [0, 1]
[data]
kind = "pairs"
path = "{path}"
patient = "(.*)"
sites = {{ partition = "iid", count = 2 }}
min_patients = 1
split = [0.5, 0.2, 0.3]
accelerate = 3
center = 0.2
steps = {steps}
[task]
kind = "reconstruction"
network = "unet"
options = {{ width = 4, norm = "batch" }}
[training]
steps = 20
batch_size = 4
optimizer = "adam"
lr = 0.01
[[methods]]
name = "fedavg"
[engine]
kind = "in-process"
"""


def write_slices(folder: Path, count: int = 14) -> Path:
    """Write smooth pictures of 8 bits, 20 x 16 pixels, and empty masks that a reconstruction does not use."""
    from PIL import Image

    rng = np.random.default_rng(0)
    y, x = np.mgrid[:20, :16]
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    for i in range(count):
        top, left, size = rng.uniform(5, 14), rng.uniform(4, 11), rng.uniform(2, 5)
        bump = np.exp(-((y - top) ** 2 + (x - left) ** 2) / size**2)
        Image.fromarray((240 * bump).astype(np.uint8)).save(folder / "images" / f"slice{i:02}.png")
        Image.fromarray((bump > 0.5).astype(np.uint8)).save(folder / "labels" / f"slice{i:02}.png")
    return folder


@pytest.fixture(scope="package")
def reconstructed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished run of reconstruction, and the folder of its complete images."""
    folder = tmp_path_factory.mktemp("slices")
    data = write_slices(folder / "data")
    steps = '[{ step = "crop_pad", size = 16 }]'
    return finish(RECONSTRUCTED.format(path=data, steps=steps), folder / "run"), data

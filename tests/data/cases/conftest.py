"""Cases for the tests: small images of unequal shapes, written and opened."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from polyclinic.data.cases import case_file
from polyclinic.data.cases.case_file import CaseFile, Prepared
from polyclinic.data.cases.cases import Cases
from polyclinic.data.formats.mask_labels import labels_in
from polyclinic.data.formats.value_ranges import ValueRange
from polyclinic.data.preprocessing.sample import Picture

Store = Callable[..., CaseFile]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Write an image and its mask, and open the file."""
    written: list[Path] = []

    def write(pixels: Tensor, mask: Tensor | None = None) -> CaseFile:
        path = tmp_path / f"{len(written)}.safetensors"
        written.append(path)
        labels = () if mask is None else labels_in(mask)
        low, high = (float(end) for end in pixels.aminmax())
        prepared = Prepared(
            Picture(pixels, mask, (1.0,) * (pixels.ndim - 1)), ValueRange("case", False, None, low, high), labels
        )
        case_file.write(path, prepared)
        case = case_file.opened(path, "case")
        assert case is not None
        return case

    return write


def cases_of(files: Sequence[CaseFile], patch: tuple[int, ...], labels: Tensor | None = None) -> Cases:
    """Return the files as cases of one patient each."""
    names = tuple(f"c{i}" for i in range(len(files)))
    return Cases(tuple(files), patch, files[0].channels, names, names, labels)


def volume(size: Sequence[int], seed: int = 0, channels: int = 1) -> tuple[Tensor, Tensor]:
    """Return whole numbers, no two of them equal by chance often, and a mask with the labels 0, 1 and 2."""
    rng = torch.Generator().manual_seed(seed)
    pixels = torch.randint(-1000, 3000, (channels, *size), generator=rng).float()
    mask = torch.randint(0, 3, tuple(size), generator=rng)
    mask.view(-1)[:3] = torch.arange(3)
    return pixels, mask

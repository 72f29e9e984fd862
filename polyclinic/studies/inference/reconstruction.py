"""Reconstruction of new images: how they were acquired, their scores, and the file of each.

A study of reconstruction learns from complete images, of which it leaves out columns of k-space (``accelerate`` in
``[data]``). New images are undersampled already, or complete: then the columns that the study left out at one of its
sites are left out of them too, and each image is its own reference.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from polyclinic.core.config_problems import nearest
from polyclinic.data.annotations import column_generator
from polyclinic.data.files import read_case
from polyclinic.data.geometry import Geometry
from polyclinic.data.preprocessing.transforms import Channels, CropPad, Foreground, Resample, Resize
from polyclinic.data.sources.npz import images_in
from polyclinic.errors import ConfigError, DataError
from polyclinic.learning.tasks.mr_reconstruction import columns, likeness, undersample
from polyclinic.studies.inference.image_files import is_picture, write_map, write_picture
from polyclinic.studies.inference.models import TrainedModel
from polyclinic.studies.inference.reading import Case, Reading, cases_at, pictures

KEEP_VALUES = (Resample, Resize, CropPad, Foreground, Channels)
"""Steps after which a pixel has the values that it has in its file."""


@dataclass(frozen=True)
class Acquisition:
    """How the images were acquired.

    Attributes:
        references: The complete image of each undersampled one, by name; empty if there are none.
        site: The site whose columns are left out of complete images; empty if the images are undersampled already.
        seed: The study's seed, from which these columns follow.
        acceleration: The acceleration factor.
        center: The share of columns around frequency 0 that is always measured.
    """

    references: Mapping[str, Case]
    site: str = ""
    seed: int = 0
    acceleration: float = 1.0
    center: float = 1.0

    @classmethod
    def of(cls, model: TrainedModel, references: Path | None, site: str) -> "Acquisition":
        """Return the acquisition of images that ``model`` reconstructs.

        Args:
            model: The model.
            references: Place of the complete images, under the names of the undersampled ones; None if there are none.
            site: The site whose columns are left out of complete images; empty for undersampled images.

        Raises:
            ConfigError: If both are given, there is no such site, the study is not known, or models of several seeds,
                which left out different columns, are averaged.
        """
        assert isinstance(model.reading, Reading)
        if not site:
            found = () if references is None else cases_at(references, model.reading)
            return cls({case.id: case for case in found})
        if references is not None:
            raise ConfigError("--undersample takes complete images, which are their own references: leave one out")
        if model.data is None or not model.data.data.accelerate:
            raise ConfigError(f"{model.origin}: does not say which columns were left out: name the run, not a bundle")
        if site not in model.plan.sites:
            known = model.plan.sites
            raise ConfigError(
                f"--undersample {site}: no such site trained.{nearest(site, known)} There are {', '.join(known)}"
            )
        seeds = {int(_SEED.findall(member.name)[-1]) for member in model.members}
        if len(seeds) > 1:
            raise ConfigError("--undersample: the columns differ between seeds: choose a model with --seed")
        return cls({}, site, seeds.pop(), model.data.data.accelerate, model.data.data.center)

    @property
    def table(self) -> dict[str, Any]:
        """The acquisition as plain values, without the references."""
        return {"undersample": self.site, "references": bool(self.references)}

    def content(self, case: Case) -> str:
        """Return a hash of the files that the result for ``case`` depends on."""
        reference = self.references.get(case.id)
        return case.content if reference is None else f"{case.content} {reference.content}"

    def acquired(self, pixels: Tensor) -> Tensor:
        """Return the undersampled image of a prepared one [C, *grid]."""
        if not self.site:
            return pixels
        rng = column_generator(self.seed, self.site)
        return undersample(pixels[None], columns(pixels.shape[-1], self.acceleration, self.center, rng))[0]

    def reference(self, case: Case, pixels: Tensor, reading: Reading) -> Tensor | None:
        """Return the prepared complete image of a case, if there is one.

        Args:
            case: The case.
            pixels: Its prepared image [C, *grid].
            reading: How images are prepared.

        Raises:
            DataError: If it cannot be read, or has another size.
        """
        if self.site:
            return pixels
        if (complete := self.references.get(case.id)) is None:
            return None
        ((_, picture),) = pictures([complete], reading)
        if isinstance(picture, str):
            raise DataError(f"its reference cannot be read ({picture})")
        if picture.pixels.shape != pixels.shape:
            sizes = (" x ".join(map(str, one.shape[1:])) for one in (picture.pixels, pixels))
            raise DataError("its reference is {}, and the image {}".format(*sizes))
        return picture.pixels


_SEED = re.compile(r"-seed(\d+)")


def scores(image: Tensor, given: Tensor, truth: Tensor | None) -> dict[str, float]:
    """Return the columns of the table: PSNR, SSIM and NMSE of a reconstruction and of the image that was given.

    Args:
        image: The reconstruction [C, *grid].
        given: The undersampled image.
        truth: The complete image; None for no columns.
    """
    if truth is None:
        return {}
    return {
        f"{prefix}{name}": float(value)
        for prefix, one in (("", image), ("input_", given))
        for name, value in likeness(one[None], truth[None]).items()
    }


def write_image(folder: Path, case: Case, image: Tensor, geometry: Geometry, reading: Reading) -> str:
    """Write a reconstruction [C, *grid] on the grid of its file; return the name of the file.

    Voxels outside of the part that the model was given are 0. Volumes are NIfTI, and pictures PNG with the range of
    their file. Pictures of real numbers, those with other values after the study's steps, and PNG's limits (more than 8
    bits and one channel) give ``.npy``.
    """
    whole = geometry.to_original(image, image.new_zeros(len(image)))
    scale = _full_scale(case, reading) if all(isinstance(step, KEEP_VALUES) for step in reading.steps) else None
    if is_picture(case, geometry) and scale is not None and len(whole) in (1, 3) and (len(whole) == 1 or scale == 255):
        stored = (whole * scale).round().clamp(0, scale).movedim(0, -1).numpy()
        return write_picture(folder, case, stored.astype(np.uint8 if scale == 255 else np.uint16))
    return write_map(folder, case, "", whole if len(whole) > 1 else whole[0], geometry)


def _full_scale(case: Case, reading: Reading) -> float | None:
    """Return the stored value that was read as 1, or None if values were read as they are."""
    if case.row is not None:
        return 255.0 if images_in(case.files[0], reading.array, reading.axes)[1].dtype == np.uint8 else None
    return read_case(case.files, None, reading.options).image.full_scale

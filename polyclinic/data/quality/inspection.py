"""Inspection of one example: the summary of an image that the data check keeps."""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyclinic.data.files import OPTIONS, VIDEOS, ImageOptions, kind_of, read_case, read_mask
from polyclinic.data.formats.column_roles import SPLITS
from polyclinic.data.formats.grids import GridMismatch
from polyclinic.data.formats.mask_labels import labels_in
from polyclinic.data.formats.nifti import is_nifti
from polyclinic.data.formats.safe_reading import Unreadable, read_npz, refusing
from polyclinic.data.formats.slides import describe
from polyclinic.data.formats.value_ranges import ValueRange
from polyclinic.data.formats.video import personal_metadata
from polyclinic.data.formats.volume import Volume, as_image, as_mask, canonical
from polyclinic.data.quality.folder_layout import Item, Layout
from polyclinic.data.quality.image_hashes import content_hash, small_picture
from polyclinic.data.quality.phi_screening import in_nifti, in_picture, may_show_a_face

DICOM = "dicom"
QUANTILES = 33
THUMB = 96
_FLAT = torch.eye(4, dtype=torch.float64)


@dataclass(frozen=True)
class Look:
    """Summary of an example.

    Attributes:
        item: The example.
        size: Voxels (z, y, x).
        channels: Number of channels.
        spacing_mm: (z, y, x); None if the file states none.
        orientation: Such as ``"LPS"``; empty for pictures.
        modality: As the file states it.
        units: ``"HU"``, ``"RGB"``, ...
        quantiles: 33 evenly spaced quantiles of the values.
        digest: Hash of the content.
        picture: Small picture for the perceptual hash, [32, 32].
        notes: Observations of the reader.
        face: Whether it may show a face.
        hidden: Metadata that may name a person, by field.
        labels: Values in its mask; None if there is no mask.
        astray: Why its mask does not belong to it, or empty.
        values: Its stored values.
        thumb: Thumbnail, uint8; only for some examples.
    """

    item: Item
    size: tuple[int, int, int]
    channels: int
    spacing_mm: tuple[float, float, float] | None
    orientation: str
    modality: str
    units: str
    quantiles: np.ndarray[Any, Any] = field(repr=False)
    digest: str
    picture: np.ndarray[Any, Any] = field(repr=False)
    notes: tuple[str, ...] = ()
    face: bool = False
    hidden: tuple[str, ...] = ()
    labels: tuple[int, ...] | None = None
    astray: str = ""
    values: ValueRange | None = None
    thumb: np.ndarray[Any, Any] | None = field(repr=False, default=None)


def read_item(item: Item, options: ImageOptions = OPTIONS) -> tuple[Volume, Volume | None, tuple[str, ...], str]:
    """Read the image of an example and its mask, notes, and why the mask does not belong to it (empty if it does).

    Raises:
        Unreadable: If the image, or the mask itself, cannot be read.
    """
    slices = item.key == DICOM
    try:
        case = read_case(item.paths, item.mask, options, slices=slices, part=item.part)
    except GridMismatch as mismatch:
        if item.mask is None or mismatch.path != item.mask:
            raise
        case = read_case(item.paths, None, options, slices=slices)
        with contextlib.suppress(GridMismatch):
            return case.image, read_mask(item.mask, options)[0], case.notes, mismatch.reason
        return case.image, None, case.notes, mismatch.reason
    return case.image, case.mask, case.notes, ""


def look(
    item: Item,
    volume: Volume,
    mask: Volume | None = None,
    thumb: bool = False,
    hints: str = "",
    notes: tuple[str, ...] = (),
    astray: str = "",
) -> Look:
    """Return the summary of an example."""
    values = volume.array.float().flatten()
    sample = values[:: max(1, values.numel() // 100_000)].numpy()
    hidden = tuple(name for path in item.paths[:1] for name in _hidden(path, item.part is not None))
    labels = None if mask is None else labels_in(mask.array)
    return Look(
        item,
        volume.size,
        volume.array.shape[0] if volume.array.ndim == 4 else 1,
        volume.spacing_mm if volume.measured else None,
        volume.orientation if volume.measured else "",
        volume.modality,
        volume.units,
        np.quantile(sample, np.linspace(0, 1, QUANTILES)).astype(np.float32),
        content_hash(volume.array),
        small_picture(volume),
        notes,
        may_show_a_face(volume, f"{hints} {item.paths[0].name}"),
        hidden,
        labels,
        astray,
        ValueRange.of(item.name, volume),
        thumbnail(volume) if thumb else None,
    )


def _hidden(path: Path, parts: bool) -> list[str]:
    """Return metadata of a file that may name a person. ``parts``: whether it is a slide or a video."""
    if parts:
        return _in_slide_or_video(path, path.stat().st_mtime_ns)
    return [*(in_nifti(path) if is_nifti(path) else []), *in_picture(path)]


@functools.lru_cache(maxsize=1024)  # once for all tiles of a slide
def _in_slide_or_video(path: Path, changed: int) -> list[str]:
    if kind_of(path) in VIDEOS:
        return personal_metadata(path)
    return [f"a picture of the {name}" for name in describe(path).pictures]


def thumbnail(volume: Volume, side: int = THUMB) -> np.ndarray[Any, Any]:
    """Return the middle slice, upright, between its 1st and 99th percentile. Shape [<= side, <= side (, 3)], uint8."""
    if volume.measured and volume.array.ndim == 3:
        volume = canonical(volume)
        thin = int(np.argmin(volume.size))
        flat = volume.array.select(thin, volume.size[thin] // 2).float()[None].flip(1)  # anterior, or superior, is up
        flat = flat if thin == 2 else flat.flip(2)  # the patient's right is on the left, as radiologists look
    else:
        array = volume.array if volume.array.ndim == 4 else volume.array[None]
        flat = (array[:3] if volume.units == "RGB" else array[:1])[:, array.shape[1] // 2].float()
    high, wide = flat.shape[-2:]
    scale = side / max(high, wide)
    size = (max(1, round(high * scale)), max(1, round(wide * scale)))
    flat = torch.nn.functional.interpolate(flat[None], size, mode="bilinear", align_corners=False, antialias=True)[0]
    low, top = (float(v) for v in np.quantile(flat.numpy(), (0.01, 0.99)))
    gray = ((flat - low) / max(top - low, 1e-12)).clamp(0, 1).mul(255).byte().numpy()
    out: np.ndarray[Any, Any] = np.moveaxis(gray, 0, -1) if gray.shape[0] == 3 else gray[0]
    return out


def archive_items(
    path: Path, name: str, options: ImageOptions = OPTIONS
) -> Iterator[tuple[Item, Volume | Unreadable, Volume | None]]:
    """Yield the examples of a NumPy archive: ``train_images``/``train_labels``, ... (MedMNIST), or
    ``images``/``labels``. A row that cannot be used is yielded with the reason.

    Raises:
        Unreadable: If it contains no array of images, or labels that do not match them in number.
    """
    arrays = read_npz(path, options.limits)
    keys = [key for key in arrays if key == "images" or key.endswith("_images")]
    if not keys:
        raise Unreadable(path, "contains no array named images or <split>_images")
    for key in sorted(keys):
        start, images = key.removesuffix("images"), arrays[key]
        if images.ndim not in (3, 4, 5) or images.dtype.kind not in "buif":
            raise Unreadable(path, f"array {key} of shape {images.shape} is not images of numbers")
        own: dict[str, Any] = {}
        for part in ("labels", "masks", "site", "patient"):
            array = arrays.get(f"{start}{part}", arrays.get(f"{start}{part}s"))
            if array is not None and len(array) != len(images):
                raise Unreadable(path, f"{len(images)} images in {key} but {len(array)} {part}")
            own[part] = array
        split = SPLITS.get(start.rstrip("_").lower())
        for row in range(len(images)):
            item = Item(
                f"{name}[{key}, {row}]",
                (path,),
                None if own["labels"] is None else _text(own["labels"][row]),
                None if own["patient"] is None else _text(own["patient"][row]),
                split,
                None if own["site"] is None else _text(own["site"][row]),
                row=row,
                key=key,
            )
            try:
                with refusing(path, f"row {row} of {key} cannot be read"):
                    volume = _array_volume(path, images[row], options.fill)
                    mask = None
                    if own["masks"] is not None:
                        mask = Volume(_zyx(as_mask(path, own["masks"][row])), _FLAT, units="label", measured=False)
            except Unreadable as refusal:
                yield item, refusal, None
            else:
                yield item, volume, mask


def _text(value: Any) -> str:
    flat = np.asarray(value).ravel()
    return str(flat[0]) if flat.size == 1 else " ".join(str(v) for v in flat)


def _zyx(array: Tensor) -> Tensor:
    return array if array.ndim == 3 else array[None]


def _array_volume(path: Path, row: np.ndarray[Any, Any], fill: float | None) -> Volume:
    scale = float(np.iinfo(row.dtype).max) if row.dtype.kind == "u" else None
    array, notes = as_image(path, row, fill)
    color = array.ndim in (3, 4) and array.shape[-1] == 3
    if color:
        array = array.movedim(-1, 0)
    array = array[:, None] if color and array.ndim == 3 else array if array.ndim >= 3 else array[None]
    units = "RGB" if color else ""
    return Volume(array, _FLAT, units=units, measured=False, notes=notes, positioned=False, full_scale=scale)


def look_at(
    layout: Layout, thumbs: int = 24, options: ImageOptions = OPTIONS, hints: str = ""
) -> Iterator[Look | tuple[Item, Unreadable]]:
    """Yield the summary of every example of a layout, and refused files with the reason."""
    if layout.kind == "npz":
        for archive in layout.items:
            try:
                for at, (item, volume, mask) in enumerate(archive_items(archive.paths[0], archive.name, options)):
                    if isinstance(volume, Unreadable):
                        yield item, volume
                    else:
                        yield look(item, volume, mask, at % 97 == 0 and at < 97 * thumbs, notes=volume.notes)
            except Unreadable as refusal:
                yield archive, refusal
        return
    every = max(1, len(layout.items) // max(thumbs, 1))
    for at, item in enumerate(layout.items):
        try:
            with refusing(item.paths[0], "cannot be read"):
                image, labels, notes, astray = read_item(item, options)
                seen = look(item, image, labels, at % every == 0 and at < every * thumbs, hints, notes, astray)
        except Unreadable as refusal:
            yield item, refusal
        else:
            yield seen

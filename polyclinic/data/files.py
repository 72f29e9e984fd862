"""Files named by a study: location, content and content hash."""

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from polyclinic.data.archives import ENDINGS, unpack
from polyclinic.data.cache import folder
from polyclinic.data.examples import DataError
from polyclinic.data.formats.safe_reading import LIMITS, Limits, Unreadable, read_picture
from polyclinic.data.formats.volume import Volume, canonical
from polyclinic.data.preprocessing.sample import Picture

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
VOLUMES = (".nii", ".nii.gz", ".nrrd", ".dcm")


def placed(path: str, key: str = "path") -> Path:
    """Return the path given for ``key``, with ``~`` and ``$VARIABLES`` expanded; it must exist.

    Raises:
        DataError: If a variable is not set, or the path does not exist.
    """
    filled = os.path.expandvars(os.path.expanduser(path))
    if unset := re.findall(r"\$\{?(\w+)\}?", filled):
        raise DataError(f'{key} = "{path}": the environment variable {unset[0]} is not set')
    location = Path(filled)
    if not location.exists() and (fetched := folder() / "downloads") in location.parents:
        name = Path(location.relative_to(fetched).parts[0]).stem.split("_")[0]
        says = f"fetch it with `polyclinic data get {name}`, or set path to its location"
        raise DataError(f"{location.name} is not here yet: {says}")
    if not location.exists():
        raise DataError(f'{key} = "{path}": there is nothing at {location.absolute()}')
    return location


def content_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, or of the names and bytes of all files in a folder."""
    if path.is_dir():
        inside = sorted(file for file in path.rglob("*") if file.is_file())
        named = [f"{file.relative_to(path).as_posix()} {content_of(file)}" for file in inside]
        return hashlib.sha256("\n".join(named).encode()).hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def opened(path: str) -> Path:
    """Return the folder at ``path``. A ``.zip`` or ``.tar`` file is unpacked once, into the cache under its hash.

    Raises:
        DataError: If the path is neither a folder nor a valid archive.
    """
    location = placed(path)
    if location.is_dir():
        return location
    if not location.name.lower().endswith(ENDINGS):
        raise DataError(f'path = "{path}": give a folder, or a .zip or .tar file of one')
    home = folder() / "unpacked" / content_of(location)
    if not home.is_dir():
        unpack(location, home)
    return home


def kind_of(path: Path) -> str:
    """Return the suffix by which a file is read, such as ``".nii.gz"``, or "" if it is not supported."""
    name = path.name.lower()
    return next((ending for ending in (*PICTURES, *VOLUMES) if name.endswith(ending)), "")


def stem_of(path: Path) -> str:
    """Return a file's name without the suffix by which it is read."""
    return path.name[: len(path.name) - len(kind_of(path))]


def patients_in(ids: Sequence[str], pattern: str) -> tuple[str, ...]:
    r"""Return the patient of each example, taken from its name.

    Args:
        ids: Names of examples.
        pattern: A regular expression with one group, such as ``"_(\d+)[LR]$"``, that matches the patient; "" if names
            do not identify patients. A name without a match is its own patient.
    """
    if not pattern:
        return tuple(ids)
    matches = (re.search(pattern, name) for name in ids)
    return tuple(match.group(1) if match else name for match, name in zip(matches, ids, strict=True))


def check_pattern(key: str, pattern: str) -> list[str]:
    """Return the problems of a regular expression that needs one group."""
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        return [f"{key} = {pattern}: is not a regular expression ({error})"]
    return (
        [] if groups == 1 or not pattern else [f"{key} = {pattern}: needs exactly one group in ( ), and has {groups}"]
    )


def read_image(
    paths: Sequence[Path], mask: Path | None = None, limits: Limits = LIMITS, *, as_bytes: bool = False
) -> Picture:
    """Read one image from one file, or from one file per channel, and its mask.

    Pictures are scaled to 0 to 1 at any bit depth (with ``as_bytes``, 8-bit pictures remain uint8). Volumes keep their
    units, are reoriented to the axes (z, y, x) of RAS, and become 2-D if they have one slice. A folder is read as a
    DICOM series.

    Raises:
        Unreadable: If a file is damaged, too large, or does not match the others.
    """
    parts = [_read(path, False, limits) for path in paths]
    if len({part.size for part in parts}) > 1:
        raise Unreadable(paths[0], f"its channels differ in size: {' and '.join(str(p.size) for p in parts)}")
    channels = [part.pixels for part in parts]
    if not as_bytes or any(pixels.dtype != torch.uint8 for pixels in channels):
        channels = [pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels for pixels in channels]
    pixels = torch.cat(channels) if len(channels) > 1 else channels[0]
    if mask is None:
        return Picture(pixels, None, parts[0].spacing_mm)
    labels = _read(mask, True, limits).pixels[0].long()
    if tuple(labels.shape) != parts[0].size:
        raise Unreadable(mask, f"the mask has size {tuple(labels.shape)} and its image {parts[0].size}")
    return Picture(pixels, labels, parts[0].spacing_mm)


def _read(path: Path, mask: bool, limits: Limits) -> Picture:
    kind = kind_of(path)
    if kind in PICTURES:
        array = read_picture(path, limits)
        if mask and array.ndim > 2:
            raise Unreadable(path, "is a color picture, not a mask of labels")
        if array.dtype == np.uint8:
            pixels = torch.from_numpy(array.copy())
        else:
            pixels = torch.from_numpy(
                array.astype(np.float32) / (65535 if array.dtype == np.uint16 and not mask else 1)
            )
        return Picture(pixels.movedim(-1, 0) if pixels.ndim > 2 else pixels[None])
    volume = _read_volume(path, kind, mask, limits)
    flat = volume.size[0] == 1
    volume = volume if flat else canonical(volume)
    pixels = volume.array.float() / (255 if volume.units == "RGB" else 1)
    pixels = pixels if pixels.ndim > 3 else pixels[None]
    spacing = volume.spacing_mm if volume.measured else None
    return Picture(pixels[:, 0], None, spacing and spacing[1:]) if flat else Picture(pixels, None, spacing)


def _read_volume(path: Path, kind: str, mask: bool, limits: Limits) -> Volume:
    if kind in (".nii", ".nii.gz"):
        from polyclinic.data.formats.nifti import read_nifti

        return read_nifti(path, mask=mask, limits=limits)
    if kind == ".nrrd":
        from polyclinic.data.formats.nrrd import read_nrrd

        return read_nrrd(path, mask=mask, limits=limits)
    if kind == ".dcm" or path.is_dir():
        from polyclinic.data.formats.dicom.series import read_dicom

        return read_dicom(path, limits=limits)
    raise Unreadable(path, f"is none of {', '.join((*PICTURES, *VOLUMES))}")

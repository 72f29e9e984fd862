"""fastMRI files: one HDF5 file per examination, of which the reconstructed magnitude images are read.

Zbontar et al., "fastMRI: an open dataset and benchmarks for accelerated MRI", https://arxiv.org/abs/1811.08839. The raw
k-space is not read: ``accelerate`` in a study removes columns of the *images'* k-space, which is easier to reconstruct
than a scanner's (Shimron et al., PNAS 2022, https://doi.org/10.1073/pnas.2117203119); a note states this.
"""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from polyclinic.data.cache import cached
from polyclinic.data.collection import described
from polyclinic.data.examples import DataError, Examples
from polyclinic.data.files import opened
from polyclinic.data.formats.safe_reading import LIMITS, Unreadable
from polyclinic.data.preprocessing.pipeline_config import Steps, apply, fingerprint
from polyclinic.data.preprocessing.sample import Picture
from polyclinic.data.source import HIDDEN, Info, Table, digest
from polyclinic.errors import MissingDependency

IMAGES = ("reconstruction_rss", "reconstruction_esc")
EASIER = "k-space was made from magnitude images, not measured: that is easier to reconstruct than a scanner's own."


@dataclass(frozen=True)
class Examination:
    """One file: location, patient, scanner, and the slices that are examples."""

    path: Path
    patient: str
    scanner: str
    acquisition: str
    slices: tuple[int, ...]
    height: int
    mark: str


@dataclass(frozen=True)
class FastMri:
    """Folder of fastMRI's ``.h5`` files; each slice is an example, and its own target.

    Attributes:
        path: The folder.
        slices: Number of slices of each examination, around its middle.
        acquisition: Only examinations with this text in their acquisition, such as ``"CORPD_FBK"``; empty for all.
        steps: Preprocessing; images are first divided by the examination's largest value.
        unreadable: ``"refuse"`` raises an error for damaged files; ``"skip"`` leaves them out and lists them.
        about: Description from the catalog; not settable in a study file.
    """

    path: str
    slices: int = 8
    acquisition: str = ""
    steps: Steps = ()
    unreadable: Literal["refuse", "skip"] = "refuse"
    about: Info | None = field(default=None, metadata=HIDDEN)

    def __post_init__(self) -> None:
        if self.slices < 1:
            raise DataError(f"slices = {self.slices}: at least one slice of each examination")

    @property
    def info(self) -> Info:
        """Description of the data set."""
        name = Path(self.path).name
        found = Info(name, name, "MR", "not stated", "reconstruction")
        bad = self._found[1]
        left = (f"{len(bad)} files were left out because they cannot be read: {'; '.join(bad[:5])}.",) if bad else ()
        return described(self.about, found, (EASIER, *left))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of each file's header, norm and middle slice (k-space is too large to hash), and of the options."""
        marks = [(one.path.name, one.mark, one.slices) for one in self._found[0]]
        return digest("fastmri", 1, marks, fingerprint(self.steps))

    def table(self) -> Table:
        """Return one row per slice."""
        rows = [(one, k) for one in self._found[0] for k in one.slices]
        columns = {
            "scanner": tuple(one.scanner for one, _ in rows),
            "acquisition": tuple(one.acquisition for one, _ in rows),
            "position": tuple(f"{k / max(one.height - 1, 1):.4f}" for one, k in rows),
        }
        ids = tuple(f"{one.path.stem} slice {k}" for one, k in rows)
        return Table(ids, tuple(one.patient for one, _ in rows), None, columns, ("scanner", "acquisition"))

    def examples(self, ids: Sequence[str]) -> Examples:
        """Return the named slices, from 0 to 1; the targets are the slices themselves."""
        table = self.table()
        where = {name: i for i, name in enumerate(table.ids)}
        rows = [where[name] for name in ids]
        images = cached("fastmri", digest("decoded", self.fingerprint), self._decode)["images"][rows]
        return Examples(images, images, tuple(table.patients[i] for i in rows), tuple(ids))

    def _decode(self) -> dict[str, Any]:
        found = []
        for one in self._found[0]:
            with _file(one.path) as file:
                images = _images(one.path, file)
                largest = float(np.max(images[...])) or 1.0
                for k in one.slices:
                    pixels = torch.from_numpy(np.asarray(images[k], dtype=np.float32) / largest)[None]
                    if not bool(pixels.isfinite().all()):
                        raise DataError(f"{one.path.name}: slice {k} contains values that are not finite numbers")
                    found.append(apply(self.steps, Picture(pixels)).pixels)
        if len(sizes := {tuple(pixels.shape) for pixels in found}) > 1:
            raise DataError(f'slices have {len(sizes)} different sizes: add {{step = "crop_pad", size = 320}} to steps')
        return {"images": torch.stack(found)}

    @cached_property
    def _found(self) -> tuple[tuple[Examination, ...], tuple[str, ...]]:
        """The valid examinations, and the problems of the other files."""
        root = opened(self.path)
        found, bad = list[Examination](), list[str]()
        for path in sorted(root.glob("*.h5")):
            try:
                one = self._look(path)
            except Unreadable as error:
                bad.append(str(error))
                continue
            if self.acquisition in one.acquisition:
                found.append(one)
        if bad and self.unreadable == "refuse":
            raise DataError(bad[:20])
        if not found:
            what = f" whose acquisition has {self.acquisition!r} in it" if self.acquisition else ""
            raise DataError(f"{root}: there is no valid .h5 file of fastMRI{what}")
        return tuple(found), tuple(bad)

    def _look(self, path: Path) -> Examination:
        with _file(path) as file:
            images = _images(path, file)
            height = int(images.shape[0])
            first = max(0, (height - self.slices) // 2)
            chosen = tuple(range(first, min(height, first + self.slices)))
            patient = str(file.attrs.get("patient_id", "")) or path.stem
            header = bytes(file["ismrmrd_header"][()])[:65536] if "ismrmrd_header" in file else b""
            model = re.search(rb"<systemModel>([^<]{1,64})</systemModel>", header)  # avoids parsing untrusted XML
            scanner = model.group(1).decode("utf-8", "replace").strip() if model else "not stated"
            stated = [float(file.attrs.get(name, 0.0)) for name in ("norm", "max")]
            mark = digest(header, stated, patient, images.shape, np.ascontiguousarray(images[height // 2]).tobytes())
            acquisition = str(file.attrs.get("acquisition", "")) or "not stated"
        return Examination(path, patient, scanner, acquisition, chosen, height, mark)


@contextmanager
def _file(path: Path) -> Iterator[Any]:
    """Open the file for reading; report any HDF5 error in one line."""
    try:
        import h5py
    except ImportError:
        raise MissingDependency("fastmri", "reading fastMRI's HDF5 files needs h5py") from None
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        if isinstance(error, DataError | Unreadable):
            raise
        raise Unreadable(path, f"is not a sound HDF5 file ({type(error).__name__})") from None


def _images(path: Path, file: Any) -> Any:
    """Return the reconstructed images [slices, y, x] without reading them.

    Raises:
        Unreadable: If there are none, they point into other files, or exceed the limits.
    """
    import h5py

    name = next((name for name in IMAGES if name in file), None)
    if name is None:
        raise Unreadable(path, f"contains no {' or '.join(IMAGES)} (fastMRI's test files do not)")
    images = file[name]
    if not isinstance(file.get(name, getlink=True), h5py.HardLink) or not isinstance(images, h5py.Dataset):
        raise Unreadable(path, f"has {name} as a link, and links are not followed")
    if images.external or images.is_virtual:
        raise Unreadable(path, f"stores {name} in other files, which are not opened")
    if images.ndim != 3 or images.dtype.kind != "f" or min(images.shape) < 1:
        raise Unreadable(path, f"has {name} of shape {images.shape} and type {images.dtype}, not slices of numbers")
    if math.prod(images.shape) * 4 > LIMITS.decoded_bytes:
        raise Unreadable(path, f"claims {' x '.join(map(str, images.shape))} pixels, which is over the limit")
    return images

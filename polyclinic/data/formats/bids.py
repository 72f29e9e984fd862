"""Reader of BIDS folders: participants, sites and images, using the standard library only.

Standard: Gorgolewski et al., "The brain imaging data structure", Scientific Data 3:160044, 2016;
https://bids-specification.readthedocs.io. Reads ``participants.tsv`` (labels and sites), raw images in
``sub-*/[ses-*/]<kind>/``, and masks (``_mask``, ``_dseg``) next to them or under ``derivatives/``. A row of
``participants.tsv`` with a session describes that session only, as does a row of ``sub-*/sub-*_sessions.tsv``. Does not
read inherited JSON sidecars and ``phenotype/``.
"""

import csv
import io
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from polyclinic.data.formats.column_roles import column_of, key_of, matched
from polyclinic.data.formats.safe_reading import LIMITS, Limits, Unreadable, read_text, refusing

MISSING = ("", "n/a", "N/A")
SESSION_COLUMNS = ("session_id", "session", "ses", "visit", "visit_id", "timepoint")
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
        participants: The columns of participants.tsv by participant, as images name it; missing values, and values that
            differ between a participant's sessions, are left out.
        sessions: The columns of one session, by participant and session, such as ``("sub-01", "2")``.
        images: Raw images in a fixed order.
        masks: Segmentations, raw or derived.
        problems: Inconsistencies, each a sentence.
    """

    root: Path
    participants: Mapping[str, Mapping[str, str]] = field(repr=False)
    images: tuple[BidsImage, ...]
    masks: tuple[BidsImage, ...] = ()
    problems: tuple[str, ...] = ()
    sessions: Mapping[tuple[str, str], Mapping[str, str]] = field(default_factory=dict, repr=False)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of participants.tsv and the sessions' tables that contain values."""
        rows = (*self.participants.values(), *self.sessions.values())
        return tuple(dict.fromkeys(name for row in rows for name in row))

    @property
    def table(self) -> dict[str, list[str]]:
        """The columns with the values of all participants."""
        return {name: [row.get(name, "") for row in self.participants.values()] for name in self.columns}

    def row_of(self, image: BidsImage) -> dict[str, str]:
        """Return what the tables say about an image: of its session, otherwise of its participant."""
        session = self.sessions.get((image.subject, image.entities.get("ses", "")), {})
        return {**self.participants.get(image.subject, {}), **session}

    def sites(self, column: str | None = None) -> dict[str, str]:
        """Return the site of each participant, from ``column`` or the first column whose name denotes a site.

        Raises:
            Unreadable: If there is no such column.
        """
        site_column = column_of(self.table, "site", column or "", [])
        if not site_column:
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
        """Return the mask of the same subject, session, run and space, or None if there is not exactly one.

        A mask in a template's space, such as ``space-MNI152NLin2009cAsym``, does not belong to the native image.
        """
        same = [m for m in self.masks if all(m.entities.get(k) == image.entities.get(k) for k in ("sub", "ses", "run"))]
        own = [m for m in same if m.entities.get("space", "orig") in ("orig", "native", "individual", image.suffix)]
        return own[0] if len(own) == 1 else None


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
    by_session: dict[tuple[str, str], dict[str, str]] = {}
    problems: list[str] = []
    table = root / "participants.tsv"
    rows: list[dict[str, str]] = []
    if table.exists():
        rows = _rows(table, "participant_id", problems, limits)
    else:
        problems.append("participants.tsv is missing: labels and sites are not known")
    images: list[BidsImage] = []
    masks: list[BidsImage] = []
    for image in _images(root, problems):
        (masks if image.suffix in _MASKS else images).append(image)
    derived = root / "derivatives"
    if derived.is_dir():
        masks += [image for image in _images(derived, []) if image.suffix in _MASKS]
    spaces = sorted({mask.entities["space"] for mask in masks if "space" in mask.entities})
    if template := [
        space for space in spaces if space not in ("orig", "native", "individual", *{i.suffix for i in images})
    ]:
        problems.append(
            f"segmentations in the space {', '.join(template[:3])} do not belong to native images: not used"
        )
    seen = {image.subject for image in images}
    own = matched([row["participant_id"] for row in rows], sorted(seen))
    for row in rows:
        row["participant_id"] = own.get(row["participant_id"], row["participant_id"])
    participants, by_session = _by_session(table.name, rows, problems)
    for who in sorted(seen & set(participants)):
        if (file := root / who / f"{who}_sessions.tsv").is_file():
            for row in _rows(file, "session_id", problems, limits):
                ses = row.pop("session_id").removeprefix("ses-")
                by_session[who, ses] = {**by_session.get((who, ses), {}), **_known(row)}
    if table.exists():
        if lost := sorted(set(participants) - seen):
            problems.append(f"{len(lost)} participants have no image ({', '.join(lost[:3])})")
        if unknown := sorted(seen - set(participants)):
            problems.append(f"{len(unknown)} subjects are not in participants.tsv ({', '.join(unknown[:3])})")
    return Bids(root, participants, tuple(images), tuple(masks), tuple(problems), by_session)


def _rows(table: Path, key: str, problems: list[str], limits: Limits) -> list[dict[str, str]]:
    """Return the rows of a table with a column ``key``, which is not missing in any row."""
    text = io.StringIO(read_text(table, limits))
    with refusing(table, "is not a table separated by tabs"):
        rows = list(csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE))
    rows = [[cell.strip() for cell in row] for row in rows if any(cell.strip() for cell in row)]
    if not rows or key not in rows[0]:
        raise Unreadable(table, f"has no column {key} (it must be separated by tabs)")
    header, out = rows[0], []
    for number, row in enumerate(rows[1:], 2):
        cells = dict(zip(header, row, strict=False))
        if len(row) != len(header):
            problems.append(f"{table.name}, row {number}: {len(row)} cells under {len(header)} columns; left out")
        elif not re.fullmatch(r"(sub-|ses-)?[A-Za-z0-9+]+", cells[key]):
            problems.append(f"{table.name}, row {number}: the {key} is not letters and digits; left out")
        else:
            out.append(cells)
    return out


def _by_session(
    table: str, rows: list[dict[str, str]], problems: list[str]
) -> tuple[dict[str, dict[str, str]], dict[tuple[str, str], dict[str, str]]]:
    """Return the rows by participant, and by participant and session. Values that differ by session are of sessions."""
    keys = {key_of(name) for name in SESSION_COLUMNS}
    session = next((name for name in (rows[0] if rows else ()) if key_of(name) in keys), None)
    by_participant: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        by_participant.setdefault(row.pop("participant_id"), []).append(row)
    sessions = {
        (who, row[session].removeprefix("ses-")): _known({k: v for k, v in row.items() if k != session})
        for who, several in by_participant.items()
        for row in several
        if session is not None
    }
    unclear = [who for who, several in by_participant.items() if session is None and len(several) > 1]
    if unclear:
        problems.append(
            f"{table}: {len(unclear)} participants have several rows ({', '.join(unclear[:3])}) and no column such as "
            "session_id says to which session each belongs: values that differ between them are not used"
        )
    alike = {
        who: _known({k: v for k, v in several[0].items() if all(row[k] == v for row in several)})
        for who, several in by_participant.items()
    }
    return alike, sessions


def _known(row: Mapping[str, str]) -> dict[str, str]:
    return {name: cell for name, cell in row.items() if cell not in MISSING}


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

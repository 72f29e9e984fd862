"""Detection of a folder's layout and its examples, without renaming or moving files.

Recognized, in this order: nnU-Net (``imagesTr``, ``labelsTr``, ``dataset.json``) and its plain form (``images`` next to
``labels`` or ``masks``), BIDS, a table whose columns name image files, a tree of DICOM files, NumPy archives in
MedMNIST's layout, folders named by class (under ``train``/``val``/``test`` or not), a table, and loose images.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from polyclinic.data import files
from polyclinic.data.formats.bids import is_bids, read_bids
from polyclinic.data.formats.column_roles import SPLITS, column_of, usual_columns
from polyclinic.data.formats.dicom.file import looks_like_dicom
from polyclinic.data.formats.parsing import clean, is_missing, plain
from polyclinic.data.formats.pictures import PICTURES
from polyclinic.data.formats.safe_reading import LIMITS, Limits, Unreadable, read_text
from polyclinic.data.paired_folders import label_names
from polyclinic.data.quality.manifest_paths import by_column, by_columns, identifiers
from polyclinic.data.quality.mask_names import is_mask
from polyclinic.data.sources.excel import EXCEL, OTHER_SHEETS, sheets_of
from polyclinic.data.sources.tabular_files import TABLES, read_columns
from polyclinic.errors import MissingDependency

VOLUMES = (*(suffix for suffix in files.VOLUMES if suffix != ".dcm"), *files.SLIDES, *files.VIDEOS)
_MASK = r"(?i:label|mask|segmentation|seg)"


@dataclass(frozen=True)
class Item:
    """One example: files to read and metadata.

    Attributes:
        name: Name in the report: its path within the folder, and a number if a file contains several.
        paths: Its files (channels, or the slices of a series).
        patient: Its patient; None if unknown.
        row: Its position in an archive.
        key: The archive's array; ``"dicom"`` for a DICOM series.
        part: The part of the file that is the example: a tile of a slide, or a frame of a video.
    """

    name: str
    paths: tuple[Path, ...]
    label: str | None = None
    patient: str | None = field(default=None, repr=False)
    split: str | None = None
    site: str | None = None
    mask: Path | None = None
    row: int = 0
    key: str = ""
    part: files.Part | None = None


@dataclass(frozen=True)
class Layout:
    """Detected layout.

    Attributes:
        kind: ``"classes"``, ``"nnunet"``, ``"bids"``, ``"manifest"``, ``"dicom"``, ``"npz"``, ``"table"``, ``"files"``.
        root: The folder (or file).
        items: The examples; empty for DICOM (grouped by the check itself) and tables.
        labels: Names of the allowed mask values, by number; empty if unknown.
        problems: Problems of the layout, each a sentence.
        table: The table's file, for the kinds ``"table"`` and ``"manifest"``.
        sheet: Its sheet, if it is an Excel workbook with several.
        images: For a table without a column of paths: the patterns by which its columns name images, best first.
        others: Tables that could have been chosen instead.
    """

    kind: str
    root: Path
    items: tuple[Item, ...] = ()
    labels: Mapping[int, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    table: Path | None = None
    sheet: str = ""
    images: tuple[str, ...] = ()
    others: tuple[Path, ...] = ()


def suffix_of(path: Path) -> str:
    """Return the suffix in lower case, including the suffix before ``.gz``."""
    parts = [s.lower() for s in path.suffixes[-2:]]
    return "".join(parts) if parts[-1:] == [".gz"] and len(parts) == 2 else (parts[-1] if parts else "")


def detect(root: str | os.PathLike[str], limits: Limits = LIMITS, sheet: str = "") -> Layout:
    """Return the layout of a folder or file. ``sheet`` names the sheet of an Excel workbook.

    Raises:
        Unreadable: If ``root`` does not exist or contains nothing that could be data.
    """
    root = Path(root)
    if not root.exists():
        raise Unreadable(root, "there is no such folder or file")
    if root.is_file():
        return _single(root, limits, sheet)
    if (found := _segmentation(root, limits)) is not None:
        return found
    if is_bids(root):
        return _bids(root, limits)
    files = list(_files(root))
    tables = [path for path in files if suffix_of(path) in (*TABLES, *OTHER_SHEETS) and path.parent == root]
    images = [path for path in files if suffix_of(path) in (*PICTURES, *VOLUMES)]
    found, problems = _manifest(root, tables, images, limits, sheet)
    if found is not None:
        return replace(found, problems=(*found.problems, *problems))
    sniffed = [path for path in files if suffix_of(path) not in (*PICTURES, *VOLUMES, *TABLES, ".npz", ".txt", ".json")]
    if sum(looks_like_dicom(path) or suffix_of(path) == ".dcm" for path in sniffed[:200]) > len(images):
        return Layout("dicom", root, problems=problems)
    if images:
        return replace(_by_folder(root, images), problems=problems)
    archives = [path for path in files if path.suffix.lower() == ".npz"]
    if archives:
        return Layout("npz", root, tuple(Item(str(p.relative_to(root)), (p,)) for p in archives))
    if tables := [path for path in files if suffix_of(path) in TABLES]:
        chosen = _sheets(tables[0], limits, sheet)[0]
        return Layout("table", root, table=tables[0], sheet=chosen, others=tuple(tables[1:]))
    if problems:
        raise Unreadable(root, problems[0])
    raise Unreadable(root, f"contains no images or tables among {len(files)} files")


def _files(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(folder, name) for name in sorted(names) if not name.startswith("."))


def _manifest(
    root: Path, tables: list[Path], images: list[Path], limits: Limits, sheet: str
) -> tuple[Layout | None, tuple[str, ...]]:
    """Return the manifest among a folder's tables, and why other tables cannot be read.

    Of several, the one with labels and the most rows is taken.
    """
    problems: list[str] = []
    found: list[Layout] = []
    read: list[tuple[Path, str, Mapping[str, Sequence[str]]]] = []
    for path in tables:
        try:
            for name in _sheets(path, limits, sheet):
                columns: Mapping[str, Sequence[str]] = read_columns(path, limits, name)
                if (manifest := read_manifest(path, root, name, columns)) is not None:
                    found.append(manifest)
                read.append((path, name, columns))
        except (Unreadable, MissingDependency) as refusal:
            problems.append(f"the table {path.name} is not used: {getattr(refusal, 'reason', refusal)}")
    paths = sorted(path.relative_to(root).as_posix() for path in images)
    if not found and paths and not any(map(is_mask, paths)):
        for path, name, columns in read:
            patterns = [pattern for column in identifiers(columns) for pattern in by_column(columns, paths, column)]
            patterns = patterns or [pattern for pattern in [by_columns(columns, paths)] if pattern]
            if patterns:
                found.append(Layout("manifest", root, table=path, sheet=name, images=tuple(patterns)))
    if not found:
        return None, tuple(problems)
    best = max(found, key=lambda manifest: (_labeled(manifest), len(manifest.items)))
    others = [m.table for m in found if m.table is not None and m.table != best.table]
    return replace(best, others=tuple(dict.fromkeys(others))), tuple(problems)


def _labeled(manifest: Layout) -> bool:
    return any(item.label is not None or item.mask is not None for item in manifest.items)


def _sheets(path: Path, limits: Limits, sheet: str) -> list[str]:
    """Return the sheets of a table that are considered; ``[""]`` if there is no choice."""
    if suffix_of(path) not in EXCEL:
        return [""]
    if sheet:
        return [sheet]
    names = sheets_of(path, limits)
    return names if len(names) > 1 else [""]


def _single(path: Path, limits: Limits, sheet: str) -> Layout:
    suffix = suffix_of(path)
    if suffix == ".npz":
        return Layout("npz", path, (Item(path.name, (path,)),))
    if suffix in TABLES:
        found, problems = _manifest(path.parent, [path], [], limits, sheet)
        if problems:
            read_columns(path, limits, sheet)  # raises the reason
        return found or Layout("table", path, table=path, sheet=_sheets(path, limits, sheet)[0])
    if suffix in OTHER_SHEETS:
        read_columns(path, limits)  # raises the remedy
    if looks_like_dicom(path):
        return Layout("dicom", path)
    if suffix in (*PICTURES, *VOLUMES):
        return Layout("files", path, (Item(path.name, (path,)),))
    raise Unreadable(path, "is not an image, archive or table that can be read")


def _segmentation(root: Path, limits: Limits) -> Layout | None:
    """Detect nnU-Net's folders, or ``images`` next to ``labels`` or ``masks``."""
    pairs: list[tuple[str, str, str | None]] = [("imagesTr", "labelsTr", "train"), ("imagesTs", "labelsTs", "test")]
    pairs += [("images", name, None) for name in ("labels", "masks")]
    present = [
        (a, b, split) for a, b, split in pairs if (root / a).is_dir() and ((root / b).is_dir() or b == "labelsTs")
    ]
    if not any((root / b).is_dir() for _, b, _ in present):
        return None
    problems: list[str] = []
    labels: dict[int, str] = {}
    described = root / "dataset.json"
    channels = any(re.search(r"_\d{4}$", _stem(p)) for p in (root / present[0][0]).iterdir())
    if described.is_file():
        try:
            labels = label_names(json.loads(read_text(described, limits)).get("labels", {}))
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            problems.append(f"dataset.json cannot be read ({type(error).__name__}): allowed labels are not known")
    items, orphans = [], 0
    for images, masks, split in present:
        cases: dict[str, list[Path]] = {}
        for path in sorted(p for p in (root / images).iterdir() if suffix_of(p) in (*PICTURES, *VOLUMES)):
            name = re.sub(r"_\d{4}$", "", _stem(path)) if channels else _stem(path)
            cases.setdefault(name, []).append(path)
        drawn = {_stem(p): p for p in (root / masks).iterdir() if _mask(p)} if (root / masks).is_dir() else {}
        for name, paths in cases.items():
            mask = drawn.pop(name, None) or drawn.pop(name.replace("image", "label"), None)
            if mask is None and drawn:
                problems.append(f"an image has no mask: {paths[0].relative_to(root)}")
            items.append(Item(str(paths[0].relative_to(root)), tuple(paths), split=split, mask=mask))
        orphans += len(drawn)
    if orphans:
        problems.append(f"{orphans} masks belong to no image")
    return Layout("nnunet", root, tuple(items), labels, tuple(problems))


def _stem(path: Path) -> str:
    return path.name[: -len(suffix_of(path))] if suffix_of(path) else path.name


def _mask(path: Path) -> bool:
    return suffix_of(path) in (*PICTURES, *VOLUMES, ".dcm")


def _bids(root: Path, limits: Limits) -> Layout:
    bids = read_bids(root, limits)
    try:
        sites = bids.sites()
    except Unreadable:
        sites = {}
    label = column_of(bids.table, "label", "", [])
    items = []
    for image in bids.images:
        mask = bids.mask_of(image)
        items.append(
            Item(
                str(image.path.relative_to(root)),
                (image.path,),
                bids.row_of(image).get(label) if label else None,
                image.subject,
                site=sites.get(image.subject),
                mask=mask.path if mask else None,
            )
        )
    return Layout("bids", root, tuple(items), problems=bids.problems)


def read_manifest(path: Path, root: Path, sheet: str, columns: Mapping[str, Sequence[str]]) -> Layout | None:
    """Return the examples of a manifest (path, and label, patient, site, split, mask); None if it is no manifest."""
    where = next(iter(usual_columns(columns, "image")), "")
    if not where:
        return None
    roles = {role: column_of(columns, role, "", []) for role in ("label", "patient", "site", "split", "mask")}  # type: ignore[arg-type]
    items, problems = [], []
    lost = []
    for i, name in enumerate(columns[where]):
        cells = {role: columns[column][i] if column else "" for role, column in roles.items()}
        drawn = cells["mask"]
        outside = [p for p in (name, drawn) if Path(p).is_absolute() or ".." in Path(p).parts]
        if not name or outside:
            lost.append(f"row {i + 2}")
            continue
        split = cells["split"].lower()
        items.append(
            Item(
                name,
                (root / name,),
                None if is_missing(cells["label"]) else plain(clean(cells["label"])),
                None if is_missing(cells["patient"]) else cells["patient"],
                SPLITS.get(split, split or None),
                None if is_missing(cells["site"]) else cells["site"],
                root / drawn if drawn else None,
            )
        )
    if lost:
        some = ", ".join(lost[:5]) + (", ..." if len(lost) > 5 else "")
        problems.append(
            f"{path.name}: {len(lost)} rows whose path is empty or leads out of the folder ({some}); left out"
        )
    return Layout("manifest", root, tuple(items), problems=tuple(problems), table=path, sheet=sheet)


def _by_folder(root: Path, images: list[Path]) -> Layout:
    """Detect images in folders named by split, class, or both; loose images, and masks in the same folder by name."""
    masks, drawn = _beside(images)
    items = []
    for path in (path for path in images if path not in drawn):
        parts = list(path.relative_to(root).parts[:-1])
        item = Item(str(path.relative_to(root)), (path,), mask=masks.get(path))
        if parts and parts[0].lower() in SPLITS:
            item = replace(item, split=SPLITS[parts.pop(0).lower()])
        items.append(replace(item, label=parts[0]) if parts else item)
    labeled = any(item.label is not None for item in items)
    return Layout("classes" if labeled else "files", root, tuple(items))


def _beside(images: list[Path]) -> tuple[dict[Path, Path], set[Path]]:
    """Return masks in the same folder (``a_label``, ``label_a`` for ``a_image``, ``image_a`` or ``a``): by image, and
    all.
    """
    drawn: set[Path] = set()
    names = {(path.parent, _stem(path)): path for path in images}
    found: dict[Path, Path] = {}
    for path in images:
        stem = _stem(path)
        for other in (re.sub(_MASK, "image", stem, count=1), re.sub(rf"[_-]?{_MASK}(_\d+)?$", "", stem)):
            image = names.get((path.parent, other))
            if image is not None and image != path:
                found.setdefault(image, path)
                drawn.add(path)
    return found, drawn

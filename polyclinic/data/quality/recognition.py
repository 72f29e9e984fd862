"""Recognition of a folder, an archive or a table: the ``[data]`` table that reads it, with reasons and questions.

``polyclinic data check`` prints the result and ``polyclinic new --data`` writes a study with it. Both read the data
with the source that the table names, so they cannot disagree with a study.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from polyclinic.data.archives import ENDINGS
from polyclinic.data.examples import DataError
from polyclinic.data.files import VIDEOS, is_image, kind_of, opened, stem_of
from polyclinic.data.formats.bids import read_bids
from polyclinic.data.formats.column_roles import SPLITS, USUAL, column_of, identifying, key_of, usual_columns
from polyclinic.data.formats.dicom.file import open_dicom
from polyclinic.data.formats.dicom.segments import referenced_series, segments_of
from polyclinic.data.formats.dicom.series import dicom_files
from polyclinic.data.formats.parsing import clean, is_missing, is_number, plain
from polyclinic.data.formats.safe_reading import LIMITS, Limits, Unreadable, read_npz
from polyclinic.data.formats.slides import is_slide
from polyclinic.data.formats.video import frame_rate
from polyclinic.data.paired_folders import FOLDERS, cases_in
from polyclinic.data.quality.folder_layout import Layout, detect
from polyclinic.data.quality.manifest_paths import by_column, filled
from polyclinic.data.quality.mask_names import is_mask, named_pairs
from polyclinic.data.sources.excel import EXCEL, sheets_of
from polyclinic.data.sources.npz import SPLITS as NPZ_SPLITS
from polyclinic.data.sources.tabular_files import TABLES, read_columns
from polyclinic.errors import MissingDependency

STUDY_LIMITS = replace(LIMITS, decoded_bytes=4 * 2**30)
"""The limits of a study that does not set ``gigabytes``."""
MANY = 20
"""The largest number of different values of a label that is taken for a class."""
TARGETS = (
    *("num", "outcome", "disease", "status", "event", "death", "result", "malignant", "tumor", "cancer", "cdr"),
    *("sex", "age"),
)
"""Names of columns that are taken for the label if no usual name of a label occurs, in this order."""
TIMES = (
    *("time", "survivaltime", "timetoevent", "duration", "followup", "followuptime", "futime", "survtime", "ostime"),
    *(
        "osmonths",
        "osdays",
        "os",
        "pfstime",
        "pfsmonths",
        "dfstime",
        "dfsmonths",
        "survivaldays",
        "survivalmonths",
        "t",
    ),
)
"""Names of columns of times to an event, as keys."""
EVENTS = (
    "event",
    "status",
    "death",
    "dead",
    "died",
    "osstatus",
    "osevent",
    "pfsstatus",
    "pfsevent",
    "dfsstatus",
    "deathevent",
    "e",
)
"""Names of columns that say whether the event happened, as keys, in this order."""
HAPPENED = ({"1"}, {"2"}, {"dead", "deceased", "died", "1:deceased", "event", "yes", "true"})
CENSORED = ({"0"}, {"1"}, {"alive", "living", "0:living", "censored", "no", "false"})
"""Values of such a column: in the usual code 0 and 1, in that of R, and in words."""
GRADES = re.compile(
    r"(?i)(^|[_ \W])(grade|grading|stage|staging|severity|bi-?rads|pi-?rads|li-?rads|ti-?rads|lung-?rads|kl|kellgren"
    r"|isup|mayo|dr|retinopathy|etdrs|fazekas|tnm|gold|nyha|asa|ecog|density|fibrosis|steatosis)([_ \W]|$)"
    r"|(grade|stage|severity|score)$"
)
"""Names of columns whose values are grades in ascending order, if these are consecutive numbers."""
ROMAN = ("I", "II", "III", "IV", "V")
QUANTITIES = ("age", "time", "survival", "score", "volume", "weight", "height", "bmi")
"""Names of columns of numbers that are quantities, however few values occur."""
_SITE = re.compile(r"(?i)^(site|hospital|clinic|cent(er|re)|institution|scanner|vendor|lab)[ _-]?\w*$")
_PATIENT = re.compile(
    r"(?i)^((patient|pat|subject|subj|sub|case|person|participant|id|p)[ _-]?\d+\w*|tcga[-_].*|\d{2,})$"
)
_PERSON = re.compile(r"(?i)(?<![a-z0-9])(patient|subject|subj|sub|participant|person|case|oas\d)([_-]?)\d+")
_IDENTIFIER = re.compile(r"(?i)(^|[_ -])(id|rid|number|no|nr|key|index|stamp|uid)$")
_CODES = ("-9", "-99", "-999", "-9999")


@dataclass(frozen=True)
class Question:
    """What the data cannot say: the key of ``[data]``, a sentence, the default, and possible answers."""

    key: str
    text: str
    default: Any
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recognized:
    """Result of the recognition.

    Attributes:
        options: The ``[data]`` table without ``sites``, ``split`` and other keys that all kinds share, and the path.
        task: Type of prediction.
        why: Reasons, each a sentence.
        questions: What the data cannot say, with defaults that ``options`` already contain.
        official: Whether the data has a split of its own.
        ordered: Whether the classes are grades in ascending order.
    """

    options: dict[str, Any]
    task: str
    why: tuple[str, ...] = ()
    questions: tuple[Question, ...] = ()
    official: bool = False
    ordered: bool = False


@dataclass
class _Draft:
    """A ``Recognized`` in the making. ``answers`` are given by the user, by key."""

    options: dict[str, Any]
    answers: Mapping[str, Any]
    task: str = "classification"
    why: list[str] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    official: bool = False
    ordered: bool = False

    def ask(self, key: str, text: str, default: Any, choices: Sequence[str] = ()) -> Any:
        """Return the answer to a question, by default the given one."""
        if key in self.answers:
            return self.answers[key]
        self.questions.append(Question(key, text, default, tuple(choices)))
        return default

    def done(self) -> Recognized:
        """Return the result. Answers that are options of the source are taken as they are."""
        why, questions = tuple(self.why), tuple(self.questions)
        return Recognized(self.options, self.task, why, questions, self.official, self.ordered)


def recognize(
    path: str | os.PathLike[str],
    answers: Mapping[str, Any] | None = None,
    limits: Limits = STUDY_LIMITS,
    layout: Layout | None = None,
    given: Mapping[str, Any] = MappingProxyType({}),
) -> Recognized:
    """Return the ``[data]`` table for a folder, an archive or a table.

    Args:
        path: The folder or file.
        answers: Options of ``[data]`` that are known, such as ``{"label": "diagnosis"}``.
        limits: Limits on one file.
        layout: The result of ``detect``, if it is known.
        given: Options of ``[data]`` that are used as they are, such as ``{"fill": 0}``.

    Raises:
        Unreadable: If nothing at ``path`` can be read.
        DataError: If it is recognized, but a study needs what it does not contain.
    """
    root = Path(path)
    if root.is_file() and root.name.lower().endswith(ENDINGS):
        root = opened(str(path))
    answers = {**given, **(answers or {})}
    layout = layout or detect(root, limits, str(answers.get("sheet", "")))
    draft = _Draft({"path": str(path)}, answers)
    steps: dict[str, Callable[[], None]] = {
        "nnunet": partial(_pairs, draft, root),
        "classes": partial(_images, draft, root),
        "files": partial(_images, draft, root),
        "bids": partial(_bids, draft, root, limits),
        "manifest": partial(_manifest, draft, layout, limits),
        "table": partial(_table, draft, layout, limits),
        "npz": partial(_npz, draft, layout, limits),
        "dicom": partial(_dicom, draft, root, limits),
    }
    steps[layout.kind]()
    _divided(draft, root)
    draft.options |= given
    return draft.done()


def _pairs(draft: _Draft, root: Path) -> None:
    """Recognize ``imagesTr`` and ``labelsTr`` (nnU-Net, Decathlon), or ``images`` next to ``labels`` or ``masks``."""
    images, masks = next((a, b) for a, b in FOLDERS if (root / a).is_dir() and (root / b).is_dir())
    equal = cases_in(root / images, channels=True).keys() == cases_in(root / masks, channels=False).keys()
    if not equal and _patterns(draft, root):  # names that differ by a suffix
        return
    draft.task = "segmentation"
    draft.options["kind"] = "pairs"
    named = "nnU-Net's or the Decathlon's folders" if images == "imagesTr" else "two folders with equal file names"
    draft.why.append(f"{named}: images in {images}, masks in {masks}")


def _divided(draft: _Draft, root: Path) -> None:
    """Set how slides and videos are divided, if the data are such files."""
    if draft.options["kind"] not in ("folders", "manifest", "patterns"):
        return
    folder = root if root.is_dir() else Path(draft.options.get("root", "") or root.parent)
    files = [folder / name for name in _paths(folder)]
    videos = [path for path in files if kind_of(path) in VIDEOS]
    if "tiles" not in draft.answers and any(map(is_slide, files[:MANY])):
        text = "pixels along each side of a tile, and micrometers per pixel"
        draft.options["tiles"] = draft.ask("tiles", text, {"size": 256, "mpp": 0.5})
        draft.why.append("the files are whole-slide images; the tiles with tissue are the examples")
    elif "frames" not in draft.answers and len(videos) > len(files) / 2:
        rate = 25.0
        with suppress(MissingDependency, Unreadable):  # the source reports them
            rate = frame_rate(videos[0])
        text = f"which frames of the videos (about {rate:.3g} per second)"
        draft.options["frames"] = draft.ask("frames", text, {"every": max(1, round(rate))})
        draft.why.append(f"{len(videos)} files are videos; single frames are the examples")


def _images(draft: _Draft, root: Path) -> None:
    """Recognize images with masks by their names, or folders named by class."""
    if root.is_file():
        raise DataError(f"{root.name} is a single image: give the folder of all images")
    if not _patterns(draft, root):
        _folders(draft, root)


def _paths(root: Path) -> list[str]:
    """Return the paths of all images below ``root``, in order, without hidden ones."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        found += [Path(folder, name).relative_to(root).as_posix() for name in names if not name.startswith(".")]
    return sorted(name for name in found if is_image(root / name))


def _patterns(draft: _Draft, root: Path) -> bool:
    """Recognize images and masks in one folder or in parallel folders; return whether there are any."""
    names = _paths(root)
    pairs = named_pairs(names)
    if not pairs:
        return False
    depth = Counter(pair.depth for pair in pairs).most_common(1)[0][0]
    chosen = [pair for pair in pairs if pair.depth == depth]
    levels = _levels(draft, [pair.images[0] for pair in chosen], depth, classes=False)
    templates = Counter(found for pair in chosen if (found := pair.patterns(levels)) is not None)
    if not templates:
        return False
    (patterns, mask_pattern), count = templates.most_common(1)[0]
    draft.task = "segmentation"
    draft.options |= {"kind": "patterns", "images": list(patterns), "mask": mask_pattern}
    draft.why.append(f"{count} images have a mask of their name: {mask_pattern} next to {', '.join(patterns)}")
    if left := sum(not is_mask(name) for name in names) - count * len(patterns):
        draft.options["missing_labels"] = "drop"
        draft.why.append(f"{left} image files have no mask by this rule and are not used")
    return True


def _levels(draft: _Draft, names: Sequence[str], depth: int, classes: bool) -> dict[int, str]:
    """Return the meaning of each level of folders whose names differ, and ask for what the names do not say."""
    values = [[Path(name).parts[i] for name in names] for i in range(depth)]
    varying = [i for i in range(depth) if len(set(values[i])) > 1]
    if "levels" in draft.answers:
        answered = list(draft.answers["levels"])
        if len(answered) != depth:
            raise DataError(f"levels = {answered}: images are {depth} folders deep, so name {depth} levels")
        return dict(enumerate(answered))
    meaning: dict[int, str] = {}
    for i in varying:
        different = set(values[i])
        if "split" not in meaning.values() and all(value.lower() in SPLITS for value in different):
            meaning[i] = "split"
        elif "patient" not in meaning.values() and _mostly(_PATIENT, different):
            meaning[i] = "patient"
        elif "site" not in meaning.values() and _mostly(_SITE, different):
            meaning[i] = "site"
        elif not classes and "patient" not in meaning.values() and len(different) == len(names):
            meaning[i] = "patient"  # one example in each folder
    rest = [i for i in varying if i not in meaning]
    if classes and rest:
        meaning[_class_level(rest, values)] = "class"
        rest = [i for i in rest if i not in meaning]
    for i in rest:
        free = [word for word in ("site", "patient") if word not in meaning.values()]
        below = "class" in meaning.values() and i > next(k for k, word in meaning.items() if word == "class")
        few = len(set(values[i])) <= MANY and not below
        default = ("site" if few else "patient") if {"site", "patient"} == {*free} else (free or [f"level{i + 1}"])[0]
        meaning[i] = default
    if rest:
        listed = [meaning.get(i, "class" if classes else f"level{i + 1}") for i in range(depth)]
        some = "; ".join(f"level {i + 1}: {', '.join(sorted(set(values[i]))[:3])}, ..." for i in rest)
        draft.questions.append(Question("levels", f"what the folders name ({some})", listed))
    return meaning


def _mostly(pattern: re.Pattern[str], values: set[str]) -> bool:
    return sum(pattern.match(value) is not None for value in values) >= 0.9 * len(values)


def _class_level(levels: Sequence[int], values: Sequence[Sequence[str]]) -> int:
    """Return the level of classes: the deepest one whose names recur under the other levels, with few names."""

    def recurs(i: int) -> bool:
        above: dict[str, set[str]] = defaultdict(set)
        for name, parent in zip(values[i], zip(*values[:i], strict=True) if i else [()] * len(values[i]), strict=True):
            above[name].add("/".join(parent))
        return i == 0 or sum(len(parents) > 1 for parents in above.values()) * 2 >= len(above)

    few = [i for i in levels if len(set(values[i])) <= MANY and recurs(i)]
    return few[-1] if few else levels[-1]


def _folders(draft: _Draft, root: Path) -> None:
    """Recognize images in folders named by class, with folders of sites, splits and patients around them."""
    names = _paths(root)
    depths = Counter(len(Path(name).parts) - 1 for name in names)
    depth = depths.most_common(1)[0][0]
    chosen = [name for name in names if len(Path(name).parts) - 1 == depth]
    if depth == 0:
        raise DataError(
            f"{root.name} holds {len(names)} images without folders and without a table: sort them into folders named "
            "by class, add masks with names like a_mask.png for a.png, or list them in a table with the columns path, "
            "label and patient"
        )
    meaning = _levels(draft, chosen, depth, classes=True)
    if "class" not in meaning.values():
        raise DataError(f"{root.name}: no level of folders has names that can be classes; list the images in a table")
    draft.options["kind"] = "folders"
    draft.options["levels"] = [meaning.get(i, f"level{i + 1}") for i in range(depth)]
    draft.official = "split" in meaning.values() and "test" in {
        SPLITS.get(Path(name).parts[i].lower()) for i, word in meaning.items() if word == "split" for name in chosen
    }
    shown = "/".join(f"<{level}>" for level in draft.options["levels"])
    draft.why.append(f"{len(chosen)} images in folders {shown}")
    if "patient" not in meaning.values():
        _person(draft, "patient", chosen)
    if left := len(names) - len(chosen):
        draft.why.append(f"{left} images at another depth are not used")


def _person(draft: _Draft, option: str, names: Sequence[str]) -> None:
    """Set the option for the part of every path that names a patient, such as ``patient0001`` or ``OAS1_0001``."""
    found = [match for name in names if (match := _PERSON.search(name))]
    words = {match.group(1) + match.group(2) for match in found}
    if names and len(found) == len(names) and len(words) == 1:
        count = len({match.group() for match in found})
        draft.options[option] = f"({re.escape(words.pop())}\\d+)"
        draft.why.append(f"the paths name {count} patients, such as {found[0].group()}")


def _label(draft: _Draft, columns: Mapping[str, Sequence[str]], apart: set[str]) -> str:
    """Return the column to predict: by its usual name, or asked for."""
    rest = {name: cells for name, cells in columns.items() if name not in apart}
    if "label" in draft.answers:
        return str(draft.answers["label"])
    if found := usual_columns(rest, "label"):
        draft.why.append(f'the label is the column "{found[0]}", by its name')
        return found[0]
    by_key = {key_of(name): name for name in rest}
    usual = [by_key[name] for name in TARGETS if name in by_key]
    if not rest:
        raise DataError("there is no column that could be the label")
    return str(draft.ask("label", "the column to predict", (usual or [list(rest)[-1]])[0], list(rest)))


def _target(draft: _Draft, name: str, cells: Sequence[str]) -> None:
    """Set how a label's cells are read: classes or numbers, and whether rows without a label are left out."""
    known = [plain(clean(cell)) for cell in cells if not is_missing(cell)]
    different = set(known)
    numbers = bool(known) and all(is_number(cell) or cell.lower().strip("+-") in ("inf", "infinity") for cell in known)
    if numbers and (len(different) > MANY or key_of(name) in QUANTITIES):
        draft.task = "regression"
        draft.options["regression"] = True
        draft.why.append(f"{name} has {len(different)} different numbers, so it is a quantity")
    else:
        draft.why.append(f"{name} has {len(different)} classes: {', '.join(sorted(different)[:6])}")
        _grades(draft, name, different)
    if lost := len(cells) - len(known):
        draft.options["missing_labels"] = "drop"
        draft.why.append(f"{lost} rows without {name} are left out")


def _grades(draft: _Draft, name: str, values: set[str]) -> None:
    """Propose ordered classes if the name is that of a grade and the values are three or more consecutive ones."""
    if len(values) < 3 or not GRADES.search(name):
        return
    if all(value.isdecimal() for value in values):
        numbers = sorted(map(int, values))
    elif values <= {*ROMAN}:
        numbers = sorted(ROMAN.index(value) for value in values)
    else:
        return
    if numbers != list(range(numbers[0], numbers[-1] + 1)) or numbers[0] > 1:
        return
    shown = sorted(values, key=int) if all(value.isdecimal() for value in values) else sorted(values)
    text = f"whether the values of {name}, {', '.join(shown)}, are grades in ascending order"
    draft.ordered = str(draft.ask("ordered", text, True, ("true", "false"))).lower() in ("true", "yes", "y")
    if draft.ordered:
        draft.why.append(
            f"{name} names a grade, and its values are consecutive: ordered = true counts the distance of grades"
        )


def _survival(draft: _Draft, columns: Mapping[str, Sequence[str]], apart: set[str]) -> bool:
    """Recognize a column of times with one of events; return whether there are both."""
    by_key = {key_of(name): name for name in columns if name not in apart}
    answers = {key: str(draft.answers[key]) for key in ("label", "event") if key in draft.answers}
    time = answers.get("label") or next((by_key[key] for key in TIMES if key in by_key), "")
    event = answers.get("event") or next((by_key[k] for k in EVENTS if k in by_key and by_key[k] != time), "")
    if not {time, event} <= columns.keys() or ("label" in answers and "event" not in answers):
        return False
    known = [cell for cell in columns[time] if not is_missing(cell)]
    values = {plain(clean(cell)) for cell in columns[event] if not is_missing(cell)}
    found = [v.casefold() for v in values]
    codes = next((i for i, yes in enumerate(HAPPENED) if {*found} <= yes | CENSORED[i] and {*found} & yes), None)
    if "event" not in answers and (codes is None or not known or not all(map(is_number, known))):
        return False
    draft.task = "survival"
    draft.options |= {"label": time, "event": event}
    if codes:
        draft.options["event_codes"] = sorted(v for v in values if v.casefold() in HAPPENED[codes])
        draft.options["censored_codes"] = sorted(v for v in values if v.casefold() in CENSORED[codes])
        listed = " and ".join(f"{key} = {draft.options[key]}" for key in ("event_codes", "censored_codes"))
        draft.why.append(f"the values of {event} are read as {listed}")
    draft.why.append(f'"{time}" is the time to an event, and "{event}" whether it happened')
    pairs = zip(columns[time], columns[event], strict=True)
    if lost := sum(is_missing(t) or is_missing(e) for t, e in pairs):
        draft.options["missing_labels"] = "drop"
        draft.why.append(f"{lost} rows without {time} or {event} are left out")
    return True


def _roles(draft: _Draft, columns: Mapping[str, Sequence[str]], apart: set[str], roles: Sequence[str]) -> set[str]:
    """Set the columns of roles by their usual names; return them."""
    found = set[str]()
    for role in roles:
        rest = {name: cells for name, cells in columns.items() if name not in apart | found}
        column = column_of(rest, role, str(draft.answers.get(role, "")), [])  # type: ignore[arg-type]
        if column:
            draft.options[role] = column
            draft.why.append(f'the {role} is the column "{column}"')
            found.add(column)
    return found


def _bids(draft: _Draft, root: Path, limits: Limits) -> None:
    bids = read_bids(root, limits)
    suffixes = Counter(image.suffix for image in bids.images)
    if not suffixes:
        raise DataError(f"{root.name} has no images named as BIDS requires")
    suffix = draft.answers.get("suffix") or ["T1w" if "T1w" in suffixes else suffixes.most_common(1)[0][0]]
    draft.options |= {"kind": "bids", "suffix": list(suffix)}
    draft.why.append(f"BIDS, with {', '.join(f'{n} {s}' for s, n in suffixes.most_common())}")
    site = _roles(draft, bids.table, set(), ("site",))
    chosen = [image for image in bids.images if image.suffix == suffix[0]]
    columns = {name: [bids.row_of(image).get(name, "") for image in chosen] for name in bids.columns}
    usual = usual_columns({n: c for n, c in columns.items() if n not in site}, "label")
    if "label" not in draft.answers and not usual and all(bids.mask_of(image) for image in chosen):
        draft.task = "segmentation"
        draft.why.append("every image has a mask")
        return
    label = _label(draft, columns, site)
    draft.options["label"] = label
    _target(draft, label, columns.get(label, []))


def _manifest(draft: _Draft, layout: Layout, limits: Limits) -> None:
    columns, table = _columns(draft, layout, limits), Path(draft.options["path"])
    draft.options["kind"] = "manifest"
    usual_images = usual_columns(columns, "image")
    if usual_images:
        pattern, root = _located(table, columns, usual_images[0])
    else:
        pattern = draft.ask("images", "which images", layout.images[0], layout.images) if layout.images[1:] else ""
        pattern, root = pattern or layout.images[0], ""
    draft.options["images"] = [pattern]
    if root:
        draft.options["root"] = root
    draft.why.append(f"{table.name} lists images: {pattern}")
    path = pattern if "{" in pattern else f"{{{pattern}}}"
    fields = {*re.findall(r"\{([^{}]+)\}", path)}
    used = fields & {*usual_images} | _roles(draft, columns, fields & {*usual_images}, ("patient", "site", "split"))
    if "patient" not in draft.options:
        _person(draft, "patient_pattern", [filled(path, columns, row) for row in range(len(columns[min(fields)]))])
    used |= fields
    draft.official = "test" in {SPLITS.get(v.lower()) for v in columns.get(str(draft.options.get("split")), ())}
    mask = column_of(columns, "mask", "", [])
    flags = [
        name
        for name, cells in columns.items()
        if name not in used
        and key_of(name) not in USUAL["split"]
        and {plain(c) for c in cells if c} <= {"0", "1", "-1"}
        and any(cells)
    ]
    usual = usual_columns({n: c for n, c in columns.items() if n not in used | {mask}}, "label")
    if mask and not usual and "label" not in draft.answers:
        draft.task = "segmentation"
        draft.options["mask"] = mask
        draft.why.append(f'the masks are in the column "{mask}"')
    elif not usual and _survival(draft, columns, used):
        pass
    elif not usual and len(flags) > 1 and "label" not in draft.answers:
        _several(draft, columns, flags)
    else:
        label = _label(draft, columns, used | {mask})
        draft.options["label"] = label
        if any("|" in cell for cell in columns.get(label, ())):
            draft.task = "multilabel"
            draft.options["separator"] = "|"
            words = {part.strip() for cell in columns[label] for part in cell.split("|")}
            nothing = next((w for w in words if key_of(w) in ("nofinding", "none", "normal", "nothing")), "")
            draft.options |= {"nothing": nothing} if nothing else {}
            draft.why.append(f"{label} names several of {len(words)} labels")
        else:
            _target(draft, label, columns.get(label, []))


def _several(draft: _Draft, columns: Mapping[str, Sequence[str]], flags: list[str]) -> None:
    """Set several columns of 0 and 1 as labels; what is blank or -1 is asked for."""
    draft.task = "multilabel"
    draft.options["label"] = flags
    draft.why.append(f"{len(flags)} columns of 0 and 1 are labels: {', '.join(flags[:5])}")
    if any(is_missing(cell) for name in flags for cell in columns[name]):
        draft.options["blank"] = draft.ask("blank", "what an empty label means: 0 (absent) or 1", 0)
    if any(is_number(cell) and float(cell) == -1 for name in flags for cell in columns[name]):
        draft.options["uncertain"] = draft.ask("uncertain", "what a label of -1 (uncertain) means: 0 or 1", 0)


def _located(table: Path, columns: Mapping[str, Sequence[str]], image: str) -> tuple[str, str]:
    """Return an image's path in terms of columns, and the folder to which paths are relative, if not the table's."""
    names = [name for name in columns[image] if name][:200]
    for root in (table.parent, *sorted(p for p in table.parent.iterdir() if p.is_dir()), table.parent.parent):
        if names and all((root / name).exists() for name in names):
            return image, "" if root == table.parent else str(root)
    where: dict[str, list[str]] = defaultdict(list)
    for path in _paths(table.parent):
        where[Path(path).name].append(path)
        where[stem_of(Path(path))].append(path)
    templates = Counter(
        found[0].replace(name, f"{{{image}}}") for name in names if len(found := where.get(Path(name).name, [])) == 1
    )
    if templates and templates.most_common(1)[0][1] == len(names):
        return templates.most_common(1)[0][0], ""
    patterns = by_column(columns, [path for path in _paths(table.parent) if not is_mask(path)], image)
    return patterns[0] if patterns else image, ""


def _table(draft: _Draft, layout: Layout, limits: Limits) -> None:
    columns = _columns(draft, layout, limits)
    draft.options["kind"] = "table"
    count = len(next(iter(columns.values())))
    draft.why.append(f"{Path(draft.options['path']).name} is a table of {count} rows without images")
    used = _roles(draft, columns, {str(draft.answers.get("label", ""))}, ("patient", "site"))
    apart = used | {*usual_columns(columns, "split")}
    named = usual_columns({name: cells for name, cells in columns.items() if name not in apart}, "label")
    survival = ("event" in draft.answers or not named) and _survival(draft, columns, apart)
    label = str(draft.options["label"]) if survival else _label(draft, columns, apart)
    used |= identifying(columns) | {str(draft.options.get("event", ""))}
    codes, words, texts = set[str](), list[str](), list[str]()
    people = columns.get(str(draft.options.get("patient")), ())
    for name, cells in columns.items():
        if name in used | {label}:
            continue
        known = [plain(clean(cell)) for cell in cells if not is_missing(cell)]
        if _IDENTIFIER.search(name) and people and len({*zip(people, cells, strict=True)}) == len({*people}):
            texts.append(name)  # another number of the patient
        elif not all(map(is_number, known)):
            (words if len(set(known)) <= MANY else texts).append(name)
        elif (coded := {*known} & {*_CODES}) and all(float(v) >= 0 for v in known if v not in coded):
            codes |= coded
    draft.options["label"] = label
    if codes:
        draft.options["missing"] = sorted(codes)
        draft.why.append(f"{' and '.join(sorted(codes))} mean missing: no other value is negative")
    if words:
        draft.options["categories"] = words
        draft.why.append(f"words, not quantities: {', '.join(words[:8])}")
    if texts:
        draft.options["leave_out"] = texts
        draft.why.append(f"not used, because they are texts or identify patients: {', '.join(texts[:8])}")
    if not survival:
        _target(draft, label, [c for c in columns.get(label, []) if plain(c) not in codes])


def _columns(draft: _Draft, layout: Layout, limits: Limits) -> dict[str, Sequence[str]]:
    """Return the columns of the layout's table, and set its path and sheet."""
    assert layout.table is not None
    draft.options["path"] = str(layout.table)
    if layout.sheet:
        names = sheets_of(layout.table, limits)
        draft.options["sheet"] = draft.ask("sheet", f"which of the {len(names)} sheets", layout.sheet, names)
    if layout.others:
        named = ", ".join(path.name for path in layout.others[:5])
        draft.why.append(f"other tables are not used: {named}; give the path of one to use it")
    return read_columns(layout.table, limits, str(draft.options.get("sheet", "")))


def _npz(draft: _Draft, layout: Layout, limits: Limits) -> None:
    archives = [item.paths[0] for item in layout.items]
    chosen = archives[0]
    if len(archives) > 1:
        names = [path.name for path in archives]
        name = draft.ask("archive", f"which of the {len(archives)} archives", names[0], names)
        chosen = next((path for path in archives if path.name == name), chosen)
    draft.options |= {"path": str(chosen), "kind": "npz"}
    arrays = read_npz(chosen, limits)
    if found := [split for split in NPZ_SPLITS if f"{split}_images" in arrays]:
        target = arrays.get(f"{found[0]}_labels")
        draft.official = "test" in found
        draft.why.append(f"{chosen.name} is laid out as MedMNIST: {', '.join(f'{s}_images' for s in found)}")
    else:
        names = [name for name in ("labels", "masks", "label", "targets", "y") if name in arrays]
        if "images" not in arrays or not names:
            raise DataError(f"{chosen.name} holds {', '.join(arrays)}: it needs images, and labels or masks")
        draft.options |= {"target": names[0]} if names[0] not in ("labels", "masks") else {}
        target = arrays[names[0]]
        draft.why.append(f"{chosen.name} holds images and {names[0]}")
    if target is not None:
        several = target.ndim == 2 and target.shape[1] > 1
        draft.task = "segmentation" if target.ndim > 2 else "multilabel" if several else "classification"
        different = len(set(target.reshape(-1)[:10_000].tolist())) if target.ndim < 3 else 0
        if target.dtype.kind == "f" and draft.task == "classification" and different > MANY:
            draft.task, draft.options["regression"] = "regression", True


def _dicom(draft: _Draft, root: Path, limits: Limits) -> None:
    folder = root if root.is_dir() else root.parent
    tables = [path for path in sorted(folder.iterdir()) if path.name.lower().endswith(TABLES)]
    given = draft.answers.get("labels") or (str(tables[0]) if tables else "")
    draft.options["kind"] = "dicom"
    if not draft.answers.get("label") and _segments(draft, root, given, limits):
        return
    if not given:
        raise DataError(
            f"{root.name} is a tree of DICOM files without masks: a study needs a table with one row per patient "
            "(PatientID and a label); name it with --labels TABLE"
        )
    names = sheets_of(Path(given), limits) if str(given).lower().endswith(EXCEL) else []
    if len(names) > 1:
        draft.options["sheet"] = draft.ask("sheet", f"which of the {len(names)} sheets", names[0], names)
    columns = read_columns(Path(given), limits, str(draft.options.get("sheet", "")))
    draft.options["labels"] = str(given)
    draft.why.append(f"DICOM files, with labels by patient in {Path(given).name}")
    used = _roles(draft, columns, set(), ("patient", "site"))
    label = _label(draft, columns, used)
    draft.options["label"] = label
    _target(draft, label, columns.get(label, []))


def _segments(draft: _Draft, root: Path, table: str, limits: Limits) -> bool:
    """Recognize segmentations (SEG) and structure sets (RTSTRUCT) as the masks of the series that they refer to.

    Returns whether there are any. Segments that most of the files have are proposed, in the order of their numbers.
    """
    found: dict[str, list[int]] = defaultdict(list)
    spelled: dict[str, str] = {}
    masks = 0
    for path in dicom_files(root) if root.is_dir() else []:
        try:
            if not referenced_series(path, open_dicom(path, pixels=False, limits=limits)):
                continue
            names = segments_of(path, limits)
        except Unreadable:  # the source reports it
            continue
        masks += 1
        for number, name in names.items():
            found[name.casefold()].append(number)
            spelled.setdefault(name.casefold(), name)
    if not masks:
        return False
    often = [key for key, numbers in found.items() if len(numbers) > masks / 2] or [
        max(found, key=lambda k: len(found[k]))
    ]
    order = sorted(often, key=lambda key: (sorted(found[key])[len(found[key]) // 2], key))
    chosen = [re.sub(r"([*?\[])", r"[\1]", spelled[key]) for key in order]
    draft.task = "segmentation"
    draft.why.append(f"{masks} segmentations or structure sets are the masks of the series that they refer to")
    text = "the segments that become labels 1, 2, ...; where they overlap, later ones are painted over earlier ones"
    draft.options["segments"] = list(draft.ask("segments", text, chosen, list(spelled.values())))
    if table:
        draft.options["labels"] = table
        draft.why.append(f"{Path(table).name} states which patients are read; --label COLUMN predicts a column instead")
    return True

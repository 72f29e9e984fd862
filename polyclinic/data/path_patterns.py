"""Images whose paths contain all metadata: ``{site}/Case{patient}.nii.gz`` with
``{site}/Case{patient}_mask.nii.gz``.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from polyclinic.data.collection import UNKNOWN_PATIENTS, Collection, Entry, FromFiles, described
from polyclinic.data.examples import DataError
from polyclinic.data.files import opened
from polyclinic.data.labels import MissingLabels, Reading
from polyclinic.data.preprocessing.pipeline_config import Steps
from polyclinic.data.source import HIDDEN, Info

_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Patterns(FromFiles):
    """Images found by a pattern of their paths. A word in braces matches any text without a slash.

    Attributes:
        path: The folder, or a ``.zip`` file of it.
        images: The pattern of an image's path below ``path``; one per channel. All must use the same words.
        mask: The pattern of its mask's path, with the same words; "" if the path's ``{class}`` is the target.
        classes: The classes in order; if empty, the sorted values (for masks: the names of 0, 1, ...).
        missing_labels: ``"refuse"`` raises an error for images without a mask; ``"drop"`` leaves them out with a note.
        steps: Preprocessing.
        unreadable: ``"refuse"`` raises an error for damaged files; ``"skip"`` leaves them out and lists them.
        about: Description from the catalog; not settable in a study file.

    ``{patient}`` identifies the patient (the same name at two sites is two people), ``{site}`` the site, ``{split}``
    the official split; any other word becomes a column.
    """

    path: str
    images: tuple[str, ...]
    mask: str = ""
    classes: tuple[str, ...] = ()
    missing_labels: MissingLabels = "refuse"
    steps: Steps = ()
    unreadable: Literal["refuse", "skip"] = "refuse"
    about: Info | None = field(default=None, metadata=HIDDEN)

    def __post_init__(self) -> None:
        super().__post_init__()
        words = set(_FIELD.findall(self.images[0])) if self.images else set()
        problems = [] if self.images else ["images = []: give at least one pattern"]
        for key, pattern in [*(("images", p) for p in self.images[1:]), *([("mask", self.mask)] if self.mask else [])]:
            if strange := set(_FIELD.findall(pattern)) - words:
                problems.append(f"{key} = {pattern}: {{{sorted(strange)[0]}}} is not in the first pattern of images")
        if self.images and not self.mask and "class" not in words:
            problems.append(f"images = {self.images[0]}: without a mask, the path must contain {{class}}")
        if problems:
            raise DataError(problems)

    def collect(self) -> Collection:
        """Collect every file that matches the first pattern."""
        root = opened(self.path)
        fits = _regex(self.images[0])
        names = sorted(f.relative_to(root).as_posix() for f in root.rglob("*") if not f.name.startswith("."))
        fitting = {name: match.groupdict() for name in names if (match := fits.fullmatch(name))}
        others = {_filled(p, words) for words in fitting.values() for p in (*self.images[1:], self.mask) if p}
        cases = [words for name, words in fitting.items() if name not in others]  # a mask may look like an image
        if not cases:
            raise DataError(f"{root}: there is no file like {self.images[0]}")
        found = len(cases)
        if self.mask and self.missing_labels == "drop":
            cases = [words for words in cases if (root / _filled(self.mask, words)).exists()]
        if not cases:
            raise DataError(f"{root}: there is no mask like {self.mask}")
        lost = found - len(cases)
        classes, problems, entries = self.classes, list[str](), []
        targets: list[int] | list[tuple[float, ...]] | list[None] = [None] * len(cases)
        if not self.mask:
            named = [_filled(self.images[0], words) for words in cases]
            labels = {"class": [words["class"] for words in cases]}
            targets, classes = Reading(self.classes).read(labels, "classification", problems, named)
        for words, label in zip(cases, targets, strict=True):
            files = [root / _filled(p, words) for p in (*self.images, self.mask) if p]
            problems += [f"{f.relative_to(root)} does not exist" for f in files if not f.exists()]
            name = files[0].relative_to(root).as_posix()
            columns = {k: v for k, v in words.items() if k not in ("patient", "class")}
            mask = files[-1] if self.mask else None
            patient = "/".join(words[k] for k in ("site", "patient") if k in words) if "patient" in words else name
            entries.append(Entry(name, tuple(files[: len(self.images)]), patient, label, mask, columns))
        if problems:
            raise DataError([f"{root}: {problem}" for problem in dict.fromkeys(problems[:20])])
        name = Path(self.path).stem
        task: Literal["segmentation", "classification"] = "segmentation" if self.mask else "classification"
        notes = [] if "patient" in cases[0] else [UNKNOWN_PATIENTS]
        notes += [f"{lost} images without a mask are left out."] * bool(lost)
        info = described(self.about, Info(name, name, "not stated", "not stated", task, classes), notes)
        sites = ("site",) if "site" in cases[0] else ()
        return self.made(info, tuple(entries), sites)


def _filled(pattern: str, words: dict[str, str]) -> str:
    return _FIELD.sub(lambda m: words[m.group(1)], pattern)


def _regex(pattern: str) -> re.Pattern[str]:
    """Return a pattern of paths as a regular expression; a repeated word must match the same text."""
    seen: set[str] = set()
    out, last = "", 0
    for match in _FIELD.finditer(pattern):
        word = match.group(1)
        out += re.escape(pattern[last : match.start()])
        out += f"(?P={word})" if word in seen else f"(?P<{word}>[^/]+?)"
        seen.add(word)
        last = match.end()
    return re.compile(out + re.escape(pattern[last:]))

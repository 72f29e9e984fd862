"""Folders of images whose names are metadata: ``benign/``, ``malignant/``; or ``site-a/train/benign/``."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from polyclinic.data.collection import UNKNOWN_PATIENTS, Collection, Entry, FromFiles, described
from polyclinic.data.examples import DataError
from polyclinic.data.files import check_pattern, is_image, opened, patients_in
from polyclinic.data.labels import Reading
from polyclinic.data.preprocessing.pipeline_config import Steps
from polyclinic.data.source import HIDDEN, Info


@dataclass(frozen=True)
class Folders(FromFiles):
    r"""Images in folders by class.

    Attributes:
        path: The folder, or a ``.zip`` file of it.
        levels: Meaning of each level of folders, from the top: ``"class"`` and any of ``"site"``, ``"split"``,
            ``"patient"`` or a word of your own, which becomes a column. The same patient's name at two sites
            is two people.
        patient: A regular expression with one group that matches the patient in an image's path, such as
            ``"case(\d+)_"``; "" if the name does not identify patients.
        classes: The classes in order; if empty, the sorted values.
        steps: Preprocessing.
        unreadable: ``"refuse"`` raises an error for damaged files; ``"skip"`` leaves them out and lists them.
        about: Description from the catalog; not settable in a study file.
    """

    path: str
    levels: tuple[str, ...] = ("class",)
    patient: str = ""
    classes: tuple[str, ...] = ()
    steps: Steps = ()
    unreadable: Literal["refuse", "skip"] = "refuse"
    about: Info | None = field(default=None, metadata=HIDDEN)

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = check_pattern("patient", self.patient)
        if self.levels.count("class") != 1 or len(set(self.levels)) != len(self.levels):
            problems.append(f'levels = {list(self.levels)}: name "class" once, and no level twice')
        if problems:
            raise DataError(problems)

    def collect(self) -> Collection:
        """Collect every image at the depth that ``levels`` specifies."""
        root = opened(self.path)
        found: list[tuple[Path, dict[str, str]]] = []
        astray = []
        for file in sorted(root.rglob("*")):
            parts = file.relative_to(root).parts
            if not file.is_file() or not is_image(file) or any(part.startswith((".", "__MACOSX")) for part in parts):
                continue
            if len(parts) - 1 == len(self.levels):
                found.append((file, dict(zip(self.levels, parts, strict=False))))
            else:
                astray.append("/".join(parts))
        if not found:
            deep = " / ".join(f"<{level}>" for level in self.levels)
            raise DataError(f"{root}: there are no images at {deep} / image; set levels to the meaning of your folders")
        ids = [file.relative_to(root).as_posix() for file, _ in found]
        patients = patients_in(ids, self.patient)
        if "patient" in self.levels and not self.patient:
            named = [level for level in ("site", "patient") if level in self.levels]
            patients = tuple("/".join(names[part] for part in named) for _, names in found)
        labels, problems = {"class": [names["class"] for _, names in found]}, list[str]()
        targets: list[int] | list[tuple[float, ...]]
        targets, classes = Reading(self.classes).read(labels, "classification", problems, ids)
        if problems:
            raise DataError([f"{root}: {problem}" for problem in problems])
        numbers: Sequence[int | tuple[float, ...]] = targets
        entries = tuple(
            Entry(
                name,
                (file,),
                patient,
                target,
                columns={k: v for k, v in names.items() if k not in ("class", "patient")},
            )
            for name, patient, target, (file, names) in zip(ids, patients, numbers, found, strict=True)
        )
        notes = [] if self.patient or "patient" in self.levels else [UNKNOWN_PATIENTS]
        if astray:
            notes.append(
                f"{len(astray)} images are at another depth than levels specifies and are left out ({astray[0]})."
            )
        name = root.name if Path(self.path).suffix != ".zip" else Path(self.path).stem
        info = described(self.about, Info(name, name, "not stated", "not stated", "classification", classes), notes)
        return self.made(info, entries, ("site",) if "site" in self.levels else ())

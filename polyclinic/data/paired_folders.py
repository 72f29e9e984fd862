"""Images and their masks in two folders: nnU-Net's ``imagesTr`` and ``labelsTr``, or any two with equal file names.

nnU-Net's layout: https://github.com/MIC-DKFZ/nnUNet/blob/master/documentation/dataset_format.md. An image of several
channels is several files, ``CASE_0000.nii.gz``, ``CASE_0001.nii.gz``; ``dataset.json`` names channels and labels.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from polyclinic.data.collection import UNKNOWN_PATIENTS, Collection, Entry, FromFiles, described
from polyclinic.data.examples import DataError
from polyclinic.data.files import check_pattern, is_image, opened, patients_in, stem_of
from polyclinic.data.formats.safe_reading import Unreadable, read_text
from polyclinic.data.preprocessing.pipeline_config import Steps
from polyclinic.data.source import HIDDEN, Info

FOLDERS = (("imagesTr", "labelsTr"), ("images", "labels"), ("images", "masks"))


@dataclass(frozen=True)
class Pairs(FromFiles):
    r"""Segmentation data in two folders.

    Attributes:
        path: The folder that contains both, or a ``.zip`` file of it.
        images: The folder of images; detected if named as in nnU-Net, or ``images`` next to ``labels`` or ``masks``.
        masks: The folder of masks.
        patient: A regular expression with one group that matches the patient in a name, such as ``"(\d+)_visit"``.
        site: The same for the site.
        classes: The names of 0, 1, ...; read from ``dataset.json`` if it exists.
        steps: Preprocessing.
        unreadable: ``"refuse"`` raises an error for damaged files; ``"skip"`` leaves them out and lists them.
        about: Description from the catalog; not settable in a study file.
    """

    path: str
    images: str = ""
    masks: str = ""
    patient: str = ""
    site: str = ""
    classes: tuple[str, ...] = ()
    steps: Steps = ()
    unreadable: Literal["refuse", "skip"] = "refuse"
    about: Info | None = field(default=None, metadata=HIDDEN)

    def __post_init__(self) -> None:
        super().__post_init__()
        if problems := [*check_pattern("patient", self.patient), *check_pattern("site", self.site)]:
            raise DataError(problems)

    def collect(self) -> Collection:
        """Collect every image with its mask."""
        root = opened(self.path)
        named = (self.images, self.masks) if self.images and self.masks else None
        present = [pair for pair in ([named] if named else FOLDERS) if all((root / part).is_dir() for part in pair)]
        if not present:
            wanted = named or FOLDERS[0]
            raise DataError(
                f"{root}: there are no folders {wanted[0]} and {wanted[1]}; name yours with images = ... "
                "and masks = ..."
            )
        images, masks = cases_in(root / present[0][0], channels=True), cases_in(root / present[0][1], channels=False)
        problems = [f"{present[0][0]}: {case} has no mask in {present[0][1]}" for case in images if case not in masks]
        problems += [f"{present[0][1]}: {case} has no image in {present[0][0]}" for case in masks if case not in images]
        counts = {len(files) for files in images.values()}
        if len(counts) > 1:
            problems.append(
                f"{present[0][0]}: cases have {' or '.join(map(str, sorted(counts)))} channels, not the same number"
            )
        if problems or not images:
            raise DataError(problems[:20] or [f"{root / present[0][0]}: there are no readable images"])
        cases = sorted(images)
        patients = patients_in(cases, self.patient)
        sites = patients_in(cases, self.site) if self.site else ()
        entries = tuple(
            Entry(case, images[case], patient, None, masks[case][0], {"site": sites[i]} if sites else {})
            for i, (case, patient) in enumerate(zip(cases, patients, strict=True))
        )
        name = Path(self.path).stem
        names, ignore = _labels(root)
        classes = tuple(names.get(i, f"label {i}") for i in range(max(names, default=-1) + 1))
        modality = ", ".join(_channels(root)) or "not stated"
        found = Info(name, name, modality, "not stated", "segmentation", self.classes or classes)
        info = described(self.about, found, () if self.patient else (UNKNOWN_PATIENTS,))
        labels = tuple(sorted({0, *names})) if names and not self.classes else None
        return self.made(info, entries, ("site",) if sites else (), ignore, labels)


def cases_in(folder: Path, channels: bool) -> Mapping[str, tuple[Path, ...]]:
    """Return each case's files, in the order of their channels."""
    cases: dict[str, list[Path]] = {}
    files = [file for file in sorted(folder.iterdir()) if is_image(file) and not file.name.startswith(".")]
    numbered = channels and bool(files) and all(re.search(r"_\d{4}$", stem_of(file)) for file in files)
    for file in files:
        stem = stem_of(file)
        cases.setdefault(stem[:-5] if numbered else stem, []).append(file)
    return {case: tuple(paths) for case, paths in cases.items()}


def _described(root: Path) -> dict[str, Any]:
    """Return the contents of ``dataset.json``; nothing if the file does not exist."""
    file = root / "dataset.json"
    if not file.is_file():
        return {}
    try:
        found = json.loads(read_text(file))
        if isinstance(found, dict) and isinstance(found.get("labels", {}), dict):
            return found
    except (Unreadable, ValueError):
        pass
    raise DataError(f"{file}: is not nnU-Net's dataset.json; correct it or remove it")


def _channels(root: Path) -> list[str]:
    """Return the names of the channels in ``dataset.json``: ``channel_names``, formerly ``modality``."""
    table = _described(root)
    names = table.get("channel_names", table.get("modality"))
    if not isinstance(names, dict) or not all(str(number).isdigit() for number in names):
        return []
    return [str(names[number]).replace(",", " ") for number in sorted(names, key=int)]


def _labels(root: Path) -> tuple[dict[int, str], int | None]:
    """Return the names of the labels in ``dataset.json`` by number, and the number of its label "ignore".

    There are no names if the file does not exist.
    """
    try:
        numbers = label_names(_described(root).get("labels", {}))
    except (ValueError, AttributeError, TypeError):
        file = root / "dataset.json"
        raise DataError(f"{file}: is not nnU-Net's dataset.json; correct it or remove it") from None
    ignore = next((number for number, name in numbers.items() if name == "ignore"), None)
    return {number: name for number, name in numbers.items() if number != ignore}, ignore


def label_names(given: Mapping[str, Any]) -> dict[int, str]:
    """Return the names of nnU-Net's labels by number, in either format: ``{"liver": 1}``, or ``{"1": "liver"}``.

    A region of several numbers, ``{"tumor": [1, 2]}``, gives each number that has no name of its own the region's.
    """
    labels: dict[int, str] = {}
    for name, value in given.items():
        if str(name).isdigit():
            labels[int(name)] = str(value)
        elif not isinstance(value, list):
            labels[int(value)] = str(name)
    for name, value in given.items():
        for number in value if isinstance(value, list) else ():
            labels.setdefault(int(number), str(name))
    return labels

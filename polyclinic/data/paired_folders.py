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
        labels = _labels(root)
        names = labels.names
        classes = tuple(names.get(i, f"label {i}") for i in range(max(names, default=-1) + 1))
        modality = ", ".join(_channels(root)) or "not stated"
        found = Info(name, name, modality, "not stated", "segmentation", self.classes or classes)
        notes = [] if self.patient else [UNKNOWN_PATIENTS]
        if labels.regions:
            listed = "; ".join(f"{name} = {', '.join(map(str, region))}" for name, region in labels.regions.items())
            notes.append(
                f"dataset.json names regions of labels ({listed}): without regions in [task], the labels are learned "
                "as classes that exclude each other"
            )
        info = described(self.about, found, tuple(notes))
        allowed = tuple(sorted({0, *names})) if names and not self.classes else None
        return self.made(info, entries, ("site",) if sites else (), labels.ignore, allowed)

    def label_regions(self) -> tuple[tuple[int, ...], ...]:
        """Return the regions that ``dataset.json`` names, in its order; nothing if it names none."""
        return tuple(_labels(opened(self.path)).regions.values())


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


@dataclass(frozen=True)
class _Labels:
    """What ``dataset.json`` says of mask values; empty if the file does not exist.

    Attributes:
        names: By number, without "ignore".
        ignore: The number of the label "ignore".
        regions: Sets of labels that are learned as masks of their own, by name; empty if it names none.
    """

    names: dict[int, str]
    ignore: int | None
    regions: dict[str, tuple[int, ...]]


def _labels(root: Path) -> _Labels:
    """Return what ``dataset.json`` says of mask values."""
    given = _described(root).get("labels", {})
    try:
        numbers, regions = label_names(given), label_regions(given)
    except (ValueError, AttributeError, TypeError, OverflowError):
        file = root / "dataset.json"
        raise DataError(f"{file}: is not nnU-Net's dataset.json; correct it or remove it") from None
    ignore = next((number for number, name in numbers.items() if name == "ignore"), None)
    return _Labels({number: name for number, name in numbers.items() if number != ignore}, ignore, regions)


def label_names(given: Mapping[str, Any]) -> dict[int, str]:
    """Return the names of nnU-Net's labels by number, in either format: ``{"liver": 1}``, or ``{"1": "liver"}``.

    A number that has no name of its own gets that of the smallest region with it: ``{"tumor": [1, 2], "core": [2]}``
    names 1 "tumor" and 2 "core".
    """
    labels: dict[int, str] = {}
    regions: list[tuple[list[int], str]] = []
    for name, value in given.items():
        if str(name).isdigit():
            labels[int(name)] = str(value)
        elif isinstance(value, list):
            regions.append(([int(number) for number in value], str(name)))
        else:
            labels[int(value)] = str(name)
    for numbers, name in sorted(regions, key=lambda region: len(region[0])):
        for number in numbers:
            labels.setdefault(number, name)
    return labels


def label_regions(given: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return nnU-Net's regions by name, in their order; nothing if each name has one label.

    The labels without a list are regions of one label, except for the background and "ignore".
    """
    if not any(isinstance(value, list) and len(value) > 1 for value in given.values()):
        return {}
    found = {
        str(name): tuple(int(number) for number in (value if isinstance(value, list) else [value]))
        for name, value in given.items()
        if name != "ignore"
    }
    return {name: numbers for name, numbers in found.items() if numbers != (0,)}

"""A first study of one's own data: sites, split, steps, network and methods that suit what was recognized."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from polyclinic.core.toml_text import inline
from polyclinic.data.collection import Collection, FromFiles, usual_patch
from polyclinic.data.examples import DataError
from polyclinic.data.files import picture_of, read_case
from polyclinic.data.formats.mask_labels import WHITE, label_problems, labels_in
from polyclinic.data.formats.parsing import is_missing
from polyclinic.data.formats.safe_reading import Unreadable
from polyclinic.data.paired_folders import Pairs
from polyclinic.data.preprocessing.sample import Picture
from polyclinic.data.quality.loading import built
from polyclinic.data.quality.recognition import MANY, Question, Recognized
from polyclinic.data.source import Source, Table, slug
from polyclinic.data.splits import official
from polyclinic.errors import ConfigError
from polyclinic.learning.tasks.segmentation import own_labels

PATIENTS_PER_SITE = 10
SMALLEST = 16
"""The smallest side of volumes, which a network halves up to four times."""
SAMPLE = 200
INTERVALS, EVENTS_PER_INTERVAL = 10, 5
"""The most intervals of a first study of survival, and the events that each needs at least."""
MOST_PIXELS = 2**29
"""Pixels of all sampled images together, after which no more are read."""
RARE = 0.05
"""Share of masks that contain a label at least, to be declared as a class."""
LARGEST = {2: 256, 3: 96}
"""The largest side of images of a first study, in pixels, by dimension."""


@dataclass(frozen=True)
class NewStudy:
    """A study to be written.

    Attributes:
        text: The study file.
        why: What was recognized and decided, each a sentence.
        questions: What the data cannot say, with the defaults that were taken.
    """

    text: str
    why: tuple[str, ...]
    questions: tuple[Question, ...]


def new_study(recognized: Recognized, name: str, rounds: int = 20) -> NewStudy:
    """Return a study of recognized data.

    Args:
        recognized: The result of ``recognize``.
        name: The study's name.
        rounds: Number of rounds.

    Raises:
        DataError: If the data cannot be read with the recognized ``[data]`` table.
    """
    source = built(recognized)
    table = source.table()
    why = list(recognized.why)
    data: dict[str, Any] = {**recognized.options, **_sites(table, why)}
    data["split"] = _split(table, data, recognized.official, why)
    shape, options = _shape(source, why)
    data |= options
    task = _task(recognized.task, shape, table) | ({"ordered": True} if recognized.ordered else {})
    if isinstance(source, Pairs) and (regions := source.label_regions()):
        task |= _regions(regions, why)
    network = task["network"]
    training: dict[str, Any] = {"epochs": 1, "batch_size": 16, "optimizer": "sgd", "lr": 0.05}
    if network == "unet":
        training |= {"batch_size": 4, "optimizer": "adam", "lr": 0.003}
    head = [f"# Written by `polyclinic new --data {recognized.options['path']}`. Run it with `polyclinic run FILE`."]
    head += [f"# - {reason}" for reason in why]
    head += [f"# - assumed: {q.key} = {inline(q.default)} ({q.text})" for q in recognized.questions]
    lines = [*head, *_lines({"name": name, "title": f"A first study of {name}", "rounds": rounds, "seeds": [0]})]
    for section, values in (("data", data), ("task", task), ("training", training)):
        lines += ["", f"[{section}]", *_lines(values)]
    for method in ("local", "pooled", "fedavg"):
        lines += ["", "[[methods]]", f'name = "{method}"']
    text = "\n".join(line.replace("\n", " ").replace("\r", " ") for line in lines) + "\n"
    return NewStudy(text, tuple(why), recognized.questions)


def _lines(values: Mapping[str, Any]) -> list[str]:
    return [f"{key} = {inline(value)}" for key, value in values.items()]


def study_name(path: str) -> str:
    """Return a study's name from a path: small letters, digits and hyphens."""
    try:
        return slug(Path(path).resolve().name.partition(".")[0])
    except DataError:
        return "my-study"


def _sites(table: Table, why: list[str]) -> dict[str, Any]:
    """Return ``sites`` and ``min_patients``: the data's own sites, or simulated ones."""
    own = table.sites[0] if table.sites else ""
    patients: dict[str, set[str]] = defaultdict(set)
    for patient, value in zip(table.patients, table.columns.get(own, ()), strict=False):
        if not is_missing(value):
            patients[value].add(patient)
    if len(patients) > 1:
        sizes = sorted(len(found) for found in patients.values())
        fewest = PATIENTS_PER_SITE if sizes[-1] >= PATIENTS_PER_SITE else sizes[0]
        small = sum(size < fewest for size in sizes)
        left = f"; {small} have fewer than {fewest} patients and are left out" if small else ""
        why.append(f'{len(patients)} sites, from "{own}"{left}')
        return {"sites": "natural", "min_patients": fewest}
    count = len(set(table.patients))
    parts = max(1, min(4, count // PATIENTS_PER_SITE))
    many = f"{parts} sites are" if parts > 1 else "one site is"
    why.append(f"no column or folder names several hospitals, so {many} simulated; every result says so")
    return {
        "sites": {"partition": "iid", "count": parts},
        "min_patients": max(1, min(PATIENTS_PER_SITE, count // parts)),
    }


def _split(table: Table, data: Mapping[str, Any], known: bool, why: list[str]) -> Any:
    """Return ``"official"`` if the data's own split has training and test patients at every site, otherwise shares."""
    if known:
        try:
            roles = official(table)
        except DataError as refusal:
            why.append(f"the data's own split is not used: {refusal}")
            return [0.6, 0.15, 0.25]
        values = table.columns[table.sites[0]] if data["sites"] == "natural" else ("",) * len(table)
        present: dict[str, set[str]] = defaultdict(set)
        for patient, site in zip(table.patients, values, strict=True):
            present[site].add(roles[patient])
        if all({"train", "test"} <= found for found in present.values()):
            why.append("training, validation and test patients are those of the data's own split")
            return "official"
        why.append("the data's own split leaves sites without training or test patients: patients are split anew")
    return [0.6, 0.15, 0.25]


def _shape(source: Source, why: list[str]) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Return the shape of inputs (C, *spatial), () for tables, and the options that make all images alike."""
    if not isinstance(source, FromFiles):
        if not hasattr(source, "images"):
            return (), {}
        return source.examples(source.table().ids[:1]).shape, {}
    found = source.collection
    pictures, problems = _sample(found)
    if not pictures:
        raise DataError(problems)
    shapes = [tuple(picture.pixels.shape) for picture in pictures.values()]
    shape, options = _alike(shapes, why)
    masks = {name: labels_in(picture.mask) for name, picture in pictures.items() if picture.mask is not None}
    if masks and not found.info.classes and found.labels is None:
        options["steps"] = [*_labels(masks, why), *options.get("steps", [])]
    sizes = [picture.spacing_mm for picture in pictures.values() if picture.spacing_mm is not None]
    if len(shape) > 3 and sizes and (np.max(sizes, 0) > 1.2 * np.min(sizes, 0)).any():
        why.append("voxel sizes differ: `polyclinic plan` plans resampling to a common size")
    return shape, options


def _sample(found: Collection) -> tuple[dict[str, Picture], list[str]]:
    """Return some pictures at even distances in the collection, and why others cannot be read."""
    pictures: dict[str, Picture] = {}
    problems, count, last = [], min(SAMPLE, len(found.entries)), -1
    for i in np.linspace(0, len(found.entries) - 1, count).astype(int).tolist():
        entry = found.entries[i]
        if i == last or sum(picture.pixels.numel() for picture in pictures.values()) > MOST_PIXELS:
            continue
        last = i
        try:
            case = read_case(entry.images, entry.mask, found.options, slices=entry.slices, part=entry.part)
            pictures[entry.id] = picture_of(case)
        except Unreadable as refusal:
            problems.append(f"{entry.id}: {refusal}")
    return pictures, problems


def _labels(masks: Mapping[str, tuple[int, ...]], why: list[str]) -> list[dict[str, Any]]:
    """Return the step that declares the labels of masks, if their values alone do not say which are classes.

    A value in few masks may be a mistake: it is not declared, so that the study names it.
    """
    if not label_problems(masks):
        return []
    counts = Counter(label for labels in masks.values() for label in labels if label > 0)
    values = [0, *sorted(label for label, count in counts.items() if count >= max(2, RARE * len(masks)))]
    if WHITE in values or len(values) > MANY:
        return []
    listed = ", ".join(f"{label} in {counts[label]}" for label in values[1:])
    why.append(f"labels of {len(masks)} masks: {listed}; the step relabel declares them")
    return [{"step": "relabel", "values": values}]


def _alike(shapes: Sequence[tuple[int, ...]], why: list[str]) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Return the shape of inputs, and the options (``steps``, ``patch``) with which all images have it."""
    dimensions = max(len(shape) - 1 for shape in shapes)
    if any(len(shape) - 1 != dimensions for shape in shapes):
        raise DataError("some images are volumes and some are flat pictures: keep one kind in the folder")
    sizes = sorted({shape[1:] for shape in shapes})
    largest = max(max(size) for size in sizes)
    steps: list[dict[str, Any]] = [{"step": "zscore"}] if dimensions > 2 else []
    options: dict[str, Any] = {}
    size: list[int] = list(sizes[0])
    small = dimensions > 2 and min(min(one) for one in sizes) < SMALLEST
    if len(sizes) > 1 or small or largest > LARGEST.get(dimensions, 256):
        count = f"images have {len(sizes)} sizes" if len(sizes) > 1 else "images have one size"
        if dimensions == 2:
            side = min(LARGEST[2], max(32, 2 ** int(np.log2(min(min(one) for one in sizes)))))
            steps.append({"step": "resize", "size": side})
            size = [side] * len(size)
            why.append(f"{count}, up to {largest} pixels a side: the step resize is set")
        else:
            options["patch"] = size = [min(LARGEST[3], max(SMALLEST, side)) for side in usual_patch(shapes)]
            why.append(f"{count}, up to {largest} voxels a side: the network sees patches of {size}")
    channels = {shape[0] for shape in shapes}
    if len(channels) > 1:
        steps.append({"step": "channels"})
        why.append("some images are gray and some have colors: the step channels makes them alike")
    return (max(channels), *size), options | ({"steps": steps} if steps else {})


def _task(kind: str, shape: tuple[int, ...], table: Table) -> dict[str, Any]:
    task: dict[str, Any] = {"kind": kind}
    if kind == "segmentation":
        deepest = {} if max(shape[1:]) >= 2 * SMALLEST else {"norm": "group"}  # one voxel has no instance statistics
        task |= {"network": "unet", "options": {"width": 8, **deepest}}
    elif not shape:
        task |= {"network": "mlp"}
    else:
        task |= {"network": "cnn"}
    if kind == "regression" and table.labels is not None:
        numbers = np.asarray(table.labels, dtype=np.float64)
        spread = float(numbers.std())
        task |= {"center": round(float(numbers.mean()), 3), "spread": round(spread, 3) if spread > 0.001 else 1.0}
    if kind == "survival" and table.labels is not None:
        task["cuts"] = _cuts(np.asarray(table.labels, dtype=np.float64))
    return task


def _regions(regions: tuple[tuple[int, ...], ...], why: list[str]) -> dict[str, Any]:
    """Return ``regions`` of ``[task]`` as nnU-Net's dataset.json names them, if masks can be painted from them."""
    try:
        own_labels(regions)
    except ConfigError as refusal:
        why.append(f"the regions of dataset.json are not used: {refusal}")
        return {}
    why.append("dataset.json names regions of labels, which are learned as overlapping masks")
    return {"regions": [list(region) for region in regions]}


def _cuts(targets: "np.ndarray[Any, Any]") -> list[float]:
    """Return the ends of intervals with about equal numbers of events, up to a time that a tenth of patients reach.

    Args:
        targets: [n, 2], time and event.

    Raises:
        DataError: If there are too few events.
    """
    horizon = float(np.quantile(targets[:, 0], 0.9))
    events = targets[(targets[:, 1] > 0) & (targets[:, 0] <= horizon), 0]
    count = min(INTERVALS, len(events) // EVENTS_PER_INTERVAL)
    values = [*np.quantile(events, np.arange(1, count) / count), horizon] if count > 1 else []
    cuts = list(dict.fromkeys(float(f"{value:.3g}") for value in values))
    if len(cuts) < 2:
        raise DataError(
            f"{len(events)} events are too few for a study of survival; at least {2 * EVENTS_PER_INTERVAL} are needed"
        )
    return cuts


def questions_text(questions: Sequence[Question]) -> list[str]:
    """Return one line for each question, with the option that answers it."""
    return [f"{_flag(q)}: {q.text}; {', '.join(q.choices[:12]) or 'default'} [{inline(q.default)}]" for q in questions]


def _flag(question: Question) -> str:
    """Return the option of the command line that answers a question."""
    table = isinstance(question.default, dict)
    return f"--set data.{question.key}=..." if table else f"--{question.key.replace('_', '-')}"

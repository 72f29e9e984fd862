"""A picture of a study's training samples: some images as they are stored, next to samples that training would draw."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from polyclinic.core.site import Site
from polyclinic.data.federation import Federated, federate
from polyclinic.errors import ConfigError
from polyclinic.learning.training.minibatches import Sampler
from polyclinic.studies.config.method_plan import plan_of
from polyclinic.studies.config.study_config import Study

CELL, GAP, LINE = 176, 6, 18
COLORS = ((230, 80, 60), (80, 160, 240), (250, 200, 60), (120, 210, 110), (210, 120, 230), (240, 140, 60))
"""Outlines of the labels 1, 2, ...; repeated from the seventh on."""
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class SampleRow:
    """One training example: its caption, the stored view (x [C, *spatial], y), and samples of it."""

    caption: str
    stored: tuple[Tensor, Tensor]
    samples: tuple[tuple[Tensor, Tensor], ...]


def sample_rows(
    study: Study, label: str = "", seed: int | None = None, images: int = 4, samples: int = 6
) -> tuple[list[SampleRow], list[str]]:
    """Return rows of samples of a study's training data, and notes on what they show.

    Args:
        study: The study.
        label: The method whose settings are used; the first by default.
        seed: The seed of the split and the samples; the study's first by default.
        images: The number of examples, taken from the sites in turn.
        samples: The number of samples of each.

    Returns:
        ``(rows, notes)``.

    Raises:
        ConfigError: If there is no such method, or the data are not images.
        DataError: If the data cannot be read.
    """
    methods = {method.called: method for method in study.methods}
    if label and label not in methods:
        raise ConfigError(f"--method {label}: the study has no such method; there are {', '.join(methods)}")
    chosen = study.seeds[0] if seed is None else seed
    data = federate(study.data, chosen)
    if len(data.shape) not in (3, 4):
        raise ConfigError(f"{data.info.title} has no images to look at: its examples have the shape {data.shape}")
    local = plan_of(study, methods[label] if label else study.methods[0], data, chosen).build_local()
    rows = []
    for site, examples, i in _chosen(data, images):
        sampler = Sampler(examples, local.augmentation, local.foreground)
        seeds = torch.randint(2**62, (samples,), generator=Site(site, seed=chosen).rng("look", i)).tolist()
        x, y = examples[torch.tensor([i])]
        rows.append(SampleRow(_caption(data, site, i), (x[0], y[0]), tuple(sampler(i, one) for one in seeds)))
    notes = [] if local.augmentation else ["no augmentation is set: samples differ only where patches are random"]
    return rows, notes


def picture(rows: Sequence[SampleRow]) -> bytes:
    """Return the rows as a PNG: the stored view on the left, samples on the right, with outlines of masks.

    Volumes are shown by the slice of the first axis with the most foreground, the middle one without any. All pictures
    of a row have the brightness window of the stored view, so that changes of intensity are visible.
    """
    from PIL import Image, ImageDraw

    wide, high = 1 + max(len(row.samples) for row in rows), len(rows)
    canvas = Image.new("RGB", (wide * (CELL + GAP) + GAP, high * (CELL + GAP + LINE) + GAP + LINE), (20, 24, 28))
    draw = ImageDraw.Draw(canvas)
    for column in range(wide):
        title = "stored" if column == 0 else f"sample {column}"
        draw.text((GAP + column * (CELL + GAP), GAP), title, fill=(200, 208, 216))
    for r, row in enumerate(rows):
        top = GAP + LINE + r * (CELL + GAP + LINE)
        draw.text((GAP, top + CELL + 2), row.caption, fill=(150, 160, 170))
        window = _window(row.stored[0])
        for column, (x, y) in enumerate((row.stored, *row.samples)):
            cell = Image.fromarray(_cell(x, y, window))
            scale = CELL / max(cell.size)
            size = (max(1, round(cell.width * scale)), max(1, round(cell.height * scale)))
            cell = cell.resize(size, Image.Resampling.NEAREST)
            left = GAP + column * (CELL + GAP)
            canvas.paste(cell, (left + (CELL - size[0]) // 2, top + (CELL - size[1]) // 2))
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG")
    return buffer.getvalue()


def _chosen(data: Federated, images: int) -> Iterator[tuple[str, Any, int]]:
    """Yield training examples from the sites in turn, evenly spread within each site."""
    sites = [(site, data.sites[site]["train"]) for site in data.training if len(data.sites[site].get("train", ()))]
    for k in range(images):
        site, examples = sites[k % len(sites)]
        of_site = -(-images // len(sites))
        yield site, examples, (k // len(sites)) * len(examples) // of_site


def _caption(data: Federated, site: str, i: int) -> str:
    examples: Any = data.sites[site]["train"]
    classes, y = data.info.classes, examples.targets[i] if hasattr(examples, "targets") else None
    known = isinstance(y, Tensor) and y.ndim == 0 and not y.is_floating_point() and 0 <= int(y) < len(classes)
    return f"{site}, training image {i + 1}" + (f": {classes[int(y)]}" if known and y is not None else "")


def _window(x: Tensor) -> tuple[float, float]:
    values = np.asarray(x, np.float64)
    low, high = (float(v) for v in np.percentile(values, (0.5, 99.5)))
    return (low, high) if high > low else (low, low + 1.0)


def _cell(x: Tensor, y: Tensor, window: tuple[float, float]) -> Pixels:
    """Return one view [C, *spatial] as colors [h, w, 3], with the outlines of its mask."""
    mask = y if y.shape == x.shape[1:] and not y.is_floating_point() else None
    if x.ndim == 4:
        middle = x.shape[1] // 2
        if mask is not None and bool((mask > 0).any()):
            middle = int((mask > 0).flatten(1).sum(1).argmax())
        x, mask = x[:, middle], None if mask is None else mask[middle]
    enlarge = max(1, CELL // max(x.shape[1:]))  # outlines are one pixel wide, so small images are enlarged first
    planes = x if len(x) == 3 else x[:1].expand(3, *x.shape[1:])
    scaled = ((np.asarray(planes, np.float64) - window[0]) / (window[1] - window[0])).clip(0, 1)
    colors = np.repeat(np.repeat((255 * scaled).astype(np.uint8).transpose(1, 2, 0), enlarge, 0), enlarge, 1)
    if mask is not None:
        labels = np.repeat(np.repeat(np.asarray(mask), enlarge, 0), enlarge, 1)
        padded = np.pad(labels, 1, mode="edge")
        edge = np.zeros_like(labels, dtype=bool)
        for axis, step in ((0, 1), (0, -1), (1, 1), (1, -1)):
            edge |= np.roll(padded, step, axis)[1:-1, 1:-1] != labels
        for label in np.unique(labels[labels > 0]):
            colors[edge & (labels == label)] = COLORS[(int(label) - 1) % len(COLORS)]
    return colors

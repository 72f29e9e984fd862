"""Nearly equal images in a federation: rescaled, brightened or recompressed copies, in two roles or at two sites."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from polyclinic.data.cache import cached
from polyclinic.data.examples import DataError, Dataset
from polyclinic.data.formats.volume import Volume
from polyclinic.data.quality.exact_duplicates import Duplicate
from polyclinic.data.quality.image_hashes import nearly_equal, small_picture
from polyclinic.data.source import digest

VERSION = 1


def near_duplicates(sites: Mapping[str, Mapping[str, Dataset]], fingerprint: str) -> tuple[Duplicate, ...]:
    """Return pairs of images anywhere in the federation that are nearly but not exactly equal. The result is cached.

    Args:
        sites: Examples by site and role.
        fingerprint: Hash of the source that they come from.

    Raises:
        DataError: If the data are not images.
    """
    parts = [(site, role, examples) for site, roles in sites.items() for role, examples in roles.items()]
    if any(len(examples.shape) < 3 for *_, examples in parts):
        raise DataError("near_duplicates = ... compares images; these examples are rows of a table, so leave it out")
    places = sorted((name, (s, r), part, i) for part, (s, r, e) in enumerate(parts) for i, name in enumerate(e.ids))
    names = [name for name, *_ in places]

    def build() -> dict[str, object]:
        hashes = [[key.hex() for key in examples.input_hashes()] for *_, examples in parts]
        pictures = [_small(parts[part][2], i) for *_, part, i in places]
        return {"pairs": [list(p) for p in nearly_equal(pictures, [hashes[part][i] for *_, part, i in places])]}

    found: Sequence[Sequence[int]] = cached("alike", digest("alike", VERSION, fingerprint, names), build)["pairs"]
    pairs = [sorted((places[i], places[j]), key=lambda p: (p[1], p[0])) for i, j in found]
    return tuple(Duplicate((a[0], b[0]), (a[1], b[1])) for a, b in sorted(pairs, key=lambda pair: pair[0][0]))


def near_duplicate_notes(pairs: Sequence[Duplicate], refuse: bool) -> list[str]:
    """Return sentences about the pairs for the reader of a report; empty if there are none.

    Raises:
        DataError: If ``refuse`` is set and a pair is in two of training, validation and test.
    """
    if not pairs:
        return []
    leaks = [pair for pair in pairs if pair.across_roles]
    says = (
        f"{len(pairs)} pairs of images are nearly equal; {len(leaks)} of them are in two of training, validation and "
        f"test, {sum(pair.across_sites for pair in pairs)} at two sites."
    )
    if refuse and leaks:
        some = "; ".join(" ~ ".join(pair.ids) for pair in leaks[:3])
        raise DataError(f'{says} Remove one of each, or set near_duplicates = "report" ({some})')
    return [says]


def _small(examples: Dataset, at: int) -> "np.ndarray[Any, Any]":
    pixels = examples.image(at)
    flat = pixels[:, None] if pixels.ndim == 3 else pixels  # a picture is a volume of one slice
    return small_picture(Volume(flat, torch.eye(4, dtype=torch.float64)))

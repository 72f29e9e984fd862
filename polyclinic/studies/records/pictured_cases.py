"""Pictures of test cases with their true and predicted labels, as ``polyclinic pictures`` writes them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyclinic.evaluation.records.method_runs import arm_name
from polyclinic.evaluation.records.run_reader import Run
from polyclinic.statistics.undefined import Array

Bytes = NDArray[np.uint8]
FILE = "pictures.safetensors"
RANKS = ("best", "median", "worst")


@dataclass(frozen=True)
class Plane:
    """One slice of a case.

    Attributes:
        image: [h, w, 1 or 3], 0 to 255.
        truth: True labels [h, w].
        predicted: Predicted labels [h, w].
        aspect: Height of a pixel divided by its width.
    """

    image: Bytes
    truth: Bytes
    predicted: Bytes
    aspect: float


@dataclass(frozen=True)
class PicturedCase:
    """A case: its Dice for each class, NaN for classes that it and its prediction lack, and its planes."""

    dice: Array
    planes: tuple[Plane, ...]

    @property
    def mean(self) -> float:
        """The mean Dice over the classes that the case or its prediction has."""
        return float(np.nanmean(self.dice))


def read_pictures(run: Run, label: str) -> tuple[int, Mapping[str, Mapping[str, PicturedCase]]] | None:
    """Return the pictures of ``label`` for the first seed that has some: the seed, and cases by site and rank.

    Returns:
        None if there are no pictures.
    """
    from safetensors.numpy import load_file

    for seed in run.info.seeds:
        file = run.path / "arms" / arm_name(label, seed, 0 if run.info.folds else None) / FILE
        if file.is_file():
            leaves = load_file(file)
            sites = sorted({name.split("/")[0] for name in leaves})
            return seed, {site: _cases(leaves, site) for site in sites}
    return None


def _cases(leaves: Mapping[str, Any], site: str) -> dict[str, PicturedCase]:
    found = {}
    for rank in RANKS:
        if (dice := leaves.get(f"{site}/{rank}/dice")) is None:
            continue
        planes = list[Plane]()
        while (image := leaves.get(f"{site}/{rank}/{len(planes)}/image")) is not None:
            prefix = f"{site}/{rank}/{len(planes)}"
            truth, predicted, aspect = (leaves[f"{prefix}/{name}"] for name in ("truth", "predicted", "aspect"))
            planes.append(Plane(image, truth, predicted, float(aspect[0])))
        found[rank] = PicturedCase(dice, tuple(planes))
    return found

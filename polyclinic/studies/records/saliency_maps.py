"""Where a run's model looks at every site, as ``explain`` left it in the run folder, and whether sites agree.

Agreement is Spearman's rank correlation of two maps. A map also tells of the images, so the same is asked of the
model before training: what agrees as well with that has not been learned (Adebayo et al., "Sanity Checks for Saliency
Maps", NeurIPS 2018, https://arxiv.org/abs/1810.03292).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from polyclinic.evaluation.records.record_schema import arm_name
from polyclinic.evaluation.records.run_reader import Run
from polyclinic.statistics.undefined import Array

FILE = "explanations.safetensors"


@dataclass(frozen=True)
class Explanation:
    """Where a model looks.

    Attributes:
        method: Whose model, and ``seed``.
        maps: The mean map by site: [*spatial], or [F] for tables. ``patients``: how many it is a mean of.
        untrained: The same for the model before training.
        names: Of a table's features; empty for images.
    """

    method: str
    seed: int
    maps: Mapping[str, Array]
    patients: Mapping[str, int]
    untrained: Mapping[str, Array]
    names: tuple[str, ...] = ()

    def agreement(self, site: str) -> float | None:
        """Of a site's map with the mean of the other sites' maps: −1 to 1. None where it is the only site."""
        others = [m for s, m in self.maps.items() if s != site]
        return spearman(self.maps[site], np.mean(others, axis=0)) if others else None

    def unlearned(self, site: str) -> float | None:
        """Of a site's map with the one before training."""
        return spearman(self.maps[site], self.untrained[site]) if site in self.untrained else None


def spearman(a: Array, b: Array) -> float | None:
    """Rank correlation of two maps; None where one of them is the same everywhere."""
    from scipy.stats import rankdata

    x, y = (rankdata(np.round(v, 12).ravel()) for v in (a, b))
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def read_explanation(run: Run, label: str) -> Explanation | None:
    """What was found of ``label``'s model, of the first seed that has it; None where nobody asked."""
    from safetensors import safe_open

    for seed in run.info.seeds:
        file = run.path / "arms" / arm_name(label, seed, 0 if run.info.folds else None) / FILE
        if not file.is_file():
            continue
        with safe_open(file, "numpy") as opened:
            leaves = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            names = (opened.metadata() or {}).get("features", "")
        parts: dict[str, dict[str, Any]] = {"map": {}, "patients": {}, "untrained": {}}
        for key, leaf in sorted(leaves.items()):
            site, _, name = key.rpartition("/")
            parts[name][site] = int(leaf.reshape(-1)[0]) if name == "patients" else np.asarray(leaf, np.float64)
        known = tuple(names.split("\n")) if names else ()
        return Explanation(label, seed, parts["map"], parts["patients"], parts["untrained"], known)
    return None

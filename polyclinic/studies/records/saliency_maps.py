"""Attribution maps of a run's model at every site, as written by ``explain``, and their agreement between sites.

Agreement is Spearman's rank correlation of two maps. A map also depends on the images, so each map is compared with
that of the untrained model: if they agree, the map shows nothing learned (Adebayo et al., "Sanity Checks for Saliency
Maps", NeurIPS 2018, https://arxiv.org/abs/1810.03292).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from polyclinic.evaluation.records.method_runs import arm_name
from polyclinic.evaluation.records.run_reader import Run
from polyclinic.statistics.undefined import Array

FILE = "explanations.safetensors"


@dataclass(frozen=True)
class Explanation:
    """Attribution maps of a model.

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
        """Return the agreement of a site's map with the mean of the others, −1 to 1; None for a single site."""
        others = [m for s, m in self.maps.items() if s != site]
        return spearman(self.maps[site], np.mean(others, axis=0)) if others else None

    def unlearned(self, site: str) -> float | None:
        """Return the agreement of a site's map with that of the untrained model."""
        return spearman(self.maps[site], self.untrained[site]) if site in self.untrained else None


def spearman(a: Array, b: Array) -> float | None:
    """Return the rank correlation of two maps, or None if one of them is constant."""
    from scipy.stats import rankdata

    x, y = (rankdata(np.round(v, 12).ravel()) for v in (a, b))
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def read_explanation(run: Run, label: str) -> Explanation | None:
    """Read the explanation of the model of ``label`` for the first seed that has one; None if there is none."""
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

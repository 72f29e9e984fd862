"""Costs of a method: communication, computing time, lost replies, and the communication needed to reach a target."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from polyclinic.evaluation.records.run_reader import Run
from polyclinic.evaluation.site_scores import mean_over_sites


@dataclass(frozen=True)
class Curve:
    """The validation metric over rounds, averaged over the sites and seeds for which it was recorded."""

    rounds: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Cost:
    """Costs of one method per run (mean over seeds and folds).

    Attributes:
        label: The method.
        rounds: Number of completed rounds.
        up: Bytes sent by each site.
        down: Bytes received by each site.
        seconds: Computing time at each site.
        wall: Duration from the first to the last round, in seconds.
        lost: (seed, round, site, reason) of each missing reply.
        reached: The first round whose validation mean reaches the target; None if none does.
        bytes_to_target: Bytes sent and received up to that round, averaged over sites.
        by_site_to_target: The same for each site.
    """

    label: str
    rounds: int
    up: Mapping[str, float]
    down: Mapping[str, float]
    seconds: Mapping[str, float]
    wall: float
    lost: Sequence[tuple[int, int, str, str]]
    reached: int | None = None
    bytes_to_target: float | None = None
    by_site_to_target: Mapping[str, float] = field(default_factory=dict)

    @property
    def in_one_place(self) -> bool:
        """Whether training ran on pooled data, so that there was no communication."""
        return bool(self.seconds) and not self.up and not self.down

    @property
    def per_site(self) -> float:
        """Bytes sent and received, averaged over sites."""
        sites = self.up.keys() | self.down.keys()
        total = sum(self.up.values()) + sum(self.down.values())
        return total / len(sites) if sites else 0.0


@dataclass(frozen=True)
class Target:
    """A target value of the validation metric, and a description of its origin."""

    value: float
    meaning: str


def learning_curve(run: Run, label: str, metric: str, site: str | None = None) -> Curve:
    """Return a method's validation curve over the training sites or at ``site``, averaged over seeds and folds."""
    training = {s.name for s in run.info.sites if s.role == "training"}
    by_round: dict[int, dict[tuple[int, int], dict[str, float | None]]] = defaultdict(lambda: defaultdict(dict))
    for s in run.curves:
        here = s.site == site if site is not None else s.site in training
        if s.method == label and s.role == "val" and here:
            by_round[s.round][s.seed, s.fold][s.site] = s.metrics.get(metric)
    means = {r: [m for v in arms.values() if (m := mean_over_sites(v)) is not None] for r, arms in by_round.items()}
    rounds = sorted(r for r, found in means.items() if found)
    return Curve(tuple(rounds), tuple(float(np.mean(means[r])) for r in rounds))


def target_of(run: Run, metric: str, higher_is_better: bool) -> Target | None:
    """Return the best validation value of local training; without that baseline, 98 % of the best of all methods."""
    best = max if higher_is_better else min
    curves = {m.label: learning_curve(run, m.label, metric).values for m in run.info.methods}
    if curves.get("local"):
        return Target(best(curves["local"]), "the best mean over sites that local training reaches")
    found = [best(v) for v in curves.values() if v]
    if not found:
        return None
    share, words = (0.98, "98 % of the best") if higher_is_better else (1 / 0.98, "within 2 % of the best")
    return Target(best(found) * share, f"{words} that any method reaches")


def cost_of(run: Run, label: str, metric: str, higher_is_better: bool, target: Target | None) -> Cost | None:
    """Return the costs of ``label``; None if no round of it was recorded."""
    mine = [r for r in run.rounds if r.method == label]
    if not mine:
        return None
    arms = {(r.seed, r.fold) for r in mine}
    sums: dict[str, dict[str, float]] = {"up": defaultdict(float), "down": defaultdict(float), "s": defaultdict(float)}
    known = {s.name for s in run.info.sites}
    for r in mine:
        for key, values in (("up", r.bytes_up), ("down", r.bytes_down), ("s", r.seconds)):
            for site, value in values.items():
                if site in known or key == "s":
                    sums[key][site] += value / len(arms)
    lost = [(r.seed, r.round, site, why) for r in mine for site, why in r.lost.items()]
    curve, reached, spent = learning_curve(run, label, metric), None, None
    if target is not None:
        ahead = [v >= target.value if higher_is_better else v <= target.value for v in curve.values]
        reached = next((r for r, yes in zip(curve.rounds, ahead, strict=True) if yes), None)
    to_target: dict[str, float] = {}
    if reached is not None:
        sites = (sums["up"].keys() | sums["down"].keys()) & known
        for site in sorted(sites):
            moved = (r.bytes_up.get(site, 0) + r.bytes_down.get(site, 0) for r in mine if r.round <= reached)
            to_target[site] = sum(moved) / len(arms)
        spent = sum(to_target.values()) / max(len(sites), 1)
    rounds = round(np.mean([len({r.round for r in mine if (r.seed, r.fold) == arm}) for arm in arms]))
    wall = sum(r.wall for r in mine) / len(arms)
    up, down, seconds = (dict(sums[key]) for key in ("up", "down", "s"))
    return Cost(label, rounds, up, down, seconds, wall, lost, reached, spent, to_target)

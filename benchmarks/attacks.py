"""What robust rules withstand, on real patients: ``python benchmarks/attacks.py`` writes docs/results/attacks.md.

Two federations of ten sites. Heart disease: four hospitals, each dealt to two or three sites, so that sites differ as
real hospitals do. Chest X-rays: one hospital's, dealt to ten sites with label skew. One to three of the ten attack from
the first round on; the attackers are drawn for each seed. Every rule is evaluated by its AUC on honest test patients,
compared with the mean of honest sites; by the sites that its alarms name; and, without any attack, by its cost for the
hospital that differs most.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hospitals import CHEST, HEART, first, mlp, pooled, read, scores, sites_of, split_up

from polyclinic.attacks.adversaries import (
    ALIE,
    IPM,
    Attack,
    Collusion,
    Huge,
    LabelFlip,
    Noise,
    NotANumber,
    Replacement,
    SignFlip,
)
from polyclinic.attacks.poisoning import Poisoned
from polyclinic.core.rounds import TooFewReplies, train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.robust.robust_method import Robust
from polyclinic.methods.robust.rules.aggregation_rule import Average, Rule
from polyclinic.methods.robust.rules.bulyan import Bulyan
from polyclinic.methods.robust.rules.centered_clipping import CentredClipping
from polyclinic.methods.robust.rules.coordinate_wise import Median, TrimmedMean
from polyclinic.methods.robust.rules.dos import DOS
from polyclinic.methods.robust.rules.fltrust import FLTrust
from polyclinic.methods.robust.rules.geometric_median import GeometricMedian
from polyclinic.methods.robust.rules.krum import Krum, MultiKrum

RULES: dict[str, tuple[Rule, float]] = {
    "mean": (Average(weighted=False), 0.0),
    "mean, bounded": (Average(weighted=False), 1.0),
    "krum": (Krum(0.3), 0.0),
    "multi-krum": (MultiKrum(0.3), 0.0),
    "bulyan": (Bulyan(0.1), 0.0),
    "median": (Median(), 0.0),
    "trimmed-mean": (TrimmedMean(0.3), 0.0),
    "geometric-median": (GeometricMedian(), 0.0),
    "centered-clipping": (CentredClipping(), 0.0),
    "fltrust": (FLTrust(""), 0.0),
    "dos, bounded": (DOS(), 1.0),
    "dos, unbounded": (DOS(), 0.0),
}
ATTACKS: dict[str, Attack] = {
    "label flip": LabelFlip(),
    "sign flip": SignFlip(4.0),
    "Gaussian": Noise(10.0),
    "ALIE": ALIE(),
    "IPM": IPM(0.5),
    "replacement": Replacement(size=10.0),
    "norm 10⁶": Huge(1e6),
    "NaN": NotANumber(),
    "collusion": Collusion(1.0),
}


@dataclass(frozen=True)
class Setting:
    """One federation to attack.

    Attributes:
        test: Patients of all hospitals. ``minority``: those of the hospital that differs most.
        weak: The sites of that hospital.
    """

    task: Classification
    local: LocalTraining
    rounds: int
    sites: dict[str, Site]
    test: Any
    minority: Any
    weak: tuple[str, ...]


def heart(seed: int) -> Setting:
    """Four hospitals in ten sites. Zurich and Basel differ most: 93 % of their patients are ill."""
    data = read(HEART, seed)
    whole = sites_of(data, seed)
    sites = split_up(whole, {"cleveland": 3, "hungarian": 3, "switzerland": 2, "va": 2}, seed)
    weak = ("switzerland-1", "switzerland-2")
    task = mlp(*data.shape)
    return Setting(
        task,
        LocalTraining(epochs=2, batch_size=16, lr=0.1),
        15,
        sites,
        pooled(whole),
        whole["switzerland"].data["test"],
        weak,
    )


def chest(seed: int) -> Setting:
    """X-rays of one hospital at ten simulated sites; the two with the fewest ill children differ most."""
    data = read(CHEST, seed)
    whole = sites_of(data, seed)
    ill = {name: float(site.data["train"].targets.float().mean()) for name, site in whole.items()}
    weak = tuple(sorted(ill, key=lambda name: ill[name])[:2])
    minority = pooled({name: whole[name] for name in weak})
    local = LocalTraining(epochs=2, batch_size=16, lr=0.1)
    return Setting(mlp(1, 28, 28, width=32), local, 10, first(whole, 96), pooled(whole), minority, weak)


SETTINGS = {"heart disease, 4 hospitals in 10 sites": heart, "chest X-rays, 10 simulated sites": chest}


def run(
    setting: Setting, rule: Rule, bound: float, attack: Attack | None, attackers: tuple[str, ...], seed: int
) -> dict[str, Any]:
    """One training: scores on honest test patients, and the sites that the alarms name."""
    if isinstance(rule, FLTrust):  # the trusted site must be honest
        rule = FLTrust(
            next(name for name in sorted(setting.sites) if name not in attackers and name not in setting.weak)
        )
    method: Any = Robust(FedAvg(setting.task, setting.local, uniform=True), rule, bound)
    if attack is not None:
        method = Poisoned(method, attackers, attack, tuple(setting.sites))
    state, lost = method.init(setting.task.first(seed)), set[str]()
    try:
        for step in train(method, InProcess(method, setting.sites, seed=seed), state, rounds=setting.rounds):
            state = step.state
            lost |= set(step.lost)
    except TooFewReplies:  # the model is so broken that no site can train it any more
        return {"score": 0.5, "auc": 0.5, "minority": None, "caught": None, "wronged": None, "weak_wronged": None}
    robust = state if attack is None else state.inner
    named = {line.split(":")[0] for line in robust.alarms} | lost
    found = scores(setting.task, robust.params, setting.test)
    return {
        "score": found["balanced_accuracy"],
        "auc": found["auc"],
        "minority": scores(setting.task, robust.params, setting.minority)["accuracy"],
        "caught": len(named & set(attackers)),
        "wronged": len(named - set(attackers)),
        "weak_wronged": len((named - set(attackers)) & set(setting.weak)),
    }


def cases(splits: int, attackers: tuple[int, ...]) -> Iterator[tuple[str, int, str, str, int]]:
    """(federation, seed, rule, attack or "", number of attackers); a collusion takes three."""
    for seed in range(splits):
        for where in SETTINGS:
            for rule in RULES:
                yield where, seed, rule, "", 0
                for attack in ATTACKS:
                    for f in (3,) if attack == "collusion" else attackers:
                        yield where, seed, rule, attack, f


def main() -> None:
    """Runs what is not yet among the records, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--splits", type=int, default=2, help="how many random splits")
    parser.add_argument("--attackers", type=int, nargs="+", default=[1, 3], help="how many of ten sites attack")
    parser.add_argument(
        "--quick", action="store_true", help="one split, two attackers; prints the page, writes nothing"
    )
    parser.add_argument(
        "--records", type=Path, default=Path("runs/attacks.jsonl"), help="results so far, to go on from"
    )
    given = parser.parse_args()
    todo = list(cases(1, (2,)) if given.quick else cases(given.splits, tuple(given.attackers)))
    torch.set_num_threads(1)
    given.records.parent.mkdir(parents=True, exist_ok=True)
    lines = given.records.read_text().splitlines() if given.records.exists() else []
    done = {tuple(row["case"]): row for row in map(json.loads, lines)}
    at: tuple[str, int] = ("", -1)
    with open(given.records, "a") as file:
        for case in todo:
            if case in done:
                continue
            where, seed, rule, attack, f = case
            if at != (where, seed):
                setting, at = SETTINGS[where](seed), (where, seed)
            order = torch.randperm(len(setting.sites), generator=torch.Generator().manual_seed(100 + seed)).tolist()
            attackers = tuple(sorted(sorted(setting.sites)[i] for i in order[:f]))
            begun = time.process_time()
            row = {"case": case, **run(setting, *RULES[rule], ATTACKS.get(attack), attackers, seed)}
            done[case] = row | {"seconds": time.process_time() - begun}
            file.write(json.dumps(done[case]) + "\n")
            file.flush()
    from attacks_page import page, whole

    text = page(
        whole(done, todo),
        list(RULES),
        list(ATTACKS),
        list(SETTINGS),
    )
    if given.quick:
        print(text)
    else:
        out = Path(__file__).parent.parent / "docs" / "results" / "attacks.md"
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)


if __name__ == "__main__":
    main()

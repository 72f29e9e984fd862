"""Gains and losses of each hospital: ``python benchmarks/fairness.py`` writes docs/results/fairness.md.

Heart disease at four hospitals, where 36 to 93 % of patients are ill, and sex from brain regions at the scanners of 23
sites (those with enough subjects). Every method trains the same network for the same rounds, on ten random splits of
each site's patients. A site's accuracy is its mean over splits; from those come the mean over sites, the worst site and
the spread. Intervals are of the splits: bootstrap over them, 2.5 to 97.5 %; differences to FedAvg are paired by split.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hospitals import BRAIN, HEART, mlp, read, sites_of

from polyclinic.core.rounds import train
from polyclinic.engines.local.in_process import InProcess
from polyclinic.learning.tasks.task_evaluation import outputs
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.registry import Setting, build

SETTINGS: dict[str, tuple[Mapping[str, Any], LocalTraining, int]] = {
    "Heart disease, 4 hospitals": (HEART, LocalTraining(epochs=2, batch_size=16, lr=0.05), 20),
    "Sex from brain regions, scanners of 1000 Functional Connectomes": (
        BRAIN,
        LocalTraining(epochs=2, batch_size=16, lr=0.02),
        20,
    ),
}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "fedavg": ("fedavg", {}),
    "fedavg, equal sites": ("fedavg", {"uniform": True}),
    "q-ffl, q = 1": ("q-ffl", {"q": 1.0}),
    "q-ffl, q = 5": ("q-ffl", {"q": 5.0}),
    "afl": ("afl", {"rate": 0.1}),
    "prop-ffl": ("prop-ffl", {}),
    "guided-gradient": ("guided-gradient", {}),
    "fedsld": ("fedsld", {}),
    "fedmix-weights": ("fedmix-weights", {}),
    "fedce": ("fedce", {}),
    "loss-weighted": ("loss-weighted", {}),
    "ida": ("ida", {}),
    "single": ("single", {}),
}


def accuracies(where: str, label: str, seed: int) -> dict[str, float]:
    """The accuracy on each site's test patients after training."""
    spec, local, rounds = SETTINGS[where]
    data = read(spec, seed)
    sites, task = sites_of(data, seed), mlp(*data.shape)
    name, options = METHODS[label]
    method = build(name, Setting(task, local, tuple(sites), rounds), options)
    engine, state = InProcess(method, sites, seed=seed), method.init(task.first(seed))
    for step in train(method, engine, state, rounds=rounds):
        state = step.state
    trial, found = method.evaluation_request(state), {}
    for name, site in sites.items():
        said = outputs(task, method.site_model(trial.for_site(name), engine.memory[name]), site.data["test"])
        found[name] = float((said["score"].argmax(1) == said["target"]).float().mean())
    return found


def interval(
    table: np.ndarray, statistic: Callable[[np.ndarray], float], times: int = 4000
) -> tuple[float, float, float]:
    """A statistic of [splits, sites], and its bootstrap interval over splits."""
    rng = np.random.default_rng(0)
    drawn = [statistic(table[rng.integers(0, len(table), len(table))]) for _ in range(times)]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return statistic(table), float(low), float(high)


STATISTICS: dict[str, Callable[[np.ndarray], float]] = {
    "mean": lambda t: float(t.mean()),
    "worst site": lambda t: float(t.mean(0).min()),
    "spread": lambda t: float(t.mean(0).std(ddof=1)),
}


def page(found: Mapping[str, Mapping[str, np.ndarray]], names: Mapping[str, list[str]]) -> str:
    """The study as Markdown. Arrays are [splits, sites]."""
    lines = [HEAD]
    for where, rows in found.items():
        splits, count = next(iter(rows.values())).shape
        says = f"{count} sites, {splits} splits. Accuracy in %; spread is the standard deviation over sites, in points."
        lines += [f"## {where}", "", says, ""]
        lines += [
            "| method | mean over sites | worst site | spread | worst site compared with FedAvg |",
            "|---|---|---|---|---|",
        ]
        for label, table in rows.items():
            cells = []
            for statistic in STATISTICS.values():
                value, low, high = interval(100 * table, statistic)
                cells.append(f"{value:.1f} ({low:.1f} to {high:.1f})")
            both = np.concatenate([100 * table, 100 * rows["fedavg"]], 1)
            value, low, high = interval(both, lambda t, n=count: float(t[:, :n].mean(0).min() - t[:, n:].mean(0).min()))
            cells.append("" if label == "fedavg" else f"{value:+.1f} ({low:+.1f} to {high:+.1f})")
            lines.append(f"| {label} | {' | '.join(cells)} |")
        worst = {label: names[where][int(table.mean(0).argmin())] for label, table in rows.items()}
        who = [
            f"{site} ({', '.join(k for k, v in worst.items() if v == site)})" for site in dict.fromkeys(worst.values())
        ]
        lines += ["", f"The worst site: {'; '.join(who)}.", ""]
        if count <= 6:
            lines += [f"| method | {' | '.join(names[where])} |", "|---" * (count + 1) + "|"]
            means = {label: " | ".join(f"{100 * x:.1f}" for x in table.mean(0)) for label, table in rows.items()}
            lines += [*(f"| {label} | {cells} |" for label, cells in means.items()), ""]
    return "\n".join(lines)


HEAD = """# Fairness: which hospitals gain and which lose

Written by `python benchmarks/fairness.py`; every number was measured as the script describes. If the interval of a difference
includes 0, these data show no difference. Of a dozen methods compared with FedAvg on two data sets, one or two would
look better by chance alone, because there is no correction for multiple comparisons.

Conclusions:

- At four hospitals much of the gain of fairness methods for the worst one comes from equal weights of hospitals: FedAvg
  with equal sites, AFL, FedCE, IDA and loss weighting, which start from equal weights, lie within a point of one another.
- Of the methods designed for fairness, only Prop-FFL raised the worst site's accuracy on both data sets with an
  interval above 0, at no cost to the mean. Try it first.
- q-FFL learns more slowly with a larger q, because its step is divided by an estimate of the curvature that grows with
  q; after these 20 rounds q = 5 had not converged.
- If sites have different patients, no global model is fair: at 23 scanners, of which two have subjects of one sex only, each
  site's own model is better for the mean and for the worst site than any shared model. Compare with personal methods
  before you choose among these.
- The result of a worst site with a handful of test subjects is mostly noise: consider the width of its interval.
"""


def main() -> None:
    """Run the cases that have no record yet, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--splits", type=int, default=10)
    parser.add_argument(
        "--records", type=Path, default=Path("runs/fairness.jsonl"), help="results so far, to go on from"
    )
    parser.add_argument("--quick", action="store_true", help="two splits; prints the page, writes nothing")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.records.parent.mkdir(parents=True, exist_ok=True)
    lines = given.records.read_text().splitlines() if given.records.exists() else []
    done: dict[tuple[str, str, int], dict[str, float]] = {
        tuple(row["case"]): row["sites"] for row in map(json.loads, lines)
    }
    splits = 2 if given.quick else given.splits
    cases = [(where, label, seed) for where in SETTINGS for seed in range(splits) for label in METHODS]
    with open(given.records, "a") as file:
        for case in cases:
            if case not in done:
                done[case] = accuracies(*case)
                file.write(json.dumps({"case": case, "sites": done[case]}) + "\n")
                file.flush()
    names = {where: sorted(set.intersection(*(set(done[c]) for c in cases if c[0] == where))) for where in SETTINGS}
    found = {
        where: {
            label: np.array([[done[where, label, seed][s] for s in names[where]] for seed in range(splits)])
            for label in METHODS
        }
        for where in SETTINGS
    }
    if given.quick:
        print(page(found, names))
        return
    out = Path(__file__).parent.parent / "docs" / "results" / "fairness.md"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(found, names))


if __name__ == "__main__":
    main()

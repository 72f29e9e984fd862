"""Gains and losses of each hospital: ``python benchmarks/fairness.py`` writes docs/results/fairness.md.

Heart disease at four hospitals, where 36 to 93 % of patients are ill, and sex from brain regions at the scanners of 23
sites. Every method trains the same network for the same rounds, on random splits of each site's patients. A site's result is
its mean over splits: AUC, accuracy at a threshold of 1/2, and accuracy after the site's own intercept, fitted on its
training patients. Differences from FedAvg are paired by split (``resplits``).
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hospitals import BRAIN, HEART, mlp, read, sites_of
from resplits import WHAT, compared, text_of

from polyclinic.core.rounds import train
from polyclinic.engines.local.in_process import InProcess
from polyclinic.evaluation.calibration import log_odds
from polyclinic.evaluation.recalibration import intercept_of
from polyclinic.learning.tasks.task_evaluation import outputs
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.registry import Setting, build
from polyclinic.statistics.auc import auc_of

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


KINDS = ("auc", "accuracy", "recalibrated")
SHARES = {"Heart disease, 4 hospitals": (0.25, 0.6)}
BRAINS = ("fedavg", "fedavg, equal sites", "prop-ffl", "single")


def results(where: str, label: str, seed: int) -> dict[str, dict[str, float]]:
    """Return each site's results on its test patients after training."""
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
        model = method.site_model(trial.for_site(name), engine.memory[name])
        (p, y), (q, z) = (arrays(outputs(task, model, site.data[role])) for role in ("test", "train"))
        moved = log_odds(p) + intercept_of(q, z)
        found[name] = {
            "auc": float(auc_of(p, y, np.ones((1, len(y))))[0]),
            "accuracy": float(((p >= 0.5) == y).mean()),
            "recalibrated": float(((moved >= 0) == y).mean()),
            "majority": float((y == round(float(z.mean()))).mean()),
            "n": float(len(y)),
        }
    return found


def arrays(predicted: Mapping[str, torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Return probabilities of the second class, and targets."""
    return predicted["score"][:, 1].double().numpy(), predicted["target"].numpy().astype(float)


def page(found: Mapping[str, Mapping[str, list[dict[str, dict[str, float]]]]]) -> str:
    """The study as Markdown, from the results of each split."""
    lines = [HEAD]
    for where, rows in found.items():
        names = list(rows["fedavg"][0])
        tables = {
            label: {k: 100 * np.array([[split[s][k] for s in names] for split in splits]) for k in (*KINDS, "majority")}
            for label, splits in rows.items()
        }
        count, splits = len(names), len(rows["fedavg"])
        sizes = [int(rows["fedavg"][0][s]["n"]) for s in names]
        says = (
            f"{count} sites with {min(sizes)} to {max(sizes)} test patients, {splits} splits. Means over sites, in %."
        )
        constant = tables["fedavg"]["majority"].mean()
        says += f" Naming each site's commonest training class has an accuracy of {constant:.1f}."
        lines += [f"## {where}", "", says, ""]
        lines += [
            "| method | AUC | compared with FedAvg | accuracy | compared | after each site's intercept | compared | lowest site, after |",
            "|---|---|---|---|---|---|---|---|",
        ]
        base = tables["fedavg"]
        gaps = {
            k: compared(
                {m: np.nanmean(t[k] - base[k], axis=1) for m, t in tables.items() if m != "fedavg"},
                *SHARES.get(where, (0.4, 0.6)),
            )
            for k in KINDS
        }
        for label, t in tables.items():
            cells = [label]
            for k in KINDS:
                cells += [f"{np.nanmean(t[k]):.1f}", "" if label == "fedavg" else text_of(gaps[k][label])]
            lowest = t["recalibrated"].mean(0)
            cells.append(f"{lowest.min():.1f} ({names[int(lowest.argmin())]})")
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


HEAD = f"""# Fairness: which hospitals gain and which lose

Written by `python benchmarks/fairness.py`; every number was measured as the script describes. {WHAT}

CONCLUSIONS
"""


def main() -> None:
    """Run the cases that have no record yet, and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--splits", type=int, default=10)
    parser.add_argument(
        "--records", type=Path, default=Path("runs/fairness.jsonl"), help="results so far, to go on from"
    )
    parser.add_argument("--quick", action="store_true", help="two splits; prints the page, writes nothing")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.records.parent.mkdir(parents=True, exist_ok=True)
    lines = given.records.read_text().splitlines() if given.records.exists() else []
    done = {tuple(row["case"]): row["sites"] for row in map(json.loads, lines)}
    found: dict[str, dict[str, list[dict[str, dict[str, float]]]]] = {}
    with open(given.records, "a") as file:
        for where in SETTINGS:
            heart = where in SHARES
            splits, labels = (given.splits, METHODS) if heart else (max(given.splits // 2, 1), BRAINS)
            for label in labels:
                for seed in range(2 if given.quick else splits):
                    if (where, label, seed) not in done:
                        done[where, label, seed] = results(where, label, seed)
                        row = {"case": (where, label, seed), "sites": done[where, label, seed]}
                        file.write(json.dumps(row) + "\n")
                        file.flush()
                    found.setdefault(where, {}).setdefault(label, []).append(done[where, label, seed])
    text = page(found)
    if given.quick:
        print(text)
        return
    (Path(__file__).parent.parent / "docs" / "results" / "fairness.md").write_text(text)


if __name__ == "__main__":
    main()

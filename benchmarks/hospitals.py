"""The real data that the studies of this folder share, as sites. Reads the folder that POLYCLINIC_DATA names."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from polyclinic.core.site import Site
from polyclinic.data.examples import concat
from polyclinic.data.federation import DataSpec, Federated, federate
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.task_evaluation import outputs

HEART = {
    "kind": "table",
    "path": "$POLYCLINIC_DATA/uci_heart_4hospitals/heart_4sites.csv",
    "label": "num",
    "threshold": 0.0,
    "missing": ("-9",),
    "zero_is_missing": ("chol", "trestbps"),
    "categories": ("cp", "restecg", "slope", "thal"),
    "split": (0.6, 0.15, 0.25),
}
BRAIN = {
    "kind": "table",
    "path": "$POLYCLINIC_DATA/brain_roi_tables_by_site/fcon1000_roi_23sites.csv.gz",
    "label": "sex",
    "leave_out": ("age",),
    "patient": "sub_id",
    "split": (0.6, 0.0, 0.4),
    "min_patients": 3,
}
CHEST = {
    "kind": "npz",
    "path": "$POLYCLINIC_DATA/pneumoniamnist/pneumoniamnist.npz",
    "split": "official",
    "sites": {"partition": "dirichlet", "count": 10, "alpha": 1.0},
}


def read(spec: Mapping[str, Any], seed: int) -> Federated:
    """The federation of ``spec`` under the split of ``seed``."""
    if not Path(os.environ.get("POLYCLINIC_DATA", "")).is_dir() or not os.environ.get("POLYCLINIC_DATA"):
        sys.exit("POLYCLINIC_DATA names no folder of real data")
    return federate(DataSpec.model_validate(spec), seed)


def sites_of(data: Federated, seed: int) -> dict[str, Site]:
    """Each hospital as a site."""
    return {name: Site(name, dict(roles), seed=seed) for name, roles in data.sites.items()}


def split_up(sites: Mapping[str, Site], parts: Mapping[str, int], seed: int) -> dict[str, Site]:
    """Each hospital's training patients dealt to several sites, at random; test data stay with the hospital."""
    found = {}
    for name, count in parts.items():
        data = sites[name].data["train"]
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
        for k, mine in enumerate(order.chunk(count)):
            found[f"{name}-{k + 1}"] = Site(f"{name}-{k + 1}", {"train": data.subset(mine)}, seed=seed)
    return found


def first(sites: Mapping[str, Site], most: int) -> dict[str, Site]:
    """The same sites with at most ``most`` training examples each, drawn at random."""
    found = {}
    for name, site in sites.items():
        data = site.data["train"]
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(site.seed))
        found[name] = Site(name, {**site.data, "train": data.subset(order[:most])}, seed=site.seed)
    return found


def pooled(sites: Mapping[str, Site], role: str = "test") -> Any:
    """All sites' examples of one role in one place."""
    return concat([site.data[role] for site in sites.values() if role in site.data])


def mlp(*inputs: int, width: int = 16) -> Classification:
    """A small network without normalization, for tables and for images of few pixels."""
    return Classification(Network("mlp", inputs, 2, (("depth", 1), ("width", width))))


def scores(task: Classification, params: Mapping[str, torch.Tensor], data: Any) -> dict[str, float]:
    """The model's scores on ``data``; those of chance where its numbers are not finite."""
    if not all(bool(leaf.isfinite().all()) for leaf in params.values()):
        return {"auc": 0.5, "balanced_accuracy": 0.5, "accuracy": 0.5, "loss": float("inf")}
    return task.summary(outputs(task, params, data))

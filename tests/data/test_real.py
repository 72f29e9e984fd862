"""The real sets load through the public sources, from a ``[data]`` table alone, and hold what is known of them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from polyclinic.data.federation import DataSpec, federate

D = "$POLYCLINIC_DATA/"
SETS: dict[str, tuple[dict[str, Any], list[str], tuple[int, ...], int]] = {  # table, some sites, shape, examples
    "heart": (
        {
            "kind": "table",
            "path": D + "uci_heart_4hospitals/heart_4sites.csv",
            "label": "num",
            "threshold": 0,
            "missing": ["-9"],
            "zero_is_missing": ["chol"],
            "categories": ["cp", "restecg", "slope", "thal"],
        },
        ["cleveland", "hungarian", "switzerland", "va"],
        (33,),
        920,
    ),
    "retina": (
        {"kind": "npz", "path": D + "retina_vessels_3sites/vessels_256.npz", "patient_pattern": r"(\d+)[LR]$"},
        ["chasedb1", "drive", "stare"],
        (3, 256, 256),
        88,
    ),
    "brain sex": (
        {
            "kind": "table",
            "path": D + "brain_roi_tables_by_site/fcon1000_roi_23sites.csv.gz",
            "label": "sex",
            "patient": "sub_id",
            "leave_out": ["age"],
            "min_patients": 3,
        },
        ["oulu", "icbm", "pittsburgh"],
        (218,),
        1078,
    ),
    "brain age": (
        {
            "kind": "table",
            "path": D + "brain_roi_tables_by_site/openneuro_roi_6sites.csv.gz",
            "label": "age",
            "patient": "sub_id",
            "leave_out": ["sex", "sitenum"],
            "regression": True,
        },
        ["ds000115", "ds003826"],
        (245,),
        546,
    ),
    "pneumonia": (
        {
            "use": "pneumoniamnist",
            "path": D + "pneumoniamnist",
            "split": "official",
            "sites": {"partition": "dirichlet", "count": 8},
            "min_patients": 1,
        },
        ["site-1", "site-8"],
        (1, 28, 28),
        5856,
    ),
    "busi": (
        {"kind": "npz", "path": D + "busi/busi_128.npz", "sites": {"partition": "quantity", "count": 3}},
        ["site-1"],
        (1, 128, 128),
        780,
    ),
    "adrenal": (
        {
            "use": "adrenalmnist3d",
            "path": D + "adrenalmnist3d",
            "split": "official",
            "sites": {"partition": "iid", "count": 2},
        },
        ["site-1"],
        (1, 28, 28, 28),
        1584,
    ),
    "hippocampus": (
        {
            "kind": "pairs",
            "path": D + "msd_hippocampus/msd_task04_hippocampus_260.zip",
            "sites": {"partition": "iid", "count": 4},
            "steps": [{"step": "zscore"}, {"step": "crop_pad", "size": [40, 56, 40]}],
        },
        ["site-1"],
        (1, 40, 56, 40),
        260,
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "hippocampus" else n for n in sorted(SETS)]
)
def test_a_real_set_becomes_a_federation(real_data: Path, name: str) -> None:
    """Every example once, no patient in two places, inputs finite and of a sensible size, targets among the classes."""
    table, sites, shape, count = SETS[name]
    data = federate(DataSpec(**table))
    assert set(sites) <= set(data.sites)
    assert data.shape == shape
    assert sum(len(e) for roles in data.sites.values() for e in roles.values()) == count
    places: dict[str, set[tuple[str, str]]] = {}
    for site, roles in data.sites.items():
        for role, examples in roles.items():
            x, y = examples[torch.arange(min(len(examples), 8))]
            assert bool(torch.isfinite(x).all())
            assert float(x.abs().max()) < 100
            assert x.dtype == torch.float32
            if data.info.task == "regression":
                assert y.shape == (len(x), 1)
            else:
                assert int(y.max()) < len(data.info.classes)
            for patient in examples.patients:
                places.setdefault(patient, set()).add((site, role))
    assert all(len(where) == 1 for where in places.values())
    assert (data.simulated is None) == isinstance(table.get("sites", ""), str)


def test_both_eyes_of_a_child_stay_together(real_data: Path) -> None:
    """CHASE_DB1 holds 28 images of 14 children: with the pattern they are 14 patients."""
    data = federate(DataSpec(**SETS["retina"][0]))
    chase = {p for e in data.sites["chasedb1"].values() for p in e.patients}
    assert len(chase) == 14
    assert len({p for e in data.sites["drive"].values() for p in e.patients}) == 40


def test_the_hearts_prevalences_are_those_published(real_data: Path) -> None:
    """46, 36, 93 and 75 % at Cleveland, Budapest, Switzerland and Long Beach."""
    data = federate(DataSpec(**SETS["heart"][0]))
    shares = {row.name: [sum(r.classes[c] for r in row.roles.values()) for c in (0, 1)] for row in data.rows}
    percent = {site: round(100 * sick / (well + sick)) for site, (well, sick) in shares.items()}
    assert percent == {"cleveland": 46, "hungarian": 36, "switzerland": 93, "va": 74}


def test_known_duplicates_are_found(real_data: Path) -> None:
    """BUSI has one exact duplicate; dropped, 779 images are left."""
    data = federate(DataSpec(**SETS["busi"][0]))
    assert [len(d.ids) for d in data.duplicates] == [2]
    clean = federate(DataSpec(**SETS["busi"][0], duplicates="drop"))
    assert sum(len(e) for roles in clean.sites.values() for e in roles.values()) == 779

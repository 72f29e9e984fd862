"""Sites of which only some have labels, and a short run."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from polyclinic.core.method import Method
from polyclinic.core.rounds import Step, train
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree
from polyclinic.engines.local.in_process import InProcess
from tests.conftest import Rows, little_sites


def without_labels(site: Site) -> Site:
    """``site`` whose training examples are unlabeled."""
    data = site.data["train"]
    return replace(site, data={**site.data, "train": Rows(data.x[:0], data.y[:0]), "unlabeled": data})


def only_labels(site: Site) -> Site:
    """``site`` with nothing unlabeled."""
    return replace(site, data={role: data for role, data in site.data.items() if role != "unlabeled"})


def half_labeled(count: int = 3, labeled: int = 1, sites: Mapping[str, Site] | None = None) -> dict[str, Site]:
    """Sites of which only the first ``labeled`` have labels."""
    sites = sites or little_sites(count=count)
    return {
        name: only_labels(site) if i < labeled else without_labels(site) for i, (name, site) in enumerate(sites.items())
    }


def with_other_targets(sites: Mapping[str, Site]) -> dict[str, Site]:
    """The same sites, with other targets where they must not be used."""
    return {
        name: replace(
            site, data={r: Rows(d.x, torch.roll(d.y, 1, 0)) if r == "unlabeled" else d for r, d in site.data.items()}
        )
        for name, site in sites.items()
    }


def run(
    method: Method[Any],
    sites: Mapping[str, Site],
    params: Tree,
    rounds: int = 2,
    server_data: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> tuple[Step[Any], InProcess]:
    """The last step of a run in this process, and its engine; no site may be lost."""
    engine = InProcess(method, sites, server_data=server_data, seed=seed)
    for step in train(method, engine, method.init(params), rounds=rounds):
        assert not step.lost
    return step, engine


def same(a: Tree, b: Tree) -> bool:
    """Whether two trees are equal to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def near(a: Tree, b: Tree, atol: float = 1e-5) -> bool:
    """Whether two trees agree up to rounding."""
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], atol=atol) for name in a)

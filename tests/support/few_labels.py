"""Sites of which only some have labels, and a short run."""

from dataclasses import replace

import torch

from polyclinic.core.rounds import train
from polyclinic.engines.local.in_process import InProcess
from tests.conftest import Rows, little_sites


def without_labels(site):
    """``site`` whose training examples are unlabeled."""
    data = site.data["train"]
    return replace(site, data={**site.data, "train": Rows(data.x[:0], data.y[:0]), "unlabeled": data})


def only_labels(site):
    """``site`` with nothing unlabeled."""
    return replace(site, data={role: data for role, data in site.data.items() if role != "unlabeled"})


def half_labeled(count=3, labeled=1, sites=None):
    """Sites of which only the first ``labeled`` have labels."""
    sites = sites or little_sites(count=count)
    return {
        name: only_labels(site) if i < labeled else without_labels(site) for i, (name, site) in enumerate(sites.items())
    }


def with_other_targets(sites):
    """The same sites, with other targets where they must not be used."""
    return {
        name: replace(
            site, data={r: Rows(d.x, torch.roll(d.y, 1, 0)) if r == "unlabeled" else d for r, d in site.data.items()}
        )
        for name, site in sites.items()
    }


def run(method, sites, params, rounds=2, server_data=None, seed=0):
    """The last step of a run in this process, and its engine; no site may be lost."""
    engine = InProcess(method, sites, server_data=server_data, seed=seed)
    for step in train(method, engine, method.init(params), rounds=rounds):
        assert not step.lost
    return step, engine


def same(a, b):
    """Whether two trees are equal to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def near(a, b, atol=1e-5):
    """Whether two trees agree up to rounding."""
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], atol=atol) for name in a)

"""One table of everybody: every method keeps every promise, and gives the same bits on both engines."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import pytest

from polyclinic.core import tree
from polyclinic.core.method import Method, Request
from polyclinic.core.rounds import TooFewReplies, train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.engines.local.worker_pool import Workers
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification, MultiLabel
from polyclinic.learning.tasks.segmentation import Segmentation
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.catalog import METHODS
from polyclinic.methods.registry import Setting, build
from polyclinic.testing import check_engine, check_method
from tests.conftest import finding_sites, little_sites, segmentation_sites

IMAGES = Classification(Network("cnn", (1, 8, 8), 2, (("width", 4), ("depth", 2), ("dropout", 0.2))))
FINDINGS = MultiLabel(Network("cnn", (1, 8, 8), 3, (("width", 4), ("depth", 2))))
MASKS = Segmentation(Network("unet", (1, 16, 16), 2, (("width", 2), ("norm", "batch"))))
LOCAL = LocalTraining(epochs=1, batch_size=8, lr=0.05)
FEW_STEPS = {"lc-fed": {"head_steps": 2}, "stain-norm": {"exchanges": 2, "epochs": 1}, "vafl": {"epochs": 2}}
"""Options of methods that take hundreds of steps by default; the laws hold for any number of them."""


def case(name: str) -> tuple[Method[Any], Classification | MultiLabel | Segmentation, dict[str, Site]]:
    """The method called ``name`` on the kind of task it is for, and sites with such data."""
    kinds = METHODS[name].tasks
    task: Classification | MultiLabel | Segmentation = IMAGES
    sites = little_sites()
    if kinds and "classification" not in kinds:
        task, sites = (FINDINGS, finding_sites()) if "multilabel" in kinds else (MASKS, segmentation_sites())
    return build(name, Setting(task, LOCAL, tuple(sites), rounds=5), FEW_STEPS.get(name)), task, sites


def held_by_server(sites: Mapping[str, Site]) -> dict[str, Any]:
    """Images without a hospital, for the methods that need some at the server."""
    return {"public": sites["site-0"].data["public"]}


@pytest.mark.parametrize("name", METHODS)
def test_promises(name: str) -> None:
    method, task, sites = case(name)
    check_method(method, task.first(0), sites, server=Site("server", held_by_server(sites)))


# Whatever can pass between a site and the server in its own way: models, memory, several jobs a round, trees by site,
# gathers, what sites show one another, the server's own data. All other methods are slow tests.
QUICK = (
    "fedavg",
    "scaffold",
    "fedbn",
    "mime",
    "ifca",
    "krum",
    "fedmic",
    "fedsm",
    "feddf",
    "fedmd",
    "swarm",
    "split",
    "local",
    "combat",
    "feddyn",
    "data-vectors",
    "fedirm",
)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in METHODS])
def test_same_bits_in_worker_processes(name: str) -> None:
    method, task, sites = case(name)
    engines: list[Workers] = []

    def start(method: Method[Any], sites: Mapping[str, Site]) -> Workers:
        engines.append(Workers(method, sites, server_data=held_by_server(sites)))
        return engines[0]

    try:
        check_engine(start, method, task.first(0), sites, rounds=3, server_data=held_by_server(sites))
    finally:
        for engine in engines:
            engine.close()


class Turns(InProcess):
    """An engine in which every request reaches one site only, another one each time."""

    count = 0

    def send(self, request: Request, to: Sequence[str]) -> None:
        """Send to the next site."""
        self.count += 1
        super().send(request, [sorted(to)[self.count % len(to)]] if to else to)


ONCE = ("krum", "multi-krum", "bulyan", "fltrust")
"""Methods that say how many replies they need, or whose."""
FEW_EXCHANGES = ("fedavg", "fedmix-weights", "fedpid", "fedmix", "fedmic", "swarm")


@pytest.mark.parametrize(
    "name", [n if n in FEW_EXCHANGES else pytest.param(n, marks=pytest.mark.slow) for n in METHODS if n not in ONCE]
)
def test_a_round_whose_exchanges_reach_different_sites_ends(name: str) -> None:
    """A site may drop out after the first exchange of a round, and another one come back for the second."""
    method, task, sites = case(name)
    state, rounds = method.init(task.first(0)), 0
    with suppress(TooFewReplies):
        for step in train(method, Turns(method, sites, server_data=held_by_server(sites)), state, rounds=3):
            request = method.request(step.state)
            rounds = 3 if request is None else request.round
            assert tree.finite(method.shared_model(step.state))
    assert rounds == 3

"""Every method runs on networks of which parts are frozen, or is refused before the first round by a sentence."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import polyclinic
from polyclinic.core.method import Method
from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.engines.local.worker_pool import Workers
from polyclinic.learning.networks import model_tree
from polyclinic.learning.networks.fine_tuning import FineTuned
from polyclinic.learning.networks.model_tree import frozen
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.segmentation import Segmentation
from polyclinic.methods.catalog import METHODS
from polyclinic.methods.frozen_networks import NEEDS, frozen_problem
from polyclinic.methods.registry import Setting, build
from polyclinic.testing import check_engine, check_method
from tests.conftest import finding_sites, little_sites, segmentation_sites
from tests.laws.test_methods import FEW_STEPS, FINDINGS, LOCAL, held_by_server
from tests.support.start_weights import random_state, weights_of

CNN = Network("cnn", (1, 8, 8), 2, (("width", 4), ("depth", 2), ("dropout", 0.2)))
UNET = Network("unet", (1, 16, 16), 2, (("width", 2), ("norm", "batch")))
CLASSES, MASKS = Classification(CNN), Segmentation(UNET)
FREEZINGS = {
    "head": (("head",), ("head",)),
    "last block": (("encoder.4.*", "encoder.5.*", "head"), ("upcat_*", "head")),
}
REFUSED = {
    "head": {name for name, (parts, _) in NEEDS.items() if parts != ("head",)},
    "last block": {name for name, (parts, _) in NEEDS.items() if "adapters" in parts},
}
"""The methods that are refused, by what is trained; the reasons are in ``methods.frozen_networks``."""
UNTRAINED = ("case-statistics", "duplicate-search", "frozen")
"""The methods that train no model."""
QUICK = ("fedavg", "scaffold", "fedbn", "ditto", "mime", "fedmic", "feddg", "fedirm", "data-vectors", "split", "fedmri")


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("POLYCLINIC_WEIGHTS", str(tmp_path / "weights"))
    model_tree._cache.__dict__.clear()  # models of other tests would be taken for those of this one
    yield
    model_tree._cache.__dict__.clear()


def case(name: str, freezing: str) -> tuple[Any, dict[str, Site]]:
    """A task with frozen parts for the method called ``name``, and sites with such data."""
    kinds = METHODS[name].tasks
    train = FREEZINGS[freezing]
    if not kinds or "classification" in kinds:
        return CLASSES.with_network(FineTuned(CNN, weights_of(CNN), train[0])), little_sites()
    if "multilabel" in kinds:
        return FINDINGS.with_network(
            FineTuned(FINDINGS.network, weights_of(FINDINGS.network), train[0])
        ), finding_sites()
    return MASKS.with_network(FineTuned(UNET, weights_of(UNET), train[1])), segmentation_sites()


def built(name: str, task: Any, sites: dict[str, Site]) -> Method[Any]:
    return build(name, Setting(task, LOCAL, tuple(sites), rounds=5), FEW_STEPS.get(name))


@pytest.mark.parametrize("freezing", FREEZINGS)
@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in METHODS])
def test_promises_with_frozen_parts(name: str, freezing: str) -> None:
    task, sites = case(name, freezing)
    reason = frozen_problem(name, task)
    assert bool(reason) == (name in REFUSED[freezing]), reason
    if reason:
        assert reason.startswith(f"{name} needs trained ")
        return
    check_method(built(name, task, sites), task.first(0), sites, server=Site("server", held_by_server(sites)))
    if name not in UNTRAINED:
        assert_unchanged(task.network.network)


def assert_unchanged(network: Network) -> None:
    """Every model that was trained still holds the start weights, bit by bit."""
    given = {
        prefix + name: leaf
        for name, leaf in random_state(network).items()
        for prefix in ("", "backbone.", "base.", "teacher.", "student.", "net.", "first.", "second.")
    }
    count = 0
    for model in model_tree._cache.__dict__.get("models", {}).values():
        for name in frozen(model):
            count += 1
            key = name if name in given else next(k for k in given if name.endswith(f".{k}"))
            assert torch.equal(model.state_dict()[name], given[key]), name
    assert count


@pytest.mark.parametrize(
    "name", ["fedavg", "scaffold", "ditto", "fedavgm", pytest.param("fedmoco", marks=pytest.mark.slow)]
)
def test_frozen_parts_are_the_start_weights_after_three_rounds_in_both_engines(name: str) -> None:
    task, sites = case(name, "last block")
    method = built(name, task, sites)
    engines: list[Workers] = []

    def start(method: Method[Any], sites: Any) -> Workers:
        engines.append(Workers(method, sites, server_data=held_by_server(sites)))
        return engines[0]

    try:
        check_engine(start, method, task.first(0), sites, rounds=3, server_data=held_by_server(sites))
    finally:
        for engine in engines:
            engine.close()
    assert_unchanged(task.network.network)


def test_frozen_parts_count_in_no_byte() -> None:
    task, sites = case("fedavg", "head")
    method = built("fedavg", task, sites)
    state = method.init(task.first(0))
    request = method.request(state)
    assert request is not None
    assert request.nbytes("site-0") == 4 * (8 * 2 + 2)
    reply, _ = method.site_update(request, {}, sites["site-0"])
    assert reply.nbytes == 4 * (8 * 2 + 2)
    for step in train(method, InProcess(method, sites), state, rounds=1):
        assert set(step.state.params) == {"head.weight", "head.bias"}


def test_parameters_are_listed_in_one_place_only() -> None:
    """A method that lists parameters itself would train, clip or count frozen ones."""
    allowed = {
        "learning/networks/model_tree.py",  # the place
        "learning/networks/functional.py",  # all names, to replace any tensor for one evaluation
        "learning/training/gradient_memory.py",  # those with a gradient, after training
        "methods/personalization/lcfed_network.py",  # all tensors of a head, to store copies of it
        "learning/linear_model.py",  # a baseline that no method trains
        "learning/training/local.py",  # the dimension of convolutions, trained or not
        "learning/networks/network_parts.py",  # all tensors, to find head and encoder
        "attacks/inversion.py",  # the control network of the attack
        "learning/objectives/style_translation.py",  # the generator's own layers
        "methods/tensor_types.py",  # the element types of all layers, trained or not
    }
    folder = Path(polyclinic.__file__).parent
    found = {
        str(path.relative_to(folder))
        for path in folder.rglob("*.py")
        if re.search(r"\.(named_)?parameters\(", path.read_text(encoding="utf-8"))
    }
    assert found <= allowed

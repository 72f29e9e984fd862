"""Sites that keep the state of their optimizers: never sent, the same bits in every engine and after a resume."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from polyclinic.core.method import Method
from polyclinic.core.rounds import TooFewReplies, train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.engines.local.worker_pool import Workers
from polyclinic.engines.plan import Plan
from polyclinic.errors import ConfigError
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.image_augmentation import RECIPES
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.base.kept_optimizer import OWN_OPTIMIZERS, PREFIX, KeptOptimizer
from polyclinic.methods.catalog import METHODS as CATALOG
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.personalization.ditto import Ditto, ditto
from polyclinic.methods.registry import Setting, build
from polyclinic.testing import check_engine, check_method, equal, portable_copy
from tests.conftest import little_sites
from tests.laws.test_methods import FEW_STEPS, case, held_by_server

TASK = Classification(Network("cnn", (1, 8, 8), 2, (("width", 4), ("depth", 2), ("dropout", 0.2))))
LOCAL = LocalTraining(
    epochs=1,
    batch_size=8,
    lr=0.01,
    momentum=0.99,
    nesterov=True,
    schedule="poly",
    schedule_rounds=5,
    augmentation=RECIPES["nnunet"],
)
METHODS: dict[str, Method[Any]] = {
    "fedavg": KeptOptimizer(FedAvg(TASK, LOCAL)),
    "ditto": KeptOptimizer(ditto(TASK, LOCAL)),
}
PLAN: dict[str, Any] = {
    "kind": "classification",
    "network": "cnn",
    "inputs": (1, 8, 8),
    "outputs": 2,
    "sites": ("a", "b"),
    "rounds": 2,
    "training": {"momentum": 0.99},
}


@pytest.mark.parametrize("name", METHODS)
def test_promises(name: str) -> None:
    check_method(METHODS[name], TASK.first(0), little_sites())


@pytest.mark.parametrize("name", METHODS)
def test_same_bits_in_worker_processes_and_with_threads(name: str) -> None:
    engines = list[Workers]()

    def start(method: Method[Any], sites: Mapping[str, Site]) -> Workers:
        threaded = {n: replace(s, compute=replace(s.compute, threads=k)) for k, (n, s) in enumerate(sites.items())}
        engines.append(Workers(method, threaded))
        return engines[0]

    try:
        check_engine(start, METHODS[name], TASK.first(0), little_sites())
    finally:
        for engine in engines:
            engine.close()


def test_a_resumed_run_has_the_same_bits_and_forgetting_changes_them() -> None:
    method, sites = METHODS["fedavg"], little_sites()

    def rounds(state: Any, memory: Any, many: int) -> tuple[Any, Any]:
        engine = InProcess(method, sites, memory)
        for step in train(method, engine, state, rounds=state.round + many):
            assert not step.lost
            state = step.state
        return state, engine.memory

    whole = rounds(method.init(TASK.first(0)), None, 4)
    half, memory = rounds(method.init(TASK.first(0)), None, 2)
    assert equal(whole, rounds(portable_copy(half), portable_copy(memory), 2))
    assert not equal(whole[0], rounds(half, None, 2)[0])


def test_nothing_of_it_is_sent_and_the_inner_method_does_not_see_it() -> None:
    seen = []

    class Watched(Ditto):
        def site_update(self, request: Any, memory: Any, site: Site) -> Any:
            seen.append(set(memory))
            return super().site_update(request, memory, site)

    method: Method[Any] = KeptOptimizer(Watched(FedAvg(TASK, LOCAL), TASK, LOCAL))
    sites = little_sites()
    state = method.init(TASK.first(0))
    request = method.request(state)
    assert request is not None
    reply, memory = method.site_update(request, {}, sites["site-0"])
    plain, own = ditto(TASK, LOCAL).site_update(request, {}, sites["site-0"])
    assert reply.parts.keys() == plain.parts.keys()
    assert equal(reply, plain)  # the first round begins alike
    kept = {name for name in memory if name.startswith(PREFIX)}
    assert kept == {f"{PREFIX}train/", f"{PREFIX}train/personal"}  # one for each of Ditto's models
    assert {n: v.shape for n, v in memory[f"{PREFIX}train/"].items()} == {
        f"momentum/{n}": p.shape for n, p in TASK.model().named_parameters()
    }
    method.site_update(request, memory, sites["site-0"])
    assert seen == [set(), set(own)]
    assert equal(method.site_model(request, memory), own["personal"])


def test_a_plan_keeps_it_by_default_only_for_much_momentum() -> None:
    def inner(name: str = "fedavg", **training: Any) -> Any:
        return Plan(method=name, **{**PLAN, "training": {**PLAN["training"], **training}}).build_method().inner

    assert isinstance(inner(), KeptOptimizer)
    assert not isinstance(inner(momentum=0.9), KeptOptimizer)
    assert not isinstance(inner(keep_optimizer=False), KeptOptimizer)
    assert not isinstance(inner(private={"noise": 1.0}), KeptOptimizer)
    assert not isinstance(inner("apfl"), KeptOptimizer)  # takes its steps itself
    with pytest.raises(ConfigError, match="apfl takes individual training steps"):
        inner("apfl", keep_optimizer=True)
    with pytest.raises(ConfigError, match="FedNova's formula"):
        inner("fednova")
    inner("fednova", keep_optimizer=False)
    with pytest.raises(ConfigError, match="fedsgd takes the gradient of all examples as they are"):
        inner("fedsgd", augmentation=RECIPES["light"].to_table())
    with pytest.raises(ConfigError, match="FedNova's formula"):
        inner("fednova", momentum=0.5, nesterov=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", sorted(set(CATALOG) - {"scaffold", "fednova", "mime", "mime-lite", "fedcm", "split", "u-split"})
)
def test_methods_with_optimizers_of_their_own_are_declared(name: str) -> None:
    """All others train with ``fit``. Those that are left out refuse momentum, or such optimizers."""
    setting = LocalTraining(batch_size=8, lr=0.01, momentum=0.5, keep_optimizer=True)
    _, task, sites = case(name)
    options = FEW_STEPS.get(name)
    method: KeptOptimizer[Any] = KeptOptimizer(build(name, Setting(task, setting, tuple(sites), rounds=2), options))
    engine = InProcess(method, sites, server_data=held_by_server(sites))
    lost = list[str]()
    try:
        for step in train(method, engine, method.init(task.first(0)), rounds=2):
            lost += step.lost.values()
    except TooFewReplies as error:
        lost += error.lost.values()
    assert any("individual training steps" in why for why in lost) == (name in OWN_OPTIMIZERS)
    if name not in OWN_OPTIMIZERS:
        assert not lost


def test_a_plan_reads_augmentation_and_lists_from_json() -> None:
    table = RECIPES["nnunet"].to_table()
    training = {"augmentation": table, "milestones": [1, 2], "schedule": "poly", "schedule_rounds": 2}
    plan = Plan.from_json(Plan(method="fedavg", **{**PLAN, "training": training}).to_json())
    local = plan.build_local()
    assert local.augmentation == RECIPES["nnunet"]
    assert local.milestones == (1, 2)
    assert hash(local)
    assert torch.equal(torch.tensor(local.mirror_axes(3)), torch.arange(3))

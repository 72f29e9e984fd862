"""Limits in which a method is something simpler, and steps computed by hand."""

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch

from polyclinic.core import tree
from polyclinic.core.method import Method
from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.errors import ConfigError
from polyclinic.learning.networks.model_tree import gradient, load
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.task import InHead, InNormalization
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.catalog import METHODS
from polyclinic.methods.optimization.baselines import Cross, LocalOnly
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.optimization.fedopt import FedOpt
from polyclinic.methods.optimization.fedprox import FedProx
from polyclinic.methods.optimization.fedsgd import FedSGD
from polyclinic.methods.optimization.scaffold import Scaffold
from polyclinic.methods.personalization.partial_personalization import Personal, fedbn, fedper, lg_fedavg, silobn
from polyclinic.methods.registry import Setting, UnknownMethod, build, entry
from polyclinic.testing import close, equal
from tests.conftest import Rows, little_sites

PLAIN = Classification(Network("mlp", (1, 8, 8), 2, (("width", 8),)))  # without normalization


def run(method: Method[Any], sites: dict[str, Site], params: tree.Tree, rounds: int = 3) -> tuple[Any, InProcess]:
    engine = InProcess(method, sites)
    state = method.init(params)
    for step in train(method, engine, state, rounds=rounds):
        assert not step.lost
        state = step.state
    return state, engine


def test_one_site_is_local_training(task: Classification, local: LocalTraining) -> None:
    site = little_sites()["site-1"]
    state, _ = run(FedAvg(task, local), {"site-1": site}, task.first(0))
    params = task.first(0)
    for r in range(3):
        params = local.fit(task, params, site, r)
    assert close(state.params, params)


def test_fedavg_is_the_mean_by_examples(task: Classification, local: LocalTraining) -> None:
    sites, start = little_sites(), task.first(0)
    state, _ = run(FedAvg(task, local), sites, start, rounds=1)
    ends = {name: local.fit(task, start, site, 0) for name, site in sites.items()}
    sizes = [len(site.data["train"]) for site in sites.values()]
    for name in start:
        expected = np.average([end[name].double().numpy() for end in ends.values()], axis=0, weights=sizes)
        assert np.allclose(state.params[name].numpy(), expected, atol=1e-5)


def test_fedprox_without_pull_is_fedavg(task: Classification, local: LocalTraining) -> None:
    expected = run(FedAvg(task, local), little_sites(), task.first(0))[0]
    assert equal(run(FedProx(task, local, mu=0.0), little_sites(), task.first(0))[0], expected)
    assert not equal(run(FedProx(task, local, mu=0.5), little_sites(), task.first(0))[0], expected)


def test_fedsgd_is_one_step_down_the_pooled_gradient(local: LocalTraining) -> None:
    sites, start = little_sites(), PLAIN.first(0)
    state, _ = run(FedSGD(PLAIN, local), sites, start, rounds=1)
    x = torch.cat([s.data["train"].x for s in sites.values()])
    y = torch.cat([s.data["train"].y for s in sites.values()])
    model = load(PLAIN.model(), start)
    g = gradient(PLAIN.loss(model, (x, y)), model)
    assert close(state.params, {name: start[name] - local.lr * g[name] for name in start})
    chunks = replace(FedSGD(PLAIN, local), chunk=5)
    assert close(run(chunks, sites, start, rounds=1)[0], state)


def test_fedsgd_is_fedavg_of_one_full_batch_step() -> None:
    sites, start = little_sites(), PLAIN.first(0)
    full = LocalTraining(epochs=1, batch_size=1000, lr=0.1)
    assert close(run(FedSGD(PLAIN, full), sites, start)[0], run(FedAvg(PLAIN, full), sites, start)[0])


def test_one_site_scaffold_is_fedavg(task: Classification, local: LocalTraining) -> None:
    one = {"site-0": little_sites()["site-0"]}
    state, _ = run(Scaffold(task, 1, local), one, task.first(0), rounds=2)
    expected, _ = run(FedAvg(task, local), one, task.first(0), rounds=2)
    assert close(state.params, expected.params)


def test_scaffolds_control_is_the_mean_of_the_sites(task: Classification, local: LocalTraining) -> None:
    state, engine = run(Scaffold(task, 3, local), little_sites(), task.first(0))
    controls = [memory["control"] for memory in engine.memory.values()]
    mean = {name: torch.stack([c[name] for c in controls]).mean(0) for name in controls[0]}
    assert close(state.control, mean)


def test_scaffold_refuses_another_optimizer(task: Classification) -> None:
    with pytest.raises(ValueError, match=r'set training\.optimizer = "sgd"'):
        Scaffold(task, 3, LocalTraining(optimizer="adam"))


def test_server_momentum_without_memory_is_fedavg(task: Classification, local: LocalTraining) -> None:
    state, _ = run(build("fedavgm", Setting(task, local, (), 2), {"beta1": 0.0}), little_sites(), task.first(0))
    assert close(state.params, run(FedAvg(task, local), little_sites(), task.first(0))[0].params)


@pytest.mark.parametrize("rule", ["adagrad", "adam", "yogi"])
def test_one_adaptive_step_by_hand(
    rule: Literal["adagrad", "adam", "yogi"], task: Classification, local: LocalTraining
) -> None:
    start, sites = task.first(0), little_sites()
    plain = run(FedAvg(task, local), sites, start, rounds=1)[0].params
    delta = {name: (plain[name] - start[name]).double().numpy() for name in start}
    state, _ = run(FedOpt(task, local, rule, lr=0.1, beta1=0.9, beta2=0.99, tau=1e-3), sites, start, rounds=1)
    for name, _ in task.model().named_parameters():
        d, v0 = delta[name], 1e-6
        m = 0.1 * d
        v = {"adagrad": v0 + d**2, "adam": 0.99 * v0 + 0.01 * d**2, "yogi": v0 - 0.01 * d**2 * np.sign(v0 - d**2)}[rule]
        expected = start[name].numpy() + 0.1 * m / (np.sqrt(v) + 1e-3)
        assert np.allclose(state.params[name].numpy(), expected, atol=1e-5)
    statistics = [name for name in start if "running" in name]
    assert statistics
    assert all(torch.allclose(state.params[name], plain[name]) for name in statistics)


def test_keeping_nothing_is_the_inner_method_and_keeping_all_is_local(
    task: Classification, local: LocalTraining
) -> None:
    sites, start = little_sites(), task.first(0)
    state, _ = run(Personal(FedAvg(task, local), lambda name: False), sites, start)
    assert equal(state.inner, run(FedAvg(task, local), sites, start)[0])
    everything, engine = run(Personal(FedAvg(task, local), lambda name: True), sites, start)
    assert not everything.inner.params
    _, alone = run(LocalOnly(task, local), sites, start)
    assert close([m["own"] for m in engine.memory.values()], [m["params"] for m in alone.memory.values()])


def test_fedbn_without_normalization_is_fedavg(local: LocalTraining) -> None:
    sites, start = little_sites(), PLAIN.first(0)
    assert equal(run(fedbn(PLAIN, local), sites, start)[0].inner, run(FedAvg(PLAIN, local), sites, start)[0])


@pytest.mark.parametrize("make", [fedbn, silobn, fedper, lg_fedavg])
def test_what_is_kept_never_leaves(make: Any, task: Classification, local: LocalTraining) -> None:
    method = make(task, local)
    engine = InProcess(method, little_sites())
    for step in train(method, engine, method.init(task.first(0)), rounds=2):
        sent = set(step.reply.mean("update").total)
        assert not any(method.keep(name) for name in sent)
        assert sent | {name for name in task.first(0) if method.keep(name)} == set(task.first(0))
        assert sum(step.bytes_up.values()) < 3 * tree.nbytes(task.first(0))


def test_fedbn_and_silobn_keep_what_the_papers_say(task: Classification, local: LocalTraining) -> None:
    norm = {name for name in task.first(0) if InNormalization(task)(name)}
    bn, silo = fedbn(task, local), silobn(task, local)
    assert {n for n in task.first(0) if bn.keep(n)} == norm
    assert {n for n in task.first(0) if silo.keep(n)} == {n for n in norm if "running" in n}
    assert {n for n in task.first(0) if fedper(task, local).keep(n)} == {"head.weight", "head.bias"}


def test_a_site_predicts_with_its_own_parts_and_a_new_site_with_the_first(
    task: Classification, local: LocalTraining
) -> None:
    method = fedper(task, local)
    state, engine = run(method, little_sites(), task.first(0))
    request = method.evaluation_request(state)
    models = {name: method.site_model(request.for_site(name), memory) for name, memory in engine.memory.items()}
    assert not equal(models["site-0"]["head.weight"], models["site-1"]["head.weight"])
    assert equal(models["site-0"]["encoder.0.weight"], models["site-1"]["encoder.0.weight"])
    new = method.site_model(request, {})
    assert equal(new["head.weight"], task.first(0)["head.weight"])
    assert equal(new, state.params)


def test_personal_wraps_scaffold(task: Classification, local: LocalTraining) -> None:
    """Heads stay at the sites, where they differ; all else is shared, and moves."""
    start = task.first(0)
    state, engine = run(Personal(Scaffold(task, 3, local), InHead(task)), little_sites(), start, rounds=2)
    assert {name for name in start if name not in state.inner.params} == {"head.weight", "head.bias"}
    heads = [memory["own"]["head.weight"] for memory in engine.memory.values()]
    assert not torch.equal(heads[0], heads[1])
    assert not torch.equal(state.inner.params["encoder.0.weight"], start["encoder.0.weight"])


def test_nothing_leaves_a_site_that_trains_alone(task: Classification, local: LocalTraining) -> None:
    method = LocalOnly(task, local)
    for step in train(method, InProcess(method, little_sites()), method.init(task.first(0)), rounds=2):
        assert sum(step.bytes_up.values()) == 0


def test_cross_predicts_with_another_sites_model(task: Classification, local: LocalTraining) -> None:
    method = Cross(task, local)
    state, engine = run(method, little_sites(), task.first(0))
    request = method.evaluation_request(state)
    for name, other in (("site-0", "site-1"), ("site-1", "site-2"), ("site-2", "site-0")):
        assert equal(method.site_model(request.for_site(name), engine.memory[name]), engine.memory[other]["params"])


def test_pooled_is_training_on_all_data_in_one_place(task: Classification, local: LocalTraining) -> None:
    parts, start = [site.data["train"] for site in little_sites().values()], task.first(0)
    everything = Site("pooled", {"train": Rows(torch.cat([p.x for p in parts]), torch.cat([p.y for p in parts]))})
    state, _ = run(build("pooled", Setting(task, local, ("pooled",), 2)), {"pooled": everything}, start)
    expected = start
    for r in range(3):
        expected = local.fit(task, expected, everything, r)
    assert close(state.params, expected)
    assert entry("pooled").pooled
    assert [name for name in METHODS if METHODS[name].pooled] == ["pooled"]


def test_a_wrong_name_is_answered_with_a_near_one() -> None:
    with pytest.raises(UnknownMethod, match='Did you mean "fedprox"'):
        entry("fedproxx")


def test_an_option_that_a_name_fixes_is_refused(task: Classification, local: LocalTraining) -> None:
    with pytest.raises(ConfigError, match="fedadam: rule cannot be set: this name means rule = adam"):
        build("fedadam", Setting(task, local, (), 2), {"rule": "yogi", "beta1": 0.5})


def test_adagrad_has_no_first_moment_unless_it_is_set(task: Classification, local: LocalTraining) -> None:
    setting = Setting(task, local, (), 2)
    assert build("fedadagrad", setting) == FedOpt(task, local, "adagrad", beta1=0.0)
    assert build("fedadagrad", setting, {"beta1": 0.9}) == FedOpt(task, local, "adagrad", beta1=0.9)

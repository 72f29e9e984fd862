"""Fine-tuning, FedBABU, Per-FedAvg, FedALA and FedSoup against their steps, written again with PyTorch's optimizers."""

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch.nn import functional as F

from polyclinic.core import tree
from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.errors import ConfigError
from polyclinic.learning.networks.model_tree import params_of
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.risk import risk
from polyclinic.learning.tasks.task_evaluation import Evaluated, evaluate, outputs
from polyclinic.learning.training.dp_sgd import DPSGD
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.local_adaptation import fedala
from polyclinic.methods.local_adaptation.fedala import FedALA
from polyclinic.methods.local_adaptation.fedbabu import fedbabu
from polyclinic.methods.local_adaptation.fedsoup import FedSoup, Soup
from polyclinic.methods.local_adaptation.fine_tuned import fine_tuned
from polyclinic.methods.local_adaptation.per_fedavg import PerFedAvg
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.testing import close, equal
from tests.conftest import Rows, blobs
from tests.support.agreement import KINDS, agree, change, minibatches, place, ready, restore, statistics
from tests.support.known import known

LOCAL = LocalTraining(epochs=2, batch_size=8, lr=0.05)
NAMES = ("site-0", "site-1", "site-2")


def ran(method: Any, params: Any, sites: Any, rounds: Any = 2) -> Any:
    engine, state = InProcess(method, sites), method.init(params)
    for step in train(method, engine, state, rounds=rounds):
        state = step.state
    return state, engine


def sgd(task: Any, params: Any, batches: Any, lr: Any = 0.05, names: Any = None) -> Any:
    """Plain training on ``batches``, of all parameters or of those with a name among ``names``."""
    model = ready(task, params)
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if names is None or n in names], lr)
    for x, y in batches:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("part", ["all", "head", "body"])
@pytest.mark.parametrize("kind", KINDS)
def test_fine_tuning_is_training_from_the_shared_model(kind: str, part: Literal["all", "head", "body"]) -> None:
    task, sites = place(kind)
    method = fine_tuned(task, LOCAL, NAMES, 3, epochs=3, part=part)
    state, engine = ran(method, task.first(), sites)
    plain, _ = ran(FedAvg(task, LOCAL), task.first(), sites)
    assert equal(state.params, plain.params)
    site, request = sites["site-1"], method.evaluation_request(state)
    found = method.adapted_model(request, engine.memory["site-1"], site, "test")
    learned = [n for n, _ in task.model().named_parameters()]
    names = {n for n in learned if part == "all" or task.network.in_head(n) == (part == "head")}
    batches = minibatches(replace(LOCAL, epochs=3), site, 2, "fine-tuned")
    agree(found, params_of(sgd(task, state.params, batches, names=names)))
    moved = {n for n in learned if not torch.equal(found[n], state.params[n])}
    assert moved <= names
    assert all("cross_attn" in n for n in names - moved)  # which MONAI's ViT has and does not use
    assert equal(method.site_model(request, {}), state.params)  # what a file holds is the shared model


def test_fine_tuning_changes_evaluation_only_and_at_training_sites_only(
    task: Classification, sites: dict[str, Site]
) -> None:
    method = Evaluated(fine_tuned(task, LOCAL, NAMES, 3, epochs=4), task)
    state, engine = ran(method, task.first(), sites)
    stranger = Site("elsewhere", {"test": blobs(9, 10, (1, 8, 8))})
    everyone = InProcess(method, {**sites, "elsewhere": stranger}, engine.memory)
    found = evaluate(method, everyone, state, [*NAMES, "elsewhere"], "predict/test")
    for name in NAMES:
        model = method.inner.adapted_model(method.evaluation_request(state), {}, sites[name], "test")
        assert equal(found[name]["score"], outputs(task, model, sites[name].data["test"])["score"])
        shared = outputs(task, state.params, sites[name].data["test"])["score"]
        assert not torch.allclose(found[name]["score"], shared)
    assert equal(found["elsewhere"]["score"], outputs(task, state.params, stranger.data["test"])["score"])
    none = fine_tuned(task, LOCAL, NAMES, 3, epochs=0)
    assert none.adapted_model(none.evaluation_request(state), {}, sites["site-0"], "test") is state.params


def test_fine_tuning_surrounds_any_method_and_is_not_private(task: Classification, sites: dict[str, Site]) -> None:
    around = fine_tuned(task, LOCAL, NAMES, 3, over="fedbn")
    state, engine = ran(around, task.first(), sites)
    memory = engine.memory["site-0"]
    request = around.evaluation_request(state)
    begin = around.inner.site_model(request, memory)
    found = around.adapted_model(request, memory, sites["site-0"], "test")
    assert close(found, around.tuning.fit(task, begin, sites["site-0"], 2, slot="fine-tuned"))
    assert type(fine_tuned(task, DPSGD(batch_size=8), NAMES, 3).tuning) is LocalTraining
    inner = fine_tuned(task, LOCAL, NAMES, 3, uniform=True).inner
    assert isinstance(inner, FedAvg)
    assert inner.uniform
    with pytest.raises(ConfigError, match="0 or more epochs"):
        fine_tuned(task, LOCAL, NAMES, 3, epochs=-1)


@pytest.mark.parametrize("kind", KINDS)
def test_fedbabu_trains_the_body_against_a_fixed_head(kind: str) -> None:
    task, sites = place(kind)
    method = fedbabu(task, LOCAL, epochs=1)
    request = known(method.request(method.init(task.first())))
    found = method.site_update(request, {}, sites["site-0"])[0].mean("update").value
    body = {n for n, _ in task.model().named_parameters() if not task.network.in_head(n)}
    wanted = change(sgd(task, task.first(), minibatches(LOCAL, sites["site-0"]), names=body), task.first())
    agree(found, wanted)
    head = [n for n in found if task.network.in_head(n)]
    assert head
    assert not any(found[n].any() for n in head)
    state, _ = ran(method, task.first(), sites)
    tuned = method.adapted_model(method.evaluation_request(state), {}, sites["site-0"], "test")
    assert all(equal(state.params[n], task.first()[n]) and not equal(tuned[n], state.params[n]) for n in head)


@pytest.mark.parametrize("kind", KINDS)
def test_per_fedavgs_steps_are_the_published_ones(kind: str) -> None:
    """A trial step on one minibatch, the gradient on another, and the step from where it began."""
    task, sites = place(kind)
    method, local = PerFedAvg(task, replace(LOCAL, batch_size=4), alpha=0.3), replace(LOCAL, batch_size=8)
    found = method.site_update(method.request(method.init(task.first())), {}, sites["site-2"])[0].mean("update").value
    model = ready(task, task.first())
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for x, y in minibatches(local, sites["site-2"]):
        half = min(4, (len(x) + 1) // 2)
        kept, before = statistics(model), [p.detach().clone() for p in model.parameters()]
        model.zero_grad()
        F.cross_entropy(model(x[:half]), y[:half]).backward()
        restore(model, kept)
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(0.3 * (0 if p.grad is None else p.grad))
        model.zero_grad()
        F.cross_entropy(model(x[half:]), y[half:]).backward()
        with torch.no_grad():
            for p, old in zip(model.parameters(), before, strict=True):
                p.copy_(old)
        optimizer.step()
    agree(found, change(model, task.first()))


def test_per_fedavgs_second_order_is_the_gradient_of_its_objective() -> None:
    """Against finite differences of F(w − α ∇F(w)) in double precision, along a random direction."""
    task, sites = place("cnn, group, 3-D")
    method = PerFedAvg(task, LOCAL, alpha=0.2, second_order=True)
    model = ready(task, task.first()).double()
    data = sites["site-1"].data["train"]
    batch = (data.x[:16].double(), data.y[:16])
    exact = torch.autograd.grad(method.loss(model, batch), list(model.parameters()))
    first = PerFedAvg(task, LOCAL, alpha=0.2)
    rough = torch.autograd.grad(first.loss(model, batch), list(model.parameters()))
    generator = torch.Generator().manual_seed(0)
    toward = {n: torch.randn(p.shape, generator=generator).double() for n, p in model.named_parameters()}

    def objective(by: float) -> float:
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.add_(by * toward[n])
        value = float(method.loss(model, batch).detach())
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.sub_(by * toward[n])
        return value

    slope = (objective(1e-7) - objective(-1e-7)) / 2e-7
    along = [float(sum((g * toward[n]).sum() for n, g in zip(toward, gs, strict=True))) for gs in (exact, rough)]
    assert along[0] == pytest.approx(slope, rel=1e-5)
    assert along[1] != pytest.approx(slope, rel=1e-3)


def test_per_fedavg_predicts_after_one_step_and_without_a_step_is_fedavg(
    task: Classification, sites: dict[str, Site]
) -> None:
    method = PerFedAvg(task, LOCAL, alpha=0.5)
    state, _ = ran(method, task.first(), sites)
    request = method.evaluation_request(state)
    found = method.adapted_model(request, {}, sites["site-0"], "test")
    batch = next(minibatches(replace(LOCAL, steps=1), sites["site-0"], 2, "adapted"))
    agree(found, params_of(sgd(task, state.params, [batch], 0.5)))
    none = PerFedAvg(task, LOCAL, alpha=0.0)
    halves = [method.request(method.init(task.first()))]
    a = none.site_update(halves[0], {}, sites["site-0"])[0].mean("update").value
    second = [
        (x[min(8, -(-len(x) // 2)) :], y[min(8, -(-len(x) // 2)) :])
        for x, y in minibatches(replace(LOCAL, batch_size=16), sites["site-0"])
    ]
    agree(a, change(sgd(task, task.first(), second), task.first()))
    with pytest.raises(ConfigError, match="alpha must be at least 0"):
        PerFedAvg(task, LOCAL, alpha=-1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_fedalas_weights_are_the_published_ones(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """First until the losses of ten passes hardly differ, later for one pass, on a part of the training examples."""
    monkeypatch.setattr(fedala, "SPREAD", 0.004)
    task, sites = place(kind)
    method, site = FedALA(task, LOCAL, rate=1.0, share=0.7), sites["site-2"]
    shared, own = task.first(0), task.first(1)
    learned = [n for n, _ in task.model().named_parameters() if task.network.in_head(n)]
    data = site.data["train"]
    count = int(0.7 * len(data))
    weights = {n: torch.ones_like(own[n]) for n in learned}
    passes: list[int] = []
    kept = None
    for round, first_time in ((1, True), (2, False)):
        begin = int(torch.randint(len(data) - count + 1, (), generator=site.rng(round, "mixture")))
        model, losses = ready(task, {**shared, **{n: own[n] for n in learned}}), []
        while True:
            for k in range(begin, begin + count, 8):
                place_of = slice(k, min(k + 8, begin + count))
                named = dict(model.named_parameters())
                with torch.no_grad():
                    for n in learned:
                        named[n].copy_(own[n] + (shared[n] - own[n]) * weights[n])
                model.zero_grad()
                loss = F.cross_entropy(model(data.x[place_of]), data.y[place_of])
                loss.backward()
                for n in learned:
                    weights[n] = torch.clamp(weights[n] - known(named[n].grad) * (shared[n] - own[n]), 0, 1)
            losses.append(loss.item())
            spread = torch.tensor(losses[-10:]).double().std(correction=0)
            if not first_time or len(losses) == 100 or (len(losses) > 10 and spread < 0.004):
                break
        passes.append(len(losses))
        start, found = method.mixed(shared, own, kept, site, round)
        kept = found
        agree(found, weights)
        agree(start, {**shared, **{n: own[n] + (shared[n] - own[n]) * weights[n] for n in learned}})
    assert passes[0] > 10
    assert passes[1] == 1
    assert any(bool((w != 1).any()) for w in weights.values())


def test_fedalas_first_round_is_fedavg_and_then_the_head_is_its_own(
    task: Classification, sites: dict[str, Site]
) -> None:
    method, plain = FedALA(task, LOCAL), FedAvg(task, LOCAL)
    request = plain.request(plain.init(task.first()))
    reply, memory = method.site_update(request, {}, sites["site-0"])
    assert equal(reply, plain.site_update(request, {}, sites["site-0"])[0])
    later = replace(request, round=1, trees={"params": task.first(5)})
    end = method.site_update(later, memory, sites["site-0"])[1]
    assert set(end["weights"]) == {"head.weight", "head.bias"}
    assert equal(method.site_model(later, end), end["own"])
    whole = FedALA(task, LOCAL, part="all").site_update(later, memory, sites["site-0"])[1]["weights"]
    assert set(whole) == {n for n, _ in task.model().named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_fedsoup_interpolates_as_published(kind: str) -> None:
    """The two candidates, which of them has the lower loss, and the new soup."""
    task, sites = place(kind)
    method, site = FedSoup(task, 4, LOCAL, begin=0.0), sites["site-1"]
    learned = [n for n, _ in task.model().named_parameters()]
    soup, k = Soup({}, 0), 0
    mean = {n: torch.zeros_like(task.first()[n]) for n in learned}
    for seed in range(6):
        own, shared = LOCAL.fit(task, task.first(seed), site, seed), task.first(seed + 10 * (seed % 2))
        one = {**own, **{n: own[n] / (k + 1) + mean[n] * k / (k + 1) for n in learned}}
        two = {**own, **{n: own[n] / (k + 2) + mean[n] * k / (k + 2) + shared[n] / (k + 2) for n in learned}}
        chosen = risk(task, two, site, 0, "val") < risk(task, one, site, 0, "val")
        if chosen:
            mean, k = {n: (k * mean[n] + shared[n]) / (k + 1) for n in learned}, k + 1
        found, soup = method.interpolated(own, shared, soup, site, 0)
        agree(found, two if chosen else one)
        assert soup.size == k
        if k:
            agree(soup.mean, mean)


def test_fedsoup_begins_late_and_until_then_is_fedavg(task: Classification, sites: dict[str, Site]) -> None:
    soup, engine = ran(FedSoup(task, 4, LOCAL, begin=0.5), task.first(), sites, 2)
    plain, _ = ran(FedAvg(task, LOCAL), task.first(), sites, 2)
    assert equal(soup.params, plain.params)
    assert "count" not in engine.memory["site-0"]
    coarse = replace(LOCAL, lr=2.0)  # from whose end a mean leads back
    late, engine = ran(FedSoup(task, 4, coarse, begin=0.5), task.first(), sites, 3)
    assert not equal(late.params, ran(FedAvg(task, coarse), task.first(), sites, 3)[0].params)
    assert all("count" in memory for memory in engine.memory.values())
    with pytest.raises(ConfigError, match="share of the rounds"):
        FedSoup(task, 4, LOCAL, begin=1.5)
    blind = {n: Site(n, {"train": s.data["train"]}) for n, s in sites.items()}
    assert tree.finite(ran(FedSoup(task, 2, LOCAL, begin=0.0), task.first(), blind, 2)[0].params)


def test_a_site_without_training_examples_is_served_by_all(task: Classification) -> None:
    site = Site(
        "elsewhere", {"test": blobs(3, 8, (1, 8, 8)), "train": Rows(torch.zeros(0, 1, 8, 8), torch.zeros(0).long())}
    )
    for method in (PerFedAvg(task, LOCAL), fedbabu(task, LOCAL), fine_tuned(task, LOCAL, NAMES, 2)):
        request = method.evaluation_request(method.init(task.first()))
        assert equal(method.adapted_model(request, {}, site, "test"), task.first())

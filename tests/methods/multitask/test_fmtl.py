"""Gated experts and the supervised contrast by their equations, what stays private, and sites with fewer classes."""

from typing import Any, cast

import numpy as np
import pytest
import torch
from scipy.special import logsumexp, softmax
from torch.nn import functional as F

from polyclinic.core.site import Site
from polyclinic.learning.networks.model_tree import load, params_of
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.objectives.contrastive import WithContrast
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.task_evaluation import Evaluated, evaluate
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.multitask.fmtl import fmtl
from polyclinic.methods.multitask.gated_experts import GatedHead, begin, gated
from polyclinic.methods.multitask.private_heads import limited, private_heads
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.personalization.partial_personalization import fedper
from tests.conftest import little_sites
from tests.support.agreement import KINDS, agree, entering, in_head, largest_gap, mean, minibatches, place
from tests.support.few_labels import near, run, same

LINEAR = Classification(Network("mlp", (5,), 3, (("depth", 0),)))
LOCAL = LocalTraining(epochs=2, batch_size=8, lr=0.1)


def normal(*shape: Any) -> Any:
    return torch.randn(*shape, generator=Site("s").rng("x"))


def test_the_gate_mixes_experts_as_the_equation_says() -> None:
    head, h = GatedHead(4, 3, 5, 6), normal(7, 4)
    x = h.double().numpy()
    P = {k: v.detach().double().numpy() for k, v in head.named_parameters()}
    share = softmax(x @ P["gate.weight"].T + P["gate.bias"], 1)
    said = [np.maximum(x @ P[f"experts.{e}.0.weight"].T + P[f"experts.{e}.0.bias"], 0) for e in range(5)]
    mixed = sum(share[:, [e]] * said[e] for e in range(5))
    assert np.allclose(head(h).detach().numpy(), mixed @ P["tower.weight"].T + P["tower.bias"], atol=1e-5)


def test_one_expert_needs_no_gate() -> None:
    head, h = GatedHead(4, 3, 1, 6), normal(7, 4)
    assert torch.allclose(head(h), head.tower(head.experts[0](h)), atol=1e-6)


def test_the_contrast_is_its_equation_in_numpy() -> None:
    learner = WithContrast(LINEAR, weight=0.5, temperature=0.2)
    model, x, y = learner.model(), normal(9, 5), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 1])
    z = x.double().numpy()
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    terms = []
    for i in range(9):
        a, p = [j for j in range(9) if j != i], [j for j in range(9) if j != i and y[j] == y[i]]
        terms.append(-np.mean([z[i] @ z[j] / 0.2 - logsumexp(z[a] @ z[i] / 0.2) for j in p]))
    wanted = LINEAR.loss(model, (x, y)).item() + 0.5 * np.mean(terms)
    assert learner.loss(model, (x, y)).item() == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("name", ["cnn", "densenet121", "resnet10"])
def test_any_classifier_can_have_gated_experts(name: str) -> None:
    task = gated(Classification(Network(name, (1, 32, 32), 3)), 2, 8)
    assert task.model().eval()(normal(2, 1, 32, 32)).shape == (2, 3)


def test_it_begins_with_the_studys_encoder(task: Classification) -> None:
    mixed, params = gated(task, 3, 8), task.first(7)
    whole = begin(mixed, params)
    assert all(torch.equal(whole[k], v) for k, v in params.items() if not k.startswith("head."))
    assert "head.gate.weight" in whole
    assert "head.weight" not in whole


def test_gates_and_towers_stay_and_experts_travel(task: Classification, sites: dict[str, Site]) -> None:
    method: Evaluated[Any] = Evaluated(fmtl(task, LOCAL, tuple(sites)), task)
    step, engine = run(method, sites, task.first(0), 3)
    sent = step.reply.mean("update").total
    assert any("experts" in name for name in sent)
    assert not any("gate" in name or "tower" in name for name in sent)
    own = [engine.memory[name]["own"] for name in sites]
    assert own[0].keys() == {"head.gate.weight", "head.gate.bias", "head.tower.weight", "head.tower.bias"}
    assert not near(own[0], own[1])
    scores = evaluate(method, engine, step.state, engine.sites)
    assert sum(float(s["accuracy"]) for s in scores.values()) / 3 > 0.8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("disorders", [(), ("asd", "adhd", "asd")])
def test_two_rounds_are_those_of_the_equations(disorders: tuple[str, ...], kind: str) -> None:
    """Gate, experts and tower written out, with the supervised contrast, PyTorch's SGD, and means by disorder."""
    task, sites = place(kind)
    local = LocalTraining(epochs=1, batch_size=8, lr=0.1)
    method = fmtl(task, local, tuple(sites), disorders=disorders, experts=3, width=6, contrast=0.4, temperature=0.5)
    step, engine = run(method, sites, task.first(), 2)

    mixed = gated(task, 3, 6)
    models, groups = dict.fromkeys(sites, begin(mixed, task.first())), disorders or tuple(sites)
    sizes = dict(zip(sites, (12.0, 17.0, 22.0), strict=True))
    for round in range(2):
        for name, site in sites.items():
            model = load(mixed.model(), models[name]).train()
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            for x, y in minibatches(local, site, round):
                h, _ = entering(model, x)
                own = {n.partition("head.")[2]: p for n, p in model.named_parameters() if in_head(n)}
                own = {n.removeprefix("0."): p for n, p in own.items()}
                share = (h @ own["gate.weight"].T + own["gate.bias"]).exp()
                share = share / share.sum(1, keepdim=True)
                experts = [F.relu(h @ own[f"experts.{e}.0.weight"].T + own[f"experts.{e}.0.bias"]) for e in range(3)]
                blend = torch.stack([share[:, [e]] * experts[e] for e in range(3)]).sum(0)
                answer = blend @ own["tower.weight"].T + own["tower.bias"]
                u = h / h.norm(dim=1, keepdim=True)
                likeness, others = u @ u.T / 0.5, ~torch.eye(len(x), dtype=torch.bool)
                log = likeness - (likeness.exp() * others).sum(1, keepdim=True).log()
                alike = (y[:, None] == y) & others
                each = torch.stack([log[i][alike[i]].mean() for i in range(len(x)) if alike[i].any()])
                optimizer.zero_grad()
                (F.cross_entropy(answer, y) - 0.4 * each.mean()).backward()
                optimizer.step()
            models[name] = params_of(model)
        ends = dict(models)
        for name, group in zip(sites, groups, strict=True):
            near_ones = [n for n, g in zip(sites, groups, strict=True) if g == group]
            of_group = mean([ends[n] for n in near_ones], [sizes[n] for n in near_ones])
            of_all = mean(list(ends.values()), list(sizes.values()))
            models[name] = {n: of_group[n] if ".gate." in n or ".tower." in n else of_all[n] for n in of_all}
    request = method.evaluation_request(step.state)
    for name, wanted in models.items():
        found = method.site_model(request.for_site(name), engine.memory.get(name, {}))
        agree({n: found[n] for n in wanted}, wanted)
    assert largest_gap(models["site-0"], models["site-1"]) > 1e-3


def gates(method: Any, sites: dict[str, Site], first: Any, rounds: int = 3) -> tuple[Any, list[Any]]:
    """The state after some rounds, and the gate and the tower with which each site predicts."""
    step, engine = run(method, sites, first, rounds)
    request = method.request(step.state)
    models = [method.site_model(request.for_site(name), engine.memory.get(name, {})) for name in sites]
    return step.state, [{n: x for n, x in model.items() if ".gate." in n or ".tower." in n} for model in models]


def test_gates_and_towers_belong_to_disorders(task: Classification, sites: dict[str, Site]) -> None:
    """With a disorder for each site it is the method with private gates; with one for all, FedAvg of the network."""
    names, first = tuple(sites), task.first(0)
    (alone, ours), (together, _), (private, theirs) = (
        gates(fmtl(task, LOCAL, names, disorders=d), sites, first) for d in (names, ("asd",) * 3, ())
    )
    assert near(alone.shared, {n: x for n, x in private.params.items() if n in alone.shared})
    assert all(near(one, two) for one, two in zip(ours, theirs, strict=True))
    mixed = gated(task, 4, 32)
    plain, _ = run(FedAvg(cast(Any, WithContrast(mixed, 0.1, 0.1)), LOCAL), sites, begin(mixed, first), 3)
    assert near(together.params, plain.state.params)
    assert not near(together.params, alone.params)
    _, (one, other, same_disorder) = gates(fmtl(task, LOCAL, names, disorders=("asd", "adhd", "asd")), sites, first)
    assert same(one, same_disorder)
    assert not near(one, other)
    with pytest.raises(ValueError, match="disorders: 2 for 3 sites"):
        fmtl(task, LOCAL, names, disorders=("asd", "adhd"))


def test_private_heads_of_a_classifier_are_fedper(task: Classification, sites: dict[str, Site]) -> None:
    step, _ = run(private_heads(task, LOCAL, tuple(sites)), sites, task.first(0))
    per, _ = run(fedper(task, LOCAL), sites, task.first(0))
    plain, _ = run(FedAvg(task, LOCAL), sites, task.first(0))
    assert same(step.state.params, per.state.params)
    assert not same(step.state.params, plain.state.params)


def test_a_site_with_fewer_classes_never_says_another() -> None:
    task = Classification(Network("cnn", (1, 8, 8), 4, (("width", 4), ("depth", 2))))
    two, four = little_sites(count=2), little_sites(count=2, classes=4)
    sites = {"site-0": two["site-0"], "site-1": four["site-1"]}
    method = Evaluated(private_heads(task, LOCAL, tuple(sites), classes=(2, 4)), task)
    step, engine = run(method, sites, task.first(0), 2)
    said = evaluate(method, engine, step.state, engine.sites, "predict/test")
    assert said["site-0"]["score"][:, 2:].max() == 0
    assert said["site-1"]["score"][:, 2:].max() > 0.05
    rows = [engine.memory["site-0"]["own"]["head.weight"][2:], task.first(0)["head.weight"][2:]]
    assert torch.equal(*rows)
    assert limited(task.first(0), 2)["head.bias"].tolist()[2:] == [-1e4, -1e4]


@pytest.mark.parametrize(
    ("classes", "says"), [((2,), "give one each"), ((2, 9), "9 classes at a site"), ((2, 1), "1 class")]
)
def test_impossible_classes_are_refused(task: Classification, classes: tuple[int, ...], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        private_heads(task, LOCAL, ("a", "b"), classes=classes)

"""FedSM's soft pull by hand and its limits; its selector finds the scanner; unseen sites get the global model."""

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch

from polyclinic.core import tree
from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.learning.networks.model_tree import cached_model
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.task_evaluation import Evaluated, evaluate
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.personalization.fedsm import FedSM, soft_pull
from polyclinic.testing import close, equal
from tests.conftest import blobs
from tests.support.agreement import KINDS, place

NAMES = ("site-0", "site-1", "site-2")


def run(method: Any, params: Any, sites: Any, rounds: Any) -> Any:
    federation, state = InProcess(method, sites), method.init(params)
    for step in train(method, federation, state, rounds=rounds):
        state = step.state
    return state, federation


def test_the_pull_by_hand() -> None:
    models = {n: {"w": torch.tensor([float(k), 2.0 * k])} for k, n in enumerate(NAMES)}
    found = soft_pull(models, 0.7)
    p = np.array([[0, 0], [1, 2], [2, 4]], float)
    for k, name in enumerate(NAMES):
        others = [j for j in range(3) if j != k]
        np.testing.assert_allclose(found[name]["w"], 0.7 * p[k] + 0.3 / 2 * p[others].sum(0), rtol=1e-6)
    assert all(torch.allclose(m["w"], torch.tensor([1.0, 2.0])) for m in soft_pull(models, 1 / 3).values())
    mean = sum(m["w"] for m in soft_pull(models, 0.3).values()) / 3
    torch.testing.assert_close(mean, torch.tensor([1.0, 2.0]))  # a pull moves nobody's mean
    assert equal(soft_pull(models, 1.0), models)


def test_without_pull_personal_models_train_alone_and_the_global_one_is_fedavgs(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    state, _ = run(FedSM(task, NAMES, local, pull=1.0), task.first(), sites, 2)
    assert close(state.params, run(FedAvg(task, local), task.first(), sites, 2)[0].params)
    alone = task.first()
    for round in range(2):
        alone = local.fit(task, alone, sites["site-1"], round, slot="personal")
    assert close(state.personal["site-1"], alone)


@pytest.mark.parametrize(("threshold", "mine"), [(-1.0, True), (1.0, False)])
def test_the_threshold_decides_between_the_personal_and_the_global(
    task: Classification, local: LocalTraining, threshold: float, mine: bool
) -> None:
    method = FedSM(task, NAMES, local, threshold=threshold)
    state = method.init(task.first())._replace(personal={n: task.first(k + 1) for k, n in enumerate(NAMES)})
    bias = {n: torch.zeros_like(x) for n, x in state.selector.params.items()}
    bias["head.bias"] = torch.tensor([0.0, 1.0, 0.0])  # it guesses the second site, and is not very sure
    request = method.evaluation_request(state._replace(selector=state.selector._replace(params=bias)))
    x = torch.randn(4, 1, 8, 8)
    found = cached_model(method.prediction_task, method.site_model(request, {})).eval()(x)
    torch.testing.assert_close(found, cached_model(task, task.first(2 if mine else 0)).eval()(x))


@pytest.mark.parametrize("kind", KINDS)
def test_the_selector_is_trained_by_the_sites_adams_whose_moments_are_averaged(kind: str) -> None:
    """Against PyTorch's Adam at each site, started from the averaged model, moments and number of steps."""
    task, sites = place(kind)
    method = FedSM(task, NAMES, LocalTraining(epochs=2, batch_size=64), selector_lr=0.02)
    state, _ = run(method, task.first(), sites, 3)
    params, moments = method.selecting.first(), list[Any]()
    for _ in range(3):
        ends, states = [], []
        for k, site in enumerate(sites.values()):
            model = cached_model(method.selecting, params, slot="reference").train()
            adam = torch.optim.Adam(model.parameters(), lr=0.02)
            if moments:
                adam.state.update(zip(model.parameters(), deepcopy(moments), strict=True))
            x = site.data["train"].x
            for _ in range(2):
                adam.zero_grad()
                torch.nn.functional.cross_entropy(model(x), torch.full((len(x),), k)).backward()
                adam.step()
            ends.append({name: p.detach().clone() for name, p in model.named_parameters()})
            states.append([adam.state[p] for p in model.parameters()])
        params = {name: torch.stack([end[name] for end in ends]).mean(0) for name in ends[0]}
        keys = ("step", "exp_avg", "exp_avg_sq")
        moments = [{key: torch.stack([s[i][key] for s in states]).mean(0) for key in keys} for i in range(len(params))]
    for name, leaf in params.items():
        torch.testing.assert_close(state.selector.params[name], leaf, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_the_selector_learns_whose_images_they_are(task: Classification) -> None:
    """Scanners that add a constant: every site's own images go to its own model, and evaluation works everywhere."""
    sites = {
        n: Site(n, {r: blobs(7 * k + i, 40, (1, 8, 8), shift=3.0 * k) for i, r in enumerate(("train", "val"))})
        for k, n in enumerate(NAMES)
    }
    local = LocalTraining(epochs=1, batch_size=16, optimizer="adam", lr=0.02)
    method = FedSM(task, NAMES, local, threshold=0.5)
    state, _ = run(method, task.first(), sites, 40)
    selector = cached_model(method.selecting, state.selector.params).eval()
    right = [(selector(s.data["val"].x).argmax(1) == k).float().mean() for k, s in enumerate(sites.values())]
    assert min(right) > 0.7
    stranger = Site("elsewhere", {"val": blobs(99, 20, (1, 8, 8), shift=1.0)})
    scored = Evaluated(method, task)
    found = evaluate(scored, InProcess(scored, {**sites, "elsewhere": stranger}), state, [*NAMES, "elsewhere"])
    assert set(found) == {*NAMES, "elsewhere"}


def test_personal_models_are_kept_apart_by_site(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    method = FedSM(task, NAMES, local)
    request = method.request(method.init(task.first()))
    assert set(request.per_site) == set(NAMES)
    assert tree.size(request.for_site("site-0").trees["personal"]) == tree.size(task.first())

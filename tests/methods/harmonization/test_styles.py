"""VAFL and stain normalization: who is the target, what leaves, what stays, and that styles come together."""

from typing import Any

import pytest
import torch

from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.errors import DataError
from polyclinic.learning.networks.model_tree import cached_model
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.task_evaluation import Evaluated, evaluate
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.harmonization.input_front import in_front
from polyclinic.methods.harmonization.stain_norm import stain_norm
from polyclinic.methods.harmonization.vafl import vafl
from tests.conftest import Rows, blobs


def scanners() -> Any:
    """Three sites that see the same kind of image through different scanners; at the second it varies least."""
    rng, sites = torch.Generator().manual_seed(0), {}
    grid = torch.linspace(-1, 1, 8)
    for k, (gain, offset, noise) in enumerate(((1.0, 0.0, 0.6), (1.5, 2.0, 0.1), (0.7, -1.0, 0.6))):
        y = torch.randint(0, 2, (36,), generator=rng)
        base = torch.where(y.view(-1, 1, 1).bool(), grid.expand(36, 8, 8), grid.view(8, 1).expand(36, 8, 8))
        x = gain * (base + noise * torch.randn(36, 8, 8, generator=rng)) + offset
        sites[f"s{k}"] = Site(f"s{k}", {"train": Rows(x[:24, None], y[:24]), "val": Rows(x[24:, None], y[24:])})
    return sites


TASK = Classification(Network("cnn", (1, 8, 8), 2, (("width", 4), ("depth", 2))))
LOCAL = LocalTraining(batch_size=12, optimizer="adam", lr=0.01)


def run(method: Any, sites: Any, rounds: Any, watch: Any = None) -> Any:
    federation, state = InProcess(method, sites), method.init(TASK.first())
    for step in train(method, federation, state, rounds=rounds):
        assert not step.lost
        if watch is not None:
            watch.append(step)
        state = step.state
    return state, federation


@pytest.mark.slow
def test_vafl_takes_the_site_that_varies_least_and_translates_the_others() -> None:
    sites, seen = scanners(), list[Any]()
    method = vafl(TASK, LOCAL, epochs=40, lr=1e-2, width=8)
    state, federation = run(method, sites, 2, seen)
    jobs = [(step.request.job, tuple(step.asked)) for step in seen]
    assert jobs[0] == ("prepare complexity", ("s0", "s1", "s2"))
    assert jobs[1] == ("prepare synthesize", ("s1",))
    assert jobs[2] == ("prepare translate", ("s0", "s2"))
    shared = seen[1].reply.gather("found")["s1"]["images"]
    assert shared.shape == (32, 1, 8, 8)
    real = sites["s1"].data["train"].x.flatten(1)
    assert float(torch.cdist(shared.flatten(1), real).min()) > 0  # none is a real one
    for step in seen[3:]:
        assert not any(in_front(name) for name in step.reply.mean("update").total)  # translators stay
    gap = []
    for name in ("s0", "s2"):
        x = sites[name].data["train"].x
        front = cached_model(
            method.prediction_task, method.site_model(method.evaluation_request(state), federation.memory[name])
        ).get_submodule("front")
        gap.append((abs(float(x.mean() - shared.mean())), abs(float(front(x).mean() - shared.mean()))))
    assert all(after < 0.8 * before for before, after in gap)
    model = cached_model(
        method.prediction_task, method.site_model(method.evaluation_request(state), federation.memory["s1"])
    )
    x = sites["s1"].data["train"].x
    assert torch.equal(model.get_submodule("front")(x), x)  # the target's own images stay as they are


def test_stain_normalization_gives_one_style() -> None:
    sites = scanners()
    method = stain_norm(TASK, LOCAL, exchanges=3, epochs=4, width=8)
    state, federation = run(method, sites, 2)
    model = cached_model(method.prediction_task, state.params)
    means = [float(model.get_submodule("front")(s.data["train"].x).mean()) for s in sites.values()]
    before = [float(s.data["train"].x.mean()) for s in sites.values()]
    assert max(means) - min(means) < 0.2 * (max(before) - min(before))
    assert all("judge" in memory for memory in federation.memory.values())
    assert not any("judge" in name for name in state.params)


@pytest.mark.parametrize("make", [vafl, stain_norm])
def test_evaluation_translates_too_and_serves_unseen_sites(make: Any) -> None:
    sites, method = scanners(), Evaluated(make(TASK, LOCAL, epochs=2, width=4), TASK)
    state, _ = run(method, sites, 1)
    everyone = {**sites, "elsewhere": Site("elsewhere", {"val": blobs(3, 8, (1, 8, 8))})}
    assert set(evaluate(method, InProcess(method, everyone), state, list(everyone))) == set(everyone)


def test_vafl_needs_two_images_at_a_site() -> None:
    method, site = vafl(TASK, LOCAL), Site("lyon", {"train": Rows(torch.zeros(1, 1, 8, 8), torch.zeros(1).long())})
    request = method.request(method.init(TASK.first(0)))
    assert request
    with pytest.raises(DataError, match="site 'lyon' has 1 training image: it needs at least two"):
        method.site_update(request, {}, site)


def test_tables_are_refused() -> None:
    for make in (vafl, stain_norm):
        with pytest.raises(ValueError, match="needs images"):
            make(Classification(Network("mlp", (4,), 2)), LocalTraining())

"""Private training: each gradient by itself, clipped, summed, hidden; and the limits in which it is plain training."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from polyclinic.core import tree
from polyclinic.core.execute import execute
from polyclinic.core.site import Secret, Site
from polyclinic.methods.apfl import APFL
from polyclinic.methods.fedavg import FedAvg
from polyclinic.tasks.classification import Classification
from polyclinic.tasks.dpsgd import DPSGD, Spend, add_noise, meter, metered, per_example_gradients
from polyclinic.tasks.local import Local, Proximal
from polyclinic.tasks.model import gradient
from polyclinic.tasks.networks import Network
from polyclinic.tasks.task import borrow
from polyclinic.testing import check_method
from tests.conftest import Rows, blobs, little_sites

GROUPED = Classification(Network("cnn", (1, 8, 8), 2, (("width", 4), ("depth", 2), ("norm", "group"))))
SOLID = Classification(Network("cnn", (1, 6, 6, 6), 2, (("width", 4), ("depth", 2), ("norm", "instance"))))
BATCHED = Classification(Network("cnn", (1, 8, 8), 2, (("width", 4), ("depth", 2))))
ALMOST_NONE = 1e-9


class Patients(Rows):
    """Rows that know whose they are."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor, patients: tuple[str, ...]) -> None:
        super().__init__(x, y)
        self.patients = patients


def data_of(count: int, shape: tuple[int, ...] = (1, 8, 8), images: int = 1) -> Patients:
    rows = blobs(3, count * images, shape)
    return Patients(rows.x, rows.y, tuple(f"p{i // images}" for i in range(count * images)))


def site_of(data: Any, **more: Any) -> Site:
    return Site("a", {"train": data}, **more)


@pytest.mark.parametrize(("task", "shape"), [(GROUPED, (1, 8, 8)), (SOLID, (1, 6, 6, 6))])
def test_gradients_of_each_example_are_those_of_a_loop(task: Classification, shape: tuple[int, ...]) -> None:
    data, params = data_of(7, shape), task.first(0)
    model = borrow(task, params)
    named = {n: p.detach() for n, p in model.named_parameters()}
    ours = per_example_gradients(model, named, task.loss, data[torch.arange(7)])
    for i in range(7):
        alone = gradient(task.loss(model, data[torch.tensor([i])]), model)
        for name, g in alone.items():
            assert torch.allclose(ours[name][i], g, atol=1e-6, rtol=1e-4), name


def test_opacus_finds_the_same_clipped_sum() -> None:
    pytest.importorskip("opacus", reason="needs polyclinic[privacy]")
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    data, params, bound = data_of(9), GROUPED.first(1), 0.05
    local = DPSGD(batch_size=9, lr=1.0, noise=ALMOST_NONE, bound=bound, unit="record")
    ours = tree.sub(params, local.fit(GROUPED, params, site_of(data), 0))
    model = GradSampleModule(borrow(GROUPED, params, slot="opacus"))
    sgd = torch.optim.SGD(model.parameters(), 1.0)
    theirs = DPOptimizer(sgd, noise_multiplier=0.0, max_grad_norm=bound, expected_batch_size=9)
    nn.functional.cross_entropy(model(data.x), data.y).backward()
    theirs.step()
    for name, p in model._module.named_parameters():
        assert torch.allclose(ours[name], params[name] - p.detach(), atol=1e-6), name
    norms = [tree.norm({n: g[i] for n, g in per_example_gradients(
        borrow(GROUPED, params), {n: p.detach() for n, p in borrow(GROUPED, params).named_parameters()},
        GROUPED.loss, data[torch.arange(9)]).items()}) for i in range(9)]  # fmt: skip
    assert min(norms) > bound, "the bound must bind for this to be a test"


def test_without_bound_and_noise_and_with_everyone_it_is_gradient_descent() -> None:
    data, params = data_of(8), GROUPED.first(0)
    private = DPSGD(epochs=3, batch_size=8, lr=0.1, noise=ALMOST_NONE / 1e6, bound=1e6)
    plain = Local(epochs=3, batch_size=8, lr=0.1)
    ours, theirs = (local.fit(GROUPED, params, site_of(data), 0) for local in (private, plain))
    assert all(torch.allclose(ours[n], theirs[n], atol=1e-5) for n in theirs)


def test_with_a_penalty_too() -> None:
    data, params = data_of(8), GROUPED.first(0)
    private = DPSGD(epochs=3, batch_size=8, lr=0.1, noise=ALMOST_NONE / 1e6, bound=1e6, penalty=Proximal(0.5))
    ours, theirs = (local.fit(GROUPED, params, site_of(data), 0) for local in
                    (private, Local(epochs=3, batch_size=8, lr=0.1, penalty=Proximal(0.5))))  # fmt: skip
    assert all(torch.allclose(ours[n], theirs[n], atol=1e-5) for n in theirs)
    seen: list[str] = []

    def correct(name: str, g: torch.Tensor) -> torch.Tensor:
        seen.append(name)
        return torch.zeros_like(g)

    still = replace(private, penalty=None).fit(GROUPED, params, site_of(data), 0, correct=correct,
                                               after=lambda model: seen.append("after"))  # fmt: skip
    assert all(torch.equal(still[n], params[n]) for n in params)
    assert seen.count("after") == 3
    head = private.fit(GROUPED, params, site_of(data), 0, only=GROUPED.network.in_head)
    assert {n for n in params if not torch.equal(head[n], params[n])} == {
        n for n in params if GROUPED.network.in_head(n)
    }


@pytest.mark.parametrize("unit", ["record", "patient"])
def test_one_unit_changes_the_sum_by_the_bound_at_most(unit: Any) -> None:
    data, params, bound = data_of(6, images=3), GROUPED.first(0), 0.01
    local = DPSGD(steps=1, batch_size=18, lr=1.0, noise=ALMOST_NONE, bound=bound, unit=unit)
    whole = tree.scale(tree.sub(params, local.fit(GROUPED, params, site_of(data), 0)), 18 if unit == "record" else 6)
    for patient in range(6):
        rest = [i for i in range(18) if i // 3 != patient]
        less = Patients(data.x[rest], data.y[rest], tuple(data.patients[i] for i in rest))
        part = tree.sub(params, local.fit(GROUPED, params, site_of(less), 0))
        change = tree.norm(tree.sub(whole, tree.scale(part, 15 if unit == "record" else 5)))
        assert change <= bound * (3 if unit == "record" else 1) + 1e-6
        assert change > 0.5 * bound


def test_a_patient_counts_once_however_many_images_there_are() -> None:
    params, one = GROUPED.first(0), data_of(4)
    twice = Patients(one.x.repeat_interleave(5, 0), one.y.repeat_interleave(5), tuple(f"p{i // 5}" for i in range(20)))
    local = DPSGD(steps=2, batch_size=4, lr=0.1, noise=ALMOST_NONE, bound=0.5, chunk=3)
    ours, theirs = (local.fit(GROUPED, params, site_of(data), 0) for data in (twice, one))
    assert all(torch.allclose(ours[n], theirs[n], atol=1e-6) for n in params)


@pytest.mark.parametrize("chunk", [1, 2, 5, 100])
def test_how_many_are_held_at_once_changes_nothing(chunk: int) -> None:
    params, data = GROUPED.first(0), data_of(5, images=2)
    local = DPSGD(steps=1, batch_size=5, lr=1.0, noise=ALMOST_NONE, bound=0.02)
    ours, theirs = (replace(local, chunk=c).fit(GROUPED, params, site_of(data), 0) for c in (chunk, None))
    assert all(torch.allclose(ours[n], theirs[n], atol=1e-6) for n in params)


def test_an_empty_batch_is_a_step_of_noise_alone() -> None:
    params, data = GROUPED.first(0), data_of(20)
    nobody = site_of(data, entropy=lambda n: b"\xff" * n)  # uniform draws just below 1: no one is sampled, noise is ~0
    local = DPSGD(steps=3, batch_size=2, lr=1.0, noise=1.0, bound=1.0)
    end = local.fit(GROUPED, params, nobody, 0)
    assert all(torch.allclose(end[n], params[n], atol=1e-6) for n in params)


@pytest.mark.parametrize(("patients", "rate"), [(1, 1.0), (20, 0.05)])
def test_a_batch_of_one_is_bounded_and_hidden_as_any_other(patients: int, rate: float) -> None:
    """One patient in all, or one in a batch on average: a batch is divided by its expected size, not its own."""
    whole, params, expected = data_of(20), GROUPED.first(0), round(rate * patients)
    data = Patients(whole.x[:patients], whole.y[:patients], whole.patients[:patients])
    local = DPSGD(steps=1, batch_size=1, lr=1.0, noise=ALMOST_NONE, bound=0.1)
    all_of_them = site_of(data, entropy=lambda n: bytes(n))  # draws of 0: everyone is sampled
    moved = tree.norm(tree.sub(params, local.fit(GROUPED, params, all_of_them, 0)))
    assert 0 < moved <= 0.1 * patients / expected + 1e-6
    assert local.spend(data) == Spend(ALMOST_NONE, rate, 1, "patient")
    loud = tree.sub(params, replace(local, noise=50.0).fit(GROUPED, params, site_of(data), 0))
    assert tree.norm(loud) == pytest.approx(50 * 0.1 * sum(p.numel() for p in params.values()) ** 0.5, rel=0.15)


def test_where_every_gradient_is_clipped_directions_still_count() -> None:
    """The step is the mean of the units' directions times the bound, however small the bound is."""
    params, data, bound = GROUPED.first(0), data_of(6), 1e-4
    local = DPSGD(steps=1, batch_size=6, lr=1.0, noise=ALMOST_NONE, bound=bound)
    step = tree.sub(params, local.fit(GROUPED, params, site_of(data), 0))
    each = per_example_gradients(borrow(GROUPED, params), params, GROUPED.loss, data[torch.arange(6)])
    alone = [{n: g[i] for n, g in each.items()} for i in range(6)]
    assert all(tree.norm(g) > 100 * bound for g in alone)
    wanted = tree.zeros(params)
    for g in alone:
        wanted = tree.add(wanted, tree.scale(g, bound / 6 / tree.norm(g)))
    assert tree.norm(tree.sub(step, wanted)) < 0.02 * tree.norm(wanted)


def test_nobody_to_train_on_is_refused() -> None:
    with pytest.raises(ValueError, match="DPSGD: there is no one to train on"):
        DPSGD().fit(GROUPED, GROUPED.first(0), site_of(Patients(torch.zeros(0, 1, 8, 8), torch.zeros(0), ())), 0)


def test_noise_is_as_deep_as_it_says_and_never_the_same() -> None:
    params, data = GROUPED.first(0), data_of(10)
    local = DPSGD(steps=1, batch_size=5, lr=1.0, noise=100.0, bound=1e-3)
    runs = [tree.flatten(tree.sub(local.fit(GROUPED, params, site_of(data), 0), params)) for _ in range(30)]
    drawn = torch.stack(runs)
    expected = 100.0 * 1e-3 / 5  # σ C / L
    assert float(drawn.std()) == pytest.approx(expected, rel=5 / math.sqrt(2 * drawn.numel()))
    assert len({tuple(row.tolist()) for row in drawn}) == 30


def test_samples_are_poisson() -> None:
    data = data_of(200)
    local = DPSGD(batch_size=20, epochs=1)
    assert local.spend(data) == Spend(1.0, 0.1, 10, "patient")
    assert local.count(data) == 10
    sizes = torch.tensor([float((Secret().uniform(200) < 0.1).sum()) for _ in range(400)])
    assert float(sizes.mean()) == pytest.approx(20, abs=5 * math.sqrt(18 / 400))
    assert float(sizes.var()) == pytest.approx(18, rel=0.4)
    assert DPSGD(batch_size=500).spend(data) == Spend(1.0, 1.0, 1, "patient")


def test_noise_lies_on_a_grid() -> None:
    noisy = add_noise(torch.zeros(1000, dtype=torch.float64), 3.0, Secret())
    steps = noisy / 2.0 ** (1 - 20)
    assert torch.equal(steps, steps.round())
    assert torch.equal(add_noise(noisy, 0.0, Secret()), noisy)


def test_what_cannot_be_private_is_refused_with_the_remedy() -> None:
    rows = site_of(data_of(8))
    with pytest.raises(ValueError, match='build it with the option norm = "group"'):
        DPSGD().fit(BATCHED, BATCHED.first(0), rows, 0)
    weighted = replace(GROUPED, class_weights=(1.0, 2.0))
    with pytest.raises(
        ValueError, match=r"noise and bound .*; DPSGD: class_weights have no effect.*; DPSGD: leave amp"
    ):
        DPSGD(noise=0.0, amp=True).fit(weighted, weighted.first(0), rows, 0)
    with pytest.raises(ValueError, match="does not say whose each image is"):
        DPSGD().fit(GROUPED, GROUPED.first(0), site_of(blobs(0, 8, (1, 8, 8))), 0)
    by_itself = APFL(GROUPED, DPSGD())
    site = site_of(data_of(8))
    with pytest.raises(ValueError, match="takes its training steps by itself"):
        execute(by_itself, by_itself.ask(by_itself.init(GROUPED.first(0))), {}, site)
    with pytest.raises(ValueError, match="takes its training steps by itself"):
        DPSGD().batches(None, torch.Generator())


def test_a_gradient_that_is_not_finite_adds_nothing() -> None:
    data, params = data_of(6), GROUPED.first(0)
    spoiled = Patients(data.x.clone(), data.y, data.patients)
    spoiled.x[2] = float("nan")
    local = DPSGD(steps=1, batch_size=6, lr=1.0, noise=ALMOST_NONE, bound=0.1)
    end = local.fit(GROUPED, params, site_of(spoiled), 0)
    rest = [0, 1, 3, 4, 5]
    clean = Patients(data.x[rest], data.y[rest], tuple(data.patients[i] for i in rest))
    without = local.fit(GROUPED, params, site_of(clean), 0)
    assert tree.finite(end)
    change, expected = tree.sub(end, params), tree.sub(without, params)
    assert all(torch.allclose(change[n] * 6, expected[n] * 5, atol=1e-6) for n in params)


def test_what_is_spent_is_metered_where_someone_counts() -> None:
    data = data_of(10)
    with metered() as outer:
        meter(Spend(1.0))
        with metered() as inner:
            DPSGD(batch_size=5).fit(GROUPED, GROUPED.first(0), site_of(data), 0)
        Local().fit(GROUPED, GROUPED.first(0), site_of(data), 0)
    assert inner == [Spend(1.0, 0.5, 2, "patient")]
    assert outer == [Spend(1.0)]
    meter(Spend(1.0))  # nobody counts


def test_a_method_with_private_training_keeps_its_promises() -> None:
    sites = {
        name: replace(site, data={"train": data_of(8 + k)}) for k, (name, site) in enumerate(little_sites().items())
    }
    check_method(FedAvg(GROUPED, DPSGD(batch_size=4, noise=0.5)), GROUPED.first(0), sites)

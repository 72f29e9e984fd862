"""Canaries in DP-SGD: each adds its whole bound along its own direction, the rest of training is as it was."""

from typing import Any

import pytest
import torch

from polyclinic.attacks.private_training_canaries import Canaries, Motion, Observer, WithCanaries, audited
from polyclinic.core.aggregates import ElementwiseMean, PerSite, Reply, WeightedMean
from polyclinic.core.site import Site
from polyclinic.learning.networks.model_tree import cached_model
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification, MultiLabel
from polyclinic.learning.tasks.regression import Regression
from polyclinic.learning.training.dp_sgd import DPSGD, per_example_gradients
from tests.conftest import Rows, blobs

TASK = Classification(Network("mlp", (13,), 2, (("width", 32),)))


def people(n: Any = 30) -> Any:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(n, 13, generator=rng)
    data: Any = Rows(x, (x[:, 0] > 0).long())
    data.patients = tuple(f"p{i // 2}" for i in range(n))  # two images each
    return data


def drawn(task: Any = TASK, count: Any = 20, bound: Any = 1.5, seed: Any = 0) -> Any:
    motion = Motion(task)
    motion.far = {n: torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) for n, x in motion.far.items()}
    return Canaries.draw(motion.far, count, bound, Site("auditor", seed=seed), "test"), motion.far


def flat(tree: Any) -> Any:
    return torch.cat([leaf.flatten() for leaf in tree.values()])


def test_directions_are_apart_and_where_training_moves_least() -> None:
    canaries, far = drawn()
    owner, moved = flat(canaries.block), flat(far)
    counts = owner[owner >= 0].bincount()
    assert len(counts) == 20
    assert (counts == canaries.size).all()
    assert canaries.size == len(owner) // 2 // 20
    assert moved[owner >= 0].max() < moved[owner < 0].min()
    assert set(flat(canaries.sign).tolist()) == {-1.0, 1.0}
    assert 3 < int(canaries.inside.sum()) < 17
    other = drawn(seed=1)[0]
    assert not torch.equal(other.inside, canaries.inside)
    assert not torch.equal(flat(other.block), owner)


@pytest.mark.parametrize("count", [0, 1, 290])
def test_too_many_or_too_few_canaries_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match="canaries for a network of 546 parameters"):
        drawn(count=count, task=Classification(Network("mlp", (13,), 2, (("width", 34),))))


@pytest.mark.parametrize(
    "task",
    [
        TASK,
        MultiLabel(Network("mlp", (13,), 3, (("width", 16),))),
        Regression(Network("mlp", (13,), 1, (("width", 16),))),
    ],
)
def test_gradients_are_the_tasks_or_a_canarys(task: Classification) -> None:
    """By the product's own vmap: a real example's gradient is what it was; a canary's is ±10 C along its direction."""
    if task.kind == "regression":
        data = Rows(torch.randn(6, 13), torch.randn(6, 1))
    elif task.kind == "multilabel":
        data = Rows(torch.randn(6, 13), torch.randint(2, (6, 3)).float())
    else:
        data = people(6)
    canaries = drawn(task)[0]
    both, ready = WithCanaries(data, canaries), audited(task, canaries, data.y)
    assert len(both) == 26
    params = {n: p.detach().clone() for n, p in cached_model(task, task.first()).named_parameters()}
    plain = per_example_gradients(task.model().train(), params, task.loss, data[torch.arange(6)])
    mixed = per_example_gradients(ready.model().train(), params, ready.loss, both[torch.arange(26)])
    for name, gradient in plain.items():
        torch.testing.assert_close(mixed[name][:6], gradient, rtol=1e-4, atol=1e-6)
    for i in range(20):
        mine = flat({n: g[6 + i] for n, g in mixed.items()})
        if canaries.inside[i]:
            assert float(mine.norm()) == pytest.approx(10 * canaries.bound, rel=1e-5)
            wanted = flat(canaries.sign) * (flat(canaries.block) == i)
            torch.testing.assert_close(-mine / mine.norm(), wanted / wanted.norm())
        else:
            assert not mine.any()


def test_a_batch_counts_each_of_its_units_once() -> None:
    """Methods that take a plain gradient of a batch see canaries, too."""
    canaries, data = drawn()[0], people(4)
    both, ready = WithCanaries(data, canaries), audited(TASK, canaries, data.y)
    model, every = cached_model(ready, TASK.first()), torch.arange(24)
    value = ready.loss(model, both[every])
    each = torch.stack([ready.loss(model, both[i[None]]) for i in every])
    torch.testing.assert_close(value, each.mean())


def test_canaries_are_patients_of_their_own() -> None:
    canaries, data = drawn()[0], people(6)
    both = WithCanaries(data, canaries)
    assert both.patients[:6] == data.patients
    assert len(set(both.patients[6:]) - set(data.patients)) == 20
    x, y = both[torch.tensor([1, 7])]
    assert torch.equal(x[0], data.x[1])
    assert y[0].tolist() == [float(data.y[1]), 0.0]
    assert y[1, -1] == (2.0 if canaries.inside[1] else -1.0)
    assert not hasattr(WithCanaries(Rows(data.x, data.y), canaries), "patients")


def test_a_trained_canary_is_seen_as_far_as_the_bound_allows() -> None:
    """One step on everybody without noise: C along each canary that is in, times lr / L; nothing along the others."""
    canaries, data = drawn(bound=0.5)[0], people()
    both = WithCanaries(data, canaries)
    local = DPSGD(batch_size=100, steps=1, lr=1.0, noise=1e-9, bound=0.5)
    ready = audited(TASK, canaries, data.y)
    start = TASK.first()
    end = local.fit(ready, start, Site("a", {"train": both}), 0)
    honest = DPSGD(batch_size=100, steps=1, lr=1.0, noise=1e-9, bound=0.5).fit(
        TASK, start, Site("a", {"train": data}), 0
    )
    units = 15 + 20  # all sampled, L counts all
    added = {n: (end[n] - start[n]) * units - (honest[n] - start[n]) * 15 for n in canaries.block}
    along = canaries.project(added)
    scale = flat(added).double().norm() / len(flat(added)) ** 0.5
    torch.testing.assert_close(along * scale, 0.5 * canaries.inside.double(), atol=1e-3, rtol=1e-3)


def test_projections_of_chance_have_a_deviation_of_one() -> None:
    canaries, _ = drawn(count=100)
    rng = torch.Generator().manual_seed(0)
    noise = {n: 7 * torch.randn(b.shape, generator=rng) for n, b in canaries.block.items()}
    z = canaries.project(noise)
    assert abs(float(z.mean())) < 0.3
    assert float(z.std()) == pytest.approx(1.0, abs=0.2)
    assert canaries.project({"other": torch.ones(3)}) is None
    assert canaries.project({n: torch.zeros(b.shape) for n, b in canaries.block.items()}) is None
    name = next(iter(noise))
    assert canaries.project({name: noise[name][:1]}) is None  # another shape is nothing to look at
    assert canaries.project({name: noise[name]}) is not None  # a part of the model is


def test_the_observer_looks_at_every_part_and_learns_signs_from_a_control() -> None:
    canaries, _ = drawn()
    found = {
        n: s * torch.where(b >= 0, canaries.inside[b.clamp_min(0)].float(), 0.0)
        for (n, b), s in zip(canaries.block.items(), canaries.sign.values(), strict=True)
    }
    backwards = {n: -x for n, x in found.items()}
    ones = {n: torch.ones_like(x) for n, x in found.items()}
    observer = Observer(canaries)
    for _ in range(2):
        observer.watch(
            Reply(
                {
                    "update": WeightedMean.of(found, 3.0),
                    "gradient": PerSite({"a": backwards}),
                    "fisher": ElementwiseMean.of(found, ones),
                    "claim": WeightedMean(found, 0.0),
                    "count": WeightedMean.of({"n": torch.tensor(3.0)}),
                }
            )
        )
    assert set(observer.seen) == {"update", "gradient", "fisher", "claim"}
    learned = observer.learned()
    assert learned["update"] > 0 > learned["gradient"]
    scores = observer.scores(learned)
    assert scores[canaries.inside].min() > scores[~canaries.inside].max()
    assert not observer.scores({"nothing": 1.0}).any()
    once = Observer(canaries)
    once.watch(Reply({"update": WeightedMean.of(found, 3.0)}))
    torch.testing.assert_close(observer.seen["update"], 2 * once.seen["update"])


def test_motion_counts_every_part_alike() -> None:
    motion = Motion(TASK)
    small = {n: torch.ones(x.shape) for n, x in motion.far.items()}
    name = next(iter(small))
    motion.watch(Reply({"update": WeightedMean.of(small), "control": WeightedMean.of({name: 1000 * small[name]})}))
    size, total = small[name].numel(), sum(x.numel() for x in small.values())
    assert float(motion.far[name].flatten()[0]) == pytest.approx(total**-0.5 + size**-0.5)
    other = next(n for n in small if n != name)
    assert float(motion.far[other].flatten()[0]) == pytest.approx(total**-0.5)
    before = {n: x.clone() for n, x in motion.far.items()}
    motion.watch(Reply({"nothing": WeightedMean.of({n: torch.zeros(x.shape) for n, x in small.items()})}))
    assert all(torch.equal(before[n], motion.far[n]) for n in before)


def test_blobs_are_left_as_they_were(task: Classification) -> None:
    """A convolutional network with images."""
    data = blobs(3, 7, (1, 8, 8))
    canaries = drawn(task, 10)[0]
    ready = audited(task, canaries, data.y)
    assert ready.kind == task.kind
    assert ready.network == task.network
    assert ready != task  # so that their models are kept apart

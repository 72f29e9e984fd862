"""Dropout and augmentation under DP-SGD: one unit moves the sum by its bound and no more, whatever is random."""

import hashlib
import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F

from polyclinic.core import tree
from polyclinic.core.metering import Noise, Use, audited
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree
from polyclinic.learning.batch import Batch
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.augmentation import STRONG, Augment
from polyclinic.learning.training.dp_sgd import DPSGD, per_example_gradients
from polyclinic.learning.training.keyed_random import KeyedRandomness, UnknownRandomness, bits, key_of
from tests.conftest import Rows

BASE = (("width", 4), ("depth", 2), ("norm", "group"))
BOUND = 0.05


def network(*more: Any) -> Classification:
    return Classification(Network("cnn", (1, 8, 8), 2, (*BASE, *more)))


PLAIN, SOME, HALF = network(), network(("dropout", 0.2)), network(("dropout", 0.5))


class Entropy:
    """Repeatable "secrets": what a call returns depends on the key, on how many came before, and begins alike."""

    def __init__(self, key: str) -> None:
        self.key, self.calls = key, itertools.count()

    def __call__(self, size: int) -> bytes:
        return hashlib.shake_128(f"{self.key} {next(self.calls)}".encode()).digest(size)


class Owned(Rows):
    def __init__(self, x: torch.Tensor, y: torch.Tensor, patients: tuple[str, ...]) -> None:
        super().__init__(x, y)
        self.patients = patients


def owned(patients: int, images: int = 1) -> Owned:
    rng = torch.Generator().manual_seed(5)
    count = patients * images
    x, y = torch.randn(count, 1, 8, 8, generator=rng), torch.randint(0, 2, (count,), generator=rng)
    return Owned(x, y, tuple(f"p{i % patients}" for i in range(count)))  # images of a patient do not lie together


def without(data: Owned, patient: str) -> Owned:
    rest = [i for i, who in enumerate(data.patients) if who != patient]
    return Owned(data.x[rest], data.y[rest], tuple(data.patients[i] for i in rest))


def replaced(data: Owned, patient: str) -> Owned:
    own = torch.tensor([who == patient for who in data.patients])
    other = torch.randn(data.x.shape, generator=torch.Generator().manual_seed(6)) * 3
    return Owned(
        torch.where(own[:, None, None, None], other, data.x), torch.where(own, 1 - data.y, data.y), data.patients
    )


def sums(task: Any, data: Any, key: str = "k", steps: int = 1, start: Tree | None = None, **more: Any) -> list[Tree]:
    """The clipped sum of each step, before noise, in a fit that releases noise of nearly none."""
    seen: list[Tree] = []

    def keep(use: Use, noise: Noise) -> Tree:
        seen.append({n: g.clone() for n, g in use.value.items()})
        return noise(use.value)

    fields: dict[str, Any] = {"batch_size": 1000, "lr": 0.1, "noise": 1e-9, "bound": BOUND, "unit": "patient"} | more
    with audited(keep):
        DPSGD(steps=steps, **fields).fit(
            task, start or task.first(0), Site("a", {"train": data}, entropy=Entropy(key)), 0
        )
    assert len(seen) == steps
    return seen


def moved(a: Tree, b: Tree) -> float:
    return float(tree.norm(tree.sub(a, b))) / BOUND


CASES: dict[str, tuple[Any, dict[str, Any], int]] = {
    "plain": (PLAIN, {}, 1),
    "dropout 0.2": (SOME, {}, 1),
    "dropout 0.5": (HALF, {}, 1),
    "augment": (PLAIN, {"augment": Augment()}, 1),
    "strong augment": (PLAIN, {"augment": STRONG}, 1),
    "both": (HALF, {"augment": Augment()}, 1),
    "both, several images": (HALF, {"augment": Augment()}, 3),
    "both, in chunks": (HALF, {"augment": Augment(), "chunk": 4}, 1),
    "both, several images, in chunks": (HALF, {"augment": Augment(), "chunk": 5}, 3),
    "both, of records": (HALF, {"augment": Augment(), "unit": "record", "chunk": 4}, 1),
}


@pytest.mark.parametrize("case", CASES)
def test_one_patient_moves_the_sum_by_the_bound_at_most(case: str) -> None:
    task, more, images = CASES[case]
    data = owned(11, images)
    whole = sums(task, data, **more)[0]
    for patient in ("p0", "p4", "p10"):
        less = moved(whole, sums(task, without(data, patient), **more)[0])
        other = moved(whole, sums(task, replaced(data, patient), **more)[0])
        assert 0.5 < less <= 1 + 1e-4, f"removed: {less} C"
        assert 0.1 < other <= 2 + 1e-4, f"replaced: {other} C"


@pytest.mark.parametrize("more", [{}, {"augment": Augment()}], ids=["dropout", "dropout and augmentation"])
def test_the_sum_is_that_of_each_patient_alone(more: dict[str, Any]) -> None:
    """Whichever others are in the batch, and however it is cut into chunks, a patient adds the same."""
    data = owned(6, 2)
    whole = sums(HALF, data, **more)[0]
    for chunk in (1, 5, 7):
        again = sums(HALF, data, chunk=chunk, **more)[0]
        assert all(torch.allclose(again[n], whole[n], atol=1e-6) for n in whole), chunk
    alone = [sums(HALF, Owned(data.x[[i, i + 6]], data.y[[i, i + 6]], (f"p{i}",) * 2), **more)[0] for i in range(6)]
    total = alone[0]
    for one in alone[1:]:
        total = tree.add(total, one)
    assert all(torch.allclose(total[n], whole[n], atol=1e-6) for n in whole)


def masks(task: Any, data: Any, key: str = "k", steps: int = 1, seed: int = 0, **more: Any) -> list[torch.Tensor]:
    """What the dropout of ``task`` let pass, step by step: [images, ...] of zeros and scaled ones."""
    seen: list[torch.Tensor] = []
    original = KeyedRandomness.uniform

    def keep(self: KeyedRandomness, *args: Any) -> torch.Tensor:
        seen.append(original(self, *args))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KeyedRandomness, "uniform", keep)
        site = Site("a", {"train": data}, seed=seed, entropy=Entropy(key))
        DPSGD(steps=steps, batch_size=1000, noise=1.0, **more).fit(task, task.first(0), site, 0)
    return seen


def test_randomness_differs_between_images_steps_and_fits_and_the_studys_seed_has_no_part_in_it() -> None:
    data = owned(4, 2)
    first, second = masks(HALF, data, steps=2)
    assert len(first) == 8
    rows = [*first, *second, *masks(HALF, data, key="another")[0]]
    assert len({tuple(row.flatten().tolist()) for row in rows}) == 24
    assert torch.equal(masks(HALF, data, seed=1)[0], first), "the same key gives the same"
    twice = DPSGD(steps=1, batch_size=1000, noise=1e-9, bound=1.0)
    a, b = (twice.fit(HALF, HALF.first(0), Site("a", {"train": data}, seed=3), 0) for _ in range(2))
    assert not all(torch.allclose(a[n], b[n], atol=1e-5) for n in a), "fits with one seed have secrets of their own"
    views = list[torch.Tensor]()

    def augment(batch: Batch, rng: torch.Generator) -> Batch:
        views.append(Augment().view(batch[0], rng))
        return views[-1], batch[1]

    same = Owned(data.x[:1].repeat(4, 1, 1, 1), data.y[:4], ("a", "a", "b", "c"))
    sums(PLAIN, same, steps=2, augment=augment)
    assert [len(view) for view in views] == [1] * 8
    assert len({tuple(view.flatten().tolist()) for view in views}) == 8


class Dropped(nn.Module):
    def __init__(self, drop: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.scale, self.drop = nn.Parameter(torch.ones(())), drop

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(x) * self.scale


def drawn(drop: Callable[[torch.Tensor], torch.Tensor], *shape: int, count: int = 40) -> torch.Tensor:
    """What ``drop`` makes of ones, for each of ``count`` examples with a key of its own."""
    model, out = Dropped(drop), []

    def loss(module: nn.Module, batch: Any) -> torch.Tensor:
        return (module(batch[0]) * batch[1]).sum()

    x = torch.ones(count, *shape)
    keys = torch.tensor([key_of(b"k" * 16, i) for i in range(count)])
    for place in np.ndindex(*shape):  # ∂(scale · drop(1) · y)/∂scale = drop(1) where y is 1
        y = torch.zeros(count, *shape)
        y[(slice(None), *place)] = 1
        out.append(per_example_gradients(model, {"scale": model.scale.detach()}, loss, (x, y), keys)["scale"])
    return torch.stack(out, 1)


@pytest.mark.parametrize(
    ("drop", "values", "share"),
    [
        (lambda x: F.dropout(x, 0.2, True), (0.0, 1.25), 0.8),
        (lambda x: F.dropout(x, 0.5, True), (0.0, 2.0), 0.5),
        (lambda x: x * torch.bernoulli(torch.full_like(x, 0.3)), (0.0, 1.0), 0.3),
        (lambda x: x * torch.empty_like(x).bernoulli_(0.3), (0.0, 1.0), 0.3),
        (lambda x: x * torch.bernoulli(x, 0.3), (0.0, 1.0), 0.3),
        (lambda x: (torch.rand_like(x) < 0.3).float(), (0.0, 1.0), 0.3),
        (lambda x: (torch.rand(x.shape) < 0.3).float(), (0.0, 1.0), 0.3),
        (lambda x: (torch.rand(x.shape, generator=torch.Generator()) < 0.3).float(), (0.0, 1.0), 0.3),
        (lambda x: (torch.empty_like(x).uniform_(2, 12) < 5).float(), (0.0, 1.0), 0.3),
        (lambda x: torch.randint(0, 4, x.shape).clamp_min(2).float() - 2, (0.0, 1.0), 0.25),
        (lambda x: torch.randint(3, 5, x.shape, generator=torch.Generator()).float(), (3.0, 4.0), 0.5),
    ],
)
def test_dropout_keeps_its_rate_and_its_scale(drop: Any, values: Any, share: float) -> None:
    found = drawn(drop, 6, 6)
    assert set(found.unique().tolist()) == set(values)
    upper = int((found == values[1]).sum())
    assert stats.binomtest(upper, found.numel(), share).pvalue > 1e-4
    assert len({tuple(row.tolist()) for row in found}) == 40


def test_whole_channels_are_dropped_together() -> None:
    found = drawn(lambda x: F.dropout2d(x, 0.5, True), 6, 2, 2).view(40, 6, 4)
    assert bool((found == found[:, :, :1]).all())
    assert stats.binomtest(int((found[:, :, 0] == 2).sum()), 240, 0.5).pvalue > 1e-4


@pytest.mark.parametrize(
    ("draw", "law"),
    [
        (lambda x: torch.randn_like(x), stats.norm()),
        (lambda x: torch.randn(x.shape), stats.norm()),
        (lambda x: torch.empty_like(x).normal_(1.0, 2.0), stats.norm(1, 2)),
        (lambda x: torch.normal(x, 2.0), stats.norm(1, 2)),
        (lambda x: torch.normal(1.0, 2.0, x.shape), stats.norm(1, 2)),
        (lambda x: torch.rand_like(x), stats.uniform()),
        (lambda x: torch.empty_like(x).exponential_(), stats.expon()),
        (lambda x: torch.rand(x.shape, dtype=torch.float64).float(), stats.uniform()),
    ],
)
def test_numbers_have_the_law_that_was_asked_for(draw: Any, law: Any) -> None:
    found = drawn(draw, 5, 5)
    assert stats.kstest(found.flatten().numpy(), law.cdf).pvalue > 1e-4
    assert abs(float(np.corrcoef(found[:, 0], found[:, 1])[0, 1])) < 0.6
    assert abs(float(np.corrcoef(found[0], found[1])[0, 1])) < 0.7


def test_bits_are_those_of_splitmix64() -> None:
    """The first numbers of the reference implementation for the seed 1234567, http://prng.di.unimi.it/splitmix64.c."""
    wanted = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [int(z) % 2**64 for z in bits(torch.tensor([1234567]), 5)[0]] == wanted
    assert key_of(b"k" * 16, 0, "p1", 0) != key_of(b"k" * 16, 0, "p1", 1)
    assert 0 <= key_of(b"k" * 16, 0, "p1", 0) < 2**63


def test_two_dropouts_of_one_network_are_independent() -> None:
    both = drawn(lambda x: F.dropout(x, 0.5, True) + 10 * F.dropout(x, 0.5, True), 6, 6)
    counts = [int((both == value).sum()) for value in (0.0, 2.0, 20.0, 22.0)]
    assert sum(counts) == both.numel()
    assert stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (lambda x: x * torch.randperm(8), r"the module body \(Odd\) draws random numbers with .*randperm"),
        (
            lambda x: x * torch.multinomial(torch.ones(8) / 8, 8).float(),
            r"the module body \(Odd\) .* with .*multinomial",
        ),
        (lambda x: x * torch.empty(8).uniform_(), "separated by patient"),
        (lambda x: x * random.random(), "from Python's global random generator"),
        (lambda x: x * float(np.random.rand()), "from NumPy's global random generator"),
    ],
)
def test_randomness_that_cannot_be_tied_to_a_patient_is_refused(forward: Any, why: str) -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return forward(x)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = Odd(), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(x))

    task = Classification(Whole)  # type: ignore[arg-type]
    data = Owned(torch.randn(4, 8), torch.tensor([0, 1, 0, 1]), tuple("abcd"))
    with pytest.raises(UnknownRandomness, match=why):
        DPSGD(noise=1.0).fit(task, task.first(0), Site("a", {"train": data}), 0)


def test_data_that_draw_from_a_common_stream_are_refused() -> None:
    class Jittered(Owned):
        def __getitem__(self, index: torch.Tensor) -> Any:
            x, y = super().__getitem__(index)
            return x + torch.rand(1), y

    data = owned(4)
    jittered = Jittered(data.x, data.y, data.patients)
    with pytest.raises(UnknownRandomness, match=r"from PyTorch's global random generator.*training\.augment"):
        DPSGD(noise=1.0).fit(PLAIN, PLAIN.first(0), Site("a", {"train": jittered}), 0)


def test_attention_with_and_without_dropout() -> None:
    """Attention is tagged as random at any rate; at 0 it draws nothing, and a transformer's dropout is by example."""
    for rate in (0.0, 0.3):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, rate, batch_first=True)
        params = {n: p.detach() for n, p in layer.named_parameters()}
        loss = lambda model, batch: model(batch[0]).pow(3).sum()  # noqa: E731
        x = torch.randn(5, 3, 8)
        keys = torch.tensor([key_of(b"k" * 16, i) for i in range(5)])
        together = per_example_gradients(layer, params, loss, (x, x), keys)
        apart = [
            per_example_gradients(layer, params, loss, (x[i : i + 1], x[i : i + 1]), keys[i : i + 1]) for i in range(5)
        ]
        assert all(torch.allclose(together[n][i], apart[i][n][0], atol=1e-4) for n in params for i in range(5))
        same = per_example_gradients(layer, params, loss, (x[:1].repeat(2, 1, 1),) * 2, keys[:2])
        assert torch.allclose(same["linear1.weight"][0], same["linear1.weight"][1], rtol=0.01) == (rate == 0)


def test_without_keys_nothing_may_be_random() -> None:
    data, params = owned(3), HALF.first(0)
    model = HALF.model().train()
    named = {n: p.detach() for n, p in model.named_parameters()}
    assert params.keys() >= named.keys()
    with pytest.raises(UnknownRandomness, match="there are no keys"):
        per_example_gradients(model, named, HALF.loss, data[torch.arange(3)])


def test_the_gradient_is_that_of_the_dropped_network() -> None:
    """With the masks that were drawn, an ordinary backward pass finds the same gradient."""
    layer = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 1))
    params = {n: p.detach() for n, p in layer.named_parameters()}
    loss = lambda model, batch: model(batch[0]).square().sum()  # noqa: E731
    x, keys = torch.randn(1, 4), torch.tensor([key_of(b"k" * 16, "p", 0)])
    ours = per_example_gradients(layer, params, loss, (x, x), keys)
    with KeyedRandomness(keys, layer):
        mask = torch.bernoulli(torch.empty(1, 1, 16), 0.5)[0] * 2
    value = layer[2](layer[0](x) * mask).square().sum()
    for (name, _), g in zip(
        layer.named_parameters(), torch.autograd.grad(value, list(layer.parameters())), strict=True
    ):
        assert torch.allclose(ours[name][0], g, atol=1e-5), name


def test_it_still_learns_with_dropout_and_augmentation() -> None:
    """As well as with one common stream of random numbers: 0.97 to 1.00 in six trials, against 0.97 to 1.00."""
    rng, y = torch.Generator().manual_seed(0), torch.arange(200) % 2
    x = torch.randn(200, 1, 8, 8, generator=rng)
    x[y == 1, :, :4] += 2.0  # the upper half is brighter, which no mirror from left to right undoes
    wide = Classification(Network("cnn", (1, 8, 8), 2, (("width", 8), *BASE[1:], ("dropout", 0.2))))
    site = Site("a", {"train": Owned(x[:80], y[:80], tuple(f"p{i}" for i in range(80)))}, entropy=Entropy("learn"))
    local = DPSGD(epochs=15, batch_size=20, lr=0.2, momentum=0.5, noise=0.3, bound=1.0, augment=Augment(degrees=5.0))
    model = wide.model()
    model.load_state_dict(local.fit(wide, wide.first(0), site, 0), strict=False)
    assert float((model.eval()(x[80:]).argmax(1) == y[80:]).float().mean()) > 0.9

"""Private training: each gradient by itself, clipped, summed, hidden; and the limits in which it is plain training."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from polyclinic.core import tree
from polyclinic.core.execution import execute
from polyclinic.core.metering import Noise, Use, audited
from polyclinic.core.site import SecretRng, Site
from polyclinic.core.tree import Tree
from polyclinic.learning.networks.model_tree import cached_model, gradient
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training import dp_sgd
from polyclinic.learning.training.dp_sgd import DPSGD, Spend, add_noise, meter, metered, per_example_gradients
from polyclinic.learning.training.local import LocalTraining, Proximal
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.personalization.apfl import APFL
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
    model = cached_model(task, params)
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
    model = GradSampleModule(cached_model(GROUPED, params, slot="opacus"))
    sgd = torch.optim.SGD(model.parameters(), 1.0)
    theirs = DPOptimizer(sgd, noise_multiplier=0.0, max_grad_norm=bound, expected_batch_size=9)
    nn.functional.cross_entropy(model(data.x), data.y).backward()
    theirs.step()
    for name, p in model._module.named_parameters():
        assert torch.allclose(ours[name], params[name] - p.detach(), atol=1e-6), name
    norms = [
        tree.norm(
            {
                n: g[i]
                for n, g in per_example_gradients(
                    cached_model(GROUPED, params),
                    {n: p.detach() for n, p in cached_model(GROUPED, params).named_parameters()},
                    GROUPED.loss,
                    data[torch.arange(9)],
                ).items()
            }
        )
        for i in range(9)
    ]
    assert min(norms) > bound, "the bound must bind for this to be a test"


def test_without_bound_and_noise_and_with_everyone_it_is_gradient_descent() -> None:
    data, params = data_of(8), GROUPED.first(0)
    private = DPSGD(epochs=3, batch_size=8, lr=0.1, noise=ALMOST_NONE / 1e6, bound=1e6)
    plain = LocalTraining(epochs=3, batch_size=8, lr=0.1)
    ours, theirs = (local.fit(GROUPED, params, site_of(data), 0) for local in (private, plain))
    assert all(torch.allclose(ours[n], theirs[n], atol=1e-5) for n in theirs)


def test_with_a_penalty_too() -> None:
    data, params = data_of(8), GROUPED.first(0)
    private = DPSGD(epochs=3, batch_size=8, lr=0.1, noise=ALMOST_NONE / 1e6, bound=1e6, penalty=Proximal(0.5))
    ours, theirs = (
        local.fit(GROUPED, params, site_of(data), 0)
        for local in (private, LocalTraining(epochs=3, batch_size=8, lr=0.1, penalty=Proximal(0.5)))
    )
    assert all(torch.allclose(ours[n], theirs[n], atol=1e-5) for n in theirs)
    seen: list[str] = []

    def correct(name: str, g: torch.Tensor) -> torch.Tensor:
        seen.append(name)
        return torch.zeros_like(g)

    still = replace(private, penalty=None).fit(
        GROUPED, params, site_of(data), 0, gradient_hook=correct, after_step=lambda model: seen.append("after")
    )
    assert all(torch.equal(still[n], params[n]) for n in params)
    assert seen.count("after") == 3
    head = private.fit(GROUPED, params, site_of(data), 0, trainable=GROUPED.network.in_head)
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


@pytest.mark.parametrize("count", [10, 1000, 3_000_000])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e37])
def test_rounding_does_not_carry_a_units_gradient_beyond_the_bound(
    count: int, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of squares in single precision are too small by up to 1 % for tensors of millions of numbers."""
    rng = torch.Generator().manual_seed(count)
    gradients = {"w": size * torch.randn(1, count, generator=rng), "v": torch.full((1, count), 0.1 * size)}
    monkeypatch.setattr(dp_sgd, "per_example_gradients", lambda *given: gradients)
    empty = torch.zeros(1, dtype=torch.int64)
    parts = [(empty, empty, (empty, empty))]
    named = {n: nn.Parameter(torch.zeros(count)) for n in gradients}
    for bound in (1e-6, 0.7, 1.0, 3.3):
        batches = iter([(torch.ones(1), parts)])
        length = tree.norm(
            DPSGD(bound=bound)._clipped_sum(nn.Identity(), named, lambda *given: torch.zeros(()), batches)
        )
        assert length <= bound
        assert length >= 0.999 * min(bound, tree.norm(gradients)) or (length == 0 and size > 1e30)


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
    each = per_example_gradients(cached_model(GROUPED, params), params, GROUPED.loss, data[torch.arange(6)])
    alone = [{n: g[i] for n, g in each.items()} for i in range(6)]
    assert all(tree.norm(g) > 100 * bound for g in alone)
    wanted = tree.zeros(params)
    for g in alone:
        wanted = tree.add(wanted, tree.scale(g, bound / 6 / tree.norm(g)))
    assert tree.norm(tree.sub(step, wanted)) < 0.02 * tree.norm(wanted)


def test_nobody_to_train_on_is_refused() -> None:
    with pytest.raises(ValueError, match="DPSGD: this site has no training examples"):
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
    sizes = torch.tensor([float((SecretRng().uniform(200) < 0.1).sum()) for _ in range(400)])
    assert float(sizes.mean()) == pytest.approx(20, abs=5 * math.sqrt(18 / 400))
    assert float(sizes.var()) == pytest.approx(18, rel=0.4)
    assert DPSGD(batch_size=500).spend(data) == Spend(1.0, 1.0, 1, "patient")


def test_noise_lies_on_a_grid() -> None:
    noisy = add_noise(torch.zeros(1000, dtype=torch.float64), 3.0, SecretRng())
    steps = noisy / 2.0 ** (1 - 20)
    assert torch.equal(steps, steps.round())
    assert torch.equal(add_noise(noisy, 0.0, SecretRng()), noisy)


def test_what_cannot_be_private_is_refused_with_the_remedy() -> None:
    rows = site_of(data_of(8))
    with pytest.raises(ValueError, match='build it with the option norm = "group"'):
        DPSGD().fit(BATCHED, BATCHED.first(0), rows, 0)
    weighted = replace(GROUPED, class_weights=(1.0, 2.0))
    with pytest.raises(
        ValueError, match=r"noise and bound .*; DPSGD: class_weights have no effect.*; DPSGD: remove amp"
    ):
        DPSGD(noise=0.0, amp=True).fit(weighted, weighted.first(0), rows, 0)
    with pytest.raises(ValueError, match="do not name the patient of each image"):
        DPSGD().fit(GROUPED, GROUPED.first(0), site_of(blobs(0, 8, (1, 8, 8))), 0)
    by_itself = APFL(GROUPED, DPSGD())
    site = site_of(data_of(8))
    with pytest.raises(ValueError, match="takes individual training steps"):
        execute(by_itself, by_itself.request(by_itself.init(GROUPED.first(0))), {}, site)
    with pytest.raises(ValueError, match="takes individual training steps"):
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
        LocalTraining().fit(GROUPED, GROUPED.first(0), site_of(data), 0)
    assert inner == [Spend(1.0, 0.5, 2, "patient")]
    assert outer == [Spend(1.0)]
    meter(Spend(1.0))  # there is no meter


def test_a_method_with_private_training_keeps_its_promises() -> None:
    sites = {
        name: replace(site, data={"train": data_of(8 + k)}) for k, (name, site) in enumerate(little_sites().items())
    }
    check_method(FedAvg(GROUPED, DPSGD(batch_size=4, noise=0.5)), GROUPED.first(0), sites)


LINEAR = Classification(Network("mlp", (3,), 2, (("depth", 0),)))


def table(count: int, images: int = 1) -> Patients:
    return data_of(count, (3,), images)


@pytest.mark.parametrize(
    ("more", "steps", "rate"),
    [
        ({"batch_size": 4}, 3, 0.4),
        ({"batch_size": 5}, 2, 0.5),
        ({"batch_size": 9}, 2, 0.9),
        ({"batch_size": 10}, 1, 1.0),
        ({"batch_size": 11}, 1, 1.0),
        ({"batch_size": 4, "epochs": 3}, 9, 0.4),
        ({"batch_size": 4, "epochs": 3, "steps": 2}, 2, 0.4),
        ({"batch_size": 4, "unit": "record"}, 5, 0.2),
    ],
)
def test_what_a_fit_costs_is_what_it_says_beforehand(more: dict[str, Any], steps: int, rate: float) -> None:
    """A budget is asked before training; ten patients have two images each."""
    data, local = table(10, 2), DPSGD(noise=1.5, **more)
    assert local.spend(data) == Spend(1.5, rate, steps, more.get("unit", "patient"))
    assert local.count(data) == steps
    taken = list[nn.Module]()
    with metered() as spent:
        local.fit(LINEAR, LINEAR.first(0), site_of(data), 0, after_step=taken.append)
    assert spent == [local.spend(data)]
    assert len(taken) == steps


def test_left_to_itself_noise_is_as_deep_as_the_bound_of_1_and_protects_patients() -> None:
    local = DPSGD()
    assert (local.noise, local.bound, local.unit) == (1.0, 1.0, "patient")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"noise": 0.0}, "noise and bound must be above 0, not 0.0 and 1.0"),
        ({"noise": -1.0}, "noise and bound must be above 0, not -1.0"),
        ({"bound": 0.0}, "noise and bound must be above 0, not 1.0 and 0.0"),
        ({"bound": -2.0}, "noise and bound must be above 0"),
        ({"noise": math.nan}, "noise and bound must be above 0"),
        ({"bound": math.nan}, "noise and bound must be above 0"),
        ({"amp": True}, "remove amp and clip_norm"),
        ({"clip_norm": 1.0}, "remove amp and clip_norm"),
        ({"clip_norm": 0.0}, "remove amp and clip_norm"),
    ],
)
def test_each_setting_that_is_not_private_is_refused_and_nothing_is_spent(more: dict[str, Any], said: str) -> None:
    local = DPSGD(**more)
    [problem] = local.validate(LINEAR, LINEAR.model())
    assert f"DPSGD: {said}" in problem
    with metered() as spent, pytest.raises(ValueError, match=said):
        local.fit(LINEAR, LINEAR.first(0), site_of(table(4)), 0)
    assert not spent
    assert DPSGD(noise=1e-3, bound=1e-3).validate(LINEAR, LINEAR.model()) == []


def test_everything_that_is_wrong_is_told_at_once() -> None:
    weighted = replace(BATCHED, class_weights=(1.0, 2.0))
    nobody = Patients(torch.zeros(0, 1, 8, 8), torch.zeros(0), ())
    with pytest.raises(
        ValueError,
        match=r"noise and bound .*; DPSGD: this network has .*; DPSGD: class_weights .*; DPSGD: remove .*; DPSGD: this site has no training examples",
    ):
        DPSGD(noise=0.0, amp=True).fit(weighted, weighted.first(0), site_of(nobody), 0)


def test_steps_that_a_method_takes_by_itself_are_refused() -> None:
    with pytest.raises(ValueError, match="which would not be private"):
        DPSGD().stepper(LINEAR.model())
    with pytest.raises(ValueError, match="which would not be private"):
        DPSGD().batches(table(4), torch.Generator())


class One(SecretRng):
    """Normal noise that is always 1."""

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=torch.float64)


@pytest.mark.parametrize("deviation", [3.0, 1.0, 0.75, 1e-3])
def test_noise_is_added_and_rounded_to_a_grid_of_a_millionth_of_its_deviation(deviation: float) -> None:
    """The grid hides which numbers the noise could have been; between half a millionth and one it costs nothing."""
    leaf = torch.tensor([[0.1, -7.3], [0.0, 1e-9]], dtype=torch.float64)
    noisy = add_noise(leaf, deviation, One())
    grid = 2.0 ** (math.floor(math.log2(deviation)) - 20)
    assert torch.equal((noisy / grid).round() * grid, noisy)
    assert bool(((noisy - leaf - deviation).abs() <= grid / 2 * (1 + 1e-6)).all())
    assert add_noise(leaf.float(), deviation, One()).dtype == torch.float32


def test_nothing_is_drawn_where_there_is_nothing_to_hide() -> None:
    def never(size: int) -> bytes:
        raise AssertionError

    assert add_noise(torch.ones(3), 0.0, SecretRng(never)).tolist() == [1.0, 1.0, 1.0]
    assert add_noise(torch.zeros(0, 4), 2.0, SecretRng(never)).shape == (0, 4)


def test_a_patients_images_are_told_by_name_whatever_their_order() -> None:
    """A record's name is its patient's and its place among that patient's, so that it stays when another goes."""
    rows = blobs(3, 5, (3,))
    mixed = Patients(rows.x, rows.y, ("b", "a", "b", "c", "a"))

    def drawn(data: Any, unit: Any) -> list[Any]:
        seen = []

        def keep(use: Use, noise: Noise) -> Tree:
            seen.append(use.sampled)
            return noise(use.value)

        with audited(keep):
            DPSGD(steps=1, batch_size=100, unit=unit).fit(LINEAR, LINEAR.first(0), site_of(data), 0)
        return seen

    assert drawn(mixed, "patient") == [{"a", "b", "c"}]
    assert drawn(mixed, "record") == [{("b", 0), ("a", 0), ("b", 1), ("c", 0), ("a", 1)}]
    assert drawn(rows, "record") == [{0, 1, 2, 3, 4}], "without names, by position"


class Watched(Patients):
    """Writes down how many images are asked for at once."""

    asked: list[int]

    def __getitem__(self, index: torch.Tensor) -> Any:
        self.asked.append(len(index))
        return super().__getitem__(index)


@pytest.mark.parametrize(
    ("images", "chunk", "asked"),
    [
        (1, None, [64, 64, 2]),
        (1, 50, [50, 50, 30]),
        (2, 50, [50, 50, 50, 50, 50, 10]),
        (3, 100, [100, 100, 100, 90]),
    ],
)
def test_no_more_images_are_held_at_once_than_asked_for_and_64_by_default(
    images: int, chunk: int | None, asked: list[int]
) -> None:
    """Else a patient with very many images would need the memory of all their gradients."""
    rows = table(130, images)
    data = Watched(rows.x, rows.y, rows.patients)
    data.asked = []
    DPSGD(steps=1, batch_size=130, chunk=chunk).fit(LINEAR, LINEAR.first(0), site_of(data), 0)
    assert data.asked == asked


def test_rates_losses_data_and_roles_are_those_of_plain_training() -> None:
    """The learning rate of the round, another loss, other data, and another role."""
    data, other, params = table(8), blobs(7, 8, (3,)), LINEAR.first(0)
    other = Patients(other.x, other.y, data.patients)
    site = Site("a", {"train": data, "val": other})
    common: dict[str, Any] = {
        "batch_size": 8,
        "lr": 0.5,
        "lr_decay": 0.5,
        "momentum": 0.9,
        "weight_decay": 0.1,
        "steps": 3,
    }
    private, plain = DPSGD(noise=ALMOST_NONE / 1e6, bound=1e6, **common), LocalTraining(**common)
    double = lambda model, batch: 2 * LINEAR.loss(model, batch)  # noqa: E731
    ways: list[dict[str, Any]] = [
        {"round": 0},
        {"round": 2},
        {"round": 0, "role": "val"},
        {"round": 0, "data": other},
        {"round": 0, "loss": double},
    ]
    ends = []
    for way in ways:
        ours, theirs = (local.fit(LINEAR, params, site, **way) for local in (private, plain))
        assert all(torch.allclose(ours[n], theirs[n], atol=1e-5) for n in theirs), way
        ends.append(tree.flatten(ours))
    assert not any(torch.allclose(ends[0], end, atol=1e-3) for end in ends[1:])
    assert torch.allclose(ends[2], ends[3], atol=1e-6)


def test_a_mistake_in_a_loss_is_told_as_it_is() -> None:
    """And not as if random numbers were the trouble."""

    def wrong(model: nn.Module, batch: Any) -> torch.Tensor:
        raise RuntimeError("sizes do not match")

    for task in (LINEAR, Classification(Network("mlp", (3,), 2, (("depth", 1), ("dropout", 0.5))))):
        with pytest.raises(RuntimeError, match=r"^sizes do not match$"):
            DPSGD().fit(task, task.first(0), site_of(table(4)), 0, loss=wrong)


def test_a_units_gradient_is_the_mean_of_its_images_and_clipped_to_just_below_the_bound() -> None:
    data, params = table(3, 2), LINEAR.first(0)
    each = per_example_gradients(cached_model(LINEAR, params), params, LINEAR.loss, data[torch.arange(6)])
    for bound in (1e-3, 1e3):
        seen: list[Use] = []

        def keep(use: Use, noise: Noise, seen: list[Use] = seen) -> Tree:
            seen.append(use)
            return noise(use.value)

        with audited(keep):
            DPSGD(steps=1, batch_size=3, bound=bound, chunk=2).fit(LINEAR, params, site_of(data), 0)
        wanted = tree.zeros(params)
        for patient in range(3):
            g = {n: leaf[2 * patient : 2 * patient + 2].mean(0) for n, leaf in each.items()}
            wanted = tree.add(wanted, tree.scale(g, min(1.0, bound / tree.norm(g))))
        assert all(torch.allclose(seen[0].value[n], wanted[n], rtol=3e-6, atol=1e-9 * bound) for n in wanted)
        assert seen[0].deviations == dict.fromkeys(params, bound)

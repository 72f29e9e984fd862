"""The seam before all noise: what an auditor sees of each mechanism is what the accountant counts on."""

import hashlib
import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from polyclinic.core import tree
from polyclinic.core.aggregates import WeightedMean
from polyclinic.core.metering import Noise, Spend, Use, audited, hidden, meter, metered
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree
from polyclinic.learning.networks.model_tree import cached_model
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training import dp_sgd
from polyclinic.learning.training.dp_sgd import DPSGD, per_example_gradients
from polyclinic.privacy.gaussian import BELOW, AdaptiveClip, Clip, Gaussian
from polyclinic.privacy.sparse_vector import SparseVector
from tests.conftest import Rows, blobs

TASK = Classification(Network("cnn", (1, 8, 8), 2, (("width", 4), ("depth", 2), ("norm", "group"))))
USE = Use({"w": torch.ones(3)}, Spend(1.0), {"w": 1.0})


def test_without_an_auditor_noise_is_added_and_with_one_it_decides() -> None:
    double = lambda value: tree.scale(value, 2.0)  # noqa: E731
    assert torch.equal(hidden(USE, double)["w"], torch.full((3,), 2.0))
    seen: list[Use] = []

    def auditor(use: Use, noise: Noise) -> Tree:
        seen.append(use)
        return {"w": noise(use.value)["w"] + 5}

    with audited(auditor):
        assert torch.equal(hidden(USE, double)["w"], torch.full((3,), 7.0))
        with audited(lambda use, noise: {"w": torch.zeros(3)}):
            assert torch.equal(hidden(USE, double)["w"], torch.zeros(3))
        hidden(USE, double)
    assert seen == [USE, USE]
    with pytest.raises(ZeroDivisionError), audited(auditor):
        raise ZeroDivisionError
    assert torch.equal(hidden(USE, double)["w"], torch.full((3,), 2.0)), "an audit ends with its block"


def test_what_is_not_said_of_a_spend_or_a_use_is_what_assumes_least() -> None:
    """One step, on everyone, for a whole site, by noise that the site adds alone; nothing bounded, no one sampled."""
    assert Spend(1.5) == Spend(1.5, rate=1.0, steps=1, unit="site", pure=0.0, share=1)
    assert Use({}, Spend(1.0), {}) == Use({}, Spend(1.0), {}, bound=0.0, sampled=None)


def test_the_innermost_meter_counts_and_counting_ends_with_its_block() -> None:
    meter(Spend(9.0))  # there is no meter, so nothing happens
    with metered() as outer:
        meter(Spend(1.0))
        with metered() as inner:
            meter(Spend(2.0))
            meter(Spend(2.0))
        with pytest.raises(ZeroDivisionError), metered():
            raise ZeroDivisionError
        meter(Spend(3.0))
    meter(Spend(4.0))
    assert (outer, inner) == ([Spend(1.0), Spend(3.0)], [Spend(2.0), Spend(2.0)])


def test_each_thread_counts_its_own() -> None:
    """Two sites' jobs in one process: neither pays for the other, and neither is audited by the other's auditor."""
    with metered() as mine, audited(lambda use, noise: {"w": torch.zeros(3)}), ThreadPoolExecutor(1) as other:
        other.submit(meter, Spend(2.0)).result()
        assert torch.equal(other.submit(hidden, USE, lambda value: value).result()["w"], torch.ones(3))
        meter(Spend(1.0))
    assert mine == [Spend(1.0)]


def test_names_stay_where_they_were() -> None:
    assert (dp_sgd.Spend, dp_sgd.meter, dp_sgd.metered) == (Spend, meter, metered)


def uses_of(act: Any) -> list[Use]:
    seen: list[Use] = []

    def keep(use: Use, noise: Noise) -> Tree:
        seen.append(use)
        return {name: torch.full_like(leaf, 0.25) for name, leaf in use.value.items()}

    with audited(keep):
        act()
    return seen


class Owned(Rows):
    def __init__(self, patients: int, images: int = 1) -> None:
        rows = blobs(3, patients * images, (1, 8, 8))
        super().__init__(rows.x, rows.y)
        self.patients = tuple(f"p{i // images}" for i in range(patients * images))


class Entropy:
    def __init__(self, key: str) -> None:
        self.key, self.calls = key, itertools.count()

    def __call__(self, size: int) -> bytes:
        return hashlib.shake_128(f"{self.key} {next(self.calls)}".encode()).digest(size)


@pytest.mark.parametrize("unit", ["patient", "record"])
def test_dp_sgd_shows_each_step_as_it_is_sampled_clipped_and_spent(unit: Any) -> None:
    data, params, drawn = Owned(20, 2), TASK.first(0), []
    local = DPSGD(batch_size=5, steps=6, lr=1.0, noise=2.0, bound=0.05, unit=unit)
    ends: list[Tree] = []

    def act() -> None:
        ends.append(
            local.fit(
                TASK,
                params,
                Site("a", {"train": data}, entropy=Entropy("s")),
                0,
                after_step=lambda model: drawn.append({n: p.detach().clone() for n, p in model.named_parameters()}),
            )
        )

    uses = uses_of(act)
    rate = 5 / (20 if unit == "patient" else 40)
    assert [use.spend for use in uses] == [Spend(2.0, rate, 1, unit)] * 6
    assert all(set(use.deviations.values()) == {2.0 * 0.05} for use in uses)
    assert all(use.value.keys() == use.deviations.keys() == params.keys() for use in uses)
    assert {type(name) for use in uses for name in use.sampled or ()} == ({str} if unit == "patient" else {tuple})
    sizes = [len(use.sampled or ()) for use in uses]
    assert 0 < sum(sizes) < 6 * 20
    # each sum is that of the clipped mean gradients of who was sampled, at the parameters of that step
    before = [{n: params[n] for n in drawn[0]}, *drawn[:-1]]
    for use, at in list(zip(uses, before, strict=True))[:3]:
        total = tree.zeros(use.value)
        for name in use.sampled or ():
            key: Any = name
            patient, nth = (key, None) if unit == "patient" else key
            mine = [i for i, who in enumerate(data.patients) if who == patient]
            mine = mine if nth is None else [mine[nth]]
            each = per_example_gradients(cached_model(TASK, params), at, TASK.loss, data[torch.tensor(mine)])
            g = {n: leaf.mean(0) for n, leaf in each.items()}
            total = tree.add(total, tree.scale(g, min(1.0, 0.05 / tree.norm(g))))
        assert all(torch.allclose(total[n], use.value[n], atol=1e-5) for n in total)
        assert tree.norm(use.value) <= 0.05 * max(1, len(use.sampled or ())) + 1e-6
    # what the auditor puts in its place is divided by the expected size, and nothing else is
    assert all(torch.allclose(drawn[0][n], params[n] - 0.25 / 5, atol=1e-6) for n in drawn[0])
    assert all(torch.allclose(ends[0][n], params[n] - 6 * 0.25 / 5, atol=1e-5) for n in drawn[0])


def test_gaussian_shows_the_whole_noise_whatever_its_share() -> None:
    sent = WeightedMean({"m/update/w": torch.ones(4), "m/update/": torch.zeros(0)}, 1.0)
    for share in (1, 4):
        [use] = uses_of(lambda share=share: Gaussian(1.5, share).encode(sent, Clip(0.5).describe({}), {}, Site("a"), 0))
        assert use.deviations == pytest.approx({"m/update/w": 0.75, "m/update/": 0.75})
        assert use.spend == Spend(1.5, share=share)
        assert torch.equal(use.value["m/update/w"], torch.ones(4))
        assert use.sampled is None


def test_gaussian_after_adaptive_clipping_shows_both_deviations() -> None:
    clip = AdaptiveClip(0.5, count_noise=2.0)
    sent = WeightedMean({"m/update/w": torch.ones(4), BELOW: torch.tensor([0.5])}, 1.0)
    [use] = uses_of(lambda: Gaussian(1.5).encode(sent, clip.describe(clip.init({})), {}, Site("a"), 0))
    assert use.deviations[BELOW] == 2.0
    z = (1.5**-2 - 4.0**-2) ** -0.5
    assert use.deviations["m/update/w"] == pytest.approx(0.5 * z)
    # replaced, the update moves by 2 C and the count by 1: together 2 / z of the whole
    assert (2 * 0.5 / use.deviations["m/update/w"]) ** 2 + (1 / 2.0) ** 2 == pytest.approx((2 / 1.5) ** 2)


def test_what_an_auditor_returns_is_what_leaves() -> None:
    sent = WeightedMean({"m/update/w": torch.ones(4)}, 1.0)
    made = lambda use, noise: {n: torch.full_like(leaf, 7.0) for n, leaf in use.value.items()}  # noqa: E731
    with audited(made), metered() as spent:
        gaussian, _ = Gaussian(1.5).encode(sent, Clip(0.5).describe({}), {}, Site("a"), 0)
        sparse, _ = SparseVector().encode(sent, {}, {}, Site("a"), 0)
    assert torch.equal(gaussian.total["m/update/w"], torch.full((4,), 7.0))
    assert torch.equal(sparse.total["m/update/w"], torch.full((4,), 7.0))
    assert spent == [Spend(1.5), Spend(0.0, pure=3.0)], "an audited use is still paid for"


def test_sparse_vector_shows_bounded_coordinates_and_hides_no_integers() -> None:
    sent = WeightedMean(
        {"a": torch.tensor([5.0, -5.0]), "b": torch.tensor([[0.0001]]), "empty": torch.zeros(0, dtype=torch.long)}, 1.0
    )
    [use] = uses_of(lambda: SparseVector(bound=0.01).encode(sent, {}, {}, Site("a"), 0))
    assert use.bound == 0.01
    assert use.value[""].tolist() == pytest.approx([0.01, -0.01, 0.0001])
    assert use.spend == Spend(0.0, pure=3.0)
    with pytest.raises(ValueError, match=r"SparseVector cannot protect integers, and counts contains torch\.int64"):
        SparseVector().encode(
            WeightedMean({"w": torch.ones(2), "counts": torch.ones(2, dtype=torch.long)}, 1.0), {}, {}, Site("a"), 0
        )

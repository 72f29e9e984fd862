"""Numbers in the ring of 2^32: the values themselves, and what is refused exactly at the limits."""

import math
from typing import Any

import pytest
import torch

from polyclinic.core.aggregates import PerSite, Reply, WeightedMean
from polyclinic.core.method import Request
from polyclinic.core.pipeline import Transform
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree
from polyclinic.privacy.gaussian import Clip, Gaussian
from polyclinic.secure_aggregation.fixed_point import WEIGHT, SecureSum, layout_of, reply_of, round_, terms, vector_of

SITE = Site("bern")


def coded(transform: SecureSum, total: Tree, weight: float = 1.0) -> WeightedMean:
    sent, memory = transform.encode(WeightedMean(total, weight), {}, {"kept": {}}, SITE, 0)
    assert memory == {"kept": {}}
    return sent


def decoded(transform: SecureSum, total: Tree, sites: float) -> WeightedMean:
    received, state = transform.decode(WeightedMean(total, sites), {"kept": {}})
    assert state == {"kept": {}}
    return received


@pytest.mark.parametrize(
    ("limit", "bits"), [(8.0, 22), (1.0, 20), (100.0, 10), (0.3, 30), (7.7, 13), (1e-6, 0), (3.0, 25)]
)
def test_as_many_sites_as_fit_and_not_one_more(limit: float, bits: int) -> None:
    """capacity · (limit · 2^bits + ½) < 2^31, the half for rounding; and for one site more it is not."""
    transform = SecureSum(limit, bits)
    largest = limit * 2.0**bits + 0.5
    assert transform.capacity * largest < 2**31 <= (transform.capacity + 1) * largest


def test_by_default_sixty_three_sites_fit() -> None:
    assert (SecureSum().capacity, SecureSum().threshold, SecureSum().heaviest) == (63, None, 1.0)
    assert SecureSum.secure


def test_numbers_are_multiples_of_the_grid_and_come_back() -> None:
    x = torch.tensor([[0.0, 1.0, -1.0], [0.75, -2.5, 3.0]])
    sent = coded(SecureSum(4.0, 3), {"m/w": x, "m/b": torch.tensor(-4.0)})
    assert sent.weight == 1.0
    assert {k: (v.dtype, v.tolist()) for k, v in sent.total.items() if k != WEIGHT} == {
        "m/w": (torch.int32, [[0, 8, -8], [6, -20, 24]]),
        "m/b": (torch.int32, -32),
    }
    back = decoded(SecureSum(4.0, 3), sent.total, 1.0)
    assert back.weight == 1.0
    assert torch.equal(back.total["m/w"], x)
    assert back.total["m/b"].dtype == torch.float32
    assert WEIGHT not in back.total


@pytest.mark.parametrize("heaviest", [8.0, 600.0])
def test_weighted_numbers_are_sent_per_unit_of_the_heaviest(heaviest: float) -> None:
    """Σ w·x / heaviest on the grid; a heaviest that is no power of two must not cost precision."""
    transform = SecureSum(4.0, 16, heaviest)
    total = torch.tensor([1.0, -3.0, 4.0]) * heaviest
    sent = coded(transform, {"m/w": total}, heaviest / 2)
    assert sent.total["m/w"].tolist() == [2**16, -3 * 2**16, 4 * 2**16]
    assert sent.weight == 1.0
    back = decoded(transform, sent.total, 1.0)
    assert torch.allclose(back.total["m/w"], total)
    assert back.weight == pytest.approx(heaviest / 2, rel=1e-6)


def test_a_heavy_weight_is_coded_in_double_precision() -> None:
    transform = SecureSum(1.0, 28, 3.0)
    x = torch.tensor([2.9999, 1.2345678], dtype=torch.float32)
    assert coded(transform, {"m/w": x}).total["m/w"].tolist() == [round(float(v) * 2**28 / 3) for v in x]


def test_the_weight_has_a_name_that_no_tensor_of_a_model_has() -> None:
    """A pipeline calls them ``m/part/name``; what transforms add begins with a tilde."""
    assert WEIGHT.startswith("m/~")
    assert WEIGHT.islower()


@pytest.mark.parametrize("sites", [1, 2, 63])
def test_weights_of_one_are_counted_exactly(sites: int) -> None:
    weight = coded(SecureSum(), {}).total[WEIGHT]
    assert (weight.dtype, weight.shape) == (torch.int32, (1,))
    assert decoded(SecureSum(), {WEIGHT: weight * sites}, sites).weight == float(sites)


def test_sites_that_weigh_less_than_one_are_not_rounded_up() -> None:
    weight = coded(SecureSum(), {}, 0.25).total[WEIGHT]
    assert decoded(SecureSum(), {WEIGHT: weight * 3}, 3).weight == pytest.approx(0.75, abs=1e-6)


def test_as_many_weights_as_sites_fit_the_ring() -> None:
    four = SecureSum(2**31 / 4.5, 0)
    assert four.capacity == 4, "as many as a power of two, so that one digit more would be too many"
    for transform in (SecureSum(), SecureSum(heaviest=600.0), SecureSum(0.3, 20), SecureSum(100.0, 20), four):
        one = int(coded(transform, {}, transform.heaviest).total[WEIGHT])
        assert 0 < one * transform.capacity < 2**31
        assert one * transform.capacity >= 2**29, "and use at least a quarter of it"


@pytest.mark.parametrize(
    ("weight", "heaviest"), [(0.0, 1.0), (-1.0, 1.0), (1.001, 1.0), (math.nan, 1.0), (601.0, 600.0), (math.inf, 600.0)]
)
def test_a_weight_beyond_the_heaviest_or_of_nothing_is_refused(weight: float, heaviest: float) -> None:
    with pytest.raises(ValueError, match=rf"SecureSum\(heaviest={heaviest:g}\): bern has weight {weight:g}"):
        coded(SecureSum(heaviest=heaviest), {}, weight)


@pytest.mark.parametrize("number", [4.0, -4.0, 0.0])
def test_a_number_at_the_limit_is_sent(number: float) -> None:
    assert coded(SecureSum(4.0), {"m/w": torch.tensor([number])}).total["m/w"].tolist() == [number * 2**22]


@pytest.mark.parametrize(
    ("number", "heaviest"), [(4.001, 1.0), (-4.001, 1.0), (40.1, 10.0), (math.nan, 1.0), (-math.inf, 1.0)]
)
def test_a_number_beyond_the_limit_is_refused_by_tensor(number: float, heaviest: float) -> None:
    transform = SecureSum(4.0, heaviest=heaviest)
    with pytest.raises(ValueError, match=r"SecureSum\(limit=4\): m/w contains .* Nothing was sent"):
        coded(transform, {"m/a": torch.zeros(2), "m/w": torch.tensor([0.0, number])}, heaviest)
    assert coded(transform, {"m/w": torch.tensor([4.0 * heaviest])}, heaviest).total["m/w"].tolist() == [4 * 2**22]


def test_nothing_is_sent_as_nothing_and_integers_are_refused() -> None:
    empty = coded(SecureSum(), {"m/e": torch.zeros(0, 3), "m/i": torch.zeros(0, dtype=torch.int64)}).total
    assert [(empty[k].dtype, tuple(empty[k].shape)) for k in ("m/e", "m/i")] == [
        (torch.int32, (0, 3)),
        (torch.int32, (0,)),
    ]
    with pytest.raises(ValueError, match=r"SecureSum sums real numbers, and m/n contains torch.int64"):
        coded(SecureSum(), {"m/n": torch.ones(1, dtype=torch.int64)})


@pytest.mark.parametrize("sites", [0.0, -1.0, 0.5, 1.5, 64.0, 2.0001])
def test_a_sum_of_no_whole_number_of_sites_is_refused(sites: float) -> None:
    total = coded(SecureSum(), {}).total
    with pytest.raises(ValueError, match=rf"is over a whole number of sites of at most 63, not {sites:g}"):
        decoded(SecureSum(), total, sites)


def test_what_is_not_in_the_ring_is_not_decoded() -> None:
    total = coded(SecureSum(), {"m/w": torch.zeros(2)}).total
    for name in total:
        with pytest.raises(ValueError, match=f"{name} is not a value of SecureSum"):
            decoded(SecureSum(), {**total, name: total[name].float()}, 1.0)
    assert decoded(SecureSum(), {k: v * 63 for k, v in total.items()}, 63.0).weight == 63


def found(transform: SecureSum, before: tuple[Transform, ...] = (), after: tuple[Transform, ...] = ()) -> list[str]:
    return transform.validate(before, after)


@pytest.mark.parametrize(
    "transform",
    [
        SecureSum(),
        SecureSum(1e-3, 0),
        SecureSum(0.5, 30),
        SecureSum(heaviest=1e9),
        SecureSum(threshold=3),
        SecureSum(threshold=9),
        SecureSum((2**31 - 1) / 3 - 0.6, 0),
    ],
)
def test_these_are_right(transform: SecureSum) -> None:
    assert found(transform) == []


@pytest.mark.parametrize(
    "transform",
    [
        SecureSum(0.0),
        SecureSum(-1.0),
        SecureSum(math.inf),
        SecureSum(math.nan),
        SecureSum(bits=-1),
        SecureSum(1e-6, 31),
        SecureSum(heaviest=0.0),
        SecureSum(heaviest=math.inf),
        SecureSum(heaviest=-1.0),
    ],
)
def test_these_are_out_of_range(transform: SecureSum) -> None:
    assert found(transform) == ["SecureSum: limit and heaviest must be above 0, and bits from 0 to 30"]


def test_three_sites_must_fit() -> None:
    (said,) = found(SecureSum(2**31 / 3, 0))
    assert said == "SecureSum: with limit=7.15828e+08 and bits=0 the sum of 3 sites can wrap around: lower one of them"


@pytest.mark.parametrize("threshold", [2, 1, 0, -1])
def test_a_threshold_below_three_protects_nobody(threshold: int) -> None:
    assert found(SecureSum(threshold=threshold)) == [f"SecureSum: threshold must be at least 3, not {threshold}"]


def test_the_threshold_covers_the_noise_that_is_shared() -> None:
    said = "SecureSum: threshold must be at least 5, because the noise of 5 sites is required: write SecureSum(threshold=5)"
    before = (Clip(1.0), Gaussian(1.0, share=5))
    assert found(SecureSum(), before) == found(SecureSum(threshold=4), before) == [said]
    assert found(SecureSum(threshold=5), before) == found(SecureSum(threshold=6), before) == []
    assert found(SecureSum(), (Clip(1.0), Gaussian(1.0))) == []
    assert len(found(SecureSum(), (Clip(1.0), Gaussian(1.0, share=2)))) == 1


def test_it_stands_last_and_every_problem_is_told() -> None:
    said = found(SecureSum(0.0, threshold=1), (Clip(1.0), Gaussian(1.0, share=4)), (Clip(1.0),))
    assert len(said) == 4
    assert said[0] == "SecureSum must come last: Clip cannot read masked values"


def ask(trees: dict[str, Any]) -> Request:
    return Request(0, trees)


def test_an_ask_says_the_terms_or_there_are_none() -> None:
    notes = SecureSum(threshold=5).describe({})["secure"]
    assert terms(ask({"params": {}, "~1/secure": notes})) == (5, 63)
    assert terms(ask({"~0/secure": SecureSum(100.0).describe({})["secure"]})) == (None, SecureSum(100.0).capacity)
    assert terms(ask({"params": {}})) is None
    for name in ("secure", "1/secure", "~1/secured", "~1/clip", "~secure"):
        assert terms(ask({name: notes})) is None


def ring_reply() -> Reply:
    b = WeightedMean(
        {"w": torch.arange(6, dtype=torch.int32).reshape(2, 3), "e": torch.zeros(0, dtype=torch.int32)}, 1.0
    )
    a = WeightedMean({"x": torch.tensor(7, dtype=torch.int32), "c": torch.tensor([8, 9], dtype=torch.int32)}, 1.0)
    return Reply({"b": b, "a": a})


def test_a_reply_becomes_one_vector_and_a_sum_one_reply() -> None:
    reply = ring_reply()
    layout, vector = layout_of(reply), vector_of(reply)
    assert vector.dtype == torch.int32
    assert sorted(vector.tolist()) == [0, 1, 2, 3, 4, 5, 7, 8, 9]
    assert sum(tag.numel() for tags in layout.values() for tag in tags.values()) == 0, "a layout tells no number"
    assert {tag.dtype for tags in layout.values() for tag in tags.values()} == {torch.int32}
    back = reply_of(vector * 2, layout, 2)
    assert set(back.parts) == {"a", "b"}
    for part in reply.parts:
        assert back.mean(part).weight == 2.0
        assert {k: v.tolist() for k, v in back.mean(part).total.items()} == {
            k: (v * 2).tolist() for k, v in reply.mean(part).total.items()
        }


def test_a_vector_is_empty_or_as_long_as_its_layout() -> None:
    assert vector_of(Reply()).tolist() == []
    assert vector_of(Reply()).dtype == torch.int32
    layout = layout_of(ring_reply())
    for size in (8, 10):
        with pytest.raises((ValueError, RuntimeError)):
            reply_of(torch.zeros(size, dtype=torch.int32), layout, 1)
    with pytest.raises(ValueError, match="10 numbers received, but the layout has 9"):
        reply_of(torch.zeros(10, dtype=torch.int32), layout, 1)


@pytest.mark.parametrize(
    "stat",
    [
        WeightedMean({"w": torch.ones(1)}, 1.0),
        WeightedMean({"w": torch.ones(1, dtype=torch.int64)}, 1.0),
        PerSite({"bern": {"w": torch.ones(1, dtype=torch.int32)}}),
        WeightedMean({"v": torch.ones(1, dtype=torch.int32), "w": torch.ones(1)}, 1.0),
    ],
)
def test_only_what_the_ring_made_has_a_layout(stat: Any) -> None:
    for read in (layout_of, vector_of):
        with pytest.raises(ValueError, match="the part 'b' was not made by SecureSum"):
            read(Reply({"a": WeightedMean({"w": torch.ones(1, dtype=torch.int32)}, 1.0), "b": stat}))


@pytest.mark.parametrize(
    ("x", "whole"), [(0.0, 0), (0.49, 0), (0.5, 1), (1.5, 2), (2.4999, 2), (-0.5, 0), (-0.51, -1), (-1.0, -1)]
)
def test_rounding_is_to_the_nearest_and_up_from_halves(x: float, whole: int) -> None:
    assert round_(x) == whole

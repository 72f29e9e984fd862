"""The gate before a merge: which replies are refused, exactly at the limits, and in which words."""

import functools
import math
from collections.abc import Mapping
from weakref import ref

import pytest
import torch
from torch import Tensor

from polyclinic.core.aggregates import ElementwiseMean, PerSite, PerSiteUniform, Reply, WeightedMean, merge
from polyclinic.core.method import Request
from polyclinic.core.reply_validation import ReplySum, ReplyValidator, Spare
from polyclinic.core.tree import Tree
from polyclinic.testing import equal

ASK = Request(0, {"params": {"w": torch.zeros(2)}})


def tensors(*values: float) -> Tree:
    return {"w": torch.tensor(values)}


def leaf_mean(*weights: float, total: Tree | None = None) -> Reply:
    return Reply({"fisher": ElementwiseMean(total or {"w": torch.ones(len(weights))}, {"w": torch.tensor(weights)})})


def summed(
    gate: ReplyValidator, replies: Mapping[str, Reply], spare: Spare | None = None
) -> tuple[dict[str, str], Reply]:
    total = ReplySum(gate, ASK, spare)
    for site, reply in replies.items():
        total.add(site, reply)
    return total.result()


@pytest.fixture(params=[2**26, 0, 20], ids=["held", "released", "the third is released"])
def _size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replies are held until the end, or are added when they arrive."""
    monkeypatch.setattr("polyclinic.core.reply_validation.HELD", request.param)


def refused(reply: Reply, gate: ReplyValidator = ReplyValidator()) -> str | None:
    return gate.refuse(ASK, {"bern": reply}).get("bern")


@pytest.mark.parametrize("weights", [(-1e-30, 1.0), (1.0, -3.0), (-1.0, -1.0)])
def test_an_element_that_counts_less_than_nothing_is_refused(weights: tuple[float, ...]) -> None:
    """It would move the mean away from every value that was sent, as far as its sender likes."""
    assert refused(leaf_mean(*weights)) == "fisher: a weight is negative"


def test_a_negative_weight_in_any_tensor_is_found() -> None:
    total = {name: torch.ones(2) for name in ("a", "b", "c")}
    for name in total:
        weight = {**total, name: torch.tensor([0.5, -0.5])}
        assert refused(Reply({"fisher": ElementwiseMean(total, weight)})) == "fisher: a weight is negative"


@pytest.mark.parametrize("weights", [(0.0, 1.0), (0.0, 0.0), (0.5, 2.0), (1e-30, 1e30)])
def test_elements_may_count_nothing_little_or_much(weights: tuple[float, ...]) -> None:
    assert refused(leaf_mean(*weights)) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_no_number_may_be_infinite_or_none(bad: float) -> None:
    said = "fisher: w contains NaN or infinity"
    assert refused(leaf_mean(1.0, bad)) == said
    assert refused(leaf_mean(1.0, 1.0, total=tensors(1.0, bad))) == said
    assert refused(Reply({"update": WeightedMean(tensors(1.0, bad), 1.0)})) == "update: w contains NaN or infinity"
    assert refused(Reply({"all": PerSite({"bern": tensors(bad, 1.0)})})) == "all: w contains NaN or infinity"
    assert refused(Reply({"good": WeightedMean(tensors(1.0), 1.0), "bad": WeightedMean(tensors(bad), 1.0)})) is not None


@pytest.mark.parametrize(
    "weight",
    [
        {},
        {"w": torch.ones(3)},
        {"w": torch.ones(1, 2)},
        {"w": torch.ones(())},
        {"v": torch.ones(2)},
        {"w": torch.ones(2), "v": torch.ones(2)},
    ],
)
def test_a_weight_for_every_element_and_no_others(weight: Tree) -> None:
    assert (
        refused(Reply({"fisher": ElementwiseMean(tensors(1.0, 1.0), weight)}))
        == "fisher: the weights do not have the names and shapes of the values"
    )
    missing = Reply({"fisher": ElementwiseMean({**tensors(1.0, 1.0), "u": torch.ones(2)}, {"w": torch.ones(2)})})
    assert refused(missing) == "fisher: the weights do not have the names and shapes of the values"


@pytest.mark.parametrize("weight", [-1e-9, -1.0, math.nan, math.inf, -math.inf])
def test_a_mean_weighs_a_number_of_0_or_more(weight: float) -> None:
    assert (
        refused(Reply({"update": WeightedMean(tensors(1.0), weight)}))
        == f"update: weight {weight} is not a finite number of at least 0"
    )


@pytest.mark.parametrize("gate", [ReplyValidator(), ReplyValidator(max_norm=1.0, max_weight=1.0)])
def test_a_mean_may_weigh_nothing_or_less_than_one(gate: ReplyValidator) -> None:
    assert refused(Reply({"update": WeightedMean(tensors(0.0), 0.0)}), gate) is None
    said = refused(Reply({"update": WeightedMean(tensors(9.0), 0.0)}), gate)
    assert said == "update: the weight is 0, and the values are not", "they would be added to the sum of all"
    assert refused(Reply({"update": WeightedMean(tensors(0.1), 0.25)}), gate) is None


def test_the_largest_weight_is_allowed_and_no_more() -> None:
    gate = ReplyValidator(max_weight=10.0)
    assert refused(Reply({"update": WeightedMean(tensors(1.0), 10.0)}), gate) is None
    said = refused(Reply({"update": WeightedMean(tensors(1.0), 10.001)}), gate)
    assert said == "update: weight 10.001 exceeds max_weight = 10"


def test_the_norm_is_that_of_the_mean_and_may_be_as_large_as_the_limit() -> None:
    """Σ w·x is 5 times larger than the mean where the weight is 5; the limit is for the mean."""
    gate = ReplyValidator(max_norm=5.0)
    assert refused(Reply({"update": WeightedMean(tensors(15.0, 20.0), 5.0)}), gate) is None  # 25 / 5
    assert refused(Reply({"update": WeightedMean(tensors(3.0, 4.0), 1.0)}), gate) is None
    assert refused(Reply({"update": WeightedMean(tensors(15.0, 20.0), 4.9)}), gate) == (
        "update: norm 5.1 exceeds max_norm = 5"
    )
    assert refused(Reply({"update": WeightedMean(tensors(0.3, 0.4), 0.05)}), gate) == (
        "update: norm 10 exceeds max_norm = 5"
    )


@pytest.mark.parametrize("kind", [PerSite, PerSiteUniform])
def test_a_site_speaks_for_itself_alone(kind: type[PerSite]) -> None:
    assert refused(Reply({"all": kind({"bern": tensors(1.0)})})) is None
    assert refused(Reply({"all": kind({"ankara": tensors(1.0)})})) == (
        "all: contains values of ['ankara'], not of bern alone"
    )
    assert refused(Reply({"all": kind({"bern": tensors(1.0), "ankara": tensors(1.0)})})) == (
        "all: contains values of ['ankara', 'bern'], not of bern alone"
    )
    assert refused(Reply({"all": kind({})})) == "all: contains values of [], not of bern alone"


def test_every_site_that_is_refused_is_named_in_order_with_its_own_reason() -> None:
    """One holds NaN, one has another form, and the rest are merged."""
    good = Reply({"update": WeightedMean(tensors(1.0, 1.0), 1.0)})
    replies = {"d": good, "c": Reply({"update": WeightedMean(tensors(math.nan, 1.0), 1.0)}), "b": Reply(), "a": good}
    found = ReplyValidator().refuse(ASK, replies)
    assert list(found) == ["b", "c"]
    assert found == {"b": "update/WeightedMean is missing", "c": "update: w contains NaN or infinity"}
    assert ReplyValidator().refuse(ASK, {}) == {}
    assert ReplyValidator().refuse(ASK, {"a": good, "b": good}) == {}


def test_most_sites_decide_the_form_even_against_what_was_asked() -> None:
    asked, other = (Reply({"update": WeightedMean({name: torch.ones(2)}, 1.0)}) for name in ("w", "v"))
    assert list(ReplyValidator().refuse(ASK, {"a": other, "b": asked, "c": other})) == ["b"]
    assert list(ReplyValidator().refuse(ASK, {"a": other, "b": asked})) == ["a"], "of as many, what was asked wins"
    shape = Reply({"update": WeightedMean(tensors(1.0, 1.0, 1.0), 1.0)})
    assert list(ReplyValidator().refuse(ASK, {"a": shape, "b": asked})) == ["a"], "and its shape"


def test_a_spoiled_reply_has_no_say_in_the_form() -> None:
    spoiled = Reply({"update": WeightedMean({"v": torch.tensor([math.nan])}, 1.0)})
    good = Reply({"update": WeightedMean(tensors(1.0, 1.0), 1.0)})
    assert list(ReplyValidator().refuse(ASK, {"a": spoiled, "b": spoiled, "c": good})) == ["a", "b"]


def differs(mine: Reply, theirs: Reply) -> str:
    return ReplyValidator().refuse(ASK, {"a": theirs, "b": theirs, "c": mine})["c"]


def mean_of(**shapes: int) -> Reply:
    return Reply({"update": WeightedMean({name: torch.zeros(size) for name, size in shapes.items()}, 1.0)})


def test_how_a_form_differs_is_said_of_the_first_tensor_that_does() -> None:
    said = "update: b is ((3,), 'torch.float32'), expected ((2,), 'torch.float32') as from the other sites"
    assert differs(mean_of(a=2, b=3, c=9), mean_of(a=2, b=2, c=2)) == said
    assert differs(mean_of(b=3, aa=1), mean_of(a=7, b=2)) == said, "more telling than what is missing besides"
    assert differs(mean_of(b=2), mean_of(a=2, b=2)) == "update/a is missing"
    assert differs(mean_of(a=2, b=2, c=1), mean_of(a=2, b=2)) == "update/c is not in the replies of the other sites"
    halves = Reply({"update": WeightedMean({"a": torch.zeros(2, dtype=torch.float16)}, 1.0)})
    assert differs(halves, mean_of(a=2)) == (
        "update: a is ((2,), 'torch.float16'), expected ((2,), 'torch.float32') as from the other sites"
    )


def test_every_part_counts_and_so_does_its_kind() -> None:
    two = {"one": WeightedMean(tensors(1.0), 1.0), "two": WeightedMean(tensors(1.0), 1.0)}
    assert differs(Reply({**two, "one": WeightedMean(tensors(1.0, 2.0), 1.0)}), Reply(two)).startswith(
        "one: w is ((2,)"
    )
    assert differs(Reply({**two, "two": WeightedMean(tensors(1.0, 2.0), 1.0)}), Reply(two)).startswith(
        "two: w is ((2,)"
    )
    assert differs(Reply({"one": two["one"]}), Reply(two)) == "two/WeightedMean is missing"
    leafwise = Reply({"one": ElementwiseMean(tensors(1.0), tensors(1.0))})
    assert differs(leafwise, Reply({"one": two["one"]})) == "one/WeightedMean is missing"
    third = Reply({"one": ElementwiseMean(tensors(1.0, 1.0), tensors(1.0, 1.0))})
    assert differs(third, leafwise).startswith("one: w is ((2,)")


def test_what_is_gathered_may_differ_unless_it_says_that_it_is_alike() -> None:
    def replies(kind: type[PerSite]) -> dict[str, Reply]:
        return {site: Reply({"all": kind({site: {"w": torch.zeros(2 + (site == "b"))}})}) for site in "abc"}

    assert ReplyValidator().refuse(ASK, replies(PerSite)) == {}
    assert list(ReplyValidator().refuse(ASK, replies(PerSiteUniform))) == ["b"]


@pytest.mark.usefixtures("_size")
@pytest.mark.parametrize("bad", [(math.nan,), (math.inf,), (math.inf, -math.inf)], ids=str)
def test_the_sum_is_of_the_replies_that_are_not_refused(bad: tuple[float, ...]) -> None:
    """Whether one site sends a number that is not finite, or two send infinities that cancel."""
    good = {site: Reply({"update": WeightedMean(tensors(x, 1.0), 1.0)}) for site, x in (("a", 1.0), ("c", 0.1))}
    hostile = {f"b{i}": Reply({"update": WeightedMean(tensors(0.0, x), 1.0)}) for i, x in enumerate(bad)}
    reasons, total = summed(ReplyValidator(), dict(sorted((good | hostile).items())))
    assert reasons == dict.fromkeys(hostile, "update: w contains NaN or infinity")
    expected = merge(good.values()).mean("update")
    assert torch.equal(total.mean("update").total["w"], expected.total["w"])
    assert total.mean("update").weight == expected.weight == 2


@pytest.mark.parametrize("group", [1, 2, 3])
@pytest.mark.parametrize("held", [0, 100, 250, 2**30])
@pytest.mark.parametrize("hostile", [(), (0,), (6,), (3, 4), (0, 1, 2, 3, 4, 5, 6)])
def test_sums_of_blocks_are_those_of_plus_whoever_is_refused(
    hostile: tuple[int, ...], held: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leaves of one element, of several blocks, and not contiguous; the number that is not finite is in the last block.

    The second sum may use the tensors of the first one, and leaves it as it is.
    """
    monkeypatch.setattr("polyclinic.core.reply_validation.HELD", held)
    monkeypatch.setattr("polyclinic.core.reply_validation.GROUP", group)
    monkeypatch.setattr("polyclinic.core.tree.CACHED", 16)
    spare: Spare = {(): {}}  # of another request
    first = check_sum_of_blocks(0, hostile, spare)
    check_sum_of_blocks(1, hostile, spare)
    assert equal(first, check_sum_of_blocks(0, hostile, {}))
    assert len(spare) <= 1
    assert held > 100 or () not in spare


def check_sum_of_blocks(seed: int, hostile: tuple[int, ...], spare: Spare) -> Reply:
    rng = torch.Generator().manual_seed(seed)
    replies, before = {}, {}
    for i in range(7):
        leaves = {"a": torch.randn((), generator=rng), "b": torch.randn(3, 5, generator=rng).T}
        leaves["c"] = torch.randn(11, generator=rng).half()
        if i in hostile:
            leaves["c"][-1] = (math.nan, math.inf, -math.inf)[i % 3]
        replies[f"s{i}"] = Reply({"update": WeightedMean(leaves, 0.1 * (i + 1))})
        before[f"s{i}"] = {name: leaf.clone() for name, leaf in leaves.items()}
    reasons, total = summed(ReplyValidator(), replies, spare)
    assert reasons == {f"s{i}": "update: c contains NaN or infinity" for i in hostile}
    good = [reply for site, reply in replies.items() if site not in reasons]
    if good:
        expected = functools.reduce(lambda a, b: a + b, good).mean("update")
        assert total.mean("update").weight == expected.weight
        assert all(torch.equal(total.mean("update").total[k], leaf) for k, leaf in expected.total.items())
    for site, reply in replies.items():
        found = reply.mean("update").total
        assert all(torch.equal(found[k], leaf) or site in reasons for k, leaf in before[site].items())
    return total


@pytest.mark.parametrize(("kilobytes", "most"), [(1, 8), (20, 3), (40, 2), (300, 1)])
def test_few_large_replies_are_held(kilobytes: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the limit, four replies are added at once, or fewer that exceed four times the limit.

    The first reply is the sum until there is another one.
    """
    monkeypatch.setattr("polyclinic.core.reply_validation.HELD", 24_000)
    total, replies, alive = ReplySum(ReplyValidator(), ASK), list[ref[Tensor]](), list[int]()
    for i in range(8):
        leaf = torch.full((250 * kilobytes,), float(i))
        replies.append(ref(leaf))
        total.add(f"s{i}", Reply({"update": WeightedMean({"w": leaf}, 1.0)}))
        del leaf
        alive.append(sum(one() is not None for one in replies))
    assert max(alive) == most
    assert total.result()[1].mean("update").total["w"].unique().tolist() == [28.0]


@pytest.mark.usefixtures("_size")
def test_a_reply_without_the_tensors_that_its_kind_has_is_refused() -> None:
    usual = Reply({"all": PerSiteUniform({"b": tensors(1.0)})})
    reasons, total = summed(ReplyValidator(), {"a": Reply({"all": PerSiteUniform({})}), "b": usual})
    assert reasons == {"a": "all: contains values of [], not of a alone"}
    assert list(total.gather("all")) == ["b"]


@pytest.mark.usefixtures("_size")
def test_a_sum_beyond_the_largest_number_refuses_no_one() -> None:
    replies = {site: Reply({"update": WeightedMean(tensors(3e38, 1.0), 1.0)}) for site in "ab"}
    reasons, total = summed(ReplyValidator(), replies)
    assert reasons == {}
    assert total.mean("update").total["w"].tolist() == [math.inf, 2.0]


@pytest.mark.usefixtures("_size")
def test_the_majority_decides_when_all_replies_are_known() -> None:
    """The sums of all forms grow until the end; that of the most frequent one is the result."""
    odd, usual = (Reply({"update": WeightedMean({name: torch.ones(2)}, 1.0)}) for name in ("v", "w"))
    reasons, total = summed(ReplyValidator(), {"a": odd, "b": odd, "c": usual, "d": usual, "e": usual})
    assert list(reasons) == ["a", "b"]
    assert total.mean("update").total["w"].tolist() == [3.0, 3.0]
    reasons, total = summed(ReplyValidator(), {"a": odd, "b": odd, "c": usual})
    assert list(reasons) == ["c"]
    assert total.mean("update").total["v"].tolist() == [2.0, 2.0]


@pytest.mark.usefixtures("_size")
@pytest.mark.parametrize("gate", [ReplyValidator(norm_ratio=10.0), ReplyValidator(weight_ratio=10.0)])
def test_a_limit_relative_to_other_sites_applies_to_the_first_reply_too(gate: ReplyValidator) -> None:
    usual = Reply({"update": WeightedMean(tensors(1.0, 1.0), 1.0)})
    hostile = Reply({"update": WeightedMean(tensors(1e6, 1e6), 1000.0 if gate.weight_ratio else 1.0)})
    reasons, total = summed(gate, {"a": hostile, "b": usual, "c": usual, "d": usual})
    assert list(reasons) == ["a"]
    assert total.mean("update").total["w"].tolist() == [3.0, 3.0]


@pytest.mark.usefixtures("_size")
def test_no_reply_is_changed_by_summing() -> None:
    replies = {site: Reply({"update": WeightedMean(tensors(1.0, 2.0), 1.0)}) for site in "abc"}
    summed(ReplyValidator(), replies)
    assert all(reply.mean("update").total["w"].tolist() == [1.0, 2.0] for reply in replies.values())


@pytest.mark.usefixtures("_size")
def test_other_limits_hold_for_a_finite_sum_and_for_replies_of_several_forms() -> None:
    one, heavy = (Reply({"update": WeightedMean(tensors(1.0, 1.0), weight)}) for weight in (1.0, 9.0))
    gate = ReplyValidator(max_weight=5.0)
    reasons, total = summed(gate, {"a": one, "b": heavy, "c": one})
    assert list(reasons) == ["b"]
    assert total.mean("update").weight == 2
    reasons, total = summed(gate, {"a": one, "b": leaf_mean(1.0, 1.0), "c": one})
    assert list(reasons) == ["b"]
    assert list(total.parts) == ["update"]
    assert summed(gate, {}) == ({}, Reply())

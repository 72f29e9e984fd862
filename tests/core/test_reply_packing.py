"""A reply becomes one mean, and is the same again after sums over sites."""

import pytest
import torch

from polyclinic.core.aggregates import ElementwiseMean, PerSite, Reply, WeightedMean
from polyclinic.core.reply_packing import above, below, escaped, join, scaled, split
from polyclinic.errors import ConfigError
from polyclinic.testing import close, equal


def leaves(seed: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {"w/0": torch.randn(2, 3, generator=rng), "b": torch.rand(3, generator=rng)}


def reply(seed: int, weight: float = 3.0, second: float = 5.0) -> Reply:
    """Parts of every additive kind, one of them empty, with two weights."""
    return Reply(
        {
            "update": WeightedMean.of(leaves(seed), weight),
            "fisher": ElementwiseMean.of(leaves(seed + 1), leaves(seed + 2)),
            "second": WeightedMean.of(leaves(seed + 3), second),
            "none": WeightedMean({}, second),
        }
    )


def test_splitting_undoes_joining() -> None:
    one = reply(0)
    joined = join(one, "lyon")
    assert joined.weight == 3.0
    assert {name.split("/")[0] for name in joined.total} == {"m", "t", "w"}
    back = split(joined)
    assert list(back.parts) == list(one.parts)
    assert equal(back, one)


def test_the_sum_of_joined_replies_is_the_joined_sum() -> None:
    a, b = reply(0), reply(10, 2.0, 7.0)
    assert close(split(join(a, "lyon") + join(b, "oslo")), a + b)


def test_uniform_weights_are_one_and_need_no_leaf() -> None:
    one = reply(0, 1.0, 1.0)
    joined = join(one, "lyon", uniform=True)
    assert all(leaf.numel() == 0 for name, leaf in joined.total.items() if name.endswith("/"))
    assert joined.total.keys() == join(one, "lyon").total.keys()
    assert equal(split(joined), one)
    with pytest.raises(ConfigError, match=r"\{'second': 5.0, 'none': 5.0\} must have weight 1"):
        join(reply(0, 1.0), "lyon", uniform=True)


def test_a_part_of_one_site_has_its_own_kind_and_is_never_scaled() -> None:
    gathered = Reply({"whole": PerSite({"lyon": leaves(0)}), "fisher": ElementwiseMean.of(leaves(1), leaves(2))})
    joined = join(gathered, "lyon")
    assert joined.weight == 1.0, "without a mean, a site counts once"
    half = scaled(joined.total, 0.5)
    for name, leaf in joined.total.items():
        assert torch.equal(half[name], leaf if name.startswith("g/") else leaf * 0.5)
    assert torch.equal(joined.total["g/whole/w/0"], leaves(0)["w/0"])
    assert scaled(joined.total, 1) is joined.total


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_a_weight_that_is_not_positive_is_refused(weight: float) -> None:
    with pytest.raises(ConfigError, match=f"site 'lyon' has weight {weight}"):
        join(Reply({"update": WeightedMean(leaves(0), weight)}), "lyon")


def test_a_part_whose_name_could_be_read_as_two_is_refused() -> None:
    with pytest.raises(ConfigError, match="'a/b'"):
        join(Reply({"a/b": WeightedMean.of(leaves(0))}), "lyon")


def test_prefixes_are_put_on_and_taken_off() -> None:
    trees = {"a": leaves(0), "b/c": leaves(1)}
    assert equal(below("key", {**above("key", trees), **above("keys", trees), "key": leaves(2)}), trees)
    assert set(escaped({"~0/n": leaves(0), "params": leaves(0), "~~x": leaves(0)})) == {"~~0/n", "params", "~~~x"}

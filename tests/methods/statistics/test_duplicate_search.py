"""Sets are compared without being shown: the counts are those of a plain comparison, and hostile lists are refused."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyclinic.core.aggregates import PerSite, Reply
from polyclinic.core.method import Request
from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.errors import ConfigError
from polyclinic.learning.image_labels import coarse_label, exact_label
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.methods.statistics import duplicate_search
from polyclinic.methods.statistics.blinded_points import (
    InvalidPoints,
    blinded,
    on_curve,
    point_of,
    points_of,
    tensor_of,
)
from polyclinic.methods.statistics.duplicate_search import PART, DuplicateSearch, State, shared_by

TASK = Classification(Network("mlp", (1,), 1))
FIELD = 2**255 - 19


@dataclass(frozen=True)
class Pictures:
    """Random pictures by number: equal numbers are equal pictures."""

    numbers: Sequence[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def image(self, i: int) -> torch.Tensor:
        return picture(self.numbers[i])


def picture(number: int) -> torch.Tensor:
    return torch.rand(1, 32, 32, generator=torch.Generator().manual_seed(number))


def sites_of(numbers: Mapping[str, Sequence[int]]) -> dict[str, Site]:
    return {
        name: Site(name, {"train": Pictures(own[: len(own) // 2]), "test": Pictures(own[len(own) // 2 :])})
        for name, own in numbers.items()
    }


def found(sites: Mapping[str, Site], **options: Any) -> State:
    method = DuplicateSearch(TASK, tuple(sites), **options)
    state = method.init({})
    for step in train(method, InProcess(method, sites), state, rounds=1, min_replies=len(sites)):
        state = step.state
    assert method.request(state) is None
    assert not state.points
    return state


@pytest.fixture(autouse=True)
def few_random_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicate_search, "PADDED_TO", 8)


NUMBERS = st.lists(st.integers(0, 30), max_size=25)


@given(st.lists(NUMBERS, min_size=2, max_size=4))
@settings(max_examples=10, deadline=None)
def test_the_counts_are_those_of_a_plain_comparison(numbers: list[list[int]]) -> None:
    own = {f"site-{i}": each for i, each in enumerate(numbers)}
    state = found(sites_of(own))
    expected = {(a, b): len({*own[a]} & {*own[b]}) for a in own for b in own if a < b}
    assert shared_by(state, "exact") == expected
    assert shared_by(state, "near") == expected


def test_a_brighter_copy_is_nearly_equal_and_not_equal() -> None:
    class Brighter(Pictures):
        def image(self, i: int) -> torch.Tensor:
            return 0.1 + 1.2 * picture(self.numbers[i])

    sites = {"a": Site("a", {"train": Pictures(range(9))}), "b": Site("b", {"test": Brighter(range(4, 12))})}
    state = found(sites)
    assert shared_by(state, "exact") == {("a", "b"): 0}
    assert shared_by(state, "near") == {("a", "b"): 5}
    assert set(found(sites, near=False).shared) == {"exact"}


def test_public_images_are_everywhere_and_are_no_duplicates() -> None:
    sites = {name: Site(name, {"public": Pictures([1, 2]), "train": Pictures([3])}) for name in ("a", "b")}
    assert shared_by(found(sites, near=False), "exact") == {("a", "b"): 1}


def test_rows_of_a_table_are_compared_by_their_values() -> None:
    class Rows(Pictures):
        def image(self, i: int) -> torch.Tensor:
            return torch.tensor([float(self.numbers[i]), 1.0])

    state = found({"a": Site("a", {"train": Rows([1, 2, 3])}), "b": Site("b", {"train": Rows([3, 4])})})
    assert shared_by(state, "exact") == {("a", "b"): 1}
    assert shared_by(state, "near") == {("a", "b"): 0}


def test_a_constant_image_has_no_coarse_label() -> None:
    """All black images would be nearly equal."""
    assert coarse_label(torch.full((1, 40, 40), 3.0)) is None
    assert coarse_label(picture(1)) is not None
    assert coarse_label(picture(1)[:, None].expand(1, 3, 32, 32)) == coarse_label(picture(1))
    assert exact_label(picture(1)) != exact_label(picture(1).reshape(1, 16, 64))


def blind(name: str, numbers: Sequence[int], method: DuplicateSearch) -> tuple[Any, Any, Site]:
    """The lists and the memory of a site that has blinded its images."""
    site = Site(name, {"train": Pictures(numbers)})
    reply, memory = method.site_update(Request(0, {}, "blind"), {}, site)
    return reply.gather(PART)[name], memory, site


METHOD = DuplicateSearch(TASK, ("a", "b"))


def test_what_leaves_depends_on_a_secret_and_hides_the_number_of_images() -> None:
    first, memory, _ = blind("a", [1, 2, 3], METHOD)
    again, other, _ = blind("a", [1, 2, 3], METHOD)
    assert first["exact"].shape == first["near"].shape == (8, 32)
    assert not {bytes(row) for row in first["exact"].numpy()} & {bytes(row) for row in again["exact"].numpy()}
    assert not torch.equal(memory["blinding"]["scalar"], other["blinding"]["scalar"])
    known = {point_of(b"exact" + exact_label(picture(n))) for n in (1, 2, 3)}
    assert not known & {bytes(row) for row in first["exact"].numpy()}
    assert len(blind("a", range(9), METHOD)[0]["exact"]) == 16


def test_what_a_site_returns_is_in_an_order_that_tells_nothing() -> None:
    """Otherwise the server could follow one image from site to site."""
    theirs, _, _ = blind("b", range(12), METHOD)
    _, memory, site = blind("a", range(12), METHOD)
    others = {f"{kind}/b": leaf for kind, leaf in theirs.items()}
    reply, kept = METHOD.site_update(Request(0, {"others": others}, "compare"), memory, site)
    doubled = reply.gather(PART)["a"]["exact/b"]
    assert kept == {}
    assert [bytes(row) for row in doubled.numpy()] == sorted(bytes(row) for row in doubled.numpy())
    scalar = bytes(memory["blinding"]["scalar"].numpy())
    assert {bytes(row) for row in doubled.numpy()} == {
        *blinded([bytes(row) for row in theirs["exact"].numpy()], scalar)
    }


def on_the_twist() -> bytes:
    return next(p for u in range(2, 99) if not on_curve(p := u.to_bytes(32, "little")))


def listed(*points: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(b"".join(points)), dtype=torch.uint8).reshape(-1, 32)


GOOD = point_of(b"x")
HOSTILE = {
    "of the twist": listed(GOOD, on_the_twist()),
    "of order four": listed((1).to_bytes(32, "little")),
    "zero": torch.zeros(1, 32, dtype=torch.uint8),
    "not canonical": listed((FIELD + int.from_bytes(GOOD, "little") % 19).to_bytes(32, "little")),
    "with the top bit": listed(GOOD[:31] + bytes([GOOD[31] | 128])),
    "repeated": listed(GOOD, GOOD),
    "too short": torch.zeros(4, 31, dtype=torch.uint8),
    "flat": torch.zeros(32, dtype=torch.uint8),
    "floats": listed(GOOD).float(),
    "too many": listed(*(point_of(bytes([i])) for i in range(17))),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_site_refuses_hostile_points(case: str) -> None:
    method = replace(METHOD, most=10)
    _, memory, site = blind("a", [1], method)
    with pytest.raises(InvalidPoints):
        method.site_update(Request(0, {"others": {"exact/b": HOSTILE[case]}}, "compare"), memory, site)


@pytest.mark.parametrize("name", ["exact/a", "exact/c", "other/b", "exact", "near/"])
def test_a_site_refuses_lists_of_no_other_site_of_the_study(name: str) -> None:
    """A server could send any number of guesses otherwise."""
    _, memory, site = blind("a", [1], METHOD)
    with pytest.raises(InvalidPoints, match="not of another site"):
        METHOD.site_update(Request(0, {"others": {name: listed(GOOD)}}, "compare"), memory, site)


def test_a_site_compares_once_and_no_more_images_than_agreed() -> None:
    _, memory, site = blind("a", [1], METHOD)
    request = Request(0, {"others": {"exact/b": listed(GOOD)}}, "compare")
    _, kept = METHOD.site_update(request, memory, site)
    with pytest.raises(InvalidPoints, match="once in a run"):
        METHOD.site_update(request, kept, site)
    with pytest.raises(InvalidPoints, match="5 images here"):
        blind("a", range(5), replace(METHOD, most=4))
    with pytest.raises(ConfigError, match="most = 0"):
        replace(METHOD, most=0)


@pytest.mark.parametrize("case", sorted(HOSTILE.keys() - {"of order four"}))
def test_a_hostile_site_does_not_stop_the_others(case: str) -> None:
    """Its points are not passed on, and its pairs are reported as not compared."""
    only_honest_pairs({"exact": HOSTILE[case], "near": listed(GOOD)})


@pytest.mark.parametrize("kinds", [("exact",), ("exact", "near", "other")])
def test_lists_of_other_kinds_are_not_passed_on(kinds: tuple[str, ...]) -> None:
    only_honest_pairs(dict.fromkeys(kinds, listed(GOOD)))


def only_honest_pairs(hostile: dict[str, torch.Tensor]) -> None:
    """Two sites share one image; a third sends ``hostile`` lists."""
    method, sites = DuplicateSearch(TASK, ("a", "b", "c"), most=10), ("a", "b")
    parts = {name: blind(name, numbers, method) for name, numbers in zip(sites, ([1, 2], [2, 3]), strict=True)}
    lists = {name: part[0] for name, part in parts.items()} | {"c": hostile}
    state = method.server_update(method.init({}), Reply({PART: PerSite(lists)}), Site("server"))
    request = method.request(state)
    assert request is not None
    assert request.recipients == sites
    replies = Reply()
    for name, (_, memory, site) in parts.items():
        replies += method.site_update(request.for_site(name), memory, site)[0]
    state = method.server_update(state, replies, Site("server"))
    assert shared_by(state, "exact") == {("a", "b"): 1, ("a", "c"): None, ("b", "c"): None}


def test_answers_of_another_form_are_not_counted() -> None:
    state = State(0, {}, {"a": {}, "b": {}}, {})
    for answer in ({}, {"exact/a": torch.zeros(3, 31, dtype=torch.uint8)}, {"exact/a": torch.zeros(3)}):
        reply = Reply({PART: PerSite({"a": {"exact/b": listed(GOOD)}, "b": answer})})
        updated = METHOD.server_update(state, reply, Site("server"))
        assert shared_by(updated, "exact") == {("a", "b"): None}


def test_labels_become_points_of_the_curve_and_blinding_commutes() -> None:
    """Half of all coordinates belong to the twist: to use them would reveal one bit of a label."""
    points = [point_of(bytes([n])) for n in range(50)]
    assert all(map(on_curve, points))
    assert len(set(points)) == 50
    one, other = bytes(range(32)), bytes(range(1, 33))
    assert blinded(blinded(points, one), other) == blinded(blinded(points, other), one)
    assert all(map(on_curve, blinded(points, one)))
    assert Counter(points_of(tensor_of(points), 50)) == Counter(points)
    base = (9).to_bytes(32, "little")  # RFC 7748, section 5.2: the first iteration
    expected = "422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079"
    assert blinded([base], base)[0].hex() == expected


def test_two_sites_without_sound_points_end_the_search() -> None:
    lists = {"exact": HOSTILE["repeated"], "near": listed(GOOD)}
    state = METHOD.server_update(METHOD.init({}), Reply({PART: PerSite({"a": lists, "b": lists})}), Site("server"))
    assert METHOD.request(state) is None
    assert shared_by(state, "exact") == {("a", "b"): None}


def test_random_points_fill_lists_up() -> None:
    """They are different in every run, so that they never count as shared."""
    state = found(sites_of({"a": [1], "b": [1, 2]}))
    assert shared_by(state, "exact") == {("a", "b"): 1}

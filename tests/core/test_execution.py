"""What every engine runs at a site, and who is asked in a round."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.execution import Open, Refused, UniformSampler, execute, sample_sites
from polyclinic.core.method import Request
from polyclinic.core.site import Site

ASK = Request(2, {"params": {"w": torch.zeros(1)}}, per_site={"a": {"mine": {"x": torch.ones(1)}}})
SENT = Reply({"update": WeightedMean({"w": torch.ones(1)}, 1.0)})


@dataclass
class Watched:
    """A method and a policy in one that write down, in order, what they were given."""

    refuses: str = ""
    seen: list[tuple[Any, ...]] = field(default_factory=list)

    def site_update(self, request: Request, memory: Any, site: Site) -> tuple[Reply, Any]:
        self.seen.append(("update", request, memory, site))
        return SENT, {"kept": {"n": torch.ones(1)}}

    def admit(self, method: Any, request: Request, site: Site) -> None:
        self.seen.append(("admit", method, request, site))
        if self.refuses == "admit":
            raise Refused("not this")

    def release(self, method: Any, request: Request, reply: Reply, site: Site) -> None:
        self.seen.append(("release", method, request, reply, site))
        if self.refuses == "release":
            raise Refused("not that")


def test_the_policy_is_asked_before_anything_runs_and_before_anything_leaves() -> None:
    both, site, memory = Watched(), Site("a"), {"kept": {"n": torch.zeros(1)}}
    reply, kept = execute(both, ASK, memory, site, both)  # type: ignore[arg-type]
    assert [step[0] for step in both.seen] == ["admit", "update", "release"]
    admitted, updated, released = both.seen
    assert admitted[1] is released[1] is both
    assert admitted[-1] is updated[-1] is released[-1] is site
    assert updated[2] is memory
    assert released[3] is reply is SENT
    assert kept["kept"]["n"] == 1


def test_method_and_policy_see_what_the_site_was_sent_and_not_what_others_were() -> None:
    for name, trees in (("a", {"params", "mine"}), ("b", {"params"})):
        both = Watched()
        execute(both, ASK, {}, Site(name), both)  # type: ignore[arg-type]
        asks = [step[1] if step[0] == "update" else step[2] for step in both.seen]
        assert [set(request.trees) for request in asks] == [trees] * 3
        assert [request.round for request in asks] == [2] * 3


@pytest.mark.parametrize(("when", "ran"), [("admit", ["admit"]), ("release", ["admit", "update", "release"])])
def test_what_is_refused_does_not_run_or_does_not_leave(when: str, ran: list[str]) -> None:
    both = Watched(when)
    with pytest.raises(Refused):
        execute(both, ASK, {}, Site("a"), both)  # type: ignore[arg-type]
    assert [step[0] for step in both.seen] == ran


def test_without_a_policy_everything_is_allowed() -> None:
    method = Watched()
    for policy in (None, Open()):
        assert execute(method, ASK, {}, Site("a"), policy)[0] is SENT  # type: ignore[arg-type]


NAMES = ["dhaka", "bern", "ankara", "cusco", "eger"]


@pytest.mark.parametrize("size", [5, 6, 100])
def test_a_cohort_as_large_as_all_is_all_in_order(size: int) -> None:
    assert sample_sites(NAMES, size, 0) == sorted(NAMES)


def test_a_cohort_is_drawn_from_seed_and_round_without_replacement() -> None:
    """Known from a permutation with the server's generator, so that a resumed study asks the same sites."""
    for seed in (0, 7):
        for round in range(4):
            order = torch.randperm(5, generator=Site("server", seed=seed).rng("cohort", round))
            assert sample_sites(NAMES, 3, round, seed) == sorted(NAMES[i] for i in order[:3])
    assert sample_sites(NAMES, 3, 1) == sample_sites(NAMES, 3, 1, 0)
    assert len({tuple(sample_sites(NAMES, 2, 0, seed)) for seed in range(30)}) > 5
    assert sample_sites(NAMES, 4, 0) != sorted(NAMES)
    assert len(sample_sites(NAMES, 4, 0)) == 4


def test_every_site_is_drawn_as_often() -> None:
    counts = Counter(name for round in range(2000) for name in sample_sites(NAMES, 2, round))
    assert set(counts) == set(NAMES)
    assert all(abs(n - 800) < 6 * (2000 * 0.4 * 0.6) ** 0.5 for n in counts.values())


def test_only_those_who_train_are_drawn() -> None:
    drawn = UniformSampler(tuple(NAMES[:4]), 2, 5)
    for round in range(3):
        assert drawn([*NAMES, "osaka"], round) == sample_sites(NAMES[:4], 2, round, 5)
    usual = UniformSampler(tuple(NAMES), 3)
    assert [usual(NAMES, r) for r in range(8)] == [sample_sites(NAMES, 3, r, 0) for r in range(8)]
    assert UniformSampler(tuple(NAMES), 9)([], 1) == sorted(NAMES)

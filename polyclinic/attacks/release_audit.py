"""Release audit: does the accounted privacy cover everything that leaves a site?

An ε covers only what a mechanism protects (``core.metering``). This module tests on the method itself whether its
replies contain anything else. Rounds of the method run in this process. In each exchange, a site repeats its
computation on neighboring data, in which one patient was changed, with the same request, site state and secrets; and
every mechanism's noisy value is replaced by one that does not depend on data. Then

* all replies must be bit-identical, including weights, names, shapes, refusals and missing replies: nothing except the
  output of mechanisms depends on the patient;
  what mechanisms made depends on the patient;
* the inputs of the mechanisms may differ by no more than their accountant assumes: 2 C for normal noise after clipping
  to C (C from the value without the patient, on either side), 2 γ in each coordinate for the sparse vector technique,
  and 0 in a step whose sample does not include the patient;
* every reply of a job has a spend, and each use of a mechanism is counted.

This tests noninterference (Joseph Goguen and José Meseguer, "Security Policies and Security Models", IEEE Symposium on
Security and Privacy 1982, https://doi.org/10.1109/SP.1982.10014). A test of some changes on small data detects leaks by
design. It is not a proof: values that rarely depend on a patient can go undetected.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from polyclinic.attacks.neighboring_sites import Neighbor
from polyclinic.attacks.observed_execution import Seen, observed
from polyclinic.core.aggregates import ElementwiseMean, PerSite, Reply, WeightedMean
from polyclinic.core.metering import Unit, Use
from polyclinic.core.method import Method, Request
from polyclinic.core.rounds import Arrival, TooFewReplies, train
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees

SLACK = 1e-4  # relative, for sums in single precision
MOST_EXCHANGES = 30


@dataclass(frozen=True)
class Finding:
    """A part of a reply that is not covered.

    Attributes:
        job: Job of the method.
        part: Part of the reply; empty for the whole reply.
        what: The problem, as the end of a sentence.
        amount: The size of the change; None if it is not a number.
        role: Role of the changed data; empty if the problem does not depend on a change.
        site: Name of the site.
        round: The first round with the problem.
    """

    job: str
    part: str
    what: str
    amount: float | None = None
    role: str = ""
    site: str = ""
    round: int = 0

    def __str__(self) -> str:
        where = f"the part {self.part!r} of the job {self.job!r}" if self.part else f"the job {self.job!r}"
        when = f" when one patient among the site's {self.role} data changes" if self.role else ""
        return f"{where} {self.what}{when}"


@dataclass(frozen=True)
class Verdict:
    """The result of the audit of one method.

    Attributes:
        method: Name of the method.
        findings: The problems, each kind once.
        stopped: Reason why the method did not run to the end, if it did not. Parts that did not run are not covered.
        released: Number of nonempty replies.
        uses: Number of compared uses of mechanisms.
        largest: The largest observed change, relative to the accountant's bound; above 1 is a finding.
        unit: The unit of protection.
        alternative: The recommended alternative, if known.
    """

    method: str
    findings: tuple[Finding, ...]
    stopped: str
    released: int
    uses: int
    largest: float
    unit: Unit
    alternative: str = ""

    @property
    def covered(self) -> bool:
        """Whether all replies were covered."""
        return not self.findings and not self.stopped

    @property
    def says(self) -> str:
        """The result in a sentence."""
        if self.covered and not self.released:
            return f"{self.method} is covered: nothing leaves a site."
        if self.covered:
            return (
                f"{self.method} is covered: in {self.released} replies only the output of mechanisms depended on one "
                f"{self.unit}'s data, which changed the mechanisms' inputs by at most {self.largest:.0%} of what the "
                "accountant allows."
            )
        rest = f": {self.alternative}" if self.alternative else ""
        if not self.findings:
            return f"{self.method} is not covered, because it does not run: {self.stopped.rstrip('.')}{rest}."
        more = f" (and {len(self.findings) - 1} more)" if len(self.findings) > 1 else ""
        return f"{self.method} is not covered: {self.findings[0]}{more}{rest}."

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain values."""
        return {
            "method": self.method,
            "covered": self.covered,
            "says": self.says,
            "unit": self.unit,
            "released": self.released,
            "uses": self.uses,
            "largest": self.largest,
            "stopped": self.stopped,
            "alternative": self.alternative,
            "findings": [
                {
                    "job": f.job,
                    "part": f.part,
                    "what": f.what,
                    "amount": f.amount,
                    "role": f.role,
                    "site": f.site,
                    "round": f.round,
                }
                for f in self.findings
            ],
        }


def audit(
    name: str,
    method: Method[Any],
    params: Tree,
    sites: Mapping[str, Site],
    neighbors: Sequence[Neighbor],
    unit: Unit,
    *,
    rounds: int = 3,
    server: Site = Site("server"),
    alternative: str = "",
) -> Verdict:
    """Audit ``method`` on synthetic ``sites``.

    Args:
        name: Name of the method.
        method: The method with its transforms, as a study builds it.
        params: Initial parameters of the model.
        sites: Small synthetic sites, whose replies are used in the run.
        neighbors: Neighbors of some of the sites.
        unit: The unit of protection.
        rounds: Number of rounds.
        server: The server's site, with its own data, if any.
        alternative: The recommended alternative, for the verdict.
    """
    twins = _Twins(method, sites, neighbors, server)
    try:
        for _ in islice(train(method, twins, method.init(params), rounds=rounds), MOST_EXCHANGES):
            pass
    except TooFewReplies:
        twins.stopped = twins.stopped or "no site answered"
    except Exception as error:
        twins.stopped = twins.stopped or f"the server failed ({type(error).__name__}: {error})"
    findings = dict.fromkeys(twins.findings)
    if twins.released and not twins.stopped and not findings and not twins.largest:
        findings[Finding("", "", "gives mechanisms nothing that depends on the data, so the audit is empty")] = None
    return Verdict(
        name, _first_of_each(findings), twins.stopped, twins.released, twins.uses, twins.largest, unit, alternative
    )


def _first_of_each(findings: Mapping[Finding, None]) -> tuple[Finding, ...]:
    """Return one finding for each job, part, kind and role, in the order of their occurrence."""
    kinds: dict[tuple[str, str, str, str], Finding] = {}
    for one in findings:
        kinds.setdefault((one.job, one.part, one.what, one.role), one)
    return tuple(kinds.values())


class _Twins:
    """A federation whose sites repeat each job on neighboring data. The server receives only the original replies."""

    def __init__(
        self, method: Method[Any], sites: Mapping[str, Site], neighbors: Sequence[Neighbor], server: Site
    ) -> None:
        self.server, self.sites = server, sorted(sites)
        self._method, self._sites = method, sites
        self._neighbors = {name: [n for n in neighbors if n.site.name == name] for name in sites}
        self._memory: dict[tuple[str, int], Trees] = {}
        self._queue: list[tuple[Request, str]] = []
        self._exchange = self.released = self.uses = 0
        self._secure = False
        self.largest, self.stopped = 0.0, ""
        self.findings: list[Finding] = []

    def send(self, request: Request, to: Sequence[str]) -> None:
        """Queue ``request`` for the sites ``to``."""
        self._exchange += 1
        self._secure = request.secure
        self._queue += [(request, name) for name in to]

    def replies(self, deadline: float | None = None) -> Iterator[Arrival]:
        """Yield the sites' replies after comparison with those of their neighbors; their sum if secure."""
        arrivals = list(self._arrivals())
        answered = [(a.site, a.reply) for a in arrivals if a.reply is not None]
        if not answered or not self._secure:
            yield from arrivals
            return
        yield from (a for a in arrivals if a.reply is None)
        total = answered[0][1]
        for _, reply in answered[1:]:
            total = total + reply
        names = tuple(site for site, _ in answered)
        yield Arrival(names[0], arrivals[0].round, total, "", 0.0, names)

    def _arrivals(self) -> Iterator[Arrival]:
        while self._queue:
            request, name = self._queue.pop(0)
            base = self._observed(request, self._sites[name], 0)
            self._look_at(base, request, name)
            for number, neighbor in enumerate(self._neighbors[name], start=1):
                self._compare(base, self._observed(request, neighbor.site, number), neighbor, request)
            yield Arrival(name, request.round, base.reply, base.lost)

    def _observed(self, request: Request, site: Site, number: int) -> Seen:
        key = (site.name, number)
        # Models of the first exchange are close to each other, later ones are far apart, so that choices between them
        # depend on small values in the first case and on large ones in the second.
        scale = 0.05 if self._exchange == 1 else 1.0
        seen = observed(self._method, request, self._memory.get(key, {}), site, (site.name, self._exchange), scale)
        self._memory[key] = seen.memory
        return seen

    def _look_at(self, seen: Seen, request: Request, site: str) -> None:
        """Check one reply alone: that it has a spend, and that each use of a mechanism was counted."""

        def report(what: str, part: str = "") -> None:
            self.findings.append(Finding(request.job, part, what, None, "", site, request.round))

        if seen.reply is None:
            self.stopped = self.stopped or f"the job {request.job!r} failed at {site} ({seen.lost})"
            return
        if not seen.reply.parts:
            return
        self.released += 1
        if not seen.spent:
            for part in seen.reply.parts:
                report("leaves without any noise", part)
        counted = sum(spend.steps for spend in seen.spent)
        if seen.spent and counted != len(seen.uses):
            report(f"uses noise {len(seen.uses)} times, and {counted} are paid for")

    def _compare(self, base: Seen, other: Seen, neighbor: Neighbor, request: Request) -> None:
        def report(what: str, part: str = "", amount: float | None = None) -> None:
            site, role = neighbor.site.name, neighbor.role
            self.findings.append(Finding(request.job, part, what, amount, role, site, request.round))

        if base.reply is None or other.reply is None:
            if (base.reply is None) != (other.reply is None):
                report("is answered or not")
            elif base.lost != other.lost:
                report("fails with another message")
            return
        if len(base.uses) != len(other.uses) or base.spent != other.spent:
            report("uses noise another number of times")
        for one, two in zip(base.uses, other.uses, strict=False):
            self.uses += 1
            if what := _form(one, two):
                report(what)
                continue
            moved = _moved(one, two)
            outside = one.sampled is not None and neighbor.patient is not None and neighbor.patient not in _names(one)
            if outside and moved > SLACK:
                report("gives its mechanism another value in steps without the patient", "", moved)
            elif moved > 1 + SLACK:
                report(f"gives its mechanism a value {moved:.3g} times as far away as the accountant allows", "", moved)
            self.largest = max(self.largest, moved)
        for part, what, amount in _difference(base.reply, other.reply):
            report(what, part, amount)


def _names(use: Use) -> set[object]:
    """Return the patients of the sampled units; the name of a record has its patient and its number."""
    return {unit[0] if isinstance(unit, tuple) else unit for unit in use.sampled or ()}


def _form(one: Use, two: Use) -> str:
    """Return how two uses differ other than in their values; empty if they do not."""
    if one.spend != two.spend or one.deviations != two.deviations or one.bound != two.bound:
        return "adds noise of another size"
    if {n: leaf.shape for n, leaf in one.value.items()} != {n: leaf.shape for n, leaf in two.value.items()}:
        return "gives its mechanism a value of another form"
    return ""


def _moved(one: Use, two: Use) -> float:
    """Return the distance of two values, relative to the accountant's bound if a unit is replaced."""
    apart = {name: (leaf.double() - two.value[name].double()) for name, leaf in one.value.items()}
    if one.spend.pure:
        most = max((float(gap.abs().max()) for gap in apart.values() if gap.numel()), default=0.0)
        return most / (2 * one.bound) if most == most else math.inf
    square = 0.0
    for name, gap in apart.items():
        size = float(gap.square().sum())
        deviation = one.deviations.get(name, 0.0)
        square += size / deviation**2 if deviation else (0.0 if size == 0 else math.inf)
    return math.sqrt(square) * one.spend.multiplier / 2 if square == square else math.inf


def _difference(one: Reply, two: Reply) -> Iterator[tuple[str, str, float | None]]:
    """Yield the differences between two replies: part, description and size."""
    for part in sorted(one.parts.keys() | two.parts.keys()):
        a, b = one.parts.get(part), two.parts.get(part)
        if a is None or b is None or type(a) is not type(b):
            yield part, "is sent or not", None
            continue
        if (weight := _weight(a)) != (other := _weight(b)):
            numbers = isinstance(weight, float) and isinstance(other, float)
            yield part, "has another weight", abs(weight - other) if numbers else None  # type: ignore[operator]
        if isinstance(a, PerSite) and isinstance(b, PerSite) and list(a.items) != list(b.items):
            yield part, "contains values of other sites", None
            continue
        for x, y in zip(a.trees, b.trees, strict=True):
            yield from ((part, what, amount) for what, amount in _leaves(x, y))


def _weight(stat: WeightedMean | ElementwiseMean | PerSite) -> float | dict[str, float] | None:
    weight = getattr(stat, "weight", getattr(stat, "weights", None))
    return None if isinstance(stat, ElementwiseMean) else weight


def _leaves(a: Tree, b: Tree) -> Iterator[tuple[str, float | None]]:
    if list(a) != list(b):
        yield "contains other tensors", None
        return
    forms = [(leaf.shape, leaf.dtype) != (b[name].shape, b[name].dtype) for name, leaf in a.items()]
    if any(forms):
        yield "contains tensors of another form", None
        return
    gaps = [_gap(leaf, b[name]) for name, leaf in a.items()]
    if worst := max(gaps, default=0.0):
        yield "contains numbers that do not come from mechanisms", worst


def _gap(a: Tensor, b: Tensor) -> float:
    """Return the largest difference between two tensors of the same form; 0 only if they are bit-identical."""
    if torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan()):
        return 0.0
    gap = (a.double() - b.double()).abs().nan_to_num(math.inf)
    return max(float(gap.max()), 5e-324)

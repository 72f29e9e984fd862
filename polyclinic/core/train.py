"""Drivers: the loops that turn a method and a federation into a run.

They are generators. Checkpoints, early stopping, logging and evaluation are what the caller does between two
steps, so there are no callbacks.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, Protocol, TypeVar

from polyclinic.core.check import Gate
from polyclinic.core.method import Ask, Method
from polyclinic.core.site import Site
from polyclinic.core.stats import Reply, merge

State = TypeVar("State")


class Arrival(NamedTuple):
    """One site's answer to one ask: a reply, or the reason why there is none.

    ``seconds`` is how long the site worked, where the engine can tell. ``among`` names the sites whose replies are
    summed in this one, where the ask was secure and the sum is all that the server learns.
    """

    site: str
    round: int
    reply: Reply | None
    lost: str = ""
    seconds: float = 0.0
    among: tuple[str, ...] = ()


class Federation(Protocol):
    """A server that can reach its sites. An engine is a class with these four members."""

    @property
    def server(self) -> Site: ...
    @property
    def sites(self) -> Sequence[str]: ...
    def send(self, ask: Ask, to: Sequence[str]) -> None: ...
    def replies(self, deadline: float | None = None) -> Iterator[Arrival]:
        """Yields answers as they arrive, until no ask is outstanding or ``deadline`` seconds have passed.

        A site that has not answered by then is yielded as lost, and what it sends later is dropped.
        """


@dataclass(frozen=True)
class Step(Generic[State]):
    """What one exchange did.

    Attributes:
        state: The server's state after it.
        ask: What was asked.
        reply: The merged reply.
        asked: Of whom.
        lost: The sites that sent nothing usable, each with the reason.
        bytes_up: Tensor bytes that each site sent. ``bytes_down``: that each received.
        seconds: How long each site worked.
    """

    state: State
    ask: Ask
    reply: Reply
    asked: Sequence[str]
    lost: Mapping[str, str] = field(default_factory=dict)
    bytes_up: Mapping[str, int] = field(default_factory=dict)
    bytes_down: Mapping[str, int] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)


class TooFewReplies(RuntimeError):
    """A round had fewer usable replies than it needs. The state before it is intact.

    Attributes:
        lost: The sites that sent nothing usable, each with the reason.
    """

    def __init__(self, message: str, lost: Mapping[str, str]) -> None:
        super().__init__(message)
        self.lost = lost


def everyone(sites: Sequence[str], round: int) -> Sequence[str]:
    """The cohort of all sites, whatever the round."""
    return sites


def undiscounted(age: int) -> float:
    """The weight of an old answer: the same as of a new one."""
    return 1.0


def train(
    method: Method[State],
    federation: Federation,
    state: State,
    *,
    rounds: int,
    cohort: Callable[[Sequence[str], int], Sequence[str]] = everyone,
    deadline: float | None = None,
    min_replies: int = 1,
    gate: Gate = Gate(),
) -> Iterator[Step[State]]:
    """Runs in lock-step: asks a cohort, waits for it, checks, merges, updates; until round ``rounds``.

    Args:
        cohort: Which sites to ask in a round.
        deadline: Seconds after which a site that has not answered is lost for this exchange.
        min_replies: How many usable replies an update needs.
        gate: Which replies are usable.

    Raises:
        TooFewReplies: Where a round has fewer than ``min_replies``; names every lost site and why.
    """
    while (ask := method.ask(state)) is not None and ask.round < rounds:
        asked = sorted(cohort(federation.sites, ask.round) if ask.to is None else ask.to)
        federation.send(ask, asked)
        arrivals = sorted(federation.replies(deadline), key=lambda a: a.site)  # one order of summation everywhere
        step, usable = _collect(ask, asked, arrivals, gate, state)
        if (heard := len(asked) - len(step.lost)) < min_replies:
            reasons = "; ".join(f"{site}: {reason}" for site, reason in step.lost.items())
            raise TooFewReplies(f"round {ask.round}: {heard} of {min_replies} replies needed. {reasons}", step.lost)
        reply = merge(usable.values())
        state = method.server_update(state, reply, federation.server)
        yield Step(state, ask, reply, asked, step.lost, step.bytes_up, step.bytes_down, step.seconds)


def _collect(
    ask: Ask, asked: Sequence[str], arrivals: Sequence[Arrival], gate: Gate, state: State
) -> tuple[Step[State], dict[str, Reply]]:
    """Sorts what arrived into usable replies and lost sites."""
    lost = dict.fromkeys(asked, "no answer in time")
    replies: dict[str, Reply] = {}
    among: dict[str, tuple[str, ...]] = {}
    for arrival in arrivals:
        if arrival.site not in lost or arrival.round != ask.round:
            continue  # not asked, or an answer to something else
        if arrival.reply is None:
            lost[arrival.site] = arrival.lost
        elif arrival.site not in replies:  # an answer counts once
            replies[arrival.site] = arrival.reply
            among[arrival.site] = arrival.among or (arrival.site,)
    refused = gate.refuse(ask, replies)
    usable = {site: reply for site, reply in replies.items() if site not in refused}
    heard = {name for site in usable for name in among[site]}
    lost = {site: refused.get(site, reason) for site, reason in lost.items() if site not in heard}
    up = {name: reply.nbytes for site, reply in replies.items() for name in among[site]}
    down = {site: ask.nbytes(site) for site in asked}
    seconds = {arrival.site: arrival.seconds for arrival in arrivals}
    return Step(state, ask, Reply(), asked, lost, up, down, seconds), usable


def train_async(
    method: Method[State],
    federation: Federation,
    state: State,
    *,
    updates: int,
    buffer: int = 1,
    passes: int | None = None,
    among: Sequence[str] | None = None,
    discount: Callable[[int], float] = undiscounted,
    gate: Gate = Gate(),
) -> Iterator[Step[State]]:
    """Runs without waiting: updates after every ``buffer`` usable answers, discounted by their age in rounds.

    Args:
        updates: How many server updates to make.
        buffer: How many answers one update takes (Nguyen et al., "Federated Learning with Buffered Asynchronous
            Aggregation", AISTATS 2022).
        passes: How often each site is asked; without end by default.
        among: The sites to ask; all by default.
        discount: The weight of an answer by its age.

    A site that failed to answer three times in a row is not asked again.
    """
    if (ask := method.ask(state)) is None:
        return
    sites = federation.sites if among is None else sorted(among)
    asked, failures = dict.fromkeys(sites, 1), dict.fromkeys(sites, 0)
    pending: dict[str, Reply] = {}
    notes: dict[str, Arrival] = {}
    lost: dict[str, str] = {}
    federation.send(ask, sites)
    for arrival in federation.replies():
        reply = arrival.reply
        refused = gate.refuse(ask, {arrival.site: reply}) if reply is not None else {arrival.site: arrival.lost}
        if reply is None or refused:
            lost |= refused
            failures[arrival.site] += 1
        else:
            failures[arrival.site] = 0
            fresh = reply * discount(ask.round - arrival.round)
            earlier = pending.get(arrival.site)
            pending[arrival.site] = fresh if earlier is None else earlier + fresh
            notes[arrival.site] = arrival
        if len(pending) >= buffer:
            merged = merge(pending[site] for site in sorted(pending))
            state = method.server_update(state, merged, federation.server)
            up = {site: a.reply.nbytes for site, a in notes.items() if a.reply}
            down = {site: ask.nbytes(site) for site in notes}
            yield Step(state, ask, merged, sorted(notes), lost, up, down, {s: a.seconds for s, a in notes.items()})
            pending, notes, lost, updates = {}, {}, {}, updates - 1
            if updates == 0 or (ask := method.ask(state)) is None:
                return
        if failures[arrival.site] < 3 and (passes is None or asked[arrival.site] < passes):
            asked[arrival.site] += 1
            federation.send(ask, [arrival.site])

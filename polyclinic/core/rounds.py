"""Drivers: the loops that run a method on a federation.

They are generators. The caller does checkpoints, early stopping, logging and evaluation between two steps, so there are
no callbacks.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, NamedTuple, Protocol, TypeVar

from polyclinic.core.aggregates import PerSite, Reply, merge
from polyclinic.core.method import Method, Request
from polyclinic.core.reply_validation import Figures, ReplySum, ReplyValidator, Spare
from polyclinic.core.site import Site
from polyclinic.errors import ConfigError, RunError

State = TypeVar("State")


class Arrival(NamedTuple):
    """One site's answer to one request: a reply, or the reason for its absence.

    ``seconds`` is the site's computing time, if the engine measures it. ``among`` names the sites whose replies are
    summed in this one, if the request was secure and the server learns only the sum.
    """

    site: str
    round: int
    reply: Reply | None
    lost: str = ""
    seconds: float = 0.0
    among: tuple[str, ...] = ()


class Federation(Protocol):
    """A server that can reach its sites. Every engine implements these four members."""

    @property
    def server(self) -> Site: ...
    @property
    def sites(self) -> Sequence[str]: ...
    def send(self, request: Request, recipients: Sequence[str]) -> None: ...
    def replies(self, deadline: float | None = None) -> Iterator[Arrival]:
        """Yield answers as they arrive, until no request is outstanding or ``deadline`` seconds have passed.

        A site that has not answered by then is yielded as lost, and its later answer is discarded.
        """


@dataclass(frozen=True)
class Step(Generic[State]):
    """Result of one exchange between the server and its sites.

    Attributes:
        state: The server state after the exchange.
        request: The request.
        reply: The merged reply.
        asked: The sites that were asked.
        lost: The sites without a usable reply, each with the reason.
        bytes_up: Tensor bytes that each site sent.
        bytes_down: Tensor bytes that each site received.
        seconds: Computing time of each site.
    """

    state: State
    request: Request
    reply: Reply
    asked: Sequence[str]
    lost: Mapping[str, str] = field(default_factory=dict)
    bytes_up: Mapping[str, int] = field(default_factory=dict)
    bytes_down: Mapping[str, int] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)


class TooFewReplies(RunError):
    """A round had fewer usable replies than required. The state before the round is intact.

    Attributes:
        lost: The sites without a usable reply, each with the reason.
    """

    def __init__(self, message: str, lost: Mapping[str, str]) -> None:
        super().__init__(message)
        self.lost = lost


def everyone(sites: Sequence[str], round: int) -> Sequence[str]:
    """Select all sites in every round."""
    return sites


def undiscounted(age: int) -> float:
    """Return weight 1 for an answer of any age."""
    return 1.0


def train(
    method: Method[State],
    federation: Federation,
    state: State,
    *,
    rounds: int,
    sampler: Callable[[Sequence[str], int], Sequence[str]] = everyone,
    deadline: float | None = None,
    min_replies: int = 1,
    gate: ReplyValidator = ReplyValidator(),
) -> Iterator[Step[State]]:
    """Run synchronously until round ``rounds``: ask the sampled sites, wait, validate, merge, update.

    Args:
        sampler: Selects the sites to ask in a round.
        deadline: Seconds after which a site that has not answered is lost for this exchange.
        min_replies: Number of usable replies that an update needs.
        gate: Decides which replies are usable.

    Raises:
        TooFewReplies: If a round has fewer than ``min_replies``. The message names every lost site with the reason.
    """
    spare: Spare = {}
    while (request := method.request(state)) is not None and request.round < rounds:
        asked = sorted(sampler(federation.sites, request.round) if request.recipients is None else request.recipients)
        federation.send(request, asked)
        step, reply = _collect(request, asked, federation.replies(deadline), ReplySum(gate, request, spare), state)
        if (usable_count := len(asked) - len(step.lost)) < min_replies:
            reasons = "; ".join(f"{site}: {reason}" for site, reason in step.lost.items())
            raise TooFewReplies(
                f"round {request.round}: {usable_count} of {min_replies} required replies. {reasons}", step.lost
            )
        state = method.server_update(state, reply, federation.server)
        step = replace(step, state=state)
        del request, reply  # they are large, and the next round needs neither
        yield step
        del step


def _collect(
    request: Request, asked: Sequence[str], arrivals: Iterator[Arrival], total: ReplySum, state: State
) -> tuple[Step[State], Reply]:
    """Divide the arrivals into usable replies and lost sites, and sum the replies.

    Replies are summed in the order of sites in every engine. A reply is released when it has been added, and waits for
    its turn if a site before it has not answered. The first answer of a site counts.
    """
    lost = dict.fromkeys(asked, "no answer in time")
    expected, waiting = set(asked), dict[str, Arrival]()
    among: dict[str, tuple[str, ...]] = {}
    up, seconds = dict[str, int](), dict[str, float]()
    turns = deque(asked)

    def take_turns(over: bool = False) -> None:
        while turns and (over or turns[0] not in expected):
            arrival = waiting.pop(site := turns.popleft(), None)
            if arrival is not None and arrival.reply is not None:
                among[site] = arrival.among or (site,)
                up.update(dict.fromkeys(among[site], arrival.reply.nbytes))
                total.add(site, arrival.reply)

    for arrival in arrivals:
        seconds[arrival.site] = arrival.seconds
        if arrival.site in expected and arrival.round == request.round:
            expected.remove(arrival.site)
            if arrival.reply is None:
                lost[arrival.site] = arrival.lost
            else:
                waiting[arrival.site] = arrival
            take_turns()
        del arrival  # its reply is released
    take_turns(over=True)
    refused, merged = total.result()
    answered = {name for site in among if site not in refused for name in among[site]}
    lost = {site: refused.get(site, reason) for site, reason in lost.items() if site not in answered}
    down = {site: request.nbytes(site) for site in asked}
    return Step(state, request, merged, asked, lost, up, down, seconds), merged


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
    gate: ReplyValidator = ReplyValidator(),
) -> Iterator[Step[State]]:
    """Run asynchronously: update after every ``buffer`` usable answers, discounted by their age in rounds.

    John Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022, Algorithm 1,
    https://arxiv.org/abs/2106.06639. The buffer counts answers, not sites. A site that has answered is asked again as
    soon as there is a newer model than that of its last request, and not before, because the same request would return
    the same answer. Departure from Algorithm 1: all sites are asked, whereas the paper samples them.

    If no answer is outstanding and the buffer is not full, the sites that failed are asked once more with the same
    model. The server then updates with the available answers, and the step names the missing sites.

    Args:
        updates: Number of server updates.
        buffer: Number of answers per update.
        passes: Number of requests per site; None for no limit.
        among: The sites to ask; all by default.
        discount: The weight of an answer by its age.
        gate: Decides which replies are usable.

    A site that fails to answer ``FAILURES`` times in a row is not asked again.

    Raises:
        ValueError: If ``buffer`` exceeds the number of sites, so that it could never be filled.
    """
    if (request := method.request(state)) is None:
        return
    sites = federation.sites if among is None else sorted(among)
    if buffer > len(sites):
        raise ConfigError(
            f"an update needs {buffer} answers, and {len(sites)} sites are asked once for each model: reduce the buffer"
        )
    turns, version = _Turns(sites, passes), 0
    pending: list[Arrival] = []
    lost: dict[str, str] = {}
    known: dict[str, Figures] = {}
    federation.send(request, turns.take(turns.due(version), version))
    for arrival in federation.replies():
        if arrival.site not in turns.waiting:
            continue  # not asked, or a repeated answer
        reply = arrival.reply
        refused = {arrival.site: arrival.lost} if reply is None else gate.refuse(request, {arrival.site: reply}, known)
        turns.answered(arrival.site, failed=reply is None or bool(refused))
        if reply is None or refused:
            lost |= refused
        else:
            known[arrival.site] = gate.figures(reply)
            pending = _buffered(pending, arrival._replace(reply=reply * discount(request.round - arrival.round)))
        over = not turns.waiting and not turns.due(version)
        if over and len(pending) < buffer:
            if again := turns.failed():
                federation.send(request, turns.take(again, version))
                continue
            lost |= turns.out
        if len(pending) >= buffer or (over and pending):
            merged = merge(a.reply for a in pending if a.reply)
            state = method.server_update(state, merged, federation.server)
            yield _async_step(state, request, merged, pending, lost)
            pending, lost, version = [], {}, version + 1
            if version == updates or (request := method.request(state)) is None:
                return
        if due := turns.due(version):
            federation.send(request, turns.take(due, version))


FAILURES = 3
"""Number of consecutive failures after which a site is not asked again."""


class _Turns:
    """Schedule of an asynchronous run: asks each site once for each version of the model.

    Attributes:
        waiting: The sites that were asked and have not answered.
        out: The sites that are not asked again, each with the reason.
    """

    def __init__(self, sites: Sequence[str], passes: int | None) -> None:
        self.waiting: set[str] = set()
        self.out: dict[str, str] = {}
        self._passes = passes
        self._version = dict.fromkeys(sites, -1)
        self._asked, self._failures = Counter[str](), Counter[str]()

    def due(self, version: int) -> list[str]:
        """Return the sites that may be asked and have not received this ``version`` or a later one."""
        return [site for site, had in self._version.items() if had < version and self._free(site)]

    def failed(self) -> list[str]:
        """Return the sites that may be asked and whose last answer was not usable."""
        return [site for site in self._version if self._failures[site] and self._free(site)]

    def take(self, sites: list[str], version: int) -> list[str]:
        """Record that ``sites`` are asked with ``version``."""
        for site in sites:
            self._version[site] = version
        self.waiting |= set(sites)
        self._asked.update(sites)
        return sites

    def answered(self, site: str, failed: bool) -> None:
        """Record that a site has answered, or has ``failed`` to."""
        self.waiting.discard(site)
        self._failures[site] = self._failures[site] + 1 if failed else 0
        if self._failures[site] >= FAILURES:
            self.out[site] = f"the site failed {FAILURES} times in a row and is not asked again"
        elif self._passes is not None and self._asked[site] >= self._passes:
            self.out[site] = f"the site was asked {self._passes} times, the maximum for this run"

    def _free(self, site: str) -> bool:
        return site not in self.waiting and site not in self.out


def _buffered(pending: list[Arrival], new: Arrival) -> list[Arrival]:
    """Return ``pending`` with ``new``, ordered by site and round, the order of summation in every engine.

    Per-site aggregates hold one answer of each site: a newer answer replaces an older one.
    """
    apart = any(isinstance(stat, PerSite) for stat in (new.reply or Reply()).parts.values())
    others = [a for a in pending if not (apart and a.site == new.site)]
    return sorted([*others, new], key=lambda a: (a.site, a.round))


def _async_step(
    state: State, request: Request, merged: Reply, pending: Sequence[Arrival], lost: Mapping[str, str]
) -> Step[State]:
    up, down, seconds = dict[str, int](), dict[str, int](), dict[str, float]()
    for arrival in pending:
        up[arrival.site] = up.get(arrival.site, 0) + (arrival.reply.nbytes if arrival.reply else 0)
        down[arrival.site] = down.get(arrival.site, 0) + request.nbytes(arrival.site)
        seconds[arrival.site] = seconds.get(arrival.site, 0.0) + arrival.seconds
    return Step(state, request, merged, sorted(up), dict(lost), up, down, seconds)

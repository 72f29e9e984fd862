"""Secure sum between hospitals: the five stages of ``secure_aggregation`` within the calls of one message.

Sites train first and keep their contribution; only its names and shapes reach the server. The protocol then runs among
the sites that answered. A site that drops out is lost for this round only; below the threshold no sum is computed.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from polyclinic.core.aggregates import Reply
from polyclinic.core.method import Request
from polyclinic.core.rounds import Arrival
from polyclinic.core.serialization import Corrupt
from polyclinic.engines.flare.protocol import tensor_file
from polyclinic.engines.flare.protocol.messages import printable
from polyclinic.engines.flare.protocol.rpc import Exchange, Outcome
from polyclinic.secure_aggregation import reply_of, terms
from polyclinic.secure_aggregation.secure_messages import Advert, Agreed, Masked, Reveal, Shares
from polyclinic.secure_aggregation.server import SecureServer
from polyclinic.secure_aggregation.session_keys import ProtocolError, Session, least_threshold

STAGES: Mapping[str, type] = {"advertise": Advert, "share": Shares, "mask": Masked, "agree": Agreed, "reveal": Reveal}


class _Sum:
    """One secure sum over the sites that trained."""

    def __init__(self, exchange: Exchange, request: Request, deadline: float | None) -> None:
        self.exchange, self.request, self.deadline = exchange, request, deadline
        self.seconds: dict[str, float] = {}
        self.lost: dict[str, str] = {}

    def layouts(self) -> dict[str, Any]:
        """Return the layout of each site's contribution: names and shapes without values."""
        layouts = {}
        for outcome in self.exchange.outcomes(self.deadline):
            value = self._value(outcome)
            if value is not None and not _is_layout(value):
                self.lost[outcome.site] = "its contribution has no valid layout"
            elif value is not None:
                layouts[outcome.site] = value
                self.seconds[outcome.site] = outcome.seconds
        return layouts

    def stage(self, stage: str, bodies: Mapping[str, Any]) -> Iterator[Any]:
        """Call each site with its body, an identical body once for all its sites, and yield the messages of one
        stage.
        """
        groups: dict[int, list[str]] = {}
        for site, body in bodies.items():
            groups.setdefault(id(body), []).append(site)
        for sites in groups.values():
            self.exchange.post(bodies[sites[0]], sites, "secure", self.request.round, self.request.job, stage)
        for outcome in self.exchange.outcomes(self.deadline):
            value = self._value(outcome)
            if isinstance(value, STAGES[stage]) and getattr(value, "site", None) == outcome.site:
                yield value
            elif value is not None:
                self.lost[outcome.site] = f"it sent no message of the stage {stage!r}"

    def _value(self, outcome: Outcome) -> Any:
        if outcome.path is None:
            self.lost[outcome.site] = outcome.lost
            return None
        try:
            return tensor_file.read(outcome.path)
        except Corrupt as error:
            self.lost[outcome.site] = f"its answer was refused: {printable(str(error))}"
            return None
        finally:
            outcome.path.unlink(missing_ok=True)


def secure_sum(exchange: Exchange, request: Request, asked: Sequence[str], deadline: float | None) -> Iterator[Arrival]:
    """Yield the sites that were lost, and one arrival with the sum over the sites that completed the protocol.

    A reply without parts contains nothing to sum. It arrives as it is.
    """
    sum_, empty, arrival = _Sum(exchange, request, deadline), list[str](), None
    try:
        layouts = sum_.layouts()
        empty = sorted(site for site, layout in layouts.items() if not layout)
        if len(empty) < len(layouts) or not layouts:
            arrival = _run(sum_, {site: layout for site, layout in layouts.items() if layout}, asked)
    except (ProtocolError, ValueError) as error:
        for site in asked:
            if site not in empty:
                sum_.lost.setdefault(site, f"no sum was computed: {error}")
    among = arrival.among if arrival else ()
    for site in empty:
        yield Arrival(site, request.round, Reply(), "", sum_.seconds.get(site, 0.0))
    exchange.counts(exchange.count.number, empty)
    for site, reason in sorted(sum_.lost.items()):
        if site not in among:
            exchange.journal.write(
                "lost", {"number": exchange.count.number, "round": request.round, "site": site, "reason": reason}
            )
            yield Arrival(site, request.round, None, reason, sum_.seconds.get(site, 0.0))
    if arrival:
        exchange.counts(exchange.count.number, among)
        yield arrival


def _run(sum_: _Sum, layouts: Mapping[str, Any], asked: Sequence[str]) -> Arrival:
    """Run the protocol among the sites that trained.

    Raises:
        ProtocolError: If too few sites remain, or their replies have different shapes.
    """
    request, wanted = sum_.request, terms(sum_.request)
    least = least_threshold(len(layouts), wanted.threshold if wanted else None, len(asked))
    if len(layouts) < least:
        raise ProtocolError(f"{len(layouts)} sites answered, and a secure sum needs {least}")
    layout = layouts[min(layouts)]
    shapes = {site: _shapes(one) for site, one in layouts.items()}
    if odd := [site for site, shape in shapes.items() if shape != shapes[min(layouts)]]:
        raise ProtocolError(f"{', '.join(odd)} would send other names or shapes than {min(layouts)}")
    identities = sum_.exchange.order.identities
    session = Session(
        os.urandom(16).hex(), request.round, _size(layout), least, {site: identities.get(site, "") for site in layouts}
    )
    server = SecureServer(session)
    adverts = server.adverts(sum_.stage("advertise", dict.fromkeys(sorted(layouts), session)))
    inboxes = server.shares(sum_.stage("share", dict.fromkeys([a.site for a in adverts], adverts)))
    alive = server.masked(sum_.stage("mask", inboxes))
    agreed = server.agreed(sum_.stage("agree", dict.fromkeys(alive, alive)))
    total = server.reveals(sum_.stage("reveal", dict.fromkeys([a.site for a in agreed], agreed)))
    sum_.lost |= {site: reason for site, reason in server.refused.items() if site not in alive}
    for site in set(layouts) - set(alive):
        sum_.lost.setdefault(site, "it was absent when vectors were summed")
    seconds = max(sum_.seconds[site] for site in alive)
    return Arrival(alive[0], request.round, reply_of(total, layout, len(alive)), "", seconds, alive)


def _is_layout(value: Any) -> bool:
    """Return whether ``value`` is a layout: empty tensors by part and name. It may have no parts."""
    return isinstance(value, Mapping) and all(
        isinstance(tags, Mapping) and all(isinstance(t, Tensor) and t.ndim and not t.numel() for t in tags.values())
        for tags in value.values()
    )


def _shapes(layout: Mapping[str, Any]) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(part, name, tuple(tag.shape)) for part, tags in sorted(layout.items()) for name, tag in tags.items()]


def _size(layout: Mapping[str, Any]) -> int:
    size = 0
    for _, _, shape in _shapes(layout):
        count = 1
        for side in shape[1:]:
            count *= side
        size += count
    return size

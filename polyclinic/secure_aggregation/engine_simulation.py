"""Secure summation on one machine: of what a cohort answers, the server's side sees one masked sum.

The real protocol runs, every message of it, though all in one process: what it costs and which losses it survives
are those of a network. What it protects is shown only where sites are processes of different hospitals.
"""

from collections.abc import Iterator, Sequence

from polyclinic.core.aggregates import Reply
from polyclinic.core.method import Request
from polyclinic.core.rounds import Arrival
from polyclinic.secure_aggregation import terms
from polyclinic.secure_aggregation.in_memory import secure_merge
from polyclinic.secure_aggregation.session_keys import ProtocolError, least_threshold


def secured(request: Request | None, asked: Sequence[str], arrivals: Iterator[Arrival]) -> Iterator[Arrival]:
    """``arrivals`` as they are where ``request`` is not secure; else one arrival with the sum, and the lost sites."""
    if request is None or not request.secure:
        yield from arrivals
        return
    found: dict[str, Arrival] = {}
    for arrival in arrivals:
        if arrival.reply is None:
            yield arrival
        else:
            found[arrival.site] = arrival
    replies: dict[str, Reply] = {site: a.reply for site, a in sorted(found.items()) if a.reply is not None}
    wanted = terms(request)
    least = least_threshold(len(replies), wanted.threshold if wanted else None, len(asked))
    try:
        if len(replies) < least:
            raise ProtocolError(f"{len(replies)} sites answered, and a secure sum needs {least}")
        total, among = secure_merge(replies, threshold=least, round=request.round)
    except (ProtocolError, ValueError) as error:
        yield from (a._replace(reply=None, lost=f"no sum was made: {error}") for a in found.values())
        return
    seconds = max(found[site].seconds for site in among)
    yield Arrival(among[0], request.round, total, "", seconds, among)

"""Secure aggregation on one machine: the simulated server receives one masked sum of the sites' replies.

All messages of the real protocol are exchanged in one process, so that its costs and its tolerance of lost sites are
those of a network. The protection itself requires sites on separate machines.
"""

from collections.abc import Iterator, Sequence

from polyclinic.core.aggregates import Reply
from polyclinic.core.method import Request
from polyclinic.core.rounds import Arrival
from polyclinic.secure_aggregation import terms


def secured(request: Request | None, asked: Sequence[str], arrivals: Iterator[Arrival]) -> Iterator[Arrival]:
    """Return ``arrivals`` unchanged if ``request`` is not secure; else one arrival with the sum, and the lost sites.

    A reply without parts contains nothing to sum. It arrives as it is.
    """
    return _secure_sum(request, asked, arrivals) if request is not None and request.secure else arrivals


def _secure_sum(request: Request, asked: Sequence[str], arrivals: Iterator[Arrival]) -> Iterator[Arrival]:
    """Yield one arrival with the sum of the replies to ``request``, and the lost sites."""
    from polyclinic.secure_aggregation.in_memory import secure_merge  # imports a library of cryptography
    from polyclinic.secure_aggregation.session_keys import ProtocolError, least_threshold

    answered, empty = dict[str, Arrival](), False
    for arrival in arrivals:
        if arrival.reply is None or not arrival.reply.parts:
            empty |= arrival.reply is not None
            yield arrival
        else:
            answered[arrival.site] = arrival
    if empty and not answered:
        return
    replies: dict[str, Reply] = {site: a.reply for site, a in sorted(answered.items()) if a.reply is not None}
    wanted = terms(request)
    least = least_threshold(len(replies), wanted.threshold if wanted else None, len(asked))
    try:
        if len(replies) < least:
            raise ProtocolError(f"{len(replies)} sites answered, but a secure sum needs {least}")
        total, among = secure_merge(replies, threshold=least, round=request.round)
    except (ProtocolError, ValueError) as error:
        yield from (a._replace(reply=None, lost=f"no secure sum: {error}") for a in answered.values())
        return
    seconds = max(answered[site].seconds for site in among)
    yield Arrival(among[0], request.round, total, "", seconds, among)

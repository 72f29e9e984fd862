"""Secure summation on one machine: of what a cohort answers, the server's side sees one masked sum.

The real protocol runs, every message of it, though all in one process: what it costs and which losses it survives
are those of a network. What it protects is shown only where sites are processes of different hospitals.
"""

from collections.abc import Iterator, Sequence

from polyclinic.core.method import Ask
from polyclinic.core.stats import Reply
from polyclinic.core.train import Arrival
from polyclinic.transforms.secure import terms
from polyclinic.transforms.secure.keys import ProtocolError, least_threshold
from polyclinic.transforms.secure.memory import secure_merge


def secured(ask: Ask | None, asked: Sequence[str], arrivals: Iterator[Arrival]) -> Iterator[Arrival]:
    """``arrivals`` as they are where ``ask`` is not secure; else one arrival with the sum, and the lost sites."""
    if ask is None or not ask.secure:
        yield from arrivals
        return
    found: dict[str, Arrival] = {}
    for arrival in arrivals:
        if arrival.reply is None:
            yield arrival
        else:
            found[arrival.site] = arrival
    replies: dict[str, Reply] = {site: a.reply for site, a in sorted(found.items()) if a.reply is not None}
    wanted = terms(ask)
    least = least_threshold(len(replies), wanted.threshold if wanted else None, len(asked))
    try:
        if len(replies) < least:
            raise ProtocolError(f"{len(replies)} sites answered, and a secure sum needs {least}")
        total, among = secure_merge(replies, threshold=least, round=ask.round)
    except (ProtocolError, ValueError) as error:
        yield from (a._replace(reply=None, lost=f"no sum was made: {error}") for a in found.values())
        return
    seconds = max(found[site].seconds for site in among)
    yield Arrival(among[0], ask.round, total, "", seconds, among)

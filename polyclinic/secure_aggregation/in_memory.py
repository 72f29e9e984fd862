"""A complete secure sum in one process: every message of the real protocol, without a network.

An engine in one process answers a secure request with ``secure_merge``. An engine with a network performs the same five
exchanges between ``SecureSite`` at the sites and ``SecureServer``, and sends the masked ``vector_of`` the reply instead
of the reply. See docs/explanation/privacy.md.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from polyclinic.core.aggregates import Reply
from polyclinic.errors import ConfigError
from polyclinic.secure_aggregation.client import SecureSite
from polyclinic.secure_aggregation.fixed_point import layout_of, reply_of, vector_of
from polyclinic.secure_aggregation.server import SecureServer
from polyclinic.secure_aggregation.session_keys import Ed25519PrivateKey, Session, default_threshold, public

STEPS = ("advertise", "share", "mask", "agree", "reveal")


def secure_sum(
    vectors: Mapping[str, Tensor],
    *,
    threshold: int | None = None,
    lost: Mapping[str, str] | None = None,
    round: int = 0,
    entropy: Callable[[int], bytes] = os.urandom,
    record: Callable[[str, str, Any], None] | None = None,
    clock: Callable[[str], Any] | None = None,
) -> tuple[Tensor, tuple[str, ...]]:
    """Compute the sum of ``vectors`` mod 2³² by the protocol; return it with the sites in the sum.

    Args:
        vectors: Shape [size], int32, by site.
        threshold: Minimum number of sites that must remain; two thirds by default.
        lost: The step before which a site is lost, by site: one of ``STEPS``.
        round: The round whose replies are summed.
        entropy: Source of secrets.
        record: Called with (step, site, message) for each message that the server receives.
        clock: Context manager that is entered with the name of the working party: a site, or ``"server"``.

    Raises:
        ProtocolError: If too few sites remain.
    """
    gone = {site: STEPS.index(step) for site, step in (lost or {}).items()}
    by = clock or _no_clock
    names = sorted(vectors)
    identities = {name: Ed25519PrivateKey.from_private_bytes(entropy(32)) for name in names}
    known = {name: public(key) for name, key in identities.items()}
    size = len(vectors[names[0]]) if names else 0
    session = Session(entropy(16).hex(), round, size, threshold or default_threshold(len(names)), known)
    with by("server"):
        server = SecureServer(session)
    sites = {}
    for name in names:
        with by(name):
            sites[name] = SecureSite(session, name, identities[name], entropy)

    def answers(step: int, among: Mapping[str, Any]) -> Iterator[Any]:
        """Yield the answers of the remaining sites in turn."""
        for name, given in among.items():
            if gone.get(name, len(STEPS)) > step:
                with by(name):
                    message = getattr(sites[name], STEPS[step])(*given)
                if record:
                    record(STEPS[step], name, message)
                yield message

    adverts = list(answers(0, dict.fromkeys(names, ())))
    with by("server"):
        roster = server.adverts(adverts)
    shares = list(answers(1, {advert.site: (roster,) for advert in roster}))
    with by("server"):
        inboxes = server.shares(shares)
    masked = answers(2, {name: (inbox, vectors[name]) for name, inbox in inboxes.items()})
    with by("server"):
        alive = server.masked(masked)
    agreements = list(answers(3, dict.fromkeys(alive, (alive,))))
    with by("server"):
        agreed = server.agreed(agreements)
    reveals = list(answers(4, {message.site: (agreed,) for message in agreed}))
    with by("server"):
        return server.reveals(reveals), alive


def secure_merge(
    replies: Mapping[str, Reply],
    *,
    threshold: int | None = None,
    lost: Mapping[str, str] | None = None,
    round: int = 0,
) -> tuple[Reply, tuple[str, ...]]:
    """Compute ``merge(replies.values())`` without revealing single replies; return it with the sites in the sum.

    Args:
        replies: Replies by site, each made by a method with ``SecureSum``.
        threshold: Minimum number of sites, as in ``terms(request)``.
        lost: As in ``secure_sum``.
        round: The round.

    Raises:
        ValueError: If replies were not made by ``SecureSum``, or differ in their names and shapes.
        ProtocolError: If too few sites remain.
    """
    layouts = {site: layout_of(reply) for site, reply in replies.items()}
    shapes = {site: _shapes(layout) for site, layout in layouts.items()}
    if odd := sorted(site for site, shape in shapes.items() if shape != next(iter(shapes.values()))):
        raise ConfigError(f"{odd} would send tensors with other names or shapes than {next(iter(shapes))}")
    vectors = {site: vector_of(reply) for site, reply in replies.items()}
    total, alive = secure_sum(vectors, threshold=threshold, lost=lost, round=round)
    return reply_of(total, next(iter(layouts.values())), len(alive)), alive


def _shapes(layout: Mapping[str, Mapping[str, Tensor]]) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(part, name, tuple(tag.shape)) for part, tags in layout.items() for name, tag in tags.items()]


@contextmanager
def _no_clock(who: str) -> Iterator[None]:
    yield

"""Registration of sites before a run, and notification of its end: which sites take part, wait for approval, or differ
in code.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from polyclinic.core.rounds import TooFewReplies
from polyclinic.engines.flare.protocol.expected_signers import Signers
from polyclinic.engines.flare.protocol.messages import (
    VERSION,
    WAITS_FOR_WEIGHTS,
    Answer,
    BadMessage,
    Call,
    printable,
)
from polyclinic.engines.flare.protocol.rpc import Carrier
from polyclinic.engines.flare.protocol.run_request import RunRequest, code_hash
from polyclinic.engines.flare.protocol.shared_journals import SharedJournal

PARTING = 5.0
SENDINGS = 3
"""How often start weights are sent to one site in one attempt at a run."""


@dataclass(frozen=True)
class Registration:
    """Inputs of ``register``.

    Attributes:
        say: Reports the progress to people.
        pause: Raises if the run must stop.
        poll: Seconds between two calls to a site that waits.
        signers: The sites' keys; every answer must be signed by one of them.
        weights: The file of start weights for sites without them; None if the run request states none.
        missing: Filled by ``register``: sites that do not take part, with the reason.
        sent: Filled by ``register``: how often start weights were sent to a site.
    """

    order: RunRequest
    carrier: Carrier
    journal: SharedJournal
    say: Callable[..., None]
    pause: Callable[[], None]
    poll: float
    signers: Signers
    weights: Path | None = None
    missing: dict[str, str] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)


def register(about: Registration, sites: Sequence[str], kind: Literal["hello", "end"] = "hello") -> tuple[str, ...]:
    """Return the sites that are ready, once all are or after ``order.patience`` seconds; waiting sites are called
    again.

    A site that refuses or has other code is not called again. At the ``end`` of a run the server waits at most
    ``PARTING`` seconds.

    Raises:
        TooFewReplies: If too few sites take part. The message gives each site's reason.
    """
    order, number = about.order, 0
    until = time.monotonic() + (order.patience if kind == "hello" else PARTING)
    ready, waiting, gone = set[str](), dict.fromkeys(sites, "no answer yet"), dict[str, str]()
    head = about.journal.write(kind, {"to": list(sites)})
    asked_at = -about.poll
    open_calls: dict[str, int] = {}
    while waiting and time.monotonic() < until:
        if time.monotonic() - asked_at >= about.poll:
            number += 1
            asked_at = time.monotonic()
            fresh = [name for name in waiting if name not in open_calls]
            poor = _without_weights(about, fresh, waiting)
            others = [name for name in fresh if name not in poor]
            about.carrier.post([_call(about.order, kind, name, number, head) for name in others], None)
            if poor:
                about.carrier.post([_call(about.order, "weights", name, number, head) for name in poor], about.weights)
            open_calls |= dict.fromkeys(fresh, number)
            if kind == "hello":
                about.say("greeting", "", waiting=waiting)
        if (delivery := about.carrier.arrived(0.25)) is not None:
            delivery.discard()  # a registration has no file
            if delivery.site in waiting:
                open_calls.pop(delivery.site, None)
                _process(about, delivery.site, delivery.text, delivery.reason, ready, waiting, gone)
        for name in [n for n in waiting if about.carrier.away(n)]:
            gone[name] = "the site is away"
            del waiting[name]
        about.pause()
    for name in open_calls:
        about.carrier.drop(name)
    if kind == "hello":
        about.missing.clear()
        about.missing.update({**gone, **waiting})
        _enough(about, ready, about.missing)
    return tuple(sorted(ready))


def _without_weights(about: Registration, sites: Sequence[str], waiting: Mapping[str, str]) -> list[str]:
    """Return those of ``sites`` to which start weights are sent now, and record this."""
    if about.weights is None:
        return []
    poor = [
        name for name in sites if waiting[name].startswith(WAITS_FOR_WEIGHTS) and about.sent.get(name, 0) < SENDINGS
    ]
    for name in poor:
        about.sent[name] = about.sent.get(name, 0) + 1
        about.journal.write("start weights sent", {"site": name, "weights": about.order.weights["sha256"]})
    return poor


def _call(order: RunRequest, kind: str, site: str, number: int, head: str) -> Call:
    size, sha256 = (order.weights["bytes"], order.weights["sha256"]) if kind == "weights" else (0, "")
    return Call(VERSION, order.run, number, site, head, size, sha256, kind, order.hash, 0, "", 0, 0, 0, 0.0, "")


def _process(
    about: Registration,
    site: str,
    text: object,
    reason: str,
    ready: set[str],
    waiting: dict[str, str],
    gone: dict[str, str],
) -> None:
    try:
        answer = Answer.from_json(text)
        if answer.site != site or answer.run != about.order.run:
            raise BadMessage(f"it names {answer.site} in {answer.run}")
        if answer.size:
            raise BadMessage("it has a file, and none was requested")
        about.signers.check(answer)
    except BadMessage as error:
        gone[site] = printable(reason) if text is None else f"its answer cannot be read: {error}"
        del waiting[site]
        return
    if answer.lost.startswith("waits for"):
        waiting[site] = printable(answer.lost)
        return
    del waiting[site]
    if answer.lost:
        gone[site] = printable(answer.lost)
    elif answer.code != code_hash():
        gone[site] = (
            f"its polyclinic differs from the server's (code {answer.code[:12]} there, {code_hash()[:12]} here): "
            "install the same version"
        )
    else:
        ready.add(site)
    about.journal.write(
        "greeted",
        {
            "site": site,
            "number": answer.number,
            "lost": gone.get(site, ""),
            "head": answer.head,
            "signature": answer.signature,
        },
    )


def _enough(about: Registration, ready: set[str], missing: Mapping[str, str]) -> None:
    about.journal.write("ready", {"sites": sorted(ready), "missing": dict(missing)})
    trainers = ready & set(about.order.plan["sites"])
    if len(trainers) < max(about.order.min_replies, 1):
        reasons = "; ".join(f"{site}: {reason}" for site, reason in sorted(missing.items()))
        message = f"{len(trainers)} sites take part, and {max(about.order.min_replies, 1)} are needed. {reasons}"
        raise TooFewReplies(message, missing)

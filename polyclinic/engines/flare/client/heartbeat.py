"""Heartbeat between job processes: the server's polls each site's every few seconds over FLARE's connections.

FLARE detects a machine that stopped responding, but not one that was restarted: it admits the site under a new token
and waits indefinitely for a job process that no longer exists. Here a process that does not respond for ``dead_after``
seconds counts as away. On a slow connection the poll waits behind the block of a file in transfer; a block therefore
counts as a response, and the next one may take a minute longer.
"""

import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, ReturnCode
from nvflare.fuel.f3.cellnet.utils import make_reply
from nvflare.fuel.f3.message import Message

CHANNEL, TOPIC = "polyclinic", "pulse"
EVERY = 3.0
BLOCK_TAKES = 60.0
log = logging.getLogger(__name__)


def answer(cell: Any) -> None:
    """Make this process, a site's, respond to heartbeats."""
    cell.register_request_cb(channel=CHANNEL, topic=TOPIC, cb=lambda request: make_reply(ReturnCode.OK))


class Heartbeat:
    """Poll the job processes of ``sites`` in the background until closed."""

    def __init__(self, cell: Any, job: str, sites: Sequence[str], dead_after: float) -> None:
        """Poll FLARE's ``job``. Sites count as alive until they have not responded for ``dead_after`` seconds."""
        self._cell, self._places, self._dead_after = cell, {f"{site}.{job}": site for site in sites}, dead_after
        # Their processes are still starting; the registration limits how long that may take.
        self._lives_until = dict.fromkeys(sites, float("inf"))
        self._over = threading.Event()
        threading.Thread(target=self._poll, name="pulse", daemon=True).start()

    def silent(self, site: str) -> bool:
        """Return whether a site responded before and no longer does."""
        return time.monotonic() > self._lives_until.get(site, float("inf"))

    def moved(self, place: str) -> None:
        """Record that a block of a file was sent to, or received from, the process ``place``."""
        self._seen(place, BLOCK_TAKES)

    def _seen(self, place: str, longer: float = 0.0) -> None:
        if (site := self._places.get(place)) is not None:
            before = self._lives_until[site]
            until = time.monotonic() + self._dead_after + longer
            self._lives_until[site] = until if before == float("inf") else max(before, until)

    def close(self) -> None:
        """Stop polling."""
        self._over.set()

    def _poll(self) -> None:
        while not self._over.wait(EVERY):
            try:
                replies = self._cell.broadcast_request(
                    channel=CHANNEL,
                    topic=TOPIC,
                    targets=list(self._places),
                    request=Message(),
                    timeout=2 * EVERY,
                    optional=True,
                )
            except Exception:  # FLARE may raise anything while it is ending
                log.debug("the heartbeat could not be sent", exc_info=True)
                continue
            for place, reply in replies.items():
                if reply.get_header(MessageHeaderKey.RETURN_CODE) == ReturnCode.OK:
                    self._seen(place)

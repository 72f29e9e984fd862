"""Whether a site's job process still lives: the server's asks it every few seconds, over FLARE's connections.

FLARE itself notices a machine that fell silent, but not one that was switched off and on again: it lets the site in
under a new token and waits for ever for a job process that no longer exists. A process that does not answer for
``dead_after`` seconds counts as away, whatever the machine says. Over a slow line the question waits behind the block
of a file that is under way; so a block counts as an answer, and the next one may take a minute longer.
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
    """Lets this process, a site's, answer."""
    cell.register_request_cb(channel=CHANNEL, topic=TOPIC, cb=lambda request: make_reply(ReturnCode.OK))


class Heartbeat:
    """Asks the job processes of ``sites`` in the background until it is closed."""

    def __init__(self, cell: Any, job: str, sites: Sequence[str], dead_after: float) -> None:
        """For FLARE's ``job``. Sites count as living until they have been silent for ``dead_after`` seconds."""
        self._cell, self._places, self._dead_after = cell, {f"{site}.{job}": site for site in sites}, dead_after
        # Their processes are only starting now; how long that may take is for the greeting to say.
        self._lives_until = dict.fromkeys(sites, float("inf"))
        self._over = threading.Event()
        threading.Thread(target=self._ask, name="pulse", daemon=True).start()

    def silent(self, site: str) -> bool:
        """Whether a site has answered before, and does not any more."""
        return time.monotonic() > self._lives_until.get(site, float("inf"))

    def moved(self, place: str) -> None:
        """A block of a file goes to, or came from, the process called ``place``."""
        self._heard(place, BLOCK_TAKES)

    def _heard(self, place: str, longer: float = 0.0) -> None:
        if (site := self._places.get(place)) is not None:
            before = self._lives_until[site]
            until = time.monotonic() + self._dead_after + longer
            self._lives_until[site] = until if before == float("inf") else max(before, until)

    def close(self) -> None:
        """Asks no more."""
        self._over.set()

    def _ask(self) -> None:
        while not self._over.wait(EVERY):
            try:
                said = self._cell.broadcast_request(
                    channel=CHANNEL,
                    topic=TOPIC,
                    targets=list(self._places),
                    request=Message(),
                    timeout=2 * EVERY,
                    optional=True,
                )
            except Exception:  # whatever FLARE says while it is ending
                log.debug("the pulse was not asked", exc_info=True)
                continue
            for place, reply in said.items():
                if reply.get_header(MessageHeaderKey.RETURN_CODE) == ReturnCode.OK:
                    self._heard(place)

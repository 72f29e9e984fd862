"""Messages from the workers of a cluster to the process of the run.

This module imports no other of Polyclinic and not PyTorch, so that the mailbox's process starts in a fraction of the
time that a worker takes.
"""

import asyncio
import json
import time
from typing import Any

INTERVAL = 0.2
"""Seconds in which the messages of a worker are sent together."""


class Mailbox:
    """Messages from the workers to the process of the run: an actor of Ray."""

    def __init__(self) -> None:
        self._messages: asyncio.Queue[str] = asyncio.Queue()
        self._answers: dict[int, asyncio.Future[int]] = {}
        self._asked = 0

    async def tell(self, messages: list[str]) -> None:
        """Leave messages."""
        for message in messages:
            await self._messages.put(message)

    async def ask(self, message: str) -> int:
        """Leave a message, and wait for the answer."""
        self._asked += 1
        answer = self._answers[self._asked] = asyncio.get_running_loop().create_future()
        await self._messages.put(json.dumps({"ask": self._asked, **json.loads(message)}))
        value: int = await answer
        return value

    async def take(self) -> list[str]:
        """Wait for messages, and take all of them."""
        return [await self._messages.get(), *(self._messages.get_nowait() for _ in range(self._messages.qsize()))]

    async def answer(self, number: int, value: int) -> None:
        """Answer the question ``number``."""
        self._answers.pop(number).set_result(value)


class Outbox:
    """Sends messages to a mailbox in their order, those of ``INTERVAL`` seconds together.

    Args:
        package: Ray.
        mailbox: The actor.
    """

    def __init__(self, package: Any, mailbox: Any) -> None:
        self._ray, self._mailbox = package, mailbox
        self._waiting: list[str] = []
        self._sent = -INTERVAL
        self._delivery: Any = None

    def tell(self, message: str) -> None:
        """Send a message now or, if one was sent a moment ago, with the next one."""
        self._waiting.append(message)
        if time.monotonic() - self._sent >= INTERVAL:
            self._send()

    def ask(self, message: str) -> int:
        """Send a message, and wait for the answer."""
        self.flush()
        return int(self._ray.get(self._mailbox.ask.remote(message)))

    def flush(self) -> None:
        """Send all messages, and wait until they are in the mailbox."""
        self._send()
        if self._delivery is not None:
            self._ray.get(self._delivery)

    def _send(self) -> None:
        if self._waiting:
            if self._delivery is not None:
                self._ray.get(self._delivery)  # so that messages stay in order and do not pile up
            self._delivery = self._mailbox.tell.remote(self._waiting)
            self._waiting, self._sent = [], time.monotonic()

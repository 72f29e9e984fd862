"""Messages of workers arrive in order, few at a time, and none is lost."""

import asyncio
import json
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest

from polyclinic.engines.ray import mailbox
from polyclinic.engines.ray.mailbox import Mailbox, Outbox


class Package:
    """What an outbox uses of Ray and of an actor, as a record of calls; a result is the number of its call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, object]] = []
        self.waited: list[int] = []

    def __getattr__(self, name: str) -> "Call":
        return Call(name, self.calls)

    def get(self, reference: int) -> int:
        """Wait for a result."""
        self.waited.append(reference)
        return reference


@dataclass
class Call:
    """A method of the actor."""

    name: str
    calls: list[tuple[str, object]]

    def remote(self, given: object) -> int:
        """Call it."""
        self.calls.append((self.name, given))
        return len(self.calls)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    return clock


def test_messages_that_follow_each_other_are_sent_together(now: list[float]) -> None:
    package = Package()
    out = Outbox(package, package)
    for i in range(3):
        out.tell(f"a{i}")
    now[0] += mailbox.INTERVAL
    out.tell("b")
    out.tell("c")
    out.flush()
    assert package.calls == [("tell", ["a0"]), ("tell", ["a1", "a2", "b"]), ("tell", ["c"])]
    assert package.waited == [1, 2, 3]  # each has arrived before the next one is sent, and the last at the end
    out.flush()
    assert len(package.calls) == 3


def test_a_question_comes_after_the_messages_before_it(now: list[float]) -> None:
    package = Package()
    out = Outbox(package, package)
    out.tell("a")
    out.tell("b")
    assert out.ask("?") == 3
    assert package.calls == [("tell", ["a"]), ("tell", ["b"]), ("ask", "?")]
    assert package.waited == [1, 2, 3]


def test_a_mailbox_keeps_the_order_and_answers() -> None:
    async def scene() -> None:
        box = Mailbox()
        await box.tell(["first", "second"])
        question = asyncio.ensure_future(box.ask(json.dumps({"note": ["x", {}]})))
        await asyncio.sleep(0)
        first, second, asked = await box.take()
        assert (first, second) == ("first", "second")
        await box.answer(json.loads(asked)["ask"], 7)
        assert await question == 7

    asyncio.run(scene())


def test_the_process_of_a_mailbox_starts_without_pytorch() -> None:
    script = "import sys, polyclinic.engines.ray.mailbox; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0

"""A child process that answers lines: what it says, how it ends, how long it is waited for."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from polyclinic.engines.flare.line_process import Ended, LineProcess

CHILD = """
import json, os, sys, time
for line in sys.stdin:
    value = json.loads(line)
    if value == "exit":
        sys.exit(3)
    if value == "kill":
        os.kill(os.getpid(), 9)
    if value == "sleep":
        time.sleep(60)
    print("seen", value, file=sys.stderr, flush=True)
    print(json.dumps([value, os.getpid(), os.environ.get("COLOR")]), flush=True)
"""


@pytest.fixture
def child(tmp_path: Path) -> Iterator[LineProcess]:
    process = LineProcess(["-c", CHILD], tmp_path / "log", {"COLOR": "red"})
    yield process
    process.close()
    assert process.pid == 0


def test_it_is_started_once_and_answers_each_line(child: LineProcess) -> None:
    assert child.pid == 0
    long = "x" * 3_000_000  # more than a pipe holds
    first = child.exchange([1, "ä"], lambda: False)
    assert first == [[1, "ä"], child.pid, "red"]
    assert child.exchange(long, lambda: False) == [long, child.pid, "red"]
    assert first[1] == child.pid
    assert "seen" in child.log.read_text(encoding="utf-8")


@pytest.mark.parametrize(("word", "how"), [("exit", "exit code 3"), ("kill", "killed by signal SIGKILL")])
def test_it_is_started_again_after_it_has_ended(child: LineProcess, word: str, how: str) -> None:
    before = child.exchange("hello", lambda: False)[1]
    with pytest.raises(Ended, match=how):
        child.exchange(word, lambda: False)
    assert child.pid == 0
    assert child.exchange("hello", lambda: False)[1] not in (before, 0)


def test_it_is_killed_when_waiting_has_become_pointless(child: LineProcess) -> None:
    child.start()
    with pytest.raises(TimeoutError):
        child.exchange("sleep", lambda: True)
    assert child.pid == 0

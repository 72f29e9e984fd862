"""What a site keeps: settled, rolled back, never mixed up; checked against a plain model of the rules."""

from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from polyclinic.engines.flare.memory import SPARE, Link, Memory, OldMessage


def link(number: int, after: int, memory: str = "") -> Link:
    return Link(number, after, f"{number:064x}", number, "train", 10, "0" * 64, memory, 0.1)


def answer(memory: Memory, number: int, after: int, confirmed: int, keep: bool = True) -> str:
    """Answers a message as the desk does; what it began from."""
    memory.settle(after, confirmed, number)
    memory.undo(after)
    before = memory.before(after)
    begun = before.read_text() if before else ""
    if keep:
        memory.kept(number).write_text(f"{begun}>{number}")
    memory.add(link(number, after, memory.kept(number).name if keep else (before.name if before else "")))
    return begun


def test_memory_follows_the_messages_that_count(tmp_path: Path) -> None:
    memory = Memory(tmp_path / "run")
    assert answer(memory, 1, 0, 0) == ""
    assert answer(memory, 2, 1, 1) == ">1"
    assert answer(memory, 3, 1, 1) == ">1"  # message 2 was lost
    assert answer(memory, 5, 3, 3) == ">1>3"
    assert sorted(p.name for p in memory.folder.glob("*.memory")) == ["3.memory", "5.memory"]


def test_memory_survives_a_restart(tmp_path: Path) -> None:
    answer(Memory(tmp_path / "run"), 1, 0, 0)
    assert answer(Memory(tmp_path / "run"), 2, 1, 1) == ">1"


def test_a_score_keeps_the_memory_that_it_found(tmp_path: Path) -> None:
    memory = Memory(tmp_path / "run")
    answer(memory, 1, 0, 0)
    assert answer(memory, 2, 1, 0, keep=False) == ">1"
    assert answer(memory, 3, 2, 2) == ">1"


@pytest.mark.parametrize(("after", "confirmed", "number"), [(1, 1, 4), (3, 3, 3), (3, 3, 2), (0, 0, 9)])
def test_the_server_cannot_go_back(after: int, confirmed: int, number: int, tmp_path: Path) -> None:
    memory = Memory(tmp_path / "run")
    answer(memory, 1, 0, 0)
    answer(memory, 2, 1, 1)
    answer(memory, 3, 2, 2)
    answer(memory, 4, 3, 3)
    with pytest.raises(OldMessage, match="replay"):
        memory.settle(after, confirmed, number)


def test_a_memory_that_is_gone_is_noticed(tmp_path: Path) -> None:
    memory = Memory(tmp_path / "run")
    answer(memory, 1, 0, 0)
    memory.kept(1).unlink()
    with pytest.raises(KeyError):
        memory.before(1)
    memory.begin_anew()
    memory.settle(0, 0, 2)
    assert memory.before(0) is None


class Server(RuleBasedStateMachine):
    """A server that loses answers, crashes and resumes, beside a site; the model is the list of answers that count."""

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "run"
        self.number, self.counts = 0, [0]
        self.disk = (0, [0])

    def teardown(self) -> None:
        self.folder.cleanup()

    def exchange(self, lost: bool) -> None:
        self.number += 1
        memory = Memory(self.path)
        again = memory.chain.same(self.number, self.counts[-1], f"{self.number:064x}")
        confirmed = self.disk[1][-1]
        if again is None:
            begun = answer(memory, self.number, self.counts[-1], confirmed)
            assert begun == "".join(f">{n}" for n in self.counts[1:])
        if not lost:
            self.counts = [*self.counts, self.number]

    @rule()
    def answered(self) -> None:
        self.exchange(lost=False)

    @rule()
    def lost(self) -> None:
        self.exchange(lost=True)

    @rule()
    def checkpoint(self) -> None:
        self.disk = (self.number, list(self.counts))

    @precondition(lambda self: self.number > self.disk[0])
    @rule(data=st.data())
    def crash(self, data) -> None:
        self.number, self.counts = self.disk[0], list(self.disk[1])

    @invariant()
    def few_files(self) -> None:
        if self.path.exists():
            assert len(list(self.path.glob("*.memory"))) <= len(Memory(self.path).chain.links) + 1 + SPARE


TestServer = Server.TestCase
TestServer.settings = settings(max_examples=25, stateful_step_count=15, deadline=None)

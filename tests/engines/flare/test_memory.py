"""What a site keeps: settled, rolled back, never mixed up; checked against a plain model of the rules."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from polyclinic.engines.flare.client.request_usage import Answered
from polyclinic.engines.flare.client.run_memory import SPARE, Link, OldMessage, RunMemory
from polyclinic.engines.flare.protocol.paths import hash_of
from polyclinic.engines.request_schedule import Request


def link(number: int, after: int, memory: str = "") -> Link:
    return Link(number, after, f"{number:064x}", number, "train", 10, "0" * 64, memory, 0.1)


def answer(memory: RunMemory, number: int, after: int, confirmed: int, keep: bool = True) -> str:
    """Answer a message as the agent does, and return the state it started from."""
    memory.settle(after, confirmed, number)
    memory.undo(after)
    before = memory.before(after)
    begun = before.read_text() if before else ""
    if keep:
        memory.kept(number).write_text(f"{begun}>{number}")
    memory.add(link(number, after, memory.kept(number).name if keep else (before.name if before else "")))
    return begun


def test_memory_follows_the_messages_that_count(tmp_path: Path) -> None:
    memory = RunMemory(tmp_path / "run")
    assert answer(memory, 1, 0, 0) == ""
    assert answer(memory, 2, 1, 1) == ">1"
    assert answer(memory, 3, 1, 1) == ">1"  # message 2 was lost
    assert answer(memory, 5, 3, 3) == ">1>3"
    assert sorted(p.name for p in memory.folder.glob("*.memory")) == ["3.memory", "5.memory"]


def test_memory_survives_a_restart(tmp_path: Path) -> None:
    answer(RunMemory(tmp_path / "run"), 1, 0, 0)
    assert answer(RunMemory(tmp_path / "run"), 2, 1, 1) == ">1"


def test_a_score_keeps_the_memory_that_it_found(tmp_path: Path) -> None:
    memory = RunMemory(tmp_path / "run")
    answer(memory, 1, 0, 0)
    assert answer(memory, 2, 1, 0, keep=False) == ">1"
    assert answer(memory, 3, 2, 2) == ">1"


@pytest.mark.parametrize(("after", "confirmed", "number"), [(1, 1, 4), (3, 3, 3), (3, 3, 2), (0, 0, 9)])
def test_the_server_cannot_go_back(after: int, confirmed: int, number: int, tmp_path: Path) -> None:
    memory = RunMemory(tmp_path / "run")
    answer(memory, 1, 0, 0)
    answer(memory, 2, 1, 1)
    answer(memory, 3, 2, 2)
    answer(memory, 4, 3, 3)
    with pytest.raises(OldMessage, match="replay"):
        memory.settle(after, confirmed, number)


def test_a_memory_that_is_gone_is_noticed(tmp_path: Path) -> None:
    memory = RunMemory(tmp_path / "run")
    answer(memory, 1, 0, 0)
    memory.kept(1).unlink()
    with pytest.raises(KeyError):
        memory.before(1)
    memory.begin_anew()
    memory.settle(0, 0, 2)
    assert memory.before(0) is None


# What is on the disk, and what is given again ------------------------------------------------------------------------


def replied(memory: RunMemory, number: int, after: int, text: str = "reply", round: int = 0) -> Link:
    """A message whose reply and memory are kept, as the agent keeps them."""
    memory.reply(number).write_text(text)
    memory.layout(number).write_text("layout")
    memory.kept(number).write_text(f"after {number}")
    size, sha256 = hash_of(memory.reply(number))
    one = Link(number, after, f"{number:064x}", round, "train", size, sha256, memory.kept(number).name, 0.1)
    memory.add(one)
    return one


def files(memory: RunMemory) -> list[str]:
    return sorted(path.name for path in memory.folder.iterdir() if path.suffix in (".memory", ".reply", ".layout"))


def test_everything_is_there_again_after_a_restart(tmp_path: Path) -> None:
    memory = RunMemory(tmp_path / "run")
    replied(memory, 1, 0)
    memory.settle(1, 1, 2)
    secure = replace(link(2, 1), secure=True, content="ab" * 32, seconds=2.5, round=7, size=30)
    memory.add(secure)
    memory.add(link(3, 2))
    memory.undo(2)
    again = RunMemory(tmp_path / "run").chain
    assert again == memory.chain
    assert again.confirmed == 1
    assert again.links[-1] == secure
    assert [one.number for one in again.spare] == [3]
    assert again.sent == ((0, 5), (3, 10), (7, 30))


def test_links_are_neither_masked_nor_bound_to_a_content_unless_they_say_so() -> None:
    assert (link(1, 0).secure, link(1, 0).content) == (False, "")


def test_the_same_message_is_the_one_of_the_same_number_memory_and_content(tmp_path: Path) -> None:
    memory = RunMemory(tmp_path / "run")
    first, second = link(1, 0), link(2, 1)
    memory.add(first)
    memory.add(second)
    assert memory.chain.same(2, 1, second.request) == second
    for number, after, request in (
        (2, 0, second.request),
        (2, 1, first.request),
        (1, 1, second.request),
        (3, 1, second.request),
    ):
        assert memory.chain.same(number, after, request) is None
    assert memory.chain.link(1) == first
    assert memory.chain.link(3) is None


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_message_of_a_number_that_was_settled_is_a_replay_even_without_links(tmp_path: Path, number: int) -> None:
    memory = RunMemory(tmp_path / "run")
    answer(memory, 3, 0, 0)
    memory.retire()
    with pytest.raises(OldMessage, match=r"before message 3, .*site forget RUN"):
        memory.settle(3, 3, number)
    memory.settle(0, 0, 4)  # nothing is left to go back behind, and the run is begun anew


def test_the_end_of_a_run_is_remembered_after_a_restart(tmp_path: Path) -> None:
    memory = RunMemory(tmp_path / "run")
    replied(memory, 4, 0)
    memory.retire()
    memory = RunMemory(tmp_path / "run")
    assert (memory.chain.confirmed, memory.chain.links) == (4, ())
    memory.retire()
    assert memory.chain.confirmed == 4
    empty = RunMemory(tmp_path / "empty")
    empty.retire()
    assert empty.chain.confirmed == 0
    empty.settle(0, 0, 1)


def test_the_end_of_a_run_does_not_go_back_behind_what_was_confirmed(tmp_path: Path) -> None:
    memory = RunMemory(tmp_path / "run")
    answer(memory, 1, 0, 0)
    memory.settle(1, 6, 7)
    memory.retire()
    assert memory.chain.confirmed == 6


def test_what_is_confirmed_is_dropped_with_the_next_link_but_for_the_one_that_the_test_needs(tmp_path: Path) -> None:
    memory = RunMemory(tmp_path / "run")
    for number in (1, 2, 3):
        replied(memory, number, number - 1)
    memory.settle(3, 3, 4, keep=1)
    assert [one.number for one in memory.chain.links] == [1, 3]
    assert "2.memory" in files(memory)  # a crash now loses nothing
    replied(memory, 4, 3)
    assert [name for name in files(memory) if name.endswith("memory")] == ["1.memory", "3.memory", "4.memory"]
    memory.settle(4, 4, 5)
    replied(memory, 5, 4)
    assert [name for name in files(memory) if name.endswith("memory")] == ["4.memory", "5.memory"]


def test_the_link_that_is_confirmed_stays_to_begin_from(tmp_path: Path) -> None:
    memory = RunMemory(tmp_path / "run")
    replied(memory, 1, 0)
    memory.settle(1, 1, 2)
    assert memory.before(1) == memory.kept(1)
    memory.settle(1, 1, 2)  # the same message again
    assert memory.chain.confirmed == 1


def test_an_older_confirmation_does_not_take_back_a_later_one(tmp_path: Path) -> None:
    memory = RunMemory(tmp_path / "run")
    answer(memory, 1, 0, 0)
    answer(memory, 2, 1, 0)
    memory.settle(2, 2, 3)
    memory.begin_anew()
    memory.settle(0, 1, 3)
    assert memory.chain.confirmed == 2


def test_spare_replies_that_were_confirmed_are_dropped(tmp_path: Path) -> None:
    memory = RunMemory(tmp_path / "run")
    for number in (1, 2, 3):
        replied(memory, number, number - 1)
    memory.undo(1)
    memory.settle(1, 1, 4)
    assert [one.number for one in memory.chain.spare] == [2, 3]
    replied(memory, 4, 1)
    memory.settle(4, 3, 5)
    assert [one.number for one in memory.chain.spare] == [3]


def test_undone_links_are_named_and_the_last_two_keep_their_replies(tmp_path: Path) -> None:
    memory = RunMemory(tmp_path / "run")
    for number in (1, 2, 3, 4):
        replied(memory, number, number - 1)
    assert memory.undo(4) == ()
    assert memory.undo(1) == (2, 3, 4)
    assert [one.number for one in memory.chain.links] == [1]
    assert [one.number for one in memory.chain.spare] == [3, 4]
    assert files(memory) == sorted(f"{k}.{kind}" for k in (1, 3, 4) for kind in ("memory", "reply", "layout"))


def test_the_files_of_a_run_that_ended_are_removed_and_nothing_else(tmp_path: Path) -> None:
    memory = RunMemory(tmp_path / "run")
    replied(memory, 1, 0)
    (memory.folder / "usage.jsonl").write_text("")
    memory.retire()
    assert files(memory) == []
    assert sorted(path.name for path in memory.folder.iterdir()) == ["chain.json", "usage.jsonl"]


def test_a_memory_that_is_begun_anew_keeps_the_last_replies(tmp_path: Path) -> None:
    memory = RunMemory(tmp_path / "run")
    for number in (1, 2, 3):
        replied(memory, number, number - 1)
    memory.begin_anew()
    assert memory.chain.links == ()
    assert [one.number for one in memory.chain.spare] == [2, 3]


def test_bytes_are_counted_by_round_over_all_links_also_undone_ones(tmp_path: Path) -> None:
    memory = RunMemory(tmp_path / "run")
    replied(memory, 1, 0, "x" * 7, round=3)
    replied(memory, 2, 1, "x" * 5, round=3)
    memory.undo(0)
    replied(memory, 3, 0, "x" * 2, round=4)
    assert [memory.sent_in(round) for round in (2, 3, 4)] == [0, 12, 2]
    assert RunMemory(tmp_path / "run").sent_in(3) == 12


def test_the_bytes_of_the_last_hundred_rounds_are_kept(tmp_path: Path) -> None:
    memory = RunMemory(tmp_path / "run")
    memory.chain = replace(memory.chain, sent=tuple((round, 1) for round in range(100)))
    memory.add(link(100, 0))
    assert (memory.sent_in(0), memory.sent_in(1), memory.sent_in(100)) == (0, 1, 10)
    assert len(memory.chain.sent) == 100


def test_a_run_begins_with_no_memory_and_a_link_without_one_has_none(tmp_path: Path) -> None:
    memory = RunMemory(tmp_path / "run")
    assert memory.before(0) is None
    memory.add(link(1, 0))
    assert memory.before(1) is None
    with pytest.raises(KeyError):
        memory.before(2)


# A reply that is given again -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("undone", [False, True])
def test_a_reply_is_given_again_while_it_is_here(tmp_path: Path, undone: bool) -> None:
    memory = RunMemory(tmp_path / "run")
    one = replied(memory, 1, 0)
    if undone:
        memory.undo(0)
    assert memory.kept_reply(Answered(1, one.sha256)) == one


def test_a_reply_that_is_gone_or_changed_or_was_never_sent_is_not_given_again(tmp_path: Path) -> None:
    memory = RunMemory(tmp_path / "run")
    one = replied(memory, 1, 0)
    assert memory.kept_reply(Answered(0, one.sha256)) is None
    assert memory.kept_reply(Answered(1, "0" * 64)) is None
    memory.reply(1).write_text("other")
    assert memory.kept_reply(Answered(1, one.sha256)) is None
    memory.reply(1).unlink()
    assert memory.kept_reply(Answered(1, one.sha256)) is None


def test_of_two_links_with_one_reply_the_later_is_given_again(tmp_path: Path) -> None:
    memory = RunMemory(tmp_path / "run")
    replied(memory, 1, 0, "same")
    second = replied(memory, 2, 1, "same")
    assert memory.kept_reply(Answered(1, second.sha256)) == second


def test_a_reply_under_another_number_has_the_memory_that_came_after_it(tmp_path: Path) -> None:
    memory = RunMemory(tmp_path / "run")
    replied(memory, 1, 0, "first")
    second = replied(memory, 2, 1, "second")
    replied(memory, 3, 2, "third")
    memory.reply(5).write_text("left by a crash")
    repeated = memory.repeat(second, 5, 1)
    assert repeated == replace(second, number=5, after=1)
    assert memory.reply(5).read_text() == "second"
    assert memory.layout(5).read_text() == "layout"
    assert memory.before(5) == memory.kept(2)
    assert [one.number for one in memory.chain.links] == [1, 5]
    assert [one.number for one in memory.chain.spare] == [2, 3]
    assert RunMemory(tmp_path / "run").chain == memory.chain


def test_a_reply_without_a_layout_is_given_again_without_one(tmp_path: Path) -> None:
    memory = RunMemory(tmp_path / "run")
    one = replied(memory, 1, 0)
    memory.layout(1).unlink()
    memory.repeat(one, 2, 0)
    assert memory.reply(2).exists()
    assert not memory.layout(2).exists()


def test_a_reply_is_given_again_under_its_own_number(tmp_path: Path) -> None:
    memory = RunMemory(tmp_path / "run")
    one = replied(memory, 1, 0, "first")
    memory.undo(0)
    assert memory.repeat(one, 1, 0) == one
    assert memory.reply(1).read_text() == "first"


def test_no_more_than_two_spare_replies_are_kept(tmp_path: Path) -> None:
    memory = RunMemory(tmp_path / "run")
    links = [replied(memory, number, number - 1, f"{number}") for number in (1, 2, 3, 4)]
    memory.repeat(links[0], 5, 0)
    assert [one.number for one in memory.chain.spare] == [3, 4]


# The record of what was answered -------------------------------------------------------------------------------------


def test_forgetting_a_run_removes_all_of_it(tmp_path: Path) -> None:
    memory = RunMemory(tmp_path / "run")
    replied(memory, 1, 0)
    memory.usage.begin(Request(0, "train", "c"), 1)
    memory.forget()
    assert not (tmp_path / "run").exists()
    memory.forget()  # twice is no error
    assert RunMemory(tmp_path / "run").chain.confirmed == 0


def test_what_was_answered_outlives_a_rollback_and_a_lost_memory(tmp_path: Path) -> None:
    memory = RunMemory(tmp_path / "run")
    memory.close()  # it was never opened
    asked = Request(0, "train", "c")
    memory.usage.begin(asked, 1)
    memory.usage.answer(asked, 1, "ab", {})
    replied(memory, 1, 0)
    memory.undo(0)
    memory.begin_anew()
    memory.retire()
    memory.close()
    assert (tmp_path / "run" / "usage.jsonl").exists()  # where a later release looks for it
    assert RunMemory(tmp_path / "run").usage.find(asked).times == 1


class Server(RuleBasedStateMachine):
    """A server that loses answers, crashes and resumes, with a site; the model is the list of answers that count."""

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
        memory = RunMemory(self.path)
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
    def crash(self, data: Any) -> None:
        self.number, self.counts = self.disk[0], list(self.disk[1])

    @invariant()
    def few_files(self) -> None:
        if self.path.exists():
            assert len(list(self.path.glob("*.memory"))) <= len(RunMemory(self.path).chain.links) + 1 + SPARE


TestServer = Server.TestCase
TestServer.settings = settings(max_examples=25, stateful_step_count=15, deadline=None)

"""Messages, orders, files: read strictly, whatever comes."""

import json
import random
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyclinic.core import serialization as states
from polyclinic.core.aggregates import ElementwiseMean, PerSite, Reply, WeightedMean, merge
from polyclinic.engines.flare.protocol import tensor_file
from polyclinic.engines.flare.protocol.messages import VERSION, Answer, BadMessage, Call, printable
from polyclinic.engines.flare.protocol.paths import hash_of
from polyclinic.engines.flare.protocol.run_request import InvalidRunRequest, RunRequest
from polyclinic.testing import equal
from tests.support.local_deployment import order

CALL = Call(VERSION, "run-1", 7, "site-1", "a" * 64, 10, "b" * 64, "do", "c" * 64, 2, "train", 5, 3, 4, 0.0, "")
ANSWER = Answer(VERSION, "run-1", 7, "site-1", "a" * 64, 10, "b" * 64, "", False, 1.5, "d" * 64, "", "sig")


@pytest.mark.parametrize("message", [CALL, ANSWER])
def test_a_message_survives_the_way(message: Any) -> None:
    assert type(message).from_json(message.to_json()) == message


@pytest.mark.parametrize(
    "changes",
    [
        {"run": "../../etc/passwd"},
        {"site": "a\nb"},
        {"site": "A"},
        {"number": -1},
        {"number": True},
        {"number": 2**60},
        {"number": 1.5},
        {"size": -1},
        {"size": 0},
        {"sha256": "x" * 64},
        {"sha256": ""},
        {"head": "short"},
        {"kind": "shell"},
        {"order": "x"},
        {"after": 7},
        {"after": 2},
        {"confirmed": 6},
        {"keep": 6},
        {"keep": -1},
        {"kind": "look"},
        {"deadline": float("inf")},
        {"deadline": "1"},
        {"job": "x" * 101},
        {"stage": "x" * 30},
        {"round": -1},
        {"version": VERSION + 1},
        {"version": VERSION - 1},
        {"version": None},
        {"extra": 1},
    ],
)
def test_a_wrong_call_is_refused(changes: Any) -> None:
    with pytest.raises(BadMessage):
        Call.from_json(json.dumps({**asdict(CALL), **changes}))


@pytest.mark.parametrize("other", [VERSION - 1, VERSION + 1])
def test_another_version_is_told_in_a_sentence(other: int) -> None:
    """Both ends say the same, whichever of them is older: the version is read before anything else."""
    for message in (CALL, ANSWER):
        with pytest.raises(BadMessage, match=f"uses version {other} and this end version {VERSION}: install the same"):
            type(message).from_json(json.dumps({**asdict(message), "version": other, "something": "new"}))
    with pytest.raises(InvalidRunRequest, match="another version of polyclinic"):
        RunRequest.from_json(json.dumps({**json.loads(order().to_json()), "something": "new"}))


@pytest.mark.parametrize("field", [f.name for f in fields(Call)])
def test_a_call_without_a_field_is_refused(field: str) -> None:
    table = asdict(CALL)
    del table[field]
    with pytest.raises(BadMessage):
        Call.from_json(json.dumps(table))


@pytest.mark.parametrize(
    "text", [None, 3, "", "[]", "null", "{", "x" * (2**20 + 1), "[" * 10_000, '{"version": 1e999}']
)
def test_what_is_no_message_is_refused(text: Any) -> None:
    for kind in (Call, Answer):
        with pytest.raises(BadMessage):
            kind.from_json(text)


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=10,
    )
)
def test_any_json_is_refused_in_words(value: Any) -> None:
    for kind, error in ((Call, BadMessage), (Answer, BadMessage), (RunRequest, InvalidRunRequest)):
        with pytest.raises(error):
            kind.from_json(json.dumps(value))


def test_mutated_messages_never_do_harm() -> None:
    rng, until = random.Random(1), time.monotonic() + 2
    sources: list[tuple[type[Call | Answer | RunRequest], str, type[Exception]]] = [
        (Call, CALL.to_json(), BadMessage),
        (Answer, ANSWER.to_json(), BadMessage),
        (RunRequest, order().to_json(), InvalidRunRequest),
    ]
    refused = 0
    while time.monotonic() < until:
        kind, text, error = rng.choice(sources)
        characters = list(text)
        for _ in range(rng.randint(1, 5)):
            characters[rng.randrange(len(characters))] = chr(
                rng.choice([rng.randrange(32, 127), rng.randrange(0x3000)])
            )
        try:
            found = kind.from_json("".join(characters))
        except error:
            refused += 1
        else:
            assert kind.from_json(found.to_json()) == found
    assert refused


def test_mutated_files_never_do_harm(tmp_path: Path) -> None:
    """Three seconds of damaged replies: each is a reply with other numbers, or is refused; nothing else happens."""
    rng, until = random.Random(2), time.monotonic() + 3
    good = states.encode(
        Reply({"update": WeightedMean({"w": torch.randn(4, 4)}, 2.0), "g": PerSite({"a": {"x": torch.arange(3)}})})
    )
    path = tmp_path / "reply"
    while time.monotonic() < until:
        data = bytearray(good)
        for _ in range(rng.randint(1, 6)):
            where = rng.randrange(len(data))
            data[where : where + rng.choice([0, 1, 1, 4])] = rng.randbytes(rng.choice([0, 1, 1, 4]))
        path.write_bytes(bytes(data[: rng.randrange(len(data))]) if rng.random() < 0.2 else bytes(data))
        try:
            reply = tensor_file.read_reply(path)
            assert isinstance(reply.nbytes, int)
        except states.Corrupt:
            pass


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04\x95cposix\nsystem\n",
        b"PK\x03\x04" + b"\0" * 100,
        (2**60).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
    ],
)
def test_other_formats_are_refused_without_running_anything(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "reply").write_bytes(data)
    with pytest.raises(states.Corrupt):
        tensor_file.read_reply(tmp_path / "reply")


def test_a_reply_on_the_disk_is_the_reply(tmp_path: Path) -> None:
    replies = [
        Reply(
            {
                "m": WeightedMean(
                    {"w": torch.randn(5, 3), "b": torch.randn(2).bfloat16(), "e": torch.zeros(0)}, 2.0 + k
                ),
                "l": ElementwiseMean({"w": torch.randn(3)}, {"w": torch.rand(3)}),
                "g": PerSite({f"site-{k}": {"x": torch.arange(4)}}),
            }
        )
        for k in range(3)
    ]
    read = []
    for k, reply in enumerate(replies):
        size, sha256 = tensor_file.write(tmp_path / str(k), reply)
        assert (size, sha256) == hash_of(tmp_path / str(k))
        assert (tmp_path / str(k)).read_bytes() == states.encode(reply)
        read.append(tensor_file.read_reply(tmp_path / str(k)))
        (tmp_path / str(k)).unlink()  # its pages live as long as the reply
    assert all(equal(a, b) for a, b in zip(replies, read, strict=True))
    assert [a.nbytes for a in replies] == [b.nbytes for b in read]
    assert equal(merge(replies), merge(read))
    assert equal(replies[0] * 0.5, read[0] * 0.5)


def test_a_reply_on_the_disk_takes_the_memory_of_one_leaf(tmp_path: Path) -> None:
    import resource

    leaves = {str(k): torch.zeros(2**18) for k in range(64)}  # 64 MB
    tensor_file.write(tmp_path / "reply", Reply({"m": WeightedMean(leaves, 1.0)}))
    del leaves
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    replies = [tensor_file.read_reply(tmp_path / "reply") for _ in range(20)]
    assert all(float(leaf.sum()) == 0 for reply in replies for leaf in reply.mean("m").total.values())
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200 * 1024  # kB; all of them together are 1.3 GB


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"run": "../x"}, "a run's name"),
        ({"plan": []}, "'plan' must be a table"),
        ({"mode": "fast"}, "rounds, buffered or survey"),
        ({"sites_per_round": 0}, "'sites_per_round'"),
        ({"min_replies": None}, "'min_replies'"),
        ({"deadline": 0}, "'deadline'"),
        ({"deadline": True}, "'deadline'"),
        ({"test": "predict/train"}, "'test'"),
        ({"color": "red"}, "no field 'color'"),
        ({"score_every": -1}, "'score_every'"),
    ],
)
def test_a_wrong_order_is_told_by_field(changes: Any, why: str) -> None:
    table = {**json.loads(order().to_json()), **changes}
    with pytest.raises(InvalidRunRequest, match=why):
        RunRequest.from_json(json.dumps(table))


def test_an_order_names_what_runs() -> None:
    """The run request's hash changes with anything; the method's only with what runs at a site."""
    base = order()
    assert order(run="run-2").hash != base.hash
    assert order(run="run-2").method_hash == base.method_hash
    assert order(rounds=9).method_hash == base.method_hash
    assert order(plan={"training": {"epochs": 2}}).method_hash != base.method_hash
    assert order("scaffold").method_hash != base.method_hash
    assert RunRequest.from_json(base.to_json()) == base


def test_nothing_that_a_terminal_obeys_is_printed() -> None:
    assert printable("a\nb\x1b[31mc\u202ed") == "a�b�[31mc�d"
    assert len(printable("x" * 1000)) == 500

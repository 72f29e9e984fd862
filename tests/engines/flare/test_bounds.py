"""What may arrive is decided before a byte is fetched, at a site and at the server; what is not used does not stay."""

import hashlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from typing import Any, cast

import pytest

pytest.importorskip("nvflare", reason="the extra [flare] is not installed")

from polyclinic.core.audit_log import verify
from polyclinic.engines.flare.client.executor import SiteExecutor
from polyclinic.engines.flare.client.heartbeat import Heartbeat
from polyclinic.engines.flare.protocol import file_transfer, message_limits
from polyclinic.engines.flare.protocol.messages import VERSION, Answer, BadMessage, Call
from polyclinic.engines.flare.server.controller import FlareCarrier
from tests.support.local_deployment import LocalCarrier, approve, coordinator, hospital, order

LITTLE = "[limits]\nmin_patients = 2\nmegabytes_per_round = 1.0\n"


class House:
    """A site's job process whose network counts what it is asked to fetch."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, approved: bool) -> None:
        self.an = order()
        self.homes = hospital(root, policy=LITTLE)
        if approved:
            approve(self.homes["site-0"], self.an)
        self.executor = SiteExecutor(self.an.to_json())
        self.executor.agent = self.agent = LocalCarrier(self.homes, self.an).agent("site-0")
        self.fetched: list[int] = []
        self.number = 0

        def fetch(
            cell: Any, beside: Any, sender: Any, path: Any, limit: Any, stopped: Any = None, moved: Any = None
        ) -> Any:
            self.fetched.append(limit)
            path.write_bytes(b"0" * limit)
            return limit, hashlib.sha256(b"0" * limit).hexdigest()

        monkeypatch.setattr(file_transfer, "fetch", fetch)

    def call(self, size: int, **changes: Any) -> str:
        """What the site answers to a call that announces ``size`` bytes: why there is no reply."""
        self.number += 1
        sha256 = hashlib.sha256(b"0" * size).hexdigest() if size else ""
        call = Call(
            VERSION,
            self.an.run,
            self.number,
            "site-0",
            "",
            size,
            sha256,
            "do",
            self.an.hash,
            0,
            "train",
            0,
            0,
            0,
            0.0,
            "",
        )
        engine = SimpleNamespace(get_cell=lambda: None)
        context = SimpleNamespace(get_engine=lambda: engine, get_job_id=lambda: "job")
        message = {"call": replace(call, **changes).to_json(), "ref": "R", "at": "server.job"}
        said = self.executor.execute("polyclinic", message, context, SimpleNamespace(triggered=False))
        return Answer.from_json(said["answer"]).lost if said["answer"] else said["reason"]

    @property
    def refusals(self) -> list[dict[str, Any]]:
        return [e for e in verify(self.homes["site-0"].journal) if e["event"] in ("no reply", "message refused")]


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SiteExecutor, "log_exception", lambda *_, **__: None)


@pytest.mark.usefixtures("quiet")
def test_nothing_is_fetched_before_an_approval_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    house = House(tmp_path, monkeypatch, approved=False)
    for _ in range(9):
        assert house.call(1000).startswith("waits for a person")
    assert "has no file" in house.call(600_000_000, kind="hello", job="")
    assert "has no file" in house.call(600_000_000, kind="end", job="")
    assert house.fetched == []
    # Each is answered; the journal names the first, second, fourth and eighth of the same.
    assert [e.get("times", 1) for e in house.refusals if "waits for" in e["reason"]] == [1, 2, 4, 8]


@pytest.mark.usefixtures("quiet")
def test_a_file_beyond_the_policy_is_not_fetched_and_a_round_holds_so_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = House(tmp_path, monkeypatch, approved=True)
    assert "limits.megabytes_per_round" in house.call(1_000_001)
    assert house.fetched == []
    house.call(600_000)
    assert "after 0.6 MB in this round" in house.call(400_001)
    house.number -= 2
    house.call(600_000)  # the same again, as after a crash of the server, counts once
    house.number += 1
    house.call(400_000)
    assert house.fetched == [600_000, 600_000, 400_000]
    assert "after 1 MB" in house.call(1)
    again = LocalCarrier(house.homes, house.an).agent("site-0")  # the job process was started anew
    house.executor.agent = again
    assert "after 1 MB" in house.call(1)
    assert "round 9, and the study has 3 rounds" in house.call(1, round=9)
    house.homes["site-0"].policy.write_text("nonsense")
    assert "the policy cannot be read" in house.call(1, round=1)
    assert len(house.fetched) == 3


@pytest.mark.usefixtures("quiet")
def test_a_nearly_full_disk_fetches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    house = House(tmp_path, monkeypatch, approved=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=500 * 2**20 + 999))
    assert "the disk is nearly full" in house.call(1000)
    assert house.fetched == []
    house.call(999)
    assert house.fetched == [999]


@pytest.mark.usefixtures("quiet")
def test_what_was_received_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    house = House(tmp_path, monkeypatch, approved=True)
    assert house.call(1000).startswith("failed")  # zeros are no ask
    house.call(1000, sha256="1" * 64)  # the file is another one than was announced
    assert house.fetched == [1000, 1000]
    left = {path.name for path in house.agent.memory.folder.iterdir()}
    assert not [name for name in left if name == "received" or name.endswith(".ask")], left


def test_a_call_brings_a_file_where_it_may_and_nowhere_else() -> None:
    call = Call(VERSION, "run-1", 1, "site-0", "", 5, "0" * 64, "hello", "0" * 64, 0, "", 0, 0, 0, 0.0, "")
    with pytest.raises(BadMessage, match="has no file"):
        Call.from_json(call.to_json())


def test_calls_come_as_often_as_a_site_bears(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(message_limits, "time", SimpleNamespace(monotonic=lambda: now[0]))
    rate = message_limits.Rate(5, 10.0)
    assert [rate.wait() for _ in range(5)] == [0.0] * 5
    assert rate.wait() == pytest.approx(0.1)
    now[0] += 100.0
    assert [rate.wait() for _ in range(5)] == [0.0] * 5  # no more than the burst is saved up
    assert rate.wait() > 0


# The server -------------------------------------------------------------------------------------------------------------


class Server:
    """The server's carrier, with a network that counts what it is asked to fetch."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, limits: message_limits.Limits) -> None:
        self.carrier = carrier = FlareCarrier.__new__(FlareCarrier)
        carrier.controller = SimpleNamespace(send=lambda *_, **__: None, cancel_task=lambda task: None)
        carrier.fl_ctx = carrier.cell = carrier.abort_signal = None
        carrier.pulse = cast(Heartbeat, SimpleNamespace(moved=None))
        carrier.came, carrier.tasks, carrier.job = Queue(), {}, "job"
        carrier.inbox, carrier.limits = folder, limits
        carrier.fetching = cast(ThreadPoolExecutor, SimpleNamespace(submit=lambda do, *arguments: do(*arguments)))
        self.fetched: list[int] = []

        def fetch(
            cell: Any, beside: Any, sender: Any, path: Any, limit: Any, stopped: Any = None, moved: Any = None
        ) -> Any:
            self.fetched.append(limit)
            path.write_bytes(b"0" * limit)
            return limit, "0" * 64

        monkeypatch.setattr(file_transfer, "fetch", fetch)

    def ask(self, kind: str, size: int = 0, job: str = "train") -> object:
        call = Call(
            VERSION, "run-1", 1, "site-0", "", size, "0" * 64 if size else "", kind, "0" * 64, 0, job, 0, 0, 0, 0.0, ""
        )
        self.carrier.post([call], None)
        return self.carrier.tasks["site-0"][0]

    def answer(self, task: object, size: int) -> None:
        answer = Answer(VERSION, "run-1", 1, "site-0", "", size, "0" * 64 if size else "", "", False, 0.0, "", "", "")
        client = SimpleNamespace(name="site-0")
        result = {"answer": answer.to_json(), "ref": "R", "at": "site-0.job"}
        self.carrier._received(SimpleNamespace(client=client, result=result, task=task), None)

    def refused(self, place: Path) -> str:
        delivery = self.carrier.came.get_nowait()
        with pytest.raises(OSError) as error:
            delivery.take(place, 10**12)
        return str(error.value)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    (tmp_path / "inbox").mkdir()
    return Server(tmp_path / "inbox", monkeypatch, message_limits.Limits(reply_megabytes=100, model=2**20))


@pytest.mark.parametrize("kind", ["hello", "end"])
def test_a_greeting_is_answered_by_no_file(kind: str, server: Server, tmp_path: Path) -> None:
    server.answer(server.ask(kind), 600_000_000)
    assert "exceed the limit of 0 bytes" in server.refused(tmp_path / "x")
    assert server.fetched == []


def test_a_reply_is_bounded_by_what_was_asked(server: Server, tmp_path: Path) -> None:
    most = 8 * 2**20 + 64 * 2**20
    server.answer(server.ask("do", 1000), most + 1)
    assert f"exceed the limit of {most} bytes" in server.refused(tmp_path / "x")
    assert server.fetched == []
    server.answer(server.ask("do", 1000), 12)
    delivery = server.carrier.came.get_nowait()
    assert server.fetched == [12]
    assert len(list(server.carrier.inbox.iterdir())) == 1
    delivery.discard()
    assert list(server.carrier.inbox.iterdir()) == []
    assert (
        server.carrier.limits.reply(
            Call(VERSION, "r", 1, "s", "", 5, "0" * 64, "do", "0" * 64, 0, "predict/test", 0, 0, 0, 0.0, "")
        )
        == 100 * 2**20
    )


def test_an_answer_that_nobody_waits_for_is_not_fetched(server: Server) -> None:
    task = server.ask("do", 1000)
    server.ask("do", 1000)
    server.answer(task, 12)
    assert server.fetched == []
    assert server.carrier.came.empty()


def test_a_server_without_room_fetches_nothing_and_asks_for_nothing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=500 * 2**20 + 11))
    server.answer(server.ask("do", 1000), 12)
    assert "nearly full" in server.refused(tmp_path / "x")
    assert server.fetched == []


def test_a_run_waits_until_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    homes, an = hospital(tmp_path, policy=LITTLE), order(rounds=1)
    for home in homes.values():
        approve(home, an)
    carrier = LocalCarrier(homes, an)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
        with pytest.raises(OSError, match="nearly full"):
            coordinator(tmp_path, an, carrier).run()
    said = json.loads((tmp_path / "server" / an.run / "status.json").read_text())
    assert said["phase"] == "interrupted"
    assert "keep_free_megabytes" in said["why"]
    assert coordinator(tmp_path, an, LocalCarrier(homes, an)).run() == "finished"


def test_settings_of_the_server_are_numbers() -> None:
    with pytest.raises(Exception, match="reply_megabytes must be a number of at least 0"):
        message_limits.Limits.of({"reply_megabytes": "many"}, {})
    roles = {
        "train": {"patients": 5, "examples": 12, "classes": []},
        "test": {"patients": 5, "examples": 7, "classes": []},
    }
    hidden: dict[str, Any] = {"train": {"patients": None, "examples": None, "classes": []}}
    found = message_limits.Limits.of({"max_examples": 10, "port": 1}, {"a": {"roles": roles}, "b": {"roles": hidden}})
    assert found.counts == {"a": 10.0}


def test_a_message_holds_no_large_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="inside the message"):
        file_transfer.fetch(None, {"body": b"0" * (file_transfer.INLINE + 1)}, "s", tmp_path / "x", 10**9)
    assert not (tmp_path / "x").exists()

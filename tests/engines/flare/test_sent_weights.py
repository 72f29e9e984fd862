"""Start weights that the server sends once: to sites without them, after an approval, within the policy's limit.

What FLARE does with blocks is replaced by a loop over the same two classes, so that a line can be cut.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("nvflare", reason="the extra [flare] is not installed")

from nvflare.fuel.f3.streaming.download_service import ProduceRC
from nvflare.fuel.f3.streaming.file_downloader import FileDownloadable
from safetensors.torch import save

from polyclinic.cli import server as commands
from polyclinic.core.audit_log import verify
from polyclinic.engines.flare.client import study_description
from polyclinic.engines.flare.client.executor import SiteExecutor
from polyclinic.engines.flare.client.reviews import Reviews
from polyclinic.engines.flare.client.site_agent import SiteAgent
from polyclinic.engines.flare.protocol import file_transfer
from polyclinic.engines.flare.protocol.messages import VERSION, WAITS_FOR_WEIGHTS, Answer, Call
from polyclinic.engines.flare.protocol.paths import WEIGHTS, ServerFolder, SetupError, SiteFolder
from polyclinic.engines.flare.protocol.registration import SENDINGS
from polyclinic.engines.flare.protocol.rpc import Delivery
from polyclinic.engines.flare.protocol.run_request import InvalidRunRequest, RunRequest
from polyclinic.engines.flare.server import sent_weights, server_setup
from polyclinic.engines.flare.server.job_queue import FAILED, FINISHED, Queue
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.weights import store
from polyclinic.testing import equal
from tests.engines.flare.test_exchange import reference, state_of
from tests.support.local_deployment import LocalCarrier, approve, coordinator, hospital, order
from tests.support.start_weights import convert_here, random_state, weights_of

NET = Network("cnn", (1, 8, 8), 2, (("width", 16), ("depth", 3)))
OPTIONS = {"network_options": dict(NET.options)}
ALLOWED = "[limits]\nmin_patients = 2\nweights_megabytes = 1.0\n"
BLOCK = 10_000


@pytest.fixture(autouse=True)
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The hash of weights in the server's store."""
    monkeypatch.setenv(WEIGHTS, str(tmp_path / "weights"))
    return weights_of(NET).sha256


@pytest.fixture
def converted_here(monkeypatch: pytest.MonkeyPatch) -> None:
    convert_here(monkeypatch)


@contextmanager
def store_of(home: SiteFolder) -> Iterator[None]:
    """Use the store of a site, as its training process does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(WEIGHTS, str(home.weights))
        yield


def request(sha256: str, **how: Any) -> RunRequest:
    """A run request whose server sends the weights."""
    plan = {**OPTIONS, "tuning": {"weights": {"sha256": sha256}, "train": ["head"]}}
    an = order(plan=plan, **{"rounds": 2, "patience": 120.0, **how})
    return replace(an, weights=sent_weights.stated(an.plan))


class Carrier(LocalCarrier):
    """Carries start weights, too, and gives each site its own store."""

    def arrived(self, seconds: float) -> Delivery | None:
        if not self.queue:
            return super().arrived(seconds)
        call, body = self.queue[0]
        agent = self.agent(call.site)
        with store_of(self.homes[call.site]):
            if call.kind != "weights" or (refusal := agent.before(call)) is None and body is None:
                return super().arrived(seconds)
            self.queue.popleft()
            self.calls.append(call)
            if refusal is not None:
                return Delivery(call.site, refusal.to_json(), lambda *_: (0, ""))
            assert body is not None
            agent.memory.weights.write_bytes(body.read_bytes())
            answer, _ = agent.answer(call, agent.memory.weights)
            return Delivery(call.site, answer.to_json(), lambda *_: (0, ""))


def attempt(root: Path, an: RunRequest, homes: dict[str, SiteFolder]) -> tuple[str, Carrier]:
    """One attempt at a run: how it ended, and its carrier."""
    carrier = Carrier(homes, an)
    try:
        return coordinator(root, an, carrier).run(), carrier
    finally:
        carrier.close()


def add_at(home: SiteFolder, sha256: str) -> None:
    """Add the server's weights at a site, as a person does."""
    place = home.weights / sha256
    place.mkdir(parents=True)
    for file in store.find(sha256).path.parent.iterdir():
        (place / file.name).write_bytes(file.read_bytes())


def test_only_the_site_without_them_receives_them_once_and_the_run_has_the_bits_of_one_process(
    tmp_path: Path, weights: str
) -> None:
    homes, an = hospital(tmp_path, policy=ALLOWED), request(weights)
    for name, home in homes.items():
        approve(home, an)
        if name != "site-1":
            add_at(home, weights)
    outcome, carrier = attempt(tmp_path, an, homes)
    assert outcome == FINISHED
    assert equal(state_of(tmp_path, an), reference(an)[0])
    sent = [(call.site, call.size) for call in carrier.calls if call.kind == "weights"]
    assert sent == [("site-1", store.find(weights).size)]
    kinds = [call.kind for call in carrier.calls]
    assert "weights" not in kinds[kinds.index("do") :]
    with store_of(homes["site-1"]):
        (item,) = store.stored()
    assert (item.sha256, item.card.name, item.card.license) == (weights, "given", "MIT")
    events = [entry["event"] for entry in verify(homes["site-1"].journal)]
    assert events.index("start weights received") < events.index("asked")
    journal = [e for e in verify(tmp_path / "server" / an.run / "journal.jsonl") if e["event"] == "start weights sent"]
    assert [(entry["site"], entry["weights"]) for entry in journal] == [("site-1", weights)]


@pytest.mark.parametrize("megabytes", ["", "weights_megabytes = 0.01\n"])
def test_a_policy_without_room_for_them_refuses_the_study_and_nothing_is_sent(
    tmp_path: Path, weights: str, megabytes: str
) -> None:
    homes, an = hospital(tmp_path, policy=f"[limits]\nmin_patients = 2\n{megabytes}"), request(weights)
    for home in homes.values():
        approve(home, an)
    outcome, carrier = attempt(tmp_path, an, homes)
    assert outcome == FAILED
    assert {call.kind for call in carrier.calls} == {"hello"}
    why = json.loads((tmp_path / "server" / an.run / "status.json").read_text())["why"]
    assert f"site-0: refused by the site's policy: the start weights {weights[:12]}... are not here" in why
    assert "limits.weights_megabytes" in why


@pytest.mark.usefixtures("converted_here")
def test_what_the_policy_forbids_is_refused_once_the_weights_are_here(tmp_path: Path, weights: str) -> None:
    """Without them the network cannot be built and the rest of the policy not be checked."""
    policy = ALLOWED + '[require]\ntransforms = [{name = "clip", bound_at_most = 1.0}]\n'
    homes, an = hospital(tmp_path, policy=policy), request(weights)
    for home in homes.values():
        approve(home, an)
    outcome, carrier = attempt(tmp_path, an, homes)
    assert outcome == FAILED
    assert {call.kind for call in carrier.calls} == {"hello", "weights"}
    assert "clip" in json.loads((tmp_path / "server" / an.run / "status.json").read_text())["why"]
    assert Reviews(homes["site-0"].reviews).get(an.run).problems  # type: ignore[union-attr]


def test_a_review_shows_what_the_server_would_send(tmp_path: Path, weights: str) -> None:
    home, an = hospital(tmp_path, count=1)["site-0"], request(weights)
    with store_of(home):
        review = Reviews(home.reviews).offer(an, ())
        text = study_description.describe(review, None).text
    assert f"{weights}: NOT here. The server sends the file once, after an approval" in text
    assert "given, 0.1 MB; as the server states, license" in text


class Line:
    """A site's job process, and FLARE's transfer of blocks to it.

    Attributes:
        served: The offset of each requested block.
        cut: After how many blocks the line is cut; None for never.
    """

    def __init__(self, root: Path, an: RunRequest, monkeypatch: pytest.MonkeyPatch, approved: bool = True) -> None:
        self.an, self.root, self.served = an, root, list[int]()
        self.cut: int | None = None
        self.homes = hospital(root, count=1, policy=ALLOWED)
        self.home = self.homes["site-0"]
        if approved:
            approve(self.home, an)
        self.number = 0
        monkeypatch.setattr(SiteExecutor, "log_exception", lambda *_, **__: None)
        monkeypatch.setattr(file_transfer, "download_object", self._download)
        self.start()

    def start(self) -> None:
        """Start the job process, anew."""
        self.executor = SiteExecutor(self.an.to_json())
        self.executor.agent = self.agent = Carrier(self.homes, self.an).agent("site-0")

    def _download(self, *, consumer: Any, ref_id: str, **how: Any) -> None:
        """As FLARE's loop, in which the consumer returns what is asked for next."""
        of, state = FileDownloadable(str(self.root / "file"), chunk_size=BLOCK), dict[str, Any]()
        while True:
            rc, block, following = of.produce(state, "site-0")
            if rc == ProduceRC.EOF:
                return consumer.download_completed(ref_id)
            self.served.append(state.get("received_bytes", 0))
            if len(self.served) == self.cut:
                return consumer.download_failed(ref_id, "the line was cut")
            try:
                state = consumer.consume(ref_id, following, block)
            except OSError as error:
                return consumer.download_failed(ref_id, str(error))

    def send(self, content: bytes, inline: bool = False, **changes: Any) -> str:
        """Why the site does not take ``content`` as the start weights; empty if it does."""
        (self.root / "file").write_bytes(content)
        self.number, self.served = self.number + 1, []
        stated = self.an.weights or {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        call = Call(
            *(VERSION, self.an.run, self.number, "site-0", "", stated["bytes"], stated["sha256"], "weights"),
            *(self.an.hash, 0, "", 0, 0, 0, 0.0, ""),
        )
        engine = SimpleNamespace(get_cell=lambda: None)
        context = SimpleNamespace(get_engine=lambda: engine, get_job_id=lambda: "job")
        beside = {"body": content} if inline else {"ref": "R", "at": "server.job"}
        message = {"call": replace(call, **changes).to_json(), **beside}
        with store_of(self.home):
            said = self.executor.execute("polyclinic", message, context, SimpleNamespace(triggered=False))
        return Answer.from_json(said["answer"]).lost if said["answer"] else said["reason"]

    @property
    def stored(self) -> list[str]:
        """The hashes of the weights in the site's store."""
        with store_of(self.home):
            return [item.sha256 for item in store.stored()]


def content_of(sha256: str) -> bytes:
    return store.find(sha256).path.read_bytes()


@pytest.mark.usefixtures("converted_here")
def test_a_transfer_that_was_cut_goes_on_where_it_ended(
    tmp_path: Path, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = content_of(weights)
    line = Line(tmp_path, request(weights), monkeypatch)
    line.cut = 4
    assert "the line was cut" in line.send(content)
    assert line.agent.memory.weights.stat().st_size == 3 * BLOCK
    line.start()  # also after the job process has died
    line.cut = None
    assert line.send(content) == ""
    assert line.served == [0, *range(3 * BLOCK, len(content), BLOCK)]  # the first block again, to compare
    assert line.stored == [weights]
    assert not line.agent.memory.weights.exists()


@pytest.mark.usefixtures("converted_here")
def test_a_part_of_another_file_is_not_continued(tmp_path: Path, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = content_of(weights)
    line = Line(tmp_path, request(weights), monkeypatch)
    line.agent.memory.weights.write_bytes(b"0" * 3 * BLOCK)
    assert line.send(content) == ""
    assert line.served == list(range(0, len(content), BLOCK))
    line = Line(tmp_path / "longer", request(weights), monkeypatch)
    line.agent.memory.weights.write_bytes(content + b"0")
    assert line.send(content) == ""


@pytest.mark.usefixtures("converted_here")
def test_nothing_is_fetched_that_nobody_approved_or_the_study_does_not_state(
    tmp_path: Path, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, an = content_of(weights), request(weights)
    line = Line(tmp_path / "a", an, monkeypatch, approved=False)
    assert line.send(content).startswith("waits for a person")
    assert line.served == []
    line = Line(tmp_path / "b", an, monkeypatch)
    assert "not the start weights that the study states" in line.send(content, sha256="0" * 64)
    assert "not the start weights that the study states" in line.send(content, size=len(content) + 1)
    line.home.policy.write_text("[limits]\nmin_patients = 2\nweights_megabytes = 0.05\n")
    assert "the policy allows 0.05 (limits.weights_megabytes)" in line.send(content)
    line.home.policy.write_text("[limits]\nmin_patients = 2\n")
    assert "the policy allows 0 (limits.weights_megabytes)" in line.send(content)
    without = Line(tmp_path / "c", replace(an, weights={}), monkeypatch)
    assert "not the start weights that the study states" in without.send(content)
    assert line.served == without.served == []
    line.home.policy.write_text(ALLOWED)
    assert line.send(content) == ""
    assert "the start weights are here already" in line.send(content)
    assert line.served == []


def test_a_server_that_never_stops_sending_is_cut_off(
    tmp_path: Path, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = content_of(weights)
    line = Line(tmp_path, request(weights), monkeypatch)
    assert "more than" in line.send(content + b"0" * 10**6)
    assert line.agent.memory.weights.stat().st_size <= len(content)
    assert line.stored == []


def test_a_file_with_another_content_is_discarded_and_the_third_is_the_last(
    tmp_path: Path, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = content_of(weights)
    line = Line(tmp_path, request(weights), monkeypatch)
    for _ in range(3):
        assert "the file is not the one that its message names" in line.send(content[:-1] + b"!")
        assert not line.agent.memory.weights.exists()
        line.start()
    assert "3 files came as start weights that were not those of the study" in line.send(content)
    assert line.served == []
    assert line.stored == []


def hostile_files() -> dict[str, bytes]:
    """Files that are what the request states, and no start weights."""
    state = random_state(NET)
    first = next(iter(state))
    return {
        "no safetensors": b"0" * 3 * BLOCK,
        "a pickle": b"\x80\x04cos\nsystem\n(S'touch polyclinic-canary'\ntR." + b"0" * BLOCK,
        "not finite": save({**state, first: torch.full_like(state[first], float("nan"))}),
        "another precision": save({name: leaf.double() for name, leaf in state.items()}),
    }


@pytest.mark.parametrize("kind", hostile_files())
def test_a_file_that_is_what_was_approved_and_no_weights_is_not_stored(
    kind: str, tmp_path: Path, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind != "a pickle":
        convert_here(monkeypatch)
    content = hostile_files()[kind]
    sha256, an = hashlib.sha256(content).hexdigest(), request(weights)
    stated = {**an.weights, "sha256": sha256, "bytes": len(content)}
    plan = {**an.plan, "tuning": {**an.plan["tuning"], "weights": {"sha256": sha256}}}
    line = Line(tmp_path, replace(an, plan=plan, weights=stated), monkeypatch)
    assert "the file that came is not the start weights of the study" in line.send(content)
    assert line.stored == []
    assert not Path("polyclinic-canary").exists()
    assert line.agent.memory.wrong_weights == 1


@pytest.mark.usefixtures("converted_here")
def test_other_weights_of_the_same_name_stay(tmp_path: Path, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = content_of(weights)
    line = Line(tmp_path, request(weights), monkeypatch)
    with store_of(line.home):
        own = weights_of(NET, "given", seed=6)
    assert line.send(content, inline=len(content) <= file_transfer.INLINE) == ""
    with store_of(line.home):
        names = {item.sha256: item.card.name for item in store.stored()}
    assert names == {own.sha256: "given", weights: f"given-{weights[:12]}"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "../../keys/site"),
        ("name", "/etc/passwd"),
        ("name", ""),
        ("name", 3),
        ("sha256", "../" + "0" * 61),
        ("sha256", "A" * 64),
        ("bytes", 0),
        ("bytes", -1),
        ("bytes", 2**60),
        ("bytes", True),
        ("license", ""),
        ("license", "MIT\x1b[2J"),
        ("source", "x" * 101),
        ("more", 1),
    ],
)
def test_a_statement_that_is_none_is_refused(field: str, value: object, weights: str) -> None:
    table = json.loads(request(weights).to_json())
    table["weights"][field] = value
    with pytest.raises(InvalidRunRequest, match="the field 'weights'"):
        RunRequest.from_json(json.dumps(table))


@pytest.mark.usefixtures("converted_here", "looks")
def test_a_site_that_waits_without_end_receives_them_a_few_times(
    tmp_path: Path, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    homes, an = hospital(tmp_path, policy=ALLOWED), request(weights, patience=15.0)
    for home in homes.values():
        approve(home, an)
    monkeypatch.setattr(SiteAgent, "_take_weights", lambda *_: None)
    outcome, carrier = attempt(tmp_path, an, homes)
    assert outcome != FINISHED
    sites = [call.site for call in carrier.calls if call.kind == "weights"]
    assert {site: sites.count(site) for site in homes} == dict.fromkeys(homes, SENDINGS)
    assert WAITS_FOR_WEIGHTS in json.loads((tmp_path / "server" / an.run / "status.json").read_text())["why"]


def test_the_server_states_what_it_sends_and_keeps_what_its_license_forbids(tmp_path: Path, weights: str) -> None:
    item, plan = store.find(weights), request(weights).plan
    assert sent_weights.stated(plan)["bytes"] == item.size == os.stat(item.path).st_size
    with pytest.raises(SetupError, match="names no start weights"):
        sent_weights.stated(order().plan)
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(item.path.read_bytes())
    store.add(copy, replace(item.card, license="CC-BY-NC-ND-4.0", redistribute=False))
    with pytest.raises(SetupError, match=r"given \(CC-BY-NC-ND-4.0\) forbids to pass them on"):
        sent_weights.stated(plan)


def test_a_run_and_a_study_are_queued_with_the_weights_only_if_asked(
    tmp_path: Path, weights: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = ServerFolder(tmp_path / "server")
    home.path.mkdir()
    monkeypatch.setattr(server_setup, "settings", lambda _: {"answer_within": 60})
    entry = {"revoked": "", "secure": "00" * 32}
    monkeypatch.setattr(server_setup, "sites", lambda _: {"site-0": entry, "site-1": entry})
    an = request(weights, sites=("site-0", "site-1"))
    table = {key: value for key, value in json.loads(an.to_json()).items() if key not in ("weights", "run")}
    file = tmp_path / "run.json"
    file.write_text(json.dumps(table))
    commands.run(file, name="with", send_weights=True, home=home.path)
    commands.run(file, name="without", home=home.path)
    study = tmp_path / "study.toml"
    study.write_text(
        'name = "tuned"\nrounds = 2\n[data]\nkind = "npz"\npath = "x.npz"\nsites = "site"\n[task]\n'
        'options = { width = 16, depth = 3 }\nweights = "given"\ntrain = ["head"]\n[[methods]]\nname = "fedavg"\n'
    )
    commands.run(study, inputs=(1, 8, 8), outputs=2, send_weights=True, home=home.path)
    sent = {run: entry.what.weights for run, entry in Queue(home).all().items()}
    assert sent.pop("without") == {}
    assert len(sent) == 2
    assert all(stated == an.weights for stated in sent.values())

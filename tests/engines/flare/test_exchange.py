"""The exchange between a server and sites, without FLARE: bits, crashes, replays, and precedence of decisions."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from polyclinic.core import serialization as states
from polyclinic.core.aggregates import PerSite, Reply, WeightedMean
from polyclinic.core.audit_log import verify
from polyclinic.core.method import Request
from polyclinic.core.rounds import train, train_async, undiscounted
from polyclinic.core.site import Site
from polyclinic.engines.flare.client.reviews import REFUSED, Reviews
from polyclinic.engines.flare.protocol import tensor_file
from polyclinic.engines.flare.protocol.messages import VERSION, Answer, Call
from polyclinic.engines.local.in_process import InProcess
from polyclinic.testing import equal
from tests.conftest import little_sites
from tests.support.local_deployment import LocalCarrier, approve, coordinator, hospital, order, signed_again

EVERYTHING = """
[allow]
gather = ["*"]
stats = ["WeightedMean", "ElementwiseMean"]
[limits]
min_patients = 2
"""


def reference(an: Any, sites: Any = None) -> Any:
    """The state and the sites' memory after the same run in this process."""
    plan = an.build_plan()
    method = plan.build_method()
    all_sites = {n: Site(n, s.data, "cpu", plan.seed) for n, s in (sites or little_sites()).items()}
    engine, state = InProcess(method, all_sites, seed=plan.seed), method.init(plan.build_task().first(plan.seed))
    if an.mode == "buffered":
        steps = train_async(
            method,
            engine,
            state,
            updates=plan.rounds,
            buffer=an.buffer,
            passes=an.passes,
            discount=method.capabilities.discount or undiscounted,
        )
    else:
        steps = train(method, engine, state, rounds=plan.rounds, min_replies=an.min_replies)
    for step in steps:
        state = step.state
    return state, engine.memory


def run(root: Path, an: Any, homes: Any, **how: Any) -> Any:
    """One attempt: how it ended, and its carrier."""
    carrier = LocalCarrier(homes, an, **how)
    try:
        return coordinator(root, an, carrier).run(), carrier
    finally:
        carrier.close()


def state_of(root: Path, an: Any) -> Any:
    return states.load(root / "server" / an.run / "checkpoint.safetensors").state


def events(path: Path) -> list[str]:
    return [entry["event"] for entry in verify(path)]


METHODS = ["fedavg", "scaffold", "fedbn", "fedadam", "mime", "krum", "fedper", "moon"]
CODECS = [{"name": "int8"}, {"name": "zstd"}]


@pytest.mark.parametrize(
    ("method", "plan"),
    [
        *(
            pytest.param(m, {}, marks=() if m in ("scaffold", "mime", "fedbn", "krum") else pytest.mark.slow)
            for m in METHODS
        ),
        ("scaffold", {"uplink": CODECS, "downlink": CODECS}),
    ],
    ids=[*METHODS, "small messages both ways"],
)
def test_same_bits_as_in_process(method: str, plan: dict[str, Any], tmp_path: Path) -> None:
    homes, an = hospital(tmp_path, policy=EVERYTHING), order(method, score_every=2, plan=plan)
    for home in homes.values():
        approve(home, an)
    outcome, carrier = run(tmp_path, an, homes)
    assert outcome == "finished"
    expected, memory = reference(an)
    assert equal(expected, state_of(tmp_path, an))
    for name, home in homes.items():
        folder = home.memory(an.run)
        last = [link for link in json.loads((folder / "chain.json").read_text())["links"]][-1]
        kept = tensor_file.read(folder / last["memory"]) if last["memory"] else {}
        assert equal(memory[name], kept)
        assert (events(home.journal).count("answered")) == len(
            [c for c in carrier.calls if c.site == name and c.kind == "do"]
        )


def test_private_noise_passes_and_differs_every_time(tmp_path: Path) -> None:
    send = [{"name": "clip", "bound": 1.0}, {"name": "gaussian", "multiplier": 1.0}, {"name": "top-k", "fraction": 0.5}]
    homes = hospital(tmp_path, policy=EVERYTHING)
    found = []
    for name in ("run-1", "run-2"):
        an = order(
            "fedavg",
            run=name,
            plan={"options": {"uniform": True}, "uplink": send, "network_options": {"width": 8, "norm": "group"}},
        )
        for home in homes.values():
            approve(home, an)
        assert run(tmp_path, an, homes)[0] == "finished"
        found.append(state_of(tmp_path, an))
    assert not equal(found[0], found[1])  # noise is never repeated


def test_buffered_mode_gives_the_same_bits(tmp_path: Path) -> None:
    homes, an = hospital(tmp_path), order("fedbuff", mode="buffered", buffer=2, rounds=4)
    for home in homes.values():
        approve(home, an)
    assert run(tmp_path, an, homes)[0] == "finished"
    assert equal(reference(an)[0], state_of(tmp_path, an))


@pytest.mark.parametrize(
    ("method", "at"),
    [
        ("scaffold", 3),
        ("mime", 5),
        ("scaffold", 8),
        ("mime", 11),
        ("scaffold", 13),
        *(
            pytest.param(method, at, marks=pytest.mark.slow)
            for method, at in [("mime", 3), ("scaffold", 5), ("mime", 8), ("scaffold", 11), ("mime", 13)]
        ),
    ],
)
def test_a_server_that_crashes_at_any_message_goes_on_to_the_bit(method: str, at: int, tmp_path: Path) -> None:
    homes, an = hospital(tmp_path), order(method, score_every=1)
    for home in homes.values():
        approve(home, an)
    seen = []

    def crash(call: Call) -> bool:
        seen.append(call)
        return len(seen) == at

    assert run(tmp_path, an, homes, crash=crash)[0] == "interrupted"
    assert run(tmp_path, an, homes)[0] == "finished"
    assert equal(reference(an)[0], state_of(tmp_path, an))
    assert (
        "resumed" in events(tmp_path / "server" / an.run / "journal.jsonl") or at <= 9
    )  # the first checkpoint comes after the first round's scores


def test_a_message_that_comes_twice_is_answered_once(tmp_path: Path) -> None:
    """After a crash the server asks again, and no site trains, or spends privacy, a second time."""
    homes, an = hospital(tmp_path), order("scaffold")
    for home in homes.values():
        approve(home, an)
    calls = []
    run(tmp_path, an, homes, crash=lambda call: calls.append(call) or (call.kind == "do" and len(calls) == 6))  # type: ignore[func-returns-value]
    run(tmp_path, an, homes)
    twice = [home for home in homes.values() if "asked again, answered as before" in events(home.journal)]
    assert 0 < len(twice) < 3
    for home in homes.values():
        assert events(home.journal).count("asked") == 3  # rounds


@pytest.mark.usefixtures("looks")
def test_a_site_away_for_two_rounds_returns_with_its_memory(tmp_path: Path) -> None:
    homes, an = hospital(tmp_path), order("scaffold", rounds=5, deadline=100.0)
    for home in homes.values():
        approve(home, an)
    outcome, carrier = run(
        tmp_path, an, homes, lose=lambda call: call.site == "site-1" and call.round in (1, 2) and call.kind == "do"
    )
    assert outcome == "finished"
    mine = [call for call in carrier.calls if call.site == "site-1" and call.kind == "do"]
    assert [call.round for call in mine] == [0, 3, 4]
    assert mine[1].after == mine[0].number  # it continues from its state after round 0
    lost = [e for e in verify(tmp_path / "server" / an.run / "journal.jsonl") if e["event"] == "lost"]
    assert [(e["site"], e["round"]) for e in lost] == [("site-1", 1), ("site-1", 2)]


@pytest.mark.usefixtures("looks")
def test_a_site_that_never_answers_for_scores_holds_nobody_up(tmp_path: Path) -> None:
    """It trains, and is silent when it is asked to score: after the deadline the others' scores count, and it
    is named.
    """
    homes = hospital(tmp_path, policy=EVERYTHING)
    an = order("scaffold", rounds=2, deadline=100.0, score_every=2, test="score/test")
    for home in homes.values():
        approve(home, an)
    outcome, _ = run(tmp_path, an, homes, lose=lambda call: call.site == "site-1" and call.job.startswith("score"))
    assert outcome == "finished"
    assert equal(reference(an)[0], state_of(tmp_path, an))
    folder = tmp_path / "server" / an.run
    facts = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    for kind in ("scores", "test"):
        assert [fact["site"] for fact in facts if fact["kind"] == kind] == ["site-0", "site-2"]
    lost = [e for e in verify(folder / "journal.jsonl") if e["event"] == "lost"]
    assert {(e["site"], e["reason"]) for e in lost} == {("site-1", "no answer within 100 s")}
    assert {e["job"] for e in lost} == {"score/val", "score/test"}


@pytest.mark.usefixtures("looks")
@pytest.mark.parametrize("away", ["site-0", "site-1", "site-2"])
def test_a_site_that_is_away_makes_no_round_look_better(away: str, tmp_path: Path) -> None:
    """The best round is found with a site's last score: of two rounds without it, it moves neither."""
    homes = hospital(tmp_path, policy=EVERYTHING)
    an = order(
        "fedavg",
        rounds=4,
        deadline=100.0,
        score_every=1,
        best={"metric": "loss", "higher": False},
        plan={"training": {"batch_size": 8, "lr": 1e-4}, "network_options": {"width": 4, "norm": "group"}},
    )
    for home in homes.values():
        approve(home, an)

    def lose(call: Call) -> bool:
        return call.site == away and call.job.startswith("score") and call.round >= 3

    assert run(tmp_path, an, homes, lose=lose)[0] == "finished"
    folder = tmp_path / "server" / an.run
    facts = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    said, means = dict[str, float](), dict[int, float]()
    for fact in [fact for fact in facts if fact["kind"] == "scores"]:
        said[fact["site"]] = fact["metrics"]["loss"]
        means[fact["round"]] = sum(said.values()) / len(said)
    here = [fact for fact in facts if fact["kind"] == "scores" and fact["site"] == away]
    assert len(here) < 4
    assert states.load(folder / "checkpoint.safetensors").best == min(means, key=lambda r: means[r])


def test_what_the_server_never_wrote_is_undone_at_the_site(tmp_path: Path) -> None:
    """The server's disk is one round behind the sites: their later memory is rolled back."""
    homes, an = hospital(tmp_path), order("scaffold")
    for home in homes.values():
        approve(home, an)
    kept = tmp_path / "kept"

    def crash(call: Call) -> bool:
        folder = tmp_path / "server" / an.run
        if call.kind == "do" and call.round == 1 and not kept.exists():
            shutil.copytree(folder, kept)
        return call.kind == "do" and call.round == 2

    run(tmp_path, an, homes, crash=crash)
    changed = replace(an)  # the same order; only the server's disk is older
    shutil.rmtree(tmp_path / "server" / an.run)
    shutil.copytree(kept, tmp_path / "server" / an.run)
    outcome, _ = run(tmp_path, changed, homes)
    assert outcome == "finished"
    assert equal(reference(an)[0], state_of(tmp_path, an))


def test_a_server_restored_from_an_old_backup_is_refused(tmp_path: Path) -> None:
    homes, an = hospital(tmp_path), order("scaffold", rounds=4)
    for home in homes.values():
        approve(home, an)
    kept = tmp_path / "kept"

    def backup(call: Call) -> bool:
        if call.kind == "do" and call.round == 1 and not kept.exists():
            shutil.copytree(tmp_path / "server" / an.run, kept)
        return False

    run(tmp_path, an, homes, crash=backup)
    shutil.rmtree(tmp_path / "server" / an.run)
    shutil.copytree(kept, tmp_path / "server" / an.run)
    outcome, _ = run(tmp_path, an, homes)
    assert outcome == "failed"
    why = json.loads((tmp_path / "server" / an.run / "status.json").read_text())["why"]
    assert "restored from an older copy" in why


def test_a_site_that_lost_its_disk_begins_anew_and_the_journal_says_so(tmp_path: Path) -> None:
    homes, an = hospital(tmp_path), order("scaffold", rounds=4)
    for home in homes.values():
        approve(home, an)

    carrier = LocalCarrier(homes, an)

    def lose_disk(call: Call) -> bool:
        if call.kind == "do" and call.round == 2 and call.site == "site-1" and call.after:
            carrier.restart("site-1")
            shutil.rmtree(homes["site-1"].memory(an.run))
        return False

    carrier.crash = lose_disk
    assert coordinator(tmp_path, an, carrier).run() == "finished"
    carrier.close()
    said = [e for e in verify(tmp_path / "server" / an.run / "journal.jsonl") if e["event"] == "site begins anew"]
    assert [e["site"] for e in said] == ["site-1"]


# A hostile server -----------------------------------------------------------------------------------------------------


class Hostile:
    """A server that asks one site whatever it likes."""

    def __init__(self, root: Path, policy: str, an: Any = None, approved: bool = True) -> None:
        self.an = an or order()
        self.homes = hospital(root, policy=policy)
        if approved:
            for home in self.homes.values():
                approve(home, self.an)
        self.carrier = LocalCarrier(self.homes, self.an)
        self.agent = self.carrier.agent("site-0")
        self.number = 0

    def call(self, request: Request | None = None, **changes: Any) -> Answer:
        self.number += 1
        body, size, sha256 = None, 0, ""
        if request is not None:
            body = self.agent.memory.folder / f"{self.number}.ask"
            size, sha256 = tensor_file.write(body, request)
        round, job = (request.round, request.job) if request else (0, "")
        call = Call(
            VERSION,
            self.an.run,
            self.number,
            "site-0",
            "",
            size,
            sha256,
            "do" if request else "hello",
            self.an.hash,
            round,
            job,
            0,
            0,
            0,
            0.0,
            "",
        )
        return self.agent.answer(replace(call, **changes), body)[0]

    def ask(self, **changes: Any) -> Request:
        plan = self.an.build_plan()
        method = plan.build_method()
        request = method.request(method.init(plan.build_task().first(0)))
        assert request is not None
        return replace(request, **changes)


LITTLE = "[limits]\nmin_patients = 2\n"


def test_nothing_runs_that_no_person_approved(tmp_path: Path) -> None:
    server = Hostile(tmp_path, LITTLE, approved=False)
    assert "waits for a person" in server.call().lost
    assert "waits for a person" in server.call(server.ask()).lost
    assert "answered" not in events(server.homes["site-0"].journal)


def test_an_approval_holds_for_this_order_and_no_other(tmp_path: Path) -> None:
    server = Hostile(tmp_path, LITTLE)
    assert server.call(server.ask()).lost == ""
    assert "another study" in server.call(server.ask(), order="0" * 64).lost
    more = order(plan={"training": {"epochs": 50}})
    agent = LocalCarrier(server.homes, more).agent("site-0")  # the job brought another run request under the same name
    server.agent, server.an = agent, more
    assert "waits for a person" in server.call(server.ask()).lost


def test_a_refusal_counts_from_the_next_message_on(tmp_path: Path) -> None:
    server = Hostile(tmp_path, LITTLE)
    assert server.call(server.ask()).lost == ""
    Reviews(server.homes["site-0"].reviews).decide("run-1", REFUSED, "a person", "the committee met")
    assert "the committee met" in server.call(server.ask()).lost


def test_a_policy_counts_from_the_next_message_on(tmp_path: Path) -> None:
    server = Hostile(tmp_path, LITTLE)
    assert server.call(server.ask()).lost == ""
    server.homes["site-0"].policy.write_text(LITTLE + "learning_rate = 0.001\n")
    assert "learning_rate" in server.call(server.ask()).lost
    server.homes["site-0"].policy.write_text("[limits]\nmin_patient = 2\n")
    assert server.call(server.ask()).lost.startswith("failed: BadPolicy")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"job": "predict/test"}, "is not in the schedule"),
        ({"job": "score/val", "round": 99}, "in round 99 is not in the schedule"),
        ({"trees": {"params": {"evil.weight": torch.zeros(3)}}}, "does not have"),
        ({"trees": {"params": {"head.weight": torch.zeros(200, 8)}}}, "shape"),
        ({"secure": True}, ""),
    ],
)
def test_what_the_server_asks_is_checked_against_what_was_approved(changes: Any, why: str, tmp_path: Path) -> None:
    server = Hostile(tmp_path, LITTLE)
    answer = server.call(server.ask(**changes))
    assert why in answer.lost
    assert (answer.lost == "") == (answer.size > 0)


def test_a_model_of_nan_is_refused(tmp_path: Path) -> None:
    server = Hostile(tmp_path, LITTLE)
    request = server.ask()
    bad = {
        name: leaf * float("nan") if leaf.is_floating_point() else leaf
        for name, leaf in request.trees["params"].items()
    }
    assert "NaN" in server.call(replace(request, trees={"params": bad})).lost


def test_features_apart_by_site_leave_only_where_the_policy_names_them(tmp_path: Path) -> None:
    server = Hostile(tmp_path, LITTLE, order("krum"))
    answer = server.call(server.ask())
    assert "allow.gather" in answer.lost
    assert answer.size == 0


def test_a_message_for_another_run_site_or_time_is_refused(tmp_path: Path) -> None:
    server = Hostile(tmp_path, LITTLE)
    request = server.ask()
    assert "this is site-0" in server.call(request, site="site-1").lost
    assert "this is site-0 in run-1" in server.call(request, run="run-2").lost
    first = server.call(request)
    assert first.lost == ""
    assert server.call(replace(request, round=1), after=first.number, confirmed=first.number).lost == ""
    request = replace(request, round=2)
    assert "replay" in server.call(request, number=1).lost
    assert "replay" in server.call(request).lost  # begins before what was confirmed
    assert server.call(
        request, after=server.number, confirmed=first.number
    ).forgot  # nothing was kept of a refused message


def test_a_file_that_says_another_ask_than_its_message_is_refused(tmp_path: Path) -> None:
    server = Hostile(tmp_path, LITTLE)
    assert server.call(server.ask(), round=1).lost.startswith("failed: Corrupt")
    request = server.ask()
    assert server.call(request, round=2).lost.startswith("failed: Corrupt")


def test_what_an_exception_says_stays_at_the_site(tmp_path: Path) -> None:
    server = Hostile(tmp_path, LITTLE)
    (server.homes["site-0"].path / "data" / "train.npz").write_bytes(b"Jane Doe, 1950-01-01")
    lost = server.call(server.ask()).lost
    assert lost.startswith("failed: ")
    assert "Jane" not in lost
    assert "train.npz" not in lost


# A hostile site -------------------------------------------------------------------------------------------------------


class Liar(LocalCarrier):
    """A carrier whose site-1 answers whatever ``twist`` makes of its answer and its file."""

    def __init__(self, *arguments: Any, twist: Any, **how: Any) -> None:
        super().__init__(*arguments, **how)
        self.twist = twist

    def arrived(self, seconds: Any) -> Any:
        delivery = super().arrived(seconds)
        if (
            delivery is None
            or delivery.site != "site-1"
            or "reply" not in str(delivery.text)
            and '"size":0' in str(delivery.text)
        ):
            return delivery
        return signed_again(self.twist(delivery), self.homes["site-1"])


def _file(value: Any) -> Any:
    def take(path: Path, limit: int) -> Any:
        return tensor_file.write(path, value)

    return take


def _with(delivery: Any, **fields: Any) -> Any:
    answer = json.loads(delivery.text)
    return delivery._replace(text=json.dumps({**answer, **fields}))


def _sized(delivery: Any, value: Any) -> Any:
    import hashlib

    data = states.encode(value)
    sized = _with(delivery, size=len(data), sha256=hashlib.sha256(data).hexdigest())
    return sized._replace(take=lambda path, limit: (path.write_bytes(data), hashlib.sha256(data).hexdigest()))


@pytest.mark.parametrize(
    ("twist", "why"),
    [
        (lambda d: d._replace(text="{"), "not JSON"),
        (lambda d: d._replace(text=None, reason="its job process failed"), "its job process failed"),
        (lambda d: _with(d, version=VERSION + 1), "install the same version"),
        (lambda d: _with(d, site="site-2"), "names site-2"),
        (lambda d: _with(d, size=2**40), "exceed the limit"),
        (lambda d: _with(d, sha256="0" * 64), "not the one that its message names"),
        (lambda d: _with(d, seconds=float("nan")), "out of range"),
        (lambda d: d._replace(take=lambda path, limit: (_ for _ in ()).throw(OSError("cut"))), "cut"),
        (lambda d: _sized(d, {"a": torch.zeros(2)}), "a reply was expected"),
        (
            lambda d: _sized(
                d, Reply({"update": WeightedMean({"head.weight": torch.full((2, 8), float("nan"))}, 1.0)})
            ),
            "NaN",
        ),
        (lambda d: _sized(d, Reply({"update": WeightedMean({"head.weight": torch.zeros(3, 8)}, 1.0)})), ""),
        (lambda d: _sized(d, Reply({"update": PerSite({"site-2": {"x": torch.zeros(2)}})})), "contains values of"),
        (lambda d: _sized(d, Reply({"update": WeightedMean({"x": torch.zeros(2)}, -1.0)})), "weight"),
        (lambda d: _sized(d, Reply({"update": "text"})), "is not an aggregatable value"),  # type: ignore[dict-item]
    ],
)
def test_one_bad_site_is_lost_by_name_and_changes_no_bit(twist: Any, why: str, tmp_path: Path) -> None:
    homes, an = hospital(tmp_path), order(rounds=1, min_replies=2)
    for home in homes.values():
        approve(home, an)
    carrier = Liar(homes, an, twist=lambda d: twist(d) if json.loads(d.text)["size"] else d)
    outcome = coordinator(tmp_path, an, carrier).run()
    carrier.close()
    assert outcome == "finished"
    records = [json.loads(line) for line in (tmp_path / "server" / an.run / "records.jsonl").read_text().splitlines()]
    lost = next(r for r in records if r["kind"] == "round")["lost"]
    assert list(lost) == ["site-1"]
    assert why in lost["site-1"]
    two = {name: site for name, site in little_sites().items() if name != "site-1"}
    assert equal(reference(an, two)[0], state_of(tmp_path, an))

"""A site answers the schedule of the study that was approved, whatever the server asks; an honest server never
notices.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from polyclinic.core.audit_log import verify
from polyclinic.core.method import Request
from polyclinic.engines.flare.client.run_memory import RunMemory
from polyclinic.engines.flare.protocol import tensor_file
from polyclinic.engines.flare.protocol.messages import VERSION, Call
from polyclinic.engines.policy import site_policy as policies
from polyclinic.methods.catalog import METHODS
from polyclinic.testing import equal
from tests.engines.flare.test_exchange import EVERYTHING, events, reference, run, state_of
from tests.support.known import known
from tests.support.local_deployment import LocalCarrier, approve, coordinator, hospital, order

POLICY = policies.DEFAULT.replace("min_patients = 10", "min_patients = 2")
LAX = POLICY.replace('never = ["predict/*", "show/*"]', "never = []").replace('["score", "describe"]', '["*"]')
PLAIN = {"network_options": {"width": 8, "norm": "group"}}
SCORED: dict[str, Any] = {"score_every": 1, "test": "score/test", "best": {"metric": "auc", "higher": True}}


class Server:
    """A server that says what it likes to one site."""

    def __init__(self, root: Path, policy: str = POLICY, **how: Any) -> None:
        self.homes = hospital(root, policy=policy)
        self.an = order(how.pop("method", "fedavg"), plan={**PLAIN, **how.pop("plan", {})}, **how)
        for home in self.homes.values():
            approve(home, self.an)
        self.home, self.number, self.after = self.homes["site-0"], 0, 0
        self.start()

    def start(self) -> None:
        """The site's machine starts, perhaps again."""
        self.carrier = LocalCarrier(self.homes, self.an)
        self.agent = self.carrier.agent("site-0")

    def params(self, by: float = 0.0) -> dict[str, torch.Tensor]:
        first = self.an.build_plan().build_task().first(3)
        return {name: leaf + by if leaf.is_floating_point() else leaf for name, leaf in first.items()}

    def ask(self, round: int, job: str = "train", by: float = 0.0) -> Request:
        method = self.an.build_plan().build_method()
        return replace(known(method.request(method.init(self.params(by)))), round=round, job=job)

    def call(self, request: Request, **changes: Any) -> Any:
        """The answer, and the file that left; messages go on from the last one that was answered."""
        self.number += 1
        folder = self.agent.memory.folder
        body = folder / f"{self.number}.ask"
        size, sha256 = tensor_file.write(body, request)
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
            request.round,
            request.job,
            self.after,
            0,
            0,
            0.0,
            "",
        )
        answer, file = self.agent.answer(replace(call, **changes), body)
        if file is not None:
            self.after = answer.number
        return answer, file

    def said(self, round: int, job: str = "train", by: float = 0.0, **changes: Any) -> str:
        """Return why there is no reply; empty if there is one."""
        return self.call(self.ask(round, job, by), **changes)[0].lost


def refused(homes: Any) -> list[str]:
    return [
        e["reason"]
        for home in homes.values()
        for e in verify(home.journal)
        if "schedule" in str(e.get("reason")) or "a different model" in str(e.get("reason"))
    ]


# A hostile server ---------------------------------------------------------------------------------------------------


def test_three_approved_rounds_are_three_answers(tmp_path: Path) -> None:
    server = Server(tmp_path)
    rounds = (0, 0, 1, 1, 0, 2, 2, 3, 4, 2**20)
    answers = [(round, by) for round in rounds for by in range(3) if server.said(round, by=by / 100) == ""]
    assert set(answers) == {(0, 0), (1, 0), (2, 0)}
    assert events(server.home.journal).count("asked") == events(server.home.journal).count("answered") == 3


@pytest.mark.parametrize(
    "job",
    [
        "predict/train",
        "predict/val",
        "predict/test",
        "score/train",
        "score/val",
        "explain/val",
        "explain/train",
        "describe",
        "train ",
        "anything at all",
    ],
)
def test_nothing_outside_of_the_schedule_is_answered_whatever_the_policy_says(job: str, tmp_path: Path) -> None:
    server = Server(tmp_path, LAX, test="score/test")
    assert "is not in the schedule. The schedule: 'train' in rounds 0 to 2; 'score/test' once" in server.said(1, job)
    assert events(server.home.journal).count("asked") == 0


def test_a_gradient_is_not_had_under_the_name_of_a_free_job(tmp_path: Path) -> None:
    """An approved private FedSGD refused its own job, and answered ``describe`` with the exact gradient."""
    budget = POLICY + '\n[privacy]\nepsilon = 3.0\ndelta = 1e-3\nunit = "record"\n'
    private = {"training": {"batch_size": 8, "lr": 0.05, "private": {"noise": 50.0, "bound": 1.0, "unit": "record"}}}
    server = Server(tmp_path, budget, method="fedsgd", plan=private)
    assert "is not in the schedule" in server.said(0, "describe")
    assert "does not cover what fedsgd sends" in server.said(0)


def test_scores_are_counted_and_of_validation_data(tmp_path: Path) -> None:
    server = Server(tmp_path, score_every=2, rounds=4)
    jobs = ("score/val", "score/train", "score/test")
    asked = [(round, job, by) for round in (0, 2, 3, 4, 5, 1) for job in jobs for by in range(2)]
    assert [one for one in asked if server.said(*one) == ""] == [(2, "score/val", 0), (3, "score/val", 0)]
    # after round 3, as if the method had ended there: once, and it ends the training
    assert "comes after the final scoring, in round 3" in server.said(3)


def test_a_second_content_is_refused_after_a_crash_a_rollback_and_a_lost_memory(tmp_path: Path) -> None:
    server = Server(tmp_path, method="scaffold")

    assert server.call(server.ask(0, by=0.0))[0].lost == ""
    assert server.call(server.ask(1, by=0.0))[0].lost == ""
    server.after = 0  # the server says that both were lost
    assert "other content before" in server.call(server.ask(1, by=0.5))[0].lost
    assert "comes too late" in server.call(server.ask(0, by=0.5))[0].lost
    server.carrier.restart("site-0")
    server.start()
    assert "other content before" in server.call(server.ask(1, by=0.5))[0].lost
    for file in server.agent.memory.folder.glob("*.memory"):
        file.unlink()
    server.after = 2
    assert server.call(server.ask(2, by=0.0))[0].forgot
    server.after = 0
    assert "other content before" in server.call(server.ask(1, by=0.5))[0].lost
    assert server.call(server.ask(2, by=0.0))[0].lost == ""


def test_a_content_that_was_begun_and_failed_is_the_content_of_its_round(tmp_path: Path) -> None:
    """Otherwise errors would be answers to as many models as the server likes."""
    server = Server(tmp_path)
    assert server.said(0) == ""
    assert server.call(Request(1, {}))[0].lost.startswith("failed: KeyError")
    assert "other content before" in server.said(1)
    assert server.call(Request(1, {}))[0].lost.startswith("failed: KeyError")
    assert server.said(2) == ""


# The same content again ---------------------------------------------------------------------------------------------


NOISE = {
    "options": {"uniform": True},
    "uplink": [{"name": "clip", "bound": 1.0}, {"name": "gaussian", "multiplier": 1.0}],
}


def test_the_same_content_gets_the_same_reply_whatever_its_number(tmp_path: Path) -> None:
    """Noise is not drawn anew: two draws of it could be averaged."""
    server = Server(tmp_path, plan=NOISE)
    first = server.call(server.ask(0))
    files = [first[1].read_bytes()]
    for _ in range(3):
        answer, file = server.call(server.ask(0), after=0)
        assert answer.lost == ""
        files.append(file.read_bytes())
    assert len(set(files)) == 1
    assert events(server.home.journal).count("asked") == 1
    assert events(server.home.journal).count("asked again, answered as before") == 3
    server.carrier.restart("site-0")
    server.start()
    assert server.call(server.ask(0))[1].read_bytes() == files[0]
    assert server.said(1) == ""


def test_a_reply_that_is_gone_is_made_again_twice_at_most(tmp_path: Path) -> None:
    server = Server(tmp_path, plan=NOISE)
    said = []
    for _ in range(5):
        said.append(server.call(server.ask(0), after=0)[0].lost)
        for file in server.agent.memory.folder.glob("*.reply"):
            file.unlink()
    assert said[:3] == ["", "", ""]
    assert all("is lost, and it was computed 3 times: it is not computed again" in why for why in said[3:])
    asked = [e for e in verify(server.home.journal) if e["event"] == "asked"]
    assert [e.get("repetition", 0) for e in asked] == [0, 1, 2]


def test_a_reply_that_somebody_changed_does_not_leave_again(tmp_path: Path) -> None:
    server = Server(tmp_path, plan=NOISE)
    file = server.call(server.ask(0))[1]
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    again = server.call(server.ask(0), after=0)[1]
    assert again.read_bytes() not in (whole, whole[:-1] + bytes([whole[-1] ^ 1]))
    assert events(server.home.journal).count("asked") == 2


def test_a_stricter_policy_holds_for_a_reply_that_was_made_before_it(tmp_path: Path) -> None:
    server = Server(tmp_path)
    assert server.said(0) == ""
    server.home.policy.write_text(POLICY.replace('jobs = ["*"]', 'jobs = ["score/*"]'))
    assert "allow.jobs" in server.said(0, after=0)
    assert "allow.jobs" in server.said(0, number=1, after=0)  # the very same message, too
    server.home.policy.write_text(POLICY.replace('["WeightedMean", "ElementwiseMean"]', '["ElementwiseMean"]'))
    assert "allow.stats" in server.said(0, after=0)


def test_memory_goes_on_from_a_reply_that_was_given_again(tmp_path: Path) -> None:
    """Under its new number the reply has the memory that the site kept with it."""
    server = Server(tmp_path, method="scaffold")

    server.call(server.ask(0))
    kept = tensor_file.read(server.agent.memory.kept(1))
    server.after = 0
    answer, _ = server.call(server.ask(0))
    assert (answer.number, answer.lost) == (2, "")
    assert equal(kept, tensor_file.read(known(server.agent.memory.before(2))))
    assert server.call(server.ask(1))[0].lost == ""


def test_a_record_that_was_changed_stops_the_run_and_a_person_may_forget_it(tmp_path: Path) -> None:
    server = Server(tmp_path)
    assert server.said(0) == ""
    server.carrier.restart("site-0")
    usage = server.home.memory("run-1") / "usage.jsonl"
    usage.write_text(usage.read_text().replace('"round":0', '"round":7', 1))
    server.start()
    assert "the record of what was answered here is damaged" in server.said(1)
    RunMemory(server.home.memory("run-1")).forget()
    assert not usage.exists()


def test_a_torn_record_is_what_was_acknowledged(tmp_path: Path) -> None:
    server = Server(tmp_path)
    assert server.said(0) == ""
    server.carrier.restart("site-0")
    with open(server.home.memory("run-1") / "usage.jsonl", "ab") as file:
        file.write(b'{"seq":2,"event":"beg')
    server.start()
    assert "other content before" in server.said(0, by=0.5)
    assert server.said(1) == ""


def test_what_was_answered_is_on_the_disk_before_the_reply_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(tmp_path)
    lines = []

    def look(*arguments: Any) -> Any:
        lines.append((server.home.memory("run-1") / "usage.jsonl").read_text())
        return type(server.agent)._sent(server.agent, *arguments)

    monkeypatch.setattr(server.agent, "_sent", look)
    assert server.said(0) == ""
    assert [json.loads(line)["event"] for line in lines[0].splitlines()] == ["begun", "answered"]


# Models at their place ----------------------------------------------------------------------------------------------


def test_the_model_that_is_scored_is_the_one_that_is_trained_from(tmp_path: Path) -> None:
    server = Server(tmp_path, **SCORED)
    assert server.said(0) == ""
    assert server.said(1, "score/val", by=0.1) == ""
    assert "it contains a different model from the earlier request of this round ('params' differs)" in server.said(
        1, by=0.2
    )
    assert "other content before" in server.said(
        1, by=0.1
    )  # the refused content was begun, and stays the one of its round
    assert server.said(2, by=0.3) == ""
    assert "a different model" in server.said(2, "score/val", by=0.4)


def test_what_is_trained_from_is_what_is_scored(tmp_path: Path) -> None:
    server = Server(tmp_path, **SCORED)
    assert server.said(0) == ""
    assert server.said(1, "score/val", by=0.1) == ""
    assert server.said(1, by=0.1) == ""
    assert server.said(2, by=0.2) == ""
    assert server.said(2, "score/val", by=0.2) == ""


@pytest.mark.parametrize(
    ("round", "by", "why"),
    [(1, 0.1, ""), (2, 0.2, ""), (3, 0.9, ""), (1, 0.2, "a different model"), (2, 0.1, "a different model")],
)
def test_the_tested_model_is_one_that_was_scored_or_the_last(round: int, by: float, why: str, tmp_path: Path) -> None:
    server = Server(tmp_path, **SCORED)
    server.said(0)
    server.said(1, "score/val", by=0.1)
    server.said(1, by=0.1)
    server.said(2, by=0.2)  # the site was away when this model was scored
    said = server.said(round, "score/test", by=by)
    assert why in said
    assert bool(said) == bool(why)
    if not why:
        assert "comes after the test" in server.said(3, "score/val", by=0.9) or round == 3


def test_thresholds_are_found_with_the_model_that_was_tested(tmp_path: Path) -> None:
    server = Server(tmp_path, LAX, **{**SCORED, "test": "predict/test"}, rounds=1)
    assert server.said(0) == ""
    assert server.said(1, "score/val", by=0.1) == ""
    assert server.said(1, "predict/test", by=0.1) == ""
    assert "a different model" in server.said(1, "predict/val", by=0.2)
    server = Server(tmp_path / "b", LAX, test="predict/test", rounds=1)
    assert server.said(0) == ""
    assert server.said(1, "predict/test", by=0.1) == ""
    assert "a different model" in server.said(1, "score/test", by=0.2)
    assert server.said(1, "predict/val", by=0.1) == ""


# Scores under a budget ---------------------------------------------------------------------------------------------


def test_scores_beside_a_budget_are_rounded(tmp_path: Path) -> None:
    budget = POLICY + '\n[privacy]\nepsilon = 3.0\ndelta = 1e-3\nunit = "record"\n'
    private = {"training": {"batch_size": 8, "lr": 0.05, "private": {"noise": 5.0, "bound": 1.0, "unit": "record"}}}
    found = []
    for name, policy in (("with", budget), ("without", POLICY)):
        server = Server(tmp_path / name, policy, score_every=1, plan=private)
        _, file = server.call(server.ask(1, "score/val"))
        found.append({key: float(value) for key, value in tensor_file.read(file).gather("score")["site-0"].items()})
    rounded, exact = found
    assert exact["n"] == 12
    assert rounded["n"] == 10  # the nearest multiple of min_cell
    assert {k: v for k, v in rounded.items() if k != "n"} == {k: round(v, 2) for k, v in exact.items() if k != "n"}
    assert rounded["loss"] != exact["loss"]


def test_a_refusal_does_not_tell_how_few_patients_there_are(tmp_path: Path) -> None:
    server = Server(tmp_path, POLICY.replace("min_patients = 2", "min_patients = 40"), score_every=1)
    for round, job in ((0, "train"), (1, "score/val")):
        said = server.said(round, job)
        assert "fewer than 40 patients here" in said
        assert "12" not in said


# An honest server ---------------------------------------------------------------------------------------------------


def honest(root: Path, method: str, homes: Any = None, **how: Any) -> Any:
    homes = homes or hospital(root, policy=LAX)
    an = order(method, **how)
    for home in homes.values():
        approve(home, an)
    return homes, an


def test_a_crash_between_the_model_and_its_scores_asks_for_no_other_scores(tmp_path: Path) -> None:
    """The round is not done again after a crash while it is scored; otherwise another model could take its place."""
    homes, an = honest(tmp_path, "fedavg", score_every=1, test="score/test", best={"metric": "loss", "higher": False})
    calls, lost = list[Call](), list[bool]()

    def crash(call: Call) -> bool:
        calls.append(call)
        return call.job == "score/val" and call.round == 2 and call.site == "site-2" and not lost

    assert run(tmp_path, an, homes, crash=crash)[0] == "interrupted"
    lost.append(True)
    assert run(tmp_path, an, homes, crash=crash)[0] == "finished"
    trained = [(c.round, c.site) for c in calls if c.job == "train"]
    assert len(trained) == len(set(trained))  # no round was asked for again
    contents = {(c.round, c.job, c.site): set[tuple[str, int]]() for c in calls}
    for c in calls:
        contents[c.round, c.job, c.site].add((c.sha256, c.number))
    assert all(len(one) == 1 for one in contents.values())
    assert refused(homes) == []
    assert equal(reference(an)[0], state_of(tmp_path, an))
    lines = (tmp_path / "server" / an.run / "records.jsonl").read_text().splitlines()
    scores = [(fact["round"], fact["site"]) for fact in map(json.loads, lines) if fact["kind"] == "scores"]
    assert scores == [(r, f"site-{k}") for r in (1, 2, 3) for k in range(3)]


@pytest.mark.usefixtures("looks")
def test_a_round_is_scored_after_a_crash_though_the_sites_that_trained_it_are_away(tmp_path: Path) -> None:
    homes, an = honest(tmp_path, "fedavg", score_every=1, deadline=100.0)
    run(tmp_path, an, homes, crash=lambda c: c.job == "score/val" and c.round == 1)
    outcome, carrier = run(tmp_path, an, homes, lose=lambda c: c.site == "site-1" and c.job == "train" and c.round == 0)
    assert outcome == "finished"
    assert [c.round for c in carrier.calls if c.job == "train" and c.site == "site-0"] == [1, 2]
    assert refused(homes) == []


def test_a_crash_in_the_test_goes_on_to_the_same_answers(tmp_path: Path) -> None:
    homes, an = honest(tmp_path, "fedbn", score_every=1, test="predict/test", best={"metric": "loss", "higher": False})
    for job in ("predict/test", "predict/val"):
        run(tmp_path, an, homes, crash=lambda c, job=job: c.job == job and c.site == "site-1")
    assert run(tmp_path, an, homes)[0] == "finished"
    assert refused(homes) == []
    facts = [json.loads(line) for line in (tmp_path / "server" / an.run / "records.jsonl").read_text().splitlines()]
    assert [f["site"] for f in facts if f["kind"] == "test"] == ["site-0", "site-1", "site-2"]


def test_a_cohort_answers_in_its_rounds_and_is_not_refused(tmp_path: Path) -> None:
    homes, an = honest(tmp_path, "fedavg", sites_per_round=2, rounds=4, score_every=2, test="score/test")
    outcome, carrier = run(tmp_path, an, homes)
    assert outcome == "finished"
    assert refused(homes) == []
    trained = [(c.site, c.round) for c in carrier.calls if c.job == "train"]
    assert len(trained) == len(set(trained)) == 8


def test_an_external_site_is_scored_and_never_trains(tmp_path: Path) -> None:
    homes = hospital(tmp_path, policy=LAX)
    homes, an = honest(tmp_path, "fedavg", homes, sites=("site-0", "site-1"), external=("site-2",), **SCORED)
    outcome, carrier = run(tmp_path, an, homes)
    assert outcome == "finished"
    assert refused(homes) == []
    assert {c.job for c in carrier.calls if c.site == "site-2" and c.job} == {"score/val", "score/test"}


@pytest.mark.parametrize("at", [3, 5, 6, 8])
def test_buffered_runs_that_crash_go_on_unrefused(at: int, tmp_path: Path) -> None:
    homes, an = honest(tmp_path, "fedbuff", mode="buffered", buffer=2, rounds=4)
    seen = []
    run(tmp_path, an, homes, crash=lambda c: seen.append(c) or len(seen) == 3 + at)  # type: ignore[func-returns-value]
    assert run(tmp_path, an, homes)[0] == "finished"
    assert refused(homes) == []


def test_a_site_that_lost_everything_begins_anew_in_its_place(tmp_path: Path) -> None:
    homes, an = honest(tmp_path, "scaffold", rounds=3, score_every=1)
    carrier = LocalCarrier(homes, an)

    def lose_disk(call: Call) -> bool:
        if call.kind == "do" and (call.job, call.round, call.site) == ("train", 1, "site-1") and call.after:
            carrier.restart("site-1")
            shutil.rmtree(homes["site-1"].memory(an.run))
        return False

    carrier.crash = lose_disk
    assert coordinator(tmp_path, an, carrier).run() == "finished"
    carrier.close()
    assert refused(homes) == []


PUBLIC = ("feddf", "fedad", "fedreplay", "fedmd", "pooled")  # need data that these sites and their server have not
QUICK = ("mime", "combat", "cyclic", "split", "data-vectors", "ifca", "fedmae")


@pytest.mark.parametrize(
    "method",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name, entry in METHODS.items()
        if name not in PUBLIC and "segmentation" not in entry.tasks[:1]
    ],
)
def test_no_method_asks_for_more_than_it_declares(method: str, tmp_path: Path) -> None:
    """The whole table between an honest server and sites: scored, chosen, tested, and nothing is refused."""
    homes = hospital(tmp_path / "all", policy=EVERYTHING.replace("[allow]", "[allow]\nnever = []"))
    homes, an = honest(
        tmp_path / "all",
        method,
        homes,
        rounds=3,
        score_every=2,
        test="predict/test",
        best={"metric": "loss", "higher": False},
    )
    outcome, carrier = run(tmp_path / "all", an, homes)
    assert outcome == "finished"
    lost = [e for e in verify(tmp_path / "all" / "server" / an.run / "journal.jsonl") if e["event"] == "lost"]
    assert lost == []
    assert {"score/val", "predict/test", "predict/val"} <= {c.job for c in carrier.calls}

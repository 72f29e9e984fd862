"""Site agent: authorizes, executes and journals each call of the server. Nothing leaves the site except its answers.

It keeps the journal and the site state, consults policy and people, and controls the training process. It does not use
the network, so that the tests can act as an honest or hostile server. Requires no PyTorch.
"""

import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from polyclinic.core.atomic import remove_leftovers, write_private
from polyclinic.core.audit_log import Broken
from polyclinic.core.job_enumeration import Job
from polyclinic.engines.flare.client import run_archive
from polyclinic.engines.flare.client.opened_sums import NotOpened, Opened, Summed
from polyclinic.engines.flare.client.request_usage import REPETITIONS
from polyclinic.engines.flare.client.reviews import APPROVED, REFUSED, Reviews
from polyclinic.engines.flare.client.run_memory import Link, OldMessage, RunMemory
from polyclinic.engines.flare.client.run_status import RunStatus
from polyclinic.engines.flare.client.training_process import Died, Stopped, TrainingProcess
from polyclinic.engines.flare.protocol import message_limits, shared_journals
from polyclinic.engines.flare.protocol.messages import VERSION, WAITS_FOR_WEIGHTS, Answer, Call, printable
from polyclinic.engines.flare.protocol.paths import SetupError, SiteFolder, hash_of, private_folder, read_toml
from polyclinic.engines.flare.protocol.run_request import RunRequest, code_hash
from polyclinic.engines.request_schedule import Request, Schedule
from polyclinic.errors import PolicyRefusal

DEFAULT_POLICY = Path(__file__).parents[2] / "policy" / "policy.toml"
CALLS_AT_ONCE, CALLS_PER_SECOND = 500, 10.0
PASSING = (".ask", ".advertise", ".share", ".mask", ".agree", ".reveal")


class Sent(NamedTuple):
    """File that leaves with an answer, if any."""

    size: int = 0
    sha256: str = ""
    path: Path | None = None
    seconds: float = 0.0


class Refusal(PolicyRefusal):
    """Reason why a call gets no reply."""

    def __init__(self, reason: str, forgot: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.forgot = reason, forgot


class SiteAgent:
    """One run at one site, from the first call to the end of the job."""

    def __init__(self, home: SiteFolder, order: RunRequest, stopped: Callable[[], bool] = lambda: False) -> None:
        """Start to serve ``order`` at the site in ``home``.

        Args:
            stopped: Returns whether the job was ended, which also ends training.
        """
        self.home, self.order = home, order
        settings = read_toml(home.settings, "polyclinic site init")
        self.name: str = settings["site"]
        self.memory = RunMemory(home.memory(order.run))
        self.opened = Opened(home.opened)
        self.journal = shared_journals.SharedJournal(home.journal)
        self.reviews = Reviews(home.reviews)
        remove_leftovers(self.memory.folder)
        write_private(self.memory.folder / "order.json", order.to_json())
        self.trainer = TrainingProcess(
            home.path, order.run, private_folder(home.path / "log") / f"{order.run}.log", stopped
        )
        self._automatic = self._fits = False
        self._schedule: Schedule | None = None
        self._hash = order.hash
        self._rate, self._repeats = message_limits.Rate(CALLS_AT_ONCE, CALLS_PER_SECOND), message_limits.Repeats()
        self._received = message_limits.Received(self.memory.folder / "received.json")
        self._keep_free = float(settings.get("keep_free_megabytes", message_limits.KEEP_FREE))
        self.status = RunStatus(self.memory.folder)
        run_archive.unmark(self.memory.folder)

    def close(self) -> None:
        """End training and close the journal."""
        self.trainer.close()
        self.memory.close()
        self.journal.close()

    def before(self, call: Call) -> Answer | None:
        """Return the refusal of a call whose file must not be fetched, or None if it may be.

        Decided from the message alone: whether a person or a policy currently allows the study, the policy's limit for
        the round, and the free disk space.
        """
        if delay := self._rate.wait():
            time.sleep(min(delay, 10.0))
        if not call.size:
            return None
        try:
            self._check(call)
            self._permitted()
            if call.kind == "weights":
                self._check_weights(call)
            else:
                limit = message_limits.bytes_allowed(self.home.policy, DEFAULT_POLICY, "megabytes_per_round")
                message_limits.check_call(call, self.order, limit, self._received)
                message_limits.check_room(self.memory.folder, call.size, self._keep_free)
                self._received.add(call)
        except (Refusal, message_limits.TooMuch, SetupError, OSError) as error:
            reason = error.reason if isinstance(error, Refusal) else f"refused: {error}"
            self.status.came_of(call, reason)
            return self._refused(call, Refusal(reason))
        return None

    def answer(self, call: Call, body: Path | None) -> tuple[Answer, Path | None]:
        """Return the answer to ``call`` and its file. ``body`` is the call's file, already verified."""
        with self.status.working(call):
            answer, file = self._answer(call, body)
        self.status.came_of(call, answer.lost)
        return answer, file

    def _answer(self, call: Call, body: Path | None) -> tuple[Answer, Path | None]:
        try:
            self._check(call)
            match call.kind:
                case "hello":
                    self._hello()
                    sent = Sent()
                case "weights":
                    self._take_weights(call, body)
                    self._hello()
                    sent = Sent()
                case "end":
                    self.journal.write("run ended", {"run": call.run, "server": call.head})
                    self.trainer.close()
                    run_archive.mark(self.memory.folder)
                    sent = Sent()
                case "secure":
                    sent = self._secure(call, body)
                case _:
                    sent = self._do(call, body)
        except Refusal as refusal:
            return self._refused(call, refusal), None
        self._repeats.over()
        return self._sign(call, sent), sent.path

    def _refused(self, call: Call, refusal: Refusal) -> Answer:
        details = {"run": call.run, "number": call.number, "reason": printable(refusal.reason), "server": call.head}
        self.note_refusal("no reply", details, call.kind)
        return self._sign(call, Sent(), printable(refusal.reason, 2000), refusal.forgot)

    def note_refusal(self, event: str, details: dict[str, Any], kind: str = "") -> None:
        """Journal a refusal; a repeated one only at its 2nd, 4th, 8th, ... time, with the count."""
        if times := self._repeats.count(f"{event} {kind}", str(details["reason"])):
            self.journal.write(event, details if times == 1 else {**details, "times": times})

    def _check(self, call: Call) -> None:
        if call.site != self.name or call.run != self.order.run:
            raise Refusal(f"this message is for {call.site} in {call.run}, and this is {self.name} in {self.order.run}")
        if call.order != self._hash:
            raise Refusal("refused: the server requests another study than the one in the job")

    def _hello(self) -> None:
        """Check that this study may run here and that the local data fit it.

        No data file is opened before a policy or a person has allowed the study.
        """
        verdict = self._train({"what": "check"})
        problems = tuple(verdict["problems"])
        self._automatic = bool(verdict["automatic"]) and not problems
        about = {"run": self.order.run, "order": self._hash, "rehearsal": self.order.rehearsal}
        if self._automatic:
            self.journal.write("admitted by the policy", about)
        else:
            before = self.reviews.get(self.order.run)
            review = self.reviews.offer(self.order, problems, verdict["notes"])
            if review != before:
                self.journal.write("study offered", {**about, "problems": list(problems)})
            if review != before and review.of:
                part = {**about, **review.statement, "signature": review.signature}
                self.journal.write(f"{review.state} as part of its study", part)
            if problems:
                raise Refusal("refused by the site's policy: " + "; ".join(problems))
            self._permitted()
        if verdict["awaits"]:
            raise Refusal(f"{WAITS_FOR_WEIGHTS} {verdict['awaits'][:12]}..., which the server sends")
        self._check_data()

    def _check_weights(self, call: Call) -> None:
        """Check that start weights may come, and that there is room for them, both as they come and in the store."""
        limit = message_limits.bytes_allowed(self.home.policy, DEFAULT_POLICY, "weights_megabytes")
        message_limits.check_weights(call, self.order, limit, self.home.weights, self.memory.wrong_weights)
        message_limits.check_room(self.home.path, 2 * call.size, self._keep_free)

    def _take_weights(self, call: Call, body: Path | None) -> None:
        """Add the start weights that the server sent to this site's store, after a strict read."""
        self._permitted()
        if body is None:
            raise Refusal("refused: start weights without their file")
        try:
            self._train({"what": "weights", "file": str(body)}, call.deadline)
        except Refusal:
            self.memory.count_wrong_weights()
            raise
        about = {"run": call.run, "weights": call.sha256, "bytes": call.size, "server": call.head}
        self.journal.write("start weights received", about)

    def _check_data(self) -> None:
        """Check that the local data fit this study. The details are shown only at this site."""
        if self._fits:
            return
        verdict = self._train({"what": "data"})
        self.reviews.note_data(self.order.run, verdict["here"])
        if verdict["told"]:
            raise Refusal(f"refused: {verdict['told']}")
        self._fits = True

    def _permitted(self) -> None:
        """Check that a policy or a person currently allows exactly this study."""
        if self._automatic:
            return
        review = self.reviews.current(self.order)
        if review is not None and review.state == REFUSED:
            raise Refusal(f"refused by a person at {self.name}: {review.reason or 'no reason given'}")
        if review is None or review.state != APPROVED:
            raise Refusal(f"waits for a person at {self.name}: `polyclinic site review {self.order.run}`")

    def _do(self, call: Call, body: Path | None) -> Sent:
        self._permitted()
        if body is None:
            raise Refusal("refused: a request without its file")
        try:
            self.memory.settle(call.after, call.confirmed, call.number, call.keep)
        except OldMessage as error:
            raise Refusal(f"refused: {error}") from None
        asked = Request(call.round, call.job, call.sha256, look=call.kind == "look")
        try:
            earlier = self.memory.usage.find(asked)
        except Broken as error:
            raise Refusal(f"refused: the record of what was answered here is damaged: {error}") from None
        again = self.memory.chain.same(call.number, call.after, call.sha256)
        if again is not None and self.memory.reply(call.number).exists():
            if not earlier.times:  # the machine crashed between the reply and the record
                self.memory.usage.answer(asked, again.number, again.sha256, {})
            return self._as_before(call, again, body)
        self._scheduled(asked)
        if (link := self.memory.kept_reply(earlier)) is not None:
            return self._as_before(call, self.memory.repeat(link, call.number, call.after), body)
        if earlier.times > REPETITIONS:
            raise Refusal(
                f"refused: the reply to the job {call.job!r} in round {call.round} is lost, and it was computed "
                f"{earlier.times} times: it is not computed again"
            )
        if undone := self.memory.undo(call.after):
            self.journal.write("rolled back", {"run": call.run, "messages": list(undone)})
        start = call.keep if call.kind == "look" else call.after
        try:
            before = self.memory.before(start)
        except KeyError:
            self.memory.begin_anew()
            raise Refusal(f"the site state after message {start} is no longer at {self.name}", forgot=True) from None
        details = {"run": call.run, "number": call.number, "round": call.round, "job": call.job}
        repeated = {"repetition": earlier.times} if earlier.times else {}
        self.journal.write(
            "asked", {**details, "ask": call.sha256, "bytes": call.size, "server": call.head, **repeated}
        )
        self.memory.usage.begin(asked, call.number)
        schedule = self._known_schedule
        bound = [
            [marks, complete]
            for jobs, complete in schedule.bound(asked)
            for marks in self.memory.usage.marks(call.round, jobs)
        ]
        done = self._train(
            {
                "what": "ask",
                "ask": str(body),
                "memory": str(before or ""),
                "round": call.round,
                "job": call.job,
                "reply": str(self.memory.reply(call.number)),
                "kept": str(self.memory.kept(call.number)),
                "sent": self.memory.sent_in(call.round),
                "layout": str(self.memory.layout(call.number)),
                "automatic": self._automatic,
                "bound": bound,
                "marked": bool(schedule.bound(asked)),
            },
            call.deadline,
        )
        if done["said"]:
            self.reviews.answered(self.order, done["said"])
        memory = {"same": before.name if before else "", "kept": self.memory.kept(call.number).name, "none": ""}
        link = Link(
            call.number,
            call.after,
            call.sha256,
            call.round,
            call.job,
            done["size"],
            done["sha256"],
            memory[done["memory"]],
            done["seconds"],
            done["secure"],
            done["content"],
        )
        self.memory.add(link)
        self.memory.usage.answer(asked, call.number, link.sha256, done["marks"])
        sent = self._sent(link)
        parts = {"parts": done["parts"], "masked": done["secure"]}
        self.journal.write("answered", {**details, "reply": sent.sha256, "bytes": sent.size, **parts})
        return sent

    @property
    def _known_schedule(self) -> Schedule:
        """The requests allowed at this site, from the approved run request and its method."""
        if self._schedule is None:
            known = self._train({"what": "schedule"})
            jobs = [Job.from_table(table) for table in known["jobs"]]
            self._schedule = Schedule.of(self.order, jobs, self.name, known["batches"])
        return self._schedule

    def _scheduled(self, asked: Request) -> None:
        """Check that the schedule of the approved study contains exactly this request."""
        if problem := self._known_schedule.problem(asked, self.memory.usage.progress):
            raise Refusal(f"refused: {problem}")

    def _as_before(self, call: Call, link: Link, body: Path) -> Sent:
        """Return the earlier reply to this content, unless the policy now refuses it."""
        self._train({"what": "again", "ask": str(body), "reply": str(self.memory.reply(link.number))}, call.deadline)
        details = {"run": call.run, "number": call.number, "ask": call.sha256, "server": call.head}
        self.journal.write("asked again, answered as before", details)
        return self._sent(link)

    def _sent(self, link: Link) -> Sent:
        """Return the file that leaves for a link: its reply, or for a secure sum only names and shapes."""
        if not link.secure:
            return Sent(link.size, link.sha256, self.memory.reply(link.number), link.seconds)
        size, sha256 = hash_of(self.memory.layout(link.number))
        return Sent(size, sha256, self.memory.layout(link.number), link.seconds)

    def _secure(self, call: Call, body: Path | None) -> Sent:
        """Execute one stage of a secure sum of an earlier request's result."""
        self._permitted()
        link = self.memory.chain.link(call.number)
        if link is None or not link.secure or (link.round, link.job) != (call.round, call.job) or body is None:
            raise Refusal("refused: no reply waits for a secure sum under that number")
        out = self.memory.folder / f"{call.number}.{call.stage}"
        done = self._train(
            {
                "what": "secure",
                "stage": call.stage,
                "body": str(body),
                "vector": str(self.memory.reply(call.number)),
                "out": str(out),
                "round": call.round,
            },
            call.deadline,
        )
        if call.stage in ("agree", "reveal"):
            self._may_open(link, done, reveals=call.stage == "reveal")
        details = {"run": call.run, "number": call.number, "stage": call.stage, "server": call.head}
        self.journal.write("secure sum", {**details, "bytes": done["size"], "over": done["alive"]})
        return Sent(done["size"], done["sha256"], out, 0.0)

    def _may_open(self, link: Link, done: Mapping[str, Any], reveals: bool) -> None:
        """Check that a sum over the sites in ``done`` may be opened; record it before shares are revealed."""
        job = self._known_schedule.job(link.job, link.round)
        summed = Summed(self.order.run, link.round, link.job, link.content, job is not None and job.static)
        try:
            if reveals:
                self.opened.record(summed, done["alive"], done["min_sites"])
            elif why := self.opened.problem(summed, done["alive"], done["min_sites"]):
                raise NotOpened(why)
        except NotOpened as error:
            raise Refusal(f"refused: {error}") from None

    def _train(self, command: dict[str, Any], deadline: float = 0.0) -> dict[str, Any]:
        code = {"code": code_hash(), "packages": [list(package) for package in self.order.packages]}
        try:
            done = self.trainer.do({**command, **code}, deadline or None)
        except Died as error:
            raise Refusal(f"failed: {error}") from None
        except Stopped as error:
            raise Refusal(f"stopped: {error}") from None
        if done["lost"]:
            raise Refusal(done["lost"])
        return done

    def _sign(self, call: Call, sent: Sent, lost: str = "", forgot: bool = False) -> Answer:
        answer = Answer(
            VERSION,
            call.run,
            call.number,
            self.name,
            self.journal.head,
            sent.size,
            sent.sha256,
            lost,
            forgot,
            sent.seconds,
            code_hash(),
            call.stage,
            "",
        )
        return replace(answer, signature=shared_journals.sign(self._key, answer.signed))

    @cached_property
    def _key(self) -> Any:
        from polyclinic.engines.flare.pki import site_keys

        return site_keys.load(self.home.keys / "site.key")


def take_in(memory: RunMemory, received: Path, number: int) -> Path:
    """Move a received file to the place of request files, replacing the previous one."""
    for old in memory.folder.iterdir():
        if old.suffix in PASSING:
            old.unlink(missing_ok=True)
    place = memory.folder / f"{number}.ask"
    try:
        os.replace(received, place)
    except OSError:
        shutil.move(received, place)
    return place

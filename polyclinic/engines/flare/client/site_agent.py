"""A site's desk: every call passes over it, and nothing leaves but what it hands out.

It keeps the journal and the memory, asks people and policy, and lets the training process work. It knows no network, so
the tests play the server, honest or hostile. Nothing here needs PyTorch.
"""

import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

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
from polyclinic.engines.flare.protocol.messages import VERSION, Answer, Call, printable
from polyclinic.engines.flare.protocol.paths import (
    SetupError,
    SiteFolder,
    hash_of,
    private_folder,
    read_toml,
    write_private,
)
from polyclinic.engines.flare.protocol.run_request import RunRequest, code_hash
from polyclinic.engines.request_schedule import Request, Schedule
from polyclinic.errors import PolicyRefusal

DEFAULT_POLICY = Path(__file__).parents[2] / "policy" / "policy.toml"
CALLS_AT_ONCE, CALLS_PER_SECOND = 500, 10.0
PASSING = (".ask", ".advertise", ".share", ".mask", ".agree", ".reveal")


class Sent(NamedTuple):
    """A file that leaves, if any."""

    size: int = 0
    sha256: str = ""
    path: Path | None = None
    seconds: float = 0.0


class Refusal(PolicyRefusal):
    """Why a call is not answered by a reply."""

    def __init__(self, reason: str, forgot: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.forgot = reason, forgot


class SiteAgent:
    """One run at one site, from the first call to the end of the job."""

    def __init__(self, home: SiteFolder, order: RunRequest, stopped: Callable[[], bool] = lambda: False) -> None:
        """Takes up ``order`` at the site in ``home``.

        Args:
            stopped: Whether the job was ended, which ends training too.
        """
        self.home, self.order = home, order
        settings = read_toml(home.settings, "polyclinic site init")
        self.name: str = settings["site"]
        self.memory = RunMemory(home.memory(order.run))
        self.opened = Opened(home.opened)
        self.journal = shared_journals.SharedJournal(home.journal)
        self.reviews = Reviews(home.reviews)
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
        """Ends training and closes the journal."""
        self.trainer.close()
        self.memory.close()
        self.journal.close()

    def before(self, call: Call) -> Answer | None:
        """The refusal of a call whose file must not come here; None if the file may be fetched.

        Decided from the message alone: whether a person or a policy allows the study now, how much the policy lets in
        during a round, and how much room there is.
        """
        if delay := self._rate.wait():
            time.sleep(min(delay, 10.0))
        if not call.size:
            return None
        try:
            self._check(call)
            self._permitted()
            limit = message_limits.round_limit(self.home.policy, DEFAULT_POLICY)
            message_limits.check_call(call, self.order, limit, self._received)
            message_limits.check_room(self.memory.folder, call.size, self._keep_free)
            self._received.add(call)
        except (Refusal, message_limits.TooMuch, SetupError, OSError) as error:
            reason = error.reason if isinstance(error, Refusal) else f"refused: {error}"
            self.status.came_of(call, reason)
            return self._refused(call, Refusal(reason))
        return None

    def answer(self, call: Call, body: Path | None) -> tuple[Answer, Path | None]:
        """What to answer to ``call``, and the file beside it. ``body`` is the call's file, checked already."""
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
        """Writes a refusal to the journal; one that repeats, at its 2nd, 4th, 8th time and so on, with the number."""
        if times := self._repeats.count(f"{event} {kind}", str(details["reason"])):
            self.journal.write(event, details if times == 1 else {**details, "times": times})

    def _check(self, call: Call) -> None:
        if call.site != self.name or call.run != self.order.run:
            raise Refusal(f"this message is for {call.site} in {call.run}, and here is {self.name} in {self.order.run}")
        if call.order != self._hash:
            raise Refusal("refused: the server asks for another study than the one whose order came with the job")

    def _hello(self) -> None:
        """Raises unless this study may run here, and the data here are what it needs.

        No file of the data is opened before a policy or a person has allowed it.
        """
        found = self._train({"what": "check"})
        problems = tuple(found["problems"])
        self._automatic = bool(found["automatic"]) and not problems
        about = {"run": self.order.run, "order": self._hash, "rehearsal": self.order.rehearsal}
        if self._automatic:
            self.journal.write("admitted by the policy", about)
        else:
            before = self.reviews.get(self.order.run)
            review = self.reviews.offer(self.order, problems, found["notes"])
            if review != before:
                self.journal.write("study offered", {**about, "problems": list(problems)})
            if review != before and review.of:
                part = {**about, **review.statement, "signature": review.signature}
                self.journal.write(f"{review.state} as part of its study", part)
            if problems:
                raise Refusal("refused by the site's policy: " + "; ".join(problems))
            self._permitted()
        self._check_data()

    def _check_data(self) -> None:
        """Raises if the data of this site do not fit this study. The details are shown only at this site."""
        if self._fits:
            return
        found = self._train({"what": "data"})
        self.reviews.note_data(self.order.run, found["here"])
        if found["told"]:
            raise Refusal(f"refused: {found['told']}")
        self._fits = True

    def _permitted(self) -> None:
        """Raises unless a policy or a person allows this very study, now."""
        if self._automatic:
            return
        review = self.reviews.stands(self.order)
        if review is not None and review.state == REFUSED:
            raise Refusal(f"refused by a person at {self.name}: {review.reason or 'no reason given'}")
        if review is None or review.state != APPROVED:
            raise Refusal(f"waits for a person at {self.name}: `polyclinic site review {self.order.run}`")

    def _do(self, call: Call, body: Path | None) -> Sent:
        self._permitted()
        if body is None:
            raise Refusal("refused: an ask without its file")
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
            if not earlier.times:  # the machine went down between the reply and the record
                self.memory.usage.answer(asked, again.number, again.sha256, {})
            return self._as_before(call, again, body)
        self._scheduled(asked)
        if (link := self.memory.kept_reply(earlier)) is not None:
            return self._as_before(call, self.memory.repeat(link, call.number, call.after), body)
        if earlier.times > REPETITIONS:
            raise Refusal(
                f"refused: the reply to the job {call.job!r} in round {call.round} is gone, and it was made "
                f"{earlier.times} times: it is not made again"
            )
        if undone := self.memory.undo(call.after):
            self.journal.write("rolled back", {"run": call.run, "messages": list(undone)})
        start = call.keep if call.kind == "look" else call.after
        try:
            before = self.memory.before(start)
        except KeyError:
            self.memory.begin_anew()
            raise Refusal(f"the memory after message {start} is no longer at {self.name}", forgot=True) from None
        details = {"run": call.run, "number": call.number, "round": call.round, "job": call.job}
        repeated = {"repetition": earlier.times} if earlier.times else {}
        self.journal.write(
            "asked", {**details, "ask": call.sha256, "bytes": call.size, "server": call.head, **repeated}
        )
        self.memory.usage.begin(asked, call.number)
        schedule = self._known_schedule
        bound = [
            [marks, whole]
            for jobs, whole in schedule.bound(asked)
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
        """What may be asked of this site, from the order that was approved and the method that it names."""
        if self._schedule is None:
            found = self._train({"what": "schedule"})
            jobs = [Job.from_table(table) for table in found["jobs"]]
            self._schedule = Schedule.of(self.order, jobs, self.name, found["batches"])
        return self._schedule

    def _scheduled(self, asked: Request) -> None:
        """Raises unless the schedule of the approved study holds this very request."""
        if problem := self._known_schedule.problem(asked, self.memory.usage.progress):
            raise Refusal(f"refused: {problem}")

    def _as_before(self, call: Call, link: Link, body: Path) -> Sent:
        """The reply that was made to this content before, unless the policy has come to refuse it."""
        self._train({"what": "again", "ask": str(body), "reply": str(self.memory.reply(link.number))}, call.deadline)
        details = {"run": call.run, "number": call.number, "ask": call.sha256, "server": call.head}
        self.journal.write("asked again, answered as before", details)
        return self._sent(link)

    def _sent(self, link: Link) -> Sent:
        """What leaves of a link: its reply; or, of one for a secure sum, names and shapes alone."""
        if not link.secure:
            return Sent(link.size, link.sha256, self.memory.reply(link.number), link.seconds)
        size, sha256 = hash_of(self.memory.layout(link.number))
        return Sent(size, sha256, self.memory.layout(link.number), link.seconds)

    def _secure(self, call: Call, body: Path | None) -> Sent:
        """One stage of a secure sum of what came of an earlier ask."""
        self._permitted()
        link = self.memory.chain.link(call.number)
        if link is None or not link.secure or (link.round, link.job) != (call.round, call.job) or body is None:
            raise Refusal("refused: nothing waits here for a secure sum under that number")
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
        """Raises unless a sum over the sites in ``done`` may be opened; notes it before shares are revealed."""
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
    """Moves a file that was received to where asks lie; the one before it is gone."""
    for old in memory.folder.iterdir():
        if old.suffix in PASSING:
            old.unlink(missing_ok=True)
    place = memory.folder / f"{number}.ask"
    try:
        os.replace(received, place)
    except OSError:
        shutil.move(received, place)
    return place

"""Conducts one run at the server, from where its checkpoint stands to its end, whatever ends it.

After every round the server's state, the count of messages and the length of the records are written by write and
rename; a crash at any moment loses at most the round under way, and that round repeats to the bit, because sites answer
a message that comes twice as they answered it the first time.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from polyclinic.core import state as states
from polyclinic.core.execute import cohort_of
from polyclinic.core.state import savable
from polyclinic.core.train import Step, TooFewReplies, everyone, train, train_async
from polyclinic.engines.flare import wire
from polyclinic.engines.flare.exchange import Carrier, Count, Ended
from polyclinic.engines.flare.federation import FlareFederation
from polyclinic.engines.flare.greeting import Greeting, greet
from polyclinic.engines.flare.homes import private_folder, write_private
from polyclinic.engines.flare.journals import SharedJournal
from polyclinic.engines.flare.order import Order, code_hash
from polyclinic.engines.flare.processes import birth
from polyclinic.engines.flare.runs import FAILED, FINISHED, INTERRUPTED
from polyclinic.tasks.evaluation import evaluate


@savable
@dataclass(frozen=True)
class Standing:
    """Where a run stands.

    Attributes:
        state: The server's. ``round``: how many rounds are complete.
        number: The last message's number, and ``answered`` the last of each site's that was answered.
        records: The length of records.jsonl in bytes.
        trained: Whether the training is over, and only the test is left.
    """

    state: Any
    round: int
    number: int
    answered: Mapping[str, int]
    records: int
    trained: bool = False


@dataclass
class Conductor:
    """One attempt at one run.

    Attributes:
        members: The sites that take part in this attempt: those whose job processes FLARE has started.
    """

    order: Order
    carrier: Carrier
    folder: Path
    members: tuple[str, ...]
    poll: float = 5.0
    journal: SharedJournal = field(init=False)

    def __post_init__(self) -> None:
        self.journal = SharedJournal(private_folder(self.folder) / "journal.jsonl")
        self.plan = self.order.build_plan()
        self.method = self.plan.build_method()

    def run(self) -> str:
        """Runs to the end, and says how it ended: ``finished``, ``interrupted`` (try again) or ``failed``."""
        outcome, why = FAILED, ""
        with open(self.folder / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # two attempts at one run would ruin it
            try:
                self._say("greeting", "")
                self._run()
                outcome = FINISHED
            except (Ended, TooFewReplies, Pause) as error:
                outcome, why = INTERRUPTED, str(error)
            except Exception as error:
                why = f"{type(error).__name__}: {error}"
                raise
            finally:
                self.journal.write(outcome, {"why": why} if why else {})
                self._say(outcome, why)
                self.journal.close()
        return outcome

    def _run(self) -> None:
        at = self._load()
        self.journal.write(
            "begun" if at is None else "resumed",
            {
                "order": self.order.hash,
                "code": code_hash(),
                "round": at.round if at else 0,
                "sites": list(self.members),
            },
        )
        # One reference to the state, so that the one before is gone when the next has come.
        self._at = at or Standing(self.method.init(self.plan.build_task().first(self.plan.seed)), 0, 0, {}, 0)
        del at
        greeting = Greeting(self.order, self.carrier, self.journal, self._say, self._pause, self.poll)
        ready = greet(greeting, self.members)
        self._open_records(self._at.records)
        federation = FlareFederation(
            self.order, self.carrier, self.folder / "under-way", self.journal, ready, self.plan.seed,
            Count(self._at.number, self._at.answered),
        )  # fmt: skip
        self._say("running", "", self._at.round)
        try:
            if not self._at.trained:
                self._train(federation)
            self._finish(federation)
        finally:
            self._records.close()
        greet(greeting, ready, "end")

    def _train(self, federation: FlareFederation) -> None:
        begun = time.perf_counter()
        for step in self._steps(federation):
            following = self.method.ask(step.state)
            over = following is None or following.round != step.ask.round
            done = step.ask.round + 1 if over else self._at.round
            self._record_step(step, done, time.perf_counter() - begun)
            if self.order.score_every and over and done % self.order.score_every == 0:
                self._score(federation, step.state, done)
            self._save(federation, step.state, done)
            self._say("running", "", done)
            self._pause()
            begun = time.perf_counter()
            dict.clear(step.reply.parts)  # type: ignore[arg-type]  # it is large, and the driver keeps it for a while
            del step, following  # the ask holds the model before
        self._save(federation, self._at.state, self._at.round, trained=True)

    def _steps(self, federation: FlareFederation) -> Iterator[Step[Any]]:
        order, sites = self.order, federation.sites
        if order.mode == "buffered":
            left = self.plan.rounds - self._at.round
            return train_async(
                self.method, federation, self._at.state, updates=left, buffer=order.buffer, passes=order.passes
            )
        size = min(order.cohort or len(sites), len(sites))
        cohort = partial(_drawn, size, self.plan.seed) if size < len(sites) else everyone
        return train(
            self.method, federation, self._at.state, rounds=self.plan.rounds, cohort=cohort, deadline=order.deadline,
            min_replies=order.min_replies,
        )  # fmt: skip

    def _score(self, federation: FlareFederation, state: Any, done: int) -> None:
        for site, leaves in evaluate(self.method, federation, state, federation.sites, "score/val").items():
            metrics = {name: float(value) for name, value in leaves.items() if name != "n"}
            self._record("scores", round=done, role="val", site=site, metrics=metrics, n=int(leaves["n"]))

    def _finish(self, federation: FlareFederation) -> None:
        """Writes the model, and opens the test data if the order says so."""
        end = self._at
        model = self.method.model_at(self.method.trial(end.state), {})
        wire.write(self.folder / "model.safetensors", dict(model))
        if self.order.test:
            self.journal.write("test opened", {"round": end.round})
            said = evaluate(self.method, federation, end.state, federation.sites, self.order.test)
            for site, leaves in said.items():
                alone = self.order.test == "score/test"
                metrics = (
                    {k: float(v) for k, v in leaves.items() if k != "n"} if alone else self.method.task.summary(leaves)
                )
                count = int(leaves["n"]) if alone else len(leaves["patient"])
                self._record("test", round=end.round, site=site, metrics=metrics, n=count)
            if self.order.test == "predict/test":
                leaves = {f"{site}/{name}": leaf for site, outputs in said.items() for name, leaf in outputs.items()}
                wire.write(self.folder / "predictions.safetensors", leaves)
        self._save(federation, end.state, end.round, trained=True)

    def _record_step(self, step: Step[Any], done: int, wall: float) -> None:
        facts = {name: dict(getattr(step, name)) for name in ("bytes_up", "bytes_down", "seconds", "lost")}
        self._record("round", round=done, wall=wall, asked=list(step.asked), job=step.ask.job, **facts)
        for site, reason in step.lost.items():
            self._record("quarantine", round=done, site=site, reason=reason)

    def _record(self, kind: str, **facts: Any) -> None:
        fact = {"kind": kind, "method": self.plan.method, "seed": self.plan.seed, **facts}
        self._records.write(json.dumps(fact, separators=(",", ":")).encode() + b"\n")

    def _open_records(self, length: int) -> None:
        self._records = open(self.folder / "records.jsonl", "ab")  # noqa: SIM115
        self._records.truncate(length)
        self._records.seek(0, os.SEEK_END)

    def _load(self) -> Standing | None:
        path = self.folder / "checkpoint.safetensors"
        if not path.exists():
            return None
        standing: Standing = states.load(path)
        return standing

    def _save(self, federation: FlareFederation, state: Any, done: int, trained: bool = False) -> None:
        self._records.flush()
        os.fsync(self._records.fileno())
        count = federation.count
        self._at = Standing(state, done, count.number, dict(count.answered), self._records.tell(), trained)
        _, sha256 = wire.write(self.folder / "checkpoint.safetensors", self._at)
        self.journal.write("checkpoint", {"round": done, "number": count.number, "state": sha256})
        federation.confirm()

    def _say(self, phase: str, why: str, done: int | None = None, waiting: Mapping[str, str] | None = None) -> None:
        """Writes status.json, by which people and the supervisor know how it goes."""
        said = getattr(self, "_said", {"round": 0})
        self._said = said | {
            "phase": phase,
            "why": why,
            "pid": os.getpid(),
            "birth": birth(os.getpid()),
            "beat": time.time(),
            "waiting": dict(waiting or {}),
        }
        if done is not None:
            self._said["round"] = done
        self._said["rounds"] = self.plan.rounds
        write_private(self.folder / "status.json", json.dumps(self._said), durable=False)

    def _pause(self) -> None:
        """Raises ``Pause`` where the supervisor has asked for one."""
        if (self.folder / "pause").exists():
            why = (self.folder / "pause").read_text()
            (self.folder / "pause").unlink(missing_ok=True)
            raise Pause(why or "paused")


class Pause(RuntimeError):
    """The supervisor wants to begin a new attempt at this boundary. The message says why."""


def _drawn(size: int, seed: int, sites: Any, round: int) -> Any:
    return cohort_of(sites, size, round, seed)

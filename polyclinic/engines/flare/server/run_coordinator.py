"""Run coordinator: executes one run at the server from its checkpoint to its end.

After every round the server state, the message count and the length of the records are written and renamed into place.
A crash loses at most the current round, which then repeats with bit-identical results because sites repeat their answer
to a repeated message. A model is stored before sites are called to score it or to train from it: sites answer only one
content per position of a run, so a crash must not change what is requested.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from polyclinic.core import serialization as states
from polyclinic.core import tree
from polyclinic.core.atomic import remove_leftovers, write_private
from polyclinic.core.audit_log import verify
from polyclinic.core.execution import UniformSampler
from polyclinic.core.method import Request
from polyclinic.core.reply_validation import ReplyValidator
from polyclinic.core.rounds import Step, TooFewReplies, train, train_async, undiscounted
from polyclinic.core.serialization import savable
from polyclinic.core.tree import Tree
from polyclinic.engines.best_round import BestRound
from polyclinic.engines.flare.flare_processes import birth
from polyclinic.engines.flare.protocol import tensor_file
from polyclinic.engines.flare.protocol.expected_signers import Signers
from polyclinic.engines.flare.protocol.message_limits import Limits
from polyclinic.engines.flare.protocol.paths import private_folder, read_json
from polyclinic.engines.flare.protocol.registration import Registration, register
from polyclinic.engines.flare.protocol.rpc import AWAY, Carrier, Count, Ended
from polyclinic.engines.flare.protocol.run_records import Records
from polyclinic.engines.flare.protocol.run_request import RunRequest, code_hash
from polyclinic.engines.flare.protocol.shared_journals import SharedJournal
from polyclinic.engines.flare.server import sent_weights
from polyclinic.engines.flare.server.job_queue import FAILED, FINISHED, INTERRUPTED
from polyclinic.engines.flare.server.participation import Participation
from polyclinic.engines.flare.server.remote_federation import FlareFederation
from polyclinic.engines.site_description import JOB, read_description
from polyclinic.errors import RunError
from polyclinic.learning.tasks.task_evaluation import evaluate


@savable("deployment.Checkpoint", 1)
@dataclass(frozen=True)
class RunCheckpoint:
    """Checkpoint of a run.

    Attributes:
        state: The server state. ``round``: number of completed rounds.
        number: The last message number. ``answered``: the last message that each site answered.
        records: Length of records.jsonl in bytes.
        trained: Whether the training is complete and only the test remains.
        unscored: Whether the model of this round has not been scored yet. Stored before sites are called, so that after
            a crash the same model is scored.
        best: Round whose model is tested; 0 for the last. ``score``: its mean over sites. ``kept``: the last message of
            each site in it.
        scores: Latest score of each site (``engines.best_round``).
    """

    state: Any
    round: int
    number: int
    answered: Mapping[str, int]
    records: int
    trained: bool = False
    best: int = 0
    score: float = 0.0
    kept: Mapping[str, int] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    unscored: bool = False


@dataclass
class RunCoordinator:
    """One attempt at one run.

    Attributes:
        members: The sites whose job processes FLARE has started for this attempt.
        signers: The sites' keys; every answer must be signed by one of them.
        limits: Limits on what the server accepts from sites.
    """

    order: RunRequest
    carrier: Carrier
    folder: Path
    members: tuple[str, ...]
    poll: float = 5.0
    signers: Signers = field(kw_only=True)
    limits: Limits = field(default=Limits(), kw_only=True)
    journal: SharedJournal = field(init=False)
    _why: str = field(default="", init=False)

    def __post_init__(self) -> None:
        self.journal = SharedJournal(private_folder(self.folder) / "journal.jsonl")
        self.plan = self.order.build_plan()
        self.method = self.plan.build_method()

    def run(self) -> str:
        """Execute the run and return its outcome: ``finished``, ``interrupted`` (try again) or ``failed``."""
        outcome, why = FAILED, ""
        with open(self.folder / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # two simultaneous attempts would corrupt the run
            remove_leftovers(self.folder)
            try:
                self._say("greeting", "")
                self._run()
                outcome, why = FINISHED, self._why
            except (Ended, TooFewReplies, Pause) as error:
                outcome, why = FAILED if _all_refuse(error) else INTERRUPTED, str(error)
            except OSError as error:  # such as a full disk: there may be room again
                outcome, why = INTERRUPTED, f"{type(error).__name__}: {error}"
                raise
            except Exception as error:
                why = f"{type(error).__name__}: {error}"
                raise
            finally:
                with suppress(OSError):
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
                "rehearsal": self.order.rehearsal,
            },
        )
        # A single reference to the state, so that the previous one is freed when the next arrives.
        self._at = at or RunCheckpoint(self.method.init(self.plan.build_task().first(self.plan.seed)), 0, 0, {}, 0)
        del at
        weights = sent_weights.file_of(self.order)
        registration = Registration(
            self.order, self.carrier, self.journal, self._say, self._pause, self.poll, self.signers, weights
        )
        ready = register(registration, self.members)
        away = {
            site: "it was not connected when the run began" for site in self.order.everyone if site not in self.members
        }
        self._part = Participation.read(
            self.folder / "records.jsonl", self._at.records, {**away, **registration.missing}
        )
        self._records = Records(
            self.folder / "records.jsonl", self._at.records, self.order.label or self.plan.method, self.plan.seed
        )
        federation = FlareFederation(
            self.order,
            self.carrier,
            self.folder / "under-way",
            self.journal,
            ready,
            self.plan.seed,
            self.signers,
            Count(self._at.number, self._at.answered),
            self.limits,
        )
        federation.keep(self._at.kept)
        self._say("running", "", self._at.round)
        try:
            if self.order.mode == "survey":
                self._survey(federation)
            else:
                if self._at.unscored:
                    self._judge(federation)
                if not self._at.trained:
                    self._train(federation)
                self._finish(federation)
        finally:
            self._records.close()
        register(registration, ready, "end")
        if without := self._part.without(self.order.everyone if self.order.mode == "survey" else self.plan.sites):
            self._why = "without " + "; ".join(f"{site} ({reason})" for site, reason in without.items())
            self.journal.write("without", {"sites": without})

    def _train(self, federation: FlareFederation) -> None:
        start = time.perf_counter()
        for step in self._steps(federation):
            following = self.method.request(step.state)
            over = following is None or following.round != step.request.round
            done = step.request.round + 1 if over else self._at.round
            self._records.step(step, done, time.perf_counter() - start)
            last = following is None or done >= self.plan.rounds
            due = self.order.score_every > 0 and over and (done % self.order.score_every == 0 or last)
            self._save(federation, step.state, done, unscored=due)
            self._part.step(step.asked, step.lost)
            if due:
                self._judge(federation)
            since = self._status.get("away", {})  # the supervisor reinstates sites with a later contact
            self._status["away"] = {s: since.get(s, time.time()) for s, why in step.lost.items() if why == AWAY}
            self._say("running", "", done)
            self._pause()
            start = time.perf_counter()
            dict.clear(step.reply.parts)  # type: ignore[arg-type]  # it is large, and the run loop keeps a reference
            del step, following  # the request holds the previous model
        self._save(federation, self._at.state, self._at.round, trained=True)

    def _steps(self, federation: FlareFederation) -> Iterator[Step[Any]]:
        order, sites = self.order, federation.sites
        if order.mode == "buffered":
            left, buffer = self.plan.rounds - self._at.round, min(order.buffer, len(sites))
            if buffer < order.buffer:
                self.journal.write("smaller buffer", {"asked for": order.buffer, "sites": list(sites)})
            return train_async(
                self.method,
                federation,
                self._at.state,
                updates=left,
                buffer=buffer,
                passes=order.passes,
                discount=self.method.capabilities.discount or undiscounted,
                gate=self._gate,
            )
        trainers = [site for site in sites if site in self.plan.sites]
        size = min(order.sites_per_round or len(trainers), len(trainers))
        sampler = UniformSampler(tuple(trainers), size, self.plan.seed)
        return train(
            self.method,
            federation,
            self._at.state,
            rounds=self.plan.rounds,
            sampler=sampler,
            deadline=order.deadline,
            min_replies=order.min_replies,
            gate=self._gate,
        )

    @property
    def _gate(self) -> ReplyValidator:
        """The validator of replies."""
        limits = self.limits
        ratios = {"weight_ratio": limits.weight_ratio or None, "norm_ratio": limits.norm_ratio or None}
        return ReplyValidator(**ratios, counts=limits.counts)

    def _judge(self, federation: FlareFederation) -> None:
        """Score the saved model on the sites' validation data, keep it if it is the best so far, and save a
        checkpoint.
        """
        state, done = self._at.state, self._at.round
        scores = dict[str, float]()
        for site, leaves in evaluate(self.method, federation, state, federation.sites, "score/val").items():
            metrics = {name: float(value) for name, value in leaves.items() if name != "n"}
            self._records.write("scores", round=done, role="val", site=site, metrics=metrics, n=int(leaves["n"]))
            if self.order.best.get("metric") in metrics and site in self.plan.sites:
                scores[site] = metrics[self.order.best["metric"]]
        if scores:
            before = BestRound(self.order.best["higher"], self._at.best, self._at.score, self._at.scores)
            best = before.after(done, scores)
            self._at = replace(self._at, scores=best.scores)
            if best.round == done:
                kept = dict(federation.count.answered)
                tensor_file.write(
                    self._best(done), RunCheckpoint(state, done, 0, kept, 0, best=done, score=best.score, kept=kept)
                )
                self._at = replace(self._at, best=done, score=best.score, kept=kept)
                federation.keep(kept)
        self._save(federation, state, done)

    def _best(self, round: int) -> Path:
        return self.folder / f"best-{round}.safetensors"

    def _survey(self, federation: FlareFederation) -> None:
        """Request every site's data description, without training."""
        federation.send(Request(0, {}, JOB), federation.sites)
        descriptions, lost = dict[str, Any](), dict[str, str]()
        for arrival in federation.replies(self.order.deadline):
            if arrival.reply is not None:
                descriptions[arrival.site] = read_description(arrival.reply, arrival.site)
            else:
                lost[arrival.site] = arrival.lost
        self._part.step(federation.sites, lost)
        write_private(self.folder / "survey.json", json.dumps(dict(sorted(descriptions.items())), indent=1))
        self._save(federation, self._at.state, 1, trained=True)
        self._say("running", "", 1)

    def _finish(self, federation: FlareFederation) -> None:
        """Write the model, and evaluate it on test data if the run request says so."""
        end = self._at
        tested: RunCheckpoint = states.load(self._best(end.best)) if end.best else end
        if end.best:
            federation.look_back()
        tensor_file.write(self.folder / "model.safetensors", dict(self.method.shared_model(tested.state)))
        if self.order.test:
            self.journal.write("test opened", {"round": tested.round})
            self._test(federation, tested)
            opened = sum(entry["event"] == "test opened" for entry in verify(self.folder / "journal.jsonl"))
            self._records.write("sealed", opened=opened)
        self._save(federation, end.state, end.round, trained=True)

    def _test(self, federation: FlareFederation, tested: RunCheckpoint) -> None:
        """Record test scores by site, and per-patient predictions if a site's policy releases them."""
        predictions: Mapping[str, Tree] = {}
        if self.order.test == "predict/test":
            predictions = evaluate(self.method, federation, tested.state, federation.sites, "predict/test")
        for site, leaves in predictions.items():
            metrics = self.method.task.scores(leaves)
            self._records.write("test", round=tested.round, site=site, metrics=metrics, n=len(leaves["patient"]))
        others = [site for site in federation.sites if site not in predictions]
        scored = evaluate(self.method, federation, tested.state, others, "score/test") if others else {}
        for site, leaves in scored.items():
            metrics = {name: float(value) for name, value in leaves.items() if name != "n"}
            self._records.write("test", round=tested.round, site=site, metrics=metrics, n=int(leaves["n"]))
        known = evaluate(self.method, federation, tested.state, list(predictions), "predict/val") if predictions else {}
        for name, answers in (("predictions", predictions), ("validation", known)):
            if answers:
                leaves = {f"{site}/{key}": leaf for site, outputs in answers.items() for key, leaf in outputs.items()}
                tensor_file.write(self.folder / f"{name}.safetensors", leaves)

    def _load(self) -> RunCheckpoint | None:
        path = self.folder / "checkpoint.safetensors"
        if not path.exists():
            return None
        checkpoint: RunCheckpoint = states.load(path)
        return checkpoint

    def _save(
        self, federation: FlareFederation, state: Any, done: int, trained: bool = False, unscored: bool = False
    ) -> None:
        length = self._records.sync()
        count = federation.count
        self._at = replace(
            self._at,
            state=state,
            round=done,
            number=count.number,
            answered=dict(count.answered),
            records=length,
            trained=trained,
            unscored=unscored,
        )
        _, sha256 = tensor_file.write(self.folder / "checkpoint.safetensors", self._at)
        for old in self.folder.glob("best-*.safetensors"):
            if old != self._best(self._at.best):
                old.unlink()
        self.journal.write("checkpoint", {"round": done, "number": count.number, "state": sha256})
        federation.confirm()

    def _say(self, phase: str, why: str, done: int | None = None, waiting: Mapping[str, str] | None = None) -> None:
        """Write status.json, which people and the supervisor read."""
        previous = getattr(self, "_status", {"round": 0})
        self._status = previous | _phase(phase, why) | {"waiting": dict(waiting or {})}
        if done is not None:
            self._status["round"] = done
        self._status["rounds"] = self.plan.rounds
        if hasattr(self, "_part"):
            self._status |= self._part.facts()
        write_private(self.folder / "status.json", json.dumps(self._status), durable=False)

    def _pause(self) -> None:
        """Raise ``Pause`` if the supervisor has requested one."""
        if (self.folder / "pause").exists():
            why = (self.folder / "pause").read_text()
            (self.folder / "pause").unlink(missing_ok=True)
            raise Pause(why or "paused")


class Pause(RunError):
    """The supervisor requests a new attempt at this round boundary. The message says why."""


def write_failure(folder: Path, why: str) -> None:
    """Write into the status of the run in ``folder`` that it cannot begin, and why; it is not tried again."""
    file = private_folder(folder) / "status.json"
    write_private(file, json.dumps({**read_json(file, default={"round": 0}), **_phase(FAILED, why)}), durable=False)


def model_bytes(order: RunRequest) -> int:
    """Return the bytes of the model that ``order`` trains."""
    plan = order.build_plan()
    return tree.nbytes(plan.build_task().first(plan.seed))


def _phase(phase: str, why: str) -> dict[str, Any]:
    me = os.getpid()
    return {"phase": phase, "why": why, "pid": me, "birth": birth(me), "beat": time.time()}


def _all_refuse(error: Exception) -> bool:
    """Return whether too few replies came because every missing site refused, so that a retry would not help."""
    reasons = list(error.lost.values()) if isinstance(error, TooFewReplies) else []
    return bool(reasons) and all(reason.startswith("refused") for reason in reasons)

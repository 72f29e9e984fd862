"""A method run: one method with one seed and fold is trained, scored on validation data, and tested once at the end.

A checkpoint is written after every round, so that a run resumes with bit-identical results. The test data are used for
the model of the best round, and every use is recorded in the journal.
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from polyclinic.core import serialization as states
from polyclinic.core.execution import UniformSampler
from polyclinic.core.rounds import Step, TooFewReplies, train
from polyclinic.core.site import Compute, Site
from polyclinic.core.tree import Tree
from polyclinic.data.federation import Federated
from polyclinic.data.splits import Fold
from polyclinic.engines import step_file
from polyclinic.engines.best_round import BestRound
from polyclinic.engines.local.in_process import InProcess
from polyclinic.engines.local.virtual_time import Unequal
from polyclinic.engines.local.worker_pool import Workers
from polyclinic.engines.plan import build_method
from polyclinic.engines.ray.site_actors import RaySites
from polyclinic.evaluation.own_metrics import metrics_with
from polyclinic.evaluation.site_scores import scores_on_test
from polyclinic.learning.tasks.task_evaluation import evaluate
from polyclinic.methods import registry
from polyclinic.privacy.budget_policy import SCORES, Budget
from polyclinic.privacy.ledger import Ledger
from polyclinic.studies.config import simulation_schema
from polyclinic.studies.config.method_plan import POOLED
from polyclinic.studies.config.study_config import Study
from polyclinic.studies.records import site_outliers
from polyclinic.studies.records.checkpoint import Checkpoint
from polyclinic.studies.records.run_description import own_metrics
from polyclinic.studies.records.time_profile import Stopwatch
from polyclinic.studies.run import round_progress, run_budgets
from polyclinic.studies.run.events import Event, Job, cores
from polyclinic.studies.run.resolved_study import ResolvedMethod
from polyclinic.studies.run.round_progress import WatchedFederation
from polyclinic.studies.run.run_directory import MethodRunFolder, write_statistics, write_tensors

ENDS_EARLY = ("local", "pooled")
"""Baselines that a study's ``patience`` ends: training at one place, where early stopping is usual."""


class MethodRun:
    """One method with one seed and one fold.

    Args:
        study: The study; in a trial of a search, with its number of rounds.
        hash: The hash of the study that is run.
        job: The method, seed and fold.
        resolved: The method and its plan.
        data: The split of the data.
        folder: The folder of the method run.
        numbers: A number for each patient, by which test sets are compared between method runs.
        profile: Whether to write where the time went (``records.time_profile``).
        idle: Actors of a Ray cluster between the method runs of a study.
    """

    def __init__(
        self,
        study: Study,
        hash: str,
        job: Job,
        resolved: ResolvedMethod,
        data: Federated,
        folder: MethodRunFolder,
        numbers: Mapping[str, int],
        profile: bool = False,
        idle: list[Any] | None = None,
    ) -> None:
        self.study, self.hash, self.job, self.data, self.folder = study, hash, job, data, folder
        self.plan, self.method = resolved.plan, resolved.method
        self.seed, self.numbers = job.seed, numbers
        self.label, self.entry, self.path = job.method.called, registry.entry(job.method.name), folder.path
        every = self.entry.newcomers
        self.judged = tuple(sorted(site for site in data.sites if every or site in self.plan.sites))
        self.tested = tested_sites(self.judged, data.external, job.fold)
        self.ledgers: dict[str, Ledger] = {}
        if study.privacy and self.plan.private:
            self.ledgers = run_budgets.opened(self.path / "ledgers", self.plan.sites, data.info.name, study.privacy)
        self.watch, self.profile, self.idle = Stopwatch(), profile, idle

    def run(self, *before: Mapping[str, Any]) -> Iterator[Event]:
        """Run from the last checkpoint. The records ``before`` are written before the first round."""
        at, file = None, self.path / "checkpoint.safetensors"
        if file.exists():
            at = states.load(file)
            if at.done:
                return
            if self.study.machines and simulation_schema.buffered(self.method):
                at = None  # pending replies are in no checkpoint: it starts again, with bit-identical results
        self.folder.open(at.records if at else 0)
        try:
            if at is None:
                for fact in before:
                    self.folder.record(**fact)
                yield self._event("arm", 0)
            else:
                yield self._event("arm", at.round)
            with self.watch.phase("starting"):
                engine = self._engine(at)
            try:
                yield from self._train(engine, at)
            finally:
                engine.close()
        finally:
            (self.path / round_progress.NAME).unlink(missing_ok=True)
            step_file.remove(self.path)
            self.folder.close()
            if self.profile:
                self.watch.write(self.path, {**self.job.who, "engine": self.study.engine.kind})

    def _train(self, engine: Any, at: Checkpoint | None) -> Iterator[Event]:
        study = self.study
        state = at.state if at else self.method.init(self.method.task.first(self.seed))
        best = self._best(at)
        done, begun = at.round if at else 0, _now(engine)
        steps: list[Step[Any]] = []
        scores: dict[str, float] = {}
        exchanges: Iterator[Step[Any]] = iter(()) if self._stalled(done, best) else self._steps(engine, state)
        if self.ledgers or study.attack is not None:
            exchanges = self._as_far_as_it_goes(exchanges)
        for step in self._measured(exchanges):
            state, steps = step.state, [*steps, step]
            self.watch.sites.update(step.seconds)  # type: ignore[arg-type]
            following = self.method.request(state)
            if following is not None and following.round == step.request.round:
                continue  # the round takes another message
            done = step.request.round + 1
            facts = _round_facts(steps)
            self._record("round", round=done, wall=_now(engine) - begun, **facts)
            for site, reason in facts["lost"].items():
                self._record("quarantine", round=done, site=site, reason=reason)
            paid = self._account(done) if self.ledgers else {}
            self.folder.note("round", self.job.who | {"round": done, "lost": facts["lost"], **paid})
            if done % study.evaluation.interval == 0 or self._ends(state, done):
                scores, best = self._judge(engine, state, done, best)
            with self.watch.phase("saving"):
                length, clock = self.folder.settle(), getattr(engine, "clock", 0.0)
            self._save(
                "checkpoint", Checkpoint(state, engine.memory, done, length, best.round, best.score, False, clock)
            )
            moved = sum(facts["bytes_up"].values()) + sum(facts["bytes_down"].values())
            shown = {"epsilon": max(paid["epsilon"].values()), "protects": paid["protects"]} if paid else {}
            yield self._event("round", done, scores=scores, bytes=moved, lost=facts["lost"], **shown)
            self.folder.check_stop()
            steps, begun = [], _now(engine)
            del step  # its request and reply are as large as the model
            if self._stalled(done, best):
                break
        if done % study.evaluation.interval and not self._ends(state, done):  # time, budget or sites ran out
            _, best = self._judge(engine, state, done, best)
        self._record_outliers(state)
        end = Checkpoint(state, engine.memory, done, 0, best.round, best.score, True)
        if self.job.trial is None:
            with self.watch.phase("evaluation"):
                tested = self._test(engine, end)
            yield tested
        else:
            self._save("checkpoint", end)

    def _measured(self, exchanges: Iterator[Step[Any]]) -> Iterator[Step[Any]]:
        """Yield ``exchanges``, whose time counts as merging, except that of the sites."""
        while True:
            with self.watch.phase("merging"):
                step = next(exchanges, None)
            if step is None:
                return
            yield step
            del step

    def _steps(self, engine: Any, state: Any) -> Iterator[Step[Any]]:
        """Yield the exchanges from ``state`` on."""
        study, trainers = self.study, self.plan.sites
        size = min(study.sites_per_round or len(trainers), len(trainers))
        sampler, need = UniformSampler(trainers, size, self.seed), min(study.min_replies, size)
        how: Any = {"rounds": study.rounds, "sampler": sampler, "deadline": study.deadline, "min_replies": need}
        if study.machines is None:
            watched = WatchedFederation(engine, self.path / round_progress.NAME, self.watch)
            return train(self.method, watched, state, **how)
        return simulation_schema.steps(study.machines, self.method, engine, state, trainers=trainers, **how)

    def _ends(self, state: Any, done: int) -> bool:
        """Return whether training is complete."""
        return done >= self.study.rounds or self.method.request(state) is None

    def _stalled(self, done: int, best: BestRound) -> bool:
        """Return whether a baseline has not improved on validation data for the study's patience, and note it."""
        patience = self.study.evaluation.patience
        if patience is None or self.entry.name not in ENDS_EARLY or not best.round or done - best.round < patience:
            return False
        self.folder.note("no improvement", self.job.who | {"round": done, "best": best.round})
        return True

    def _best(self, at: Checkpoint | None) -> BestRound:
        """Return the best round so far; the latest score of each site is read from the records."""
        none = BestRound(self.study.higher_is_better)
        if at is None:
            return replace(none, score=none.mean)
        latest: dict[str, float] = {}
        for line in (self.path / "records.jsonl").read_bytes().splitlines():
            if line.startswith(b'{"kind":"scores"'):
                fact = json.loads(line)
                latest |= self._deciding(fact["site"], fact["metrics"])
        return replace(none, round=at.best_round, score=at.best_score, scores=latest)

    def _deciding(self, site: str, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return the score of ``site`` that counts in the choice of the best round, if there is one."""
        metric = self.study.metric
        return {site: metrics[metric]} if metric in metrics and site not in self.data.external else {}

    def _judge(self, engine: Any, state: Any, done: int, best: BestRound) -> tuple[dict[str, float], BestRound]:
        """Return the scores on validation data and the best round so far."""
        with self.watch.phase("evaluation"):
            scores = self._score(engine, state, done)
        best = best.after(done, scores)
        if self.study.evaluation.select == "last":
            best = best.with_best(done)
        if best.round == done:
            self._save("best", Checkpoint(state, engine.memory, done, 0, done, best.score, False))
        return scores, best

    def _as_far_as_it_goes(self, steps: Iterator[Step[Any]]) -> Iterator[Step[Any]]:
        """Yield ``steps`` until no site has budget left, or an attack has made the model unusable."""
        try:
            yield from steps
        except TooFewReplies as error:
            if self.ledgers and any("is used up" in reason for reason in error.lost.values()):
                self.folder.note("budget used up", self.job.who)
            elif self.study.attack is not None:
                self.folder.note("ended by the attack", self.job.who | {"lost": dict(error.lost)})
            else:
                raise

    def _record_outliers(self, state: Any) -> None:
        """Record the outliers at the end of training, if there is a robust rule or an attack."""
        notes = site_outliers.notes_in(state)
        hostile = simulation_schema.hostile(self.method) if self.study.attack is not None else ()
        if notes is None and not hostile:
            return
        named = site_outliers.at_the_end(notes, (self.path / "records.jsonl").read_bytes().splitlines())
        for site in self.plan.sites:
            self._record("standing", site=site, named=site in named, hostile=site in hostile)

    def _test(self, engine: Any, end: Checkpoint) -> Event:
        """Test the model of the best round, once."""
        best: Checkpoint = states.load(self.path / "best.safetensors") if end.best_round else end
        engine.memory.update(best.memory)
        opened = self.folder.note("test opened", self.job.who | {"round": best.round})
        answers = evaluate(self.method, engine, best.state, self.tested, "predict/test")
        predictions = {site: {**outputs, **self._numbered(site, "test")} for site, outputs in answers.items()}
        scores: dict[str, float] = {}
        task, classes = self.study.task, len(self.data.info.classes) or 2
        table = metrics_with(task.kind, classes, own_metrics(self.study), bool(task.ordered))
        for site, outputs in predictions.items():
            loss = self.method.task.summary(outputs).get("loss")
            arrays = {name: leaf.numpy() for name, leaf in outputs.items()}
            metrics = scores_on_test(arrays, self.study.task.kind, table)
            metrics |= {} if loss is None else {"loss": loss}
            self._record("test", round=best.round, site=site, metrics=metrics, n=len(outputs["patient"]))
            if self.study.metric in metrics:
                scores[site] = metrics[self.study.metric]
        known = evaluate(self.method, engine, best.state, self.judged, "predict/val")  # thresholds are chosen there
        known = {site: {**outputs, **self._numbered(site, "val")} for site, outputs in known.items()}
        for name, found in (("predictions", predictions), ("validation", known)):
            leaves = {f"{site}/{key}": leaf for site, outputs in found.items() for key, leaf in outputs.items()}
            if leaves:
                write_tensors(self.path / f"{name}.safetensors", leaves)
        meta = {"study": self.hash, "method": self.label, "plan": self.plan.to_json(), "round": str(best.round)}
        write_tensors(self.path / "model.safetensors", self.method.shared_model(best.state), meta)
        if self.data.statistics:
            write_statistics(self.path, self.data.statistics)
        self._record("sealed", opened=opened)
        self._save("checkpoint", replace(end, records=self.folder.settle()))
        return self._event("tested", end.round, scores=scores)

    def _score(self, engine: Any, state: Any, done: int) -> dict[str, float]:
        """Record the scores on validation data, and return the primary metric of each training site."""
        deciding: dict[str, float] = {}
        for site, leaves in evaluate(self.method, engine, state, self.judged).items():
            metrics = {name: float(value) for name, value in leaves.items() if name != "n"}
            self._record("scores", round=done, role="val", site=site, metrics=metrics, n=int(leaves["n"]))
            deciding |= self._deciding(site, metrics)
        return deciding

    def _engine(self, at: Checkpoint | None) -> Any:
        chosen, memory = self.study.engine, at.memory if at else None
        compute = Compute(chosen.threads, chosen.channels_last, chosen.compile)
        make = partial(Site, device=chosen.device_here, seed=self.seed, compute=compute)
        sites = {name: make(name, dict(roles)) for name, roles in self.data.sites.items()}
        if self.entry.pooled:
            sites = {
                name: make(name, {r: d for r, d in site.data.items() if r != "train"}) for name, site in sites.items()
            }
            sites[POOLED] = make(POOLED, dict(self.data.pooled))
        # on one machine, predictions stay in the run folder
        free = (*SCORES, "predict/val", "predict/test")
        policies = {site: Budget(ledger, free) for site, ledger in self.ledgers.items()}
        held = {} if self.data.public is None else {"public": self.data.public}
        if self.study.machines is not None:
            clock = at.clock if at else 0.0
            return simulation_schema.engine(
                self.study.machines, self.method, sites, memory, policies, self.seed, held, clock
            )
        if chosen.kind == "in-process":
            return InProcess(self.method, sites, memory, policies, self.seed, held, self.path)
        if chosen.kind == "ray":
            recipe = self.plan.to_json()
            place = chosen.workers, held, chosen.gpus, self.idle
            return RaySites(build_method, recipe, sites, memory, self.seed, *place)
        workers = chosen.workers or min(len(sites), cores())
        return Workers(self.method, sites, memory, policies, self.seed, workers, held, self.path)

    def _account(self, done: int) -> dict[str, Any]:
        """Record ε of each site so far, with its assumptions. Return ε by site, and the unit that it protects."""
        spent = run_budgets.spent(self.ledgers, last=done == self.study.rounds)
        for site, facts in spent.items():
            self._record("privacy", round=done, site=site, **{k: v for k, v in facts.items() if k != "protects"})
        by_site = {site: facts["epsilon"] for site, facts in spent.items()}
        return {"epsilon": by_site, "protects": next(facts["protects"] for facts in spent.values())}

    def _numbered(self, site: str, role: str) -> Tree:
        """Return the number of each example's patient."""
        return {"patient": torch.tensor([self.numbers[patient] for patient in self.data.sites[site][role].patients])}

    def _save(self, name: str, value: Checkpoint) -> None:
        with self.watch.phase("saving"):
            states.save(self.path / f"{name}.safetensors", value, {"study": self.hash})

    def _record(self, kind: str, **facts: Any) -> None:
        self.folder.record(kind, **self.job.who, **facts)

    def _event(self, what: str, done: int, **facts: Any) -> Event:
        external = external_in(facts.get("scores", ()), self.study, self.data)
        return self.job.event(what, round=done, rounds=self.study.rounds, external=external, **facts)


def tested_sites(judged: Sequence[str], external: Sequence[str], fold: Fold | None) -> tuple[str, ...]:
    """Return the sites whose test data a method run uses. With folds, each patient is tested in one fold of a seed."""
    if fold is None or (fold.by == "patients" and fold.index == 0):
        return tuple(judged)
    return tuple(site for site in judged if (site in external) == (fold.by == "sites"))


def external_in(scores: Iterable[str], study: Study, data: Federated) -> tuple[str, ...]:
    """Return those of the sites that do not train. If each site is left out in turn, all of them train."""
    return () if study.folds == "sites" else tuple(site for site in scores if site in data.external)


def _now(engine: Any) -> float:
    """Seconds from some beginning: the engine's own where its time is virtual."""
    return float(engine.clock) if isinstance(engine, Unequal) else time.perf_counter()


def _round_facts(steps: Sequence[Step[Any]]) -> dict[str, Any]:
    """What the exchanges of one round add up to."""

    def total(name: str) -> dict[str, Any]:
        sums: dict[str, Any] = {}
        for step in steps:
            for site, value in getattr(step, name).items():
                sums[site] = sums.get(site, 0) + value
        return sums

    return {
        "asked": sorted({site for step in steps for site in step.asked}),
        "lost": {site: reason for step in steps for site, reason in step.lost.items()},
        **{name: total(name) for name in ("bytes_up", "bytes_down", "seconds")},
    }

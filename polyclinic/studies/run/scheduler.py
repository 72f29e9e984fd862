"""Execution of a study: every method with every seed and fold, in a run folder from which it resumes after a crash.

``run`` is a generator of events, so that the caller can show progress or end the run early. Method runs are executed
one after the other or in parallel processes, with bit-identical results.
"""

import dataclasses
import json
import math
import os
import shutil
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from polyclinic.core import atomic
from polyclinic.core import serialization as states
from polyclinic.data.federation import DataError, Federated, federate, fingerprint_of
from polyclinic.data.source import release
from polyclinic.data.splits import Fold
from polyclinic.engines.ray import cluster
from polyclinic.engines.ray.site_actors import kill
from polyclinic.errors import ConfigError
from polyclinic.evaluation.records.method_runs import PLAN
from polyclinic.evaluation.records.run_reader import NotARun, read_info
from polyclinic.evaluation.subgroup_results import write_groups
from polyclinic.learning.linear_model import linear_task
from polyclinic.studies.config import search_space
from polyclinic.studies.config.loader import plan_content
from polyclinic.studies.config.study_config import Study, parse, with_values
from polyclinic.studies.records.checkpoint import Checkpoint
from polyclinic.studies.records.run_description import described, simulated
from polyclinic.studies.records.time_profile import RunTimes
from polyclinic.studies.run import data_identity
from polyclinic.studies.run.cluster_runs import ClusterWorkers
from polyclinic.studies.run.events import Event, Job, cores
from polyclinic.studies.run.executors import ChildProcesses, Executor, possible, run_here, run_jobs, warm_up
from polyclinic.studies.run.linear_baselines import linear_files, write_linear_baselines
from polyclinic.studies.run.method_run import MethodRun, external_in
from polyclinic.studies.run.resolved_study import ResolvedStudy, resolve
from polyclinic.studies.run.run_directory import Folder, MethodRunFolder, Note, Stopped, held
from polyclinic.studies.run.run_lock import STOP


def run(
    study: Study,
    text: str,
    path: Path,
    resume: bool = False,
    fresh: bool = False,
    folder: Folder | None = None,
    profile: bool = False,
) -> Generator[Event, None, None]:
    """Resolve ``study`` and run it in the folder at ``path``, which is locked for this process until the end.

    Args:
        study: The study.
        text: Its file, which is copied to the folder.
        path: The run folder.
        resume: Continue the run in the folder, if there is one.
        fresh: Delete the run in the folder, if there is one and this study can run.
        folder: The run folder, if the caller has locked it. It remains locked.
        profile: Write in each method run's folder where its time went (``records.time_profile``).

    Raises:
        ConfigError: If the study's device does not exist here. No data were read.
        BadStudy: If methods cannot be built with these settings and data. Nothing was run.
        DataError: If the data cannot be read or used. Nothing was run.
        DataChanged: If the data are not those that the run to continue began with.
        RunExists: If the folder contains a run, and neither ``resume`` nor ``fresh`` is set.
        RunHeld: If another process works on the run.
        Stopped: If the file ``stop`` in the folder asked for it, between two rounds; ``resume`` continues from there.
        NotChosen: If what a search chose was changed after training had begun with it.
    """
    _ = study.engine.device_here
    times = RunTimes(profile)
    with nullcontext(folder) if folder is not None else held(path) as own, times.entered("cluster", _cluster(study)):
        yield from _run_in(own, resolve(study, text), resume, fresh, times)


def _run_in(folder: Folder, resolved: ResolvedStudy, resume: bool, fresh: bool, times: RunTimes) -> Iterator[Event]:
    path = folder.path
    study, splits, first = resolved.study, resolved.splits, resolved.splits[0]
    work = _Work(resolved, study, path, (study.seeds[0], resolved.jobs[0].fold, first), times)
    try:
        own = path if folder.begun and read_info(path).hash == resolved.hash else None
    except NotARun:  # a damaged run, which may be there to be deleted
        own = None
    plan = plan_content(resolved.text, own)
    if fresh:
        folder.clear()
    try:
        if folder.begun and resume:
            data_identity.require_unchanged(path, read_info(path).data.fingerprint, first, resolved.source)
        elif not folder.begun:
            data_identity.write_identity(path, first, resolved.source)
        folder.begin(resolved.text, resolved.info, resume, plan)
        if study.data.plan is not None:  # from here on, the run's own copy is used
            kept = study.data.model_copy(update={"plan": str(path / PLAN)})
            work.study = study = study.model_copy(update={"data": kept})
        write_groups(path, resolved.source.table(), resolved.numbers, study.evaluation.subgroups)
        release(resolved.source)  # the sites have copies of their examples
        folder.note("resumed" if resume else "begun", {"study": resolved.hash, "data": first.fingerprint})
        notes = [*simulated(study), *(note for data in splits for note in described(data))]
        yield Event("data", notes=(*dict.fromkeys(notes), *resolved.warnings))
        done = work.results() if resume else {}
        jobs = [job for job in resolved.jobs if job.name not in done]
        for job in resolved.jobs:
            if job.name in done:
                scores = done[job.name]
                told = {"scores": scores, "external": external_in(scores, study, first)}
                yield job.event("tested", round=study.rounds, rounds=study.rounds, **told)
        if jobs:
            executor = _executor(work, len(jobs), folder.note)
            yield from run_here(jobs, work, folder.note) if executor is None else run_jobs(jobs, executor)
        if resolved.table:
            with times.measured("baselines"):
                if work.add_linear_baselines():
                    folder.note("linear baselines", {})
        times.write(path)
        folder.finish([job.name for job in resolved.jobs])
        folder.note("finished", {})
    except Stopped:
        folder.note("stopped", {})
        raise
    finally:
        kill(work.idle)
        folder.close_journal()


def _cluster(study: Study) -> AbstractContextManager[None]:
    """Return the connection to the Ray cluster of ``study``, if it runs on one."""
    engine = study.engine
    return cluster.connected(engine.address, engine.workers) if engine.kind == "ray" else nullcontext()


def _executor(work: "_Work", jobs: int, note: Note) -> Executor | None:
    """Return what executes the method runs of a study in other processes, if it is to; ``jobs`` of them remain."""
    study = work.study
    if study.engine.kind == "in-process":
        return None
    workers = study.engine.workers or _capacity(study)
    if possible() and any(study.training_of(method).get("private") for method in study.methods):
        warm_up()
    if not _whole_arms(study, jobs, workers):
        return None
    if study.engine.kind == "ray":
        return _on_cluster(work, jobs, note)
    inside = study.engine.model_copy(update={"kind": "in-process"})  # each method run has one process
    work = dataclasses.replace(work, study=study.model_copy(update={"engine": inside}))
    return ChildProcesses(work, note, workers)


def _on_cluster(work: "_Work", jobs: int, note: Note) -> ClusterWorkers:
    """Return what executes whole method runs on a Ray cluster."""
    path, engine = work.path.absolute(), work.study.engine
    recipe = _recipe(work.resolved, path, work.times.wanted)
    return ClusterWorkers(work_from, recipe, path, note, jobs, engine.workers, engine.gpus, work.times.workers)


def _capacity(study: Study) -> int:
    """Return the number of worker processes that run at once."""
    return cluster.slots(1, study.engine.gpus) if study.engine.kind == "ray" else cores()


def _whole_arms(study: Study, jobs: int, workers: int) -> bool:
    """Return whether worker processes share method runs rather than the sites of one method run."""
    engine = study.engine
    if engine.kind == "ray":
        alone = any(table is not None for table in (study.attack, study.privacy, study.machines))
        return engine.parallel == "arms" or (engine.parallel == "auto" and (alone or jobs >= 2 * workers))
    if engine.kind != "workers" or engine.parallel == "sites" or not possible():
        return False
    usual = (
        engine.device_here == "cpu" and (study.deadline is None or study.machines is not None) and jobs >= 2 * workers
    )
    return engine.parallel == "arms" or (usual and workers > 1)


def _recipe(resolved: ResolvedStudy, path: Path, profile: bool) -> str:
    """Return what a worker on another machine needs in order to execute the method runs of a study, as JSON."""
    told = {
        "text": resolved.text,
        "folder": str(path),
        "current": os.getcwd(),
        "study": resolved.hash,
        "data": resolved.splits[0].fingerprint,
        "device": resolved.study.engine.device,
        "profile": profile,
    }
    return json.dumps(told)


def work_from(recipe: str) -> tuple["_Work", dict[str, Job]]:
    """Build, on another machine, the executor of the method runs of a study and all method runs by name.

    Raises:
        PolyclinicError: If the study or its data differ from those of the process that made ``recipe``.
    """
    told = json.loads(recipe)
    if Path(told["current"]).is_dir():  # paths in the study may be relative
        os.chdir(told["current"])
    study = parse(told["text"], Path(told["folder"]) / "study.toml")
    if study.hash != told["study"]:
        raise ConfigError("the study was changed on the command line: write the changes into its file")
    resolved = resolve(study, told["text"])
    if resolved.splits[0].fingerprint != told["data"]:
        raise DataError("the data differ from those of the machine that started the run")
    engine = study.engine.model_copy(update={"kind": "in-process", "device": told["device"]})
    study = study.model_copy(update={"engine": engine})
    latest = (study.seeds[0], resolved.jobs[0].fold, resolved.splits[0])
    work = _Work(resolved, study, Path(told["folder"]), latest, RunTimes(told["profile"]))
    return work, {job.name: job for job in resolved.jobs}


@dataclasses.dataclass
class _Work:
    """Executes method runs after their searches. Keeps the latest split, which the next method run often shares.

    Attributes:
        resolved: What the validation built.
        study: The study, with the engine that the method runs use.
        path: The run folder.
        latest: Seed, fold and data of the latest split.
        times: Seconds outside of method runs, and whether each of these writes where its time went.
        idle: Actors of a Ray cluster that wait for the sites of the next method run.
    """

    resolved: ResolvedStudy
    study: Study
    path: Path
    latest: tuple[int, Fold | None, Federated]
    times: RunTimes = dataclasses.field(default_factory=RunTimes)
    idle: list[Any] = dataclasses.field(default_factory=list)

    def results(self) -> dict[str, dict[str, float]]:
        """Return the test scores of the finished method runs by name."""
        found: dict[str, dict[str, float]] = {}
        for job in self.resolved.jobs:
            file = self.path / "arms" / job.name / "checkpoint.safetensors"
            if file.is_file() and states.load(file).done:
                found[job.name] = {}
        for job, fact in self._tests():
            if job.name in found:
                found[job.name][fact["site"]] = fact["metrics"].get(self.study.metric, math.nan)
        return found

    def _tests(self) -> Iterator[tuple[Job, Mapping[str, Any]]]:
        from polyclinic.evaluation.records.record_schema import record_files

        by_key = {(j.method.called, j.seed, j.fold.index if j.fold else 0): j for j in self.resolved.jobs}
        for file in record_files(self.path, [job.name for job in self.resolved.jobs]):
            for line in file.read_bytes().split(b"\n")[:-1]:
                if line.startswith(b'{"kind":"test"'):
                    fact = json.loads(line)
                    yield by_key[fact["method"], fact["seed"], fact.get("fold", 0)], fact

    def __call__(self, job: Job, note: Note) -> Generator[Event, None, None]:
        """Execute one method run from its last checkpoint, after its search."""
        folder = MethodRunFolder(self.path / "arms" / job.name, note, self.path / STOP)
        folder.path.mkdir(parents=True, exist_ok=True)
        facts: list[dict[str, Any]] = []
        if self.study.search is not None:
            yield from self._search(job, folder)
            job, facts = self._chosen(job, folder)
        yield from self._arm(self.study, job, folder).run(*facts)

    def add_linear_baselines(self) -> bool:
        """Write the linear baselines of a table that are missing, and return whether there were any."""
        task, added = linear_task(self.resolved.task), False
        if task is None:
            return False
        for seed, fold in dict.fromkeys((job.seed, job.fold) for job in self.resolved.jobs):
            files = linear_files(self.path, seed, fold)
            if not all(file.is_file() for file in files.values()):
                write_linear_baselines(files, task, self._data(seed, fold), fold, self.resolved.numbers)
                added = True
        return added

    def _arm(self, study: Study, job: Job, folder: MethodRunFolder, sealed: bool = False) -> MethodRun:
        data = self._data(job.seed, job.fold)
        data = _sealed(data) if sealed else data
        method, profile = self.resolved.method(job, data, study), self.times.wanted and job.trial is None
        return MethodRun(
            study, self.resolved.hash, job, method, data, folder, self.resolved.numbers, profile, self.idle
        )

    def _data(self, seed: int, fold: Fold | None) -> Federated:
        if self.latest[:2] != (seed, fold):
            self.latest = (seed, fold, self._federated(seed, fold))
        return self.latest[2]

    def _federated(self, seed: int, fold: Fold | None) -> Federated:
        """Read the data again, and split them.

        Raises:
            DataChanged: If they are not those that the study was resolved with.
        """
        resolved, data = self.resolved, self.study.data
        began, first = resolved.splits[0].fingerprint, resolved.jobs[0]
        if fingerprint_of(data, first.seed, first.fold, resolved.source) != began:
            raise data_identity.DataChanged(
                f"{self.path}: the data at {data.path} changed while the study was running: restore them and continue "
                "with --resume, or start again with --fresh"
            )
        split = federate(data, seed, fold, resolved.source)
        release(resolved.source)
        return split

    def _search(self, job: Job, folder: MethodRunFolder) -> Iterator[Event]:
        """Try settings on validation data, each in a separate method run without test data."""
        spec, file = self.study.search, folder.path / "search.jsonl"
        assert spec is not None
        if file.exists():
            return
        study = self.study.model_copy(update={"rounds": spec.rounds or self.study.rounds})
        settings = spec.settings(job.method.called, job.seed, job.fold.index if job.fold else 0)
        lines = []
        for trial, values in enumerate(settings):
            one = dataclasses.replace(job, method=with_values(job.method, values), trial=trial)
            own = MethodRunFolder(folder.path / "trials" / str(trial), folder.note, folder.stop)
            begun = time.process_time()
            for _ in self._arm(study, one, own, sealed=True).run():
                pass
            end: Checkpoint = states.load(own.path / "checkpoint.safetensors")
            score = end.best_score if math.isfinite(end.best_score) else None
            facts = {"trial": trial, "values": values, "score": score}
            spent = {"rounds": end.round, "seconds": time.process_time() - begun}
            lines.append({"kind": "trial", **job.who, **facts, **spent})
            folder.note("trial", job.who | facts)
            scores = {} if score is None else {"validation": score}
            yield job.event("trial", round=trial + 1, rounds=len(settings), scores=scores)
        atomic.write(file, search_space.trial_lines(lines))
        shutil.rmtree(folder.path / "trials", ignore_errors=True)

    def _chosen(self, job: Job, folder: MethodRunFolder) -> tuple[Job, list[dict[str, Any]]]:
        """Return the job with the chosen settings, and the records of the search.

        Raises:
            NotChosen: If the file cannot be used, or was changed after training had begun.
        """
        file, trials = folder.path / "chosen.toml", search_space.read_trials(folder.path / "search.jsonl")
        best = search_space.best(trials, self.study.higher_is_better)
        if not file.exists():
            search_space.write_chosen(file, job.method.called, best["values"], best["score"], self.study.metric)
        values = search_space.read_chosen(file)
        method = with_values(job.method, values, file)
        by = "search" if values == best["values"] else "hand"
        chosen = {"kind": "chosen", **job.who, "values": values, "by": by}
        if (folder.path / "checkpoint.safetensors").exists():
            search_space.require_unchanged(folder.path, chosen)
        else:
            folder.note("chosen", {k: v for k, v in chosen.items() if k != "kind"})
        return dataclasses.replace(job, method=method), [*trials, chosen]


def _sealed(data: Federated) -> Federated:
    """Return ``data`` without test patients and external sites."""
    sites = {s: {r: e for r, e in roles.items() if r != "test"} for s, roles in data.sites.items()}
    return dataclasses.replace(data, sites={s: sites[s] for s in data.training}, external=())

"""Method runs on a cluster, with threads in the place of Ray's processes: order, notes, deaths, refusals, the end."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from polyclinic.engines.ray.cluster import ClusterError
from polyclinic.errors import DataError
from polyclinic.studies.run import cluster_runs
from polyclinic.studies.run.cluster_runs import SHARED, ClusterWorkers
from polyclinic.studies.run.events import Event
from polyclinic.studies.run.executors import DEATHS, MethodRunFailed, run_jobs
from polyclinic.studies.run.run_directory import Stopped
from tests.support.known import known


class RayError(Exception):
    """A worker died."""


class RayTaskError(RayError):
    """A task raised."""


class Threads:
    """What ``cluster_runs`` uses of Ray. An actor with coroutines has an event loop, any other one thread."""

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)
    util = SimpleNamespace(
        scheduling_strategies=SimpleNamespace(NodeAffinitySchedulingStrategy=lambda node, soft: (node, soft))
    )

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.options, self.timeouts = list[dict[str, Any]](), list[float | None]()
        self.killed, self.actors = list[Any](), list[Any]()
        self.starts = True
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def close(self) -> None:
        async def end() -> None:
            waiting = asyncio.all_tasks() - {asyncio.current_task()}
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self.loop).result(timeout=300)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(timeout=300)
        self.loop.close()
        for actor in self.actors:
            actor.pool.shutdown(wait=False)

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_job_id=lambda: "job-1", get_node_id=lambda: "this node")

    def remote(self, **options: Any) -> Callable[[type], Any]:
        self.options.append(options)

        def actor_of(kind: type) -> Any:
            def made(*given: Any) -> Any:
                actor = SimpleNamespace(kind=kind.__name__, object=kind(*given), pool=ThreadPoolExecutor(1))
                for name in (name for name in vars(kind) if not name.startswith("_")):
                    setattr(actor, name, SimpleNamespace(remote=self._call(actor, name)))
                self.actors.append(actor)
                return actor

            return SimpleNamespace(remote=made)

        return actor_of

    def _call(self, actor: Any, name: str) -> Callable[..., Future[Any]]:
        function = getattr(actor.object, name)
        if asyncio.iscoroutinefunction(function):
            return lambda *given: asyncio.run_coroutine_threadsafe(function(*given), self.loop)
        return lambda *given: actor.pool.submit(function, *given) if self.starts else Future()

    def get(self, reference: Future[Any]) -> Any:
        return reference.result(timeout=300)

    def wait(self, references: list[Any], num_returns: int, timeout: float | None) -> tuple[list[Any], list[Any]]:
        assert num_returns == 1
        self.timeouts.append(timeout)
        done = wait(references, timeout=300 if timeout is None else timeout, return_when=FIRST_COMPLETED).done
        assert done or timeout is not None, "nothing happens any more"
        return [reference for reference in references if reference in done][:1], []

    def kill(self, actor: Any) -> None:
        self.killed.append(actor)


@dataclass
class Job:
    name: str


@dataclass
class Cluster:
    """A cluster of threads, and what its workers do: ``work`` for each method run, after ``refusal`` if it is set."""

    ray: Threads
    folder: Path
    work: Callable[[Any, Any], Iterator[Event]]
    refusal: str = ""
    notes: list[Any] | None = None
    started: list[dict[str, Any]] = field(default_factory=list)

    def make(self, recipe: str) -> tuple[Any, dict[str, Any]]:
        if self.refusal:
            raise DataError(self.refusal)
        assert recipe == "the recipe"
        return self.work, {f"run-{i}": Job(f"run-{i}") for i in range(6)}

    def note(self, event: str, details: dict[str, Any]) -> int:
        self.notes = [*(self.notes or []), (event, details)]
        return len(self.notes)

    def go(self, count: int = 4, workers: int | None = 2, gpus: float = 0.0) -> list[Event]:
        jobs: list[Any] = [Job(f"run-{i}") for i in range(count)]
        try:
            given = self.folder, self.note, count, workers, gpus, self.started
            return list(run_jobs(jobs, ClusterWorkers(self.make, "the recipe", *given)))
        finally:
            assert not (self.folder / SHARED).exists()
            assert {id(actor) for actor in self.ray.actors} == {id(actor) for actor in self.ray.killed}

    @property
    def workers(self) -> int:
        return sum(actor.kind == "Runner" for actor in self.ray.actors)


def usual(job: Job, note: Any) -> Iterator[Event]:
    yield Event("arm", job.name, notes=("read",), external=("osaka",))
    assert note("test opened", {"method": job.name}) >= 1
    yield Event("tested", job.name, scores={"lyon": 0.5}, epsilon=1.5)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    ray, threads = Threads(), torch.get_num_threads()
    monkeypatch.setattr(cluster_runs, "ray", lambda: ray)
    monkeypatch.setattr(cluster_runs, "slots", lambda cpus, gpus: 3)
    yield Cluster(ray, tmp_path, usual)
    ray.close()
    torch.set_num_threads(threads)


def test_every_run_is_executed_once_and_its_events_arrive_as_they_were_sent(cluster: Cluster) -> None:
    events = cluster.go()
    assert sorted(e.label for e in events if e.what == "tested") == [f"run-{i}" for i in range(4)]
    for name in {e.label for e in events}:
        first, last = (e for e in events if e.label == name)
        assert first == Event("arm", name, notes=("read",), external=("osaka",))
        assert last == Event("tested", name, scores={"lyon": 0.5}, epsilon=1.5)
    assert sorted(details["method"] for _, details in known(cluster.notes)) == [f"run-{i}" for i in range(4)]
    assert {event for event, _ in known(cluster.notes)} == {"test opened"}
    assert cluster.workers == 2


def test_the_start_of_each_worker_is_measured(cluster: Cluster) -> None:
    made = cluster.make

    def slow(recipe: str) -> Any:
        time.sleep(0.2)
        return made(recipe)

    cluster.make = slow  # type: ignore[method-assign]
    both = threading.Barrier(2, timeout=300)  # so that both workers are needed

    def working(job: Job, note: Any) -> Iterator[Event]:
        both.wait()
        yield from usual(job, note)

    cluster.work = working
    begun = time.perf_counter()
    cluster.go()
    whole = time.perf_counter() - begun
    assert [one["machine"] for one in cluster.started] == [socket.gethostname()] * 2
    for one in cluster.started:
        assert 0.2 <= one["reading"] <= whole
        assert 0 <= one["starting"] <= whole - 0.2


@pytest.mark.parametrize(("count", "given", "started"), [(1, 5, 1), (5, None, 3), (6, 4, 4)])
def test_there_are_no_more_workers_than_runs_or_places(
    cluster: Cluster, count: int, given: int | None, started: int
) -> None:
    cluster.go(count, given, gpus=0.5)
    assert cluster.workers == started
    assert {"num_cpus": 1, "num_gpus": 0.5, "max_restarts": 0} in cluster.ray.options
    (mailbox,) = (options for options in cluster.ray.options if "num_gpus" not in options)
    assert mailbox["num_cpus"] == 0
    assert mailbox["scheduling_strategy"] == ("this node", False)  # another machine may die


@pytest.mark.parametrize(
    ("error", "raised", "says"),
    [
        (DataError("no such file"), MethodRunFailed, "^no such file$"),
        (ZeroDivisionError("by zero"), RuntimeError, r"(?s)Traceback.*ZeroDivisionError: by zero"),
        (Stopped("stopped as asked"), Stopped, "^stopped as asked$"),
    ],
)
def test_a_run_that_ends_early_ends_all_with_its_reason(
    cluster: Cluster, error: Exception, raised: type[Exception], says: str
) -> None:
    def failing(job: Job, note: Any) -> Iterator[Event]:
        yield Event("arm", job.name)
        raise error

    cluster.work = failing
    with pytest.raises(raised, match=says) as caught:
        cluster.go(workers=1)
    assert caught.type is raised
    assert cluster.notes is None


def test_a_stop_waits_for_the_rounds_that_are_under_way(cluster: Cluster) -> None:
    """Of two runs, one stops at once; the other completes its round, and no third begins."""
    both = threading.Barrier(2, timeout=300)
    begun: list[str] = []

    def stopping(job: Job, note: Any) -> Iterator[Event]:
        begun.append(job.name)
        both.wait()
        if job.name == "run-1":
            yield from usual(job, note)
        raise Stopped("stopped as asked")

    cluster.work = stopping
    with pytest.raises(Stopped, match="stopped as asked"):
        cluster.go()
    assert sorted(begun) == ["run-0", "run-1"]
    assert cluster.notes == [("test opened", {"method": "run-1"})]


def test_a_run_whose_worker_dies_continues_on_a_new_one(cluster: Cluster) -> None:
    died: list[str] = []

    def dying(job: Job, note: Any) -> Iterator[Event]:
        if job.name == "run-1" and len(died) < DEATHS - 1:
            died.append(job.name)
            raise SystemExit
        yield from usual(job, note)

    cluster.work = dying
    cluster.ray.get = died_if_left(cluster.ray.get)  # type: ignore[method-assign,assignment]
    events = cluster.go()
    assert sorted(e.label for e in events if e.what == "tested") == [f"run-{i}" for i in range(4)]
    assert cluster.workers == 2 + DEATHS - 1


def test_a_run_whose_workers_die_again_and_again_fails(cluster: Cluster) -> None:
    begun: list[str] = []

    def dying(job: Job, note: Any) -> Iterator[Event]:
        begun.append(job.name)
        raise SystemExit
        yield

    cluster.work = dying
    cluster.ray.get = died_if_left(cluster.ray.get)  # type: ignore[method-assign,assignment]
    with pytest.raises(MethodRunFailed, match=rf"\(RayError\) died {DEATHS} times.*--resume continues"):
        cluster.go(1, 1)
    assert len(begun) == DEATHS


def died_if_left(get: Callable[[Future[Any]], Any]) -> Callable[[Future[Any]], Any]:
    """``get`` that reports a thread that was left as Ray reports a process that ended."""

    def got(reference: Future[Any]) -> Any:
        try:
            return get(reference)
        except SystemExit:
            raise RayError("the worker died") from None

    return got


def test_workers_that_die_before_they_are_ready_end_the_run(cluster: Cluster) -> None:
    def make(recipe: str) -> Any:
        raise SystemExit

    cluster.make = make  # type: ignore[method-assign]
    cluster.ray.get = died_if_left(cluster.ray.get)  # type: ignore[method-assign,assignment]
    with pytest.raises(ClusterError, match=f"^{DEATHS} workers died while they started: the worker died"):
        cluster.go(workers=1)
    assert cluster.workers == DEATHS


def test_a_task_that_cannot_be_executed_shows_its_error(cluster: Cluster) -> None:
    def make(recipe: str) -> Any:
        raise RayTaskError("ImportError: torch")

    cluster.make = make  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match=r"^ImportError: torch$"):
        cluster.go(workers=1)


def test_a_cluster_without_a_free_place_is_named_after_a_while(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_runs, "START", 0.05)
    cluster.ray.starts = False
    with pytest.raises(ClusterError, match=r"no worker could start within 0\.05 s"):
        cluster.go()
    assert cluster.ray.timeouts == [0.05]


def test_a_worker_refuses_data_that_differ_a_folder_that_is_not_shared_and_other_versions(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    node = socket.gethostname()
    cluster.refusal = "the data differ"
    with pytest.raises(ClusterError, match=f"^on the machine {node}: the data differ$"):
        cluster.go()
    runner = cluster_runs.Runner(cluster.make, "the recipe", str(tmp_path), None)
    for content in (None, "another mark"):
        if content is not None:
            (tmp_path / SHARED).write_text(content)
        problem = json.loads(runner.prepare("the mark"))["problem"]
        assert problem.startswith(f"the machine {node} does not see the run folder {tmp_path}: choose with --out")
    (tmp_path / SHARED).unlink()
    cluster.refusal = ""
    monkeypatch.setattr(cluster_runs, "installation", lambda: json.dumps({"torch": "0.1"}))
    with pytest.raises(ClusterError, match=rf"the machine {node} has .*torch 0\.1 instead of"):
        cluster.go()

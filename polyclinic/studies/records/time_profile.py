"""Where the time of a run went: seconds by phase, method run and site, in ``profile.json`` of the run folder.

```
{"seconds": 41.2, "cluster": 0.0, "reading": 3.1, "baselines": 0.4, "report": 2.4, "workers": [], "method_runs": [
 {"method": "fedavg", "seed": 0, "engine": "in-process", "phases": {"training": 20.3, "merging": 0.2, ...},
  "sites": {"lyon": 9.8, ...}}, ...]}
```
Phases are seconds of the process that runs a method, by the clock, and do not overlap; ``sites`` are the computing
times of the sites in training, measured by the processes that hold them, which may run at the same time. With method
runs in parallel, their sum exceeds ``seconds``. ``workers`` are the processes of a cluster that execute whole method
runs: until a worker has started and read the data, no method run uses it. The trials of a search are not included.
"""

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, Field, ValidationError

from polyclinic.core import atomic

NAME = "profile.json"
PARTS = "profile-run.json"
"""What was measured outside of method runs, until ``collect`` joins it with them."""
PHASES = ("starting", "training", "merging", "evaluation", "saving", "other")
"""Workers start and receive their sites' data; sites train and exchange messages; the server validates, sums and
updates; models are scored and tested; files."""
NOT_SPLIT = (
    "training over workers contains messages, waiting and the first reading of a site's data by its worker; they "
    "overlap with computing and are not split. A site's seconds are those of its worker."
)


@dataclass
class RunTimes:
    """Seconds of a run outside of its method runs.

    Attributes:
        wanted: Whether they are to be written.
        cluster: Starting a Ray cluster or connecting to one.
        baselines: Linear baselines of a table.
        workers: For each worker that executes whole method runs on a cluster: its machine, and the seconds in which its
            process started and in which it read the study and its data.
    """

    wanted: bool = False
    cluster: float = 0.0
    baselines: float = 0.0
    workers: list[dict[str, Any]] = field(default_factory=list)

    @contextmanager
    def entered(self, name: str, context: AbstractContextManager[None]) -> Iterator[None]:
        """Enter ``context``, and count the time that this takes for ``name``."""
        with ExitStack() as stack:
            with self.measured(name):
                stack.enter_context(context)
            yield

    @contextmanager
    def measured(self, name: str) -> Iterator[None]:
        """Count the time within the context for ``name``."""
        begun = time.perf_counter()
        yield
        setattr(self, name, round(time.perf_counter() - begun, 4))

    def write(self, run: Path) -> None:
        """Write the times to the run folder ``run``, if they are wanted."""
        if self.wanted:
            parts = {"cluster": self.cluster, "baselines": self.baselines, "workers": self.workers}
            atomic.write(run / PARTS, json.dumps(parts))


class Stopwatch:
    """Measures phases that may be nested; the time of an inner phase does not count for the outer one.

    Attributes:
        seconds: Seconds by phase, including those of no phase as ``other``.
        sites: Seconds by site.
    """

    def __init__(self) -> None:
        """Start the watch."""
        self.seconds, self.sites = Counter[str](), Counter[str]()
        self._phases, self._since = ["other"], time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time within the context for the phase ``name``."""
        self.lap()
        self._phases.append(name)
        try:
            yield
        finally:
            self.lap()
            self._phases.pop()

    def lap(self) -> None:
        """Count the time until now for the current phase."""
        now = time.perf_counter()
        self.seconds[self._phases[-1]] += now - self._since  # type: ignore[assignment]
        self._since = now

    def write(self, folder: Path, who: Mapping[str, Any]) -> None:
        """Write the times of one method run, which ``who`` identifies, to its folder."""
        self.lap()
        phases = {name: round(self.seconds[name], 4) for name in PHASES}
        sites = {site: round(seconds, 4) for site, seconds in sorted(self.sites.items())}
        atomic.write(folder / NAME, json.dumps({**who, "phases": phases, "sites": sites}))


def collect(run: Path, seconds: float, reading: float) -> dict[str, Any]:
    """Join the times of the method runs of the run folder ``run`` in one file, and return its content.

    Args:
        run: The run folder.
        seconds: Duration of the run until now.
        reading: Seconds until the data were read and distributed to sites, with those of a cluster.
    """
    files = sorted(run.glob(f"arms/*/{NAME}"))
    parts = json.loads((run / PARTS).read_text(encoding="utf-8"))
    found = {
        "seconds": round(seconds, 4),
        "reading": round(reading - parts["cluster"], 4),
        "report": 0.0,
        **parts,
        "method_runs": [json.loads(file.read_text(encoding="utf-8")) for file in files],
    }
    atomic.write(run / NAME, json.dumps(found, indent=1))
    for file in (*files, run / PARTS):
        file.unlink()
    return found


def add_report(run: Path, found: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """Add the duration of the report to the profile ``found`` of the run folder ``run``, and return it."""
    found = {**found, "seconds": round(found["seconds"] + seconds, 4), "report": round(seconds, 4)}
    atomic.write(run / NAME, json.dumps(found, indent=1))
    return found


Seconds: TypeAlias = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Worker(BaseModel):
    machine: str
    starting: Seconds
    reading: Seconds


class _MethodRun(BaseModel):
    method: str
    seed: int
    fold: int | None = None
    engine: str
    phases: dict[Literal["starting", "training", "merging", "evaluation", "saving", "other"], Seconds] = Field(
        min_length=len(PHASES)
    )
    sites: dict[str, Seconds]


class _Profile(BaseModel):
    seconds: Seconds
    cluster: Seconds
    reading: Seconds
    baselines: Seconds
    report: Seconds
    workers: list[_Worker]
    method_runs: list[_MethodRun]


def read(run: Path) -> dict[str, Any] | None:
    """Return the profile of the run folder ``run``; None if there is none, or it is damaged."""
    try:
        profile = _Profile.model_validate_json((run / NAME).read_bytes())
    except (OSError, ValidationError):
        return None
    return profile.model_dump(exclude_none=True)


def run_parts(profile: Mapping[str, Any]) -> dict[str, float]:
    """Return the seconds of the parts of a run outside of its method runs, in their order, without those of none."""
    parts = {name: float(profile[name]) for name in ("cluster", "reading", "baselines", "report")}
    return {name: seconds for name, seconds in parts.items() if seconds or name in ("reading", "report")}


def notes(profile: Mapping[str, Any]) -> list[str]:
    """Return sentences on what the table of ``profile`` does not show: the start of workers, and what is not split."""
    told = []
    if workers := profile["workers"]:
        starting, reading = (max(worker[key] for worker in workers) for key in ("starting", "reading"))
        told.append(
            f"{len(workers)} workers of the cluster executed whole method runs at the same time, after starting (up to "
            f"{starting:.1f} s) and reading the data (up to {reading:.1f} s)."
        )
    if any(one["engine"] != "in-process" for one in profile["method_runs"]):
        told.append(NOT_SPLIT)
    return told


def table(profile: Mapping[str, Any], most: int = 5) -> Sequence[str]:
    """Return the lines of a table of ``profile``: phases of each method run, and its ``most`` slowest sites."""
    names = [name_of(one) for one in profile["method_runs"]]
    width = max([len(name) for name in names], default=0)
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in run_parts(profile).items())
    lines = [f"{profile['seconds']:.1f} s: {parts}"]
    if names:
        lines.append(" " * width + "".join(f"{phase:>12}" for phase in PHASES) + "   slowest sites in training")
    for name, one in zip(names, profile["method_runs"], strict=True):
        slowest = sorted(one["sites"].items(), key=lambda item: (-item[1], item[0]))[:most]
        sites = ", ".join(f"{site} {seconds:.1f}" for site, seconds in slowest)
        lines.append(f"{name:<{width}}" + "".join(f"{one['phases'][phase]:>12.1f}" for phase in PHASES) + f"   {sites}")
    return [*lines, *notes(profile)]


def name_of(one: Mapping[str, Any]) -> str:
    """Return the name of a method run of a profile."""
    fold = f", fold {one['fold']}" if "fold" in one else ""
    return f"{one['method']} (seed {one['seed']}{fold})"

"""Where the time of a run went: seconds by phase, method run and site, in ``profile.json`` of the run folder.

```
{"seconds": 41.2, "reading": 3.1, "report": 2.4, "method_runs": [
 {"method": "fedavg", "seed": 0, "phases": {"training": 20.3, "merging": 0.2, ...}, "sites": {"lyon": 9.8, ...}}, ...]}
```
Phases are seconds of the process that runs a method, by the clock, and do not overlap; ``sites`` are the computing
times of the sites in training, which may run at the same time. With method runs in parallel, their sum exceeds
``seconds``. The trials of a search are not included.
"""

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from polyclinic.core import atomic

NAME = "profile.json"
PHASES = ("training", "merging", "evaluation", "saving", "other")
"""Sites train and exchange messages; the server validates, sums and updates; models are scored and tested; files."""


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


def collect(run: Path, seconds: float, reading: float, report: float) -> dict[str, Any]:
    """Join the times of the method runs of the run folder ``run`` in one file, and return its content.

    Args:
        run: The run folder.
        seconds: Duration of the whole run.
        reading: Seconds until the data were read and distributed to sites.
        report: Seconds of writing the report.
    """
    files = sorted(run.glob(f"arms/*/{NAME}"))
    found = {
        "seconds": round(seconds, 4),
        "reading": round(reading, 4),
        "report": round(report, 4),
        "method_runs": [json.loads(file.read_text(encoding="utf-8")) for file in files],
    }
    atomic.write(run / NAME, json.dumps(found, indent=1))
    for file in files:
        file.unlink()
    return found


def table(profile: Mapping[str, Any], most: int = 5) -> Sequence[str]:
    """Return the lines of a table of ``profile``: phases of each method run, and its ``most`` slowest sites."""
    names = [_name(one) for one in profile["method_runs"]]
    width = max([len(name) for name in names], default=0)
    lines = [f"{profile['seconds']:.1f} s: reading {profile['reading']:.1f}, report {profile['report']:.1f}"]
    if names:
        lines.append(" " * width + "".join(f"{phase:>12}" for phase in PHASES) + "   slowest sites in training")
    for name, one in zip(names, profile["method_runs"], strict=True):
        slowest = sorted(one["sites"].items(), key=lambda item: (-item[1], item[0]))[:most]
        sites = ", ".join(f"{site} {seconds:.1f}" for site, seconds in slowest)
        lines.append(f"{name:<{width}}" + "".join(f"{one['phases'][phase]:>12.1f}" for phase in PHASES) + f"   {sites}")
    return lines


def _name(one: Mapping[str, Any]) -> str:
    fold = f", fold {one['fold']}" if "fold" in one else ""
    return f"{one['method']} (seed {one['seed']}{fold})"

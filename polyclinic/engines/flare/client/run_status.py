"""Current work of a run at a site and its last problem, in a file that ``site status`` reads."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from polyclinic.core.atomic import write_private
from polyclinic.engines.flare import flare_processes
from polyclinic.engines.flare.protocol.messages import Call
from polyclinic.engines.flare.protocol.paths import SetupError, read_json


class RunStatus:
    """Status file of one run, written by its job process; it names the process, so that a killed process counts as
    idle.
    """

    def __init__(self, folder: Path) -> None:
        """Use the run whose site state is in ``folder``."""
        self.path = folder / "status.json"
        with suppress(SetupError, OSError):
            before = read_json(self.path, default={"problem": "", "since": 0.0})
            self._problem, self._since = str(before.get("problem", "")), float(before.get("since", 0.0))
            return
        self._problem, self._since = "", 0.0

    @contextmanager
    def working(self, call: Call) -> Iterator[None]:
        """Record the work for its duration; a registration is no work."""
        if call.kind in ("hello", "end"):
            yield
            return
        self._write({"kind": call.kind, "job": call.job, "round": call.round + 1, "since": time.time()})
        try:
            yield
        finally:
            self._write({})

    def came_of(self, call: Call, lost: str) -> None:
        """Record a call's outcome. A failure is a problem until a call succeeds; waiting for a person is not."""
        problem = "" if lost.startswith("waits for") or (call.kind == "end" and not lost) else lost
        if problem != self._problem and (problem or call.kind != "end"):
            self._problem, self._since = problem, time.time() if problem else 0.0
            self._write({})

    def _write(self, doing: dict[str, Any]) -> None:
        me = os.getpid()
        status = {
            "pid": me,
            "birth": flare_processes.birth(me),
            "doing": doing,
            "problem": self._problem,
            "since": self._since,
        }
        with suppress(OSError):  # a full disk must not stop the work
            write_private(self.path, json.dumps(status), durable=False)

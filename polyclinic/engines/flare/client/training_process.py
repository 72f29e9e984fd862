"""Training process: holds data, model and PyTorch; if it dies, the site starts another one or reports why.

The job process at a site (``executor``, ``site_agent``) imports no PyTorch and moves files; the training process opens
no connection. They exchange lines of JSON over two pipes, and values as files. The training process dies with its
parent.
"""

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from polyclinic.engines.flare.protocol.paths import WEIGHTS, SiteFolder
from polyclinic.errors import RunError

DEATHS = 3
LINE = 2**20


class Stopped(RunError):
    """The run was ended, or its deadline passed, during training. The message says which."""


class Died(RunError):
    """The training process died. The message says how."""


class TrainingProcess:
    """Handle of the training process, which is started when needed and restarted when it has died."""

    def __init__(self, home: Path, run: str, log: Path, stopped: Callable[[], bool] = lambda: False) -> None:
        """Serve one run at the site in ``home``; the process's output goes to the file ``log``."""
        self.home, self.run, self.log, self.stopped = home, run, log, stopped
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process number; 0 if there is no process."""
        return self._process.pid if self._process else 0

    def warm(self) -> None:
        """Start the process before there is work, so that it loads its libraries while the server does."""
        self._process = self._process or self._start()

    def do(self, command: Mapping[str, Any], deadline: float | None = None) -> dict[str, Any]:
        """Return the result of a command. A process that dies is replaced and the command repeated, up to three times.

        Raises:
            Died: If it died every time.
            Stopped: If the run ended or ``deadline`` seconds passed; the process is killed.
        """
        end = time.monotonic() + deadline if deadline else None
        for attempt in range(DEATHS):
            try:
                return self._once(command, end)
            except Died:
                self.close()
                if attempt == DEATHS - 1:
                    raise
        raise AssertionError

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe:
                    pipe.close()
            self._process = None

    def _once(self, command: Mapping[str, Any], end: float | None) -> dict[str, Any]:
        self.warm()
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(command).encode() + b"\n")
            process.stdin.flush()
        except OSError:
            raise Died(self._how(process)) from None
        line = b""
        while not line.endswith(b"\n"):
            if self.stopped() or (end is not None and time.monotonic() > end):
                self.close()
                raise Stopped("the run was ended" if self.stopped() else "no answer in time")
            if select.select([process.stdout], [], [], 0.2)[0]:
                piece = os.read(process.stdout.fileno(), LINE)
                if not piece:
                    raise Died(self._how(process))
                line += piece
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _start(self) -> subprocess.Popen[bytes]:
        env = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        env[WEIGHTS] = str(SiteFolder(self.home).weights)
        with open(self.log, "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "polyclinic.engines.flare.client.training_process", str(self.home), self.run],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=env,
            )

    def _how(self, process: subprocess.Popen[bytes]) -> str:
        try:
            code = process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "its training process does not answer"
        how = f"killed by signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"its training process died ({how}); is there enough memory? See {self.log.name} at the site"


def main(home: str, run: str) -> None:
    """Execute commands from standard input and write their results, until the input is closed."""
    _die_with_parent()
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output of libraries goes to the log
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from polyclinic.engines.flare.client.training_worker import Training

    training = Training(SiteFolder(Path(home)), run)
    for line in sys.stdin.buffer:
        out.write(json.dumps(training.do(json.loads(line))).encode() + b"\n")
        out.flush()


def _die_with_parent() -> None:
    """End this process when its parent has ended."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Training process: holds data, model and PyTorch; if it dies, the site starts another one or reports why.

The job process at a site (``executor``, ``site_agent``) imports no PyTorch and moves files; the training process opens
no connection. They exchange lines of JSON over two pipes, and values as files. The training process dies with its
parent.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from polyclinic.engines.flare.line_process import Ended, LineProcess
from polyclinic.engines.flare.protocol.paths import WEIGHTS, SiteFolder
from polyclinic.errors import RunError

DEATHS = 3


class Stopped(RunError):
    """The run was ended, or its deadline passed, during training. The message says which."""


class Died(RunError):
    """The training process died. The message says how."""


class TrainingProcess:
    """Handle of the training process, which is started when needed and restarted when it has died."""

    def __init__(self, home: Path, run: str, log: Path, stopped: Callable[[], bool] = lambda: False) -> None:
        """Serve one run at the site in ``home``; the process's output goes to the file ``log``."""
        self.log, self.stopped = log, stopped
        environment = {
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            WEIGHTS: str(SiteFolder(home).weights),
        }
        self._process = LineProcess(["-m", __name__, str(home), run], log, environment)

    @property
    def pid(self) -> int:
        """The process number; 0 if there is no process."""
        return self._process.pid

    def warm(self) -> None:
        """Start the process before there is work, so that it loads its libraries while the server does."""
        self._process.start()

    def do(self, command: Mapping[str, Any], deadline: float | None = None) -> dict[str, Any]:
        """Return the result of a command. A process that dies is replaced and the command repeated, up to three times.

        Raises:
            Died: If it died every time.
            Stopped: If the run ended or ``deadline`` seconds passed; the process is killed.
        """
        end = time.monotonic() + deadline if deadline else None
        for attempt in range(DEATHS):
            try:
                answer: dict[str, Any] = self._process.exchange(
                    command, lambda: self.stopped() or (end is not None and time.monotonic() > end)
                )
                return answer
            except TimeoutError:
                raise Stopped("the run was ended" if self.stopped() else "no answer in time") from None
            except Ended as error:
                if attempt == DEATHS - 1:
                    raise Died(
                        f"its training process died ({error}); is there enough memory? See {self.log.name} at the site"
                    ) from None
        raise AssertionError

    def close(self) -> None:
        """End the process."""
        self._process.close()


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

"""Coordinator's connection to its FLARE server, in a separate process because FLARE's client may hang.

``AdminConnection`` starts the process, waits for each answer for a limited time, and restarts the process after a
timeout.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from polyclinic.engines.flare.line_process import Ended, LineProcess
from polyclinic.errors import RunError

PATIENCE = 40.0


class NoAnswer(RunError):
    """The server did not answer or refused. The message is FLARE's or Polyclinic's."""


class AdminConnection:
    """Client of the server's administration interface; one command at a time."""

    def __init__(self, kit: Path, log: Path, patience: float = PATIENCE) -> None:
        """Use the coordinator's startup kit ``kit``; wait at most ``patience`` seconds for an answer."""
        self.patience = patience
        self._process = LineProcess(["-m", __name__, str(kit)], log)

    def sites(self) -> dict[str, float]:
        """Return the connected sites, each with the time of its last contact."""
        connected: dict[str, float] = self._execute("sites")
        return connected

    def submit(self, job: Path) -> str:
        """Sign and submit the job in a folder, and return its number."""
        return str(self._execute("submit", str(job)))

    def status(self, job: str) -> str:
        """Return FLARE's status of a job, such as ``RUNNING`` or ``FINISHED:COMPLETED``."""
        return str(self._execute("status", job))

    def abort(self, job: str) -> None:
        """End a job."""
        self._execute("abort", job)

    def disable(self, site: str) -> None:
        """Exclude a site, now and after restarts."""
        self._execute("disable", site)

    def enable(self, site: str) -> None:
        """Admit an excluded site again."""
        self._execute("enable", site)

    def close(self) -> None:
        """End the process."""
        self._process.close()

    def _execute(self, what: str, *arguments: str) -> Any:
        end = time.monotonic() + self.patience
        try:
            good, value = self._process.exchange([what, *arguments], lambda: time.monotonic() > end)
        except TimeoutError:
            raise NoAnswer(f"the server did not answer within {self.patience:g} s") from None
        except Ended as error:
            raise NoAnswer(f"the connection to the server was closed ({error})") from None
        if not good:
            raise NoAnswer(value)
        return value


def main(kit: str) -> None:
    """Read commands from standard input and write their results, until the input is closed."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    session = None
    for line in sys.stdin.buffer:
        what, *arguments = json.loads(line)
        try:
            session = session or _session(kit)
            answer = [True, _do(session, what, arguments)]
        except Exception as error:  # FLARE may raise anything
            answer = [False, f"{type(error).__name__}: {error}"]
            if type(error).__name__ in ("NoConnection", "SessionClosed", "SessionExpired", "InternalError"):
                _close(session)
                session = None
        out.write(json.dumps(answer).encode() + b"\n")
        out.flush()
    os._exit(0)  # FLARE's client leaves threads behind that never end


def _session(kit: str) -> Any:
    from nvflare.fuel.flare_api.flare_api import new_secure_session

    from polyclinic.engines.flare.pki.provisioning import COORDINATOR

    return new_secure_session(COORDINATOR, kit, timeout=15.0)


def _close(session: Any) -> None:
    if session is not None:
        session.close()


def _do(session: Any, what: str, arguments: list[str]) -> Any:
    match what:
        case "sites":
            return {info.name: float(info.last_connect_time) for info in session.get_system_info().client_info}
        case "submit":
            return session.submit_job(arguments[0])
        case "status":
            return session.get_job_meta(arguments[0])["status"]
        case "abort":
            session.abort_job(arguments[0])
        case "disable":
            session.disable_client(arguments[0])
        case "enable":
            session.enable_client(arguments[0])
        case _:
            raise ValueError(f"there is no command {what!r}")
    return None


if __name__ == "__main__":
    main(sys.argv[1])

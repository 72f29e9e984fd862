"""Child processes that answer each line of JSON on standard input with one line of JSON on standard output.

Requires no PyTorch.
"""

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from polyclinic.errors import RunError

PIECE = 2**20
LOOK_EVERY = 0.2
"""Seconds between two looks at whether waiting has become pointless."""


class Ended(RunError):
    """The child process ended without an answer. The message says how."""


class LineProcess:
    """A child process, which is started when it is needed and again when it has ended."""

    def __init__(self, arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        """Run this Python with ``arguments``; ``environment`` is added, and standard error is appended to ``log``."""
        self.arguments, self.log, self.environment = tuple(arguments), log, dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process number; 0 if there is no process."""
        return self._process.pid if self._process else 0

    def start(self) -> None:
        """Start the process, unless it runs."""
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, *self.arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **self.environment},
            )

    def exchange(self, value: Any, expired: Callable[[], bool]) -> Any:
        """Send ``value`` and return the answer. Without an answer, the process is killed.

        Raises:
            Ended: If the process ended.
            TimeoutError: If ``expired`` returned True first. It is called several times a second.
        """
        self.start()
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        line = b""
        try:
            process.stdin.write(json.dumps(value).encode() + b"\n")
            process.stdin.flush()
            while not line.endswith(b"\n"):
                if expired():
                    self.close()
                    raise TimeoutError
                if select.select([process.stdout], [], [], LOOK_EVERY)[0]:
                    piece = os.read(process.stdout.fileno(), PIECE)
                    if not piece:
                        raise BrokenPipeError
                    line += piece
        except ConnectionError:
            how = _how(process)
            self.close()
            raise Ended(how) from None
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe:
                    pipe.close()
            self._process = None


def _how(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        return "it closed its output"
    return f"killed by signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

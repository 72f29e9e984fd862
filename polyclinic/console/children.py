"""Commands that the console starts: the same that a person types, each in a process of its own.

What needs PyTorch runs in such a process, so that the console stays small. A command that runs for long, such as a
study, continues when the console ends.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polyclinic.engines.flare.protocol.messages import printable

COMMANDS = "polyclinic.cli.app"
MAX_OUTPUT = 2**20
KEPT = 20
SHOWN_LINES = 12


@dataclass
class Child:
    """One command.

    Attributes:
        number: Its number on this console.
        what: A description for the page.
        command: The words after ``polyclinic``.
        begun: When it began.
        code: Its exit code; None while it runs.
        out: File with its standard output. ``log``: with its standard error.
        about: What the command works on, for the page.
        start: Position in ``log`` at which its part begins.
    """

    number: int
    what: str
    command: tuple[str, ...]
    out: Path
    log: Path
    process: subprocess.Popen[bytes]
    about: str = ""
    begun: float = field(default_factory=time.time)
    code: int | None = None
    ended: float = 0.0
    start: int = 0

    def look(self) -> bool:
        """Return whether it has ended since the last call."""
        if self.code is None and (code := self.process.poll()) is not None:
            self.code, self.ended = code, time.time()
            return True
        return False

    @property
    def result(self) -> Any:
        """The JSON document that it printed; None if it printed none."""
        try:
            with open(self.out, "rb") as file:
                return json.loads(file.read(MAX_OUTPUT))
        except (OSError, ValueError, RecursionError):
            return None

    @property
    def output(self) -> str:
        """The last lines of its standard error."""
        with suppress(OSError), open(self.log, "rb") as file:
            file.seek(max(self.start, os.fstat(file.fileno()).st_size - 8000))
            lines = file.read().decode(errors="replace").replace("\r", "\n").splitlines()
            return "\n".join(printable(line, 400) for line in lines[-SHOWN_LINES:] if line.strip())
        return ""

    def facts(self) -> dict[str, Any]:
        """Return what a page shows of it."""
        words = " ".join(["polyclinic", *self.command])
        about = {"number": self.number, "what": self.what, "about": self.about, "command": words}
        return {**about, "begun": self.begun, "code": self.code, "ended": self.ended, "output": self.output}


class Children:
    """The commands that this console has started."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="polyclinic-console-", ignore_cleanup_errors=True)
        self._all: list[Child] = []
        self._count = 0

    def start(
        self, what: str, words: Sequence[str], *, about: str = "", log: Path | None = None, module: str = COMMANDS
    ) -> Child:
        """Start ``polyclinic`` with ``words`` in a session of its own.

        Args:
            what: A description for the page.
            words: The command's words, none of which comes from a page unchecked.
            about: What it works on.
            log: File to which its standard error is appended; a temporary one by default.
            module: The module that runs, if it is not the command line.
        """
        self._count += 1
        folder = Path(self._folder.name)
        out, log = folder / f"{self._count}.out", log or folder / f"{self._count}.log"
        log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        start = log.stat().st_size if log.exists() else 0
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        with open(out, "wb") as stdout, open(log, "ab") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *words],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env=environment,
                start_new_session=True,
            )
        child = Child(self._count, what, tuple(words), out, log, process, about, start=start)
        self._all.append(child)
        ended = [one for one in self._all if one.code is not None]
        for old in ended[: max(0, len(self._all) - KEPT)]:
            self._all.remove(old)
            old.out.unlink(missing_ok=True)
        return child

    def look(self) -> list[Child]:
        """Return the commands that have ended since the last call."""
        return [child for child in self._all if child.look()]

    def running(self, what: str, about: str = "") -> bool:
        """Return whether a command with this description runs."""
        return any(child.code is None and (child.what, child.about) == (what, about) for child in self._all)

    def facts(self) -> list[dict[str, Any]]:
        """Return what a page shows of the commands, the latest first."""
        return [child.facts() for child in reversed(self._all)]

    def close(self) -> None:
        """Forget them. Those that run continue, and what they print then is lost unless they have a log."""
        self._folder.cleanup()

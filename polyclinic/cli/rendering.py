"""Output of the command line: two consoles, JSON documents, log levels, and streams that always encode.

Results are printed by ``console`` (or ``print``). Progress and hints are printed by ``progress``, which ``--quiet``
silences. With ``--json``, standard output carries one JSON document, and progress goes to standard error.
"""

import codecs
import dataclasses
import io
import json
import logging
import math
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console, ConsoleDimensions
from rich.text import Text

from polyclinic.errors import ConfigError

_PLAIN = {
    "✓": "ok",
    "✗": "x",
    "·": "-",
    "—": "-",
    "–": "-",
    "−": "-",
    "─": "-",
    "…": "...",
    "ε": "epsilon",
    "δ": "delta",
    "λ": "lambda",
    "μ": "mu",
    "σ": "sigma",
    "²": "^2",
    "±": "+/-",
    "≤": "<=",
    "≥": ">=",
    "×": "x",
    "→": "->",
    "█": "#",
    "•": "*",
    "│": "|",
    "╭": "+",
    "╮": "+",
    "╰": "+",
    "╯": "+",
    "‘": "'",
    "’": "'",
    "“": '"',
    "”": '"',
    "é": "e",
    "\u00a0": " ",
    "\u202f": " ",
}
UNWRAPPED = 100_000
"""Columns of output that is no terminal: a line stays a line in a file or a pipe."""
Json = Annotated[bool, Parameter(name="--json", help="Print one JSON document to standard output and nothing else.")]
Emit = Callable[[Any], None]


class SharedConsole(Console):
    """A console that wraps lines on a terminal only."""

    @property  # type: ignore[misc]
    def size(self) -> ConsoleDimensions:
        """Columns and rows of the terminal. Files and pipes have as many columns as a line needs."""
        size = super().size
        return size if self.is_terminal else ConsoleDimensions(UNWRAPPED, size.height)

    def on_broken_pipe(self) -> None:
        """Leave a closed pipe to ``main``, which ends the command with the exit code for it."""
        raise BrokenPipeError


console = SharedConsole(highlight=False)
progress = SharedConsole(highlight=False)
_invocation: list[str] = []


def line(text: str) -> None:
    """Print a line of a result as it is: brackets are no markup, and the line is not wrapped."""
    console.print(text, markup=False, soft_wrap=True)


def hint(text: str) -> None:
    """Print what to do next or how far a command is, unless ``--quiet`` was given."""
    progress.print(text, markup=False, soft_wrap=True)


def done(text: str) -> None:
    """Print a line of a result with a check mark."""
    console.print(Text.assemble("  ", ("✓", "green"), f" {text}"), soft_wrap=True)


@contextmanager
def document(as_json: bool) -> Iterator[Emit]:
    """Within the context, results are text, or one JSON document with ``as_json``.

    Yields:
        A function that prints its argument as the JSON document, and does nothing without ``as_json``. With
        ``as_json``, other output to standard output is discarded, and progress goes to standard error.
    """
    if not as_json:
        yield lambda value: None
        return
    out, before, progress.stderr = sys.stdout, progress.stderr, True
    try:
        with redirect_stdout(io.StringIO()):
            yield lambda value: print(json.dumps(plain(value), indent=1), file=out)
    finally:
        progress.stderr = before


def plain(value: Any) -> Any:
    """Convert to types of JSON: records become objects, paths text, and numbers that are not finite null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)


def confirmed(question: str) -> bool:
    """Ask a question on standard error; only ``y`` confirms. Without a terminal the answer is no."""
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() == "y"


def note_invocation(words: Sequence[str]) -> None:
    """Store the words of this command, for ``resume_command``."""
    _invocation[:] = words


def resume_command(default: Sequence[str]) -> str:
    """Return the command that continues this one: all its options, and ``--resume``.

    Args:
        default: The words of the command if it was called from Python.
    """
    words = [word for word in _invocation or default if word.partition("=")[0] not in ("--resume", "--fresh")]
    return shlex.join(["polyclinic", *words, "--resume"])


def set_up_streams() -> None:
    """Replace characters that the encoding of standard output or error lacks, instead of raising an error."""
    codecs.register_error("polyclinic", _replaced)
    for stream in (sys.stdout, sys.stderr):
        if (reconfigure := getattr(stream, "reconfigure", None)) is not None:
            reconfigure(errors="polyclinic")


class JsonLines(logging.Formatter):
    """Messages as one JSON object a line: ``time``, ``level``, ``logger``, ``message``; ``facts`` of a journal entry.

    The text of an exception may quote a value of a data file. Of exceptions, also among the arguments of a message, the
    type and the place in the code are written, and never the text.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a message."""
        if isinstance(record.args, tuple):
            shown = tuple(type(a).__name__ if isinstance(a, BaseException) else a for a in record.args)
            message = str(record.msg) % shown if shown else str(record.msg)
        else:
            message = record.getMessage()
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        entry: dict[str, Any] = {
            "time": time,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": message,
        }
        if facts := getattr(record, "facts", None):
            entry["facts"] = facts
        if record.exc_info and (error := record.exc_info[1]) is not None:
            frames = traceback.extract_tb(error.__traceback__)
            entry["error"] = type(error).__name__
            entry["at"] = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]
        return json.dumps(entry, default=str)


def set_up_logging(
    quiet: bool, verbose: bool, log_file: Path | None, log_format: str = "text", log_level: str = "debug"
) -> None:
    """Set the levels of the ``polyclinic`` logger.

    Args:
        quiet: Print no progress and no hints, and of the messages errors only.
        verbose: Print debugging messages to standard error; warnings and errors otherwise.
        log_file: Append every message to this file, with its time.
        log_format: ``text``, or ``json`` for one JSON object a line.
        log_level: The lowest level of messages in the file.

    Raises:
        ConfigError: If both ``quiet`` and ``verbose`` are set, or the file cannot be written.
    """
    if quiet and verbose:
        raise ConfigError("--quiet and --verbose exclude each other: give one of them")
    progress.quiet = quiet
    log = logging.getLogger("polyclinic")
    for handler in log.handlers:
        handler.close()
    log.handlers[:] = []
    log.propagate = False
    log.setLevel(logging.DEBUG)
    shown: logging.Handler = logging.StreamHandler()
    shown.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    if sys.stderr.isatty():
        from rich.logging import RichHandler

        shown = RichHandler(console=Console(stderr=True), show_path=False, show_time=False)
    shown.setLevel(logging.DEBUG if verbose else logging.ERROR if quiet else logging.WARNING)
    log.addHandler(shown)
    if log_file is not None:
        try:
            written = logging.FileHandler(log_file, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--log-file {log_file}: {error.strerror}. Name a file in a writable folder") from None
        plain = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
        written.setFormatter(JsonLines() if log_format == "json" else plain)
        written.setLevel(log_level.upper())
        log.addHandler(written)


def _replaced(error: UnicodeError) -> tuple[str, int]:
    """Handle an encoding error: write known symbols in ASCII, and others as a question mark."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_PLAIN.get(letter, "?") for letter in error.object[error.start : error.end]), error.end

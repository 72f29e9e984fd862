"""Output of the command line: the console that all commands share, log levels, and streams that always encode."""

import codecs
import logging
import sys
from pathlib import Path

from rich.console import Console, ConsoleDimensions

from polyclinic.errors import ConfigError

_PLAIN = {
    "✓": "ok",
    "✗": "x",
    "·": "-",
    "—": "-",
    "–": "-",
    "─": "-",
    "…": "...",
    "ε": "epsilon",
    "δ": "delta",
    "λ": "lambda",
    "μ": "mu",
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
    "’": "'",
    "“": '"',
    "”": '"',
    "é": "e",
}
UNWRAPPED = 100_000
"""Columns of output that is no terminal: a line stays a line in a file or a pipe."""


class SharedConsole(Console):
    """A console that wraps lines on a terminal only."""

    @property  # type: ignore[misc]
    def size(self) -> ConsoleDimensions:
        """Columns and rows of the terminal. Files and pipes have as many columns as a line needs."""
        found = super().size
        return found if self.is_terminal else ConsoleDimensions(UNWRAPPED, found.height)

    def on_broken_pipe(self) -> None:
        """Leave a closed pipe to ``main``, which ends the command with the exit code for it."""
        raise BrokenPipeError


console = SharedConsole(highlight=False)


def only_json() -> None:
    """Keep standard output for JSON: everything else that the console prints goes to standard error."""
    console.stderr = True


def set_up_streams() -> None:
    """Replace characters that the encoding of standard output or error lacks, instead of raising an error."""
    codecs.register_error("polyclinic", _replaced)
    for stream in (sys.stdout, sys.stderr):
        if (reconfigure := getattr(stream, "reconfigure", None)) is not None:
            reconfigure(errors="polyclinic")


def set_up_logging(quiet: bool, verbose: bool, log_file: Path | None) -> None:
    """Set the levels of the ``polyclinic`` logger.

    Args:
        quiet: Print errors and requested JSON only.
        verbose: Print debugging messages to standard error; warnings and errors otherwise.
        log_file: Append every message to this file, with its time.

    Raises:
        ConfigError: If both ``quiet`` and ``verbose`` are set, or the file cannot be written.
    """
    if quiet and verbose:
        raise ConfigError("--quiet and --verbose exclude each other: give one of them")
    console.quiet = quiet
    log = logging.getLogger("polyclinic")
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
            kept = logging.FileHandler(log_file, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--log-file {log_file}: {error.strerror}. Name a file in a writable folder") from None
        kept.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        kept.setLevel(logging.DEBUG)
        log.addHandler(kept)


def _replaced(error: UnicodeError) -> tuple[str, int]:
    """An error handler of codecs that writes known symbols in ASCII, and others as a question mark."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_PLAIN.get(letter, "?") for letter in error.object[error.start : error.end]), error.end

"""The error of a study file that cannot be run. It lists every problem with file, line, key, value and correction."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from polyclinic.core.config_problems import Problem, line_of
from polyclinic.errors import ConfigError


class BadStudy(ConfigError):
    """A study file that cannot be run. The message lists every problem; nothing was run.

    Attributes:
        lines: The problems: line of the file, key and value, sentence.
    """

    def __init__(self, file: Path | str, text: str, data: Any, problems: Iterable[Problem]) -> None:
        named = Path(file).name or str(file)
        self.lines = sorted((line_of(text, p.path), p.located(data), p.says) for p in dict.fromkeys(problems))
        rows = [(f"{named}:{line}", key, says) for line, key, says in self.lines]
        wide = [max((len(row[i]) for row in rows), default=0) for i in (0, 1)]
        count = f"{len(rows)} problem{'s' if len(rows) != 1 else ''}, nothing was run."
        super().__init__("\n".join([*(f"{a:<{wide[0]}}  {b:<{wide[1]}}  {c}" for a, b, c in rows), count]))

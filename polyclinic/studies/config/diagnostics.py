"""What is wrong with a file that a person wrote: every problem at once, each with file, line, key, value and fix."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import ErrorDetails

from polyclinic.errors import ConfigError
from polyclinic.studies.config.toml_locations import line_of


@dataclass(frozen=True)
class Problem:
    """One thing wrong.

    Attributes:
        path: The key, from the top of the file, as in ``("methods", 1, "mu")``.
        says: What is wrong and what to do, in a sentence.
    """

    path: tuple[str | int, ...]
    says: str


class BadStudy(ConfigError):
    """A study file that cannot be run. The message lists every problem; nothing was run.

    Attributes:
        lines: The problems as (place, key and value, sentence).
    """

    def __init__(self, file: Path | str, text: str, data: Any, problems: Iterable[Problem]) -> None:
        named = Path(file).name or str(file)
        self.lines = sorted(
            (line_of(text, p.path), _key(p.path) + _shown(data, p.path), p.says) for p in dict.fromkeys(problems)
        )
        rows = [(f"{named}:{line}", key, says) for line, key, says in self.lines]
        wide = [max((len(row[i]) for row in rows), default=0) for i in (0, 1)]
        count = f"{len(rows)} problem{'s' if len(rows) != 1 else ''}, nothing was run."
        super().__init__("\n".join([*(f"{a:<{wide[0]}}  {b:<{wide[1]}}  {c}" for a, b, c in rows), count]))


def nearest(word: str, words: Iterable[str]) -> str:
    """A question whether one of ``words`` was meant, where one is near; else nothing."""
    near = difflib.get_close_matches(str(word), list(words), 1, 0.6)
    return f' Did you mean "{near[0]}"?' if near else ""


def sentence(error: ErrorDetails, known: Sequence[str] = ()) -> str:
    """What pydantic found, in words. ``known`` are the keys that would have been allowed there."""
    context, kind = error.get("ctx") or {}, error["type"]
    given = error.get("input")
    match kind:
        case "extra_forbidden":
            return f"unknown key.{nearest(str(error['loc'][-1]), known)}" + (
                "" if nearest(str(error["loc"][-1]), known) or not known else f" There are {', '.join(known)}"
            )
        case "missing":
            return "is missing"
        case "int_type" | "int_from_float" | "int_parsing":
            return f"must be a whole number, not {_plain(given)}"
        case "float_type" | "float_parsing":
            return f"must be a number, not {_plain(given)}"
        case "bool_type" | "bool_parsing":
            return f"must be true or false, not {_plain(given)}"
        case "string_type":
            return f"must be text in quotes, not {_plain(given)}"
        case "finite_number":
            return "must be a finite number"
        case "greater_than_equal":
            return f"must be at least {context['ge']}"
        case "greater_than":
            return f"must be more than {context['gt']}"
        case "less_than_equal":
            return f"must be at most {context['le']}"
        case "less_than":
            return f"must be less than {context['lt']}"
        case "literal_error" | "enum":
            allowed = [word.strip(" '") for word in str(context["expected"]).replace(" or ", ", ").split(",")]
            return f"must be one of {', '.join(allowed)}.{nearest(str(given), allowed)}"
        case "too_short":
            return f"needs at least {context['min_length']}"
        case "tuple_type" | "list_type":
            return f"must be a list in [ ], not {_plain(given)}"
        case "dict_type" | "model_type" | "model_attributes_type":
            return "must be a table, with keys of its own"
        case "string_pattern_mismatch":
            dots = "dots, plus signs and hyphens" if "." in context["pattern"] else "hyphens"
            return f'must be small letters, digits and {dots} only, as in "heart-2026"'
        case "value_error":
            return str(context["error"])
    return error["msg"][0].lower() + error["msg"][1:]


def _plain(value: Any) -> str:
    match value:
        case str():
            return f'the text "{value}"'
        case bool():
            return str(value).lower()
        case list():
            return "a list"
        case dict():
            return "a table"
    return str(value)


def _key(path: Sequence[str | int]) -> str:
    text = ""
    for part in path:
        text += f"[{part + 1}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _shown(data: Any, path: Sequence[str | int]) -> str:
    for part in path:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return ""
    if isinstance(data, dict | list):
        return ""
    return f' = "{data}"' if isinstance(data, str) else f" = {str(data).lower() if isinstance(data, bool) else data}"

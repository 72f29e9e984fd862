"""Problems in a TOML or JSON file that a person wrote: all at once, each with its line, key, value and correction.

The only translation of pydantic's errors into messages, for study files, site policies and run folders. It needs the
error's plain description, not pydantic.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Place = tuple[str | int, ...]

_TABLE = re.compile(r"^\s*\[(?P<array>\[)?\s*(?P<name>[^\[\]]+?)\s*\]?\]\s*(#.*)?$")
_KEY = re.compile(
    r"^\s*(?P<key>(?:[A-Za-z0-9_-]+|\"[^\"]*\"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|\"[^\"]*\"|'[^']*'))*)\s*="
)
_PATTERNS = {
    r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?(==[^@\s=]+)?(@[0-9a-f]{64})?$": (
        'must be the name of a package, optionally with a version and a hash, such as "name==1.2"'
    ),
    r"^[0-9a-f]{64}$": "must be a hash of 64 hexadecimal digits in lowercase",
    r"^[a-z0-9][a-z0-9-]{0,62}$": 'must consist of lowercase letters, digits and hyphens, such as "heart-2026"',
    r"^[a-z0-9][a-z0-9.+-]{0,40}$": (
        'must consist of lowercase letters, digits, dots, plus signs and hyphens, such as "mu-0.1"'
    ),
}
"""What a text must be, by the pattern that it does not match."""


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        path: The key, from the top of the file, such as ``("methods", 1, "mu")``.
        says: What is wrong and how to correct it, in a sentence.
    """

    path: Place
    says: str

    @property
    def key(self) -> str:
        """The path in the notation of messages, such as ``methods[2].mu``; elements are counted from 1."""
        text = ""
        for part in self.path:
            text += f"[{part + 1}]" if isinstance(part, int) else f".{part}" if text else str(part)
        return text

    def located(self, data: Any) -> str:
        """Return the key and, if ``data`` has a plain value there, the value, as in ``rounds = 0``."""
        for part in self.path:
            try:
                data = data[part]
            except (KeyError, IndexError, TypeError):
                return self.key
        if isinstance(data, Mapping | list | tuple):
            return self.key
        value = f'"{data}"' if isinstance(data, str) else str(data).lower() if isinstance(data, bool) else str(data)
        return f"{self.key} = {value}"


def problems_of(errors: Iterable[Mapping[str, Any]], model: Any = None, at: Place = ()) -> list[Problem]:
    """Translate the errors of a pydantic model.

    Args:
        errors: The result of ``ValidationError.errors()``.
        model: The model, whose field names are suggested in place of an unknown key.
        at: The path of the model in the file.
    """
    return [Problem((*at, *_clean(error["loc"])), _sentence(error, _known_at(model, error["loc"]))) for error in errors]


def nearest(word: str, words: Iterable[str]) -> str:
    """Return a question whether the most similar of ``words`` was meant, or an empty text if none is similar."""
    near = difflib.get_close_matches(str(word), list(words), 1, 0.6)
    return f' Did you mean "{near[0]}"?' if near else ""


def line_of(text: str, path: Sequence[str | int]) -> int:
    """Return the line, from 1, of the value at ``path``, or the first line of the nearest table that contains it."""
    lines = places(text)
    for end in range(len(path), 0, -1):
        if (found := lines.get(tuple(path[:end]))) is not None:
            return found
    return 1


def places(text: str) -> dict[tuple[str | int, ...], int]:
    """Return the line of each key and table of ``text`` by path. Values in inline tables are not listed."""
    found: dict[tuple[str | int, ...], int] = {}
    counts: dict[tuple[str | int, ...], int] = {}
    table: tuple[str | int, ...] = ()
    quote = ""
    for number, line in enumerate(text.splitlines(), 1):
        if quote:  # inside a string of several lines
            quote = "" if quote in line else quote
            continue
        if match := _TABLE.match(line):
            name = _split(match["name"])
            table = _resolve(name, counts)
            if match["array"]:
                index = counts.get(table, 0)
                counts[table] = index + 1
                table = (*table, index)
            found.setdefault(table, number)
        elif match := _KEY.match(line):
            found.setdefault((*table, *_split(match["key"])), number)
            for mark in ('"""', "'''"):
                if line.count(mark) == 1:
                    quote = mark
    return found


def _split(dotted: str) -> tuple[str, ...]:
    return tuple(part.strip().strip("\"'") for part in dotted.split("."))


def _resolve(name: tuple[str, ...], counts: dict[tuple[str | int, ...], int]) -> tuple[str | int, ...]:
    """Return ``name`` with the index of the latest element inserted after each array of tables."""
    path: tuple[str | int, ...] = ()
    for i, part in enumerate(name):
        path = (*path, part)
        if i < len(name) - 1 and path in counts:
            path = (*path, counts[path] - 1)
    return path


def _clean(loc: Place) -> Place:
    """Return a path without the names that pydantic gives to the members of a union."""
    return tuple(part for part in loc if isinstance(part, int) or part.replace("_", "").replace("-", "").isalnum())


def _known_at(model: Any, loc: Place) -> list[str]:
    """Return the keys that are allowed in the table of an error."""
    table = model
    for part in loc[:-1]:
        if isinstance(part, int):
            continue
        field = getattr(table, "model_fields", {}).get(part)
        if field is None:
            return []
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        table = next((kind for kind in kinds if hasattr(kind, "model_fields")), None)
    return [field.alias or name for name, field in getattr(table, "model_fields", {}).items()]


def _sentence(error: Mapping[str, Any], known: Sequence[str]) -> str:
    """Return an error as a sentence. ``known`` are the keys that are allowed at its place."""
    context, kind = error.get("ctx") or {}, error["type"]
    given = error.get("input")
    match kind:
        case "extra_forbidden":
            listed = f" The valid keys are {', '.join(known)}" if known else ""
            return f"unknown key.{nearest(str(error['loc'][-1]), known) or listed}"
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
            return _PATTERNS.get(context["pattern"], f"must match the pattern {context['pattern']}")
        case "value_error":
            return str(context["error"])
    return str(error["msg"][:1]).lower() + str(error["msg"][1:])


def _plain(value: Any) -> str:
    match value:
        case str():
            return f'the text "{value}"'
        case bool():
            return str(value).lower()
        case list() | tuple():
            return "a list"
        case dict():
            return "a table"
    return str(value)

"""Conversion of tables in a study file to values, reporting all problems at once, each with its key."""

import dataclasses
import difflib
import json
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic_core import InitErrorDetails, PydanticCustomError

from polyclinic.data.examples import DataError

T = TypeVar("T")
Where = tuple[int | str, ...]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True)


def build(cls: type[T], given: Mapping[str, Any], what: str, at: Where = ()) -> T:
    """Build a frozen dataclass from the options in ``given``.

    Args:
        cls: The dataclass; its fields are the options.
        given: The options. Types are converted as in JSON: a list becomes a tuple, and nothing else is coerced.
        what: Description of the object, for messages.
        at: Location of the options in the table.

    Raises:
        ValidationError: With every problem, each under ``at`` and its key.
    """
    model = _model_of(cls)  # type: ignore[arg-type]  # a class is hashable
    fields = tuple(model.model_fields)
    lines: list[InitErrorDetails] = []
    try:
        valid = model.model_validate_json(json.dumps(dict(given), default=str))
    except ValidationError as error:
        for line in error.errors(include_url=False):
            where = (*at, *line["loc"])
            if line["type"] == "extra_forbidden":
                lines.append(
                    problem(
                        where, f"unknown key.{choices(str(line['loc'][-1]), fields, f'{what} takes')}", line["input"]
                    )
                )
            else:
                lines.append(again(line, where))
        raise problems(lines) from None
    try:
        return cls(**{name: getattr(valid, name) for name in fields})
    except DataError as error:
        raise problems([_of_field(at, says, fields, given) for says in error.problems]) from None


@cache
def _model_of(cls: type[Any]) -> type[_Strict]:
    """Return the pydantic model of a dataclass's options; to create one takes milliseconds."""
    hints = get_type_hints(cls, include_extras=True)
    fields: dict[str, Any] = {
        f.name: (hints[f.name], _default(f)) for f in dataclasses.fields(cls) if f.init and not f.metadata.get("hidden")
    }
    return create_model(cls.__name__, __base__=_Strict, **fields)


def _default(field: "dataclasses.Field[Any]") -> Any:
    """Return the default of a field as pydantic takes it."""
    if field.default_factory is not dataclasses.MISSING:
        return Field(default_factory=field.default_factory)
    return ... if field.default is dataclasses.MISSING else field.default


def _of_field(at: Where, says: str, fields: Iterable[str], given: Mapping[str, Any]) -> InitErrorDetails:
    """Return a problem at the key with which its text begins, as in "size = 3: choose 8 to 256"."""
    key, _, rest = says.partition(" = ")
    if key not in set(fields) or ": " not in rest:
        return problem(at, says, dict(given))
    return problem((*at, key), rest.partition(": ")[2], given.get(key))


def choices(word: str, known: Iterable[str], lead: str) -> str:
    """Return a suggestion ("Did you mean …?") if a known word is similar, otherwise ``lead`` and the list of known
    words.
    """
    names = list(known)
    near = difflib.get_close_matches(word, names, 1, 0.6)
    return f' Did you mean "{near[0]}"?' if near else f" {lead} {', '.join(names) or 'none'}"


def problem(at: Where, says: str, given: Any) -> InitErrorDetails:
    """Return one problem at a key, with the given text."""
    plain = says.replace("{", "(").replace("}", ")")  # braces would be read as format fields
    return InitErrorDetails(type=PydanticCustomError("data", plain), loc=at, input=given)  # type: ignore[arg-type]


def again(line: Any, at: Where) -> InitErrorDetails:
    """Return a problem reported by pydantic at another location, with its type preserved."""
    context = line.get("ctx") or {}
    if line["type"] in ("value_error", "data"):
        return problem(at, str(context.get("error", line["msg"])), line["input"])
    return InitErrorDetails(type=line["type"], loc=at, input=line["input"], ctx=context)


def problems(lines: list[InitErrorDetails]) -> ValidationError:
    """Return all problems as one error; raised in a validator, its lines are merged with the others."""
    return ValidationError.from_exception_data("data", lines)

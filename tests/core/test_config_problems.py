"""Problems of a file: the key, the line, the value, and a sentence for every kind of error."""

import tomllib
from enum import Enum
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from polyclinic.core.config_problems import _PATTERNS, Problem, line_of, nearest, places, problems_of

SLUG = r"^[a-z0-9][a-z0-9-]{0,62}$"


class Color(Enum):
    red = "red"
    blue = "blue"


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    mu: float = 1.0
    sigma: float = 1.0


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    rounds: Annotated[int, Field(ge=1, le=9)] = 1
    share: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] = 0.5
    flag: Annotated[bool, Field(strict=True)] = True
    name: Annotated[str, Field(pattern=SLUG)] = "a"
    code: Annotated[str, Field(pattern="^x+$")] = "x"
    kind: Literal["sum", "mean"] = "sum"
    color: Color = Color.red
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (1,)
    inner: Inner = Inner()
    parts: tuple[Inner, ...] = ()
    as_: Annotated[int, Field(alias="as")] = 1

    @field_validator("rounds")
    @classmethod
    def _seven(cls, value: int) -> int:
        if value == 7:
            raise ValueError("7 is taken")
        return value


def problems(table: dict[str, Any]) -> list[tuple[str, str]]:
    try:
        Outer.model_validate(table)
    except ValidationError as error:
        return [(p.key, p.says) for p in problems_of(error.errors(), Outer, ("study",))]
    return []


@pytest.mark.parametrize(
    ("table", "key", "says"),
    [
        ({"rounds": 0}, "rounds", "must be at least 1"),
        ({"rounds": 10}, "rounds", "must be at most 9"),
        ({"rounds": 7}, "rounds", "7 is taken"),
        ({"rounds": 1.5}, "rounds", "must be a whole number, not 1.5"),
        ({"rounds": "many"}, "rounds", 'must be a whole number, not the text "many"'),
        ({"rounds": [1]}, "rounds", "must be a whole number, not a list"),
        ({"share": 0}, "share", "must be more than 0.0"),
        ({"share": 1}, "share", "must be less than 1.0"),
        ({"share": float("inf")}, "share", "must be a finite number"),
        ({"share": "half"}, "share", 'must be a number, not the text "half"'),
        ({"share": {"a": 1}}, "share", "must be a number, not a table"),
        ({"flag": 1}, "flag", "must be true or false, not 1"),
        ({"name": True}, "name", "must be text in quotes, not true"),
        ({"name": "No spaces"}, "name", _PATTERNS[SLUG]),
        ({"code": "y"}, "code", "must match the pattern ^x+$"),
        ({"kind": "meann"}, "kind", 'must be one of sum, mean. Did you mean "mean"?'),
        ({"kind": "zzz"}, "kind", "must be one of sum, mean."),
        ({"color": "blu"}, "color", 'must be one of red, blue. Did you mean "blue"?'),
        ({"seeds": []}, "seeds", "needs at least 1"),
        ({"seeds": 3}, "seeds", "must be a list in [ ], not 3"),
        ({"seeds": [1, "b"]}, "seeds[2]", 'must be a whole number, not the text "b"'),
        ({"inner": 3}, "inner", "must be a table, with keys of its own"),
        ({"inner": {"mue": 1}}, "inner.mue", 'unknown key. Did you mean "mu"?'),
        ({"inner": {"zzzzz": 1}}, "inner.zzzzz", "unknown key. The valid keys are mu, sigma"),
        ({"parts": [{}, {"sigmma": 1}]}, "parts[2].sigmma", 'unknown key. Did you mean "sigma"?'),
        ({"round": 1}, "round", 'unknown key. Did you mean "rounds"?'),
        ({"asx": 1}, "asx", 'unknown key. Did you mean "as"?'),
    ],
)
def test_each_kind_of_error_has_its_sentence(table: dict[str, Any], key: str, says: str) -> None:
    assert problems(table) == [(f"study.{key}", says)]


def test_missing_keys_and_unknown_kinds_are_translated_too() -> None:
    class Needed(BaseModel):
        x: int

    with pytest.raises(ValidationError) as caught:
        Needed.model_validate({})
    assert problems_of(caught.value.errors()) == [Problem(("x",), "is missing")]
    error = {"type": "new_in_another_version", "loc": ("a", "function-after[f(), int]", 0), "msg": "Input Is strange"}
    assert problems_of([error]) == [Problem(("a", 0), "input Is strange")]
    error = {"type": "extra_forbidden", "loc": ("a", "b"), "msg": ""}
    assert problems_of([error], Outer) == [Problem(("a", "b"), "unknown key.")]


DATA = {"rounds": 0, "on": False, "name": "a", "methods": [{}, {"mu": 2.5}]}


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (("rounds",), "rounds = 0"),
        (("on",), "on = false"),
        (("name",), 'name = "a"'),
        (("methods", 1, "mu"), "methods[2].mu = 2.5"),
        (("methods", 1), "methods[2]"),
        (("methods",), "methods"),
        (("methods", 2, "mu"), "methods[3].mu"),
        (("no", "such"), "no.such"),
        (("rounds", "deeper"), "rounds.deeper"),
    ],
)
def test_a_problem_shows_its_key_and_a_plain_value(path: tuple[str | int, ...], text: str) -> None:
    assert Problem(path, "").located(DATA) == text


def test_a_similar_word_is_suggested_and_no_other() -> None:
    assert nearest("fedavgg", ["scaffold", "fedavg"]) == ' Did you mean "fedavg"?'
    assert nearest("fedavg", iter(["scaffold"])) == ""


TEXT = '''\
name = "a"  # line 1
"quoted key" = 1
a . b = 2

[data]  # comment
path = """
[no.table]
no = 1
"""
more = 'one line'

[[methods]]
name = "x"
[methods.training]
lr = 1
[[methods]]
[methods.training]
lr = 2
[[methods.parts]]
p = 1
[[methods.parts]]
p = 2
[ data.'deep er' ]
'''


def test_lines_are_those_of_the_values() -> None:
    found, lines = places(TEXT), TEXT.splitlines()
    parsed = tomllib.loads(TEXT)
    for path, number in found.items():
        value: Any = parsed
        for part in path:
            value = value[part]
        last = next(part for part in reversed(path) if isinstance(part, str))
        assert last in lines[number - 1]
        if isinstance(value, int | float):
            assert lines[number - 1].split("#")[0].strip().endswith(f"= {value}")
    assert found["data",] == 5
    assert found["methods", 1, "parts", 1, "p"] == 22
    assert found["data", "deep er"] == 23
    assert found["data", "more"] == 10
    assert ("data", "no") not in found
    assert len(found) == 18


def test_a_value_without_a_line_has_that_of_its_table() -> None:
    assert line_of(TEXT, ("methods", 1, "training", "missing")) == 17
    assert line_of(TEXT, ("methods", 1, "training", "lr")) == 18
    assert line_of(TEXT, ("data", "missing", "deeper")) == 5
    assert line_of(TEXT, ("nothing", "of", "it")) == 1
    assert line_of(TEXT, ()) == 1

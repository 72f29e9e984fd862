"""The ``[search]`` table of a study: settings that every method tries on validation data, the same number for each.

```toml
[search]
trials = 6
[search.space]                          # what every method tries
training.lr = [0.003, 0.01, 0.03, 0.1]
training.momentum = { low = 0.0, high = 0.95 }
[search.methods.fedprox]                # what one method tries besides, by its label
mu = [0.001, 0.01, 0.1]
```

Settings are drawn at random without repeats (Bergstra and Bengio, "Random Search for Hyper-Parameter Optimization",
JMLR 2012, https://jmlr.org/papers/v13/bergstra12a.html). Every seed and fold searches anew, within its own training and
validation patients: one choice for all would let the test patients of one split choose for another.
"""

import itertools
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, model_validator

from polyclinic.core.toml_text import dumps
from polyclinic.data.splits import rng_for
from polyclinic.errors import ConfigError, RunError

TRIES = 1000


class Range(BaseModel):
    """Numbers from ``low`` to ``high``, drawn evenly, or evenly in their logarithm."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    low: float
    """The lowest value."""
    high: float
    """The highest value."""
    log: bool = False
    """Whether values are drawn evenly in their logarithm."""

    @model_validator(mode="after")
    def _ordered(self) -> "Range":
        if not self.low < self.high:
            raise ConfigError("low must be below high")
        if self.log and self.low <= 0:
            raise ConfigError("log = true needs low above 0")
        return self


Choices = tuple[Any, ...] | Range


def _space(value: Any) -> dict[str, Choices]:
    """Keys to lists or ranges; tables within tables become dotted keys."""
    if not isinstance(value, Mapping):
        raise ConfigError("must be a table of keys, each with a list of values or with {low, high}")
    found: dict[str, Choices] = {}
    for key, item in value.items():
        if isinstance(item, Range):
            found[key] = item
        elif isinstance(item, Mapping) and {"low", "high"} & item.keys():
            found[key] = Range.model_validate(item, strict=False)
        elif isinstance(item, Mapping):
            found |= {f"{key}.{inner}": choices for inner, choices in _space(item).items()}
        elif isinstance(item, list | tuple) and item:
            found[key] = tuple(item)
        else:
            says = "must be a list of values, or a range such as { low = 0.001, high = 0.1, log = true }"
            raise ConfigError(f"{key} {says}")
    return found


def _plain(value: Mapping[str, Choices]) -> dict[str, Any]:
    return {key: c.model_dump() if isinstance(c, Range) else list(c) for key, c in value.items()}


Space = Annotated[dict[str, Choices], PlainValidator(_space), PlainSerializer(_plain)]


class SearchSpec(BaseModel):
    """What to try. ``rounds`` of a trial are the study's where they are not given; ``seed`` draws the settings."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    trials: Annotated[int, Field(ge=2, le=1000)]
    """The number of settings tried for each method."""
    rounds: Annotated[int, Field(ge=1)] | None = None
    """Rounds of a trial; by default the study's."""
    seed: int = 0
    """The seed that draws the settings."""
    space: Space = {}
    """What to vary for every method: a list of values or a range, by key, such as ``"training.lr"``."""
    methods: dict[str, Space] = {}
    """What to vary for single methods, by label."""

    def of(self, label: str) -> dict[str, Choices]:
        """Return the choices of the method ``label``."""
        return {**self.space, **self.methods.get(label, {})}

    def settings(self, label: str, *key: int) -> list[dict[str, Any]]:
        """Return up to ``trials`` settings of ``label``, in the order in which they are tried."""
        space = self.of(label)
        rng = rng_for(self.seed, "search", label, *key)
        if (many := count(space)) is not None and many <= 10 * self.trials:
            grid = [dict(zip(space, values, strict=True)) for values in itertools.product(*_lists(space))]
            order = rng.permutation(len(grid))[: self.trials]
            return [grid[i] for i in sorted(order)]
        found: list[dict[str, Any]] = []
        for _ in range(TRIES * self.trials):
            drawn = {name: _draw(choices, rng) for name, choices in space.items()}
            if drawn not in found:
                found.append(drawn)
            if len(found) == self.trials:
                break
        return found


def count(space: Mapping[str, Choices]) -> int | None:
    """How many settings there are; None for as many as anyone likes."""
    if any(isinstance(choices, Range) for choices in space.values()):
        return None
    return math.prod(len(choices) for choices in _lists(space)) if space else 0


def extremes(space: Mapping[str, Choices]) -> list[tuple[str, Any]]:
    """Every key with every value of its list, or both ends of its range: what must be valid before anything runs."""
    pairs = []
    for name, choices in space.items():
        ends = (choices.low, choices.high) if isinstance(choices, Range) else choices
        pairs += [(name, value) for value in ends]
    return pairs


def changed(item: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A ``[[methods]]`` table with ``values``: options by name, and what differs in training as ``training.…``."""
    found = {**item, "training": dict(item.get("training") or {})}
    for key, value in values.items():
        table, dot, name = key.partition(".")
        if dot and table == "training":
            found["training"][name] = value
        else:
            found[key] = value
    return found


def write_chosen(path: Path, label: str, values: Mapping[str, Any], score: float | None, metric: str) -> None:
    """Writes what a search chose, for a person to read and to change before training begins."""
    from polyclinic.core import atomic

    found = "no setting had a score" if score is None else f"the best {metric} on validation patients, {score:.4f}"
    text = (
        f"# What {label} trains with: {found}; see\n"
        "# search.jsonl. Change a value before training begins and it is used instead; the records then say so.\n"
    )
    atomic.write(path, text + dumps({"chosen": dict(values)}))


def read_chosen(path: Path) -> dict[str, Any]:
    """Read the values in a file of ``write_chosen``, which a person may have edited.

    Raises:
        NotChosen: If the file cannot be read.
    """
    try:
        chosen = tomllib.loads(path.read_text(encoding="utf-8"))["chosen"]
        return {str(key): value for key, value in chosen.items()}
    except (tomllib.TOMLDecodeError, KeyError, AttributeError) as error:
        raise NotChosen(
            f"{path}: not the file that a search wrote ({error}). Correct it, or remove it to search again"
        ) from None


def trial_lines(trials: Sequence[Mapping[str, Any]]) -> bytes:
    """Return trials in the format of ``read_trials``."""
    return b"".join(json.dumps(trial, separators=(",", ":")).encode() + b"\n" for trial in trials)


def best(trials: Sequence[dict[str, Any]], higher_is_better: bool) -> dict[str, Any]:
    """Return the earliest trial with the best score, or the first trial if none has a score."""
    scored = [trial for trial in trials if trial["score"] is not None]
    choose = max if higher_is_better else min
    return choose(scored, key=lambda trial: trial["score"]) if scored else trials[0]


def require_unchanged(arm: Path, chosen: Mapping[str, Any]) -> None:
    """Require that a method run that has begun still uses the values with which it began.

    Raises:
        NotChosen: If its file contains other values than its records.
    """
    records = arm / "records.jsonl"
    lines = records.read_bytes().split(b"\n")[:-1] if records.is_file() else []
    began = next((fact for fact in map(json.loads, lines) if fact["kind"] == "chosen"), chosen)
    if began["values"] != chosen["values"]:
        raise NotChosen(
            f"{arm / 'chosen.toml'} was changed after training had begun with {json.dumps(began['values'])}: put these "
            f"values back, or remove {arm / 'checkpoint.safetensors'} to train anew with yours"
        )


def read_trials(path: Path) -> list[dict[str, Any]]:
    """The trials of one search, in order."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


class NotChosen(RunError, ValueError):
    """Settings that cannot be used. The message says what to do."""


def _lists(space: Mapping[str, Choices]) -> list[Sequence[Any]]:
    return [choices for choices in space.values() if not isinstance(choices, Range)]


def _draw(choices: Choices, rng: Any) -> Any:
    if not isinstance(choices, Range):
        return choices[int(rng.integers(len(choices)))]
    if choices.log:
        value = math.exp(rng.uniform(math.log(choices.low), math.log(choices.high)))
    else:
        value = rng.uniform(choices.low, choices.high)
    return float(f"{value:.4g}")

"""Declared preprocessing: a sequence of steps, parsed from a study file and hashed into the data's fingerprint."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import PlainSerializer, PlainValidator, ValidationError

from polyclinic.data import config_parsing
from polyclinic.data.preprocessing.nnunet_steps import CropNonzero, Normalize, ResampleNnunet, Transpose
from polyclinic.data.preprocessing.sample import Picture, Step
from polyclinic.data.preprocessing.transforms import (
    Channels,
    CropPad,
    Foreground,
    Percentiles,
    Relabel,
    Resample,
    Resize,
    Scale,
    Window,
    ZScore,
)
from polyclinic.data.source import digest
from polyclinic.errors import ConfigError

STEPS: dict[str, type[Any]] = {
    s.name: s
    for s in (
        *(Resample, Resize, CropPad, Foreground, ZScore, Window, Percentiles, Scale, Relabel, Channels),
        *(Transpose, CropNonzero, Normalize, ResampleNnunet),
    )
}


def apply(steps: Sequence[Step], picture: Picture) -> Picture:
    """Return the picture after all ``steps``, in order."""
    for step in steps:
        picture = step(picture)
    return picture


def fingerprint(steps: Sequence[Step]) -> str:
    """Return a hash of the steps, their versions and options."""
    return digest("preprocess", [(s.name, s.version, sorted(vars(s).items())) for s in steps])


def _parse(value: Any) -> tuple[Step, ...]:
    """Parse steps from tables such as ``{step = "resample", mm = 1.0}``."""
    if not isinstance(value, list | tuple):
        raise ConfigError('must be a list of steps, such as [{step = "resample", mm = 1.0}, {step = "zscore"}]')
    steps, lines = list[Step](), []
    for i, item in enumerate(value):
        if type(item) in STEPS.values():
            steps.append(item)
            continue
        given = dict(item) if isinstance(item, Mapping) else {}
        name = given.pop("step", None)
        if name not in STEPS:
            says = f"no step is called {name!r}.{config_parsing.choices(str(name), STEPS, 'There are')}"
            lines.append(config_parsing.problem((i, "step"), says, name))
            continue
        try:
            steps.append(config_parsing.build(STEPS[name], given, f'the step "{name}"', (i,)))
        except ValidationError as error:
            lines += [config_parsing.again(line, line["loc"]) for line in error.errors(include_url=False)]
    if lines:
        raise config_parsing.problems(lines)
    return tuple(steps)


def _plain(steps: Sequence[Step]) -> list[dict[str, Any]]:
    return [{"step": s.name, **dataclasses.asdict(s)} for s in steps]  # type: ignore[call-overload]


Steps = Annotated[tuple[Step, ...], PlainValidator(_parse), PlainSerializer(_plain)]
"""Type of a source's option ``steps``."""

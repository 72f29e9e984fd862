"""Declared preprocessing: a sequence of steps, parsed from a study file and hashed into the data's fingerprint."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import PlainSerializer, PlainValidator, ValidationError

from polyclinic.data import config_parsing
from polyclinic.data.preprocessing.nnunet_steps import CropNonzero, Normalize, ResampleNnunet, Transpose
from polyclinic.data.preprocessing.previous_stage import PreviousStage
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
        *(Transpose, CropNonzero, Normalize, ResampleNnunet, PreviousStage),
    )
}


def apply(steps: Sequence[Step], picture: Picture) -> Picture:
    """Return the picture after all ``steps``, in order."""
    if any(isinstance(step, PreviousStage) for step in steps):
        picture = dataclasses.replace(picture, original=picture)
    for step in steps:
        picture = step(picture)
    return picture if picture.original is None else dataclasses.replace(picture, original=None)


def mask_channels(steps: Sequence[Step]) -> int:
    """Return how many of the last channels are labels of a mask, after ``steps``."""
    return sum(step.channels for step in steps if isinstance(step, PreviousStage))


def fingerprint(steps: Sequence[Step]) -> str:
    """Return a hash of the steps, their versions and options."""
    return digest("preprocess", [(s.name, s.version, sorted(_facts(s).items())) for s in steps])


def _facts(step: Step) -> dict[str, Any]:
    """Return the options of a step, with a hash in place of other steps among them, and tables in one order."""
    if not isinstance(step, PreviousStage):
        return vars(step)
    return {**vars(step), "steps": fingerprint(step.steps), "options": sorted(step.options.items())}


def parsed(value: Any) -> tuple[Step, ...]:
    """Parse steps from tables such as ``{step = "resample", mm = 1.0}``.

    Raises:
        ValidationError: With every problem.
    """
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
            step = config_parsing.build(STEPS[name], given, f'the step "{name}"', (i,))
            if isinstance(step, PreviousStage):
                step = _with_steps(step, (i, "steps"))
            steps.append(step)
        except ValidationError as error:
            lines += [config_parsing.again(line, line["loc"]) for line in error.errors(include_url=False)]
    if any(isinstance(step, PreviousStage) for step in steps[:-1]):
        lines.append(config_parsing.problem((), f"the step {PreviousStage.name} must be the last one", value))
    if lines:
        raise config_parsing.problems(lines)
    return tuple(steps)


def _with_steps(stage: PreviousStage, at: tuple[int | str, ...]) -> PreviousStage:
    """Return a previous stage with its steps parsed; ``at`` is their place in the table."""
    try:
        return dataclasses.replace(stage, steps=parsed(stage.steps))
    except ValidationError as error:
        lines = [config_parsing.again(line, (*at, *line["loc"])) for line in error.errors(include_url=False)]
    raise config_parsing.problems(lines)


def plain(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """Return steps as the tables from which ``parsed`` makes them."""
    return [
        {"step": s.name, **vars(s), **({"steps": plain(s.steps)} if isinstance(s, PreviousStage) else {})}
        for s in steps
    ]


Steps = Annotated[tuple[Step, ...], PlainValidator(parsed), PlainSerializer(plain)]
"""Type of a source's option ``steps``."""

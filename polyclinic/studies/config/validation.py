"""Validation of the tables of a study file; every problem is reported with its path.

The options of methods, transforms and attacks follow from the fields of their classes.
"""

import dataclasses
import json
from collections.abc import Collection, Mapping
from typing import Any, get_type_hints

from pydantic import BaseModel, ValidationError, create_model

from polyclinic.attacks.adversaries import ATTACKS
from polyclinic.compression import transform_table as transforms
from polyclinic.core.config_problems import Problem, nearest, problems_of
from polyclinic.methods import registry as methods
from polyclinic.studies.config.schema import AttackSpec, Table, TrainingSpec


def validated(model: type[BaseModel], data: Any, at: tuple[str | int, ...]) -> tuple[BaseModel | None, list[Problem]]:
    """Return ``data`` as a ``model``, or its problems. Only lists are converted, to tuples, as in JSON."""
    try:
        return model.model_validate_json(json.dumps(data, default=str)), []
    except ValidationError as error:
        return None, problems_of(error.errors(include_url=False), model, at)


def method_problems(item: dict[str, Any], at: tuple[str | int, ...]) -> list[Problem]:
    """Return the problems of one ``[[methods]]``: of its name, options, transforms and training."""
    try:
        entry = methods.entry(item["name"])
    except methods.UnknownMethod as error:
        return [Problem((*at, "name"), str(error))]
    fixed = {"name", "label", "uplink", "downlink", "training", "augmentation"}
    fields = {key: (p.annotation, p.default) for key, p in methods.options(entry).items()}
    problems = _options(item, fields, fixed, at)
    if isinstance(training := item.get("training", {}), dict):
        problems += validated(TrainingSpec, training, (*at, "training"))[1]
    for way in ("uplink", "downlink"):
        passed = item.get(way, [])
        for i, transform in enumerate(passed if isinstance(passed, list) else []):
            problems += _transform_problems(transform, (*at, way, i))
    return problems


def _transform_problems(transform: Any, place: tuple[str | int, ...]) -> list[Problem]:
    if not isinstance(transform, dict) or not isinstance(transform.get("name"), str):
        return [Problem(place, 'each transform is a table with a name, as in {name = "clip", bound = 1.0}')]
    try:
        known = transforms.options(transforms.entry(transform["name"]))
    except ValueError as error:
        return [Problem((*place, "name"), str(error))]
    kinds = transforms.types(transforms.entry(transform["name"]))
    fields = {key: (kinds[key], transforms.default(f)) for key, f in known.items()}
    return _options(transform, fields, {"name"}, place)


def attack_problems(item: Mapping[str, Any], at: tuple[str | int, ...]) -> list[Problem]:
    """Return the problems of the name and the options in ``[attack]``."""
    if item["name"] not in ATTACKS:
        others = nearest(item["name"], ATTACKS) or f" There are {', '.join(ATTACKS)}"
        return [Problem((*at, "name"), f'no attack is called "{item["name"]}".{others}')]
    attack = ATTACKS[item["name"]]
    fields = {f.name: (get_type_hints(attack)[f.name], f.default) for f in dataclasses.fields(attack)}
    return _options(item, fields, AttackSpec.model_fields.keys(), at)


def _options(
    item: Mapping[str, Any], fields: Mapping[str, Any], besides: Collection[str], at: tuple[str | int, ...]
) -> list[Problem]:
    """Return the problems of the options in ``item`` except ``besides``. ``fields`` gives types and defaults."""
    model: type[BaseModel] = create_model(item["name"], __base__=Table, **dict(fields))
    return validated(model, {key: value for key, value in item.items() if key not in besides}, at)[1]

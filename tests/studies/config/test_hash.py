"""The hash of a study: every field changes it, except those that change no result."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from polyclinic.learning.training.image_augmentation import TRANSFORMS
from polyclinic.studies.config.schema import EngineSpec
from polyclinic.studies.config.study_config import Study

# Every optional table is there, so that each field of each is tried. Together they need not make sense.
WHOLE = {
    "name": "whole",
    "rounds": 3,
    "seeds": [0, 1],
    "folds": 4,
    "data": {"use": "lidc-nodules", "annotations": {"lyon": "boxes"}},
    "task": {
        "kind": "classification",
        "weights": {"file": "given", "sha256": "0" * 64},
        "lora": {"where": ["encoder.*"]},
        "train": ["head"],
    },
    "training": {"private": {"noise": 1.0}},
    "augmentation": {name: {"probability": 0.1} for name in TRANSFORMS},
    "methods": [
        {"name": "fedprox", "mu": 0.1, "uplink": [{"name": "clip", "bound": 1.0}], "downlink": [{"name": "int8"}]}
    ],
    "search": {
        "trials": 2,
        "space": {"training.lr": {"low": 0.1, "high": 0.2}},
        "methods": {"fedprox": {"mu": [0.1, 1.0]}},
    },
    "evaluation": {
        "compare": [{"method": "a", "reference": "b", "kind": "equivalence", "margin": 0.02}],
        "subgroups": ["ward"],
    },
    "privacy": {"epsilon": 1.0, "delta": 1e-5},
    "machines": {"up": 1e6, "sites": {"lyon": {"down": 1e6}}},
    "attack": {"name": "noise", "attackers": 1, "scale": 2.0},
}
UNSET: dict[str, Any] = {  # a value for fields that WHOLE leaves at None
    "folds": 5,
    "sites_per_round": 2,
    "deadline": 30.0,
    "metric": "auc",
    "path": "/elsewhere",
    "kind": "npz",
    "plan": __file__,
    "max_patients": 50,
    "position": "z",
    "video": "clip",
    "class_weights": (1.0, 2.0),
    "loss": "focal",
    "label_smoothing": 0.1,
    "center": 1.0,
    "spread": 2.0,
    "spacing_mm": (1.0, 1.0),
    "tolerance_mm": 1.0,
    "window": (8, 8),
    "space": "grid",
    "lesions": True,
    "lesion_dilation": 1,
    "lesion_smallest": 2.0,
    "residual": True,
    "chunk": 4,
    "steps": 7,
    "cosine_rounds": 5,
    "clip_norm": 1.0,
    "seconds_per_batch": 0.1,
    "up": 1e6,
    "down": 1e6,
    "drop_out": 0.1,
    "minutes": 3.0,
    "rounds": 2,
    "workers": 2,
    "recipe": "nnunet",
    "nesterov": True,
    "schedule": "poly",
    "power": 0.8,
    "milestones": (2,),
    "milestone_factor": 0.2,
    "keep_optimizer": True,
    "foreground": 0.3,
    "balance": 0.5,
    "balance_patients": True,
    "augmentation": {"recipe": "light"},
    "patience": 3,
    "probability": 0.5,
    "degrees": 20.0,
    "low": 0.9,
    "high": 0.95,
    "channel": 0.4,
    "aspect": 1.2,
    "std": 0.2,
    "saturation": 0.3,
    "hue": 5.0,
    "axes": (0,),
    "border": True,
    "batch_dice": True,
    "regions": ((1, 2), (2,)),
    "cuts": (1.0, 2.0),
    "hazards": "proportional",
    "ordered": True,
    "own": ("acme-speckle",),
    "loop": "acme-loop",
    "norm_momentum": 0.1,
}
CHANGE_NOTHING = {"title", "task.weights.file", *(f"engine.{key}" for key in EngineSpec.model_fields)}
STUDY = Study.model_validate_json(json.dumps(WHOLE))


Place = tuple[str | int, ...]


def places(model: BaseModel, before: Place = ()) -> Iterator[Place]:
    """The location of each field of ``model`` and of the tables within it, and every further key that it allows."""
    for name in (*type(model).model_fields, *(model.model_extra or {})):
        value = getattr(model, name)
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, tuple) else ()
        inner = [(key, item) for key, item in items if isinstance(item, BaseModel)]
        if isinstance(value, BaseModel):
            yield from places(value, (*before, name))
        for key, item in inner:
            yield from places(item, (*before, name, key))
        if not isinstance(value, BaseModel) and not (inner and isinstance(value, tuple)):
            yield (*before, name)


def another(name: Any, value: Any) -> Any:
    """A different value of the same kind."""
    match value:
        case None:
            return UNSET[name]
        case bool():
            return not value
        case int():
            return value + 1
        case float():
            return value / 2 if value else 0.5
        case str():
            return value + "x"
        case tuple():
            return (*value[1:], *value[:1]) if len(set(map(repr, value))) > 1 else (*value, *(value[:1] or ("x",)))
        case dict():
            return {} if value else {"x": 1}
    raise AssertionError(f"{name}: say how to change a {type(value).__name__}")


def changed(model: Any, place: Place) -> Any:
    """``model`` with another value at ``place``, unchecked: what a hash depends on does not depend on what is valid."""
    name, rest = place[0], place[1:]
    if isinstance(model, tuple):
        assert isinstance(name, int)
        return (*model[:name], changed(model[name], rest), *model[name + 1 :])
    if isinstance(model, dict):
        return {**model, name: changed(model[name], rest)}
    assert isinstance(name, str)
    value = getattr(model, name)
    return model.model_copy(update={name: changed(value, rest) if rest else another(name, value)})


PLACES = {".".join(map(str, place)): place for place in places(STUDY)}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_every_field_of_a_study_changes_its_hash_but_title_and_engine(place: str) -> None:
    """A result is filed under its study's hash: a field that is left out would give two studies one result."""
    other = changed(STUDY, PLACES[place])
    assert other != STUDY
    assert (other.hash != STUDY.hash) == (place not in CHANGE_NOTHING)


def test_the_law_reaches_every_table() -> None:
    assert PLACES.keys() >= CHANGE_NOTHING
    assert {place[0] for place in PLACES.values()} == set(Study.model_fields)
    for place in (
        "seeds",
        "data.use",
        "training.private.noise",
        "methods.0.mu",
        "methods.0.downlink",
        "machines.sites.lyon.down",
        "search.space.training.lr.low",
        "attack.scale",
        "data.split",
        "privacy.delta",
        "task.network",
    ):
        assert place in PLACES


def test_a_table_that_is_left_out_is_not_one_that_is_there() -> None:
    for name in ("search", "privacy", "machines", "attack", "folds"):
        assert STUDY.model_copy(update={name: None}).hash != STUDY.hash
    hashes = {STUDY.model_copy(update={"methods": methods}).hash for methods in (STUDY.methods, STUDY.methods * 2)}
    assert len(hashes) == 2


def test_the_hash_is_the_sha256_of_canonical_json() -> None:
    """The order in which a file gives its keys is no part of it."""
    again = Study.model_validate_json(json.dumps(dict(reversed(WHOLE.items()))))
    assert again.hash == STUDY.hash
    assert len(STUDY.hash) == 64
    assert int(STUDY.hash, 16) >= 0

"""Keys of a study on augmentation, sampling and training: what they become in a plan, and what is refused."""

import json
from typing import Any

import pytest

from polyclinic.core.config_problems import Problem
from polyclinic.learning.training.image_augmentation import RECIPES, augmentation_of
from polyclinic.studies.config.study_config import Study, checked

BASE: dict[str, Any] = {
    "name": "small",
    "rounds": 10,
    "data": {"use": "lidc-nodules"},
    "methods": [{"name": "fedavg"}],
}


def study(**tables: Any) -> Study:
    found, problems = checked({**BASE, **tables})
    assert not problems, problems
    assert found is not None
    return found


def problems(**tables: Any) -> list[Problem]:
    found, problems = checked({**BASE, **tables})
    assert found is None
    return problems


def training(**tables: Any) -> dict[str, Any]:
    one = study(**tables)
    return one.training_of(one.methods[0])


def test_what_is_not_set_is_in_no_plan_and_no_hash() -> None:
    plain = study()
    assert set(training()) == {
        "epochs",
        "batch_size",
        "optimizer",
        "lr",
        "momentum",
        "weight_decay",
        "lr_decay",
        "warmup_rounds",
        "amp",
    }
    assert plain.hash == "28406252dd8b954f409baafb023f85da881817ad59569cf501c66eabb769d780"  # as before these keys
    assert study(augmentation={}).hash != plain.hash  # stated, and equal in effect
    assert study(engine={"threads": 4, "channels_last": True, "compile": True, "device": "auto"}).hash == plain.hash


def test_augmentation_is_complete_in_the_plan_and_per_method() -> None:
    methods = [{"name": "fedavg"}, {"name": "fedprox", "augmentation": {"recipe": "none"}}]
    one = study(augmentation={"recipe": "nnunet", "mirror": {"axes": [0]}}, methods=methods)
    table = one.training_of(one.methods[0])["augmentation"]
    assert json.loads(json.dumps(table))["gamma"] == {"probability": 0.3, "low": 0.7, "high": 1.5}
    assert augmentation_of(table).mirror_axes(2) == (0,)
    assert "augmentation" not in one.training_of(one.methods[1])
    assert augmentation_of(training(augmentation={"recipe": "picture"})["augmentation"]) == RECIPES["picture"]


def test_the_nnunet_recipe_is_expanded_and_set_keys_remain() -> None:
    long = study(
        rounds=100, task={"kind": "segmentation", "network": "unet"}, training={"recipe": "nnunet", "lr": 0.02}
    )
    told = long.training.model_dump(exclude_none=True)
    assert told["steps"] == 250
    assert told["lr"] == 0.02
    assert told["momentum"] == 0.99
    assert told["nesterov"]
    assert told["schedule"] == "poly"
    assert told["keep_optimizer"]
    assert told["weight_decay"] == 3e-5
    assert told["clip_norm"] == 12.0
    assert told["foreground"] == 0.33
    plan = long.training_of(long.methods[0])
    assert plan["schedule_rounds"] == 100
    assert "recipe" not in plan
    assert augmentation_of(plan["augmentation"]) == RECIPES["nnunet"]
    short = study(
        rounds=19,
        task={"kind": "segmentation", "network": "unet"},
        training={"recipe": "nnunet"},
        augmentation={"recipe": "light"},
    )
    assert (short.training.optimizer, short.training.lr, short.training.momentum) == ("adamw", 3e-3, 0.0)
    assert short.training.keep_optimizer is None
    assert augmentation_of(short.training_of(short.methods[0])["augmentation"]) == RECIPES["light"]


@pytest.mark.parametrize(
    ("tables", "place", "says"),
    [
        ({"training": {"recipe": "nnunet", "epochs": 2}}, ("training", "recipe"), "set steps"),
        ({"training": {"recipe": "unet"}}, ("training", "recipe"), "nnunet"),
        ({"training": {"nesterov": True}}, ("training",), "nesterov is a momentum of SGD"),
        ({"training": {"schedule": "poly", "cosine_rounds": 5}}, ("training",), "both lower the learning rate"),
        ({"training": {"power": 2.0}}, ("training",), "which is not set"),
        ({"training": {"milestone_factor": 0.5}}, ("training",), "needs milestones"),
        ({"training": {"foreground": 0.5}}, ("training",), "foreground is for segmentation"),
        (
            {"training": {"balance": 0.5}, "task": {"kind": "segmentation", "network": "unet"}},
            ("training",),
            "balance is for classification",
        ),
        ({"training": {"balance": 1.5}}, ("training", "balance"), "at most 1"),
        ({"augmentation": {"noise": {"std": 1.0}}}, ("augmentation",), "noise needs a probability"),
        ({"augmentation": {"recipe": "nnunet", "scaling": {"low": 2.0}}}, ("augmentation",), "above high"),
        (
            {"augmentation": {"rotation": {"probability": 2.0}}},
            ("augmentation", "rotation", "probability"),
            "at most 1",
        ),
        ({"augmentation": {"elastic": {}}}, ("augmentation", "elastic"), ""),
        (
            {"augmentation": {"recipe": "light"}, "task": {"kind": "reconstruction", "network": "unet"}},
            ("training",),
            "not the measurements",
        ),
        ({"evaluation": {"patience": 3}}, ("evaluation", "patience"), "is for the methods local and pooled"),
        (
            {"evaluation": {"patience": 3, "select": "last"}, "methods": [{"name": "local"}]},
            ("evaluation", "patience"),
            'set select = "best"',
        ),
        (
            {"methods": [{"name": "fedavg", "training": {"nesterov": True}}]},
            ("methods", 0, "training"),
            "nesterov is a momentum of SGD",
        ),
        ({"task": {"batch_dice": True}}, ("task",), "batch_dice is not for classification"),
    ],
)
def test_what_does_not_go_together_is_refused(tables: dict[str, Any], place: tuple[str | int, ...], says: str) -> None:
    found = problems(**tables)
    assert [p.path for p in found] == [place], found
    assert says in found[0].says

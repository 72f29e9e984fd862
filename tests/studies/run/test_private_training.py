"""Every method and kind of task under DP-SGD trains, or is refused before training with the reason."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from polyclinic.attacks.neighboring_sites import sites
from polyclinic.core.rounds import train
from polyclinic.engines.local.in_process import InProcess
from polyclinic.engines.policy.coverage import declared_problem, typical
from polyclinic.methods.catalog import METHODS
from polyclinic.studies.config.diagnostics import BadStudy
from polyclinic.studies.config.study_config import parse
from polyclinic.studies.run.scheduler import run
from tests.methods.test_from_study import IMAGES, npz

KINDS = ("classification", "multilabel", "segmentation", "regression", "survival", "reconstruction")
TABLE = [(name, kind) for name, line in METHODS.items() for kind in line.tasks or KINDS]
QUICK = {("fedavg", kind) for kind in KINDS} | {("scaffold", "segmentation"), ("fedmic", "segmentation")}
METHOD_PRIVATE = (
    '[training]\nbatch_size = 6\nsteps = 1\nlr = 0.01\nprivate = { noise = 1.0, bound = 1.0, unit = "record" }\n'
)


def lost_when_training(name: str, kind: str) -> dict[str, str]:
    """Train one step per round for two rounds; the sites that failed, each with the reason."""
    plan = typical(name, "dp-sgd", kind)
    plan = replace(plan, rounds=2, training={**plan.training, "steps": 1})
    places = sites(plan.kind, plan.inputs, plan.outputs, plan.sites, 0)  # type: ignore[arg-type]
    method = plan.build_method()
    engine = InProcess(method, places, server_data={"public": places[plan.sites[0]].data["public"]})
    lost: dict[str, str] = {}
    for step in train(method, engine, method.init(plan.build_task().first(0)), rounds=2, min_replies=0):
        lost |= step.lost
        if step.state is None:
            break
    return lost


@pytest.mark.parametrize(
    ("name", "kind"), [c if c in QUICK else pytest.param(*c, marks=pytest.mark.slow) for c in TABLE]
)
def test_it_trains_or_is_refused(name: str, kind: str) -> None:
    if declared_problem(name, ("dp-sgd",)) is None:
        assert lost_when_training(name, kind) == {}


@pytest.mark.parametrize("name", ["fedirm", "fedperl", "fedvss"])
def test_methods_whose_loss_mixes_examples_are_refused_with_the_study(name: str) -> None:
    text = f'name = "s"\nrounds = 1\n[data]\npath = "x.npz"\n{IMAGES}[task]\nnetwork = "cnn"\n{METHOD_PRIVATE}[[methods]]\nname = "{name}"\n'
    with pytest.raises(
        BadStudy, match=r"private training .DP-SGD. does not cover what .* loss cannot be computed example by"
    ):
        parse(text)


def refusals(folder: Path, kind: str, task: str) -> Iterator[str]:
    text = (
        f'name = "s"\nrounds = 1\n[data]\npath = "{npz(folder, kind)}"\n{IMAGES}[task]\n{task}\n'
        f'{METHOD_PRIVATE}[[methods]]\nname = "fedavg"\n'
    )
    try:
        for _ in run(parse(text), text, folder / "run"):
            pass
    except BadStudy as error:
        yield str(error)


def test_segmentation_trains_privately(tmp_path: Path) -> None:
    task = 'kind = "segmentation"\nnetwork = "unet"\noptions = { width = 8, norm = "group" }'
    assert list(refusals(tmp_path, "masks", task)) == []
    assert (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize(
    ("kind", "task", "reason"),
    [
        (
            "masks",
            'kind = "segmentation"\nnetwork = "unet"\noptions = { width = 2, norm = "batch" }',
            "batch normalization",
        ),
        ("images", 'network = "cnn"\noptions = { width = 4, depth = 2, norm = "batch" }', "batch normalization"),
    ],
)
def test_a_network_that_cannot_train_privately_is_refused_before_training(
    tmp_path: Path, kind: str, task: str, reason: str
) -> None:
    (says,) = refusals(tmp_path, kind, task)
    assert f"DPSGD: this network has {reason}" in says
    assert not (tmp_path / "run" / "run.json").exists()

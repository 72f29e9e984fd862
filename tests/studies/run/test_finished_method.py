"""What the sites of a finished run are asked: which sites, with which model, and what is written of their answers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from polyclinic.core.tree import Tree
from polyclinic.data.federation import federate
from polyclinic.engines.policy.site_policy import Allow, Enforced, Policy
from polyclinic.evaluation.records.run_reader import read_run
from polyclinic.learning.tasks import task_evaluation
from polyclinic.studies.config.study_config import parse
from polyclinic.studies.run import method_run
from polyclinic.studies.run.finished_method import NotFinished, finished_method
from polyclinic.studies.run.model_explanation import NotExplained, explain
from polyclinic.studies.run.run_directory import read_plan, read_tensors
from polyclinic.studies.run.scheduler import run
from tests.studies.run.test_method_run import PEAK, scripted, study
from tests.studies.run.test_planning import registry


def flat(params: Tree) -> Tensor:
    return torch.cat([params[name].flatten() for name in sorted(params)])


@pytest.fixture(autouse=True)
def maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of an attribution map, the parameters of the model and the number of patients: captum is not needed."""

    def shown(task: Any, params: Tree, data: Any, device: str) -> Tree:
        return {"map": flat(params), "patients": torch.tensor([len(set(data.patients))])}

    monkeypatch.setattr(task_evaluation, "saliency", shown)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two seeds and methods, of which the second of six rounds was the best one."""
    folder = tmp_path_factory.mktemp("finished")
    text = study(folder, ["local", "fedavg"]).replace("seeds = [5]", "seeds = [5, 7]")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(method_run, "evaluate", scripted(PEAK))
        list(run(parse(text), text, folder / "run"))
    return folder / "run"


@pytest.mark.parametrize(("seed", "chosen"), [(None, 5), (7, 7)])
def test_sites_that_train_are_asked_with_the_tested_and_the_untrained_model(
    finished: Path, seed: int | None, chosen: int
) -> None:
    opened = read_run(finished).opened
    file, refused = explain(finished, "fedavg", seed)
    assert (file, refused) == (finished / "arms" / f"fedavg-seed{chosen}" / "explanations.safetensors", {})
    with safe_open(file, "pt") as stored:
        assert stored.metadata() == {"features": "", "role": "val"}
    leaves = read_tensors(file)
    assert leaves.keys() == {f"{site}/{key}" for site in "abc" for key in ("map", "patients", "untrained")}
    model = file.parent / "model.safetensors"
    first = flat(read_plan(model).build_task().first(chosen))
    data = federate(parse(read_run(finished).study).data, chosen)
    for site in "abc":
        assert torch.equal(leaves[f"{site}/map"], flat(read_tensors(model)))
        assert torch.equal(leaves[f"{site}/untrained"], first)
        assert leaves[f"{site}/patients"].tolist() == [len(set(data.sites[site]["val"].patients))]
    assert not torch.equal(leaves["a/map"], leaves["a/untrained"])
    assert read_run(finished).opened == opened, "no test data are used"


def test_models_that_stay_at_sites_are_their_own(finished: Path) -> None:
    """And what sites keep is no part of the untrained model."""
    file, _ = explain(finished, "local")
    leaves = read_tensors(file)
    assert len({tuple(leaves[f"{site}/map"].tolist()) for site in "abc"}) == 3
    first = flat(read_plan(file.parent / "model.safetensors").build_task().first(5))
    assert all(torch.equal(leaves[f"{site}/untrained"], first) for site in "abc")


def test_each_site_that_refuses_is_named_with_its_reason(finished: Path) -> None:
    plan = read_plan(finished / "arms" / "fedavg-seed5" / "model.safetensors")
    never = Enforced(Policy(allow=Allow(never=("explain/*",))), plan)
    file, refused = explain(finished, "fedavg", policies={"b": never})
    assert refused.keys() == {"b"}
    assert "'explain/val' never runs here" in refused["b"]
    assert {key.partition("/")[0] for key in read_tensors(file)} == {"a", "c"}
    with pytest.raises(NotExplained, match=r"no site sent an attribution map: a: .*never runs here.*; b: .*; c: "):
        explain(finished, "fedavg", policies=dict.fromkeys("abc", never))


def test_a_finished_run_is_the_tested_one_unless_another_is_named(finished: Path) -> None:
    by_default = finished_method(finished)
    assert by_default.folder.name in ("fedavg-seed5", "local-seed5")
    other = finished_method(finished, "local", 7)
    assert (other.folder.name, other.seed) == ("local-seed7", 7)
    assert set(other.engine.sites) == set("abcd") == set(other.data.sites)
    assert other.data.fingerprint == federate(parse(read_run(finished).study).data, 7).fingerprint
    answers, refused = other.ask("score/val", ["a", "d"])
    assert list(answers) == ["a"], "d has no validation data, and no answer"
    assert refused == {}
    with pytest.raises(
        NotFinished, match="no model; the method run is not finished, or the run has no method 'median'"
    ):
        finished_method(finished, "median")


def test_a_run_without_a_tested_method_is_not_finished(tmp_path: Path) -> None:
    text = study(tmp_path, ["fedavg"], rounds=2)
    events = run(parse(text), text, tmp_path / "run")
    while next(events).what != "round":
        pass
    events.close()
    with pytest.raises(NotFinished, match="no method has been tested yet"):
        explain(tmp_path / "run")
    with pytest.raises(NotFinished, match="fedavg-seed5: no model; the method run is not finished"):
        explain(tmp_path / "run", "fedavg")


def test_a_map_of_a_table_names_its_features(tmp_path: Path) -> None:
    table = registry(tmp_path)
    text = study(tmp_path, ["fedavg"], rounds=1).replace(f'path = "{tmp_path}/small.npz"\nkind = "npz"', "")
    given = f'kind = "table"\npath = "{table["path"]}"\nlabel = "y"\ncategories = ["kind"]\n'
    text = text.replace('external = ["d"]\n', given)
    list(run(parse(text), text, tmp_path / "run"))
    with safe_open(explain(tmp_path / "run")[0], "pt") as stored:
        features = stored.metadata()["features"].split("\n")
    assert features[0] == "age"
    assert len(features) == read_plan(tmp_path / "run" / "arms" / "fedavg-seed5" / "model.safetensors").inputs[0]

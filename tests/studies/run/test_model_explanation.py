"""What a model looks at: the axioms by hand, one vote a patient, nothing of few patients, policies, and the section."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from polyclinic.core.execution import Refused
from polyclinic.core.tree import Tree
from polyclinic.data.examples import Examples
from polyclinic.engines.policy.site_policy import Allow, Enforced, Policy
from polyclinic.evaluation.records.run_reader import read_run
from polyclinic.learning.networks.model_tree import params_of
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.saliency import saliency
from polyclinic.learning.tasks.segmentation import Segmentation
from polyclinic.report import build_report
from polyclinic.studies.config.study_config import parse
from polyclinic.studies.records.saliency_maps import Explanation, read_explanation, spearman
from polyclinic.studies.run.finished_method import NotFinished
from polyclinic.studies.run.model_explanation import NotExplained, explain
from polyclinic.studies.run.scheduler import run as run_study
from tests.report.test_report import FEW, LITTLE
from tests.support.known import known
from tests.support.small_runs import npz
from tests.support.synthetic_run import write_maps, write_run

STUDY = """
name = "looks"
rounds = 2
seeds = [0]
[data]
path = "{path}"
kind = "npz"
sites = "site"
external = ["d"]
split = [0.5, 0.3, 0.2]
[task]
options = {{ width = 4, depth = 2 }}
[training]
batch_size = 8
[engine]
kind = "in-process"
[[methods]]
name = "fedavg"
"""


def linear() -> Any:
    """Two classes; the log odds of the second is 3 a − b, and c counts for nothing."""
    model = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, 0.0, 1.0], [3.0, -1.0, 1.0]]))
    return model


def task_and_params() -> tuple[Classification, Tree]:
    network: Any = linear
    return Classification(network), params_of(linear())


def some(inputs: Any, patients: Any) -> Any:
    inputs = torch.tensor(inputs, dtype=torch.float32)
    return Examples(
        inputs, torch.zeros(len(inputs), dtype=torch.int64), tuple(patients), tuple(map(str, range(len(inputs))))
    )


@pytest.fixture(autouse=True)
def captum() -> None:
    pytest.importorskip("captum", reason="needs polyclinic[explain]")


def test_a_linear_model_is_explained_by_hand() -> None:
    task, params = task_and_params()
    found = saliency(task, params, some([[1.0, 1.0, 5.0], [2.0, 0.0, 1.0]], "ab"), fewest=2)
    # |w x| of the difference of the two classes: (3, 1, 0) / 4 and (6, 0, 0) / 6
    torch.testing.assert_close(found["map"], torch.tensor([(0.75 + 1) / 2, 0.25 / 2, 0.0]))
    assert found["patients"].tolist() == [2]
    assert float(found["map"].sum()) == pytest.approx(1)


def test_a_patient_has_one_vote_however_many_images() -> None:
    rows = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    task, params = task_and_params()
    once = saliency(task, params, some(rows, "ab"), fewest=2)["map"]
    often = saliency(task, params, some([rows[0]] * 9 + [rows[1]], "a" * 9 + "b"), fewest=2, size=4)["map"]
    torch.testing.assert_close(once, often)


def test_few_patients_tell_nothing() -> None:
    task, params = task_and_params()
    with pytest.raises(Refused, match="9 patients, but a mean map requires at least 10"):
        saliency(task, params, some(np.eye(3)[[0, 1, 2] * 6].tolist(), "abcdefghi" * 2))
    network: Any = linear
    seg = Segmentation(network)
    with pytest.raises(Refused, match="'segmentation' cannot be explained"):
        saliency(seg, params_of(linear()), some(np.ones((10, 3)).tolist(), "abcdefghij"))


def test_maps_that_are_shuffled_alike_agree_and_others_do_not() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.uniform(size=(2, 20, 20))
    assert spearman(a, a**3) == pytest.approx(1)
    assert spearman(a, -a) == pytest.approx(-1)
    assert abs(known(spearman(a, b))) < 0.15
    assert spearman(a, np.ones((20, 20))) is None
    alone = Explanation("m", 0, {"ada": a}, {"ada": 10}, {})
    assert alone.agreement("ada") is None
    assert alone.unlearned("ada") is None


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("runs")
    text = STUDY.format(path=npz(folder, site=np.array(list("aaabbbcccd"))[np.arange(160) % 10]))
    for _ in run_study(parse(text), text, folder / "looks"):
        pass
    return folder / "looks"


def test_every_site_is_asked_and_the_report_shows_it(trained: Any) -> None:
    opened = read_run(trained).opened
    file, refused = explain(trained)
    found = known(read_explanation(read_run(trained), "fedavg"))
    assert file.parent.name == "fedavg-seed0"
    assert found.maps.keys() | refused.keys() == {s.name for s in read_run(trained).info.sites if s.role == "training"}
    assert all(m.sum() == pytest.approx(1, abs=1e-4) and (m >= 0).all() for m in found.maps.values())
    assert all(n >= 10 for n in found.patients.values())
    page = build_report(trained, options=FEW).read_text(encoding="utf-8")
    assert "Attribution maps" in page
    assert read_run(trained).opened == opened  # test data stay closed


def test_a_policy_may_refuse(trained: Any) -> None:
    from polyclinic.studies.run.run_directory import read_plan

    plan = read_plan(trained / "arms" / "fedavg-seed0" / "model.safetensors")
    sites = [s.name for s in read_run(trained).info.sites if s.role == "training"]
    strict = Enforced(Policy(), plan)
    _, refused = explain(trained, policies={sites[0]: strict})
    assert "allow.gather lists the permitted parts" in refused[sites[0]]
    never = Enforced(Policy(allow=Allow(never=("explain/*",))), plan)
    with pytest.raises(NotExplained, match=r"'explain/val' never runs here \(allow.never\)"):
        explain(trained, policies=dict.fromkeys(sites, never))
    open_ = Enforced(Policy(allow=Allow(gather=("explain",))), plan)
    _, refused = explain(trained, policies=dict.fromkeys(sites, open_))
    assert sites[0] not in refused


def test_what_cannot_be_explained_says_why(trained: Any, tmp_path: Path) -> None:
    with pytest.raises(NotFinished, match="the run has no method 'fedbn'"):
        explain(trained, "fedbn")
    made = write_run(tmp_path / "r", sites=LITTLE, seeds=(0,), methods=("fedavg",))
    with pytest.raises(NotFinished, match="no model; the method run is not finished"):
        explain(made)


@pytest.mark.parametrize("shape", [(16, 16), (100, 90), (6, 12, 14), (30,)])
def test_maps_of_every_shape_are_drawn(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = write_run(tmp_path / "r", sites=LITTLE, seeds=(0,), methods=("fedavg",))
    write_maps(path, shape, "fedavg")
    page = build_report(path, options=FEW)
    text = page.read_text(encoding="utf-8")
    assert "Agreement over 2 sites: at least" in text
    assert ("region 3" in text) == (len(shape) == 1)
    assert build_report(path, tmp_path / "again", FEW).read_bytes() == page.read_bytes()
    assert (page.parent / "tables" / "agreement_of_sites.csv").read_text().startswith("site,patients,others,untrained")

"""Exports give the numbers that the model gives."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polyclinic.engines.plan import Plan
from polyclinic.errors import IntegrityError
from polyclinic.learning.networks.model_tree import params_of
from polyclinic.studies.export.model_export import NotExported, export, network
from polyclinic.studies.run.run_directory import read_plan, write_tensors
from tests.support.synthetic_run import write_run

PLAN = Plan("classification", "cnn", (1, 8, 8), 2, "fedavg", ("ada", "bo"), 3, network_options={"width": 4, "depth": 2})
LITTLE = {"ada": ("training", 40, 0.5, 0.0, 0.0), "bo": ("training", 30, 0.4, 0.2, 0.1)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run with a model, and that model."""
    path = write_run(tmp_path_factory.mktemp("runs") / "r", sites=LITTLE, seeds=(0,), methods=("local", "fedavg"))
    torch.manual_seed(3)
    model = network(json.loads(PLAN.to_json()))
    for _ in range(3):
        model(torch.randn(16, 1, 8, 8))  # running statistics other than the first ones
    file = path / "arms" / "fedavg-seed0" / "model.safetensors"
    write_tensors(file, params_of(model), {"plan": PLAN.to_json()})
    return path, model.eval()


@pytest.fixture
def images() -> Any:
    return torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
def test_a_bundle_gives_the_same_numbers_in_monai(made: Any, images: Any, tmp_path: Path) -> None:
    from monai.bundle import ConfigParser

    run, model = made
    folder = export(run, "bundle", tmp_path / "bundle")
    parser = ConfigParser()
    parser.read_config(str(folder / "configs" / "inference.json"))
    parser["bundle_root"] = str(folder)
    built = parser.get_parsed_content("network_def")
    parser.get_parsed_content("load")
    with torch.inference_mode():
        torch.testing.assert_close(built.eval()(images), model(images), rtol=0, atol=0)
    about = json.loads((folder / "configs" / "metadata.json").read_text())
    assert about["network_data_format"]["inputs"]["image"]["spatial_shape"] == [8, 8]
    assert about["network_data_format"]["outputs"]["pred"]["channel_def"] == {"0": "benign", "1": "malignant"}
    assert (folder / "docs" / "README.md").read_text().startswith("#")


@pytest.mark.slow
def test_monais_own_workflow_and_checks_take_the_bundle(made: Any, images: Any, tmp_path: Path) -> None:
    from monai.bundle import ConfigWorkflow, verify_net_in_out

    run, model = made
    folder = export(run, "bundle", tmp_path / "bundle")
    config, meta = (str(folder / "configs" / f"{k}.json") for k in ("inference", "metadata"))
    verify_net_in_out("network_def", meta_file=meta, config_file=config, device="cpu")
    flow = ConfigWorkflow(config, meta, logging_file=False, workflow_type=None, bundle_root=str(folder), image=images)
    flow.initialize()
    with torch.inference_mode():
        (said,) = flow.run()
        torch.testing.assert_close(said, model(images), rtol=0, atol=0)
    flow.finalize()


@pytest.mark.slow
def test_torch_export_takes_any_batch(made: Any, images: Any, tmp_path: Path) -> None:
    run, model = made
    loaded = torch.export.load(export(run, "pt2", tmp_path / "m.pt2")).module()
    for batch in (images, images[:3]):
        torch.testing.assert_close(loaded(batch), model(batch))


@pytest.mark.slow
def test_onnx_gives_the_same_numbers(made: Any, images: Any, tmp_path: Path) -> None:
    reference = pytest.importorskip("onnx.reference", reason="needs polyclinic[export]")
    pytest.importorskip("onnxscript", reason="needs polyclinic[export]")
    run, model = made
    session = reference.ReferenceEvaluator(str(export(run, "onnx", tmp_path / "m.onnx")))
    for batch in (images, images[:3]):
        (said,) = session.run(None, {"image": batch.numpy()})
        np.testing.assert_allclose(said, model(batch).detach().numpy(), atol=1e-5)


@pytest.mark.slow
def test_onnx_runs_where_it_will_be_deployed(made: Any, images: Any, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    pytest.importorskip("onnxscript", reason="needs polyclinic[export]")
    run, model = made
    file = export(run, "onnx", tmp_path / "m.onnx")
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for batch in (images, images[:3]):
        (said,) = session.run(None, {"image": batch.numpy()})
        np.testing.assert_allclose(said, model(batch).detach().numpy(), atol=1e-5)


def test_safetensors_carry_their_plan(made: Any, tmp_path: Path) -> None:
    assert read_plan(export(made[0], "safetensors", tmp_path / "m.safetensors")) == PLAN


def test_what_cannot_be_exported_says_why(made: Any, tmp_path: Path) -> None:
    run, _ = made
    with pytest.raises(NotExported, match="no format is called 'h5'; the formats are safetensors, onnx"):
        export(run, "h5", tmp_path / "m")
    with pytest.raises(NotExported, match="no such model"):
        export(run, "pt2", tmp_path / "m", label="local")
    file = run / "arms" / "local-seed0" / "model.safetensors"
    write_tensors(file, {"x": torch.zeros(1)})
    with pytest.raises(IntegrityError, match="carries no plan"):
        export(run, "pt2", tmp_path / "m", label="local")
    file.unlink()

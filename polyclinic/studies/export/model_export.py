"""Export of a trained model to formats of other tools: ONNX, torch.export, a MONAI bundle, adapters of peft.

The bundle follows the layout of MONAI's bundle specification (``configs/metadata.json``, ``configs/inference.json``,
``docs/README.md``; https://docs.monai.io/en/stable/mb_specification.html), with one difference: weights are
safetensors, since nothing is pickled. Its network is built from the plan, as data, by ``network`` in this module.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from polyclinic import __version__
from polyclinic.core import atomic
from polyclinic.engines.plan import Plan
from polyclinic.errors import MissingDependency, PolyclinicError, RunError
from polyclinic.evaluation.records.method_runs import arm_name
from polyclinic.evaluation.records.run_reader import Run, read_run
from polyclinic.learning.networks.adapters import DOWN, UP, Adapted, is_factor, merge_adapters
from polyclinic.learning.networks.model_tree import load, params_of
from polyclinic.learning.weights import store
from polyclinic.studies.config.study_config import parse
from polyclinic.studies.inference.models import READING
from polyclinic.studies.inference.reading import Reading
from polyclinic.studies.run import data_identity
from polyclinic.studies.run.run_directory import read_plan, read_tensors, write_tensors

log = logging.getLogger(__name__)
FORMATS = ("safetensors", "onnx", "pt2", "bundle", "peft")
FOLDERS = ("bundle", "peft")


class NotExported(RunError, ValueError):
    """A model that cannot be written in this format. The message gives the reason."""


def export(run_dir: str | Path, form: str, out: str | Path, label: str = "", seed: int | None = None) -> Path:
    """Write the model of one method run. A warning is logged if the run's data have changed or cannot be read.

    A model with start weights is written whole, with its adapters merged into its layers; as ``peft``, only the trained
    tensors are written.

    Args:
        run_dir: The run folder.
        form: One of ``FORMATS``.
        out: The file, or for a bundle the folder, to write.
        label: Label of the method; by default the headline method of the report.
        seed: Seed of the method run; by default the first.

    Returns:
        ``out``.

    Raises:
        NotARun: If the folder is not a run.
        NotExported: If the method run has no model yet, the model cannot be written in this format, or the license of
            its start weights forbids to pass them on.
        MissingDependency: If ONNX is requested and not installed.
    """
    if form not in FORMATS:
        raise NotExported(f"no format is called {form!r}; the formats are {', '.join(FORMATS)}")
    run, out = read_run(run_dir), Path(out)
    label, seed = label or _headline(run), run.info.seeds[0] if seed is None else seed
    file = run.path / "arms" / arm_name(label, seed, 0 if run.info.folds else None) / "model.safetensors"
    if not file.is_file():
        raise NotExported(f"{file}: no such model; the method run is not finished, or the run has no method {label!r}")
    _warn_of_other_data(run)
    plan, params = read_plan(file), read_tensors(file)
    try:
        model = load(network(json.loads(plan.to_json())), params).eval()
    except ValueError as error:
        raise NotExported(
            f"{file} is not a whole model: with {plan.method} each site keeps layers of its own, which no file has "
            f"({error}). Choose another method with label"
        ) from error
    (out if form in FOLDERS else out.parent).mkdir(parents=True, exist_ok=True)
    if form == "peft":
        write_peft(out, plan, model)
        return out
    if plan.tuning:
        _require_redistribution(plan, form)
        plan, model = replace(plan, tuning={}), merge_adapters(model)
        params = {name: leaf for name, leaf in model.state_dict().items() if leaf.is_floating_point()}
    example = torch.zeros(2, *plan.inputs)
    if form == "safetensors":
        write_tensors(out, params, {"plan": plan.to_json()})
    elif form == "bundle":
        _bundle(run, plan, model, out)
    elif form == "pt2":
        torch.export.save(_traced(model, example), out)
    else:
        _onnx(model, example, out)
    return out


def network(plan: Mapping[str, Any]) -> nn.Module:
    """The network that a plan names, with random parameters. What a bundle's ``network_def`` calls."""
    built = Plan.from_json(json.dumps(dict(plan)))
    module: nn.Module = (built.build_method().prediction_task or built.build_task()).model()
    return module


def _require_redistribution(plan: Plan, form: str) -> None:
    """Require that the start weights in the model may be passed on.

    Raises:
        NotExported: If their license forbids it.
    """
    item = store.find(plan.tuning["weights"]["sha256"])
    if not item.card.redistribute:
        raise NotExported(
            f"the license of the start weights {item.card.name} ({item.card.license}) forbids to pass them on, and "
            f"{form} would contain them: write what was trained alone, with --form peft"
        )


def write_peft(out: Path, plan: Plan, model: nn.Module) -> None:
    """Write the adapters of ``model`` as a folder of the library ``peft``, together with the other trained tensors.

    Raises:
        NotExported: If it has no adapters.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Adapted)}
    if not layers:
        raise NotExported(
            "peft holds adapters, and this model has none: train with [task.lora], or choose another format"
        )
    names = {DOWN: ".lora_A.weight", UP: ".lora_B.weight"}
    leaves: dict[str, Any] = {}
    for name, leaf in params_of(model).items():
        theirs = next((name.removesuffix(ours) + end for ours, end in names.items() if name.endswith(ours)), name)
        leaves[f"base_model.model.{theirs}"] = leaf
    write_tensors(out / "adapter_model.safetensors", leaves, {"format": "pt"})
    heads = {name.rpartition(".")[0] for name in params_of(model) if not is_factor(name)}
    config = {
        "peft_type": "LORA",
        "r": plan.tuning["lora"]["rank"],
        "lora_alpha": plan.tuning["lora"]["alpha"],
        "target_modules": sorted(layers),
        "modules_to_save": sorted(heads) or None,
        "lora_dropout": 0.0,
        "bias": "none",
        "base_model_name_or_path": f"sha256:{plan.tuning['weights']['sha256']}",
        "inference_mode": True,
    }
    atomic.write_json(out / "adapter_config.json", config)


def _warn_of_other_data(run: Run) -> None:
    """Log a warning if the data at their place are not those that the model was trained on."""
    if not (run.path / data_identity.FILE).is_file():
        return  # a run between hospitals, whose data are not here
    try:
        study = parse(run.study, run.path / "study.toml")
        data_identity.require_same_data(run, study, study.data.source())
    except data_identity.DataChanged as error:
        log.warning("%s\nThe exported model was trained on the earlier data", error)
    except PolyclinicError as error:
        log.warning("%s: its data cannot be compared with those it was trained on: %s", run.path, error)


def _headline(run: Run) -> str:
    from polyclinic.evaluation.run_evaluation import evaluate

    label = evaluate(run).headline
    if label is None:
        raise NotExported(f"{run.path}: no method has been tested yet; name one with label=")
    return label


def _traced(model: nn.Module, example: torch.Tensor) -> Any:
    try:
        return torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except Exception as error:
        raise NotExported(f"torch.export cannot follow this network: {type(error).__name__}: {error}") from error


def _onnx(model: nn.Module, example: torch.Tensor, out: Path) -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise MissingDependency("export", "writing ONNX needs onnx and onnxscript") from None
    program = torch.onnx.export(
        model,
        (example,),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
        input_names=["image"],
        output_names=["prediction"],
    )
    if program is None:
        raise NotExported("torch.onnx wrote nothing for this network")
    program.save(str(out))


def _bundle(run: Run, plan: Plan, model: nn.Module, out: Path) -> None:
    for folder in ("configs", "models", "docs"):
        (out / folder).mkdir(exist_ok=True)
    weights = {name: leaf.clone() for name, leaf in model.state_dict().items()}  # some networks list a tensor twice
    write_tensors(out / "models" / "model.safetensors", weights)
    configs = {"metadata": _metadata(run, plan, model), "inference": _inference(plan)}
    if (reading := _reading(run, plan)) is not None:
        configs[Path(READING).stem] = reading
    for name, config in configs.items():
        atomic.write_json(out / "configs" / f"{name}.json", config)
    card = run.path / "report" / "model_card.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else f"# {run.info.title or run.info.name}\n"
    atomic.write(out / "docs" / "README.md", text)


def _reading(run: Run, plan: Plan) -> dict[str, Any] | None:
    """Return how the run's images are read, for ``polyclinic predict``; None if they are not read from image files."""
    try:
        study = parse(run.study, run.path / "study.toml")
        reading = Reading.of(study.data.source(), plan.inputs, plan.kind == "segmentation").table
    except PolyclinicError as error:
        log.warning("%s: the bundle cannot be used with polyclinic predict: %s", run.path, error)
        return None
    return {**reading, "classes": list(run.info.classes), "study": run.info.hash}


def _inference(plan: Plan) -> dict[str, Any]:
    return {
        "bundle_root": ".",
        "device": "cpu",
        "network_def": {
            "_target_": "polyclinic.studies.export.model_export.network",
            "plan": json.loads(plan.to_json()),
        },
        "weights": {
            "_target_": "safetensors.torch.load_file",
            "filename": "$@bundle_root + '/models/model.safetensors'",
        },
        "load": "$@network_def.load_state_dict(@weights)",
        "image": {"_target_": "torch.zeros", "size": [1, *plan.inputs]},  # the user of the bundle provides an image
        "inferer": {"_target_": "SimpleInferer"},
        "prediction": "$@inferer(@image, @network_def.eval())",
        "initialize": ["$@load"],
        "run": ["$@prediction"],
        "finalize": [],
    }


def _metadata(run: Run, plan: Plan, model: nn.Module) -> dict[str, Any]:
    from importlib.metadata import version

    with torch.inference_mode():
        answer = model(torch.zeros(2, *plan.inputs))
    info, channels, *spatial = run.info, *plan.inputs
    kind = {"modality": "n/a", "dtype": "float32", "is_patch_data": False, "value_range": []}
    image = {"type": "image", "format": "magnitude", "num_channels": channels, "spatial_shape": spatial}
    outputs = answer[0] if isinstance(answer, tuple | list) else answer
    classes = {str(i): name for i, name in enumerate(info.classes)}
    prediction = {"type": "probabilities", "format": plan.kind, "num_channels": int(outputs.shape[1])}
    return {
        "schema": "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20220324.json",
        "version": "0.1.0",
        "changelog": {"0.1.0": f"trained by {plan.method}, study {info.name}, hash {info.hash[:8]}"},
        "monai_version": version("monai"),
        "pytorch_version": torch.__version__.split("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {"polyclinic": __version__, "safetensors": version("safetensors")},
        "task": f"{plan.kind}, trained by federated learning",
        "description": info.title or info.name,
        "authors": "",
        "copyright": "",
        "data_source": info.data.title,
        "data_type": "",
        "intended_use": "Research. To be written by a person.",
        "references": [r for r in dict.fromkeys([info.data.citation, *(m.citation for m in info.methods)]) if r],
        "network_data_format": {
            "inputs": {"image": {**kind, **image, "channel_def": {"0": "image"}}},
            "outputs": {
                "pred": {**kind, **prediction, "spatial_shape": list(outputs.shape[2:]), "channel_def": classes}
            },
        },
    }

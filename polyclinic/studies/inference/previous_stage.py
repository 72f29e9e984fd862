"""The previous stage of a cascade, from the run that trained it."""

import tempfile
from pathlib import Path

from polyclinic.data.collection import FromFiles
from polyclinic.data.federation import federate
from polyclinic.data.preprocessing.previous_stage import PreviousStage, image_key
from polyclinic.data.source import Info
from polyclinic.data.splits import Fold
from polyclinic.errors import ConfigError
from polyclinic.evaluation.records.run_reader import read_run
from polyclinic.learning.weights import store
from polyclinic.studies.inference.models import Member, TrainedModel, trained_model
from polyclinic.studies.inference.reading import Reading
from polyclinic.studies.run.run_directory import write_tensors


class NoPreviousStage(ConfigError):
    """A run whose model cannot be the previous stage of a cascade. The message gives the reason."""


def previous_stage(origin: Path, info: Info | None, method: str = "") -> PreviousStage:
    """Return the models of a run as the previous stage of another study, after adding them to the store of weights.

    Args:
        origin: The run folder. Its data must be readable, so that it is known which images each model held out. This is
            not known of a run between hospitals.
        info: Description of the other study's data, if they are here. Its classes may be unknown.
        method: Label of the method; by default the report's main method.

    Raises:
        NoPreviousStage: If the run predicts something else than the study, or has models of another kind.
        NotARun: If the folder is not a run.
        NoModel: If there is no such model.
        DataError: If the data of the run cannot be read.
    """
    model = trained_model(origin, method)
    plan, reading = model.plan, model.reading
    problems = []
    if plan.kind != "segmentation":
        problems.append(f"predicts {plan.kind}, and a cascade is for segmentation")
    elif info is not None and info.task != "segmentation":
        problems.append(f"predicts masks, and the study's data are for {info.task}")
    elif info is not None and info.classes and tuple(info.classes) != model.classes:
        names = (", ".join(classes) for classes in (model.classes, info.classes))
        problems.append("predicts the classes {}, and the study has {}".format(*names))
    if plan.tuning:
        problems.append("was trained from start weights or with adapters, which a previous stage cannot have")
    if not isinstance(reading, Reading) or not reading.patch:
        problems.append("was not trained on patches: train it with a plan of `polyclinic plan`")
    elif any(isinstance(step, PreviousStage) for step in reading.steps):
        problems.append("is itself the second stage of a cascade")
    if problems:
        raise NoPreviousStage("\n".join(f"{origin}: its model {one}" for one in problems))
    assert isinstance(reading, Reading)
    known, held_out = _images(model)
    stage = PreviousStage(
        plan.network,
        tuple(plan.inputs),
        plan.outputs,
        reading.steps,
        tuple(_stored(member, origin, model.method) for member in model.members),
        dict(plan.network_options),
        tuple(map(tuple, plan.task.get("regions", ()))),
        known,
        held_out,
    )
    stage.require_models()
    return stage


def _stored(member: Member, origin: Path, method: str) -> str:
    """Add a model to the store of weights, and return its hash."""
    store.root().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=store.root(), prefix=".adding-") as folder:
        file = Path(folder) / store.FILE
        write_tensors(file, member.params)
        sha256 = store.hash_of(file)
        source = f"{member.name} of the run {origin.resolve().name}"
        card = store.Card(f"stage-{sha256[:12]}", "not stated", source, notes=(f"method {method}",))
        return store.add(file, card).sha256


def _images(model: TrainedModel) -> tuple[str, tuple[str, ...]]:
    """Return the digits of all images of the model's run, and of those that each of its members held out."""
    assert model.data is not None
    source, info = model.data.data.source(), read_run(model.origin).info
    if info.engine.get("kind") == "flare":
        return "", ()  # the images are at the hospitals
    if not isinstance(source, FromFiles):
        raise NoPreviousStage(f"{model.origin}: its images are not files")
    collection = source.collection
    pairs = zip(collection.entries, collection.pictures(), strict=True)
    keys = {entry.id: image_key(picture) for entry, picture in pairs if picture is not None}
    known, held_out = set[str](), []
    for member in model.members:
        seed, _, number = member.name.removeprefix(f"{model.method}-seed").partition("-fold")
        fold = Fold(int(number), info.folds, info.folds_by or "patients") if number else None
        sites = federate(model.data.data, int(seed), fold, source).sites
        by_role = [(role, keys[name]) for roles in sites.values() for role, data in roles.items() for name in data.ids]
        trained = {key for role, key in by_role if role != "test"}
        held_out.append("".join(sorted({key for role, key in by_role if role == "test"} - trained)))
        known |= {key for _, key in by_role}
    return "".join(sorted(known)), tuple(held_out)

"""nnU-Net's cascade: the masks of a run at low resolution are inputs of a run at full resolution, and of its use."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from polyclinic.cli import data
from polyclinic.data.cases.cases import Cases
from polyclinic.data.collection import FromFiles
from polyclinic.data.config import DataSpec
from polyclinic.data.federation import federate
from polyclinic.data.preprocessing.pipeline_config import apply, fingerprint, parsed, plain
from polyclinic.data.preprocessing.previous_stage import PreviousStage
from polyclinic.errors import ConfigError, DataError
from polyclinic.evaluation.records.run_reader import NotARun
from polyclinic.learning.weights import store
from polyclinic.studies.config.preflight import preflight
from polyclinic.studies.config.study_config import Study, parse
from polyclinic.studies.inference.frozen_evaluation import evaluate_frozen
from polyclinic.studies.inference.models import trained_model
from polyclinic.studies.inference.predict import Work
from polyclinic.studies.inference.predictor import Predictor
from polyclinic.studies.run.run_directory import Stopped, read_tensors
from polyclinic.studies.run.run_lock import ask_to_stop
from polyclinic.studies.run.scheduler import run
from tests.data.sources.test_folders import nifti
from tests.support.small_runs import facts, same, tensors

STUDY = """\
name = "NAME"
rounds = 1
[data]
kind = "pairs"
path = "PATH"
classes = ["background", "one", "two"]
patient = "(.*)"
min_patients = 1
sites = { partition = "iid", count = 1 }
split = [0.7, 0.1, 0.2]
[task]
kind = "segmentation"
network = "nnunet"
[training]
steps = 2
batch_size = 2
optimizer = "adam"
lr = 0.01
[augmentation]
recipe = "nnunet"
[engine]
kind = "in-process"
[[methods]]
name = "fedavg"
"""
HIPPOCAMPUS = Path(os.environ.get("POLYCLINIC_DATA", "")) / "msd_hippocampus" / "msd_task04_hippocampus_260.zip"
MEMORY_GB = 0.005
"""So little that nnU-Net makes a stage of low resolution of volumes of 30 voxels a side."""


def write_volumes(folder: Path, count: int = 16) -> Path:
    """Write noisy volumes of unequal size, with a ball of two halves."""
    rng = np.random.default_rng(0)
    for i in range(count):
        size = rng.integers(26, 34, 3)
        grid = np.indices(size.tolist()).transpose(1, 2, 3, 0)
        mask = (((grid - size / 2) ** 2).sum(-1) < 36).astype(np.uint8)
        mask[grid[..., 2] > size[2] // 2] *= 2
        values = rng.normal(100, 10, size) + 60 * mask
        nifti(folder / "images" / f"ball{i:02}.nii.gz", values.astype(np.float32))
        nifti(folder / "labels" / f"ball{i:02}.nii.gz", mask)
    return folder


def planned(root: Path, name: str, text: str = STUDY, **how: Any) -> str:
    """Plan a study of the volumes of ``root``, and return its text with the plan."""
    file = root / f"{name}.toml"
    file.write_text(text.replace("NAME", name).replace("PATH", str(root / "volumes")))
    data.case_plan(file, force=True, **{"width": 2, "memory_gb": MEMORY_GB, **how})
    return file.read_text().replace("[data]", f'[data]\nplan = "{root / f"{name}.plan.toml"}"')


def finish(text: str, folder: Path) -> Path:
    """Run a study to its end."""
    list(run(parse(text), text, folder))
    return folder


def stage_of(study: Study) -> PreviousStage:
    """The previous stage of a study."""
    found = study.data.source()
    assert isinstance(found, FromFiles)
    stage = found.collection.steps[-1]
    assert isinstance(stage, PreviousStage)
    return stage


@pytest.fixture(scope="module", autouse=True)
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache and a store of weights for this module."""
    folder = tmp_path_factory.mktemp("stores")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYCLINIC_CACHE", str(folder / "cache"))
        patch.setenv("POLYCLINIC_WEIGHTS", str(folder / "weights"))
        yield folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, stores: Path) -> Path:
    """A folder with the volumes, a finished run of low resolution, and one of its cascade."""
    folder = tmp_path_factory.mktemp("cascade")
    write_volumes(folder / "volumes")
    finish(planned(folder, "low", configuration="3d_lowres"), folder / "low")
    text = planned(folder, "full", previous=folder / "low")
    (folder / "full.toml").write_text(text)
    finish(text, folder / "full")
    return folder


@pytest.fixture
def full(root: Path) -> str:
    """The study of full resolution."""
    return (root / "full.toml").read_text()


def test_the_plan_is_that_of_full_resolution_with_a_last_step(root: Path, full: str) -> None:
    planned(root, "alone", configuration="3d_fullres")
    alone, cascade = ((root / f"{name}.plan.toml").read_text() for name in ("alone", "full"))
    pattern = r"\n\[use\]\n.*\n\n\[facts\]"
    uses = [re.search(pattern, text, re.DOTALL) for text in (alone, cascade)]
    one, two = (found.group().splitlines() for found in uses if found)
    (step,) = [line for line in two if line not in one]
    assert step.startswith('    { step = "previous_stage"')
    assert two[two.index(step) + 1] == "]"
    assert 'configuration = "3d_cascade_fullres"' in cascade
    assert "# The keys known and held_out are hashes of images: remove them" in cascade
    assert parse(full).task.batch_dice is True  # as nnU-Net, for full resolution if there is a low one
    stage = stage_of(parse(full))
    assert stage.spacing_mm is not None
    assert min(stage.spacing_mm) > 1.5
    assert parsed(json.loads(json.dumps(plain([stage])))) == (stage,)
    assert stage.inputs == trained_model(root / "low").plan.inputs


def test_every_part_of_the_stage_is_part_of_the_hash(full: str) -> None:
    """Another model, another step of its preprocessing, another image: other masks, so another study and other cases."""
    stage = stage_of(parse(full))
    table = plain([stage])[0]
    for key, value in (("models", ["0" * 64]), ("steps", table["steps"][:-1]), ("known", ""), ("outputs", 2)):
        assert fingerprint(parsed([{**table, key: value}])) != fingerprint([stage]), key


def test_the_network_gets_the_mask_of_each_case(root: Path, full: str) -> None:
    """One channel for each label, 0 or 1, which is what the run of low resolution predicts for the file."""
    out = root / "masks"
    work = Work(Predictor(trained_model(root / "low")), root / "volumes" / "images", out)
    assert not any(done.problem for done in work.run())
    sites = federate(parse(full).data, 0).sites
    plan = trained_model(root / "full").plan
    assert plan.inputs[0] == 1 + 2
    total, shares = 0, []
    for cases in (cases for roles in sites.values() for cases in roles.values()):
        assert isinstance(cases, Cases)
        assert cases.mask_channels == 2
        for i, name in enumerate(cases.ids):
            x, geometry = cases.image(i), cases.files[i].geometry
            assert geometry is not None
            assert x[1:].unique().tolist() in ([0.0], [0.0, 1.0])
            assert float(x[1:].sum(0).max()) <= 1
            labels = geometry.in_file((x[1:] * torch.tensor([1, 2]).view(2, 1, 1, 1)).amax(0)).numpy().transpose()
            whole = np.asarray(nib.load(root / "masks" / f"{name}.nii.gz").dataobj)
            shares.append(float((labels == whole).mean()))
            total += int((labels > 0).sum())
    assert total > 0
    assert np.mean(shares) > 0.99


def test_predict_and_evaluate_run_both_stages(root: Path, full: str) -> None:
    """The masks that predict writes for the test images have the Dice of the run, and so has evaluate."""
    stored = read_tensors(root / "full" / "arms" / "fedavg-seed0" / "predictions.safetensors")
    model = trained_model(root / "full")
    assert not any(done.problem for done in Work(Predictor(model), root / "volumes" / "images", root / "out").run())
    (roles,) = federate(parse(full).data, 0).sites.values()
    found = []
    for name in roles["test"].ids:
        p, t = (np.asarray(nib.load(root / at / f"{name}.nii.gz").dataobj) for at in ("out", "volumes/labels"))
        found += [2.0 * ((p == k) & (t == k)).sum() / max((p == k).sum() + (t == k).sum(), 1) for k in (1, 2)]
    (site,) = {name.partition("/")[0] for name in stored}
    assert stored[f"{site}/dice"].flatten().tolist() == pytest.approx(found, abs=1e-6)
    assert max(found) > 0
    result = evaluate_frozen([model], parse(full))
    assert torch.equal(result.predictions["fedavg", 0][site]["dice"], stored[f"{site}/dice"])


def test_the_bits_do_not_depend_on_workers_threads_and_stops(
    root: Path, full: str, stores: Path, tmp_path: Path
) -> None:
    """Also if the cases are built again."""
    workers = full.replace('kind = "in-process"', 'kind = "workers"\nworkers = 2\nthreads = 4')
    assert same(finish(workers, tmp_path / "workers"), root / "full")
    again = full.replace("rounds = 1", "rounds = 2")
    finish(again, tmp_path / "whole")
    events = run(parse(again), again, tmp_path / "cut")
    while next(events).what != "round":
        pass
    ask_to_stop(tmp_path / "cut")
    with pytest.raises(Stopped):
        list(events)
    stored = list((stores / "cache" / "cases").rglob("*.safetensors"))
    assert stored
    for file in stored:
        file.unlink()
    list(run(parse(again), again, tmp_path / "cut", resume=True))
    a, b = tensors(tmp_path / "whole"), tensors(tmp_path / "cut")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert facts(tmp_path / "whole") == facts(tmp_path / "cut")


def test_cases_of_the_first_training_are_counted_and_refused_as_a_test(root: Path, full: str) -> None:
    """With another split, the first stage would have been trained on test images."""
    notes = federate(parse(full).data, 0).info.notes
    assert any(note.startswith("13 images: predicted by a previous stage that was trained on") for note in notes)
    with pytest.raises(DataError, match=r"previous stage of the cascade was trained on \d+ test images \(ball"):
        federate(parse(full).data, 1)


def test_folds_predict_what_they_held_out(root: Path) -> None:
    """Each case gets the mask of the fold that never saw it, as in nnU-Net, and no case is predicted too well."""
    text = planned(root, "folds", STUDY.replace("rounds = 1", "rounds = 1\nfolds = 2"), configuration="3d_lowres")
    finish(text, root / "folds")
    text = planned(root, "after", previous=root / "folds")
    stage = stage_of(parse(text))
    assert len(stage.models) == 2
    assert {len(keys) for keys in stage.held_out} == {8 * 16}
    study = parse(text)
    (roles,) = federate(study.data, 3).sites.values()  # any split will do
    assert "train" in roles
    assert not any("previous stage" in note for note in federate(study.data, 3).info.notes)
    source = study.data.source()
    assert isinstance(source, FromFiles)
    differences = 0
    for entry, picture in zip(source.collection.entries, source.collection.pictures(), strict=True):
        assert picture is not None
        seen = [name for name in stage.models if entry.id not in _tested(root / "folds", text, stage, name)]
        (held_out,) = set(stage.models) - set(seen)
        steps = source.collection.steps
        stored = source.examples([entry.id])
        assert isinstance(stored, Cases)
        masks = stored.image(0)[1:]
        one, other = (_masks(picture, steps, stage, name) for name in (held_out, seen[0]))
        assert torch.equal(masks, one)
        differences += not torch.equal(one, other)
    assert differences > 0


def _tested(folder: Path, text: str, stage: PreviousStage, model: str) -> set[str]:
    """The test images of the fold whose model has this hash."""
    from polyclinic.data.splits import Fold

    spec: DataSpec = parse((folder / "study.toml").read_text()).data
    number = stage.models.index(model)
    (roles,) = federate(spec, 0, Fold(number, 2, "patients")).sites.values()
    return set(roles["test"].ids)


def _masks(picture: Any, steps: Any, stage: PreviousStage, model: str) -> torch.Tensor:
    """The channels that one model gives."""
    from dataclasses import replace

    single = replace(stage, models=(model,), held_out=(), known="")
    return apply((*steps[:-1], single), picture).pixels[1:]


def test_what_cannot_be_a_previous_stage_is_refused(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "volumes", tmp_path / "volumes")
    with pytest.raises(NotARun):
        planned(tmp_path, "full", previous=root / "nothing")
    with pytest.raises(ConfigError, match="is itself the second stage of a cascade"):
        planned(tmp_path, "full", previous=root / "full")
    with pytest.raises(DataError, match='configuration = "3d_cascade_fullres": needs --previous'):
        planned(tmp_path, "full", configuration="3d_cascade_fullres")
    with pytest.raises(DataError, match='configuration = "3d_fullres": takes no --previous'):
        planned(tmp_path, "full", previous=root / "low", configuration="3d_fullres")
    other = STUDY.replace('"one", "two"', '"left", "right"')
    with pytest.raises(ConfigError, match="predicts the classes background, one, two, and the study has background, l"):
        planned(tmp_path, "full", other, previous=root / "low")
    for file in sorted((tmp_path / "volumes" / "images").iterdir()):
        name = file.name.removesuffix(".nii.gz")
        shutil.copy(file, file.with_name(f"{name}_0000.nii.gz"))
        file.rename(file.with_name(f"{name}_0001.nii.gz"))
    with pytest.raises(DataError, match="takes images of 1 channels, and these have 2"):
        planned(tmp_path, "full", previous=root / "low")


def test_a_run_at_full_resolution_is_no_previous_stage(root: Path) -> None:
    finish(planned(root, "single", configuration="3d_fullres"), root / "single")
    with pytest.raises(DataError, match=r"trained at 2 x 1 x 1 mm, which is no lower resolution than 2 x 1 x 1 mm"):
        planned(root, "wrong", previous=root / "single")


def test_a_missing_or_changed_model_is_named_before_training(
    root: Path, full: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preflight([parse(full)], tmp_path)
    (sha256,) = stage_of(parse(full)).models
    shutil.copytree(store.root(), tmp_path / "weights")
    monkeypatch.setenv("POLYCLINIC_WEIGHTS", str(tmp_path / "weights"))
    file = tmp_path / "weights" / sha256 / store.FILE
    changed = bytearray(file.read_bytes())
    changed[-1] ^= 1
    file.write_bytes(changed)
    with pytest.raises(ConfigError, match=r"previous stage: .* was changed"):
        preflight([parse(full)], tmp_path)
    shutil.rmtree(file.parent)
    with pytest.raises(ConfigError, match=f"previous stage: .*{sha256[:12]}.* are not in the store"):
        preflight([parse(full)], tmp_path)
    monkeypatch.setenv("POLYCLINIC_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"16 files: the model of the previous stage: .* are not in the store"):
        federate(parse(full).data, 0)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('network = "nnunet", inputs', 'network = "nnunet2", inputs', "is none of Polyclinic's networks"),
        ("outputs = 3", "outputs = 4", "previous stage"),
        ('models = ["', 'models = ["x', "is no SHA-256"),
        ("inputs = [1, ", "inputs = [1, 99999", "a patch of more than"),
        ("regions = []", "regions = [[1, 2], [1, 2], [1]]", "has no label outside of the regions after it"),
        ("regions = []", "regions = [[1, 2], [1]]", "give one for each of the 3 outputs"),
        ("width = 2 }", 'width = "2" }', "the model of the previous stage"),
        ('held_out = ["', 'held_out = ["0', "has 16 digits"),
        (
            '{ step = "crop_nonzero" }, { step = "normalize"',
            '{ step = "crop" }, { step = "normalize"',
            "no step is cal",
        ),
    ],
)
def test_a_plan_edited_to_nonsense_is_refused(
    root: Path, full: str, tmp_path: Path, old: str, new: str, message: str
) -> None:
    plan = (root / "full.plan.toml").read_text()
    assert old in plan
    (tmp_path / "edited.plan.toml").write_text(plan.replace(old, new, 1))
    text = full.replace(str(root / "full.plan.toml"), str(tmp_path / "edited.plan.toml"))
    with pytest.raises(ConfigError, match=message):
        preflight([parse(text)], tmp_path)


def test_the_step_is_the_last_one(root: Path, full: str, tmp_path: Path) -> None:
    plan = (root / "full.plan.toml").read_text().replace("\n]\npatch", '\n    { step = "zscore" },\n]\npatch')
    (tmp_path / "edited.plan.toml").write_text(plan)
    with pytest.raises(ConfigError, match="the step previous_stage must be the last one"):
        parse(full.replace(str(root / "full.plan.toml"), str(tmp_path / "edited.plan.toml")))


@pytest.mark.skipif(not HIPPOCAMPUS.is_file(), reason="needs POLYCLINIC_DATA with msd_hippocampus")
@pytest.mark.slow
def test_a_cascade_of_the_hippocampus(tmp_path: Path) -> None:
    """Real cases: the inputs of the second stage overlap with the truth, and it learns from them."""
    text = STUDY.replace('classes = ["background", "one", "two"]\npatient = "(.*)"\n', "max_patients = 40\n")
    text = text.replace("PATH", str(HIPPOCAMPUS)).replace("steps = 2\nbatch_size = 2", "steps = 80\nbatch_size = 4")
    text = text.replace('recipe = "nnunet"', 'recipe = "none"')
    tiny = {"width": 6, "memory_gb": 0.02}  # so little memory that nnU-Net makes a low resolution
    finish(planned(tmp_path, "low", text, configuration="3d_lowres", **tiny), tmp_path / "low")
    cascade = planned(tmp_path, "full", text, previous=tmp_path / "low", **tiny)
    finish(cascade, tmp_path / "full")
    (roles,) = federate(parse(cascade).data, 0).sites.values()
    tested = roles["test"]
    assert isinstance(tested, Cases)
    overlap = []
    for i in range(len(tested)):
        x, y = tested.whole(i)
        for label in (1, 2):
            both = (x[label] > 0).sum() + (y == label).sum()
            overlap.append(float(2 * ((x[label] > 0) & (y == label)).sum() / both))
    finish(planned(tmp_path, "alone", text, configuration="3d_fullres", **tiny), tmp_path / "alone")
    found = {
        folder: leaf
        for folder in ("low", "alone", "full")
        for name, leaf in tensors(tmp_path / folder).items()
        if name.endswith("/dice")
    }
    assert {dice.shape for dice in found.values()} == {(len(tested), 2)}  # the same cases
    means = {name: float(dice.mean()) for name, dice in found.items()}
    print(f"Dice of the inputs {np.mean(overlap):.4f}, and of {means}")  # no claim of a gain
    assert np.mean(overlap) > 0.6
    assert means["full"] > 0.6
    assert abs(np.mean(overlap) - means["low"]) < 0.05  # on another grid

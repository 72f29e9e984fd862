"""What validation builds is what runs: each object once."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polyclinic.data.config import DataSpec
from polyclinic.data.examples import DataError
from polyclinic.data.federation import federate
from polyclinic.data.splits import Fold
from polyclinic.engines.plan import Plan
from polyclinic.errors import PolyclinicError
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.networks.small_networks import Classifier
from polyclinic.studies.config.diagnostics import BadStudy
from polyclinic.studies.config.study_config import parse
from polyclinic.studies.run.resolved_study import resolve
from polyclinic.studies.run.scheduler import run
from tests.studies.run.test_patches import STUDY as PATCHES
from tests.studies.run.test_patches import write_volumes
from tests.support.small_runs import npz, study
from tests.support.start_weights import weights_of


def test_a_run_opens_its_source_and_builds_each_method_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npz(tmp_path)
    text = study(tmp_path, **{"rounds = 4": "rounds = 1"}).split('[[methods]]\nname = "cross"')[0]
    parsed, built, opened = parse(text), Counter[str](), Counter[str]()
    build, source = Plan.build_method, type(parsed.data).source

    def built_once(plan: Plan) -> object:
        built[f"{plan.method} {plan.seed}"] += 1
        return build(plan)

    def opened_once(spec: DataSpec) -> object:
        opened["source"] += 1
        return source(spec)

    monkeypatch.setattr(Plan, "build_method", built_once)
    monkeypatch.setattr(type(parsed.data), "source", opened_once)
    for _ in run(parsed, text, tmp_path / "run"):
        pass
    assert built == {"local 0": 1, "pooled 0": 1, "local 1": 1, "pooled 1": 1}
    assert opened == {"source": 1}


def test_a_changed_method_or_a_trial_is_built_anew(tmp_path: Path) -> None:
    npz(tmp_path)
    text = study(tmp_path)
    resolved = resolve(parse(text), text)
    job, data = resolved.jobs[0], resolved.splits[0]
    assert resolved.method(job, data, resolved.study) is resolved.methods[job.name]
    shorter = resolved.study.model_copy(update={"rounds": resolved.study.rounds + 1})
    trial = resolved.method(dataclasses.replace(job, trial=0), data, shorter)
    assert trial.plan.rounds == resolved.study.rounds + 1
    training = {"lr": 0.012345}
    changed = dataclasses.replace(job, method=job.method.model_copy(update={"training": training}))
    assert resolved.method(changed, data, resolved.study).plan.training["lr"] == 0.012345


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ('network = "residual-unet"', "Expected more than 1 spatial element when training"),
        ('network = "densenet121"', "Expected more than 1 value per channel when training"),
    ],
)
def test_a_network_that_cannot_be_trained_on_these_inputs_is_refused_in_advance(
    task: str, reason: str, tmp_path: Path
) -> None:
    """Every site would fail in the first round, or the run end with a traceback where a method prepares its model."""
    npz(tmp_path)
    text = study(tmp_path, **{"options = { width = 4, depth = 2, dropout = 0.2 }": task, "= 8": "= 1"})
    with pytest.raises(BadStudy, match=f"cannot be trained with inputs of 8 x 8 and batch_size = 1.*{reason}"):
        resolve(parse(text), text)


def test_a_network_that_only_computes_on_real_numbers_is_tried_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    npz(tmp_path)
    text, forward = study(tmp_path), Classifier.forward

    def looks(self: Classifier, x: torch.Tensor) -> torch.Tensor:
        assert float(x.sum()) > 0
        return forward(self, x)

    monkeypatch.setattr(Classifier, "forward", looks)
    resolve(parse(text), text)


def small(folder: Path, **changes: Any) -> str:
    """A study of one method, on the images of ``npz`` with ``changes`` of its arrays."""
    npz(folder, **changes)
    return study(folder).split("[[methods]]")[0] + '[[methods]]\nname = "fedavg"\n'


def test_runs_are_ordered_by_seed_fold_and_method(tmp_path: Path) -> None:
    text = small(tmp_path) + '[[methods]]\nname = "pooled"\n'
    assert [job.name for job in resolve(parse(text), text).jobs] == [
        f"{m}-seed{s}" for s in (0, 1) for m in ("fedavg", "pooled")
    ]
    folded = text.replace("seeds = [0, 1]", "seeds = [0, 1]\nfolds = 2")
    resolved = resolve(parse(folded), folded)
    assert [(j.name, j.fold) for j in resolved.jobs] == [
        (f"{m}-seed{s}-fold{f}", Fold(f, 2)) for s in (0, 1) for f in (0, 1) for m in ("fedavg", "pooled")
    ]
    assert [data.fingerprint for data in resolved.splits] == [
        federate(resolved.study.data, 0, Fold(f, 2), resolved.source).fingerprint for f in (0, 1)
    ]
    assert set(resolved.splits[0].sites) == set("abcd")
    assert (resolved.info["folds"], resolved.info["folds_by"]) == (2, "patients")
    sites = folded.replace("folds = 2", 'folds = "sites"').replace('external = ["d"]\n', "")
    assert {job.fold for job in resolve(parse(sites), sites).jobs} == {Fold(f, 4, "sites") for f in range(4)}


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (
            "[task]",
            '[task]\nkind = "segmentation"\nnetwork = "unet"',
            'small is data for classification: set task.kind = "classification", not "segmentation"',
        ),
        (
            "[task]",
            '[task]\nkind = "reconstruction"\nnetwork = "unet"',
            'small is data for classification: set accelerate = 4 in [data], or task.kind = "classification", not "reconstruction"',
        ),
        ("[task]", "[task]\nordered = true", "task.ordered: small has 2 classes; an order matters for three or more"),
    ],
)
def test_a_task_that_does_not_fit_the_data_is_refused(tmp_path: Path, old: str, new: str, says: str) -> None:
    text = small(tmp_path).replace(old, new).replace("options = { width = 4, depth = 2, dropout = 0.2 }", "")
    with pytest.raises(DataError) as caught:
        resolve(parse(text), text)
    assert str(caught.value) == says


def test_training_sites_need_two_classes_whatever_the_external_site_has(tmp_path: Path) -> None:
    site = np.arange(160) % 4
    labels = np.where(site == 3, np.arange(160) // 4 % 2, 0)
    text = small(tmp_path, labels=labels, label_names=np.array(["benign", "malignant"]))
    with pytest.raises(DataError, match=r"of all sites contain one class only \(benign\); at least two are needed"):
        resolve(parse(text), text)
    labels[8] = 1
    npz(tmp_path, labels=labels)
    within = text.replace('external = ["d"]', "")
    assert resolve(parse(within), within).jobs


def test_masks_that_are_no_image_files_have_no_original_grid(tmp_path: Path) -> None:
    from tests.methods.test_from_study import npz as masks

    head = f'name = "s"\nrounds = 1\n[data]\npath = "{masks(tmp_path, "masks")}"\nkind = "npz"\nsites = "site"\n'
    text = (
        head
        + '[task]\nkind = "segmentation"\nnetwork = "unet"\noptions = { width = 2, norm = "batch" }\n[[methods]]\nname = "fedavg"\n'
    )
    native = text + '[evaluation]\nspace = "native"\n'
    with pytest.raises(
        DataError, match=r'does not come from image files.*leave \[evaluation\] space out, or set space = "grid"'
    ):
        resolve(parse(native), native)
    assert resolve(parse(text), text).info["space"] == "grid"


def test_masks_of_image_files_are_compared_on_their_original_grid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLYCLINIC_CACHE", str(tmp_path / "cache"))
    write_volumes(tmp_path / "volumes", 9)
    text = PATCHES.replace('"volumes"', f'"{tmp_path}/volumes"')
    for space, found in (("", "native"), ('space = "native"', "native"), ('space = "grid"', "grid")):
        one = f"{text}\n[evaluation]\n{space}\n"
        assert resolve(parse(one), one).info["space"] == found


def test_columns_of_subgroups_that_are_missing_or_form_no_groups_are_named(tmp_path: Path) -> None:
    rows = [
        "id,hospital,sex,zip,y,x",
        *(f"p{i},{'ab'[i % 2]},{'fm'[i // 2 % 2]},z{i},{i // 4 % 2},{i}" for i in range(80)),
    ]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    text = f'name = "s"\nrounds = 1\n[data]\nkind = "table"\npath = "{tmp_path}/t.csv"\nlabel = "y"\nfeatures = ["x"]\n'
    text += 'patient = "id"\nsite = "hospital"\n[task]\nnetwork = "mlp"\n[[methods]]\nname = "fedavg"\n[evaluation]\n'
    good, bad = (text + f"subgroups = {names}\n" for names in ('["sex"]', '["sex", "age", "zip"]'))
    assert resolve(parse(good), good).jobs
    with pytest.raises(DataError) as caught:
        resolve(parse(bad), bad)
    missing, many = str(caught.value).splitlines()
    assert missing.startswith('evaluation.subgroups: the data have no column "age". There are: ')
    assert "sex" in missing
    assert many == (
        'evaluation.subgroups: column "zip" has 80 values and forms no 2 to 12 groups of patients. Leave it out, or give '
        "the data a column with fewer values"
    )


@pytest.mark.parametrize(
    ("task", "key"),
    [
        ('weights = "other"', "task.weights"),
        ('weights = "given"\nlora = { rank = 2, where = ["x"] }', "task.lora"),
        ('weights = "given"\ntrain = ["heads.*"]', "task.train"),
    ],
)
def test_what_does_not_fit_the_network_is_shown_at_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, key: str
) -> None:
    monkeypatch.setenv("POLYCLINIC_WEIGHTS", str(tmp_path / "weights"))
    weights_of(Network("cnn", (1, 8, 8), 2, (("width", 4), ("depth", 2))))
    weights_of(Network("mlp", (4,), 2), "other")
    text = small(tmp_path).replace("[task]", f"[task]\n{task}").replace(", dropout = 0.2", "")
    with pytest.raises(BadStudy) as caught:
        resolve(parse(text), text)
    ((line, place, says),) = caught.value.lines
    assert place.split(" ")[0].startswith(key)
    assert text.splitlines()[line - 1].startswith(key.removeprefix("task."))
    assert not says.startswith("task.")
    assert str(caught.value).startswith("small.toml:")


def test_every_method_that_cannot_be_built_is_shown_at_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that trains nothing, because what it needs is not trained."""
    monkeypatch.setenv("POLYCLINIC_WEIGHTS", str(tmp_path / "weights"))
    weights_of(Network("cnn", (1, 8, 8), 2, (("width", 4), ("depth", 2))))
    text = (
        small(tmp_path).replace("[task]", '[task]\nweights = "given"\ntrain = ["head"]').replace(", dropout = 0.2", "")
    )
    text += '[[methods]]\nname = "fedprox"\nmu = -1.0\n[[methods]]\nname = "fedbn"\n'
    with pytest.raises(BadStudy) as caught:
        resolve(parse(text), text)
    (_, first, negative), (_, second, untrained) = caught.value.lines
    assert (first, negative) == ("methods[2]", "mu must be at least 0, not -1")
    assert second.startswith("methods[3].name")
    assert untrained.startswith("fedbn needs trained normalization layers")


def uplinked(folder: Path, method: str, uplink: str, *more: str) -> str:
    """A study of one method with a transform."""
    lines = ["[[methods]]", f'name = "{method}"', f"uplink = [{{ {uplink} }}]", *more]
    return small(folder).split("[[methods]]")[0] + "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("method", "uplink", "says"),
    [
        ("fedsm", 'name = "secure-sum", heaviest = 99', "needs each site's reply, and SecureSum reveals only sums"),
        (
            "fedsm",
            'name = "adaptive-clip", start = 1.0',
            "needs each site's reply, and AdaptiveClip is decoded on a sum",
        ),
        ("cyclic", 'name = "secure-sum"', "requests of this method go to 1 of the sites"),
        ("fedmix-weights", 'name = "clip", bound = 1.0', "remove Clip from the uplink, or choose another method"),
        ("fedavg", 'name = "clip", bound = 1.0', "set uniform = true, or write FedAvg(..., uniform=True)"),
        ("pooled", 'name = "secure-sum"', "at least 3 sites, and 1 trains"),
        ("fedavg", 'name = "secure-sum"', "number of examples. Set heaviest = 24, or uniform = true"),
    ],
)
def test_what_a_method_cannot_be_sent_through_is_refused_at_its_place(
    tmp_path: Path, method: str, uplink: str, says: str
) -> None:
    text = uplinked(tmp_path, method, uplink)
    with pytest.raises(BadStudy) as caught:
        resolve(parse(text), text)
    ((line, place, said),) = caught.value.lines
    assert place == "methods[1].uplink"
    assert text.splitlines()[line - 1].startswith("uplink = ")
    assert says in said


def test_the_weight_of_the_largest_site_is_what_a_secure_sum_needs(tmp_path: Path) -> None:
    """With the weight that the message names the study runs; with one less it is refused."""
    text = uplinked(tmp_path, "fedavg", 'name = "secure-sum", heaviest = 23')
    with pytest.raises(BadStudy, match="Set heaviest = 24"):
        resolve(parse(text), text)
    for given in ("heaviest = 24", "limit = 8.0"):
        uniform = ["uniform = true"] if given.startswith("limit") else []
        text = uplinked(tmp_path, "fedavg", f'name = "secure-sum", bits = 20, {given}', *uniform)
        resolve(parse(text), text)
    text = uplinked(tmp_path, "fedavg", 'name = "secure-sum", bits = 20, heaviest = 24').replace(
        "rounds = 4", "rounds = 1"
    )
    finished = list(run(parse(text), text, tmp_path / "run"))
    assert finished
    records = [json.loads(line) for line in (tmp_path / "run" / "records.jsonl").read_text().splitlines()]
    assert not [record for record in records if record.get("lost")]


def test_what_the_network_warns_of_is_told_with_the_data(tmp_path: Path) -> None:
    text = small(tmp_path).replace(", dropout = 0.2", ', norm = "batch"')
    (warning,) = resolve(parse(text), text).warnings
    assert "batch normalizations: their statistics are averaged" in warning
    assert warning in next(run(parse(text), text, tmp_path / "run")).notes


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ("[task]\nclass_weights = [1.0, 2.0, 3.0]\n", "task.class_weights: 3 weights, but small has 2 classes"),
        (
            '[task]\nnetwork = "mlp"\noptions = { dropout = 2.0 }\n',
            "the network mlp cannot be built for inputs of 1 x 8 x 8: .*its options are",
        ),
    ],
)
def test_settings_of_the_task_that_cannot_be_are_refused_in_advance(changes: str, reason: str, tmp_path: Path) -> None:
    npz(tmp_path)
    text = study(tmp_path, **{"[task]\noptions = { width = 4, depth = 2, dropout = 0.2 }\n": changes})
    with pytest.raises(PolyclinicError, match=reason):
        resolve(parse(text), text)

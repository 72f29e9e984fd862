"""The data of a run are compared with those it began with, before it resumes and before its models are used on them."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from polyclinic.data.config import DataSpec
from polyclinic.data.federation import federate
from polyclinic.data.splits import Fold
from polyclinic.evaluation.records.run_reader import read_run
from polyclinic.studies.audits.run_audit import audit_run
from polyclinic.studies.config.study_config import parse
from polyclinic.studies.export.model_export import export
from polyclinic.studies.run import data_identity
from polyclinic.studies.run.data_identity import (
    FILE,
    DataChanged,
    differences,
    first_fold,
    identify,
    read_again,
)
from polyclinic.studies.run.model_explanation import explain
from polyclinic.studies.run.run_directory import read_tensors
from polyclinic.studies.run.scheduler import run
from tests.support.known import known
from tests.support.small_runs import npz

RUN = """
name = "same"
rounds = 2
seeds = [0, 1]
[data]
path = "{path}"
kind = "npz"
sites = "site"
[task]
network = "mlp"
options = {{ width = 4, depth = 1 }}
[engine]
kind = "in-process"
[[methods]]
name = "fedavg"
"""


def images(folder: Path, **names: str) -> DataSpec:
    """Write a table of 36 images of 18 patients at three sites, and the same content under other ``names``."""
    folder.mkdir(exist_ok=True)
    rows = ["path,patient,site,label"]
    for i in range(36):
        name = names.get(f"x{i}", f"x{i}")
        pixels = np.random.default_rng(i).integers(0, 255, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
        rows.append(f"{name}.png,p{i // 2},{'abc'[i // 2 % 3]},{i // 6 % 2}")
    (folder / "rows.csv").write_text("\n".join(rows) + "\n")
    return spec(folder)


def spec(folder: Path) -> DataSpec:
    return DataSpec.model_validate({"path": str(folder / "rows.csv"), "kind": "manifest", "min_patients": 3})


def edit(folder: Path, old: str, new: str) -> None:
    text = (folder / "rows.csv").read_text()
    assert old in text
    (folder / "rows.csv").write_text(text.replace(old, new))


def identity(data: DataSpec) -> dict[str, Any]:
    source = data.source()
    return dict(identify(federate(data, 0, None, source), source))


def changes(before: dict[str, Any], data: DataSpec) -> tuple[str, ...]:
    return differences(before, identity(data), data.source().info)


def test_renamed_files_are_no_change(tmp_path: Path) -> None:
    before = identity(images(tmp_path / "one"))
    renamed = images(tmp_path / "two", x5="another", x20="m20")
    assert federate(renamed, 0).fingerprint != federate(spec(tmp_path / "one"), 0).fingerprint
    assert changes(before, renamed) == ()


def test_changed_images_labels_and_patients_are_counted_by_site(tmp_path: Path) -> None:
    data = images(tmp_path)
    before = identity(data)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "x2.png")  # of p1 at b
    assert changes(before, spec(tmp_path)) == ("b: 1 image changed",)
    images(tmp_path)
    edit(tmp_path, "x4.png,p2,c,0", "x4.png,p2,c,1")
    (line,) = changes(before, spec(tmp_path))
    assert line.startswith("c: ")
    assert "1 label changed" in line
    images(tmp_path)
    edit(tmp_path, "p17", "p017")  # another order of names, which numbers the patients of predictions
    assert changes(before, spec(tmp_path))


def test_added_removed_and_moved_examples_are_counted(tmp_path: Path) -> None:
    before = identity(images(tmp_path))
    text = (tmp_path / "rows.csv").read_text()
    (tmp_path / "rows.csv").write_text(text.replace(",a,", ",north,"))
    lines = changes(before, spec(tmp_path))
    assert lines[0] == "a (no longer a site): 12 images moved to north"
    assert lines[1].startswith("north (a new site): 12 images moved here from a")
    assert lines[2] == "The images and labels are the same, but names of files, patients or sites have changed."
    more = [f"y{i}.png,q{i},d,{i % 2}" for i in range(9)]
    for i in range(9):
        Image.fromarray(np.full((8, 8), i, np.uint8)).save(tmp_path / f"y{i}.png")
    (tmp_path / "rows.csv").write_text(text + "\n".join(more) + "\n")
    assert "d (a new site): 9 images added" in changes(before, spec(tmp_path))
    (tmp_path / "rows.csv").write_text(text.replace("x35.png,p17,c,1\n", ""))
    (line,) = changes(before, spec(tmp_path))
    assert "1 image removed" in line
    images(tmp_path)
    edit(tmp_path, "x35.png,p17,c,1", "y3.png,p17,c,1")
    assert changes(before, spec(tmp_path)) == ("c: 1 image removed, 1 image added",)


def test_a_row_of_a_table_is_compared_before_scaling(tmp_path: Path) -> None:
    table = ["age,dose,site,label", *(f"{20 + i},{i % 7},{'ab'[i % 2]},{i // 2 % 2}" for i in range(40))]
    (tmp_path / "t.csv").write_text("\n".join(table))
    data = DataSpec.model_validate({"path": str(tmp_path / "t.csv"), "kind": "table", "label": "label", "site": "site"})
    before = identity(data)
    (tmp_path / "t.csv").write_text("\n".join(table).replace("33,6,b", "99,,b"))
    again = data.model_copy()
    assert changes(before, again) == ("b: 1 row changed",)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("same")
    text = RUN.format(path=npz(folder))
    for _ in run(parse(text), text, folder / "run"):
        pass
    return folder


def test_a_run_on_other_data_is_refused_and_begins_again_with_fresh(done: Path) -> None:
    text = RUN.format(path=done / "small.npz")
    before, model = read_tensors(done / "run" / FILE), (done / "run" / "arms" / "fedavg-seed0" / "model.safetensors")
    old = model.read_bytes()
    labels = np.load(done / "small.npz")["labels"]
    flipped = np.where(np.arange(160) % 4 == 2, 1 - labels, labels)
    npz(done, labels=flipped)
    said = r"the data have changed since the run began:\n  c: 40 labels changed"
    with pytest.raises(DataChanged, match=said):
        list(run(parse(text), text, done / "run", resume=True))
    for seed in (0, 1):
        with pytest.raises(DataChanged, match=said):
            audit_run(done / "run", seed=seed)
        with pytest.raises(DataChanged, match=said):
            explain(done / "run", seed=seed)
    assert model.read_bytes() == old
    list(run(parse(text), text, done / "run", fresh=True))
    assert read_tensors(done / "run" / FILE).keys() == before.keys()
    list(run(parse(text), text, done / "run", resume=True))
    npz(done)
    with pytest.raises(DataChanged, match=said):
        list(run(parse(text), text, done / "run", resume=True))
    list(run(parse(text), text, done / "run", fresh=True))


def test_an_export_warns_of_other_data(done: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "polyclinic"):
        export(done / "run", "safetensors", done / "a.safetensors")
        assert not caplog.messages
        images_ = np.load(done / "small.npz")["images"].copy()
        images_[3] = 0
        npz(done, images=images_)
        export(done / "run", "safetensors", done / "b.safetensors")
        assert "d: 1 image changed\nThe exported model was trained on the earlier data" in caplog.messages[0]
        (done / "small.npz").rename(done / "away.npz")
        export(done / "run", "safetensors", done / "b.safetensors")
        assert "cannot be compared with those it was trained on" in caplog.messages[1]
    npz(done)


def test_a_missing_identity_is_not_taken_for_unchanged_data(done: Path) -> None:
    text = RUN.format(path=done / "small.npz")
    (done / "run" / FILE).unlink()
    list(run(parse(text), text, done / "run", resume=True))
    npz(done, labels=np.arange(160) % 2)
    with pytest.raises(DataChanged, match="which says how, is missing"):
        list(run(parse(text), text, done / "run", resume=True))


def test_data_that_change_while_a_study_runs_are_refused(tmp_path: Path) -> None:
    """The second seed reads the archive again, which must be the one that the study began with."""
    text = RUN.format(path=npz(tmp_path))
    events = run(parse(text), text, tmp_path / "run")
    assert any(event.what == "tested" for event in events)
    npz(tmp_path, labels=np.arange(160) % 2)
    with pytest.raises(DataChanged, match="changed while the study was running"):
        list(events)


def rows(**places: list[tuple[int, int, int, int]]) -> dict[str, Any]:
    """An identity from the name, input, target and patient of each example, by ``site__role``."""
    return {place.replace("__", "/"): torch.tensor(values, dtype=torch.int64) for place, values in places.items()}


def info(modality: str = "image", task: str = "classification") -> Any:
    return SimpleNamespace(modality=modality, task=task)


TWO = [(1, 11, 0, 5), (2, 12, 1, 6)]
SAME = "The {unit}s and {target}s are the same, but names of files, patients or sites have changed."


@pytest.mark.parametrize(
    ("now", "lines"),
    [
        (rows(a__train=TWO, a__val=[(3, 13, 1, 7)]), ()),
        (rows(a__train=[*reversed(TWO)], a__val=[(9, 13, 1, 7)]), ()),
        (
            rows(a__train=TWO[:1], a__val=[(3, 13, 1, 7), TWO[1]]),
            ("a: 1 {unit} moved between training, validation and test", SAME),
        ),
        (rows(a__val=[*TWO, (3, 13, 1, 7)]), ("a: 2 {unit}s moved between training, validation and test", SAME)),
        (rows(a__train=[TWO[0], (2, 12, 0, 6)], a__val=[(3, 13, 1, 7)]), ("a: 1 {target} changed",)),
        (rows(a__train=[(1, 11, 3, 5), (2, 12, 3, 6)], a__val=[(3, 13, 3, 7)]), ("a: 3 {target}s changed",)),
        (rows(a__train=[TWO[0], (2, 99, 1, 6)], a__val=[(3, 13, 1, 7)]), ("a: 1 {unit} changed",)),
        (rows(a__train=[TWO[0], (8, 98, 1, 6)], a__val=[(3, 13, 1, 7)]), ("a: 1 {unit} removed, 1 {unit} added",)),
        (rows(a__train=[TWO[0], (2, 12, 1, 8)], a__val=[(3, 13, 1, 9)]), ("a: the patient of 2 {unit}s changed",)),
        (rows(a__train=[*TWO, (4, 14, 0, 5)], a__val=[(3, 13, 1, 7)]), ("a: 1 {unit} added",)),
        (rows(a__val=[(3, 13, 1, 7)]), ("a: 2 {unit}s removed",)),
        (
            rows(a__train=TWO[:1], a__val=[(3, 13, 1, 7)], b__train=[(8, 98, 1, 9)]),
            ("a: 1 {unit} removed", "b (a new site): 1 {unit} added"),
        ),
        (
            rows(a__train=TWO, b__val=[(3, 13, 1, 7), (4, 14, 0, 8)]),
            ("a: 1 {unit} moved to b", "b (a new site): 1 {unit} moved here from a, 1 {unit} added"),
        ),
        (
            rows(b__train=TWO, b__val=[(3, 13, 1, 7)]),
            ("a (no longer a site): 3 {unit}s moved to b", "b (a new site): 3 {unit}s moved here from a", SAME),
        ),
    ],
)
@pytest.mark.parametrize(
    ("modality", "task", "unit", "target"),
    [
        ("image", "classification", "image", "label"),
        ("table", "regression", "row", "label"),
        ("MR", "segmentation", "image", "mask"),
    ],
)
def test_each_change_is_counted_in_words(
    now: dict[str, Any], lines: tuple[str, ...], modality: str, task: str, unit: str, target: str
) -> None:
    before = rows(a__train=TWO, a__val=[(3, 13, 1, 7)])
    assert differences(before, now, info(modality, task)) == tuple(x.format(unit=unit, target=target) for x in lines)


def test_ten_sites_are_listed_and_the_others_counted() -> None:
    before = rows(**{f"site{i:02}__train": [(i, i, 0, i)] for i in range(12)})
    changed = {place: leaf + torch.tensor([[0, 0, 1, 0]]) for place, leaf in before.items()}
    expected = tuple(f"site{i:02}: 1 label changed" for i in range(12))
    assert differences(before, changed, info()) == (*expected[:10], "... and 2 more sites")
    ten = dict(list(before.items())[2:])
    assert differences(ten, {place: changed[place] for place in ten}, info()) == expected[2:]


def test_an_identity_has_a_row_for_each_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of hashes of its name and contents, and of the rank of its patient; public images are at no site."""
    given = images(tmp_path).model_copy(update={"public": ("c",)})
    source = given.source()
    data = federate(given, 0, None, source)
    found = dict(identify(data, source))
    places = {f"{s}/{r}": x for s in "ab" for r, x in data.sites[s].items() if r != "public"}
    assert found.keys() == places.keys() | {"public/public"}
    patients = sorted(f"p{i}" for i in range(18))
    for place, examples in {**places, "public/public": known(data.public)}.items():
        assert found[place].dtype == torch.int64
        assert found[place].shape == (len(examples), 4)
        assert found[place][:, 3].tolist() == [patients.index(p) for p in examples.patients]
    names, inputs, targets = (torch.cat([leaf[:, k] for leaf in found.values()]) for k in range(3))
    assert [len(set(values.tolist())) for values in (names, inputs, targets)] == [36, 36, 2]
    monkeypatch.setattr(data_identity, "CHUNK_BYTES", 3 * 4 * 64)
    assert all(torch.equal(leaf, found[place]) for place, leaf in identify(data, source).items())


@pytest.mark.parametrize(
    ("folds", "fold"), [("", None), ("folds = 3", Fold(0, 3)), ('folds = "sites"', Fold(0, 4, "sites"))]
)
def test_data_are_read_again_as_the_run_split_them(tmp_path: Path, folds: str, fold: Fold | None) -> None:
    """With folds, as in the first one."""
    text = RUN.replace("rounds = 2", f"rounds = 1\n{folds}").format(path=npz(tmp_path))
    list(run(parse(text), text, tmp_path / "run"))
    finished = read_run(tmp_path / "run")
    assert first_fold(finished) == fold
    study, _, data = read_again(finished, 1)
    assert study.hash == finished.info.hash
    expected = federate(parse(text).data, 1, fold)
    assert dict(data.sites).keys() == dict(expected.sites).keys()
    for site, roles in expected.sites.items():
        assert {r: e.ids for r, e in data.sites[site].items()} == {r: e.ids for r, e in roles.items()}
    assert (tmp_path / "run" / FILE).is_file()

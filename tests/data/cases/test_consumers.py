"""What reads all data of a federation: duplicates, identity, audits and passes over all examples, on cases on disk."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polyclinic.data.cases.cases import Cases
from polyclinic.data.examples import DataError
from polyclinic.data.federation import DataSpec, federate
from polyclinic.engines.plan import Plan
from polyclinic.learning.batch import MOST_VALUES, chunks, targets_of
from polyclinic.learning.tasks.data_sums import count_up
from polyclinic.studies.audits.audit_membership import Pool
from polyclinic.studies.audits.audit_privacy import NotAudited, audit_training
from polyclinic.studies.run.data_identity import differences, identify
from tests.data.cases.conftest import Store, cases_of, volume
from tests.data.sources.test_folders import nifti


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataSpec:
    """Twenty volumes of different shapes at two sites; number 19 is number 0, brighter."""
    monkeypatch.setenv("POLYCLINIC_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for i in range(20):
        size = (40 + i % 3, 41, 38 + i % 4)
        wide = rng.normal(size=(5, 5, 5)).repeat(10, 0).repeat(10, 1).repeat(10, 2)[: size[0], : size[1], : size[2]]
        values = wide * 100 + rng.normal(size=size)
        if i == 0:
            first = values
        if i == 19:
            values = first * 1.1 + 5
        mask = (values > 60).astype(np.uint8)
        mask[0, 0, 0] = 1
        nifti(tmp_path / "data" / "images" / f"c{i:02}.nii", values.astype(np.float32))
        nifti(tmp_path / "data" / "labels" / f"c{i:02}.nii", mask)
    table: dict[str, Any] = {"kind": "pairs", "path": str(tmp_path / "data"), "patch": [16, 16, 16], "min_patients": 1}
    return DataSpec.model_validate(
        {**table, "sites": {"partition": "iid", "count": 2}, "near_duplicates": "report", "split": [0.5, 0.25, 0.25]}
    )


def test_nearly_equal_images_are_found_by_their_complete_slices(spec: DataSpec) -> None:
    """One pair, of images that differ in every voxel."""
    data = federate(spec, 0)
    assert not data.duplicates
    assert any("1 pairs of images are nearly equal" in note for note in data.notes)


def test_the_identity_of_cases_shows_what_changed(spec: DataSpec) -> None:
    """Two readings have one identity; with another mask or another image, one case differs."""
    source = spec.source()
    before = identify(federate(spec, 0, source=source), source)
    again = spec.source()
    data = federate(spec, 0, source=again)
    assert all(torch.equal(before[place], leaf) for place, leaf in identify(data, again).items())
    root = Path(str(spec.path))
    nifti(root / "labels" / "c03.nii", np.ones((40, 41, 41), np.uint8))
    changed = spec.source()
    found = differences(before, identify(federate(spec, 0, source=changed), changed), data.info)
    assert [line.partition(": ")[2] for line in found] == ["1 mask changed"]
    nifti(root / "images" / "c05.nii", np.ones((42, 41, 39), np.float32))
    changed = spec.source()
    found = differences(before, identify(federate(spec, 0, source=changed), changed), data.info)
    assert "1 image changed" in " ".join(found)


def test_an_audit_of_membership_needs_examples_in_memory(spec: DataSpec) -> None:
    """It is refused in one sentence."""
    data = federate(spec, 0)
    with pytest.raises(DataError, match="an audit of membership needs all images in memory in one shape"):
        Pool.of(data, list(data.sites))


def test_a_pass_over_large_views_takes_few_at_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of data in memory, the chunks have the size they had; and sums do not depend on it."""
    cases = cases_of([store(*volume((9, 9, 9), i)) for i in range(5)], (8, 8, 8))
    assert [len(chunk) for chunk in chunks(cases, 256)] == [5]
    whole = count_up(cases, 3)
    monkeypatch.setattr("polyclinic.learning.batch.MOST_VALUES", 2 * 8**3)
    assert [len(chunk) for chunk in chunks(cases, 256)] == [2, 2, 1]
    assert all(torch.allclose(whole[name], leaf) for name, leaf in count_up(cases, 3).items())
    assert [len(chunk) for chunk in chunks(range(5), 3)] == [3, 2]
    assert MOST_VALUES == 2**24


def test_classes_are_known_without_reading_images(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that counts classes does not read every picture for it."""
    pictures = cases_of([store(torch.rand(3, 9, 9)) for _ in range(4)], (8, 8), torch.tensor([0, 1, 1, 0]))
    monkeypatch.setattr(Cases, "image", lambda *_: pytest.fail("read"))
    assert targets_of(pictures).tolist() == [0, 1, 1, 0]
    masks = cases_of([store(*volume((9, 9), 1))], (8, 8))
    monkeypatch.undo()
    assert targets_of(masks).shape == (1, 8, 8)


def test_an_audit_with_canaries_needs_examples_in_memory(store: Store) -> None:
    """It is refused before it trains."""
    data = cases_of([store(torch.rand(1, 16, 16)) for _ in range(4)], (16, 16), torch.tensor([0, 1, 0, 1]))
    private = {"batch_size": 2, "private": {"noise": 1.0, "bound": 1.0}}
    plan = Plan("classification", "cnn", (1, 16, 16), 2, "fedavg", ("a",), 1, training=private)
    with pytest.raises(NotAudited, match="leaves the images of this study on disk"):
        audit_training(plan, {"train": data}, "a", None, rounds=1)

"""fastMRI's files: slices by scanner and patient; hostile files are refused in one line and nothing else is opened."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polyclinic.data.examples import DataError
from polyclinic.data.federation import DataSpec, federate
from tests.support.data_sets import data_spec, loaded

h5py = pytest.importorskip("h5py", reason="needs the fastmri extra")
DICE = np.random.default_rng(0)
HEADER = '<?xml version="1.0"?><ismrmrdHeader><acquisitionSystemInformation><systemModel>{}</systemModel></acquisitionSystemInformation></ismrmrdHeader>'


def examination(
    path: Path, patient: str, scanner: str = "Skyra", shape: tuple[int, ...] = (6, 24, 20), **more: object
) -> None:
    """One file laid out as fastMRI's multi-coil training files are, k-space left out."""
    with h5py.File(path, "w") as file:
        images = DICE.gamma(2, 1e-5, shape).astype(np.float32)
        file["reconstruction_rss"] = images
        file["ismrmrd_header"] = HEADER.format(scanner)
        file.attrs.update(
            {
                "patient_id": patient,
                "acquisition": "CORPD_FBK",
                "max": images.max(),
                "norm": float(np.linalg.norm(images)),
                **more,
            }
        )


def folder(root: Path) -> dict[str, Any]:
    """Twelve patients at each of two scanners; the first has two examinations."""
    for i in range(24):
        examination(root / f"file{i:03d}.h5", f"p{i}", ("Skyra", "Prisma_fit")[i % 2])
    examination(root / "file900.h5", "p0")
    return {"kind": "fastmri", "path": str(root), "slices": 2, "accelerate": 4.0}


def test_slices_become_sites_by_scanner_with_the_full_image_as_target(tmp_path: Path) -> None:
    data = federate(DataSpec(**folder(tmp_path)))
    assert set(data.sites) == {"skyra", "prisma-fit"}
    assert data.info.task == "reconstruction"
    assert any("not measured" in note for note in data.notes)
    train = loaded(data.sites["skyra"]["train"])
    assert train.shape == (1, 24, 20)
    assert not torch.equal(train.inputs, train.targets)
    assert 0 <= float(train.targets.min()) <= float(train.targets.max()) <= 1
    with h5py.File(tmp_path / f"{train.ids[0].split()[0]}.h5") as file:
        images = np.asarray(file["reconstruction_rss"])
        at = int(train.ids[0].split()[-1])
        assert at in (2, 3)  # the middle of six
        np.testing.assert_allclose(train.targets[0, 0].numpy(), images[at] / images.max(), rtol=1e-5)
    homes = {(site, role) for site, roles in data.sites.items() for role, e in roles.items() if "p0" in e.patients}
    assert len(homes) == 1  # both examinations of one patient stay together


def test_by_its_name_in_the_catalog(tmp_path: Path) -> None:
    table = folder(tmp_path)
    data = federate(
        data_spec(use="fastmri", path=str(tmp_path), slices=2, accelerate=4.0, sites="acquisition", steps=[])
    )
    assert len(data.sites) == 1
    other = federate(DataSpec(**{**table, "acquisition": "CORPD"}))
    assert len(other.sites) == 2
    with pytest.raises(DataError, match=r"no valid \.h5 file of fastMRI whose acquisition has 'AXT2'"):
        federate(DataSpec(**{**table, "acquisition": "AXT2"}))


def hostile(kind: str, path: Path, root: Path) -> None:
    if kind == "text":
        path.write_bytes(b"Jane Doe" * 99)
        return
    if kind == "cut":
        examination(path, "x")
        path.write_bytes(path.read_bytes()[:-3000])
        return
    with h5py.File(path, "w") as file:
        if kind == "test":
            file["kspace"] = np.zeros((2, 2), np.complex64)
        elif kind == "link":
            file["reconstruction_rss"] = h5py.ExternalLink(str(root / "file000.h5"), "reconstruction_rss")
        elif kind == "external":
            file.create_dataset("reconstruction_rss", (2, 8, 8), "f4", external=[(str(root / "secret.bin"), 0, 512)])
        elif kind == "bomb":
            file.create_dataset("reconstruction_rss", (10_000, 10_000, 10_000), "f4", chunks=(1, 100, 100))
        elif kind == "words":
            file["reconstruction_rss"] = np.array([[[b"a", b"b"]]])


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("text", "not a sound HDF5"),
        ("cut", "not a sound HDF5"),
        ("test", "contains no reconstruction"),
        ("link", "links are not followed"),
        ("external", "in other files"),
        ("bomb", "over the limit"),
        ("words", "not slices of numbers"),
    ],
)
def test_hostile_files_are_one_line_each_and_the_rest_is_read(tmp_path: Path, kind: str, says: str) -> None:
    examination(tmp_path / "file000.h5", "p0")
    (tmp_path / "secret.bin").write_bytes(bytes(512))
    hostile(kind, tmp_path / "evil.h5", tmp_path)
    table: dict[str, Any] = {"kind": "fastmri", "path": str(tmp_path), "slices": 2}
    with pytest.raises(DataError, match=says) as error:
        DataSpec(**table).source().table()
    assert len(error.value.problems) == 1
    assert "\n" not in str(error.value)
    assert "Jane" not in str(error.value)
    source = data_spec(**table, unreadable="skip").source()
    assert source.table().ids == ("file000 slice 2", "file000 slice 3")
    assert any("1 files were left out" in note and "evil.h5" in note for note in source.info.notes)

"""What is measured of each example is what a person would measure, before any step."""

from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

from polyclinic.data.config import DataSpec
from polyclinic.data.examples import DataError
from polyclinic.data.fingerprint.dataset_fingerprint import Numbered, measured, of
from polyclinic.data.preprocessing.sample import Picture
from tests.support.data_sets import data_spec


def cases(root: Path) -> None:
    """Four volumes of two spacings in nnU-Net's layout."""
    rng = np.random.default_rng(0)
    for i in range(4):
        for folder, values in (
            ("imagesTr", rng.normal(50, 9, (10, 12, 6)).astype(np.float32)),
            ("labelsTr", (np.arange(720).reshape(10, 12, 6) < 100).astype(np.uint8)),
        ):
            (root / folder).mkdir(exist_ok=True)
            affine = np.diag([1.0, 1.0, 2.0 + i % 2, 1.0])
            nibabel.save(nibabel.Nifti1Image(values, affine), root / folder / f"c{i}.nii.gz")


def test_volumes_by_size_spacing_and_values(tmp_path: Path) -> None:
    cases(tmp_path)
    spec = data_spec(kind="pairs", path=str(tmp_path), classes=["rest", "organ"], steps=[{"step": "zscore"}])
    found = measured(spec.source())
    column = {name: found.rows[:, i] for i, name in enumerate(found.names)}
    assert column["pixels along x"].tolist() == [10] * 4
    assert column["pixels along z"].tolist() == [6] * 4
    assert column["mm between pixels along z"].tolist() == [2, 3, 2, 3]
    assert column["mm along z"].tolist() == [12, 18, 12, 18]
    for i in range(4):  # of the file, not of what the steps make of it
        values = np.asarray(nibabel.load(tmp_path / "imagesTr" / f"c{i}.nii.gz").dataobj)
        inside = values[np.asarray(nibabel.load(tmp_path / "labelsTr" / f"c{i}.nii.gz").dataobj) > 0]
        assert float(column["mean"][i]) == pytest.approx(values.mean(), rel=1e-5)
        assert float(column["deviation"][i]) == pytest.approx(values.std(), rel=1e-5)
        assert float(column["median of the foreground"][i]) == pytest.approx(np.median(inside), abs=0.5)
    assert found.targets.tolist() == [[620, 100]] * 4
    assert len(found) == len(found.patients) == 4


def test_a_damaged_file_is_a_row_of_unknowns(tmp_path: Path) -> None:
    cases(tmp_path)
    (tmp_path / "imagesTr" / "c1.nii.gz").write_bytes(b"no")
    spec = data_spec(kind="pairs", path=str(tmp_path), classes=["rest", "organ"], unreadable="skip")
    found = measured(spec.source())
    assert found.rows[1].isnan().all()
    assert found.rows[[0, 2, 3]].isfinite().all()


def test_a_table_as_it_is_with_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(
        "site,a,b,y\n" + "".join(f"{'AB'[i % 2]},{i},{'' if i == 3 else 2 * i},{i % 2}\n" for i in range(8))
    )
    spec = data_spec(kind="table", path=str(tmp_path / "t.csv"), label="y", statistics="site", fill="median")
    found = measured(spec.source())
    assert found.names == ("a", "b", "b is missing")
    assert found.rows[:, 0].tolist() == list(range(8))
    assert found.rows[3, 1].isnan()
    assert found.targets.tolist() == [0, 1] * 4


def test_flat_images_and_volumes_do_not_mix(tmp_path: Path) -> None:
    cases(tmp_path)
    Image.fromarray(np.zeros((12, 10), np.uint8)).save(tmp_path / "flat.png")
    rows = "".join(f"imagesTr/c{i}.nii.gz,a\n" for i in range(3)) + "flat.png,b\n"
    (tmp_path / "list.csv").write_text("path,label\n" + rows)
    with pytest.raises(DataError, match="some images are 2-D and some are volumes"):
        measured(DataSpec(kind="manifest", path=str(tmp_path / "list.csv")).source())


def test_no_measure_has_the_size_of_an_image() -> None:
    """However large the image, a row holds a dozen numbers for each channel."""
    for side in (8, 64):
        row = of(Picture(torch.rand(2, side, side), torch.ones(side, side, dtype=torch.int64), (1.0, 1.0)))
        assert len(row) == 2 * 3 + 2 * 8 + 1 + 1  # axes, channels, one label, and the names of the axes


def test_numbers_of_rows_are_dealt_like_the_examples_themselves(tmp_path: Path) -> None:
    from polyclinic.data.federation import federate

    (tmp_path / "t.csv").write_text("site,a,y\n" + "".join(f"{'AB'[i % 2]},{i},{i // 2 % 2}\n" for i in range(60)))
    spec = data_spec(kind="table", path=str(tmp_path / "t.csv"), label="y")
    real, numbers = federate(spec, 3), federate(spec, 3, source=Numbered(spec.source()))
    for site, roles in real.sites.items():
        for role, examples in roles.items():
            assert numbers.sites[site][role].ids == examples.ids

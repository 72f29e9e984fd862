"""BIDS folders that the tests lay out."""

from pathlib import Path

import pytest

from polyclinic.data.formats.bids import is_bids, read_bids
from polyclinic.data.formats.safe_reading import Unreadable
from tests.support.image_files import nifti_bytes


def lay_out(root: Path, table: str) -> Path:
    for who in ("01", "02", "03"):
        anat = root / f"sub-{who}" / "ses-1" / "anat"
        anat.mkdir(parents=True)
        (anat / f"sub-{who}_ses-1_T1w.nii.gz").write_bytes(nifti_bytes())
        (anat / f"sub-{who}_ses-1_acq-fast_FLAIR.nii.gz").write_bytes(nifti_bytes())
        derived = root / "derivatives" / "lesions" / f"sub-{who}" / "ses-1" / "anat"
        derived.mkdir(parents=True)
        (derived / f"sub-{who}_ses-1_desc-lesion_mask.nii.gz").write_bytes(nifti_bytes())
    (root / "participants.tsv").write_text(table)
    (root / "dataset_description.json").write_text('{"Name": "a", "BIDSVersion": "1.9.0"}')
    return root


TABLE = "participant_id\tage\tdiagnosis\tSite\nsub-01\t61\tad\tnorth\nsub-02\tn/a\thc\tsouth\nsub-03\t70\tad\tnorth\n"


def test_labels_sites_images_and_masks_come_from_names_and_the_table(tmp_path: Path) -> None:
    bids = read_bids(lay_out(tmp_path, TABLE))
    assert is_bids(tmp_path)
    assert bids.problems == ()
    assert bids.participants["sub-02"] == {"diagnosis": "hc", "Site": "south"}  # n/a is missing
    assert bids.sites() == {"sub-01": "north", "sub-02": "south", "sub-03": "north"}
    assert bids.sites("diagnosis")["sub-03"] == "ad"
    assert [image.subject for image in bids.select("T1w")] == ["sub-01", "sub-02", "sub-03"]
    fast = bids.select(acq="fast")
    assert {image.suffix for image in fast} == {"FLAIR"}
    mask = bids.mask_of(fast[0])
    assert mask is not None
    assert mask.path.name == "sub-01_ses-1_desc-lesion_mask.nii.gz"


def test_what_does_not_fit_together_is_listed_at_once(tmp_path: Path) -> None:
    lay_out(
        tmp_path, TABLE + "sub-09\t50\thc\tsouth\nsub-01\t1\tad\tx\nJane Doe\t1\tad\tx\nshort\n".replace("sub-03", "x")
    )
    (tmp_path / "sub-01" / "ses-1" / "anat" / "scan.nii.gz").write_bytes(nifti_bytes())
    (tmp_path / "sub-04" / "anat").mkdir(parents=True)
    (tmp_path / "sub-04" / "anat" / "sub-04_T1w.nii.gz").write_bytes(nifti_bytes())
    text = "\n".join(read_bids(tmp_path).problems)
    for part in (
        "1 participants have several rows (sub-01) and no column such as session_id",
        "row 7: the participant_id is not letters and digits",
        "row 8: 1 cells",
        "1 participants have no image (sub-09)",
        "1 subjects are not in participants.tsv (sub-04)",
        "1 image names do not follow BIDS",
    ):
        assert part in text
    assert "Jane" not in text


def test_a_table_without_sites_says_which_columns_there_are(tmp_path: Path) -> None:
    bids = read_bids(lay_out(tmp_path, TABLE.replace("Site", "handedness")))
    with pytest.raises(Unreadable, match="age, diagnosis, handedness"):
        bids.sites()


@pytest.mark.parametrize("table", ["", "name,age\na,1\n", "\0\0\0"])
def test_a_table_that_is_not_one_is_refused(tmp_path: Path, table: str) -> None:
    with pytest.raises(Unreadable):
        read_bids(lay_out(tmp_path, table))


def test_without_a_table_the_images_are_still_found(tmp_path: Path) -> None:
    lay_out(tmp_path, TABLE)
    (tmp_path / "participants.tsv").unlink()
    bids = read_bids(tmp_path)
    assert len(bids.images) == 6
    assert bids.problems == ("participants.tsv is missing: labels and sites are not known",)

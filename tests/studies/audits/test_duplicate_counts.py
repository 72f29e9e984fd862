"""``polyclinic data duplicates`` on one machine."""

import json
from pathlib import Path

import numpy as np
import pytest

from polyclinic.cli.data import duplicates
from polyclinic.errors import DataError
from polyclinic.studies.audits import duplicate_counts

STUDY = """
name = "copies"
rounds = 1
[data]
kind = "npz"
path = "PATH"
sites = "hospital"
duplicates = "drop"
[task]
kind = "classification"
network = "cnn"
[[methods]]
name = "fedavg"
"""


def study(root: Path, hospitals: tuple[str, ...]) -> Path:
    """Images of ``hospitals`` in one archive; the last two are equal at two of them."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (24, 16, 16), dtype=np.uint8)
    images[12], images[13] = images[0], images[1]
    where = np.array([hospitals[i // 12 % len(hospitals)] for i in range(24)])
    np.savez(root / "data.npz", images=images, labels=np.arange(24) % 2, hospital=where)
    file = root / "study.toml"
    file.write_text(STUDY.replace("PATH", str(root / "data.npz")))
    return file


def test_copies_that_the_study_would_drop_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("POLYCLINIC_CACHE", str(tmp_path / "cache"))
    file = study(tmp_path, ("a", "b"))
    with pytest.raises(SystemExit, match="1"):
        duplicates(file, json_=True)
    (pair,) = json.loads(capsys.readouterr().out)
    assert pair == {"sites": ["a", "b"], "equal": 2, "nearly_equal": 2, "compared": True, "min_count": 0}


def test_one_site_shares_nothing_with_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYCLINIC_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DataError, match="one site only"):
        duplicates(study(tmp_path, ("a",)))


def test_another_file_is_no_checkpoint_of_a_search(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(DataError, match="is not a checkpoint of a run of duplicate-search"):
        duplicate_counts.read(tmp_path / "x.safetensors")

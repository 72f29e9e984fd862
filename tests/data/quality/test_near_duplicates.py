"""Copies of an image that are not equal to the byte are found wherever they are, and strangers are not called
copies.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from polyclinic.data.examples import DataError
from polyclinic.data.federation import DataSpec, federate
from polyclinic.data.quality.exact_duplicates import Duplicate
from polyclinic.studies.records.run_description import _nearly_equal
from tests.support.data_sets import data_spec


def hospitals(root: Path, copies: bool) -> dict[str, Any]:
    """Thirty smooth pictures at each of two hospitals; with ``copies``, four of the first are at the second,
    brighter.
    """
    rng = np.random.default_rng(0)
    axes = np.meshgrid(np.linspace(0, 6, 64), np.linspace(0, 6, 64), indexing="ij")
    pictures = []
    for _ in range(60):
        waves = sum(
            np.sin(rng.uniform(0.5, 3) * a + rng.uniform(0, 6)) * np.cos(rng.uniform(0.5, 3) * b)
            for a, b in (axes, axes[::-1])
        )
        pictures.append(waves * 40 + 120 + rng.normal(0, 2, (64, 64)))
    rows = ["path,label,site,split"]
    for i, pixels in enumerate(pictures):
        if copies and 30 <= i < 34:
            pixels = pictures[i - 30] * 0.9 + 15 + rng.normal(0, 1, (64, 64))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / f"{i:02d}.png")
        rows.append(f"{i:02d}.png,{i % 2},{'ab'[i // 30]},{'train' if i < 30 or i > 35 else 'test'}")
    rows[7] = rows[7].replace("train", "test")
    rows[8] = rows[8].replace("train", "test")
    (root / "list.csv").write_text("\n".join(rows))
    return {"kind": "manifest", "path": str(root / "list.csv"), "split": "official"}


def test_nearly_equal_images_are_told_by_role_and_site(tmp_path: Path) -> None:
    table = hospitals(tmp_path, True)
    says = "4 pairs of images are nearly equal; 4 of them are in two of training, validation and test, 4 at two sites."
    assert says in federate(DataSpec(**table, near_duplicates="report")).notes
    assert says in federate(DataSpec(**table, near_duplicates="report")).notes  # from the cache
    assert not any("nearly equal" in note for note in federate(DataSpec(**table)).notes)
    with pytest.raises(DataError, match=r"Remove one of each, .* \(00\.png ~ 30\.png; 01\.png ~ 31\.png; 02\.png ~ "):
        federate(DataSpec(**table, near_duplicates="refuse"))


def test_strangers_are_no_copies_and_rows_no_images(tmp_path: Path) -> None:
    table = hospitals(tmp_path, False)
    assert not any("nearly equal" in note for note in federate(DataSpec(**table, near_duplicates="refuse")).notes)
    (tmp_path / "t.csv").write_text("site,a,y\n" + "".join(f"{'AB'[i % 2]},{i},{i // 2 % 2}\n" for i in range(60)))
    with pytest.raises(DataError, match="compares images"):
        federate(data_spec(kind="table", path=str(tmp_path / "t.csv"), label="y", near_duplicates="report"))


def test_a_run_counts_the_test_images_that_training_has_nearly_seen() -> None:
    def pair(first: str, role: str, second: str, other: str) -> Duplicate:
        return Duplicate((first, second), (("here", role), ("there", other)))

    pairs = (pair("a", "train", "x", "test"), pair("b", "val", "x", "test"), pair("c", "test", "y", "test"))
    assert _nearly_equal(SimpleNamespace(nearly_equal=pairs)) == {"there": 1}  # type: ignore[arg-type]

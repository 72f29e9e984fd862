"""Every reader of volumes refuses axes that do not span space, by one rule."""

import math
from pathlib import Path

import numpy as np
import pytest

from polyclinic.data.formats.metaimage import read_metaimage
from polyclinic.data.formats.safe_reading import Unreadable
from polyclinic.data.formats.volume import spans_space


@pytest.mark.parametrize(
    ("columns", "spans"),
    [
        (np.eye(3), True),
        (np.diag([0.001, 0.5, 300.0]), True),
        (np.diag([1.0, 1.0, 0.0]), False),
        (np.diag([1.0, 1.0, math.nan]), False),
        (np.diag([1.0, 1.0, math.inf]), False),
        (np.array([[1.0, 1.0, 0.0], [0.0, 1e-4, 0.0], [0.0, 0.0, 1.0]]), False),
        (np.array([[1.0, 1.0, 0.0], [0.0, 0.1, 0.0], [0.0, 0.0, 1.0]]), True),
    ],
)
def test_axes_span_space_unless_one_is_missing_or_nearly_in_the_plane_of_the_others(
    columns: np.ndarray, spans: bool
) -> None:
    assert spans_space(columns) == spans


def test_a_metaimage_whose_axes_nearly_lie_in_a_plane_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("SimpleITK")
    file = tmp_path / "flat.mha"
    head = (
        "ObjectType = Image\nNDims = 3\nBinaryData = True\nTransformMatrix = 1 0 0 1 0.0001 0 0 0 1\n"
        "Offset = 0 0 0\nElementSpacing = 1 1 1\nDimSize = 2 2 2\nElementType = MET_UCHAR\nElementDataFile = LOCAL\n"
    )
    file.write_bytes(head.encode() + bytes(8))
    with pytest.raises(Unreadable, match="singular: it does not place the voxels in space"):
        read_metaimage(file)

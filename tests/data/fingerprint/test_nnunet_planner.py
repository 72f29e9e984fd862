"""Plans equal nnU-Net's own, on eight data sets: shapes and spacings of real and synthetic cases.

``nnunet_plans.json`` was written by nnU-Net 2.8.1 (``ExperimentPlanner`` and the planners of the three residual presets)
for these spacings and sizes; those of the hippocampus are the 260 cases of ``POLYCLINIC_DATA``, the others are drawn.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from polyclinic.data.fingerprint.nnunet_planner import PRESETS, CaseFacts, configuration, planned, resampled
from polyclinic.errors import ConfigError
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.networks.unet_topology import target_spacing, topology

EXPECTED: dict[str, Any] = json.loads((Path(__file__).parent / "nnunet_plans.json").read_text())
NAMES = {"full": "3d_fullres", "slices": "2d", "low": "3d_lowres"}


def quantile(rows: Sequence[Sequence[float]], share: float) -> tuple[float, ...]:
    """NumPy's percentile, column by column."""
    found = []
    for column in zip(*rows, strict=True):
        ordered, at = sorted(column), (len(column) - 1) * share
        low = int(at)
        found.append(ordered[low] + (ordered[min(low + 1, len(ordered) - 1)] - ordered[low]) * (at - low))
    return tuple(found)


def pooled(name: str) -> tuple[CaseFacts, tuple[float, ...], tuple[float, ...]]:
    """Statistics of the raw values, the spacing, and the median size after resampling."""
    given = EXPECTED[name]
    spacings, shapes = given["spacings"], given["shapes"]
    facts = CaseFacts(len(shapes), 1.0, (None,) * len(given["channels"]), tuple(given["channels"]), given["classes"])
    wanted = target_spacing(quantile(spacings, 0.5), quantile(spacings, 0.1), quantile(shapes, 0.5))
    sizes = [list(resampled(shape, mm, wanted)) for shape, mm in zip(shapes, spacings, strict=True)]
    return facts, wanted, quantile(sizes, 0.5)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", EXPECTED)
def test_plans_are_those_of_nnunet(name: str, preset: str) -> None:
    expected, found = EXPECTED[name]["plans"][preset], planned(*pooled(name), preset)
    assert list(found.transpose) == expected["transpose"]
    for key, label in NAMES.items():
        one = getattr(found, key)
        assert (one is None) == (label not in expected["configurations"]), label
        if one is not None:
            other = expected["configurations"][label]
            assert list(one.spacing_mm) == pytest.approx(other["spacing"], abs=1e-9)
            assert list(one.patch) == other["patch"]
            assert one.batch_size == other["batch"]
            assert [list(k) for k in one.kernels] == other["kernels"]
            assert [list(s) for s in one.strides] == other["strides"]
            assert list(one.widths) == other["features"]
            assert one.batch_dice == other["batch_dice"]


def test_the_hippocampus() -> None:
    """The figures that nnU-Net's plan of Task 04 of the Medical Segmentation Decathlon has."""
    facts, spacing, size = pooled("hippocampus")
    plan = planned(facts, spacing, size)
    assert spacing == (1, 1, 1)
    assert size == (36, 50, 35)
    assert plan.full is not None
    assert plan.full.patch == (40, 56, 40)
    assert plan.full.batch_size == 9
    assert plan.full.widths == (32, 64, 128, 256)
    assert plan.low is None
    network = Network(
        "nnunet", (1, *plan.full.patch), 3, (("kernels", plan.full.kernels), ("strides", plan.full.strides))
    )
    assert sum(p.numel() for p in network().parameters()) == pytest.approx(5.60e6, rel=1e-3)


def test_channels_decide_how_intensities_are_scaled() -> None:
    facts = CaseFacts(20, 0.5, (None,) * 5, ("CT", "T1", "noNorm", "rescale_to_0_1", "zScore"), 2)
    plan = planned(facts, (1.0, 1.0, 1.0), (64, 64, 64))
    assert plan.schemes == ("ct", "zscore", "none", "range", "zscore")
    assert plan.masked == (False, True, False, False, True)  # less than 3/4 of an image is left
    more = CaseFacts(20, 0.75, facts.intensities, facts.channels, 2)
    assert not any(planned(more, (1.0, 1.0, 1.0), (64, 64, 64)).masked)


def test_what_cannot_be_planned_is_refused() -> None:
    facts = pooled("hippocampus")
    with pytest.raises(ConfigError, match='no preset is called "resenc"; there are default, resenc-m'):
        planned(*facts, "resenc")
    with pytest.raises(ConfigError, match="no patch fits into 1e-06 GB"):
        configuration((1.0, 1.0, 1.0), (64, 64, 64), 1e9, 2, PRESETS["default"], 1e-6)
    with pytest.raises(ConfigError, match="images of 7 x 7 x 7 voxels are too small for a U-Net"):
        configuration((1.0, 1.0, 1.0), (7, 7, 7), 1e9, 2, PRESETS["default"])


def test_more_memory_gives_a_larger_patch() -> None:
    facts, spacing, size = pooled("ct-large")
    volumes = []
    for memory in (4, 8, 16):
        full = planned(facts, spacing, size, memory_gb=memory).full
        assert full is not None
        volumes.append(full.patch[0] * full.patch[1] * full.patch[2])
    assert volumes == sorted(volumes)
    assert volumes[0] < volumes[2]


def test_small_patches_have_few_stages() -> None:
    assert topology((7, 7)).stages == 1
    assert topology((8, 8)).stages == 2
    assert topology((5, 12), (1, 1)).strides[-1] == (1, 2)  # a lone axis needs 3 x 4 voxels
    assert topology((5, 11), (1, 1)).stages == 1

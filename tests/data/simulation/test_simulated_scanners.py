"""Imaginary scanners: nothing at strength 0, the same for the same seed, different between sites, and a badge."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyclinic.data.examples import DataError, Examples
from polyclinic.data.federation import DataSpec, federate
from polyclinic.data.simulation.simulated_scanners import Scanner, blurred
from polyclinic.data.sources.lung_nodules import Nodules


def images(dtype: torch.dtype = torch.uint8, shape: tuple[int, ...] = (1, 12, 12)) -> Examples:
    """Five random images."""
    pixels = torch.randint(0, 256, (5, *shape), generator=torch.Generator().manual_seed(0))
    names = tuple(f"e{i}" for i in range(5))
    return Examples(pixels.to(dtype), torch.zeros(5, dtype=torch.int64), names, names)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_strength_zero_changes_nothing(dtype: torch.dtype) -> None:
    """To rounding."""
    before = images(dtype)
    after = Scanner.of("a", 0.0, 0)(before)
    assert after.inputs.dtype == dtype
    assert float((after.inputs.float() - before.inputs.float()).abs().max()) < 1e-3


@given(st.floats(0.1, 2.0), st.integers(0, 50))
@settings(max_examples=20, deadline=None)
def test_a_scanner_is_drawn_once_for_a_site(strength: float, seed: int) -> None:
    """The same for one site and seed, another for another; an image looks the same in any company."""
    one = Scanner.of("a", strength, seed)
    assert one == Scanner.of("a", strength, seed)
    assert one != Scanner.of("b", strength, seed)
    before = images()
    after = one(before)
    assert torch.equal(one(before.subset(torch.tensor([3, 1]))).inputs, after.inputs[[3, 1]])
    assert torch.equal(after.targets, before.targets)
    assert after.shape == before.shape


def test_each_change_is_what_it_says() -> None:
    """Gamma, contrast and brightness by hand; noise by its deviation; three dimensions too."""
    half = Examples(torch.full((1, 1, 4, 4), 128, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), ("p",), ("e",))
    x = 128 / 255
    for scanner, expected in (
        (Scanner(gamma=2), x**2),
        (Scanner(contrast=1.3), 1.3 * x),
        (Scanner(brightness=-0.1), x - 0.1),
    ):
        assert float(scanner(half).inputs[0, 0, 0, 0]) == pytest.approx(255 * expected, abs=0.51)
    flat = Examples(torch.full((1, 1, 24, 24, 24), 128, dtype=torch.uint8), half.targets, ("p",), ("e",))
    assert float(Scanner(noise=0.05)(flat).inputs.float().std()) == pytest.approx(0.05 * 255, rel=0.05)


def test_a_blur_keeps_the_sum_and_spreads_by_its_deviation() -> None:
    """A bright voxel becomes a Gaussian whose variance is the deviation's square, along every axis."""
    image = torch.zeros(1, 31, 31, 31)
    image[0, 15, 15, 15] = 1
    after = blurred(image, 1.7)[0]
    assert float(after.sum()) == pytest.approx(1, abs=1e-5)
    place = torch.arange(31.0) - 15
    for axes in ((1, 2), (0, 2), (0, 1)):
        assert float((after.sum(dim=axes) * place**2).sum()) == pytest.approx(1.7**2, rel=0.03)
    assert torch.allclose(blurred(torch.full((2, 9, 9), 0.3), 2.0), torch.full((2, 9, 9), 0.3))


def test_it_is_said(nodules: Nodules) -> None:
    """A federation with scanners carries the badge and another fingerprint; tables are refused."""
    plain, shown = federate(DataSpec(use="lidc-nodules")), federate(DataSpec(use="lidc-nodules", scanners=0.5))
    assert plain.simulated is None
    assert (
        shown.simulated == "Simulated scanners: each site's images were changed by a simulated scanner of strength 0.5."
    )
    assert plain.fingerprint != shown.fingerprint
    for site in plain.sites:
        assert plain.sites[site]["test"].ids == shown.sites[site]["test"].ids
    rows = Examples(torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64), ("p",), ("e",))
    with pytest.raises(DataError, match="is for images"):
        Scanner()(rows)

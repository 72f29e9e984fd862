"""Spectra: laws of the transform, and the window against numpy's fftshift."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyclinic.learning.training.fourier import (
    AmplitudeNormalizer,
    compose,
    crop,
    low_frequencies,
    paste,
    restyle,
    spectrum,
)

SHAPES = [(8, 8), (7, 9), (6, 11), (4, 5, 6)]


def images(shape: Any, seed: Any = 0, n: Any = 3) -> Any:
    return torch.randn(n, 2, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_compose_undoes_spectrum(shape: tuple[int, ...]) -> None:
    x = images(shape)
    torch.testing.assert_close(compose(*spectrum(x)), x, rtol=1e-4, atol=1e-5)


@given(st.lists(st.integers(2, 40), min_size=1, max_size=3), st.floats(0, 1))
def test_the_window_is_centered_and_holds_more_than_the_mean(shape: tuple[int, ...], fraction: Any) -> None:
    for n, found in zip(shape, low_frequencies(tuple(shape), fraction), strict=True):
        signed = {int(k) if k <= n // 2 else int(k) - n for k in found}
        assert 0 in signed
        assert all((-k) % n in {j % n for j in signed} for k in signed)  # it holds -k with k
        assert len(found) > 1 or fraction == 0
        if fraction == 1:
            assert len(found) == n
        if fraction == 0:
            assert len(found) == 1


@pytest.mark.parametrize("shape", [(8, 8), (9, 7)])
@pytest.mark.parametrize("half", [1, 2])
def test_the_window_is_numpys_center(shape: tuple[int, ...], half: int) -> None:
    """A window of half-width b around the center of the shifted spectrum, as the papers write it."""
    x = images(shape)
    shifted = np.fft.fftshift(np.abs(np.fft.fft2(x.numpy())), axes=(-2, -1))
    h, w = (side // 2 for side in shape)
    expected = shifted[..., h - half : h + half + 1, w - half : w + half + 1]
    fraction = 2 * half / max(shape) - 1e-6
    if {len(k) for k in low_frequencies(shape, fraction)} != {2 * half + 1}:
        pytest.skip("on this shape the share is another width along the shorter side")
    low = crop(spectrum(x)[0], fraction)
    found = np.fft.fftshift(low.numpy(), axes=(-2, -1))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_restyling_stays_real_and_keeps_phases(shape: tuple[int, ...], fraction: float) -> None:
    x, other = images(shape), crop(spectrum(images(shape, 1))[0], fraction)
    mixed = torch.fft.ifftn(
        torch.polar(paste(spectrum(x)[0], other, fraction), spectrum(x)[1]), dim=(2, 3, 4)[: len(shape)]
    )
    assert mixed.imag.abs().max() < 1e-5
    found = restyle(x, other, fraction)
    amplitude, phase = spectrum(found)
    torch.testing.assert_close(crop(amplitude, fraction), other, rtol=1e-3, atol=1e-3)
    turn = torch.polar(torch.ones_like(phase), phase - spectrum(x)[1])
    assert (turn.real[amplitude > 1e-2] > 0.999).all()


def test_no_share_changes_nothing_and_all_of_it_twice_is_once() -> None:
    x, other = images((8, 8)), crop(spectrum(images((8, 8), 1))[0], 0.3)
    torch.testing.assert_close(restyle(x, other, 0.3, 0.0), x, rtol=1e-4, atol=1e-5)
    once = restyle(x, other, 0.3)
    torch.testing.assert_close(restyle(once, other, 0.3), once, rtol=1e-3, atol=1e-4)


def test_wrong_windows_and_tables_are_refused() -> None:
    for fraction in (-0.1, 1.5):
        with pytest.raises(ValueError, match="from 0 to 1"):
            low_frequencies((8, 8), fraction)
    with pytest.raises(ValueError, match="needs images"):
        AmplitudeNormalizer((12,))


def test_the_front_passes_images_until_it_knows_an_amplitude() -> None:
    front, x = AmplitudeNormalizer((2, 8, 8), 0.5)(), images((8, 8))
    assert torch.equal(front(x), x)
    front.get_buffer("amplitude").copy_(crop(spectrum(images((8, 8), 1))[0], 0.5).mean(0))
    torch.testing.assert_close(crop(spectrum(front(x))[0], 0.5)[0], front.get_buffer("amplitude"), rtol=1e-3, atol=1e-3)

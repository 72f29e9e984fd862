"""Fourier representation of images: the amplitude spectrum carries style, the phase carries structure.

Oppenheim and Lim, "The importance of phase in signals", Proceedings of the IEEE 1981; Yang and Soatto, "FDA: Fourier
Domain Adaptation for Semantic Segmentation", CVPR 2020, https://arxiv.org/abs/2004.05498, exchange styles in this way.
All functions support any number of spatial axes after the first two: [b, C, *spatial].

The low frequencies are a window of a given ``fraction`` of every axis, centered on frequency 0: those k with
``|k| ≤ ⌈fraction · n / 2⌉``. So 1 is the whole spectrum, 0 the mean alone, and any value between more than the mean.
Papers give a half-width L as a fraction of the shorter side; the fraction here is 2L. The window contains -k if it
contains k, so that images remain real.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polyclinic.errors import ConfigError


def spectrum(images: Tensor) -> tuple[Tensor, Tensor]:
    """Compute amplitude and phase of [b, C, *spatial], each of that shape, frequency 0 first."""
    coefficients = torch.fft.fftn(images.float(), dim=tuple(range(2, images.ndim)))
    return coefficients.abs(), coefficients.angle()


def compose(amplitude: Tensor, phase: Tensor) -> Tensor:
    """Compute the image with this amplitude and phase: the inverse of ``spectrum``."""
    images: Tensor = torch.fft.ifftn(torch.polar(amplitude, phase), dim=tuple(range(2, amplitude.ndim))).real
    return images


def low_frequencies(shape: tuple[int, ...], fraction: float) -> tuple[Tensor, ...]:
    """Return the indices of low frequencies for each spatial axis of length n: int64 [m], m odd or n.

    Raises:
        ValueError: If ``fraction`` is not between 0 and 1.
    """
    if not 0 <= fraction <= 1:
        raise ConfigError(f"the window must be a fraction of the spectrum from 0 to 1, not {fraction:g}")
    indices = []
    for n in shape:
        k = torch.arange(n)
        distance = torch.minimum(k, n - k)  # |k| of the signed frequency
        indices.append((distance <= math.ceil(fraction * n / 2)).nonzero().flatten())
    return tuple(indices)


def crop(amplitude: Tensor, fraction: float) -> Tensor:
    """Extract the low frequencies of [b, C, *spatial]: [b, C, *window]."""
    return amplitude[_window(amplitude, fraction)]


def paste(amplitude: Tensor, low: Tensor, fraction: float) -> Tensor:
    """Replace the low frequencies of ``amplitude`` [b, C, *spatial] by ``low`` [b, C, *window] or [C, *window]."""
    changed = amplitude.clone()
    changed[_window(amplitude, fraction)] = low.to(amplitude)
    return changed


def restyle(images: Tensor, low: Tensor, fraction: float, share: Tensor | float = 1.0) -> Tensor:
    """Move the low-frequency amplitude of ``images`` by ``share`` of the way toward ``low``; phases are unchanged.

    Args:
        images: [b, C, *spatial].
        low: [b, C, *window] or [C, *window], a result of ``crop``.
        share: λ from 0 (unchanged) to 1 (equal to ``low``); a number, or a tensor that broadcasts with ``low``.
    """
    amplitude, phase = spectrum(images)
    own = crop(amplitude, fraction)
    return compose(paste(amplitude, own + share * (low.to(own) - own), fraction), phase)


def _window(amplitude: Tensor, fraction: float) -> Any:
    """Return an index of the low frequencies of [b, C, *spatial]."""
    return ..., *torch.meshgrid(*low_frequencies(tuple(amplitude.shape[2:]), fraction), indexing="ij")


@dataclass(frozen=True)
class AmplitudeNormalizer:
    """Builds the input front that gives every image the same low-frequency amplitude.

    Attributes:
        inputs: (C, *spatial).
        fraction: Size of the window, as a fraction of each axis.
    """

    inputs: tuple[int, ...]
    fraction: float = 1.0

    def __post_init__(self) -> None:
        if len(self.inputs) < 3:
            raise ConfigError(f"a spectrum needs images or volumes, not inputs of shape {self.inputs}")
        low_frequencies(self.inputs[1:], self.fraction)

    def __call__(self) -> nn.Module:
        """Build the front."""
        return _Normalized(self)


class _Normalized(nn.Module):
    """Replaces the amplitude of every image by the stored one; while that is 0, images are unchanged."""

    amplitude: Tensor

    def __init__(self, build: AmplitudeNormalizer) -> None:
        super().__init__()
        self.fraction = build.fraction
        window = [len(k) for k in low_frequencies(build.inputs[1:], build.fraction)]
        self.register_buffer("amplitude", torch.zeros(build.inputs[0], *window))

    def forward(self, images: Tensor) -> Tensor:
        """Map [b, C, *spatial] to the same shape."""
        return restyle(images, self.amplitude, self.fraction) if bool(self.amplitude.any()) else images

"""The spectrum of an image: amplitude is style, phase is structure.

Oppenheim and Lim, "The importance of phase in signals", Proceedings of the IEEE 1981, showed it; Yang and Soatto, "FDA:
Fourier Domain Adaptation for Semantic Segmentation", CVPR 2020, https://arxiv.org/abs/2004.05498, use it to exchange
styles. Everything here works on any number of spatial axes, after the first two: [b, C, *spatial].

The low frequencies are a window of a given ``fraction`` of every axis, centered on frequency 0: those k with
|k| ≤ ⌈fraction · n / 2⌉. So 1 is the whole spectrum, 0 the mean alone, and anything between more than the mean. Papers
give a half-width L as a share of the shorter side; the fraction here is 2L. The window holds -k wherever it holds k,
so that images stay real.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polyclinic.errors import ConfigError


def spectrum(images: Tensor) -> tuple[Tensor, Tensor]:
    """Amplitude and phase of [b, C, *spatial], each of that shape, frequency 0 first."""
    found = torch.fft.fftn(images.float(), dim=tuple(range(2, images.ndim)))
    return found.abs(), found.angle()


def compose(amplitude: Tensor, phase: Tensor) -> Tensor:
    """The image that has this amplitude and phase: the inverse of ``spectrum``."""
    images: Tensor = torch.fft.ifftn(torch.polar(amplitude, phase), dim=tuple(range(2, amplitude.ndim))).real
    return images


def low_frequencies(shape: tuple[int, ...], fraction: float) -> tuple[Tensor, ...]:
    """For each spatial axis of length n, where its low frequencies lie: int64 [m], m the odd width of the window or n.

    Raises:
        ValueError: Where ``fraction`` is not between 0 and 1.
    """
    if not 0 <= fraction <= 1:
        raise ConfigError(f"the window must be a share of the spectrum, from 0 to 1, not {fraction:g}")
    found = []
    for n in shape:
        k = torch.arange(n)
        distance = torch.minimum(k, n - k)  # |k| of the signed frequency
        found.append((distance <= math.ceil(fraction * n / 2)).nonzero().flatten())
    return tuple(found)


def crop(amplitude: Tensor, fraction: float) -> Tensor:
    """The low frequencies of [b, C, *spatial] alone: [b, C, *window]."""
    return amplitude[_window(amplitude, fraction)]


def paste(amplitude: Tensor, low: Tensor, fraction: float) -> Tensor:
    """``amplitude`` [b, C, *spatial] with its low frequencies replaced by ``low`` [b, C, *window] or [C, *window]."""
    changed = amplitude.clone()
    changed[_window(amplitude, fraction)] = low.to(amplitude)
    return changed


def restyle(images: Tensor, low: Tensor, fraction: float, share: Tensor | float = 1.0) -> Tensor:
    """``images`` whose low-frequency amplitude is moved by ``share`` of the way towards ``low``; phases are kept.

    Args:
        images: [b, C, *spatial].
        low: [b, C, *window] or [C, *window], as ``crop`` gives it.
        share: λ, 0 for none and 1 for all of the way; a number, or a tensor that broadcasts with ``low``.
    """
    amplitude, phase = spectrum(images)
    own = crop(amplitude, fraction)
    return compose(paste(amplitude, own + share * (low.to(own) - own), fraction), phase)


def _window(amplitude: Tensor, fraction: float) -> Any:
    """An index of the low frequencies of [b, C, *spatial]."""
    return ..., *torch.meshgrid(*low_frequencies(tuple(amplitude.shape[2:]), fraction), indexing="ij")


@dataclass(frozen=True)
class AmplitudeNormalizer:
    """Builds the front that gives every image the same low-frequency amplitude.

    Attributes:
        inputs: (C, *spatial).
        fraction: The window.
    """

    inputs: tuple[int, ...]
    fraction: float = 1.0

    def __post_init__(self) -> None:
        if len(self.inputs) < 3:
            raise ConfigError(f"a spectrum needs images or volumes, not inputs of shape {self.inputs}")
        low_frequencies(self.inputs[1:], self.fraction)

    def __call__(self) -> nn.Module:
        """The front."""
        return _Normalized(self)


class _Normalized(nn.Module):
    """Gives every image the amplitude that it holds; while that is all 0, images pass as they are."""

    amplitude: Tensor

    def __init__(self, build: AmplitudeNormalizer) -> None:
        super().__init__()
        self.fraction = build.fraction
        window = [len(k) for k in low_frequencies(build.inputs[1:], build.fraction)]
        self.register_buffer("amplitude", torch.zeros(build.inputs[0], *window))

    def forward(self, images: Tensor) -> Tensor:
        """[b, C, *spatial] to the same."""
        return restyle(images, self.amplitude, self.fraction) if bool(self.amplitude.any()) else images

"""FDA: images take their low-frequency amplitudes from images of other sites.

Yang and Soatto, "FDA: Fourier Domain Adaptation for Semantic Segmentation", CVPR 2020, equation 3,
https://arxiv.org/abs/2004.05498, with federated averaging; the networks of the paper for each window, its entropy loss
and its self-training are not part of it. As in the published code, the window is a square with a half-width of
⌊β · shorter side⌋ frequencies. Departure: on images with unequal sides it is as large a share of the longer axis.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from polyclinic.errors import ConfigError
from polyclinic.learning.training.fourier import crop, restyle, spectrum
from polyclinic.methods.harmonization.style_exchange import StyleExchange


@dataclass(frozen=True)
class FDA(StyleExchange):
    """FedAvg on images with the phases of their own and the low-frequency amplitudes of another site's image.

    Attributes:
        beta: β, the half-width of the window as a share of the shorter side; 0.01, 0.05 and 0.09 in the paper.
    """

    beta: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.beta <= 0.5:
            raise ConfigError(f"fda: beta must be between 0 and 0.5, not {self.beta:g}")

    @property
    def window(self) -> float:
        """The window as a fraction of each axis."""
        side = min(self.task.network.inputs[1:])
        return 2 * math.floor(self.beta * side) / side

    def styles(self, x: Tensor) -> Tensor:
        """Return low-frequency amplitudes [b, C, *window]."""
        return crop(spectrum(x)[0], self.window)

    def restyled(self, x: Tensor, style: Tensor) -> Tensor:
        """Return the images with the low-frequency amplitudes ``style`` [b, C, *window]."""
        return restyle(x, style, self.window)

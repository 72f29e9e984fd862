"""AdaIN: images take mean and deviation of their channels from images of other sites.

Huang and Belongie, "Arbitrary Style Transfer in Real-time with Adaptive Instance Normalization", ICCV 2017, equation 8,
https://arxiv.org/abs/1703.06868, with federated averaging: a common baseline for hospitals whose images differ.
Departure: the equation is applied to images, whereas the paper applies it to features of a trained network and decodes
them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from polyclinic.methods.harmonization.feature_styles import moments, standardized
from polyclinic.methods.harmonization.style_exchange import StyleExchange


@dataclass(frozen=True)
class AdaIN(StyleExchange):
    """FedAvg on images ``σ(y) (x − μ(x)) / σ(x) + μ(y)``, y being an image of another site."""

    def styles(self, x: Tensor) -> Tensor:
        """Return mean and standard deviation by channel [b, C, 2]."""
        return torch.stack(moments(x.float()), 2)

    def restyled(self, x: Tensor, style: Tensor) -> Tensor:
        """Return the images with the means and deviations ``style`` [b, C, 2]."""
        return standardized(x, *moments(x), style[:, :, 0], style[:, :, 1])

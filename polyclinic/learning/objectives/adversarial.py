"""Discriminators: small networks that guess where something comes from, and the losses that play against them.

Goodfellow et al., "Generative Adversarial Nets", NeurIPS 2014, https://arxiv.org/abs/1406.2661; the confusion loss:
Tzeng, Hoffman, Darrell and Saenko, "Simultaneous Deep Transfer Across Domains and Tasks", ICCV 2015, equation 3,
https://arxiv.org/abs/1510.02192.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyclinic.core.tree import Tree
from polyclinic.learning.networks.model_tree import initial


@dataclass(frozen=True)
class Discriminator:
    """Guesses from a vector of features which of several places it comes from.

    Attributes:
        features: The length of the vector.
        outputs: How many places; 1 for a single score whose sigmoid is the probability of "from here".
        width: Hidden units.
    """

    features: int
    outputs: int = 1
    width: int = 16

    def model(self) -> nn.Module:
        """A new module, [b, features] to [b, outputs] logits."""
        hidden = nn.Linear(self.features, self.width)
        return nn.Sequential(hidden, nn.LeakyReLU(0.2), nn.Linear(self.width, self.outputs))

    def first(self, seed: int = 0) -> Tree:
        """The parameters to begin from."""
        return initial(self.model, seed)


def tell_apart(real: Tensor, fake: Tensor) -> Tensor:
    """−log D(real) − log(1 − D(fake)), from logits of any shape, each averaged."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def pass_for_real(logits: Tensor) -> Tensor:
    """−log D(x), averaged."""
    return F.softplus(-logits).mean()


def confusion(logits: Tensor) -> Tensor:
    """−1/K Σ_k log softmax_k, averaged over [b, K]: least where every place is as likely as any other."""
    return -logits.log_softmax(1).mean()


def moments(features: Tensor) -> dict[str, Tensor]:
    """The mean and the standard deviation of each of [n, F]; the deviation is 0 where n is 1."""
    std = features.std(0) if len(features) > 1 else torch.zeros_like(features[0])
    return {"mean": features.mean(0), "std": std}

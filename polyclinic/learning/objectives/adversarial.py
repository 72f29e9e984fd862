"""Adversarial objectives: discriminators of the origin of features, and the losses of both sides.

Goodfellow et al., "Generative Adversarial Nets", NeurIPS 2014, https://arxiv.org/abs/1406.2661; the confusion loss:
Tzeng, Hoffman, Darrell and Saenko, "Simultaneous Deep Transfer Across Domains and Tasks", ICCV 2015, equation 3,
https://arxiv.org/abs/1510.02192.
"""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from polyclinic.core.tree import Tree
from polyclinic.learning.networks.model_tree import initial


@dataclass(frozen=True)
class Discriminator:
    """Predicts the origin of a feature vector.

    Attributes:
        features: Length of the vector.
        outputs: Number of origins; 1 for a single logit, whose sigmoid is the probability that the vector is real.
        width: Number of hidden units.
    """

    features: int
    outputs: int = 1
    width: int = 16

    def model(self) -> nn.Module:
        """Build a module that maps [b, features] to [b, outputs] logits."""
        hidden = nn.Linear(self.features, self.width)
        return nn.Sequential(hidden, nn.LeakyReLU(0.2), nn.Linear(self.width, self.outputs))

    def first(self, seed: int = 0) -> Tree:
        """Return the initial parameters."""
        return initial(self.model, seed)


def tell_apart(real: Tensor, fake: Tensor) -> Tensor:
    """Discriminator loss ``−log D(real) − log(1 − D(fake))``, from logits of any shape, each averaged."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def pass_for_real(logits: Tensor) -> Tensor:
    """Generator loss ``−log D(x)``, averaged."""
    return F.softplus(-logits).mean()


def confusion(logits: Tensor) -> Tensor:
    """Return ``−1/K Σ_k log softmax_k``, averaged over [b, K]; minimal if all origins are equally likely."""
    return -logits.log_softmax(1).mean()


def moments(features: Tensor) -> dict[str, Tensor]:
    """Return mean and standard deviation over the n rows of [n, F], with divisor n."""
    return {"mean": features.mean(0), "std": features.std(0, correction=0)}

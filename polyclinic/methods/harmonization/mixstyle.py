"""MixStyle: sites mix the feature statistics of two images of a minibatch, so that the style of a scanner counts less.

Zhou, Yang, Qiao and Xiang, "Domain Generalization with MixStyle", ICLR 2021, equations 3 to 6,
https://arxiv.org/abs/2104.02008, with federated averaging: a common baseline for unseen hospitals. As in the published
code, statistics have no gradient, each place mixes with probability 1/2, and the places are the ends of the first
blocks of a residual network. Departure: in other networks, which the paper does not use, they are the ends of the first
resolutions of the encoder.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polyclinic.core.aggregates import Reply
from polyclinic.core.method import Request
from polyclinic.core.site import Site
from polyclinic.core.tree import Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.batch import Batch
from polyclinic.learning.training.dp_sgd import refuse_private
from polyclinic.methods.harmonization.feature_styles import blocks, changed, moments, stages, standardized
from polyclinic.methods.optimization.fedavg import FedAvg


@dataclass(frozen=True)
class MixStyle(FedAvg):
    """FedAvg whose feature maps have statistics ``λ · own + (1 − λ) · another image's``, λ ~ Beta(α, α).

    Attributes:
        blocks: Number of places, from the input on; 2 in the published code.
        probability: Probability with which a place mixes a minibatch; 0.5 in the paper.
        alpha: α; 0.1 in the paper.
    """

    blocks: int = 2
    probability: float = 0.5
    alpha: float = 0.1

    def __post_init__(self) -> None:
        if self.blocks < 1 or not 0 <= self.probability <= 1 or self.alpha <= 0:
            raise ConfigError("mixstyle: blocks must be at least 1, probability between 0 and 1, and alpha above 0")
        refuse_private(self.local, "mixstyle", "the images of a minibatch are mixed")
        stages(self.task.network)  # refuses networks without feature maps

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start, places = request.trees["params"], blocks(self.task.network)[: self.blocks]

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            with changed(model, places, lambda _, x: self.mixed(x)):
                return self.task.loss(model, batch)

        end = self.local.fit(self.task, start, site, request.round, loss=loss if self.probability else None)
        return Reply({"update": self.update(end, start, site)}), memory

    def mixed(self, x: Tensor) -> Tensor:
        """Return [b, C, *spatial] with mixed statistics, or unchanged; draws from PyTorch's generator."""
        if float(torch.rand(())) >= self.probability:
            return x
        share = torch.distributions.Beta(self.alpha, self.alpha).sample((len(x), 1)).to(x)
        other = torch.randperm(len(x)).to(x.device)
        mean, std = (part.detach() for part in moments(x))
        new = [share * part + (1 - share) * part[other] for part in (mean, std)]
        return standardized(x, mean, std, new[0], new[1])

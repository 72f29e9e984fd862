"""Class-conditional generator of examples: a variational autoencoder for images, volumes and tables.

Kingma and Welling, "Auto-Encoding Variational Bayes", ICLR 2014, equations 7 and 10, https://arxiv.org/abs/1312.6114;
conditional: Sohn, Lee and Yan, NeurIPS 2015.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyclinic.core.tree import Tree
from polyclinic.learning.batch import Batch
from polyclinic.learning.networks.model_tree import initial


@dataclass(frozen=True)
class Replay:
    """Learns p(x | class) from (inputs, classes). Its generator, ``decoder.…``, creates new examples.

    Attributes:
        inputs: (C, *spatial) or (F,) as of a network. Sides not divisible by 4 are generated larger and cropped.
        classes: Number of classes.
        latent: Dimension of the latent space.
        width: Channels of the first layer.
        spread: σ, the standard deviation of a value given z; a smaller σ gives the reconstruction more weight.
    """

    inputs: tuple[int, ...]
    classes: int
    latent: int = 16
    width: int = 16
    spread: float = 0.3

    def model(self) -> nn.Module:
        """Build a module with random parameters."""
        return _Autoencoder(self)

    def first(self, seed: int = 0) -> Tree:
        """Return the initial parameters."""
        return initial(self.model, seed)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return −ELBO per value: ``‖x − x̂‖² / 2σ² + KL(q(z | x, y) ‖ N(0, 1))``, divided by the size of x."""
        x, y = batch
        rebuilt, mean, log_var = model(x, y)
        error: Tensor = (rebuilt - x).square().sum() / (2 * self.spread**2)
        divergence: Tensor = 0.5 * (mean.square() + log_var.exp() - log_var - 1).sum()
        return (error + divergence) / x.numel()

    def generate(self, model: Any, classes: Tensor, rng: torch.Generator) -> Tensor:
        """Generate one example of each of ``classes`` [n], without gradients. Shape [n, *inputs]."""
        z = torch.randn(len(classes), self.latent, generator=rng).to(classes.device)
        with torch.no_grad():
            examples: Tensor = model.decoder(torch.cat([z, F.one_hot(classes, self.classes).float()], 1))
        return examples


class _Autoencoder(nn.Module):
    def __init__(self, build: Replay) -> None:
        super().__init__()
        self.classes = build.classes
        self.encoder = _down(build.inputs, build.width, build.classes, 2 * build.latent)
        self.decoder = Up(build.inputs, build.width, build.latent + build.classes)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return x̂, and the mean and log variance of z."""
        kind = F.one_hot(y, self.classes).float()
        maps = kind.view(*kind.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
        mean, log_var = self.encoder(torch.cat([x, maps], 1)).chunk(2, 1)
        z = mean + (0.5 * log_var).exp() * torch.randn_like(mean)
        return self.decoder(torch.cat([z, kind], 1)), mean, log_var


def _down(inputs: tuple[int, ...], width: int, more: int, outputs: int) -> nn.Module:
    """Build the encoder: [b, C + more, *spatial] to [b, outputs]."""
    if len(inputs) == 1:
        return nn.Sequential(nn.Linear(inputs[0] + more, 4 * width), nn.LeakyReLU(0.2), nn.Linear(4 * width, outputs))
    conv = nn.Conv2d if len(inputs) == 3 else nn.Conv3d
    size = torch.Size(-(-n // 4) for n in inputs[1:]).numel()
    return nn.Sequential(
        conv(inputs[0] + more, width, 3, 2, 1),
        nn.LeakyReLU(0.2),
        conv(width, 2 * width, 3, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(2 * width * size, outputs),
    )


class Up(nn.Module):
    """Generates examples from vectors: [b, features] to [b, *inputs]."""

    def __init__(self, inputs: tuple[int, ...], width: int, features: int) -> None:
        super().__init__()
        self.shape = inputs
        if len(inputs) == 1:
            self.layers = nn.Sequential(
                nn.Linear(features, 4 * width), nn.LeakyReLU(0.2), nn.Linear(4 * width, inputs[0])
            )
            return
        conv = nn.Conv2d if len(inputs) == 3 else nn.Conv3d
        small = [-(-n // 4) for n in inputs[1:]]
        self.layers = nn.Sequential(
            nn.Linear(features, 2 * width * torch.Size(small).numel()),
            nn.Unflatten(1, (2 * width, *small)),
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),
            conv(2 * width, width, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),
            conv(width, inputs[0], 3, padding=1),
        )

    def forward(self, z: Tensor) -> Tensor:
        """Return the examples, [b, *inputs]."""
        generated: Tensor = self.layers(z)
        window: Any = (..., *(slice(n) for n in self.shape[1:]))
        return generated[window]

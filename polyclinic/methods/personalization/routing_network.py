"""A network whose layers mix those of several trained ones, and its adaptation to a hospital's images.

The test-time routing of Jiang, Yang, Chen and Dou, "IOP-FL", IEEE TMI 2023, https://arxiv.org/abs/2204.08467, and its
published code: a layer's output for an image is ``Σ_k r_k · layer_k(x)``, where a small network computes r from the
mean of the layer's input. One Adam optimizer adapts these small networks and the scales and shifts of normalization, in
several passes over all images, for predictions that are confident and consistent under noise.

Departures: the routing weights of a layer are divided by their sum, so that networks without normalization keep their
scale; rotations, and the smoothness term of weight 1e-6, are omitted; the published code scores each batch directly
after the last step on it, with the statistics of the batch, and reports the best of the passes by the test labels. Here
the statistics of normalization are recomputed from all images after the last pass, so that a prediction does not depend
on the images that are in the same batch.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from polyclinic.core.tree import Tree
from polyclinic.learning.networks.batch_statistics import batches, recomputed
from polyclinic.learning.networks.composite import Composed
from polyclinic.learning.networks.model_mixture import prediction
from polyclinic.learning.networks.model_tree import cached_model, first_names, initial, inspect, params_of, trainable
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.optimizers import Adam
from polyclinic.learning.training.seeding import seeded


@dataclass(frozen=True)
class Routed(Composed):
    """Builds a network that predicts classes, in which every convolution and linear layer exists ``members`` times.

    If the buffer ``routed`` is 0, the first member of each layer is used alone. All other layers exist once.

    Attributes:
        dropout: Dropout in the networks that compute the routing; 0.2 in the published code.
    """

    members: int
    dropout: float = 0.2

    def __call__(self) -> nn.Module:
        """Build a module with random parameters."""
        return _Router(self)

    def filled(self, models: Sequence[Tree], routed: bool) -> Tree:
        """Return parameters with the layers of ``models``, and all other layers of the first of them."""
        leaves = dict(initial(self, 0))
        with torch.random.fork_rng(devices=[]):  # only the names are needed, not the random weights
            listed = first_names(self.network())
        for name in leaves:
            place, inside, of = name.removeprefix("body.").partition(".member.")
            if inside:
                k, _, leaf = of.partition(".")
                leaves[name] = models[int(k)][listed[f"{place}.{leaf}"]]
            elif ".router." not in name and name != "routed":
                leaves[name] = models[0][listed[place]]
        return {**leaves, "routed": torch.tensor(float(routed))}


class _Router(nn.Module):
    routed: Tensor

    def __init__(self, build: Routed) -> None:
        super().__init__()
        self.register_buffer("routed", torch.zeros(()))
        self.body = build.network()
        mixed: dict[nn.Module, _Mixed] = {}
        for name, layer in list(self.body.named_modules(remove_duplicate=False)):
            if isinstance(layer, _ConvNd) or type(layer) is nn.Linear:
                if layer not in mixed:  # a layer may have several names
                    mixed[layer] = _Mixed([copy.deepcopy(layer) for _ in range(build.members)], build.dropout, self)
                parent, _, last = name.rpartition(".")
                setattr(self.body.get_submodule(parent), last, mixed[layer])

    def forward(self, x: Tensor) -> Tensor:
        """Return class scores [b, C, ...]."""
        return prediction(self.body(x))


class _Mixed(nn.Module):
    """``Σ_k r_k · layer_k(x)``, with ``r ∝ σ(W₂ W₁ x̄)`` for each example and x̄ the mean of its input by channel."""

    def __init__(self, layers: Sequence[nn.Module], dropout: float, whole: _Router) -> None:
        super().__init__()
        layer: Any = layers[0]
        self.last = isinstance(layer, nn.Linear)  # whether the channels are the last axis
        width = layer.in_features if self.last else layer.in_channels
        self.member = nn.ModuleList(layers)
        self.router = nn.Sequential(
            nn.Linear(width, 2 * width), nn.Dropout(dropout), nn.Linear(2 * width, len(layers)), nn.Sigmoid()
        )
        self._whole = [whole]  # in a list, so that it is not a submodule

    def forward(self, x: Tensor) -> Tensor:
        first: Tensor = self.member[0](x)
        if not bool(self._whole[0].routed):
            return first
        mean = x.flatten(1, -2).mean(1) if self.last and x.ndim > 2 else x if self.last else x.flatten(2).mean(2)
        r = self.router(mean)
        r = (r / r.sum(1, keepdim=True)).unflatten(1, (-1, *[1] * (first.ndim - 1)))
        outputs = torch.stack([first, *(layer(x) for layer in list(self.member)[1:])], 1)
        mixed: Tensor = (r * outputs).sum(1)
        return mixed


@dataclass(frozen=True)
class Adaptation:
    """How a routed network adapts to images.

    Attributes:
        passes: Passes over all images; 10 in the published code.
        lr: Step size of Adam; 0.001 in the published code.
        noise: Standard deviation of the noise under which predictions should be consistent, in the inputs' unit.
        batch_size: Images in a batch.
        entropy: Weight of the predictions' entropy; 10 in the published code.
        consistency: Weight of the squared difference between predictions with and without noise; 0.1 in the published
            code.
    """

    passes: int = 10
    lr: float = 1e-3
    noise: float = 0.5
    batch_size: int = 16
    entropy: float = 10.0
    consistency: float = 0.1

    def __call__(self, task: Task, params: Tree, data: Any, rng: torch.Generator, device: str = "cpu") -> Tree:
        """Return the ``params`` of ``task``, whose network is ``Routed``, adapted to the inputs of ``data``."""
        model = cached_model(task, params, device)
        model.train()
        named, normalization = trainable(model), inspect(model).normalization
        adapted = [p for name, p in named.items() if name in normalization]
        adapted += [p for name, p in named.items() if ".router." in name]
        optimizer = Adam(adapted, self.lr)
        with torch.inference_mode(False), torch.enable_grad(), seeded(rng, device):
            for _ in range(self.passes):
                for chunk in batches(len(data), self.batch_size):
                    x = data[chunk][0].to(device)
                    noise = self.noise * torch.randn(x.shape, generator=rng).to(x)
                    loss = self.loss(model(x), model(x + noise))
                    model.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
        model.zero_grad(set_to_none=True)
        return recomputed(task, params_of(model), data, device)

    def loss(self, plain: Tensor, noisy: Tensor) -> Tensor:
        """Return ``10 · H(p) / log C + 0.1 · mean (p − p')²`` of class scores [b, C, ...]; H is averaged over C too."""
        p, q = plain.softmax(1), noisy.softmax(1)
        unsure = -(p * (p + 1e-6).log()).mean() / math.log(p.shape[1])
        return self.entropy * unsure + self.consistency * (p - q).square().mean()

"""A network that mixes several trained ones, layer by layer, for the given images.

After the test-time routing of Jiang, Yang, Chen and Dou, "IOP-FL", IEEE TMI 2023, https://arxiv.org/abs/2204.08467.
Departures: in the paper a small network computes the routing from the mean of a layer's input; here each layer has
weights of its own, ``σ(r_l)``, optimized for every batch from equal ones. The objective is the same: confident
predictions that are consistent under noise. The published code's rotations, and its smoothness term of weight 1e-6, are
omitted.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from polyclinic.learning.networks.composite import Composed
from polyclinic.learning.networks.model_mixture import prediction
from polyclinic.learning.networks.model_tree import BATCH_NORMS, inspect
from polyclinic.learning.training.optimizers import Adam


@dataclass(frozen=True)
class Routed(Composed):
    """Builds the mixture of ``members`` copies of a network that predicts classes.

    If the buffer ``adapt`` is 0, the first member predicts alone. If it is 1, each batch is adapted to: Adam optimizes
    the weights of the members in every layer, and the scales and shifts of normalization, without labels. Batch
    normalization then uses the statistics of the batch, if it has more than one example.

    Attributes:
        steps: Number of Adam steps per batch; 10 in the published code.
        lr: Step size of Adam.
        entropy: Weight of the predictions' entropy.
        consistency: Weight of the squared difference between predictions with and without noise.
        noise: Standard deviation of that noise, in the inputs' unit.
    """

    members: int
    steps: int = 10
    lr: float = 1e-3
    entropy: float = 10.0
    consistency: float = 0.1
    noise: float = 0.5

    def __call__(self) -> nn.Module:
        """Build a module with random parameters."""
        return _Router(self)


class _Router(nn.Module):
    adapt: Tensor

    def __init__(self, build: Routed) -> None:
        super().__init__()
        self.build = build
        self.member = nn.ModuleList([build.network() for _ in range(build.members)])
        self.register_buffer("adapt", torch.zeros(()))
        self._body = [build.network()]  # in a list, so that it is not part of the state
        self._affine = inspect(self._body[0]).normalization

    def forward(self, x: Tensor) -> Tensor:
        """Return class scores [b, C, ...]."""
        if self.training or not bool(self.adapt):
            return prediction(self.member[0](x))
        with torch.inference_mode(False), torch.enable_grad():
            return self._adapted(x.clone())

    def _adapted(self, x: Tensor) -> Tensor:
        body, build = self._body[0].to(x.device).eval(), self.build
        for module in body.modules():
            if isinstance(module, BATCH_NORMS):
                module.train(len(x) > 1)  # one example may have a single value per channel, without variance
        own = [dict(member.state_dict()) for member in self.member]
        stacks = {
            n: torch.stack([leaves[n] for leaves in own]) for n, leaf in own[0].items() if leaf.is_floating_point()
        }
        trained = {name for name, _ in body.named_parameters()}
        routes = {n.rpartition(".")[0]: torch.zeros(len(own), device=x.device, requires_grad=True) for n in stacks}
        shifts = {n: torch.zeros_like(stacks[n][0], requires_grad=True) for n in stacks if n in self._affine & trained}

        def predict(inputs: Tensor) -> Tensor:
            mixed = {n: torch.tensordot(routes[n.rpartition(".")[0]].softmax(0), s, 1) for n, s in stacks.items()}
            shifted = {n: leaf + shifts[n] if n in shifts else leaf for n, leaf in mixed.items()}
            leaves = {n: leaf if n in trained else leaf.detach() for n, leaf in shifted.items()}
            return prediction(functional_call(body, leaves, (inputs,)))

        noise = build.noise * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
        optimizer = Adam([*routes.values(), *shifts.values()], build.lr)
        for _ in range(build.steps):
            plain, noisy = predict(x).softmax(1), predict(x + noise).softmax(1)
            unsure = -(plain * plain.clamp_min(1e-8).log()).sum(1).mean()
            optimizer.zero_grad()
            loss = build.entropy * unsure + build.consistency * (plain - noisy).square().mean()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        with torch.no_grad():
            return predict(x)

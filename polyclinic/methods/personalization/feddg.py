"""FedDG by episodic learning in continuous frequency space (ELCFS): domain generalization to unseen hospitals.

Liu, Chen, Qin, Dou and Heng, "FedDG: Federated Domain Generalization on Medical Image Segmentation via Episodic
Learning in Continuous Frequency Space", CVPR 2021, equations 2 to 7. https://arxiv.org/abs/2103.06030.

As in the published code, the trial step is of first order and its gradient is clamped to ±100.

Departures: only the low-frequency window of the amplitudes leaves a site, not the whole spectrum. The window is a share
of the spectrum (2L), whereas in the published code it covers one frequency. As in that code, λ interpolates amplitudes
within the window only. For tasks without masks the boundary term is omitted.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from polyclinic.core import tree
from polyclinic.core.aggregates import PerSite, Reply, WeightedMean
from polyclinic.core.job_enumeration import once
from polyclinic.core.method import Job, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.batch import Batch
from polyclinic.learning.networks.functional import at, still
from polyclinic.learning.networks.latent import represent
from polyclinic.learning.networks.model_tree import trainable
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.fourier import AmplitudeNormalizer, crop, restyle, spectrum
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.base.site_weights import SizeWeighted
from polyclinic.methods.personalization.boundary_features import boundary_contrast

CLAMP = 100.0
"""The largest entry of the gradient in the trial step."""


@savable("feddg.State", 1)
class State(NamedTuple):
    """The model, and each site's part of the amplitude bank, [m, C, *window]."""

    round: int
    params: Tree
    bank: Trees


@dataclass(frozen=True)
class FedDG(SizeWeighted[State]):
    """FedAvg whose sites train on their own images and on copies in the styles of other sites.

    A bank of low-frequency amplitudes is shared once. In each step a site replaces the amplitudes of its images with
    others from the bank, takes a trial step on the original images, and adds the loss of the result on the restyled
    ones.

    Attributes:
        window: The share of the spectrum that represents a style.
        share: The fraction of a site's images whose amplitudes enter the bank; 1/8 in the published code.
        step: β, the size of the trial step; 0.001 in the published code.
        boundary: γ, the weight of the contrast between boundary and background; 0.1 in the published code.
        temperature: τ of that contrast; 0.05.
        uniform: Whether all sites have equal weight, instead of in proportion to their training examples.
    """

    task: Task
    local: LocalTraining = LocalTraining()
    window: float = 0.02
    share: float = 0.125
    step: float = 0.001
    boundary: float = 0.1
    temperature: float = 0.05
    uniform: bool = False

    needs_each_reply = True

    def __post_init__(self) -> None:
        AmplitudeNormalizer(self.task.network.inputs, self.window)  # refuses tables and impossible windows

    def init(self, params: Tree) -> State:
        return State(0, params, {})

    @property
    def jobs(self) -> tuple[Job, ...]:
        return once("amplitude"), Job("train")

    def request(self, state: State) -> Request:
        known = {f"bank.{name}": leaves for name, leaves in state.bank.items()}
        return Request(state.round, {"params": state.params, **known}, "train" if known else "amplitude")

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        data = site.data["train"]
        if request.job == "amplitude":
            count = max(1, int(self.share * len(data)))
            chosen = torch.randperm(len(data), generator=site.rng(request.round, "bank"))[:count]
            low = crop(spectrum(data[chosen][0])[0], self.window)
            return Reply({"bank": PerSite({site.name: {"low": low}})}), memory
        others = [
            leaves["low"] for name, leaves in request.trees.items() if name not in ("params", f"bank.{site.name}")
        ]
        styles, rng = torch.cat(others) if others else None, site.rng(request.round, "styles")

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            return self._episode(model, batch, styles, rng)

        start = request.trees["params"]
        end = self.local.fit(self.task, start, site, request.round, loss=loss)
        weight = 1.0 if self.uniform else float(len(data))
        return Reply({"update": WeightedMean.of(tree.sub(end, start), weight)}), memory

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        if not state.bank:
            return state._replace(bank=dict(reply.gather("bank")))
        return State(state.round + 1, reply.mean("update").apply_to(state.params), state.bank)

    def _episode(self, model: nn.Module, batch: Batch, styles: Tensor | None, rng: torch.Generator) -> Tensor:
        """Return ``L(x; θ) + L(x'; θ') + γ L_boundary(x, x'; θ')``, ``θ' = θ − β ∇L(x; θ)`` and x' in another style.

        ``∇L(x; θ)`` in θ' is a constant.
        """
        x, y = batch
        if styles is None:
            return self.task.loss(model, batch)
        low = styles[torch.randint(len(styles), (len(x),), generator=rng)].to(x)
        shares = torch.rand(len(x), generator=rng).to(x).view(-1, *[1] * (x.ndim - 1))  # λ ~ U(0, 1)
        other = restyle(x, low, self.window, shares)
        named = trainable(model)
        inner = self.task.loss(model, batch)
        slopes = torch.autograd.grad(inner, list(named.values()), retain_graph=True, allow_unused=True)
        pairs = [(name, p, g) for (name, p), g in zip(named.items(), slopes, strict=True) if g is not None]
        fast = {name: p - self.step * g.clamp(-CLAMP, CLAMP) for name, p, g in pairs}
        with still(model):
            outer = at(model, fast, self.task.loss, (other, y))
            if self.boundary and y.ndim > 2 and not y.is_floating_point():
                outer = outer + self.boundary * at(
                    model, fast, self._contrast, (torch.cat([x, other]), y.repeat(2, *[1] * (y.ndim - 1)))
                )
        return inner + outer

    def _contrast(self, model: nn.Module, batch: Batch) -> Tensor:
        return boundary_contrast(represent(self.task.network, model, batch[0])[0], batch[1], self.temperature)

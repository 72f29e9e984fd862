"""Progressive Fourier aggregation (PFA): sites share the low frequencies of their weights.

Zhen Chen, Meilu Zhu, Chen Yang and Yixuan Yuan, "Personalized Retrogress-Resilient Framework for Real-World Medical
Federated Learning", MICCAI 2021, section 2.1, https://arxiv.org/abs/2110.00394. The other half is ``prrfl``.

Departures: the low-frequency window is symmetric, so that weights stay real; the authors' code includes one row and
column more on one side and discards the imaginary part. Any number of sites and convolutions of any dimension are
supported.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from polyclinic.core import tree
from polyclinic.core.aggregates import PerSiteUniform, Reply
from polyclinic.core.method import Capabilities, Method, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.tasks.task import InNormalization, Task
from polyclinic.learning.training.fourier import low_frequencies
from polyclinic.learning.training.local import LocalTraining


@savable("pfa.State", 1)
class State(NamedTuple):
    """The plain mean, for sites that never trained, and the deputy model of each site."""

    round: int
    params: Tree
    deputies: Trees


@dataclass(frozen=True)
class PFA(Method[State]):
    """Each site receives the mean low-frequency amplitudes of all sites and keeps its own high ones.

    The shared part grows from round to round. Normalization layers never leave a site.

    Attributes:
        rounds: T, the number of rounds until 95 % of each axis of the spectrum is shared.
        start: r₀, the share in the first round.
    """

    task: Task
    rounds: int
    local: LocalTraining = LocalTraining()
    start: float = 0.7

    capabilities = Capabilities(needs_each_reply=True)

    def init(self, params: Tree) -> State:
        return State(0, params, {})

    def request(self, state: State) -> Request:
        each = {name: {"params": {**state.params, **deputy}} for name, deputy in state.deputies.items()}
        return Request(state.round, {"params": state.params}, per_site=each)

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        keep = InNormalization(self.task)
        deputy, memory = self.learn({**request.trees["params"], **memory.get("norm", {})}, request.round, memory, site)
        shared = tree.select(deputy, lambda name: not keep(name))
        return Reply({"deputy": PerSiteUniform({site.name: shared})}), {**memory, "norm": tree.select(deputy, keep)}

    def learn(self, deputy: Tree, round: int, memory: Trees, site: Site) -> tuple[Tree, Trees]:
        """Return the deputy after training, and the memory with the model that the site predicts with."""
        end = self.local.fit(self.task, deputy, site, round)
        return end, {**memory, "personal": end}

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        sent = reply.gather("deputy")
        share = self.start + min(1.0, state.round / self.rounds) * (0.95 - self.start)  # r_t = r₀ + t/T (0.95 - r₀)
        mean = {name: torch.stack([t[name] for t in sent.values()]).mean(0) for name in next(iter(sent.values()))}
        deputies = {**state.deputies, **progressive(sent, share)}
        return State(state.round + 1, {**state.params, **mean}, deputies)

    def site_model(self, request: Request, memory: Trees) -> Tree:
        return memory.get("personal") or request.trees["params"]

    def kept_at_sites(self, name: str) -> bool:
        return InNormalization(self.task)(name)


def progressive(models: Mapping[str, Tree], share: float) -> Trees:
    """Return for each site its own weights with the low-frequency amplitudes averaged over sites (PFA).

    A weight [N, C, D1, ...] is treated as a matrix [C · D1, ... · N]. Leaves with fewer than two axes are averaged.
    """
    found: dict[str, dict[str, Tensor]] = {site: {} for site in models}
    for name, leaf in next(iter(models.values())).items():
        stack = torch.stack([model[name] for model in models.values()])
        if leaf.ndim < 2:
            mixed = stack.mean(0).expand_as(stack)
        else:
            mixed = leaf.new_empty(stack.shape)
            axes = [*range(1, leaf.ndim), 0]  # [N, C, D1, ...] → [C, D1, ..., N]
            moved = [w.permute(axes) if leaf.ndim > 2 else w for w in stack]
            rows = moved[0].shape[0] * moved[0].shape[1] if leaf.ndim > 2 else moved[0].shape[0]
            for i, w in enumerate(_mixed([w.reshape(rows, -1) for w in moved], share)):
                back = w.reshape(moved[i].shape)
                mixed[i] = back.permute([leaf.ndim - 1, *range(leaf.ndim - 1)]) if leaf.ndim > 2 else back
        for i, site in enumerate(models):
            found[site][name] = mixed[i].clone()
    return found


def _mixed(matrices: list[Tensor], share: float) -> list[Tensor]:
    """Return each matrix with its own phases and high-frequency amplitudes, and the mean low-frequency amplitudes."""
    spectra = [torch.fft.fft2(w) for w in matrices]
    mean = torch.stack([f.abs() for f in spectra]).mean(0)
    rows, columns = low_frequencies(tuple(matrices[0].shape), share)
    low = torch.zeros_like(mean, dtype=torch.bool)
    low[rows[:, None], columns] = True
    return [torch.fft.ifft2(torch.polar(torch.where(low, mean, f.abs()), f.angle())).real for f in spectra]

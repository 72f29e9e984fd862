"""Semi-synchronous training: every site trains for the same time, without idle waiting.

Stripelis, Thompson and Ambite, "Semi-Synchronous Federated Learning for Energy-Efficient Training and Accelerated
Convergence in Cross-Silo Settings", ACM TIST 2022, https://arxiv.org/abs/2102.02849, used for brain age in "Scaling
Neuroscience Research using Federated Learning", ISBI 2021, https://arxiv.org/abs/2102.08440: ``t_max = λ ·`` the
slowest site's epoch, and site k takes ``t_max / t_k`` steps, t_k being its seconds per minibatch.

Seconds are given, not measured: a method has no clock, so that runs are bit-identical. They can be measured once, as
the ``seconds`` that a run records divided by its minibatches. ``engines.local.virtual_time`` simulates the duration of
a study with such machines. Departure: a site trains at most ``MOST`` epochs of its own data in a round, so that a site
that reports a false time cannot give the others work without end.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from polyclinic.core.aggregates import PerSite, Reply
from polyclinic.core.job_enumeration import once
from polyclinic.core.method import Capabilities, Job, MethodWrapper, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.heterogeneity.fednova import FedNova
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.optimization.fedavg import State as Averaged

MOST = 100
"""The most epochs of its own data that a site trains in a round."""


@savable("semi-sync.State", 1)
class State(NamedTuple):
    """The inner method's state, and t_max in seconds; 0 before it is known."""

    inner: Averaged
    seconds: float

    @property
    def params(self) -> Tree:
        """The model."""
        return self.inner.params


@dataclass(frozen=True)
class SemiSync(MethodWrapper[State]):
    """Every site trains for the same time, so that fast sites take more steps.

    Attributes:
        inner: A method with a field ``local``, whose number of steps is set for each site.
        seconds: Seconds per minibatch by site, as pairs; 1 for sites without a pair.
        share: λ, the time of a round in epochs of the slowest site; 1 or 2 in the paper.
    """

    inner: FedAvg
    seconds: tuple[tuple[str, float], ...] = ()
    share: float = 1.0

    @property
    def capabilities(self) -> Capabilities:
        return replace(self.inner.capabilities, needs_each_reply=True)

    def init(self, params: Tree) -> State:
        return State(self.inner.init(params), 0.0)

    @property
    def jobs(self) -> tuple[Job, ...]:
        return (once("epoch-time", static=False), *self.inner.jobs)

    def request(self, state: State) -> Request | None:
        request = self.inner.request(state.inner)
        if request is None:
            return None
        if not state.seconds:
            return Request(request.round, {"params": state.params}, "epoch-time")
        limit = {"t_max": torch.tensor(state.seconds, dtype=torch.float64)}
        return replace(request, trees={**request.trees, "pace": limit})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        each = dict(self.seconds).get(site.name, 1.0)
        if request.job == "epoch-time":
            epoch = self._epoch(site) * each
            return Reply({"seconds": PerSite({site.name: {"epoch": torch.tensor(epoch, dtype=torch.float64)}})}), memory
        most = MOST * self._epoch(site)  # 0 without examples
        fitting = float(request.trees["pace"]["t_max"]) / each + 1e-9  # s_k = t_max / t_k, and infinite by a false time
        steps = min(max(1, int(min(fitting, most))), most)
        return replace(self.inner, local=replace(self.inner.local, steps=steps)).site_update(request, memory, site)

    def _epoch(self, site: Site) -> int:
        """Return the number of minibatches in an epoch of a site."""
        return replace(self.inner.local, epochs=1, steps=None).count(site.data["train"])

    def evaluation_request(self, state: State) -> Request:
        return self.request(state) or self.inner.evaluation_request(state.inner)

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        if not state.seconds:
            slowest = max(float(leaves["epoch"]) for leaves in reply.gather("seconds").values())
            return state._replace(seconds=self.share * slowest)
        return state._replace(inner=self.inner.server_update(state.inner, reply, server))


def semi_sync(
    task: Task,
    local: LocalTraining,
    sites: Sequence[str],
    *,
    seconds: tuple[float, ...] = (),
    share: float = 1.0,
    normalized: bool = False,
    uniform: bool = False,
) -> SemiSync:
    """Compose FedAvg or FedNova with the same training time at every site.

    Args:
        seconds: Seconds per minibatch, one number for each site in the order of their names; 1 for all if empty.
        share: λ, the time of a round in epochs of the slowest site; 1 or 2 in the paper.
        normalized: Whether to average as FedNova does, so that fast sites do not dominate.
        uniform: Whether all sites have equal weight, instead of in proportion to their training examples.
    """
    if seconds and len(seconds) != len(sites):
        raise ConfigError(
            f"semi-sync: seconds has {len(seconds)} numbers and there are {len(sites)} sites: give one each"
        )
    if any(not s > 0 for s in seconds):
        raise ConfigError(f"semi-sync: seconds per minibatch must be more than 0, not {min(seconds)}")
    if not 0 < share <= MOST:
        raise ConfigError(
            f"semi-sync: share must be above 0 and at most {MOST} epochs of the slowest site, not {share:g}"
        )
    pairs = tuple(zip(sorted(sites), seconds, strict=False))
    inner = (FedNova if normalized else FedAvg)(task, local, uniform=uniform)
    return SemiSync(inner, pairs, share)

"""IOP-FL: personal models for training sites, and a mixture of them for other hospitals.

Jiang, Yang, Chen and Dou, "IOP-FL: Inside-Outside Personalization for Federated Medical Image Segmentation", IEEE
Transactions on Medical Imaging 2023. https://arxiv.org/abs/2204.08467. Inside: a running average of a site's local
models over the rounds. Outside: test-time routing; ``polyclinic.methods.personalization.routing_network`` lists
departures.
"""

from dataclasses import dataclass
from typing import NamedTuple

from polyclinic.core import tree
from polyclinic.core.aggregates import PerSite, Reply
from polyclinic.core.method import Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.base.site_weights import SizeWeighted
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.personalization.routing_network import Adaptation, Routed


@savable("iop-fl.State", 1)
class State(NamedTuple):
    """The global model, and each site's personal one, for use at other hospitals."""

    round: int
    params: Tree
    personal: Trees


@dataclass(frozen=True)
class IOPFL(SizeWeighted[State]):
    """FedAvg; each site predicts with the running average of its local models, an unseen one with a mixture of all.

    The mixture is adapted to the unseen hospital's own images, without labels, in several passes over all of them.

    Attributes:
        sites: The training sites.
        alpha: α, the weight of the previous value in the running average; 0.1 in the published code.
        passes: Passes of the adaptation over the images of an unseen hospital; 10 in the published code.
        adapt_lr: Step size of the adaptation; 0.001 in the published code.
        noise: Standard deviation of the noise under which predictions should be consistent, in the inputs' unit.
        uniform: Whether all sites have equal weight, instead of in proportion to their training examples.
    """

    task: Task
    sites: tuple[str, ...]
    local: LocalTraining = LocalTraining()
    alpha: float = 0.1
    passes: int = 10
    adapt_lr: float = 1e-3
    noise: float = 0.5
    uniform: bool = False

    needs_each_reply = True

    @property
    def prediction_task(self) -> Task:
        return self.task.with_network(Routed(self.task.network, len(self.sites) + 1))

    def init(self, params: Tree) -> State:
        return State(0, params, dict.fromkeys(self.sites, params))

    def request(self, state: State) -> Request:
        return Request(state.round, {"params": state.params})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        reply, _ = FedAvg(self.task, self.local, uniform=self.uniform).site_update(request, memory, site)
        weight = reply.mean("update").weight
        end = tree.add(request.trees["params"], tree.scale(reply.mean("update").total, 1 / weight))
        # t_i ← α t_i + (1 − α) w_i
        own = tree.lerp(end, memory["personal"], self.alpha) if "personal" in memory else end
        return Reply({**reply.parts, "personal": PerSite({site.name: own})}), {**memory, "personal": own}

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        moved = reply.mean("update").apply_to(state.params)
        return State(state.round + 1, moved, {**state.personal, **reply.gather("personal")})

    def evaluation_request(self, state: State) -> Request:
        return Request(state.round, {"params": state.params, **{f"of.{name}": t for name, t in state.personal.items()}})

    def site_model(self, request: Request, memory: Trees) -> Tree:
        inside, shared = memory.get("personal"), request.trees["params"]
        members = [shared, *(request.trees.get(f"of.{name}", shared) for name in self.sites)]
        routed = Routed(self.task.network, len(members))
        return routed.filled(members if inside is None else [inside] * len(members), inside is None)

    def adapted_model(self, request: Request, memory: Trees, site: Site, role: str) -> Tree:
        params = self.site_model(request, memory)
        if "personal" in memory:
            return params
        adapt = Adaptation(self.passes, self.adapt_lr, self.noise, self.local.batch_size)
        return adapt(self.prediction_task, params, site.data[role], site.rng(request.round, "adapt", role), site.device)

"""FedRDN: sites train on images that are standardized with the statistics of a random site.

Yan, Fu, Li, Xie, Ma, Yang and Zhu, "A Simple Data Augmentation for Feature Distribution Skewed Federated Learning",
CVPR 2025, equations 3 to 6, https://arxiv.org/abs/2306.09363. A site's statistics are the means over its images of each
channel's mean and standard deviation. At prediction every site uses its own, and a site that did not train those of its
images. The official code was not available.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polyclinic.core import tree
from polyclinic.core.aggregates import PerSiteUniform, Reply
from polyclinic.core.job_enumeration import once
from polyclinic.core.method import Job, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.batch import Batch
from polyclinic.learning.networks.affine import AffineInput
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.base.site_weights import SizeWeighted
from polyclinic.methods.harmonization.input_front import fronted, in_front
from polyclinic.methods.harmonization.zscore import affine_shape


@savable("fedrdn.State", 1)
class State(NamedTuple):
    """The model, and each site's statistics: ``mean`` and ``std`` in the shape of an image's channels."""

    round: int
    params: Tree
    statistics: Trees


@dataclass(frozen=True)
class FedRDN(SizeWeighted[State]):
    """FedAvg in which each image of a minibatch is standardized with the mean and deviation of a randomly drawn site.

    Attributes:
        uniform: Whether all sites have equal weight, instead of in proportion to their training examples.
    """

    task: Task
    local: LocalTraining = LocalTraining()
    uniform: bool = False

    def __post_init__(self) -> None:
        if len(self.task.network.inputs) < 3:
            raise ConfigError(f"fedrdn standardizes images or volumes, not inputs of shape {self.task.network.inputs}")

    needs_each_reply = True

    @property
    def prediction_task(self) -> Task:
        return fronted(self.task, AffineInput(affine_shape(self.task)))

    def init(self, params: Tree) -> State:
        return State(0, params, {})

    @property
    def jobs(self) -> tuple[Job, ...]:
        return once("statistics"), Job("train")

    def request(self, state: State) -> Request:
        known = {f"statistics.{name}": leaves for name, leaves in state.statistics.items()}
        return Request(state.round, {"params": state.params, **known}, "train" if known else "statistics")

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start, shape = request.trees["params"], affine_shape(self.task)
        if request.job == "statistics":
            own = statistics(site.data["train"], shape)
            return Reply({"statistics": PerSiteUniform({site.name: own})}), {**memory, "statistics": own}
        sites = [request.trees[name] for name in sorted(request.trees) if name.startswith("statistics.")]
        means, stds = (torch.stack([leaves[part] for leaves in sites]) for part in ("mean", "std"))

        def augment(batch: Batch, rng: torch.Generator) -> Batch:
            x, y = self.local.augment(batch, rng) if self.local.augment else batch
            j = torch.randint(len(sites), (len(x),), generator=rng)
            return (x - means[j].to(x)) / stds[j].to(x), y

        plain = {"front.scale": torch.ones(shape), "front.shift": torch.zeros(shape)}  # the batches are standardized
        training = replace(self.local, augment=augment)
        end = training.fit(self.prediction_task, {**start, **plain}, site, request.round)
        return Reply({"update": self.update(tree.select(end, start.__contains__), start, site)}), memory

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        if not state.statistics:
            return state._replace(statistics=dict(reply.gather("statistics")))
        return State(state.round + 1, reply.mean("update").apply_to(state.params), state.statistics)

    def site_model(self, request: Request, memory: Trees) -> Tree:
        sites = [leaves for name, leaves in request.trees.items() if name.startswith("statistics.")]
        shape = affine_shape(self.task)
        even = {"mean": torch.zeros(shape), "std": torch.ones(shape)}
        if sites:  # what a file holds: the mean over sites
            even = {part: torch.stack([leaves[part] for leaves in sites]).mean(0) for part in even}
        return {**request.trees["params"], **front(memory.get("statistics", even))}

    def adapted_model(self, request: Request, memory: Trees, site: Site, role: str) -> Tree:
        model = self.site_model(request, memory)
        if "statistics" in memory:
            return model
        own = front(statistics(site.data[role], affine_shape(self.task)))
        return {**tree.select(model, lambda name: not in_front(name)), **own}


def statistics(data: Any, shape: tuple[int, ...]) -> Tree:
    """Return the mean over images of each channel's mean and standard deviation, in ``shape``.

    Raises:
        ConfigError: If there are no images.
    """
    if not len(data):
        raise ConfigError("fedrdn: a site without images has no statistics")
    total: Tensor = torch.zeros(2, shape[0], dtype=torch.float64)
    for chunk in torch.arange(len(data)).split(256):
        values = data[chunk][0].double().flatten(2)
        total += torch.stack([values.mean(2).sum(0), values.std(2, correction=0).sum(0)])
    mean, std = (total / len(data)).float()
    return {"mean": mean.reshape(shape), "std": std.clamp_min(1e-6).reshape(shape)}


def front(found: Tree) -> Tree:
    """Return the leaves of the front ``x ↦ (x − mean) / std``."""
    return {"front.scale": 1 / found["std"], "front.shift": -found["mean"] / found["std"]}

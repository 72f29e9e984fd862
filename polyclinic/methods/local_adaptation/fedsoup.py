"""FedSoup: late in training, each site averages its model with those global models that help it.

Chen, Jiang, Dou, Wang and Li, "FedSoup: Improving Generalization and Personalization in Federated Learning via
Selective Model Interpolation", MICCAI 2023, Algorithm 1, https://arxiv.org/abs/2307.10507, after the published code.
Departures: the code selects by the accuracy on test data; here it is the loss on validation data, or on training data
at a site without any. Running statistics are those of the site's trained model.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply
from polyclinic.core.method import Request
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.tasks.risk import risk, trained
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.base.site_weights import SizeWeighted
from polyclinic.methods.optimization.fedavg import State


class Soup(NamedTuple):
    """The mean of the ``size`` global models that a site has selected; empty if there are none."""

    mean: Tree
    size: int


@dataclass(frozen=True)
class FedSoup(SizeWeighted[State]):
    """FedAvg whose sites interpolate: a new global model enters a site's soup if this lowers the validation loss.

    The model that a site sends, and with which it predicts, is the mean of its trained model and its soup.

    Attributes:
        rounds: Number of planned rounds.
        begin: Share of the rounds after which sites interpolate; 0.75 in the paper.
        uniform: Whether all sites have equal weight, instead of in proportion to their training examples.
    """

    task: Task
    rounds: int
    local: LocalTraining = LocalTraining()
    begin: float = 0.75
    uniform: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.begin <= 1:
            raise ConfigError(f"fedsoup: begin is a share of the rounds from 0 to 1, not {self.begin:g}")

    def init(self, params: Tree) -> State:
        return State(0, params)

    def request(self, state: State) -> Request:
        return Request(state.round, {"params": state.params})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start, kept = request.trees["params"], dict(memory)
        own = self.local.fit(self.task, start, site, request.round)
        if request.round + 1 > self.begin * self.rounds:
            soup = Soup(memory.get("soup", {}), int(memory["count"]["n"]) if "count" in memory else 0)
            own, soup = self.interpolated(own, start, soup, site, request.round)
            kept |= {"soup": soup.mean, "count": {"n": torch.tensor(soup.size)}}
        return Reply({"update": self.update(own, start, site)}), {**kept, "own": own}

    def interpolated(self, own: Tree, shared: Tree, soup: Soup, site: Site, round: int) -> tuple[Tree, Soup]:
        """Return the mean of the trained model and the soup, with or without ``shared``, and the soup."""
        learned, k = trained(self.task), soup.size
        new = tree.select(shared, learned.__contains__)
        old = soup.mean if k else tree.zeros(new)
        local = tree.select(own, learned.__contains__)
        # (θ + k s) / (k + 1)  or  (θ + k s + θ_shared) / (k + 2)
        without = {**own, **tree.zip_with(lambda x, s: (x + k * s) / (k + 1), local, old)}
        with_new = {**own, **tree.zip_with(lambda x, s, g: (x + k * s + g) / (k + 2), local, old, new)}
        role = "val" if len(site.data.get("val", ())) else "train"
        one, two = (risk(self.task, model, site, round, role) for model in (without, with_new))
        if two < one:
            return with_new, Soup(tree.zip_with(lambda s, g: (k * s + g) / (k + 1), old, new), k + 1)
        return without, soup

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        return State(state.round + 1, reply.mean("update").apply_to(state.params))

    def site_model(self, request: Request, memory: Trees) -> Tree:
        return memory.get("own", request.trees["params"])

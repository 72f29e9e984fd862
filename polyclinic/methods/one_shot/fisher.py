"""Fisher merging: one message; the mean of the sites' models, weighted for each parameter by its Fisher information.

Michael Matena and Colin Raffel, "Merging Models with Fisher-Weighted Averaging", NeurIPS 2022, section 3,
https://arxiv.org/abs/2111.09832: ``θ = Σ_j λ_j F_j θ_j / Σ_j λ_j F_j`` with the diagonal of the Fisher information
matrix ``F_j = 1/N Σ_x E_{y ~ p(y | x)} [∂ log p(y | x) / ∂θ]²`` at the site's own model. Departures: one class is drawn
for each image instead of the sum over all classes, which has the same expectation; other tasks than classification,
whose outputs are no probabilities of one class, take the gradient of their loss at the true target; the site sends its
change from the common model, whose mean differs by that model only; running statistics are averaged. All sums are over
sites, so that secure aggregation applies.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from polyclinic.core import tree
from polyclinic.core.aggregates import ElementwiseMean, Reply, WeightedMean
from polyclinic.core.method import Request
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.networks.model_tree import cached_model, gradient, trainable
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.learning.training.seeding import seeded
from polyclinic.methods.one_shot.one_message import OneMessage
from polyclinic.methods.optimization.fedavg import State


@dataclass(frozen=True)
class FisherMerging(OneMessage):
    """One message from each site: its fine-tuned model, with the Fisher information of each parameter.

    Attributes:
        examples: The largest number of training examples from which a site estimates its Fisher information.
        floor: Added to the Fisher information, so that parameters without any are averaged.
        uniform: Whether all sites have equal weight, instead of in proportion to their training examples.
    """

    task: Task
    local: LocalTraining = LocalTraining()
    examples: int = 256
    floor: float = 1e-6
    uniform: bool = False

    def __post_init__(self) -> None:
        if self.examples < 1 or not 0 < self.floor < float("inf"):
            raise ConfigError("fisher-merging: examples must be at least 1 and floor a positive number")

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start = request.trees["params"]
        end, weight = self.local.fit(self.task, start, site, 0), self.site_weight(site)
        information = self.information(end, site)
        change = tree.sub(end, start)
        running = tree.select(change, lambda name: name not in information)
        parameters = ElementwiseMean.of(tree.select(change, information.__contains__), tree.scale(information, weight))
        return Reply({"update": parameters, "running": WeightedMean.of(running, weight)}), memory

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        params = tree.shift(state.params, reply.leaf_mean("update").value)
        return State(1, tree.shift(params, reply.mean("running").value))

    def information(self, params: Tree, site: Site) -> Tree:
        """Return the diagonal of the Fisher information of ``params`` at a site, plus ``floor``, by parameter."""
        data, rng = site.data["train"], site.rng(0, "fisher")
        model = cached_model(self.task, params, site.device).eval()
        total = {name: torch.zeros_like(p, device="cpu") for name, p in trainable(model).items()}
        chosen = torch.randperm(len(data), generator=rng)[: self.examples]
        with seeded(rng, site.device):
            for one in chosen.split(1):
                x, y = (leaf.to(site.device) for leaf in data[one])
                if self.task.kind == "classification":
                    scores = model(x)
                    y = torch.multinomial(scores.detach().softmax(1).cpu(), 1, generator=rng)[:, 0].to(site.device)
                    loss = F.cross_entropy(scores, y)
                else:
                    loss = self.task.loss(model, (x, y))
                total = {name: total[name] + g.cpu().square() for name, g in gradient(loss, model).items()}
        return {name: leaf / len(chosen) + self.floor for name, leaf in total.items()}

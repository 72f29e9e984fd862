"""FedDF: the server fuses the sites' models by distilling what they say together of public images.

Lin, Kong, Stich and Jaggi, "Ensemble Distillation for Robust Model Fusion in Federated Learning", NeurIPS 2020,
Algorithm 1 and equation 1 (AVGLOGITS). https://arxiv.org/abs/2006.07242. The paper keeps the student that does best on
validation data, of which the server here has none: it distils for a fixed number of passes.
"""

from dataclasses import dataclass, replace

import torch

from polyclinic.core import tree
from polyclinic.core.aggregates import PerSite, Reply, WeightedMean
from polyclinic.core.method import Capabilities, Method, Request
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.objectives.distillation_loss import Matching, answers
from polyclinic.learning.tasks.example_pool import public
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import State


@dataclass(frozen=True)
class FedDF(Method[State]):
    """FedAvg whose average then learns to say of public, unlabeled images what all sites' models say on average.

    Needs the role ``public`` at the server.

    Attributes:
        distil: How the server trains; Adam at 1e-3 in the paper.
        temperature: T of the distillation.
    """

    task: Task
    local: LocalTraining = LocalTraining()
    distil: LocalTraining = LocalTraining(epochs=5, optimizer="adam", lr=1e-3)
    temperature: float = 1.0

    capabilities = Capabilities(needs_each_reply=True)

    def init(self, params: Tree) -> State:
        return State(0, params)

    def request(self, state: State) -> Request:
        return Request(state.round, {"params": state.params})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        end = self.local.fit(self.task, request.trees["params"], site, request.round)
        n = torch.tensor(float(len(site.data["train"])))
        return Reply({"model": PerSite({site.name: {**tree.prefixed("model", end), "examples": n}})}), memory

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        images = public(server.data, "the server", "feddf")
        mean, logits = WeightedMean(tree.zeros(state.params), 0.0), torch.zeros(())
        sent = reply.gather("model")
        for leaves in sent.values():
            model = tree.under("model", leaves)
            mean = mean + WeightedMean.of(model, float(leaves["examples"]))
            logits = logits + answers(self.task, model, images, server.device)[0] / len(sent)
        loss = Matching(self.task.kind, logits, self.temperature)  # KL( σ(mean_k f(x; w_k)) ‖ σ(f(x; w)) )
        params = self.distil.fit(self.task, mean.value, server, state.round, data=images, loss=loss)
        return State(state.round + 1, params)


def feddf(
    task: Task,
    local: LocalTraining,
    *,
    distil_epochs: int = 5,
    distil_lr: float = 1e-3,
    distil_batch: int = 64,
    temperature: float = 1.0,
) -> FedDF:
    """FedAvg, then distillation of all sites' models on the server's public images.

    Args:
        distil_epochs: The server's passes over the public images after each round.
        distil_lr: Its learning rate, with Adam.
        distil_batch: Its minibatch.
    """
    distil = replace(FedDF.distil, epochs=distil_epochs, lr=distil_lr, batch_size=distil_batch)
    return FedDF(task, local, distil, temperature)

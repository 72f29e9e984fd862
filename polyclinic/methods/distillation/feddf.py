"""FedDF: the server fuses the sites' models by distilling their mean prediction on public images.

Lin, Kong, Stich and Jaggi, "Ensemble Distillation for Robust Model Fusion in Federated Learning", NeurIPS 2020,
Algorithm 1 and equation 1 (AVGLOGITS). https://arxiv.org/abs/2006.07242. Departure: the paper selects the student on
validation data, which the server does not have here; it distills for a fixed number of epochs.
"""

from dataclasses import dataclass

import torch

from polyclinic.core import tree
from polyclinic.core.aggregates import WEIGHT, PerSite, Reply, WeightedMean
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
    """FedAvg whose average then learns the mean prediction of all sites' models on public, unlabeled images.

    Needs the role ``public`` at the server.

    Attributes:
        distil_epochs: Epochs of the server over the public images after each round.
        distil_lr: Its learning rate, with Adam; 1e-3 in the paper.
        distil_batch: Its minibatch size.
        temperature: T of the distillation.
    """

    task: Task
    local: LocalTraining = LocalTraining()
    distil_epochs: int = 5
    distil_lr: float = 1e-3
    distil_batch: int = 64
    temperature: float = 1.0

    capabilities = Capabilities(needs_each_reply=True)

    @property
    def distil(self) -> LocalTraining:
        """The server's training."""
        return LocalTraining(self.distil_epochs, self.distil_batch, "adam", self.distil_lr)

    def init(self, params: Tree) -> State:
        return State(0, params)

    def request(self, state: State) -> Request:
        return Request(state.round, {"params": state.params})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        end = self.local.fit(self.task, request.trees["params"], site, request.round)
        n = torch.tensor(float(len(site.data["train"])))
        return Reply({"model": PerSite({site.name: {**tree.prefixed("model", end), WEIGHT: n}})}), memory

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        images = public(server.data, "the server", "feddf")
        mean, logits = WeightedMean(tree.zeros(state.params), 0.0), torch.zeros(())
        sent = reply.gather("model")
        for leaves in sent.values():
            model = tree.under("model", leaves)
            mean = mean + WeightedMean.of(model, float(leaves[WEIGHT]))
            logits = logits + answers(self.task, model, images, server.device)[0] / len(sent)
        loss = Matching(self.task.kind, logits, self.temperature)  # KL( σ(mean_k f(x; w_k)) ‖ σ(f(x; w)) )
        params = self.distil.fit(self.task, mean.value, server, state.round, data=images, loss=loss)
        return State(state.round + 1, params)

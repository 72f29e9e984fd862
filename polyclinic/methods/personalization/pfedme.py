"""pFedMe: personal models regularized towards a shared one, by Moreau envelopes.

T. Dinh, Tran and Nguyen, "Personalized Federated Learning with Moreau Envelopes", NeurIPS 2020, Algorithm 1,
https://arxiv.org/abs/2006.08848. A personal model θ takes K steps of ``local``'s optimizer on each minibatch, and
starts each round from the shared model, as in the published code. β, the server's weight of the new mean, is ``lr``.
The running statistics of batch normalization that are sent are those of θ.
"""

from dataclasses import dataclass

from polyclinic.core.aggregates import Reply
from polyclinic.core.method import Request
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.networks.model_tree import cached_model, params_of, trainable
from polyclinic.learning.training.local import Proximal
from polyclinic.learning.training.seeding import seeded
from polyclinic.methods.optimization.fedavg import FedAvg


@dataclass(frozen=True)
class PFedMe(FedAvg):
    """FedAvg in which the shared model w takes gradient steps on the envelope ``min_θ f(θ) + λ/2 · ‖θ − w‖²``.

    Attributes:
        lam: λ, the weight of the proximal term. The paper uses 15 to 30.
        eta: η, the step size of w along ``λ · (w − θ)``; 0.005 in the paper. With η = 1/λ and K = 1 this is FedAvg.
        steps: K, the number of steps of θ on a minibatch. The paper uses 5.
    """

    lam: float = 15.0
    eta: float = 0.005
    steps: int = 5

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start, towards = request.trees["params"], Proximal(self.lam)
        model = cached_model(self.task, start, site.device)
        w = {name: p.detach().clone() for name, p in trainable(model).items()}
        step, rng = self.local.stepper(model, request.round), site.rng(request.round, "train", "train", "")
        with seeded(rng, site.device):
            for batch in self.local.batches(site.data["train"], rng, site.device):
                for _ in range(self.steps):
                    step(self.task.loss(model, batch) + towards(model, w))
                theta = trainable(model)
                w = {name: leaf - self.eta * self.lam * (leaf - theta[name].detach()) for name, leaf in w.items()}
        own = params_of(model)
        shared = {**own, **{name: leaf.to(own[name].device) for name, leaf in w.items()}}
        return Reply({"update": self.update(shared, start, site)}), {
            **memory,
            "own": own,
        }

    def site_model(self, request: Request, memory: Trees) -> Tree:
        return memory.get("own", request.trees["params"])

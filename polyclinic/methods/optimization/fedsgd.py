"""FedSGD: the limit of FedAvg in which a round is one full-batch gradient step.

McMahan, Moore, Ramage, Hampson and Agüera y Arcas, "Communication-Efficient Learning of Deep Networks from
Decentralized Data", AISTATS 2017, section 2. https://arxiv.org/abs/1602.05629.
"""

from dataclasses import dataclass

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.method import Request
from polyclinic.core.site import Site
from polyclinic.core.tree import Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.batch import chunks
from polyclinic.learning.networks.model_tree import cached_model, params_of, trainable
from polyclinic.learning.training.seeding import seeded
from polyclinic.methods.optimization.fedavg import FedAvg


@dataclass(frozen=True)
class FedSGD(FedAvg):
    """Sites send one full-batch gradient; the server takes the step, of size ``lr`` times the training's learning rate.

    Attributes:
        chunk: Number of examples processed at once. The gradient is that of all examples; batch normalization uses the
            statistics of each chunk.
    """

    chunk: int = 256

    def __post_init__(self) -> None:
        if self.local.augmentation is not None or self.local.balance or self.local.balance_patients:
            raise ConfigError(
                "fedsgd takes the gradient of all examples as they are: remove augmentation, balance and "
                "balance_patients, or choose fedavg"
            )

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start, data = request.trees["params"], site.data["train"]
        model = cached_model(self.task, start, site.device)
        with seeded(site.rng(request.round, "gradient"), site.device):
            for chunk in chunks(data, self.chunk):
                x, y = data[chunk]
                share = len(chunk) / len(data)
                (self.task.loss(model, (x.to(site.device), y.to(site.device))) * share).backward()
        statistics = tree.sub(params_of(model), start)  # 0 for everything that a gradient moves
        # w ← w − η g
        steps = {name: -self.local.lr * p.grad.cpu() for name, p in trainable(model).items() if p.grad is not None}
        return Reply({"update": WeightedMean.of({**statistics, **steps}, self.site_weight(site))}), memory

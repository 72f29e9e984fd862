"""CCVR: after federated averaging, the server trains the head anew on virtual features of all classes alike.

Luo, Chen, Hu, Zhang, Liang and Feng, "No Fear of Heterogeneity: Classifier Calibration for Federated Learning with
Non-IID Data", NeurIPS 2021, Algorithm 1 and equations 3 and 4, https://arxiv.org/abs/2106.05001. In the last round,
sites send the sums by class from which the mean and the covariance of features follow, and the server draws as many
features of each class from the Gaussian. Only sums over sites are needed.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.method import Job, Method, Request
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.batch import Batch
from polyclinic.learning.networks.latent import encode_all, head_name, head_width
from polyclinic.learning.networks.model_tree import cached_model
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining, plain
from polyclinic.methods.base.phases import Then
from polyclinic.methods.optimization.fedavg import FedAvg, State


@dataclass(frozen=True, eq=False)
class Features:
    """Features [n, F] with their classes [n], as data to train on."""

    h: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: Tensor) -> Batch:
        return self.h[index], self.y[index]


@dataclass(frozen=True)
class Head:
    """The head of a task's network, alone."""

    task: Task

    def model(self) -> nn.Module:
        """Build the head."""
        model = self.task.model()
        return model.get_submodule(head_name(self.task.network, model))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the task's loss, of a batch of features and classes."""
        return self.task.loss(model, batch)


@dataclass(frozen=True)
class Calibrated(Method[State]):
    """One round in which the server trains the head on virtual features.

    Attributes:
        samples: Number of virtual features of each class.
        epochs: Passes of the server over them.
    """

    task: Task
    local: LocalTraining = LocalTraining()
    samples: int = 200
    epochs: int = 1

    def __post_init__(self) -> None:
        try:
            with torch.random.fork_rng(devices=[]):
                Head(self.task).model()(torch.zeros(2, head_width(self.task.network)))
        except (RuntimeError, ValueError, IndexError) as error:
            raise ConfigError(
                f"ccvr trains a head that takes one vector of features; {self.task.network.name} has another one. Use "
                f"a cnn, mlp, resnet or vit ({error})"
            ) from error

    def init(self, params: Tree) -> State:
        return State(0, params)

    @property
    def jobs(self) -> tuple[Job, ...]:
        return (Job("features"),)

    def request(self, state: State) -> Request:
        return Request(state.round, {"params": state.params}, "features")

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        data, classes = site.data["train"], self.task.network.outputs
        if not len(data):
            return Reply(), memory
        model = cached_model(self.task, request.trees["params"], site.device)
        h = encode_all(self.task.network, model, data, site.device).double()
        labels = torch.cat([data[chunk][1] for chunk in torch.arange(len(data)).split(256)])
        of = nn.functional.one_hot(labels, classes).double()
        sums = {"count": of.sum(0), "sum": of.T @ h, "square": torch.einsum("nc,nf,ng->cfg", of, h, h)}
        return Reply({"sums": WeightedMean(sums, 1.0)}), memory

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        drawn = virtual_features(reply.mean("sums").total, self.samples, server.rng(state.round, "features"))
        head, name = Head(self.task), head_name(self.task.network, self.task.model())
        training = replace(plain(self.local), epochs=self.epochs, steps=None, augment=None, penalty=None)
        end = training.fit(head, tree.under(name, state.params), server, state.round, data=drawn)
        return State(state.round + 1, {**state.params, **tree.prefixed(name, end)})


def virtual_features(sums: Tree, samples: int, rng: torch.Generator) -> Features:
    """Draw ``samples`` features of each class with two examples or more from its Gaussian, from sums over sites.

    Args:
        sums: ``count`` [C], ``sum`` [C, F] and ``square`` [C, F, F], the sum of outer products.
    """
    h, y = [], []
    for c, n in enumerate(sums["count"].tolist()):
        if n < 2:
            continue
        mean = sums["sum"][c] / n
        # Σ_c = (Σ h hᵀ − n μ μᵀ) / (n − 1)
        covariance = (sums["square"][c] - n * torch.outer(mean, mean)) / (n - 1)
        sizes, directions = torch.linalg.eigh(covariance)
        normal = torch.randn(samples, len(mean), generator=rng, dtype=torch.float64)
        h.append((mean + normal * sizes.clamp_min(0).sqrt() @ directions.T).float())
        y.append(torch.full((samples,), c))
    if not h:
        raise ConfigError("ccvr: no class has two examples in the federation, so that no Gaussian can be estimated")
    return Features(torch.cat(h), torch.cat(y))


def ccvr(
    task: Task,
    local: LocalTraining,
    rounds: int,
    *,
    samples: int = 200,
    epochs: int = 1,
    lr: float = 1.0,
    uniform: bool = False,
) -> Then:
    """Compose FedAvg with a last round that calibrates the head.

    Args:
        samples: Number of virtual features of each class.
        epochs: Passes of the server over them, with the sites' learning rate and minibatch size.
    """
    if rounds < 2:
        raise ConfigError("ccvr calibrates the head in the last round: set rounds to 2 or more")
    return Then(FedAvg(task, local, lr, uniform), Calibrated(task, local, samples, epochs), rounds - 1)

"""Federated masked image modeling: no target in the first phase, every image counts, and the second is FedAvg."""

import pytest
import torch

from polyclinic.core import tree
from polyclinic.core.site import Site
from polyclinic.errors import ConfigError
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.objectives.contrastive import extended
from polyclinic.learning.objectives.masked_modeling import Masked
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.example_pool import all_inputs
from polyclinic.learning.tasks.segmentation import Segmentation
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.base.phases import Pretrained
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.self_supervised.fedmae import fedmae
from tests.support.few_labels import half_labeled, near, run, same, with_other_targets

LOCAL = LocalTraining(epochs=1, batch_size=8, lr=0.05)


def test_one_round_of_pretraining_is_the_mean_of_what_sites_learn(task: Classification, sites: dict[str, Site]) -> None:
    masked = Masked(task, grid=4)
    step, _ = run(Pretrained(masked, LOCAL), sites, task.first(0), 1)
    start = extended(masked, task.first(0))
    ends = [LOCAL.fit(masked, start, site, 0, data=all_inputs(site.data)) for site in sites.values()]
    n = [len(all_inputs(site.data)) for site in sites.values()]
    assert n == [24, 29, 34]
    wanted = {
        name: sum((k * end[name] for k, end in zip(n, ends, strict=True)), torch.tensor(0)) / sum(n) for name in start
    }
    assert near(step.state.whole, wanted)
    assert same(step.state.params, tree.under("backbone", step.state.whole))


def test_targets_matter_only_in_the_second_phase_and_only_labeled_ones(task: Classification) -> None:
    sites = half_labeled(labeled=2)
    one, two = (run(fedmae(task, LOCAL, 4), s, task.first(0), 4)[0].state for s in (sites, with_other_targets(sites)))
    assert same(one.params, two.params)
    assert not torch.equal(one.params["head.weight"], task.first(0)["head.weight"])


def test_the_first_phase_has_its_own_optimizer(task: Classification) -> None:
    method = fedmae(task, LOCAL, 10, pretrain=0.3, pretrain_lr=1e-3, pretrain_optimizer="adamw")
    assert isinstance(method.first, Pretrained)
    assert isinstance(method.second, FedAvg)
    assert (method.first.local.lr, method.first.local.optimizer, method.rounds) == (1e-3, "adamw", 3)
    assert (method.second.local.lr, method.second.local.optimizer) == (0.05, "sgd")
    with pytest.raises(ValueError, match="no optimizer is called 'lion'"):
        fedmae(task, LOCAL, 10, pretrain_optimizer="lion")


@pytest.mark.parametrize(
    "task",
    [
        Segmentation(Network("residual-unet", (1, 16, 16), 2, (("width", 4), ("levels", 3)))),
        Classification(Network("densenet121", (1, 32, 32), 2)),
    ],
    ids=lambda task: task.network.name,
)
def test_a_representation_coarser_than_the_image_learns_hidden_pixels(task: Task) -> None:
    masked = Masked(task, grid=4)
    torch.manual_seed(0)
    model, x = masked.model(), torch.rand(2, *task.network.inputs)
    optimizer = torch.optim.Adam(model.parameters(), 0.003)
    losses = []
    for _ in range(8):
        torch.manual_seed(1)  # the same parts are hidden
        loss = masked.loss(model, (x, None))  # type: ignore[arg-type]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_bags_are_refused() -> None:
    with pytest.raises(ConfigError, match="attention-mil reads bags"):
        fedmae(Classification(Network("attention-mil", (6, 8), 2)), LOCAL, 10)

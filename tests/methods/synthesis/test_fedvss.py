"""Virtual examples: directions that are known for linear models, sizes as said, and FedVSS's limits."""

from typing import Any

import pytest
import torch

from polyclinic.core.site import Site
from polyclinic.learning.networks.functional import still
from polyclinic.learning.networks.model_tree import params_of
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.objectives.distillation_loss import divergence
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.synthesis.fedvss import FedVSS
from polyclinic.methods.synthesis.virtual_examples import adversarial, moved, surer
from tests.conftest import little_sites
from tests.support.few_labels import run, same

LINEAR = Classification(Network("mlp", (6,), 2, (("depth", 0),)))


def batch(n: Any = 20) -> Any:
    return torch.randn(n, 6, generator=Site("s").rng("x")), torch.arange(n) % 2


def test_the_adversarial_direction_of_a_linear_model_is_its_weights_difference() -> None:
    model, (x, _) = LINEAR.model().double(), batch()
    x = x.double()
    r = adversarial("classification", model, x, Site("s").rng("r"), 0.1) - x
    away, toward = model.get_parameter("head.weight").detach()
    w = toward - away
    cosine = torch.cosine_similarity(r, w.expand_as(r))
    assert (cosine.abs() > 0.99).all()
    size = r.square().mean(1).sqrt() / x.std(1)
    assert torch.allclose(size, torch.full_like(size, 0.1), atol=1e-3)


def test_it_changes_the_models_mind_more_than_chance(task: Classification) -> None:
    model, x = task.model().eval(), torch.randn(16, 1, 8, 8, generator=Site("s").rng("x"))
    with torch.no_grad():
        said = model(x)
    near = adversarial("classification", model, x, Site("s").rng("a"), 0.3).detach()
    chance = moved(x, torch.randn(x.shape, generator=Site("s").rng("b")), 0.3)
    with torch.no_grad():
        far = [float(divergence("classification", model(v), said)) for v in (near, chance)]
    assert far[0] > 1.5 * far[1]


@pytest.mark.parametrize("steps", [1, 4])
def test_the_other_kind_makes_a_model_surer_of_the_label(steps: int) -> None:
    model, (x, y) = LINEAR.model(), batch()

    def loss(v: Any) -> Any:
        return LINEAR.loss(model, (v, y))

    v = surer(loss, x, 0.5, steps)
    gain = LINEAR.loss(model, (x, y)) - loss(v)
    assert gain > 0.01
    away, toward = model.get_parameter("head.weight").detach()
    w = toward - away
    assert (torch.cosine_similarity(v - x, w.expand_as(x)) * (2 * y - 1) > 0.99).all()


def test_virtual_examples_leave_statistics_alone(task: Classification) -> None:
    model = task.model().train()
    before = params_of(model)
    with still(model):
        model(torch.randn(8, 1, 8, 8))
    assert same(params_of(model), before)
    model(torch.randn(8, 1, 8, 8))
    assert not same(params_of(model), before)


def test_without_virtual_examples_it_is_fedavg(task: Classification, local: LocalTraining) -> None:
    sites = little_sites()
    step, _ = run(FedVSS(task, local, smooth=0.0, align=0.0), sites, task.first(0))
    plain, _ = run(FedAvg(task, local), sites, task.first(0))
    assert same(step.state.params, plain.state.params)
    both, _ = run(FedVSS(task, local), sites, task.first(0))
    assert not same(both.state.params, plain.state.params)


def test_examples_that_do_not_move_count_the_loss_twice(task: Classification) -> None:
    """With strides of 0, L = (1 + λ₂) CE: as training alone with a step so much longer."""
    sites, local = little_sites(), LocalTraining(steps=1, batch_size=100, lr=0.05)
    step, _ = run(FedVSS(task, local, smooth=0.0, align=1.0, stride=0.0), sites, task.first(0), 1)
    plain, _ = run(FedAvg(task, LocalTraining(steps=1, batch_size=100, lr=0.1)), sites, task.first(0), 1)
    assert all(torch.allclose(step.state.params[k], plain.state.params[k], atol=1e-5) for k in plain.state.params)

"""Fed-Align: before it starts it is FedAvg; after, encoders pass for others'. Its losses in numpy."""

from typing import Any

import numpy as np
import pytest
import torch

from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.learning.objectives.adversarial import Discriminator, pass_for_real, tell_apart
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.domain_adaptation.fedalign import FedAlign
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.testing import equal


def run(method: Any, params: Any, sites: Any, rounds: Any) -> Any:
    state = method.init(params)
    for step in train(method, InProcess(method, sites), state, rounds=rounds):
        state = step.state
    return state


def test_before_it_starts_it_is_uniform_fedavg(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    ours = run(FedAlign(task, local, start=9), task.first(), sites, 2)
    assert equal(ours.params, run(FedAvg(task, local, uniform=True), task.first(), sites, 2).params)
    theirs = run(FedAlign(task, local, start=1), task.first(), sites, 2)
    assert not equal(ours.params, theirs.params)


def test_what_it_sends_is_features_with_a_little_noise(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    exact, noisy = FedAlign(task, local, noise=0.0, share=5), FedAlign(task, local, noise=0.5, share=5)
    request = exact.request(exact.init(task.first()))
    a, b = (m.site_update(request, {}, sites["site-0"])[0].gather("features")["site-0"]["h"] for m in (exact, noisy))
    assert a.shape == b.shape == (5, 8)
    assert (b - a).std() == pytest.approx(0.5 * float(a.std()), rel=0.4)


def test_the_losses() -> None:
    real, fake = np.random.default_rng(0).normal(size=(2, 9))

    def sigmoid(x: Any) -> Any:
        return 1 / (1 + np.exp(-x))

    expected = -np.log(sigmoid(real)).mean() - np.log(1 - sigmoid(fake)).mean()
    assert float(tell_apart(torch.from_numpy(real), torch.from_numpy(fake))) == pytest.approx(expected)
    assert float(pass_for_real(torch.from_numpy(real))) == pytest.approx(-np.log(sigmoid(real)).mean())


def test_a_discriminator_learns_to_tell_apart() -> None:
    judge, rng = Discriminator(4), torch.Generator().manual_seed(0)
    model = judge.model()
    step = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(60):
        real, fake = torch.randn(64, 4, generator=rng), torch.randn(64, 4, generator=rng) + 2
        step.zero_grad()
        (loss := tell_apart(model(real), model(fake))).backward()
        step.step()
    assert float(loss.detach()) < 0.5

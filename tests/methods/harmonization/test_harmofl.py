"""HarmoFL's two equations in numpy, and the limit in which it is FedAvg on harmonized images."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from polyclinic.core import tree
from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.learning.networks.model_tree import params_of
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.regression import Regression
from polyclinic.learning.tasks.task_evaluation import Evaluated, evaluate
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.harmonization.harmofl import HarmoFL
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.testing import close, equal
from tests.conftest import Rows, little_sites
from tests.support.agreement import KINDS, agree, mean, minibatches, place, ready, restore, statistics
from tests.support.few_labels import run
from tests.support.known import known


def test_the_normalizer_is_equations_3_and_4(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    """Â_k = (1 − v) Â_{k−1} + v/M Σ A(x_m) over minibatches; Ψ(x) = F⁻¹(Â, P(x)). In numpy's FFT."""
    method, site = HarmoFL(task, local, decay=0.3), sites["site-1"]
    request = method.request(method.init(task.first()))
    assert request.job == "amplitude"
    found = method.site_update(request, {}, site)[0].mean("amplitude").value["low"]
    x, order = site.data["train"].x.numpy(), torch.randperm(17, generator=site.rng(0, "amplitude")).numpy()
    # the 17th alone is left out, as in training
    first, second = (np.abs(np.fft.fft2(x[chunk])).mean(0) for chunk in (order[:8], order[8:16]))
    running = 0.7 * first + 0.3 * second
    np.testing.assert_allclose(found.numpy(), running, rtol=1e-4)
    front = method.prediction_task.model().get_submodule("front")
    front.get_buffer("amplitude").copy_(found)
    expected = np.fft.ifft2(running * np.exp(1j * np.angle(np.fft.fft2(x)))).real
    np.testing.assert_allclose(front(torch.from_numpy(x)).numpy(), expected, atol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_two_rounds_are_the_published_ones(kind: str) -> None:
    """Equations 3, 4 and 6 with NumPy's FFT and PyTorch's SGD: every image has one amplitude, every step is perturbed.

    Of the two passes of a step the second updates running statistics.
    """
    task, sites = place(kind)
    local = LocalTraining(epochs=1, batch_size=8, lr=0.05)
    step, _ = run(HarmoFL(task, local, alpha=0.3, decay=0.4), sites, task.first(), 2)

    axes, spectra = tuple(range(2, 2 + len(task.network.inputs[1:]))), list[Any]()
    for site in sites.values():
        x, running = site.data["train"].x.numpy(), None
        order = torch.randperm(len(x), generator=site.rng(0, "amplitude")).split(8)
        for chunk in order if len(order[-1]) > 1 else order[:-1]:
            seen = np.abs(np.fft.fftn(x[chunk.numpy()], axes=axes)).mean(0)
            running = seen if running is None else 0.6 * running + 0.4 * seen
        spectra.append(running)
    amplitude = np.mean(np.stack(spectra), 0)
    w = task.first()
    for round in range(2):
        ends = []
        for site in sites.values():
            model = ready(task, w)
            optimizer = torch.optim.SGD(model.parameters(), 0.05)
            for x, y in minibatches(local, site, round):
                phase = np.angle(np.fft.fftn(x.numpy(), axes=axes))
                z = torch.from_numpy(np.fft.ifftn(amplitude * np.exp(1j * phase), axes=axes).real).float()
                kept = statistics(model)
                model.zero_grad()
                F.cross_entropy(model(z), y).backward()
                restore(model, kept)
                moved: list[torch.Tensor] = [p for p in model.parameters() if p.grad is not None]
                length = torch.cat([known(p.grad).flatten() for p in moved]).norm()
                deltas = [0.3 * known(p.grad) / length for p in moved]
                with torch.no_grad():
                    torch._foreach_add_(moved, deltas)
                optimizer.zero_grad()
                F.cross_entropy(model(z), y).backward()
                with torch.no_grad():
                    torch._foreach_sub_(moved, deltas)
                optimizer.step()
            ends.append(params_of(model))
        w = mean(ends)
    agree({n: leaf for n, leaf in step.state.params.items() if n in w}, w)
    np.testing.assert_allclose(step.state.params["front.amplitude"].numpy(), amplitude, rtol=1e-4)


def test_every_bin_of_the_window_changes() -> None:
    """The published normalizer's window touches one frequency; ours touches each in it and no other."""
    sites, task = little_sites(), Classification(Network("cnn", (1, 8, 8), 2, (("width", 4),)))
    method = HarmoFL(task, LocalTraining(), window=0.25)
    front = method.prediction_task.model().get_submodule("front")
    assert front.amplitude.shape == (1, 3, 3)
    front.get_buffer("amplitude").fill_(100.0)
    x = sites["site-0"].data["train"].x[:1]
    gap = (np.abs(np.fft.fft2(front(x).numpy())) - np.abs(np.fft.fft2(x.numpy())))[0, 0]
    assert (np.abs(gap) > 1).sum() == 9


def test_the_perturbed_step_is_equation_6() -> None:
    """θ⁺ = θ − η ∇L(θ + δ), δ = α ∇L(θ)/‖∇L(θ)‖, on linear regression of two pixels in numpy's arithmetic."""
    task = Regression(Network("mlp", (1, 1, 2), 1, (("depth", 0),)))
    x = torch.randn(6, 1, 1, 2, generator=torch.Generator().manual_seed(0)) * 0.3
    site = Site("a", {"train": Rows(x, torch.zeros(6, 1))})
    method = HarmoFL(task, LocalTraining(batch_size=6, lr=0.5), window=0.0, alpha=0.1)
    params = {**method.init(task.first()).params, "front.amplitude": torch.zeros(1, 1, 1)}  # images pass as they are
    request = method.request(method.init(params)._replace(params=params, harmonized=True))
    change = method.site_update(request, {}, site)[0].mean("update").value
    X = np.c_[x.reshape(6, 2).double().numpy(), np.ones(6)]
    theta = np.r_[params["head.weight"].double().numpy()[0], params["head.bias"].double().numpy()]

    def gradient(t: Any) -> Any:
        assert np.abs(X @ t).max() < 1  # where smooth L1 is error² / 2
        return X.T @ (X @ t) / 6

    delta = 0.1 * gradient(theta) / np.linalg.norm(gradient(theta))
    expected = -0.5 * gradient(theta + delta)
    found = np.r_[change["head.weight"].double().numpy()[0], change["head.bias"].double().numpy()]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_without_perturbation_it_is_fedavg_on_harmonized_images(task: Any, local: Any, sites: dict[str, Site]) -> None:
    method = HarmoFL(task, local, alpha=0.0)
    tiny = HarmoFL(task, local, alpha=1e-12)
    state = method.init(task.first())
    for step in train(method, InProcess(method, sites), state, rounds=1):
        state = step.state
        break
    assert state.harmonized
    plain = FedAvg(method.prediction_task, local, uniform=True)
    request = method.request(state)
    ours = method.site_update(request, {}, sites["site-2"])[0]
    assert equal(ours, plain.site_update(request, {}, sites["site-2"])[0])
    assert close(ours, tiny.site_update(request, {}, sites["site-2"])[0])  # running statistics move once a step


def test_sites_that_differ_by_a_filter_come_to_look_alike(task: Classification) -> None:
    """A scanner that multiplies every spectrum is undone: normalized images are the same as without it."""
    x = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    gain = torch.linspace(0.5, 2, 8)[:, None] + torch.linspace(0, 1, 8)
    gain = (gain + torch.roll(gain.flip(0, 1), (1, 1), (0, 1))) / 2  # even, so that images stay real
    filtered = torch.fft.ifft2(torch.fft.fft2(x) * gain).real
    front = HarmoFL(task, LocalTraining()).prediction_task.model().get_submodule("front")
    front.get_buffer("amplitude").fill_(1.0)
    torch.testing.assert_close(front(x), front(filtered), rtol=1e-3, atol=1e-4)


def test_evaluation_harmonizes_too(task: Classification, local: LocalTraining, sites: dict[str, Site]) -> None:
    method = Evaluated(HarmoFL(task, local), task)
    federation, state = InProcess(method, sites), method.init(task.first())
    for step in train(method, federation, state, rounds=2):
        state = step.state
    scores = evaluate(method, federation, state, list(sites))
    assert set(scores) == set(sites)
    assert "front.amplitude" in tree.select(state.params, lambda name: name.startswith("front"))


def test_tables_are_refused() -> None:
    with pytest.raises(ValueError, match="needs images"):
        HarmoFL(Classification(Network("mlp", (5,), 2)), LocalTraining())

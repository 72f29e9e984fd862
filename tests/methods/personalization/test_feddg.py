"""FedDG: the interpolation and one episode in numpy, the boundary contrast by loops, and unseen scanners."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from polyclinic.core.site import Site
from polyclinic.learning.networks.model_tree import params_of
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.regression import Regression
from polyclinic.learning.tasks.segmentation import Segmentation
from polyclinic.learning.training.fourier import crop, restyle, spectrum
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.personalization.boundary_features import boundary_contrast, edges
from polyclinic.methods.personalization.feddg import CLAMP, FedDG
from polyclinic.testing import check_method, equal
from tests.conftest import Rows, segmentation_sites
from tests.support.agreement import KINDS, agree, change, minibatches, place, ready, restore, statistics
from tests.support.known import known


@pytest.mark.parametrize("half", [1, 3])
def test_the_interpolation_is_equation_2(half: int) -> None:
    """Amplitudes in a centered square of half-width b become (1 − λ) A_i + λ A_j; phases are kept. numpy's FFT."""
    x, other = np.random.default_rng(0).normal(size=(2, 3, 1, 16, 16)).astype("float32")
    lam = np.array([0.0, 0.4, 1.0]).reshape(3, 1, 1, 1)
    A, P = (f(np.fft.fft2(x)) for f in (np.abs, np.angle))
    mixed, theirs = np.fft.fftshift(A, (-2, -1)), np.fft.fftshift(np.abs(np.fft.fft2(other)), (-2, -1))
    square = (..., slice(8 - half, 9 + half), slice(8 - half, 9 + half))
    mixed[square] = (1 - lam) * mixed[square] + lam * theirs[square]
    expected = np.fft.ifft2(np.fft.ifftshift(mixed, (-2, -1)) * np.exp(1j * P)).real
    fraction = 2 * half / 16
    low = crop(spectrum(torch.from_numpy(other))[0], fraction)
    found = restyle(torch.from_numpy(x), low, fraction, torch.from_numpy(lam).float())
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("clamp", [CLAMP, 0.05])
def test_one_episode_by_hand(clamp: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """θ⁺ = θ − η (g(x, θ) + g(x', θ')), θ' = θ − β clamp(g(x, θ)): linear regression on four pixels, in numpy.

    Of first order and clamped, as in the published code.
    """
    monkeypatch.setattr("polyclinic.methods.personalization.feddg.CLAMP", clamp)
    task = Regression(Network("mlp", (1, 2, 2), 1, (("depth", 0),)))
    episode_rng = torch.Generator().manual_seed(0)
    x = torch.randn(6, 1, 2, 2, generator=episode_rng) * 0.2
    method = FedDG(task, LocalTraining(batch_size=6, lr=0.5), window=0.5, step=0.3)
    site = Site("a", {"train": Rows(x, torch.zeros(6, 1))})
    bank = {"a": {"low": torch.zeros(1, 1, 2, 2)}, "b": {"low": torch.full((1, 1, 2, 2), 0.5)}}
    params = task.first()
    request = method.request(method.init(params)._replace(bank=bank))
    found = method.site_update(request, {}, site)[0].mean("update").value
    order, rng = None, site.rng(0, "train", "train", "")
    torch.randint(2**62, (), generator=rng)  # what `seeded` draws
    order = torch.randperm(6, generator=rng)
    styles = site.rng(0, "styles")
    torch.randint(1, (6,), generator=styles)
    lam = torch.rand(6, generator=styles).view(6, 1, 1, 1)
    other = restyle(x[order], bank["b"]["low"][0], 0.5, lam)
    X, X2 = (np.c_[t.reshape(6, 4).double().numpy(), np.ones(6)] for t in (x[order], other))
    theta = np.r_[params["head.weight"].double().numpy()[0], params["head.bias"].double().numpy()]
    g = X.T @ X @ theta / 6
    assert (np.abs(g).max() > clamp) == (clamp < 1)
    fast = theta - 0.3 * g.clip(-clamp, clamp)
    assert max(np.abs(X @ theta).max(), np.abs(X2 @ fast).max()) < 1  # where smooth L1 is error² / 2
    expected = -0.5 * (g + X2.T @ X2 @ fast / 6)
    result = np.r_[found["head.weight"].double().numpy()[0], found["head.bias"].double().numpy()]
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_two_minibatches_are_the_published_episodes(kind: str) -> None:
    """Styles by NumPy's FFT, a trial step of first order, and the sum of both losses at the original weights."""
    task, sites = place(kind)
    local, site = LocalTraining(steps=2, batch_size=8, lr=0.05), sites["site-1"]
    method = FedDG(task, local, window=0.5, step=0.4)
    dims = len(task.network.inputs) - 1
    low = torch.rand(5, 1, *[5] * dims, generator=torch.Generator().manual_seed(3)) * 20
    request = method.request(
        method.init(task.first())._replace(bank={"site-0": {"low": low[:2]}, "site-2": {"low": low[2:]}})
    )
    found = method.site_update(request, {}, site)[0].mean("update").value

    model, styles, axes = ready(task, task.first()), site.rng(0, "styles"), tuple(range(2, 2 + dims))
    optimizer, few = torch.optim.SGD(model.parameters(), 0.05), np.array([-2, -1, 0, 1, 2])
    for x, y in minibatches(local, site):
        taken = low[torch.randint(5, (len(x),), generator=styles)].numpy()
        lam = torch.rand(len(x), generator=styles).numpy().reshape(-1, *[1] * (dims + 1))
        spectrum = np.fft.fftn(x.numpy(), axes=axes)
        amplitude = np.abs(spectrum)
        window: Any = (..., *np.ix_(*[few] * dims))
        order = np.argsort(few % 5, kind="stable")  # the bank has frequency 0 first
        theirs = np.empty_like(taken)
        bank: Any = (..., *np.ix_(*[order] * dims))
        theirs[bank] = taken
        amplitude[window] = (1 - lam) * amplitude[window] + lam * theirs
        other = np.fft.ifftn(amplitude * np.exp(1j * np.angle(spectrum)), axes=axes).real
        z = torch.from_numpy(other).float()

        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        kept, slopes = statistics(model), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        trial = ready(task, params_of(model))
        with torch.no_grad():
            for n, p in trial.named_parameters():
                if n in slopes:
                    p.sub_(0.4 * slopes[n].clamp(-100, 100))
        F.cross_entropy(trial(z), y).backward()
        for n, p in trial.named_parameters():
            if n in slopes:
                slopes[n] += known(p.grad)
        optimizer.step()
        restore(model, kept)
    agree(found, change(model, task.first()))


def test_a_site_without_others_is_fedavg(task: Classification, local: LocalTraining, sites: dict[str, Site]) -> None:
    method, plain, site = FedDG(task, local), FedAvg(task, local), sites["site-0"]
    bank = {"site-0": {"low": torch.ones(2, 1, 3, 3)}}
    a = method.site_update(method.request(method.init(task.first())._replace(bank=bank)), {}, site)[0]
    assert equal(a, plain.site_update(plain.request(plain.init(task.first())), {}, site)[0])


def test_only_the_window_leaves(task: Classification, local: LocalTraining, sites: dict[str, Site]) -> None:
    method = FedDG(task, local, window=0.25, share=0.5)
    low = method.site_update(method.request(method.init(task.first())), {}, sites["site-1"])[0].gather("bank")[
        "site-1"
    ]["low"]
    assert low.shape == (8, 1, 3, 3)


def test_rim_and_ring() -> None:
    mask = torch.zeros(1, 20, 20, dtype=torch.long)
    mask[0, 8:12, 8:12] = 2
    rim, ring = edges(mask)
    assert int(rim.sum()) == 12  # the outermost pixels of a square of 4
    assert int(ring.sum()) == 14 * 14 - 16
    assert not (rim & ring).any()


def test_the_contrast_by_loops() -> None:
    episode_rng = torch.Generator().manual_seed(0)
    h, masks = torch.randn(3, 4, 20, 20, generator=episode_rng), torch.zeros(3, 20, 20, dtype=torch.long)
    masks[0, 5:9, 5:9], masks[1, 8:15, 3:9] = 1, 1  # the third image holds nothing
    rim, ring = (part.numpy() for part in edges(masks))
    H = h.double().numpy()

    def unit(i: Any, part: Any) -> Any:
        v = H[i][:, part[i]].mean(1)
        return v / np.linalg.norm(v)

    total = []
    for i, j in ((0, 1), (1, 0)):
        up = np.exp(unit(i, rim) @ unit(j, rim) / 0.05)
        down = sum(np.exp(unit(i, rim) @ unit(k, ring) / 0.05) for k in (0, 1))
        total.append(-np.log(up / (up + down)))
    assert float(boundary_contrast(h, masks)) == pytest.approx(np.mean(total), rel=1e-4)
    assert float(boundary_contrast(h[1:], masks[1:])) == 0


@pytest.mark.slow
def test_it_keeps_its_promises_on_masks() -> None:
    task = Segmentation(Network("unet", (1, 16, 16), 2, (("width", 2), ("norm", "batch"))))
    check_method(FedDG(task, LocalTraining(batch_size=4), window=0.2), task.first(), segmentation_sites(2))


def test_tables_are_refused() -> None:
    with pytest.raises(ValueError, match="needs images"):
        FedDG(Classification(Network("mlp", (5,), 2)), LocalTraining())

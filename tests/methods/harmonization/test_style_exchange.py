"""AdaIN and FDA: images in the styles of other sites, as in the published equations, and one round of training on them."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from polyclinic.errors import ConfigError
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.harmonization.adain import AdaIN
from polyclinic.methods.harmonization.fda import FDA
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.testing import close
from tests.support.agreement import KINDS, agree, change, place, ready
from tests.support.departures import moves

LOCAL = LocalTraining(steps=3, batch_size=8, lr=0.05)


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2 + 1


@pytest.mark.parametrize("shape", [(2, 12, 12), (1, 8, 8, 8)])
def test_adain_is_equation_8(shape: tuple[int, ...]) -> None:
    method = AdaIN(Classification(Network("cnn", shape, 2, (("width", 4), ("depth", 2)))))
    x, y = images(3, *shape), images(3, *shape, seed=1)
    found = method.restyled(x, method.styles(y)).double().numpy()
    axes = tuple(range(2, x.ndim))

    def moments(a: Any) -> Any:
        return a.mean(axes, keepdims=True), np.sqrt(a.var(axes, ddof=1, keepdims=True) + 1e-6)

    (m, s), (n, t) = moments(x.double().numpy()), moments(y.double().numpy())
    assert np.allclose(found, t * (x.double().numpy() - m) / s + n, atol=1e-5)


@pytest.mark.parametrize(("side", "beta"), [(16, 0.1), (20, 0.05), (16, 0.0)])
def test_fda_is_the_published_exchange_of_a_square_of_amplitudes(side: int, beta: float) -> None:
    """Centered spectra, and a square of half-width ⌊β · side⌋ around the middle, in NumPy."""
    method = FDA(Classification(Network("cnn", (1, side, side), 2, (("width", 4), ("depth", 2)))), beta=beta)
    x, y = images(2, 1, side, side), images(2, 1, side, side, seed=1)
    found = method.restyled(x, method.styles(y)).double().numpy()
    f, g = (np.fft.fft2(a.double().numpy(), axes=(-2, -1)) for a in (x, y))
    own, other = (np.fft.fftshift(np.abs(a), axes=(-2, -1)) for a in (f, g))
    b, c = int(np.floor(side * beta)), side // 2
    own[..., c - b : c + b + 1, c - b : c + b + 1] = other[..., c - b : c + b + 1, c - b : c + b + 1]
    amplitude = np.fft.ifftshift(own, axes=(-2, -1))
    expected = np.real(np.fft.ifft2(amplitude * np.exp(1j * np.angle(f)), axes=(-2, -1)))
    assert np.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [AdaIN, FDA])
def test_a_round_trains_on_restyled_images(make: Any, kind: str) -> None:
    """Written again: minibatches, styles and the choice of images are drawn from one generator, in this order."""
    task, sites = place(kind)
    method, start = make(task, LOCAL, share=1.0), task.first()
    replies = [method.site_update(method.request(method.init(start)), {}, s)[0] for s in sites.values()]
    state = method.server_update(method.init(start), replies[0] + replies[1] + replies[2], sites["site-0"])
    site = sites["site-1"]
    found = method.site_update(method.request(state), {}, site)[0].mean("update").value
    bank = torch.cat([method.styles(sites[n].data["train"].x) for n in ("site-0", "site-2")])
    order = {n: torch.randperm(len(s.data["train"]), generator=s.rng(0, "styles")) for n, s in sites.items()}
    bank = torch.cat([method.styles(sites[n].data["train"].x[order[n]]) for n in ("site-0", "site-2")])

    model, rng = ready(task, start), site.rng(0, "train", "train", "")
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    torch.randint(2**62, (), generator=rng)  # what `seeded` draws
    data, done = site.data["train"], 0
    while done < 3:
        for chunk in torch.randperm(len(data), generator=rng).split(8):
            if done == 3 or len(chunk) < 2:
                continue
            done += 1
            x, y = data[chunk]
            style = bank[torch.randint(len(bank), (len(x),), generator=rng)]
            moved = torch.rand(len(x), generator=rng) < 0.5
            x = torch.where(moved.view(-1, *[1] * (x.ndim - 1)), method.restyled(x, style), x)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    agree(found, change(model, start))


@pytest.mark.parametrize("make", [AdaIN, FDA])
def test_without_restyling_it_is_fedavg_and_its_bank_holds_a_share(make: Any) -> None:
    task, sites = place("cnn, batch")
    epoch = LocalTraining(epochs=1, batch_size=8, lr=0.05)  # whose order is drawn first
    method = make(task, epoch, probability=0.0)
    assert close(moves(method, sites, task.first(), 2), moves(FedAvg(task, epoch), sites, task.first(), 2))
    reply, _ = method.site_update(method.request(method.init(task.first())), {}, sites["site-2"])
    assert len(reply.gather("bank")["site-2"]["style"]) == 22 // 8
    with pytest.raises(ConfigError, match="share must be above 0"):
        make(task, LOCAL, share=0.0)
    with pytest.raises(ConfigError, match="needs images"):
        make(Classification(Network("mlp", (4,), 2)))

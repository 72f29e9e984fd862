"""Images from gradients: recovered where they should be, hidden where they should be, with a control."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from polyclinic.attacks.inversion import (
    Inversion,
    Leak,
    Verdict,
    audit,
    batch_statistics,
    leak,
    leaky,
    obscured,
    relative_leakage,
    total_variation,
)
from polyclinic.core import tree
from polyclinic.core.site import Site
from polyclinic.learning.networks.model_tree import gradient, params_of
from tests.conftest import blobs


def loss(model: Any, batch: Any) -> Any:
    return F.cross_entropy(model(batch[0]), batch[1])


def dice(seed: Any = 0) -> Any:
    return Site("attacker", seed=seed).rng("test")


def disc() -> torch.Tensor:
    """A bright disc on a slope, 12 x 12, from 0 to 1."""
    grid = torch.stack(torch.meshgrid(torch.arange(12), torch.arange(12), indexing="ij")).float()
    image = 0.02 * grid.sum(0) + 0.5 * ((grid - torch.tensor([5.0, 7.0])[:, None, None]).square().sum(0) < 9)
    return (image / image.max())[None, None]


FLAT = torch.full((1, 12, 12), 0.4)


@pytest.fixture(scope="module")
def sigmoid_net() -> nn.Module:
    """A small LeNet of sigmoids, as DLG's."""
    model = nn.Sequential(
        nn.Conv2d(1, 8, 5, 2, 2),
        nn.Sigmoid(),
        nn.Conv2d(8, 12, 5, 1, 2),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(12 * 36, 4),
    )
    with torch.no_grad():
        for leaf in model.parameters():
            leaf.copy_(torch.rand(leaf.shape, generator=dice(7)) - 0.5)
    return model


def test_one_image_without_defense_is_recovered_and_with_noise_it_is_not(sigmoid_net: nn.Module) -> None:
    """DLG on a batch of one: above 30 dB, where a flat guess has about 10; with noise at the guess's level."""
    y = torch.tensor([2])
    bare = leak(sigmoid_net, loss, disc(), y, FLAT, Inversion(steps=20, restarts=2), dice())
    assert bare.psnr_db > 30
    assert bare.rdlv > 1
    hidden = leak(sigmoid_net, loss, disc(), y, FLAT, Inversion(steps=5, restarts=1), dice(), noise=1.0, clip=1.0)
    assert hidden.psnr_db < bare.guess_db + 3
    assert bare.guess_db < 15


def test_the_audit_shows_its_control_first(sigmoid_net: nn.Module) -> None:
    how = Inversion(steps=20, restarts=1)
    verdict = audit(sigmoid_net, loss, disc(), torch.tensor([2]), FLAT, how, noise=1.0, clip=1.0)
    assert verdict.control.psnr_db > 30
    assert verdict.found.psnr_db < verdict.found.guess_db + 3
    assert "recovered nothing beyond a guess" in verdict.says
    assert "from a network known to leak" in verdict.says


def test_a_failed_control_shows_nothing() -> None:
    bad, poor, good, best = (Leak(db, 10.0, 0.0, torch.zeros(1)) for db in (4.0, 12.0, 40.0, 60.0))
    assert "shows nothing" in Verdict(poor, bad).says
    assert "The example leaks" in Verdict(best, good).says


def test_the_cosine_attack_needs_no_length(sigmoid_net: nn.Module) -> None:
    """Scaling what is seen, as a learning rate does, changes nothing; and the search comes nearer."""
    y, how = torch.tensor([1]), Inversion("cosine", steps=60, lr=0.05, restarts=1, variation=1e-3)
    seen = {k: v.detach() for k, v in gradient(loss(sigmoid_net, (disc(), y)), sigmoid_net).items()}
    once, near = how.search(sigmoid_net, loss, seen, (1, 12, 12), y, dice())
    again, _ = how.search(sigmoid_net, loss, tree.scale(seen, 4.0), (1, 12, 12), y, dice())
    torch.testing.assert_close(once, again, rtol=0.05, atol=0.05)
    _, first = Inversion("cosine", steps=1, lr=0.05, restarts=1).search(sigmoid_net, loss, seen, (1, 12, 12), y, dice())
    assert near < 0.5 * first


def test_running_statistics_give_away_the_batchs() -> None:
    """What a site's update holds of one batch, against the numbers themselves."""
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3))
    x = blobs(1, 10, (1, 8, 8)).x
    before = params_of(model)
    model(x)
    mean, var = batch_statistics(before, params_of(model))["1"]
    entered = model[0](x).detach().numpy()
    np.testing.assert_allclose(mean, entered.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(var, entered.var((0, 2, 3), ddof=1), rtol=1e-3, atol=1e-4)


def test_statistics_of_the_batch_help_the_attack() -> None:
    """Where noise hides the gradient, the drawing's statistics still come to be the image's."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Sigmoid(), nn.Flatten(), nn.Linear(576, 4)
    )
    y = torch.tensor([1])
    with torch.no_grad():
        entered = model[0](disc()).transpose(0, 1).flatten(1)
    truth = {"1": (entered.mean(1), entered.var(1))}
    model.eval()
    seen = obscured({k: v.detach() for k, v in gradient(loss(model, (disc(), y)), model).items()}, 10.0, dice())

    def gap(weight: Any) -> Any:
        how = Inversion("cosine", steps=60, lr=0.02, restarts=1, statistics=weight)
        x, _ = how.search(model, loss, seen, (1, 12, 12), y, dice(), truth)
        with torch.no_grad():
            got = model[0](x).transpose(0, 1).flatten(1)
        return float((got.mean(1) - truth["1"][0]).abs().sum() + (got.var(1) - truth["1"][1]).abs().sum())

    assert gap(10.0) < 0.3 * gap(0.0)


def test_the_attack_changes_no_model(sigmoid_net: nn.Module) -> None:
    before = params_of(sigmoid_net)
    leak(sigmoid_net, loss, disc(), torch.tensor([0]), FLAT, Inversion(steps=1, restarts=1), dice())
    assert all(torch.equal(before[k], v) for k, v in params_of(sigmoid_net).items())


def test_the_defense_has_the_size_it_says() -> None:
    seen = {"a": torch.randn(300, 100, generator=dice()), "b": torch.randn(500, generator=dice())}
    clipped = obscured(seen, 0.0, dice(), clip=2.0)
    assert tree.norm(clipped) == pytest.approx(2.0, rel=1e-4)
    noise = tree.sub(obscured(seen, 0.5, dice(), clip=2.0), clipped)
    assert tree.norm(noise) / math.sqrt(tree.size(noise)) == pytest.approx(1.0, rel=0.02)
    relative = tree.sub(obscured(seen, 0.1, dice()), seen)
    assert tree.norm(relative) / tree.norm(seen) == pytest.approx(0.1, rel=0.02)


def test_scores_of_images() -> None:
    x = blobs(3, 4, (1, 16, 16)).x
    noisy = x + 0.5 * torch.randn(x.shape, generator=dice())
    for i in range(4):
        assert relative_leakage(x[i], noisy[i], noisy[i]) == 0
        assert relative_leakage(x[i], x[i], noisy[i]) > 0 > relative_leakage(x[i], noisy[i], x[i])
    assert float(total_variation(torch.ones(1, 1, 4, 4))) == 0 == float(total_variation(torch.ones(1, 5)))
    assert float(total_variation(torch.arange(4.0).view(1, 1, 1, 4))) == 1.0
    assert sum(p.numel() for p in leaky((1, 4, 4), 3, dice()).parameters()) == 16 * 32 + 32 + 32 * 3 + 3

"""Who was trained on: chance where nothing was learned, more where it was memorised, and attacks in their order."""

import numpy as np
import pytest
import torch

from polyclinic.audits.membership import (
    Found,
    Part,
    Shadows,
    Verdict,
    by_loss,
    confidence,
    found,
    lira,
    losses,
    memorised,
    rmia,
    shadows,
    stretched,
)
from polyclinic.core.site import Site
from polyclinic.tasks.classification import Classification
from polyclinic.tasks.local import Local
from polyclinic.tasks.networks import Network
from tests.conftest import Rows, blobs

TASK = Classification(Network("mlp", (20,), 2, (("width", 64),)))
LOCAL = Local(epochs=40, batch_size=32, optimiser="adam", lr=0.01)


def noisy(n: int = 120) -> Rows:
    """Examples whose labels have little to do with them, so that they can only be memorised."""
    dice = torch.Generator().manual_seed(0)
    x, flip = torch.randn(n, 20, generator=dice), torch.rand(n, generator=dice) < 0.25
    return Rows(x, ((x[:, 0] > 0) ^ flip).long())


@pytest.fixture(scope="module")
def attacked():
    """A target trained on half of the data, and shadow models on other halves."""
    data = noisy()
    inside = torch.zeros(len(data), dtype=torch.bool)
    inside[torch.randperm(len(data), generator=torch.Generator().manual_seed(9))[: len(data) // 2]] = True
    target = LOCAL.fit(TASK, TASK.first(99), Site("target"), 0, data=Part(data, inside.nonzero().flatten()))
    return data, inside, target, shadows(TASK, LOCAL, data, 10)


def split(scores, inside):
    return found(scores[inside], scores[~inside])


def test_attacks_beat_chance_and_shadows_beat_the_loss(attacked):
    """The order of the literature: LiRA and RMIA above the loss alone."""
    data, inside, target, known = attacked
    p = confidence(TASK, target, data)
    plain = by_loss(TASK, target, Part(data, inside.nonzero().flatten()), Part(data, (~inside).nonzero().flatten()))
    assert plain.auc == pytest.approx(split(p, inside).auc)
    population = (~inside).nonzero().flatten()[::2]
    aucs = {
        "online": split(lira(p, known), inside).auc,
        "offline": split(lira(p, known, online=False), inside).auc,
        "rmia": split(rmia(p, known, population, gamma=1.0), inside).auc,
    }
    assert plain.auc > 0.55
    assert all(value > plain.auc for value in aucs.values()), (plain, aucs)


def test_a_model_that_never_saw_them_tells_nothing(attacked):
    data, inside, _, known = attacked
    p = confidence(TASK, TASK.first(5), data)
    for scores in (p, lira(p, known, online=False)):
        assert abs(split(scores, inside).auc - 0.5) < 0.15


def test_shadows_come_in_pairs_that_cover_everyone(attacked):
    inside = attacked[3].inside
    assert torch.equal(inside[0::2], ~inside[1::2])
    assert not torch.equal(inside[0], inside[2])


def test_lira_by_numpy():
    """Both forms for three examples, written out."""
    rng = np.random.default_rng(0)
    p, inside = rng.uniform(0.1, 0.9, (6, 3)), np.array([[1, 0, 1], [0, 1, 0]] * 3, bool)
    phi, target = np.log(p / (1 - p)), rng.uniform(0.1, 0.9, 3)
    t = np.log(target / (1 - target))

    def moments(chosen):
        mean = np.array([phi[chosen[:, i], i].mean() for i in range(3)])
        rest = sum(((phi[chosen[:, i], i] - mean[i]) ** 2).sum() for i in range(3))
        return mean, np.sqrt(rest / (chosen.sum(0) - 1).sum())

    (mi, si), (mo, so) = moments(inside), moments(~inside)
    wanted = (-((t - mi) ** 2) / (2 * si**2) - np.log(si)) - (-((t - mo) ** 2) / (2 * so**2) - np.log(so))
    known = Shadows(torch.tensor(p), torch.tensor(inside))
    np.testing.assert_allclose(lira(torch.tensor(target), known), wanted)
    np.testing.assert_allclose(lira(torch.tensor(target), known, online=False), (t - mo) / so)


def test_rmia_by_numpy():
    known = Shadows(torch.tensor([[0.2, 0.4, 0.6], [0.4, 0.8, 0.2]]).double(), torch.zeros(2, 3, dtype=torch.bool))
    target, z = torch.tensor([0.9, 0.5, 0.3]).double(), torch.tensor([1, 2])
    ratio = target.numpy() / (0.5 * (1.3 * np.array([0.3, 0.6, 0.4]) + 0.7))
    wanted = [np.mean([ratio[i] >= 1.2 * ratio[j] for j in (1, 2)]) for i in range(3)]
    np.testing.assert_allclose(rmia(target, known, z, gamma=1.2), wanted)


def test_rates_are_counted():
    """Of 100 others one may be taken for a member."""
    others = torch.arange(100.0)
    got = found(torch.tensor([98.5, 200.0, 98.0, 3.5]), others)
    assert got.tpr_at_1_percent == 0.5
    assert got.auc == pytest.approx((99 + 100 + 98.5 + 4) / 400)
    assert "too few" in found(others[:5], others[:5]).says
    assert "too few" not in got.says
    with pytest.raises(ValueError, match="not"):
        found(others, others[:0])


def test_each_loss_is_of_one_example_alone(task):
    data = blobs(3, 7, (1, 8, 8))
    whole = losses(task, task.first(), data)
    part = losses(task, task.first(), data, torch.tensor([5, 2]))
    assert torch.equal(part, whole[[5, 2]])
    model = task.model().eval()
    model.load_state_dict(task.first(), strict=False)
    assert float(task.loss(model, (data.x, data.y))) == pytest.approx(float(whole.mean()), rel=1e-5)
    torch.testing.assert_close(stretched(torch.tensor([0.5, 0.9])), torch.tensor([0.0, np.log(9)], dtype=torch.float))


def test_the_control_leaks_and_the_verdict_rests_on_it():
    control = memorised(TASK, TASK.first(), noisy())
    assert control.auc > 0.8
    easy = Rows(x := torch.randn(40, 20, generator=torch.Generator().manual_seed(1)), (x[:, 0] > 0).long())
    assert memorised(TASK, TASK.first(), easy).auc > 0.8  # also where targets can be learned without memory
    low, high, failed = Found(0.52, 0.0, 9, 9), Found(0.8, 0.1, 9, 9), Found(0.55, 0.0, 9, 9)
    assert "Little can be told" in Verdict(control, {"a": low}).says
    assert "most at b (AUC 0.800" in Verdict(control, {"a": low, "b": high}).says
    assert "shows nothing" in Verdict(failed, {"a": high}).says

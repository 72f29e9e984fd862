"""Who was trained on: chance if nothing was learned, more if it was memorized, and attacks in their order."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from polyclinic.attacks.membership import (
    Part,
    Shadows,
    Verdict,
    by_loss,
    by_patient,
    found,
    halves,
    lira,
    log_odds,
    losses,
    memorized,
    rmia,
    shadows,
)
from polyclinic.core.site import Site
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification, MultiLabel
from polyclinic.learning.tasks.regression import Regression
from polyclinic.learning.training.local import LocalTraining
from tests.conftest import Rows, blobs
from tests.support.known import known

TASK = Classification(Network("mlp", (20,), 2, (("width", 64),)))
LOCAL = LocalTraining(epochs=40, batch_size=32, optimizer="adam", lr=0.01)


def noisy(n: int = 120) -> Rows:
    """Examples whose labels have little to do with them, so that they can only be memorized."""
    rng = torch.Generator().manual_seed(0)
    x, flip = torch.randn(n, 20, generator=rng), torch.rand(n, generator=rng) < 0.25
    return Rows(x, ((x[:, 0] > 0) ^ flip).long())


@pytest.fixture(scope="module")
def attacked() -> Any:
    """A target trained on half of the data, and shadow models on other halves."""
    data = noisy()
    inside = torch.zeros(len(data), dtype=torch.bool)
    inside[torch.randperm(len(data), generator=torch.Generator().manual_seed(9))[: len(data) // 2]] = True
    target = LOCAL.fit(TASK, TASK.first(99), Site("target"), 0, data=Part(data, inside.nonzero().flatten()))

    def one(k: Any, half: Any) -> Any:
        return losses(TASK, LOCAL.fit(TASK, TASK.first(k), Site(f"shadow-{k}"), 0, data=Part(data, half)), data)

    return data, inside, target, shadows(one, [f"p{i}" for i in range(len(data))], 10)


def split(scores: Any, inside: Any) -> Any:
    return found(scores[inside], scores[~inside])


def test_attacks_beat_chance_and_shadows_beat_the_loss(attacked: Any) -> None:
    """The order of the literature: LiRA and RMIA above the loss alone."""
    data, inside, target, known = attacked
    said = losses(TASK, target, data)
    plain = by_loss(TASK, target, Part(data, inside.nonzero().flatten()), Part(data, (~inside).nonzero().flatten()))
    assert plain.auc == pytest.approx(split(-said, inside).auc)
    population = (~inside).nonzero().flatten()[::2]
    aucs = {
        "online": split(lira(said, known), inside).auc,
        "offline": split(lira(said, known, online=False), inside).auc,
        "rmia": split(rmia(said, known, population), inside).auc,
    }
    assert plain.auc > 0.55
    assert all(value > plain.auc for value in aucs.values()), (plain, aucs)


def test_a_model_that_never_saw_them_tells_nothing(attacked: Any) -> None:
    data, inside, _, known = attacked
    said = losses(TASK, TASK.first(5), data)
    for scores in (-said, lira(said, known, online=False)):
        assert split(scores, inside).p_auc > 0.01
        assert abs(split(scores, inside).auc - 0.5) < 0.15


def test_halves_come_in_pairs_that_cover_everyone_and_split_nobody() -> None:
    patients = ["a", "b", "b", "c", "d", "a", "e", "f", "f", "f"]
    sites = ["x"] * 6 + ["y"] * 4
    inside = halves(patients, 6, 3, sites)
    assert torch.equal(inside[0::2], ~inside[1::2])
    assert len({tuple(row.tolist()) for row in inside}) > 2
    for row in inside:
        assert row[0] == row[5]
        assert row[1] == row[2]
        assert row[7] == row[8] == row[9]
    for site, names in (("x", 4), ("y", 2)):
        here = [i for i, s in enumerate(sites) if s == site]
        for row in inside:
            assert len({patients[i] for i in here if row[i]}) == names // 2
    assert torch.equal(halves(patients, 4, 3, sites), inside[:4])  # more models leave the first ones as they were
    both = halves(["same", "same"], 2, 0, ["x", "y"])  # one name at two sites is two patients
    assert both.sum() == 2


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5])
def test_too_few_shadows_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match="4, 6, 8"):
        shadows(lambda k, half: torch.zeros(4), ["a", "b", "c", "d"], count)


def test_shadows_are_trained_on_their_halves() -> None:
    told = {}

    def one(k: Any, half: Any) -> Any:
        told[k] = half
        return torch.full((4,), float(k), dtype=torch.float64)

    known = shadows(one, ["a", "b", "c", "d"], 4, 1)
    assert known.loss[:, 0].tolist() == [0, 1, 2, 3]
    for k, half in told.items():
        assert torch.equal(known.inside[k].nonzero().flatten(), half)


def signals() -> Any:
    """Logits of 6 models and a target on 5 examples; who trained on what; the classes."""
    rng = np.random.default_rng(0)
    inside = np.array([[1, 0, 1, 1, 0], [0, 1, 0, 0, 1]] * 3, bool)
    return rng.normal(0, 4, (7, 5, 3)), inside, rng.integers(0, 3, 5)


def loss_of(logits: Any, classes: Any) -> Any:
    return torch.stack([F.cross_entropy(torch.tensor(one), torch.tensor(classes), reduction="none") for one in logits])


def test_lira_by_numpy() -> None:
    """The paper's Algorithm 1 from logits: φ = log p_y − log Σ p_other; one variance for all examples."""
    logits, inside, y = signals()
    p = np.exp(logits - logits.max(2, keepdims=True))
    p /= p.sum(2, keepdims=True)
    true = np.take_along_axis(p, y[None, :, None], 2)[..., 0]
    phi = np.log(true) - np.log(p.sum(2) - true)
    known, target = phi[:6], phi[6]

    def moments(chosen: Any) -> Any:
        mean = np.array([known[chosen[:, i], i].mean() for i in range(5)])
        rest = sum(((known[chosen[:, i], i] - mean[i]) ** 2).sum() for i in range(5))
        return mean, np.sqrt(rest / (chosen.sum(0) - 1).sum())

    def log_pdf(x: Any, mean: Any, sigma: Any) -> Any:
        return -((x - mean) ** 2) / (2 * sigma**2) - np.log(sigma * np.sqrt(2 * np.pi))

    (mi, si), (mo, so) = moments(inside), moments(~inside)
    every = loss_of(logits, y)
    ours = Shadows(every[:6], torch.tensor(inside))
    np.testing.assert_allclose(lira(every[6], ours), log_pdf(target, mi, si) - log_pdf(target, mo, so), atol=1e-6)
    np.testing.assert_allclose(lira(every[6], ours, online=False), (target - mo) / so, atol=1e-6)


def test_rmia_by_numpy() -> None:
    """Equations 3 to 6: the share of z with [p(x|θ)/p(x)] / [p(z|θ)/p(z)] ≥ γ, p(x) from models that did not see x."""
    logits, inside, y = signals()
    every = loss_of(logits, y)
    p, z = np.exp(-every.numpy()), [1, 4]
    out = np.array([p[:6][~inside[:, i], i].mean() for i in range(5)])
    for gamma, a in ((1.0, 0.3), (2.0, 0.7)):
        ratio = p[6] / (((1 + a) * out + (1 - a)) / 2)
        wanted = [np.mean([ratio[i] / ratio[j] >= gamma for j in z]) for i in range(5)]
        ours = rmia(every[6], Shadows(every[:6], torch.tensor(inside)), torch.tensor(z), gamma=gamma, a=a)
        np.testing.assert_allclose(ours, wanted, atol=1e-6)


def test_log_odds_do_not_lose_the_confident() -> None:
    """1 − p is lost in float64 below 1e-16, and in float32 below 1e-7; the loss keeps it."""
    assert float(log_odds(torch.tensor(np.log(2)))) == pytest.approx(0.0, abs=1e-6)
    loss = torch.tensor([1e-12, 1e-9, 30.0], dtype=torch.float64)
    assert log_odds(loss).tolist() == pytest.approx([27.631, 20.723, -30.0], abs=1e-3)
    assert log_odds(torch.tensor([0.0, 1e30], dtype=torch.float64)).isfinite().all()


def test_losses_are_computed_in_double_precision() -> None:
    """A network so sure that float32 says its loss is 0."""
    x, y = torch.ones(2, 20), torch.tensor([0, 1])
    params = {name: torch.zeros_like(leaf) for name, leaf in TASK.first().items()}
    last = [name for name in params if name.endswith("bias")][-1]
    params[last] = torch.tensor([20.0, 0.0])
    found_ = losses(TASK, params, Rows(x, y))
    assert found_[0] == pytest.approx(np.exp(-20), rel=1e-6)
    assert found_[1] == pytest.approx(20.0)


@pytest.mark.parametrize(
    ("task", "y"),
    [
        (MultiLabel(Network("mlp", (20,), 3, (("width", 8),))), (torch.rand(4, 3) > 0.5).float()),
        (Regression(Network("mlp", (20,), 1, (("width", 8),))), torch.randn(4, 1)),
    ],
)
def test_losses_of_other_tasks(task: Classification, y: Any) -> None:
    data, model = Rows(torch.randn(4, 20), y), task.model().eval()
    model.load_state_dict(task.first(), strict=False)
    assert float(losses(task, task.first(), data).mean()) == pytest.approx(
        task.loss(model, (data.x, data.y)).item(), rel=1e-5
    )


def test_each_loss_is_of_one_example_alone(task: Classification) -> None:
    data = blobs(3, 7, (1, 8, 8))
    whole = losses(task, task.first(), data)
    part = losses(task, task.first(), data, torch.tensor([5, 2]))
    assert torch.equal(part, whole[[5, 2]])
    model = task.model().eval()
    model.load_state_dict(task.first(), strict=False)
    assert task.loss(model, (data.x, data.y)).item() == pytest.approx(float(whole.mean()), rel=1e-5)


def test_a_patient_scores_the_mean_of_the_images() -> None:
    scores, names = by_patient(torch.tensor([1.0, 2.0, 5.0, 6.0]), ["b", "a", "b", "b"])
    assert names == ("a", "b")
    assert scores.tolist() == [2.0, 4.0]


def test_the_control_leaks_and_the_verdict_rests_on_it() -> None:
    control = memorized(TASK, TASK.first(), noisy())
    assert control.auc > 0.8
    easy = Rows(x := torch.randn(40, 20, generator=torch.Generator().manual_seed(1)), (x[:, 0] > 0).long())
    assert memorized(TASK, TASK.first(), easy).auc > 0.8  # also where targets can be learned without memory
    rng = torch.Generator().manual_seed(0)
    members, others = torch.randn(100, generator=rng), torch.randn(100, generator=rng)
    chance, leak = found(members, others), found(members + 1, others)
    few = found(members[:12], others[:12])
    assert Verdict(control, {"a": {"loss": chance}}).says.startswith(
        "No attack distinguished training patients at a: an AUC"
    )
    both = Verdict(control, {"a": {"loss": chance}, "b": {"loss": chance, "RMIA": leak}})
    assert both.says.startswith(
        f"Training patients can be distinguished: at b by RMIA, AUC {leak.auc:.3f} ({leak.low:.3f}"
    )
    assert "at a" not in both.says
    assert "shows nothing" in Verdict(few, {"a": {"loss": leak}}).says
    mixed = Verdict(control, {"a": {"loss": chance}, "c": {"loss": few}}).says
    assert "distinguished training patients at a:" in mixed
    assert "Inconclusive, with too few patients, at c: an AUC of 0.84 or more" in mixed
    nobody = Verdict(control, {"a": {"loss": found(members[:2], others[:2])}}).says
    assert nobody == "Inconclusive, with too few patients, at a: no result could have shown anything."


def test_the_p_values_of_a_verdict_are_adjusted_for_all_that_was_tested() -> None:
    rng = torch.Generator().manual_seed(3)
    one = found(torch.randn(100, generator=rng) + 0.15, torch.randn(100, generator=rng))
    assert 0.0025 < one.p_auc < 0.025
    rest = {f"s{i}": {"loss": found(torch.randn(50, generator=rng), torch.randn(50, generator=rng))} for i in range(9)}
    alone = Verdict(one, {"a": {"loss": one}})
    many = Verdict(one, {"a": {"loss": one}, **rest})
    assert alone.adjusted["a", "loss"][0] == pytest.approx(2 * one.p_auc)
    assert many.adjusted["a", "loss"][0] == pytest.approx(20 * one.p_auc)
    assert alone.leaky
    assert not many.leaky
    assert known(many.detectable("a").auc) > known(alone.detectable("a").auc)

"""Survival: losses against second implementations, and what they promise to federated learning."""

import numpy as np
import pytest
import torch

from polyclinic.errors import ConfigError
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.networks.small_networks import mlp
from polyclinic.learning.tasks.survival import Survival, hazard_loss, outputs_for, partial_likelihood_loss
from polyclinic.learning.training.dp_sgd import DPSGD

CUTS = (2.0, 5.0, 9.0, 14.0)
NETWORK = Network("mlp", (3,), 4, (("width", 8),))


def cohort(n: int = 40, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=rng)
    time = torch.empty(n).exponential_(generator=rng) * 8 + 0.1
    return x, torch.stack([time, (torch.rand(n, generator=rng) < 0.6).float()], 1)


def nnet_survival(time: float, event: float, alive: np.ndarray) -> float:
    """The likelihood of the reference code of Gensheimer and Narasimhan, for one patient; ``alive`` is 1 − hazard."""
    breaks = np.array([0.0, *CUTS])
    middle = breaks[:-1] + 0.5 * np.diff(breaks)
    survived = (time >= breaks[1:]) if event else (time >= middle)
    dies = np.zeros(len(CUTS))
    if event and time < breaks[-1]:
        dies[np.where(time < breaks[1:])[0][0]] = 1
    parts = np.concatenate([1 + survived * (alive - 1), 1 - dies * alive])
    return float(-np.log(np.clip(parts, 1e-12, None)).sum())


def test_the_hazard_loss_is_nnet_survivals() -> None:
    _, y = cohort()
    logits = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
    want = np.mean(
        [nnet_survival(float(t), float(e), 1 - p) for (t, e), p in zip(y, logits.sigmoid().numpy(), strict=True)]
    )
    assert float(hazard_loss(logits, y[:, 0], y[:, 1], torch.tensor(CUTS))) == pytest.approx(want, rel=1e-5)


def test_an_event_at_a_cut_is_in_the_interval_that_ends_there() -> None:
    """As in Kaplan and Meier's curve; times in whole months or years often equal a cut."""
    logits, at = torch.tensor([[-2.0, -1.0, 0.0, 1.0]]), torch.tensor([[5.0, 1.0]])
    just_before = hazard_loss(logits, at[:, 0] - 0.1, at[:, 1], torch.tensor(CUTS))
    assert torch.equal(hazard_loss(logits, at[:, 0], at[:, 1], torch.tensor(CUTS)), just_before)


def test_the_hazard_loss_is_a_sum_over_patients() -> None:
    """So it federates exactly: the weighted mean of sites' losses is the loss of all patients."""
    task, (x, y) = Survival(NETWORK, CUTS), cohort()
    model = task.model()
    whole = task.loss(model, (x, y))
    parts = [task.loss(model, (x[a], y[a])) * len(a) for a in torch.arange(40).split([25, 10, 5])]
    assert torch.stack(parts).sum().item() / 40 == pytest.approx(whole.item(), rel=1e-6)


def test_the_best_constant_hazards_are_events_over_patients_at_risk() -> None:
    _, y = cohort(200)
    best = []
    for start, end in zip([0.0, *CUTS[:-1]], CUTS, strict=True):
        died = (y[:, 1] > 0) & (y[:, 0] > start) & (y[:, 0] <= end)
        survived = torch.where(y[:, 1] > 0, y[:, 0] > end, y[:, 0] >= (start + end) / 2)
        best.append(float(died.sum() / (died.sum() + survived.sum())))
    logits = torch.tensor(best, dtype=torch.float64).logit()[None].requires_grad_()
    hazard_loss(logits.expand(200, -1), y[:, 0], y[:, 1], torch.tensor(CUTS)).backward()
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-6


@pytest.mark.parametrize(
    ("ties", "best"),
    [(True, [0.8528099658670738, -0.31299701950023884]), (False, [0.8997160736413605, -0.31891109058969896])],
)
def test_the_partial_likelihood_is_coxs(ties: bool, best: list[float]) -> None:
    """Coefficients of scikit-survival 0.28.0 (Breslow's ties) and of lifelines 0.30.3 (no ties) minimize the loss."""
    rng = np.random.default_rng(0)
    x = np.round(rng.normal(size=(40, 2)), 1)
    when = np.ceil(10 * rng.exponential(size=40) / np.exp(x @ [0.8, -0.5]))
    event = torch.tensor(rng.uniform(size=40) < 0.7).double()
    time = torch.tensor(when if ties else when + np.arange(40) * 1e-3)
    beta = torch.tensor(best, dtype=torch.float64, requires_grad=True)
    loss = partial_likelihood_loss(torch.tensor(x) @ beta, time, event)
    loss.backward()
    assert beta.grad is not None
    assert beta.grad.abs().max() < (1e-9 if ties else 1e-5)  # the precision of the two programs
    if not ties:
        assert loss.item() * 28 == pytest.approx(71.26744512, abs=1e-6)  # lifelines' log likelihood, 28 events


def test_survival_follows_from_hazards() -> None:
    task, (x, y) = Survival(NETWORK, CUTS), cohort()
    model = task.model()
    with torch.inference_mode():
        out, want = task.outputs(model, (x, y)), (1 - model(x).sigmoid()).cumprod(1)
    assert torch.allclose(out["score"], want, atol=1e-6)
    assert out["times"].shape == (40, 4)
    scores = task.summary(out)
    assert scores["loss"] == pytest.approx(task.loss(model, (x, y)).item(), rel=1e-4)
    assert scores.keys() == {"loss", "c_index", "uno_c", "ibs"}


def test_cox_ranks_only() -> None:
    task, (x, y) = Survival(Network("mlp", (3,), 1), CUTS, "proportional"), cohort()
    with torch.inference_mode():
        out = task.outputs(task.model(), (x, y))
    assert out["score"].shape == (40, 1)
    assert task.summary(out).keys() == {"loss", "c_index", "uno_c"}
    assert outputs_for({"cuts": CUTS, "hazards": "proportional"}) == 1
    assert outputs_for({"cuts": CUTS}) == 4


def test_a_batch_without_an_event_changes_nothing_under_cox() -> None:
    theta = torch.randn(5, requires_grad=True)
    loss = partial_likelihood_loss(theta, torch.arange(5.0) + 1, torch.zeros(5))
    loss.backward()
    assert loss.item() == 0
    assert theta.grad is not None
    assert not theta.grad.any()


def test_a_loss_that_compares_patients_is_no_private_training() -> None:
    local = DPSGD(noise=1.0, batch_size=4)
    cox = Survival(Network("mlp", (3,), 1), CUTS, "proportional")
    assert any('set hazards = "discrete"' in problem for problem in local.validate(cox, cox.model()))
    assert local.validate(Survival(NETWORK, CUTS), mlp((3,), 4)) == []


@pytest.mark.parametrize(
    "cuts", [(), (1.0,), (2.0, 1.0), (1.0, 1.0), (0.0, 1.0), (1.0, float("inf")), (1.0, float("nan"))]
)
def test_bad_cuts_are_refused(cuts: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="give 2 to 1000 times above 0 in ascending order"):
        Survival(NETWORK, cuts)

"""The canary audit of DP-SGD: right of honest training, and of training that forgot its noise, clipping or secrets."""

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from polyclinic.attacks import canary
from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.site import SecretRng
from polyclinic.data.examples import Examples
from polyclinic.engines.plan import Plan
from polyclinic.evaluation.records.record_schema import Privacy
from polyclinic.learning.training import dp_sgd
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.privacy import accounting
from polyclinic.privacy.accounting import plan as planned
from polyclinic.studies.audits import audit_privacy
from polyclinic.studies.audits.audit_privacy import NotAudited, audit_training

PATIENTS, BATCH, ROUNDS, STEPS, EPSILON, DELTA = 100, 50, 5, 2, 2.0, 1e-5
PRIVATE = {"noise": planned(EPSILON, DELTA, BATCH / PATIENTS, ROUNDS, steps=STEPS).noise, "bound": 1.0}
CLAIM = Privacy(
    kind="privacy", method="fedavg", seed=0, round=ROUNDS, site="a", epsilon=EPSILON, delta=DELTA, unit="patient"
)


def roles() -> Any:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(PATIENTS, 13, generator=rng)
    names = tuple(f"p{i}" for i in range(PATIENTS))
    return {"train": Examples(x, (x[:, 0] > 0).long(), names, names)}


def entropy(seed: Any) -> Any:
    """Secrets that a test can repeat."""
    drawn = [0]

    def give(size: Any) -> Any:
        drawn[0] += 1
        return hashlib.shake_128(f"{seed}/{drawn[0]}".encode()).digest(size)

    return give


def plan(private: Any = PRIVATE, method: Any = "fedavg", **more: Any) -> Any:
    training = {"batch_size": BATCH, "steps": STEPS, "lr": 0.5, **({"private": private} if private else {}), **more}
    return Plan(
        "classification", "mlp", (13,), 2, method, ("a", "b"), ROUNDS, training=training, network_options={"width": 64}
    )


def audited(
    seed: Any = 0,
    plan: Any = plan(),
    claim: Any = CLAIM,
    canaries: Any = 200,
    progress: Any = lambda *_: None,
    rounds: Any = ROUNDS,
) -> Any:
    return audit_training(
        plan, roles(), "a", claim, rounds=rounds, canaries=canaries, seed=seed, entropy=entropy(seed), progress=progress
    )


@pytest.fixture
def without_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug that no accountant sees: the noise is 0."""
    monkeypatch.setattr(SecretRng, "normal", lambda self, *shape: torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("seed", range(2))
def test_honest_training_is_not_accused(seed: int) -> None:
    found = audited(seed)
    assert found.at_least < EPSILON < found.control
    assert found.holds is True
    assert (found.claimed, found.delta, found.unit, found.rounds) == (EPSILON, DELTA, "patient", ROUNDS)


@pytest.mark.parametrize("seed", range(2))
def test_training_without_noise_is_caught(seed: int, without_noise: Any) -> None:
    found = audited(seed)
    assert found.at_least > EPSILON
    assert found.holds is False
    assert "training is less private than the claimed ε = 2.00" in found.says


@pytest.mark.slow
def test_in_twenty_of_twenty_trainings_the_audit_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures are printed: pytest -s."""
    honest = [audited(seed).at_least for seed in range(20)]
    monkeypatch.setattr(SecretRng, "normal", lambda self, *shape: torch.zeros(shape, dtype=torch.float64))
    forgot = [audited(seed).at_least for seed in range(20)]
    print(f"honest {min(honest):.2f} to {max(honest):.2f}, without noise {min(forgot):.2f} to {max(forgot):.2f}")
    assert max(honest) <= EPSILON < min(forgot)


def test_training_that_does_not_clip_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A canary asks for ten times the bound."""
    whole = dp_sgd.per_example_gradients

    def unclipped(*given: Any) -> Any:
        return {n: g * 1e-3 for n, g in whole(*given).items()}  # below the bound, so never clipped

    monkeypatch.setattr(dp_sgd, "per_example_gradients", unclipped)
    normal = SecretRng.normal
    monkeypatch.setattr(SecretRng, "normal", lambda self, *shape: normal(self, *shape) * 1e-3)
    assert audited().at_least > EPSILON


@dataclass(frozen=True)
class Beside(FedAvg):
    """FedAvg that sends an exact gradient with the private update, as methods with a server's momentum do."""

    def site_update(self, request: Any, memory: Any, site: Any) -> Any:
        reply, memory = super().site_update(request, memory, site)
        data = site.data["train"]
        plain = LocalTraining(steps=1, batch_size=len(data), lr=1.0)
        start = request.trees["params"]
        end = plain.fit(self.task, start, replace(site, seed=1), request.round)
        gradient = {n: start[n] - end[n] for n in start}
        return Reply({**reply.parts, "gradient": WeightedMean.of(gradient, 1.0)}), memory


def test_a_gradient_that_leaves_beside_the_noise_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The update is private and the accountant right; the other part of the reply is not."""
    monkeypatch.setattr(audit_privacy, "build", lambda name, setting, options: Beside(setting.task, setting.local))
    assert audited().at_least > EPSILON


def test_the_trainings_are_at_the_runs_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rate, steps, rounds and bound, though there are more units; noise except for the control."""
    seen, told = [], []
    fit = dp_sgd.DPSGD.fit

    def spied(self: Any, task: Any, start: Any, site: Any, *args: Any, **more: Any) -> Any:
        seen.append((self.noise, self.bound, self.spend(site.data["train"])))
        return fit(self, task, start, site, *args, **more)

    monkeypatch.setattr(dp_sgd.DPSGD, "fit", spied)
    audited(progress=lambda *what: told.append(what))
    assert len(seen) == 3 * ROUNDS
    assert {spend.steps for *_, spend in seen} == {STEPS}
    assert {round(spend.rate, 9) for *_, spend in seen} == {BATCH / PATIENTS}
    assert {bound for _, bound, _ in seen} == {1.0}
    assert [noise for noise, *_ in seen] == [1e-4] * 2 * ROUNDS + [PRIVATE["noise"]] * ROUNDS
    assert told == [
        (what, r + 1, ROUNDS) for what in ("without canaries", "without noise", "as claimed") for r in range(ROUNDS)
    ]


def test_the_rate_is_never_above_the_runs() -> None:
    local = plan(batch_size=33).build_local()
    for count in (2, 7, 199):
        more = audit_privacy._at_same_rate(local, roles()["train"], count)
        assert more.batch_size / (PATIENTS + count) <= 0.33
        assert (more.batch_size + 1) / (PATIENTS + count) > 0.33
        assert more.steps == STEPS


def test_without_a_budget_the_claim_is_the_accountants() -> None:
    found = audited(claim=None, canaries=20, rounds=2)
    assert found.delta == 1e-5
    assert found.unit == "patient"
    wanted = accounting.epsilon([dp_sgd.Spend(PRIVATE["noise"], 0.5, 2 * STEPS, "patient")], 1e-5)
    assert found.claimed == pytest.approx(wanted)


def test_as_many_canaries_as_the_claim_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = list[int]()

    def observed(*args: Any) -> _Nothing:
        counts.append(len(args[4]))
        return _Nothing()

    monkeypatch.setattr(audit_privacy, "_observed", observed)
    monkeypatch.setattr(audit_privacy, "_train", lambda *args: None)
    monkeypatch.setattr(canary, "lower_bound", lambda *_: 0.0)
    for epsilon, wanted in ((0.5, 400), (5.0, 513)):
        audited(claim=CLAIM.model_copy(update={"epsilon": epsilon}), canaries=None)
        assert counts[-2:] == [wanted] * 2  # the network has 1,026 parameters, and there is one canary for two
    audited(canaries=7)
    assert counts[-1] == 7


class _Nothing:
    canaries = type("None", (), {"inside": torch.zeros(2, dtype=torch.bool)})

    def learned(self) -> Any:
        return {}

    def scores(self, weights: Any) -> Any:
        return torch.zeros(2)


def test_what_cannot_be_audited_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotAudited, match="does not train so"):
        audited(plan=plan(private=None))
    with pytest.raises(NotAudited, match="c does not train under fedavg"):
        audit_training(plan(), roles(), "c", CLAIM, rounds=1)

    def broken(self: Any, *args: Any, **more: Any) -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(dp_sgd.DPSGD, "fit", broken)
    with pytest.raises(NotAudited, match=r"fedavg cannot be trained with canaries at a alone: .*no such thing"):
        audited()

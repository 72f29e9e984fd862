"""What a site with a privacy budget lets leave: what noise was added to, and its own scores; by value, not by name."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("dp_accounting", reason="needs polyclinic[privacy]")

from polyclinic.core.aggregates import PerSite, Reply, WeightedMean
from polyclinic.core.execution import Refused, execute
from polyclinic.core.metering import Spend, meter, metered
from polyclinic.core.method import Method, MethodWrapper, Request
from polyclinic.core.pipeline import send_through
from polyclinic.core.site import Site
from polyclinic.core.tree import Trees
from polyclinic.engines.plan import Plan
from polyclinic.engines.policy import site_policy as policies
from polyclinic.engines.policy.privacy_budget import Paid
from polyclinic.engines.site_description import Describe
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.task_evaluation import Evaluated
from polyclinic.learning.training.dp_sgd import DPSGD
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.optimization.scaffold import Scaffold
from polyclinic.privacy.budget_policy import Budget
from polyclinic.privacy.gaussian import Clip
from polyclinic.privacy.ledger import Ledger
from tests.conftest import Rows, blobs

TASK = Classification(Network("cnn", (1, 8, 8), 2, (("width", 2), ("depth", 2), ("norm", "group"))))


class Ward(Rows):
    def __init__(self) -> None:
        rows = blobs(0, 16, (1, 8, 8))
        super().__init__(rows.x, rows.y)
        self.patients = tuple(f"p{i}" for i in range(16))


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    made = Ledger(tmp_path / "budget.jsonl")
    made.begin(site="a", data="ward-7", unit="patient", epsilon=10.0, delta=1e-5)
    return made


def ask_of(method: FedAvg) -> Request:
    return method.request(method.init(TASK.first()))


@pytest.mark.parametrize("job", ["score/train", "predict/val", "predict/test", "describe", "train", "Score/val"])
def test_only_scores_on_validation_and_test_data_are_free(ledger: Ledger, job: str) -> None:
    site = Site("a", {"train": Ward(), "val": Ward(), "test": Ward()})
    method = Evaluated(FedAvg(TASK, LocalTraining()), TASK)
    with pytest.raises(Refused, match=r"added none: .* The reply contains (score|update|predict)$"):
        execute(method, Request(0, {"params": TASK.first()}, job=job), {}, site, Budget(ledger))


@dataclass(frozen=True)
class Pretends(FedAvg):
    """Answers an evaluation job with something else, or with something else in addition to the scores."""

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        rows = site.data["train"][torch.arange(4)][0].flatten(1)
        return Reply({"score": PerSite({site.name: {"auc": rows}})}), memory


class PretendsBeside(Evaluated):  # type: ignore[type-arg]
    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        reply, memory = super().site_update(request, memory, site)
        return Reply({**reply.parts, "more": WeightedMean.of({"x": torch.ones(3)})}), memory


@dataclass(frozen=True)
class PretendsAround(MethodWrapper[Any]):
    """A wrapper around the library's evaluation that answers the evaluation job itself."""

    inner: Method[Any]

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        return Reply({"score": PerSite({site.name: {"auc": site.data["train"][torch.arange(4)][0]}})}), memory


class PretendsWithin(Evaluated):  # type: ignore[type-arg]
    """A subclass of the library's evaluation that sends pixels as scores."""

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        return Reply({"score": PerSite({site.name: {"auc": site.data["train"][torch.arange(4)][0]}})}), memory


def test_a_job_is_free_by_who_answers_and_not_by_its_name(ledger: Ledger) -> None:
    """A method that answers score/val itself, with patients' pixels, or sends something in addition to the scores."""
    site, score = Site("a", {"train": Ward(), "val": Ward()}), Request(0, {"params": TASK.first()}, job="score/val")
    average = FedAvg(TASK, LocalTraining())
    for method in (
        Pretends(TASK, LocalTraining()),
        PretendsBeside(average, TASK),
        PretendsAround(Evaluated(average, TASK)),
        PretendsWithin(average, TASK),
    ):
        with pytest.raises(Refused, match="the job 'score/val' added none"):
            execute(method, score, {}, site, Budget(ledger))
    assert ledger.spent().spends == ()


def test_a_refusal_names_every_part_and_a_paid_reply_costs_what_it_metered(ledger: Ledger) -> None:
    site = Site("a", {"train": Ward()})
    method = Scaffold(TASK, 3, LocalTraining(steps=1))
    request = method.request(method.init(TASK.first()))
    with pytest.raises(Refused, match=r"The reply contains control, update$"):
        execute(method, request, {}, site, Budget(ledger))
    private = FedAvg(TASK, DPSGD(noise=4.0, batch_size=8, steps=2))
    execute(private, ask_of(private), {}, site, Budget(ledger))
    assert [spend.steps for spend in ledger.spent().spends] == [2]


ONE, SCORE = Spend(4.0, unit="patient"), Reply({"score": PerSite({"a": {"auc": torch.tensor(0.5)}})})
SENT = Reply({"update": WeightedMean.of({"w": torch.ones(3)})})
PLAIN = FedAvg(TASK, LocalTraining(), uniform=True)
EVALUATED = Evaluated(PLAIN, TASK)


def job(
    budget: Budget, *spends: Spend, reply: Reply = SENT, name: str = "train", method: Any = PLAIN, round: int = 0
) -> None:
    """What ``execute`` does at a site, with a method that meters ``spends`` and answers ``reply``."""
    request, site = Request(round, {}, job=name), Site("a")
    budget.admit(method, request, site)
    for spend in spends:
        meter(spend)
    budget.release(method, request, reply, site)


@pytest.mark.parametrize("name", ["score/val", "score/test"])
def test_scores_are_free_only_of_the_library_evaluation_itself(ledger: Ledger, name: str) -> None:
    """A wrapper around the evaluation could answer the job itself, so that its scores are not free."""
    method = EVALUATED
    job(Budget(ledger), reply=SCORE, name=name, method=method)
    assert ledger.spends() == ()
    around = (send_through(EVALUATED, Clip(1.0)), PretendsAround(EVALUATED), PretendsWithin(PLAIN, TASK))
    for other in (PLAIN, send_through(PLAIN, Clip(1.0)), *around):
        with pytest.raises(Refused, match=f"the job '{name}' added none"):
            job(Budget(ledger), reply=SCORE, name=name, method=other)
    with pytest.raises(Refused, match=r"The reply contains update$"):
        job(Budget(ledger), name=name, method=method)
    with pytest.raises(Refused, match="added none"):
        job(Budget(ledger, free=()), reply=SCORE, name=name, method=method)


def test_an_evaluation_that_spends_pays(ledger: Ledger) -> None:
    job(Budget(ledger), ONE, reply=SCORE, name="score/val", method=EVALUATED)
    assert ledger.spends() == (ONE,)


def test_what_was_metered_is_paid_and_the_ledger_says_for_which_round_and_job(ledger: Ledger) -> None:
    other = Spend(0.0, steps=3, unit="patient", pure=0.5)
    job(Budget(ledger), ONE, other, name="train/head", round=7)
    assert ledger.spends() == (ONE, other)
    entry = json.loads(ledger.path.read_text().splitlines()[-1])
    assert entry["about"] == {"round": 7, "job": "train/head"}


def test_where_nothing_leaves_nothing_is_paid(ledger: Ledger) -> None:
    for spends in ((), (ONE,)):
        job(Budget(ledger), *spends, reply=Reply())
    assert ledger.spends() == ()


def test_each_job_pays_for_itself(ledger: Ledger) -> None:
    """What a job metered that failed does not count for the next, and neither pays for one that meters nothing."""
    budget = Budget(ledger)
    budget.admit(PLAIN, Request(0, {}), Site("a"))
    meter(Spend(1.0, unit="patient"))  # and then it fails
    job(budget, ONE)
    assert ledger.spends() == (ONE,)
    with pytest.raises(Refused, match="added none"):
        job(budget)
    assert ledger.spends() == (ONE,)
    with pytest.raises(Refused, match="added none"):
        Budget(ledger).release(PLAIN, Request(0, {}), SENT, Site("a"))


def test_counting_ends_with_the_release(ledger: Ledger) -> None:
    budget = Budget(ledger)
    with metered() as outside:
        job(budget, ONE)
        meter(ONE)
        with pytest.raises(Refused):
            job(budget)
        meter(ONE)
    assert outside == [ONE, ONE], "and not what the jobs metered"
    assert ledger.spends() == (ONE,)


def test_a_budget_that_is_used_up_or_broken_refuses_the_reply(ledger: Ledger) -> None:
    with pytest.raises(Refused, match=r"the budget of ε = 10 .* is used up"):
        job(Budget(ledger), Spend(0.0, pure=10.5, unit="patient"))
    with pytest.raises(Refused, match="this budget protects every patient, which nothing in this release does"):
        job(Budget(ledger), Spend(4.0, unit="record"))
    assert ledger.spends() == ()
    ledger.path.unlink()
    with pytest.raises(Refused, match="the ledger is missing"):
        job(Budget(ledger), ONE)


PLAN = Plan(
    "classification",
    "cnn",
    (1, 8, 8),
    2,
    "fedavg",
    ("a", "b"),
    3,
    network_options={"width": 2, "depth": 2, "norm": "group"},
    training={"steps": 1, "private": {"noise": 4.0, "bound": 1.0, "unit": "patient"}},
)


def test_the_survey_is_free_by_who_answers_and_not_by_its_name(tmp_path: Path) -> None:
    """An approved private method that answers the job "describe" with its exact gradient is refused."""
    policy = policies.parse(b'[allow]\ngather = ["score", "describe"]\n[privacy]\nepsilon = 8.0\ndelta = 1e-5\n')
    ledger = Ledger(tmp_path / "ledger.jsonl")
    assert policy.privacy
    ledger.begin(site="a", data="ward-7", **policy.privacy.model_dump())
    paid = Paid.of(policies.Enforced(policy, PLAN), ledger)
    site, request = Site("a", {"train": Ward(), "val": Ward()}), Request(0, {"params": TASK.first()}, job="describe")
    with pytest.raises(Refused, match="the job 'describe' added none"):
        execute(Evaluated(FedAvg(TASK, LocalTraining(steps=1)), TASK), request, {}, site, paid)
    assert ledger.spent().spends == ()

    class Examples(Ward):
        @property
        def shape(self) -> tuple[int, ...]:
            return (1, 8, 8)

        @property
        def highest(self) -> int:
            return int(self.y.max())

        @property
        def labels(self) -> torch.Tensor:
            return self.y

    reply, _ = execute(Describe("classification"), request, {}, Site("a", {"train": Examples()}), paid)
    assert set(reply.parts) == {"describe"}
    scored, _ = execute(PLAN.build_method(), Request(0, {"params": TASK.first()}, job="score/val"), {}, site, paid)
    assert set(scored.parts) == {"score"}
    assert ledger.spent().spends == ()

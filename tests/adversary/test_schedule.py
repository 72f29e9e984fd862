"""A site answers the schedule of the study that was approved there, and nothing else."""

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from polyclinic.core.atomic import write_private
from polyclinic.core.tree import Tree, cosine
from polyclinic.engines.flare.pki import site_keys
from polyclinic.engines.flare.protocol.paths import SiteFolder, private_folder
from polyclinic.privacy.ledger import Ledger
from tests.adversary.server import LENIENT, HostileServer, Person, answered, houses, nothing_left, refused, small_order
from tests.conftest import little_sites

BUDGET = '\n[privacy]\nepsilon = 3.0\ndelta = 1e-3\nunit = "patient"\n'
PRIVATE = {"training": {"batch_size": 8, "lr": 0.05, "private": {"noise": 50.0, "bound": 1.0, "unit": "patient"}}}
# What the guide writes for a hospital that lets predictions of each test patient leave.
OPEN = LENIENT.replace('never = ["predict/*", "show/*"]', "never = []").replace(
    'gather = ["score", "describe"]', 'gather = ["score", "describe", "predict", "explain", "show"]'
)


@pytest.fixture
def server(tmp_path: Path) -> HostileServer:
    """Three rounds of federated averaging were approved, and scores on test data at the end."""
    return HostileServer(houses(tmp_path), small_order(test="score/test"))


# Which job ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["score", "predict", "explain", "show"])
def test_what_was_not_approved_is_not_evaluated_even_if_the_policy_would_let_it_leave(
    verb: str, tmp_path: Path
) -> None:
    """``score/test`` was approved. Scores, predictions and explanations of other patients do not leave, at any
    round.
    """
    server = HostileServer(houses(tmp_path, policy=OPEN), small_order(test="score/test"))
    for job in (f"{verb}/{role}" for role in ("train", "val", "test", "unlabeled", "public")):
        if job != "score/test":
            for round in (0, 1, 3):
                server.ask("site-0", job, round=round)
    nothing_left(server)


def test_scores_that_were_not_approved_never_leave(server: HostileServer) -> None:
    """No validation scores were approved (``score_every = 0``), and of training patients none ever are."""
    for job in ("score/train", "score/val", "score/unlabeled"):
        for round in (0, 1, 3):
            server.ask("site-0", job, round=round)
    nothing_left(server)


def test_a_job_of_another_name_is_not_done(server: HostileServer) -> None:
    """Names are compared exactly: neither spaces nor case nor what cannot be seen make another job of one."""
    for job in (
        "anything at all",
        "train ",
        " train",
        "Train",
        "train\u200b",
        "train/val",
        "",
        "describe",
        "score",
        "predict",
    ):
        for round in (0, 1):
            server.ask("site-0", job, round=round)
    nothing_left(server)


def test_a_survey_is_not_answered_in_a_run_that_trains(server: HostileServer) -> None:
    refused(server.ask("site-0", "describe", trees={}))


def test_an_approved_private_job_does_not_leave_unpaid_under_the_name_of_a_free_one(tmp_path: Path) -> None:
    """FedSGD's reply under a job name that no budget counts: the exact gradient would leave without noise."""
    homes = houses(tmp_path, policy=LENIENT + BUDGET)
    server = HostileServer(
        homes, small_order(method="fedsgd", plan={**PRIVATE, "options": {"lr": 0.5}}), approved=False
    )
    if (hello := server.offer(server.order, ["site-0"])["site-0"]).lost.startswith("refused"):
        return  # the site refuses the study, as it may: its gradient is not what the noise protects
    assert hello.lost.startswith("waits for")
    server.approved(server.order, ["site-0"])
    for job in ("describe", "score", "score/", "predict", "score/val/x", "describe/"):
        got = server.ask("site-0", job)
        assert not got.left, f"{job!r}: {got}, and nothing was spent of the budget"


# Which round, and how often ---------------------------------------------------------------------------------------------


def test_one_round_trains_once(server: HostileServer) -> None:
    """Every further content for the same round is refused, whatever its number and its claimed starting point."""
    answered(server.ask("site-0", "train"))
    for i in range(1, 6):
        refused(server.ask("site-0", "train", server.moved(0.01 * i)))
        refused(server.ask("site-0", "train", server.moved(0.01 * i), after=0))
    assert len({got.sha256 for got in server.loot}) == 1


@pytest.mark.parametrize("round", [3, 4, 1000])
def test_no_round_is_trained_beyond_those_that_were_approved(round: int, server: HostileServer) -> None:
    """Rounds count from 0, so that of three the last is 2."""
    refused(server.ask("site-0", "train", round=round))


def test_rounds_do_not_go_back(server: HostileServer) -> None:
    """A round that was left out is over once a later one was trained."""
    answered(server.ask("site-0", "train", round=1))
    refused(server.ask("site-0", "train", server.moved(0.5), round=0))


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    """A round that is asked again, under another number or from the start, draws no second noise and costs nothing."""
    server = HostileServer(houses(tmp_path, policy=LENIENT + BUDGET.replace("3.0", "30.0")), small_order(plan=PRIVATE))
    first = answered(server.ask("site-0", "train"))
    spent = _spent(server.homes["site-0"])
    for how in ({}, {"after": 0}, {"number": 40}, {"after": 0, "number": 41}):
        again = server.ask("site-0", "train", **how)  # type: ignore[arg-type]
        same = again.data == first.data
        assert same, "the same request was answered with other noise: the average of many answers has little of it"
    server.restart("site-0")
    same = server.ask("site-0", "train", after=0, number=50).data == first.data
    assert same
    assert _spent(server.homes["site-0"]) == spent


def test_a_run_that_is_offered_again_does_not_train_its_rounds_again(server: HostileServer) -> None:
    """The site's agent starts anew, and the job too; what was answered stays answered."""
    first = answered(server.ask("site-0", "train"))
    server.restart("site-0")
    server.offer(server.order, ["site-0"])
    refused(server.ask("site-0", "train", server.moved(0.1), after=0))
    assert server.ask("site-0", "train", after=0).data == first.data


# Which model ------------------------------------------------------------------------------------------------------------


def test_scores_are_of_the_model_of_their_round(tmp_path: Path) -> None:
    """In round 1 sites train from the model that they scored, and score no other one."""
    server = HostileServer(houses(tmp_path), small_order(score_every=1, test="score/test"))
    answered(server.ask("site-0", "train"))
    answered(server.ask("site-0", "score/val", server.moved(0.1), round=1))
    for i in range(2, 5):
        refused(server.ask("site-0", "score/val", server.moved(0.1 * i), round=1))
    refused(server.ask("site-0", "train", server.moved(0.9), round=1))


def test_the_model_that_was_scored_is_trained(tmp_path: Path) -> None:
    """The limit of the test above: what an honest server asks is answered."""
    server = HostileServer(houses(tmp_path), small_order(score_every=1, test="score/test"))
    for round in range(3):
        answered(server.ask("site-0", "train", server.moved(0.1 * round), round=round))
        answered(server.ask("site-0", "score/val", server.moved(0.1 * (round + 1)), round=round + 1))
    answered(server.ask("site-0", "score/test", server.moved(0.1 * 3), round=3))


def test_scores_after_training_are_of_the_model_from_which_was_trained(tmp_path: Path) -> None:
    server = HostileServer(houses(tmp_path), small_order(score_every=1))
    answered(server.ask("site-0", "train", server.moved(0.0), round=0))
    answered(server.ask("site-0", "train", server.moved(0.2), round=1))
    refused(server.ask("site-0", "score/val", server.moved(0.3), round=1))


def test_validation_scores_come_at_their_places_alone(tmp_path: Path) -> None:
    """Every second round of four: after rounds 2 and 4, so that at most these, and one where the method ends, leave."""
    server = HostileServer(houses(tmp_path), small_order(rounds=4, score_every=2))
    for round in range(6):
        if round < 4:
            server.ask("site-0", "train", server.moved(0.1 * round), round=round)
        server.ask("site-0", "score/val", server.moved(0.1 * round), round=round)
    scored = [got.call.round for got in server.loot if got.call.job == "score/val"]
    assert len(scored) <= 2, f"validation scores of the rounds {scored} left; approved were 2 and 4"


def test_the_test_is_opened_once(server: HostileServer) -> None:
    """For one model, at the end; after it nothing trains."""
    for round in range(3):
        answered(server.ask("site-0", "train", server.moved(0.1 * round), round=round))
    answered(server.ask("site-0", "score/test", server.moved(1.0), round=3))
    for i in range(1, 4):
        refused(server.ask("site-0", "score/test", server.moved(1.0 + 0.1 * i), round=3))
    refused(server.ask("site-0", "score/test", server.moved(0.1), round=1))


def test_the_test_is_not_opened_before_the_last_round(server: HostileServer) -> None:
    """What decides about further training has not seen the test patients."""
    answered(server.ask("site-0", "train"))
    got = server.ask("site-0", "score/test", server.moved(0.1), round=1)
    later = server.ask("site-0", "train", server.moved(0.1), round=1)
    both = got.left and later.left
    assert not both, "scores of test patients left between two rounds of training"


# Scores as an oracle ------------------------------------------------------------------------------------------------------


def test_scores_of_training_patients_never_leave(tmp_path: Path) -> None:
    """Finite differences of the training loss are the training gradient: 16 messages, nothing spent."""
    homes = houses(tmp_path, policy=LENIENT + BUDGET)
    server = HostileServer(homes, small_order(rounds=1, plan=PRIVATE))
    name = next(key for key in server.model if key.endswith("weight"))
    found, truth = [], _gradient(server, "site-0")[name].view(-1)
    for i in range(len(truth)):
        step = torch.zeros(len(truth))
        step[i] = 1e-2
        sides = []
        for sign in (1, -1):
            moved = {**server.model, name: server.model[name] + sign * step.view_as(server.model[name])}
            got = server.ask("site-0", "score/train", moved)
            if not got.left:
                refused(got)
                return
            sides.append(float(got.of_site("score")["loss"]))
        found.append((sides[0] - sides[1]) / 2e-2)
    likeness = float(torch.cosine_similarity(torch.tensor(found), truth, dim=0))
    raise AssertionError(f"{2 * len(truth)} unpaid answers gave the training gradient (cosine {likeness:.6f})")


def test_no_table_of_training_patients_can_be_read_off_scores(tmp_path: Path, real_data: Path) -> None:
    """A linear model with a steep slope in one column counts patients below any threshold: 61 messages, every
    patient.
    """
    home, ages, ill = _long_beach(tmp_path, real_data)
    plan = {
        "options": {"uniform": True},
        "training": {
            "batch_size": 16,
            "epochs": 1,
            "lr": 0.1,
            "private": {"noise": 50.0, "bound": 1.0, "unit": "record"},
        },
    }
    server = HostileServer({"va": home}, small_order("dp", sites=("va",), rounds=1, score_every=0, plan=plan))

    def ask(weight: list[list[float]], bias: list[float]) -> dict[str, float] | None:
        model = dict(zip(server.model, (torch.tensor(weight), torch.tensor(bias)), strict=True))
        got = server.ask("va", "score/train", model)
        return {key: float(value) for key, value in got.of_site("score").items()} if got.left else None

    none, steep, below = [0.0] * 4, 50.0, dict[int, tuple[int, int]]()
    base = ask([none, none], [0.0, 1.0])
    if base is None:
        return
    n, sick = base["n"], round(base["accuracy"] * base["n"])
    for age in range(25, 85):
        said = ask([none, [steep, 0.0, 0.0, 0.0]], [0.0, -steep * (age + 0.5)])
        if said is None:
            return
        right, balanced = said["accuracy"] * n, 2 * said["balanced_accuracy"]
        hits = (balanced - right / (n - sick)) / (1 / sick - 1 / (n - sick))
        below[age] = (round(sick - hits), round(right - hits))
    table = Counter[tuple[int, int]]()
    for age, (with_it, without) in below.items():
        table[age, 1] += with_it - below.get(age - 1, (0, 0))[0]
        table[age, 0] += without - below.get(age - 1, (0, 0))[1]
    known = Counter((int(a), int(i)) for a, i in zip(ages, ill, strict=True))
    same = +table == known
    raise AssertionError(
        f"{1 + len(below)} scores left, with a budget of ε = 0.5 of which {_spent(home)} was spent; "
        f"age and diagnosis of all {sum(known.values())} training patients {'' if same else 'almost '}recovered"
    )


def _long_beach(root: Path, data: Path) -> tuple[SiteFolder, np.ndarray, np.ndarray]:
    """The hospital in Long Beach with a tight budget: its home, and age and diagnosis of each training patient."""
    with open(data / "uci_heart_4hospitals" / "heart_4sites.csv") as file:
        rows = [row for row in csv.DictReader(file) if "va" in row["site"].lower()]
    x = np.array([[float(row[c] or "nan") for c in ("age", "sex", "cp", "restecg")] for row in rows], dtype=np.float32)
    whole = np.isfinite(x).all(1)
    x, y = x[whole], np.array([int(float(row["num"]) > 0) for row in rows])[whole]
    home, count = SiteFolder(root / "va"), len(x) - 60
    folder = private_folder(home.path) / "data"
    folder.mkdir()
    np.savez(folder / "train.npz", inputs=x[:count], targets=y[:count])
    np.savez(folder / "test.npz", inputs=x[count:], targets=y[count:])
    write_private(home.settings, f'site = "va"\ndata = "{folder}"\n')
    write_private(home.policy, LENIENT + BUDGET.replace("3.0", "0.5").replace("patient", "record"))
    site_keys.make(home.keys)
    return home, x[:count, 0], y[:count]


def _gradient(server: HostileServer, site: str) -> Tree:
    """The exact gradient of the training loss at the first model."""
    from polyclinic.core.site import Site
    from polyclinic.learning.tasks.risk import full_gradient

    data = little_sites((4,), len(server.homes))[site].data
    return full_gradient(server.order.build_plan().build_task(), server.model, Site(site, data, seed=3), 0)


def _spent(home: SiteFolder) -> float:
    """ε spent at a site, over all its ledgers."""
    return sum(float(Ledger(path).spent().epsilon) for path in home.ledgers.glob("*.jsonl"))


# What a private study lets leave ------------------------------------------------------------------------------------------


def test_a_private_study_whose_method_sends_exact_gradients_is_refused_or_sends_none(tmp_path: Path) -> None:
    """MimeLite trains with DP-SGD and also sends the exact full gradient, which no noise protects."""
    server = HostileServer(
        houses(tmp_path, policy=LENIENT + BUDGET.replace("3.0", "1000.0")),
        small_order(method="mime-lite", plan=PRIVATE),
        approved=False,
    )
    hello = server.offer(server.order, ["site-0"])["site-0"]
    if hello.lost.startswith("refused"):
        return
    person = Person(server.homes["site-0"])
    person.reads("run-1")
    person.approves("run-1")
    got = server.ask("site-0")
    if not got.left:
        refused(got)
        return
    truth = _gradient(server, "site-0")
    for part, stat in got.reply.parts.items():
        for leaves in stat.trees:
            if leaves.keys() == truth.keys():
                likeness = cosine(leaves, truth)
                assert abs(likeness) < 0.999, (
                    f"{part!r} is the exact gradient of the training patients (cosine {likeness:.6f})"
                )

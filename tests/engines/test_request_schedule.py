"""The schedule: which requests follow from an approved order, round by round, and that nothing else does."""

from types import SimpleNamespace
from typing import Any

import pytest

from polyclinic.core.job_enumeration import Job, once, shifted, within
from polyclinic.engines.request_schedule import MOST_MARKS, TESTS, Progress, Request, Schedule, marked, marks_problem


def order(**changes: Any) -> SimpleNamespace:
    fields = {"mode": "rounds", "score_every": 0, "test": "", "best": {}}
    plan = {"sites": ["a", "b", "c"], "rounds": changes.pop("rounds", 6)}
    return SimpleNamespace(plan=plan, **{**fields, **changes})


def schedule(jobs: Any = (Job("train"),), site: str = "a", batches: int = 0, **changes: Any) -> Schedule:
    return Schedule.of(order(**changes), jobs, site, batches)


def progress(*asked: tuple[int, str] | tuple[int, str, str]) -> Progress:
    contents: dict[tuple[int, str], frozenset[str]] = {}
    for round, job, *content in asked:
        contents[round, job] = contents.get((round, job), frozenset()) | {content[0] if content else "old"}
    return Progress(contents)


def why(s: Schedule, round: int, job: str, *before: Any, content: str = "new", look: bool = False) -> str:
    return s.problem(Request(round, job, content, look), progress(*before)) or ""


BEST = {"metric": "auc", "higher": True}
SCORED: dict[str, Any] = {"score_every": 2, "test": "score/test", "best": BEST}


# Jobs ---------------------------------------------------------------------------------------------------------------


def test_a_job_comes_in_its_rounds_and_no_other() -> None:
    assert [Job("x", 2, 4).comes_in(r) for r in range(6)] == [False, False, True, True, True, False]
    assert [Job("x", 2).comes_in(r) for r in (1, 2, 2**40)] == [False, True, True]
    assert [once("x").comes_in(r) for r in (-1, 0, 1)] == [False, True, False]
    assert (once("x").static, once("x", static=False).static, Job("x").static) == (True, False, False)


def test_how_often_a_job_comes_follows_from_the_minibatches() -> None:
    assert (Job("x").most(7), Job("x", per_batch=1).most(7), Job("x", count=0, per_batch=2).most(7)) == (1, 8, 14)


def test_two_phases_share_the_rounds() -> None:
    jobs = (Job("a"), Job("b", 1, 3), Job("c", 4), once("d"))
    assert within(jobs, 2) == (Job("a", last=1), Job("b", 1, 1), once("d"))
    assert within(jobs, 5) == (Job("a", last=4), Job("b", 1, 3), Job("c", 4, 4), once("d"))
    assert within(jobs, 0) == ()
    assert shifted(jobs, 2) == (Job("a", 2), Job("b", 3, 5), Job("c", 6), Job("d", 2, 2, static=True))


def test_a_job_travels_as_a_table() -> None:
    job = Job("x", 1, 2, 3, 4, True, False, ("a", "b"))
    assert Job.from_table({**job.to_table(), "sites": ["a", "b"]}) == job


# Training -----------------------------------------------------------------------------------------------------------


def test_every_round_that_was_approved_and_no_other() -> None:
    s = schedule()
    assert [bool(why(s, r, "train")) for r in (-1, 0, 5, 6)] == [True, False, False, True]
    assert "'train' in round 6 is not in the schedule. The schedule: 'train' in rounds 0 to 5" in why(s, 6, "train")


@pytest.mark.parametrize(
    "job",
    [
        "train ",
        " train",
        "Train",
        "train\n",
        "trai",
        "describe",
        "",
        "score/train",
        "predict/train",
        "predict/val",
        "explain/val",
        "explain/train",
        "show/test",
        "score/val",
        "score/test",
        "score/unlabeled",
        "score/val/x",
    ],
)
def test_job_names_are_compared_exactly(job: str) -> None:
    assert "is not in the schedule" in why(schedule(), 0, job)


def test_one_content_for_each_round_and_job() -> None:
    s = schedule()
    assert "other content before, and is answered once" in why(s, 0, "train", (0, "train"))
    assert why(s, 0, "train", (0, "train", "new")) == ""  # the same content is the same request
    assert why(s, 1, "train", (0, "train")) == ""


def test_jobs_that_come_several_times_have_a_bound() -> None:
    s = schedule((Job("front", per_batch=1), Job("tail", count=0, per_batch=1)), batches=2)
    two = [(0, "front", "1"), (0, "front", "2")]
    assert why(s, 0, "front", *two) == ""
    assert "is answered 3 times" in why(s, 0, "front", *two, (0, "front", "3"))
    assert why(s, 0, "tail", (0, "tail", "1")) == ""
    assert "is answered 2 times" in why(s, 0, "tail", (0, "tail", "1"), (0, "tail", "2"))
    assert "'front' in rounds 0 to 5, 3 times each; 'tail' in rounds 0 to 5, 2 times each" in str(s)


def test_the_count_of_one_job_is_not_that_of_another() -> None:
    s = schedule((Job("train"), Job("send")))
    assert why(s, 0, "send", (0, "train")) == ""
    assert why(s, 0, "train", (0, "send")) == ""


def test_a_static_statistic_comes_in_the_first_round_alone() -> None:
    s = schedule((once("count"), Job("train")))
    assert why(s, 0, "count") == ""
    assert "is not in the schedule. The schedule: 'count' in round 0; 'train' in rounds 0 to 5" in why(s, 1, "count")


def test_rounds_never_go_back() -> None:
    s = schedule()
    assert "comes too late: round 2 was reached" in why(s, 1, "train", (2, "train"))
    assert why(s, 2, "train", (1, "train"), (0, "train")) == ""
    both = schedule((Job("train"), Job("send")))
    assert why(both, 2, "send", (2, "train")) == ""


def test_a_job_for_some_sites_is_not_asked_of_others() -> None:
    jobs = (Job("latent", sites=("b",)), Job("train", sites=("a", "c")))
    assert why(schedule(jobs, "b"), 0, "latent") == ""
    assert why(schedule(jobs, "a"), 0, "train") == ""
    assert "is not in the schedule" in why(schedule(jobs, "a"), 0, "latent")
    assert "is not in the schedule" in why(schedule(jobs, "b"), 0, "train")


def test_a_site_that_does_not_train_is_only_scored() -> None:
    s = schedule(site="elsewhere", **SCORED)
    assert "is not in the schedule" in why(s, 0, "train")
    assert why(s, 2, "score/val") == ""
    assert why(s, 6, "score/test") == ""
    assert str(schedule(site="elsewhere")) == "nothing"


def test_a_survey_describes_once_and_trains_nothing() -> None:
    s = schedule((Job("describe", last=0),), site="elsewhere", mode="survey", **SCORED)
    assert why(s, 0, "describe") == ""
    assert "is answered once" in why(s, 0, "describe", (0, "describe"))
    for round, job in ((1, "describe"), (0, "train"), (2, "score/val"), (1, "score/test")):
        assert "is not in the schedule" in why(s, round, job)


# Scores -------------------------------------------------------------------------------------------------------------


def test_scores_come_as_often_as_the_order_says_and_at_the_end() -> None:
    s = schedule(score_every=4, rounds=6)
    assert [s.regular(r) for r in range(8)] == [True, False, False, False, True, False, True, False]
    assert [bool(why(s, r, "score/val")) for r in (-4, 0, 4, 6, 7, 8)] == [True, True, False, False, True, True]
    assert "'score/val' after every 4 rounds and at the end of 6" in str(s)
    assert "after every round and" in str(schedule(score_every=1))


def test_without_an_order_for_scores_nothing_is_scored() -> None:
    for round in range(7):
        assert "is not in the schedule" in why(schedule(), round, "score/val")
    assert not schedule().regular(6)


def test_a_model_is_scored_once_and_at_its_place() -> None:
    s = schedule(score_every=2)
    assert "is answered once" in why(s, 2, "score/val", (2, "score/val"))
    assert why(s, 2, "score/val", (2, "score/val", "new")) == ""
    assert why(s, 2, "score/val", (2, "train")) == ""  # its content is then bound to what was trained from
    assert "comes too late: round 3" in why(s, 2, "score/val", (3, "train"))
    assert why(s, 2, "train", (2, "score/val")) == ""
    assert "comes too late: round 2" in why(s, 1, "train", (2, "score/val"))


def test_a_method_that_ends_early_is_scored_once_more_and_trains_no_longer() -> None:
    s = schedule((Job("train"), Job("send")), score_every=4)
    assert why(s, 1, "score/val", (0, "train")) == ""
    end = ((0, "train"), (1, "score/val"))
    assert "comes after the final scoring, in round 1" in why(s, 1, "train", *end)
    assert "comes after the final scoring" in why(s, 2, "train", *end)
    assert "comes after the final scoring" in why(s, 2, "score/val", *end)
    assert "comes after the final scoring" in why(s, 4, "score/val", *end)
    assert why(s, 5, "train", (4, "score/val")) == ""  # a regular one ends nothing
    assert why(s, 5, "train", (2, "train")) == ""
    assert why(s, 1, "score/val", (1, "score/val", "new")) == ""


# The test -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("test", "allowed"),
    [
        ("", ()),
        ("score/test", ("score/test",)),
        ("predict/test", ("score/test", "predict/test", "predict/val")),
    ],
)
def test_the_test_is_the_one_that_was_approved(test: str, allowed: tuple[str, ...]) -> None:
    s = schedule(test=test)
    before = ((5, "train"),)
    for job in ("score/test", "predict/test"):
        assert bool(why(s, 6, job, *before)) == (job not in allowed)
    assert "is not in the schedule" in why(s, 6, "predict/train", *before)
    assert bool(why(s, 6, "predict/val", *before, (6, "predict/test"))) == ("predict/val" not in allowed)


def test_validation_is_predicted_only_beside_the_test() -> None:
    assert "only after predict/test" in why(schedule(test="predict/test"), 6, "predict/val", (5, "train"))
    assert "only after predict/test" in why(schedule(test="predict/test"), 6, "predict/val", (6, "score/test"))


def test_only_the_last_model_is_tested_where_none_is_chosen() -> None:
    s = schedule(test="score/test", score_every=2)
    assert why(s, 6, "score/test", (5, "train"), (6, "score/val")) == ""
    assert "is not of the last round, and 6 rounds are complete" in why(
        s, 4, "score/test", (4, "score/val"), (5, "train")
    )
    assert "is not of the last round, and 6 rounds are complete" in why(s, 5, "score/test", (5, "train"))
    assert why(s, 3, "score/test", (2, "train")) == ""  # ended early; nothing is trained after it
    assert "2 rounds are complete" in why(s, 1, "score/test", (2, "score/val"))
    for round in (0, -1, 7):
        assert "is not in the schedule" in why(s, round, "score/test")
    assert why(s, 1, "score/test") == ""


def test_a_scored_model_is_tested_where_the_best_is_chosen() -> None:
    s = schedule(**SCORED)
    before = [(2, "score/val"), (4, "score/val"), (5, "train"), (6, "score/val")]
    assert why(s, 2, "score/test", *before) == ""
    assert why(s, 4, "score/test", (5, "train")) == ""  # the site was away when it was scored
    assert "is neither of the last round nor of one whose model was scored" in why(s, 3, "score/test", *before)
    early = ((0, "train"), (1, "score/val"))
    assert why(s, 1, "score/test", *early) == ""
    assert not schedule(best=BEST, score_every=0).best
    assert not schedule(score_every=2).best
    assert schedule(**SCORED).best


def test_there_is_one_test_and_nothing_is_trained_or_scored_after_it() -> None:
    s = schedule(**{**SCORED, "test": "predict/test"})
    tested = ((2, "score/val"), (3, "train"), (2, "predict/test"))
    assert "is a second test: the model of round 2 was tested" in why(s, 4, "score/test", *tested)
    assert why(s, 2, "score/test", *tested) == ""
    assert why(s, 2, "predict/val", *tested) == ""
    assert "is answered once" in why(s, 2, "predict/test", *tested)
    assert "comes after the test" in why(s, 4, "train", *tested)
    assert "comes after the test" in why(s, 4, "score/val", *tested)
    assert why(s, 3, "train", *tested, (3, "train", "new")) == ""  # what was begun before is no new request


def test_only_tests_look_back() -> None:
    s = schedule(**SCORED)
    assert why(s, 2, "score/test", (2, "score/val"), look=True) == ""
    for job in ("score/val", "train"):
        assert "only tests may" in why(s, 2, job, look=True)


def test_a_refusal_says_what_the_schedule_allows() -> None:
    text = str(schedule(**{**SCORED, "test": "predict/test"}))
    assert text == (
        "'train' in rounds 0 to 5; 'score/val' after every 2 rounds and at the end of 6; 'score/test' once, at the end; "
        "'predict/test' once, at the end; 'predict/val' once, at the end"
    )
    assert "'x' in rounds 1 to 3" in str(schedule((Job("x", 1, 3),)))
    assert "'x' in rounds 1 to 5" in str(schedule((Job("x", 1, 30),)))
    assert "'x' in round 5" in str(schedule((Job("x", 5),)))


# One model in one place ----------------------------------------------------------------------------------------------


def test_what_is_scored_is_what_is_trained_from() -> None:
    s = schedule((Job("gradient"), Job("train"), Job("weigh", at_start=False)), **SCORED)
    assert s.bound(Request(2, "score/val", "")) == ((("gradient", "train"), False),)
    assert s.bound(Request(2, "train", "")) == ((("score/val",), False),)
    assert s.bound(Request(2, "weigh", "")) == ()
    assert s.bound(Request(99, "train", "")) == ()
    assert s.bound(Request(2, "score/test", "")) == ((("score/val", *TESTS), True), (("gradient", "train"), False))


def test_without_scores_only_the_tests_are_bound_to_one_another() -> None:
    s = schedule(test="predict/test")
    assert s.bound(Request(2, "train", "")) == ()
    assert s.bound(Request(6, "predict/val", "")) == ((TESTS, True),)


def test_marks_are_compared_where_both_have_them_or_as_a_whole() -> None:
    one, more = {"params": "1"}, {"params": "1", "momentum": "2"}
    assert marks_problem(one, more, whole=False) is None
    assert "'momentum' differs" in str(marks_problem(one, more, whole=True))
    assert "'momentum' differs" in str(marks_problem(more, one, whole=True))
    assert "a different model from the earlier request of this round ('params' differs)" in str(
        marks_problem({"params": "3"}, more, False)
    )
    assert marks_problem(more, dict(more), whole=True) is None
    assert marks_problem({"ends": "1"}, one, whole=False) is None


def test_marks_are_bounded_and_the_model_is_always_among_them() -> None:
    names = [f"bank.{k:04}" for k in range(1000)] + ["params"]
    assert len(marked(names)) == MOST_MARKS
    assert marked(names)[:2] == ("params", "bank.0000")
    assert marked(["b", "a"]) == ("a", "b")


# What is not reported -----------------------------------------------------------------------------------------------------


def test_a_schedule_that_says_nothing_of_scores_and_tests_has_none() -> None:
    s = Schedule((Job("train"),), 0, 3)
    assert (s.score_every, s.test, s.best) == (0, "", False)
    assert str(s) == "'train' in rounds 0 to 2"
    for job in ("score/val", *TESTS):
        assert "is not in the schedule" in why(s, 3, job, (2, "train"))
    assert Request(0, "train", "x").look is False


def test_nothing_is_reached_or_complete_before_the_first_request_and_a_test_completes_nothing() -> None:
    assert (progress().reached, progress().complete, progress().tested, progress().scored) == (0, 0, None, frozenset())
    tested = progress((1, "train"), (4, "score/test"))
    assert (tested.reached, tested.complete, tested.tested) == (1, 2, 4)
    assert (progress((3, "score/val")).reached, progress((3, "score/val")).complete) == (3, 3)


def test_without_minibatches_a_job_for_each_of_them_never_comes() -> None:
    s = Schedule.of(order(), (Job("tail", count=0, per_batch=1),), "a")
    assert "is answered 0 times" in why(s, 0, "tail")


def test_a_survey_has_one_round_whatever_the_plan_says() -> None:
    s = schedule((Job("describe"),), site="elsewhere", mode="survey")
    assert why(s, 0, "describe") == ""
    assert "is not in the schedule" in why(s, 1, "describe")


def test_where_every_round_is_scored_every_model_may_be_the_best() -> None:
    s = schedule(**{**SCORED, "score_every": 1})
    assert s.best
    assert [s.regular(r) for r in (1, 3, 6)] == [True] * 3
    assert why(s, 3, "train", (2, "score/val")) == ""
    assert why(s, 1, "score/test", (1, "score/val"), (2, "train")) == ""


def test_of_a_request_with_very_many_trees_64_are_remembered() -> None:
    assert len(marked([f"{k:04}" for k in range(65)])) == 64


def test_the_jobs_of_tests_are_named_as_in_the_protocol() -> None:
    assert TESTS == ("score/test", "predict/test", "predict/val")

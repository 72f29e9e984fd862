"""Costs of a method follow from its records: means over runs, sums over sites, bytes until a target is reached."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from polyclinic.evaluation import costs
from polyclinic.evaluation.costs import Cost, Curve, Target, learning_curve
from polyclinic.evaluation.records.record_schema import Round, RunInfo, Scores
from polyclinic.evaluation.records.run_reader import Run
from polyclinic.evaluation.site_scores import decimals, mean_over_sites, worst_site

INFO = RunInfo.model_validate(
    {
        "name": "x",
        "task": "classification",
        "metric": "auc",
        "sites": [{"name": "a"}, {"name": "b"}, {"name": "x", "role": "external"}],
        "methods": [{"label": "local"}, {"label": "fedavg"}, {"label": "none"}],
        "seeds": [0, 1],
    }
)
AUC = {(0, 1): 0.5, (0, 2): 0.7, (0, 3): 0.9, (1, 1): 0.6, (1, 2): 0.6, (1, 3): 0.6}


def rounds(method: str, up: Mapping[str, int], down: Mapping[str, int], **more: Any) -> list[Round]:
    common = {"kind": "round", "method": method, "bytes_up": up, "bytes_down": down, "seconds": {"a": 2.0}, "wall": 3.0}
    return [Round.model_validate(common | {"seed": seed, "round": r} | more) for seed, r in AUC]


def scores(method: str, add: float = 0.0) -> list[Scores]:
    """The mean over a and b is that of ``AUC``, plus ``add``; other roles and sites have other values."""
    found = []
    for (seed, r), value in AUC.items():
        places = [
            ("a", "val", value + add - 0.1),
            ("b", "val", value + add + 0.1),
            ("x", "val", 0.0),
            ("a", "train", 1.0),
        ]
        for site, role, score in places:
            line = {"kind": "scores", "method": method, "seed": seed, "round": r, "role": role, "site": site}
            found.append(Scores.model_validate(line | {"metrics": {"auc": score, "mae": 1 - score}}))
    return found


def of(*lines: Any) -> Run:
    return Run(Path("x"), INFO, tuple(lines))


def cost_of(*given: Any) -> Cost:
    found = costs.cost_of(*given)
    assert found is not None
    return found


def target_of(*given: Any) -> Target:
    found = costs.target_of(*given)
    assert found is not None
    return found


RUN = of(*rounds("fedavg", {"a": 10, "b": 30, "server": 7}, {"a": 1, "b": 1, "server": 1}), *scores("fedavg"))


def test_a_curve_is_the_mean_over_training_sites_and_seeds() -> None:
    curve = learning_curve(RUN, "fedavg", "auc")
    assert curve.rounds == (1, 2, 3)
    assert curve.values == pytest.approx((0.55, 0.65, 0.75))
    assert learning_curve(RUN, "fedavg", "auc", "a").values == pytest.approx((0.45, 0.55, 0.65))
    assert learning_curve(RUN, "fedavg", "auc", "x").values == pytest.approx((0.0, 0.0, 0.0))
    assert learning_curve(RUN, "local", "auc") == learning_curve(RUN, "fedavg", "f1") == Curve((), ())
    part = of(*[s for s in RUN.curves if (s.seed, s.round) != (1, 3)])
    assert learning_curve(part, "fedavg", "auc").values == pytest.approx((0.55, 0.65, 0.9))


def test_the_target_is_what_local_training_reaches_or_near_the_best() -> None:
    both = of(*scores("local", 0.1), *scores("fedavg"))
    assert target_of(both, "auc", True).value == pytest.approx(0.85)
    assert target_of(both, "mae", False).value == pytest.approx(0.15)
    assert "local training" in target_of(both, "auc", True).meaning
    assert target_of(RUN, "auc", True).value == pytest.approx(0.98 * 0.75)
    assert target_of(RUN, "auc", True).meaning == "98 % of the best that any method reaches"
    assert target_of(RUN, "mae", False).value == pytest.approx(0.25 / 0.98)
    assert target_of(RUN, "mae", False).meaning.startswith("within 2 % of the best")
    assert costs.target_of(of(), "auc", True) is None


def test_costs_are_those_of_one_run_at_the_sites_of_the_data() -> None:
    cost = cost_of(RUN, "fedavg", "auc", True, None)
    assert (cost.label, cost.rounds, cost.wall) == ("fedavg", 3, 9.0)
    assert (dict(cost.up), dict(cost.down), dict(cost.seconds)) == ({"a": 30, "b": 90}, {"a": 3, "b": 3}, {"a": 6})
    assert cost.per_site == 63
    assert not cost.in_one_place
    assert (cost.reached, cost.bytes_to_target, dict(cost.by_site_to_target)) == (None, None, {})
    assert costs.cost_of(RUN, "local", "auc", True, None) is None
    pooled = cost_of(
        of(*rounds("pooled", {"server": 7}, {"server": 7}, seconds={"server": 1.0})), "pooled", "auc", True, None
    )
    assert pooled.in_one_place
    assert dict(pooled.seconds) == {"server": 3.0}
    assert pooled.per_site == 0.0
    assert not Cost("x", 1, {}, {"a": 1.0}, {"a": 1.0}, 1.0, []).in_one_place
    assert not Cost("x", 1, {"a": 1.0}, {}, {"a": 1.0}, 1.0, []).in_one_place
    assert not Cost("x", 1, {}, {}, {}, 1.0, []).in_one_place


@pytest.mark.parametrize(("value", "reached"), [(0.55, 1), (0.56, 2), (0.75, 3), (0.76, None)])
def test_bytes_to_the_target_are_counted_up_to_the_first_round_that_reaches_it(
    value: float, reached: int | None
) -> None:
    for metric, target, higher in (("auc", value - 1e-9, True), ("mae", 1 - value + 1e-9, False)):
        cost = cost_of(RUN, "fedavg", metric, higher, Target(target, ""))
        assert cost.reached == reached
        if reached is None:
            assert cost.bytes_to_target is None
            assert cost.by_site_to_target == {}
        else:
            assert cost.by_site_to_target == {"a": 11 * reached, "b": 31 * reached}
            assert cost.bytes_to_target == 21 * reached


def test_lost_replies_are_listed_and_runs_of_different_length_averaged() -> None:
    lines = rounds("fedavg", {}, {}, lost={"b": "no answer"})
    cost = cost_of(of(*lines[:-1]), "fedavg", "auc", True, None)
    assert list(cost.lost) == [(seed, r, "b", "no answer") for seed, r in list(AUC)[:-1]]
    assert cost.rounds == 2  # of 3 and 2, half to even
    assert cost.wall == 7.5
    folded = [line.model_copy(update={"seed": 0, "fold": line.seed}) for line in lines]
    assert cost_of(of(*folded), "fedavg", "auc", True, None).wall == 9.0


def test_scores_that_are_missing_or_not_finite_have_no_part_in_means_and_extremes() -> None:
    scores = {"a": 0.5, "b": None, "c": float("nan"), "d": 0.9, "e": float("inf")}
    assert mean_over_sites(scores) == pytest.approx(0.7)
    assert worst_site(scores, True) == ("a", 0.5)
    assert worst_site(scores, False) == ("d", 0.9)
    assert mean_over_sites({"b": None}) is None
    assert worst_site({"b": None}, True) is None
    assert decimals(0.1 + 0.2) == decimals(0.3) == "0.300"
    assert decimals(0.0005) == decimals(0.0005 + 1e-13)
    assert decimals(1.26, 1) == "1.3"

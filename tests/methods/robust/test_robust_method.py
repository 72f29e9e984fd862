"""Robust, around any method: what it covers, whom it refuses, what it tells people."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from polyclinic.core import tree
from polyclinic.core.aggregates import ElementwiseMean, PerSite, Reply, WeightedMean, merge
from polyclinic.core.pipeline import Transform, send_through
from polyclinic.core.reply_validation import ReplyValidator
from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.optimization.scaffold import Scaffold
from polyclinic.methods.personalization.partial_personalization import fedbn
from polyclinic.methods.registry import Setting, build
from polyclinic.methods.robust.robust_method import PART, Robust, State, apart
from polyclinic.methods.robust.rules.aggregation_rule import Average
from polyclinic.methods.robust.rules.centered_clipping import CentredClipping
from polyclinic.methods.robust.rules.coordinate_wise import Median, TrimmedMean
from polyclinic.methods.robust.rules.fltrust import FLTrust
from polyclinic.methods.robust.rules.krum import Krum, MultiKrum
from polyclinic.methods.robust.rules.outlier_watch import Note, alarms
from polyclinic.testing import check_method, close, equal, portable_copy
from tests.conftest import little_sites
from tests.support.known import known


@dataclass(frozen=True)
class SumsOnly(Transform):
    """Stands for secure summation."""

    @property
    def secure(self) -> bool:  # type: ignore[override]  # a constant
        return True


@dataclass(frozen=True)
class Saying(FedAvg):
    """FedAvg in which ``who`` sends ``what`` in one leaf instead of a number."""

    who: str = ""
    what: float = float("nan")

    def site_update(self, request: Any, memory: Any, site: Any) -> Any:
        reply, memory = super().site_update(request, memory, site)
        if site.name == self.who:
            stat = reply.mean("update")
            name = next(iter(stat.total))
            leaf = stat.total[name].clone()
            leaf.view(-1)[0] = self.what
            reply = Reply({"update": WeightedMean({**stat.total, name: leaf}, stat.weight)})
        return reply, memory


def run(method: Any, task: Any, sites: Any, rounds: Any = 2, **options: Any) -> Any:
    state, steps = method.init(task.first(0)), []
    for step in train(method, InProcess(method, sites), state, rounds=rounds, **options):
        state = step.state
        steps.append(step)
    return state, steps


def test_the_average_under_robust_is_fedavg(task: Classification, local: LocalTraining, sites: dict[str, Site]) -> None:
    plain, _ = run(FedAvg(task, local), task, sites)
    robust, _ = run(Robust(FedAvg(task, local)), task, sites)
    assert close(plain.params, robust.params)
    assert [note.seen for note in robust.notes.values()] == [2, 2, 2]
    assert sum(note.share for note in robust.notes.values()) == pytest.approx(1)


def test_a_rule_covers_all_that_a_method_averages(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    """SCAFFOLD's control variate is aggregated by the same rule: with one site's update kept, so is its variate."""
    method = Robust(Scaffold(task, len(sites), local), Krum())
    request, params = known(method.request(method.init(task.first(0)))), task.first(0)
    replies = [method.site_update(request, {}, sites[name])[0] for name in sorted(sites)]
    state = method.server_update(method.init(params), merge(replies), Site("server"))
    (chosen,) = [site for site, note in state.notes.items() if note.share == 1]
    sent = merge(replies).gather(PART)[chosen]
    for name, leaf in state.inner.control.items():
        assert torch.allclose(leaf, sent[f"control/{name}"])
    assert torch.allclose(state.params["head.bias"], params["head.bias"] + sent["update/head.bias"])


LITTLE = LocalTraining(steps=2, batch_size=8, lr=0.1)
RULES = (Average(), Krum(), MultiKrum(), Median(), TrimmedMean(), CentredClipping())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_changes_no_bit_for_the_others(value: Any, task: Classification) -> None:
    for rule in RULES:
        sites = little_sites(count=5)
        with_it, steps = run(Robust(Saying(task, LITTLE, who="site-2", what=value), rule), task, sites, 2)
        assert all("NaN or infinity" in step.lost["site-2"] for step in steps)
        del sites["site-2"]
        without, _ = run(Robust(FedAvg(task, LITTLE), rule), task, sites, 2)
        assert equal(with_it.params, without.params)
        assert equal({s: n for s, n in with_it.notes.items() if s != "site-2"}, without.notes)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nor_without_any_rule(value: Any, task: Classification) -> None:
    sites = little_sites(count=4)
    with_it, steps = run(Saying(task, LITTLE, who="site-3", what=value), task, sites)
    assert all("site-3" in step.lost for step in steps)
    del sites["site-3"]
    assert equal(with_it.params, run(FedAvg(task, LITTLE), task, sites)[0].params)


def test_what_reaches_the_rule_unchecked_is_refused_there_and_named(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    method = Robust(FedAvg(task, local), Median())
    first = method.init(task.first(0))
    sent = {
        name: method.site_update(known(method.request(first)), {}, site)[0].gather(PART)[name]
        for name, site in sites.items()
    }

    def after(**changed: Any) -> State:
        merged = Reply({PART: PerSite({**sent, **{k.replace("_", "-"): v for k, v in changed.items()}})})
        return method.server_update(first, merged, Site("server"))

    good = sent["site-1"]
    for bad, says in [
        ({**good, "update/head.bias": torch.zeros(7)}, "other tensors"),
        ({**good, "update/more": torch.zeros(2)}, "other tensors"),
        ({n: x for n, x in good.items() if n != "update/head.bias"}, "other tensors"),
        ({**good, "update/head.bias": torch.full((2,), torch.nan)}, "NaN"),
        ({**good, "update/head.bias": torch.zeros(2).double()}, "other tensors"),
        ({**good, "update/": torch.tensor(-3.0)}, "weigh"),
        ({**good, "update/": torch.tensor([1.0, 2.0])}, "weigh"),
        ({}, "other tensors"),
    ]:
        state = after(site_1=bad)
        assert says in state.notes["site-1"].excluded
        assert "site-1" in alarms(state.notes)[0]
        assert equal(state.params, after(site_1=good, site_9={}).params) is False
    with pytest.raises(ValueError, match=r"no update is left: site-0: .*site-1: .*site-2: "):
        after(**{f"site_{k}": {**good, "update/": torch.tensor(0.0)} for k in range(3)})


def test_claims_of_weight_move_no_rule_that_does_not_ask_for_them(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    method = Robust(FedAvg(task, local), Median())
    first = method.init(task.first(0))
    reply = merge(method.site_update(known(method.request(first)), {}, sites[name])[0] for name in sorted(sites))
    boast = dict(reply.gather(PART))
    boast["site-1"] = {**boast["site-1"], "update/": torch.tensor(1e12).double()}
    honest = method.server_update(first, reply, Site("server"))
    boasted = method.server_update(first, Reply({PART: PerSite(boast)}), Site("server"))
    assert close(honest.params, boasted.params)


def test_quarantine_is_a_persons_choice_and_is_seen(task: Classification, local: LocalTraining) -> None:
    sites = little_sites(count=5)
    method = Robust(FedAvg(task, local), MultiKrum(0), quarantined=("site-4",))
    state, steps = run(method, task, sites)
    assert not any(step.lost for step in steps)
    assert state.notes["site-4"].excluded == "it is in quarantine"
    assert state.notes["site-4"].seen == 2
    assert state.notes["site-4"].share == 0
    del sites["site-4"]
    others, _ = run(replace(method, quarantined=()), task, sites)
    assert equal(state.params, others.params)


def test_nobody_is_dropped_for_standing_out(task: Classification, local: LocalTraining) -> None:
    sites = little_sites(count=6)
    state, _ = run(Robust(Saying(task, local, who="site-3", what=1e4)), task, sites, 1)
    assert state.notes["site-3"].outlying == 1
    assert state.notes["site-3"].excluded == ""
    assert state.notes["site-3"].share > 0
    assert state.alarms[0].startswith("site-3: 1 of its 1 updates stood out")
    assert "look at its data before you quarantine it" in state.alarms[0]


def test_a_bound_scales_long_updates_to_the_median_length(task: Classification, local: LocalTraining) -> None:
    sites = little_sites(count=5)
    method = Robust(Saying(task, local, who="site-3", what=1e9), Average(weighted=False), bound=1.0)
    state, _ = run(method, task, sites, 1)
    change = tree.norm(tree.sub(state.params, task.first(0)))
    honest = FedAvg(task, local)
    request = honest.request(honest.init(task.first(0)))
    alone = [tree.norm(honest.site_update(request, {}, site)[0].mean("update").value) for site in sites.values()]
    assert change <= sorted(alone)[-1]


def test_centered_clipping_keeps_its_place_between_rounds(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    method = Robust(FedAvg(task, local), CentredClipping())
    state, _ = run(method, task, sites)
    assert state.last.keys() == {"train"}
    resumed = method.init(task.first(0))
    for step in train(method, InProcess(method, sites), resumed, rounds=1):
        resumed = portable_copy(step.state)
    for step in train(method, InProcess(method, sites), resumed, rounds=2):
        resumed = step.state
    assert equal(state, resumed)


def test_fltrust_with_data_at_the_server(task: Classification, local: LocalTraining, sites: dict[str, Site]) -> None:
    method = Robust(FedAvg(task, local), FLTrust("server"))
    engine = InProcess(method, sites)
    engine.server = replace(engine.server, data={"train": sites["site-0"].data["train"]})
    state = method.init(task.first(0))
    for step in train(method, engine, state, rounds=2):
        state = step.state
    assert state.notes.keys() == sites.keys()
    assert sum(known(n.share) for n in state.notes.values()) == pytest.approx(1)


def test_any_method_may_stand_under_a_rule(task: Classification, local: LocalTraining, sites: dict[str, Site]) -> None:
    check_method(Robust(fedbn(task, local), TrimmedMean()), task.first(0), sites)
    setting = Setting(task, local, tuple(sites), 3)
    for over in ("scaffold", "fedadam", "fedbn", "fedprox"):
        check_method(build("median", setting, {"over": over}), task.first(0), sites)


def test_a_rule_over_clipped_and_noised_updates(local: LocalTraining, sites: dict[str, Site]) -> None:
    """Sites protect themselves first; the rule then judges what they chose to send."""
    from polyclinic.learning.networks.network_catalog import Network
    from polyclinic.learning.tasks.classification import Classification
    from polyclinic.privacy.gaussian import Clip, Gaussian

    task = Classification(Network("cnn", (1, 8, 8), 2, (("width", 4), ("depth", 2), ("norm", "group"))))
    sent = send_through(FedAvg(task, local, uniform=True), Clip(1.0), Gaussian(0.01))
    state, steps = run(Robust(sent, Median()), task, sites)
    assert not any(step.lost for step in steps)
    assert not any(note.excluded for note in state.notes.values())
    assert 0 < tree.norm(tree.sub(state.params, task.first(0))) < 3


def test_secure_summation_is_refused_in_a_sentence(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    with pytest.raises(ValueError, match="needs each site's reply"):
        send_through(Robust(FedAvg(task, local, uniform=True), Median()), SumsOnly())
    with pytest.raises(ValueError, match="secure summation shows only sums"):
        Robust(send_through(FedAvg(task, local, uniform=True), SumsOnly()), Median())

    class Secret(FedAvg):
        def request(self, state: Any) -> Any:
            return replace(super().request(state), secure=True)

    method = Robust(Secret(task, local), Median())
    with pytest.raises(ValueError, match="leave one of them out"):
        method.request(method.init(task.first(0)))


def test_what_cannot_be_judged_is_refused(task: Classification, local: LocalTraining, sites: dict[str, Site]) -> None:
    with pytest.raises(TypeError, match="weight for every element"):
        apart(Reply({"update": ElementwiseMean.of({"a": torch.ones(2)}, {"a": torch.ones(2)})}), "x")
    with pytest.raises(ValueError, match="bound is a multiple"):
        Robust(FedAvg(task, local), bound=-1)
    with pytest.raises(ValueError, match="which are not sites"):
        build("krum", Setting(task, local, tuple(sites), 3), {"quarantined": ("site-9",)})
    plain = Reply({"seen": PerSite({"x": {"a": torch.ones(2)}})})
    assert apart(plain, "x") is plain


def test_gate_still_stands_before_the_rule(task: Classification, local: LocalTraining) -> None:
    sites = little_sites(count=4)
    _, steps = run(Robust(Saying(task, local, who="site-0")), task, sites, 1, gate=ReplyValidator())
    assert "site-0" in steps[0].lost


def test_alarms_speak_of_those_who_stand_out_often() -> None:
    notes = {"a": Note(10, 1, 9.0, 2.0, 0.5), "b": Note(10, 6, 5.0, 12.0, -0.5), "c": Note(10, 0, 0.1, 1.0, 0.9)}
    assert [line.split(":")[0] for line in alarms(notes)] == ["b"]
    assert [line.split(":")[0] for line in alarms(notes, often=0.1)] == ["a", "b"]
    assert alarms({}) == ()

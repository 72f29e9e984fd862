"""FedMoCo and its two phases: where it is FedAvg of MoCo, what lasts, what travels, and that no target is read."""

import pytest
import torch

from polyclinic.core.site import Site
from polyclinic.learning.objectives.contrastive import Contrast
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.task_evaluation import Evaluated, evaluate
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.base.phases import Then, share_of
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.self_supervised.fedmoco import FedMoCo, fedmoco
from tests.conftest import little_sites
from tests.support.few_labels import half_labeled, near, run, same, with_other_targets

LOCAL = LocalTraining(epochs=1, batch_size=8, lr=0.05)


def test_then_is_the_second_method_where_the_first_has_no_rounds(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    both, _ = run(Then(FedAvg(task, local, lr=0.0), FedAvg(task, local), 0), sites, task.first(0))
    plain, _ = run(FedAvg(task, local), sites, task.first(0))
    assert same(both.state.params, plain.state.params)


def test_a_first_phase_that_moves_nothing_changes_nothing_but_the_count(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    both, _ = run(Then(FedAvg(task, local, lr=0.0), FedAvg(task, local), 2), sites, task.first(0), 4)
    plain, _ = run(FedAvg(task, local), sites, task.first(0), 2)
    assert near(
        {k: v for k, v in both.state.params.items() if "running" not in k},
        {k: v for k, v in plain.state.params.items() if "running" not in k},
    )
    assert both.request.round == 3


@pytest.mark.parametrize(
    ("rounds", "share", "first"), [(10, 0.5, 5), (10, 0.0, 0), (3, 0.9, 2), (2, 0.01, 1), (1, 0.5, 0)]
)
def test_share_of_rounds(rounds: int, share: float, first: int) -> None:
    assert share_of(rounds, share) == first


def test_a_share_that_leaves_nothing_to_the_task_is_refused() -> None:
    with pytest.raises(ValueError, match="less than 1"):
        share_of(10, 1.0)


def test_the_head_waits_and_the_encoder_learns(task: Classification, sites: dict[str, Site]) -> None:
    step, engine = run(fedmoco(task, LOCAL, 4), sites, task.first(0), 2)
    start, now = task.first(0), step.state.params
    assert all(torch.equal(start[name], now[name]) for name in start if name.startswith("head."))
    assert not same(start, now)
    assert engine.memory["site-0"].keys() == {"first/queue"}
    step, engine = run(fedmoco(task, LOCAL, 4), sites, task.first(0), 4)
    assert engine.memory["site-0"] == {}
    assert not torch.equal(start["head.weight"], step.state.params["head.weight"])


def test_targets_are_never_read_in_the_first_phase(task: Classification) -> None:
    sites = half_labeled()
    method = fedmoco(task, LOCAL, 4)
    one, two = (run(method, s, task.first(0), 4)[0].state for s in (sites, with_other_targets(sites)))
    assert same(one.params, two.params)


def test_alone_without_transfer_the_weight_does_not_matter(task: Classification) -> None:
    site = {"site-1": little_sites()["site-1"]}
    start = task.first(0)
    found = [
        run(FedMoCo(Contrast(task, 8), LOCAL, transfer=0, power=p), site, start)[0].state.whole for p in (0.0, 3.0)
    ]
    assert near(found[0], found[1], atol=1e-6)


def test_weights_are_examples_where_the_power_is_0(task: Classification, sites: dict[str, Site]) -> None:
    method = FedMoCo(Contrast(task, 8), LOCAL, power=0.0)
    request = method.request(method.init(task.first(0)))
    reply, memory = method.site_update(request, {}, sites["site-0"])
    assert reply.mean("update").weight == 12 + 12  # labeled and unlabeled
    assert memory["queue"]["keys"].shape == (24, 8)
    weighed, _ = FedMoCo(Contrast(task, 8), LOCAL, power=1.0).site_update(request, {}, sites["site-0"])
    assert 0 < weighed.mean("update").weight < 24


def test_the_queue_is_bounded_and_ends_with_the_newest_keys(task: Classification, sites: dict[str, Site]) -> None:
    method = FedMoCo(Contrast(task, 8), LOCAL, queue=10)
    request = method.request(method.init(task.first(0)))
    old = {"queue": {"keys": torch.full((10, 8), 7.0)}}
    _, memory = method.site_update(request, old, sites["site-0"])
    assert memory["queue"]["keys"].shape == (10, 8)
    assert not bool((memory["queue"]["keys"] == 7).any())


def test_what_others_look_like_arrives_and_matters(task: Classification, sites: dict[str, Site]) -> None:
    method = FedMoCo(Contrast(task, 8), LOCAL)
    step, _ = run(method, sites, task.first(0), 1)
    request = method.request(step.state)
    assert request.trees["gaussians"]["site-1/mean"].shape == (8,)
    assert request.trees["gaussians"]["site-1/covariance"].shape == (8, 8)
    others = method._others(request.trees["gaussians"], "site-1")
    assert set(others) == {"site-0", "site-2"}
    with_them, _ = method.site_update(request, {}, sites["site-1"])
    alone = FedMoCo(Contrast(task, 8), LOCAL, transfer=0).site_update(request, {}, sites["site-1"])[0]
    assert not near(with_them.mean("update").total, alone.mean("update").total)


def test_both_phases_end_in_a_model_that_works(task: Classification) -> None:
    sites = half_labeled(labeled=2)
    method = Evaluated(fedmoco(task, LocalTraining(epochs=2, batch_size=8, lr=0.05), 6), task)
    step, engine = run(method, sites, task.first(0), 6)
    scores = evaluate(method, engine, step.state, engine.sites)
    assert sum(float(s["accuracy"]) for s in scores.values()) / 3 > 0.7

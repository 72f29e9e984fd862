"""Secure summation on both engines: the sum is the sum, lost sites are survived, and too few are refused."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply
from polyclinic.core.method import Method, Request
from polyclinic.core.pipeline import send_through
from polyclinic.core.rounds import Step, TooFewReplies, train
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.engines.local.in_process import InProcess
from polyclinic.engines.local.worker_pool import Workers
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.privacy.gaussian import Clip
from polyclinic.secure_aggregation import SecureSum
from polyclinic.testing import equal
from tests.conftest import little_sites


@dataclass(frozen=True)
class Failing(FedAvg):
    """FedAvg, but some sites fail."""

    fails: tuple[str, ...] = ()

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        if site.name in self.fails:
            raise RuntimeError("the disk is full")
        return super().site_update(request, memory, site)


def run(method: Method[Any], engine: InProcess | Workers, params: Tree) -> tuple[Tree, list[Step[Any]]]:
    state = method.init(params)
    steps: list[Step[Any]] = []
    for step in train(method, engine, state, rounds=2):
        state = step.state
        steps.append(step)
    engine.close()
    return state.params, steps


@pytest.mark.parametrize("engine", [InProcess, Workers])
def test_a_secure_sum_is_the_sum(engine: type[InProcess | Workers], task: Classification, local: LocalTraining) -> None:
    sites = little_sites(count=4)
    plain, _ = run(
        FedAvg(task, local, uniform=True), InProcess(FedAvg(task, local, uniform=True), sites), task.first(0)
    )
    method = send_through(FedAvg(task, local, uniform=True), Clip(100.0), SecureSum())
    secret, steps = run(method, engine(method, sites), task.first(0))
    for name in plain:
        assert torch.allclose(plain[name], secret[name], atol=1e-4), name
    assert not any(step.lost for step in steps)
    assert set(steps[0].bytes_up) == set(sites)
    assert steps[0].bytes_up["site-0"] >= 4 * tree.size(task.first(0))


def test_both_engines_give_the_same_bits(task: Classification, local: LocalTraining) -> None:
    method = send_through(FedAvg(task, local, uniform=True), Clip(100.0), SecureSum())
    sites = little_sites(count=4)
    assert equal(
        run(method, InProcess(method, sites), task.first(0))[0], run(method, Workers(method, sites), task.first(0))[0]
    )


def test_a_lost_site_is_survived_and_too_many_are_refused(task: Classification, local: LocalTraining) -> None:
    sites = little_sites(count=4)
    one = send_through(Failing(task, local, uniform=True, fails=("site-1",)), Clip(100.0), SecureSum())
    _, steps = run(one, InProcess(one, sites), task.first(0))
    assert list(steps[0].lost) == ["site-1"]
    assert "the disk is full" in steps[0].lost["site-1"]
    two = send_through(Failing(task, local, uniform=True, fails=("site-1", "site-2")), Clip(100.0), SecureSum())
    with pytest.raises(TooFewReplies, match="a secure sum needs 3"):
        run(two, InProcess(two, sites), task.first(0))

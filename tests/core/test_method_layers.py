"""Layers of a wrapped method are found at every level, and capabilities pass through wrappers."""

from collections.abc import Callable
from typing import Any

import pytest

from polyclinic.attacks.adversaries import SignFlip
from polyclinic.attacks.poisoning import Poisoned
from polyclinic.compression.downlink import received_through
from polyclinic.compression.quantization import BFloat16
from polyclinic.compression.topk import TopK
from polyclinic.core.method import Method, layers, unwrap
from polyclinic.core.pipeline import UplinkPipeline, send_through
from polyclinic.core.rounds import undiscounted
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.task_evaluation import Evaluated
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.aggregation.fedbuff import FedBuff
from polyclinic.methods.base.phases import Then
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.personalization.partial_personalization import Personal, fedbn
from polyclinic.methods.robust.robust_method import Robust
from polyclinic.methods.self_supervised.fedmoco import fedmoco
from polyclinic.methods.topology.gossip import Gossip
from polyclinic.privacy.gaussian import Clip
from polyclinic.secure_aggregation import SecureSum


def received(task: Classification, method: Method[Any]) -> Method[Any]:
    return received_through(method, task.first(0), BFloat16())


def test_layers_are_found_at_every_level(task: Classification, local: LocalTraining) -> None:
    average = FedAvg(task, local, uniform=True)
    method = Evaluated(received(task, send_through(Personal(average, bool), Clip(1.0))), task)
    assert [type(layer).__name__ for layer in layers(method)] == [
        "Evaluated",
        "DownlinkPipeline",
        "UplinkPipeline",
        "Personal",
        "FedAvg",
    ]
    assert unwrap(method, FedAvg) is average
    assert unwrap(method, Robust) is None
    both = Then(send_through(average, Clip(1.0)), Gossip(task, local), 2)
    assert unwrap(both, UplinkPipeline) is both.first
    assert unwrap(both, Gossip) is both.second


def test_capabilities_pass_through_wrappers(task: Classification, local: LocalTraining) -> None:
    assert Personal(Gossip(task, local), bool).capabilities.needs_each_reply
    assert Then(FedAvg(task, local), Gossip(task, local), 1).capabilities.needs_each_reply
    assert Then(Gossip(task, local), FedAvg(task, local), 1).capabilities.needs_each_reply
    assert not Then(FedAvg(task, local), FedAvg(task, local), 1).capabilities.needs_each_reply
    assert Robust(FedAvg(task, local)).capabilities.needs_each_reply
    assert not Robust(FedAvg(task, local)).capabilities.uniform
    assert Robust(FedAvg(task, local, uniform=True)).capabilities.uniform
    discount = Evaluated(FedBuff(task, local, staleness="hinge", b=1), task).capabilities.discount
    assert discount is not None
    assert discount(5) < 1.0
    assert (FedAvg(task, local).capabilities.discount or undiscounted)(5) == 1.0


def test_unequal_weights_are_refused_below_a_wrapper(task: Classification, local: LocalTraining) -> None:
    with pytest.raises(ValueError, match=r"write FedAvg\(..., uniform=True\)"):
        send_through(fedbn(task, local), Clip(1.0))
    send_through(fedbn(task, local, uniform=True), Clip(1.0))


def test_a_method_in_phases_is_refused_under_secure_summation(task: Classification, local: LocalTraining) -> None:
    with pytest.raises(ValueError, match="needs each site's reply"):
        send_through(fedmoco(task, local, 4), SecureSum())


@pytest.mark.parametrize(
    "hide", [lambda task, method: method, received, lambda task, m: received(task, received(task, m))]
)
def test_secure_transforms_are_found_below_every_level(
    task: Classification, local: LocalTraining, hide: Callable[[Classification, Method[Any]], Method[Any]]
) -> None:
    secure = hide(task, send_through(FedAvg(task, local), SecureSum()))
    with pytest.raises(ValueError, match="secure summation shows only sums"):
        Robust(secure)
    with pytest.raises(ValueError, match="SecureSum would encode them first"):
        Poisoned(secure, ("site-0",), SignFlip())
    packed = hide(task, send_through(FedAvg(task, local), TopK(0.1)))
    with pytest.raises(ValueError, match="TopK would encode them first"):
        Poisoned(packed, ("site-0",), SignFlip())

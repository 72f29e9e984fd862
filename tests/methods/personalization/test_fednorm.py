"""FedNorm lies between FedAvg and FedBN, and equals each in its limit."""

from typing import Any

import pytest
import torch

from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.personalization.fednorm import FedNorm
from polyclinic.methods.personalization.partial_personalization import fedbn
from polyclinic.testing import check_method, close

NAMES = ("site-0", "site-1", "site-2")


def run(method: Any, params: Any, sites: Any, rounds: Any = 2) -> Any:
    federation, state = InProcess(method, sites), method.init(params)
    for step in train(method, federation, state, rounds=rounds):
        state = step.state
    request = method.request(state)
    return state, {s: method.site_model(request.for_site(s), federation.memory[s]) for s in sites}


@pytest.mark.parametrize("modalities", [(), ("mr", "mr", "mr")])
def test_with_one_modality_it_is_fedavg(task: Any, local: Any, sites: dict[str, Site], modalities: Any) -> None:
    state, models = run(FedNorm(task, NAMES, local, modalities=modalities), task.first(), sites)
    plain, _ = run(FedAvg(task, local), task.first(), sites)
    assert close(state.params, plain.params)
    assert close(models["site-1"], plain.params)


def test_with_a_modality_for_each_site_it_is_fedbn(task: Any, local: Any, sites: dict[str, Site]) -> None:
    _, ours = run(FedNorm(task, NAMES, local, modalities=("a", "b", "c")), task.first(), sites)
    _, theirs = run(fedbn(task, local), task.first(), sites)
    assert close(ours, theirs)


def test_sites_of_one_modality_share_its_layers_and_no_others(task: Any, local: Any, sites: dict[str, Site]) -> None:
    method = FedNorm(task, NAMES, local, modalities=("ct", "mr", "ct"))
    check_method(method, task.first(), sites)
    state, models = run(method, task.first(), sites)
    name = "encoder.1.running_mean"
    assert torch.equal(models["site-0"][name], models["site-2"][name])
    assert not torch.equal(models["site-0"][name], models["site-1"][name])
    stranger = method.site_model(method.request(state).for_site("elsewhere"), {})
    torch.testing.assert_close(stranger[name], (models["site-0"][name] + models["site-1"][name]) / 2)


def test_wrong_modalities_are_refused(task: Classification, local: LocalTraining) -> None:
    with pytest.raises(ValueError, match="2 for 3 sites"):
        FedNorm(task, NAMES, local, modalities=("ct", "mr"))
    with pytest.raises(ValueError, match="full stop"):
        FedNorm(task, NAMES, local, modalities=("ct", "mr", "t1.w"))

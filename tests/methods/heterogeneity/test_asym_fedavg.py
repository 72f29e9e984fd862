"""AsymFedAvg: FedAvg where all networks are the same, and else over the tensors that all have."""

import numpy as np
import pytest
import torch

from polyclinic.core.aggregates import PerSite
from polyclinic.core.rounds import train
from polyclinic.engines.local.in_process import InProcess
from polyclinic.errors import ConfigError
from polyclinic.learning.networks.model_tree import load
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.segmentation import Segmentation
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.heterogeneity.asym_fedavg import AsymFedAvg
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.registry import Setting, build
from polyclinic.testing import check_method
from tests.conftest import segmentation_sites
from tests.support.few_labels import run, same

TASK = Segmentation(Network("nnunet", (1, 16, 16), 2, (("width", 4), ("widest", 8))))
LOCAL = LocalTraining(epochs=1, batch_size=4, lr=0.05)
SITES = tuple(segmentation_sites())


def test_with_equal_networks_it_is_fedavg() -> None:
    first = TASK.first(0)
    step, _ = run(AsymFedAvg(TASK, SITES, LOCAL), segmentation_sites(), first, rounds=2)
    other, _ = run(FedAvg(TASK, LOCAL), segmentation_sites(), first, rounds=2)
    assert same(step.state.params, other.state.params)


@pytest.mark.parametrize("uniform", [False, True])
def test_common_tensors_are_averaged_and_others_stay(uniform: bool) -> None:
    """One round against an average in NumPy. A network of another width at the bottom differs in its lower stages."""
    method = AsymFedAvg(TASK, SITES, LOCAL, {"site-2": {"widest": 6}}, uniform=uniform)
    sites, first = segmentation_sites(), TASK.first(0)
    engine, state = InProcess(method, sites), method.init(first)
    common = set(state.common)
    assert 0 < len(common) < len(first)
    assert all(name.startswith(("encoder.stages.0", "decoder")) for name in common)
    ends = {}
    for name, site in sites.items():
        network = method.network(name)
        own = (
            {k: v for k, v in Segmentation(network).first(0).items() if k not in common}
            if name == "site-2"
            else {k: v for k, v in first.items() if k not in common}
        )
        ends[name] = LOCAL.fit(TASK.with_network(network), {**own, **state.common}, site, 0)
    for step in train(method, engine, state, rounds=1):
        state = step.state
    sizes = np.array([1.0 if uniform else len(site.data["train"]) for site in sites.values()])
    for key in common:
        stacked = np.stack([end[key].double().numpy() for end in ends.values()])
        np.testing.assert_allclose(state.common[key].numpy(), np.tensordot(sizes / sizes.sum(), stacked, 1), atol=1e-6)
    for name, end in ends.items():
        assert same(engine.memory[name]["own"], {k: v for k, v in end.items() if k not in common})
    for part in step.reply.parts.values():
        assert not isinstance(part, PerSite)
        assert not [key for key in part.total if key not in common]


def test_each_site_predicts_with_its_own_network() -> None:
    method = AsymFedAvg(TASK, SITES, LOCAL, {"site-1": {"widest": 6}})
    sites = segmentation_sites()
    step, engine = run(method, sites, TASK.first(0), rounds=2)
    task = method.prediction_task
    assert task is not None
    trial = method.evaluation_request(step.state)
    for name in sites:
        params = method.site_model(trial.for_site(name), engine.memory[name])
        model = load(task.model(), params).eval()
        alone = load(method.network(name)(), {**engine.memory[name]["own"], **step.state.common}).eval()
        x = torch.randn(2, 1, 16, 16)
        with torch.no_grad():
            assert torch.equal(model(x), alone(x))


def test_promises_with_unequal_networks() -> None:
    method = AsymFedAvg(TASK, SITES, LOCAL, {"site-1": {"widest": 6}, "site-2": {"norm": "group"}})
    check_method(method, TASK.first(0), segmentation_sites())


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="networks: no site is called 'site-9'; there are site-0, site-1, site-2"):
        AsymFedAvg(TASK, SITES, LOCAL, {"site-9": {"width": 2}})
    built = build("asym-fedavg", Setting(TASK, LOCAL, SITES, 2), {"networks": {"site-0": {"width": 5}}})
    assert isinstance(built, AsymFedAvg)
    assert built.networks == {"site-0": {"width": 5}}

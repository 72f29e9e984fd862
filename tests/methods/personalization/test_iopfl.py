"""IOP-FL's running average by hand; inside it is that model, outside a mixture that adapts and forgets."""

import torch

from polyclinic.core import tree
from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.learning.networks.model_tree import cached_model
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.segmentation import Segmentation
from polyclinic.learning.tasks.task_evaluation import Evaluated, evaluate, outputs
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.personalization.iopfl import IOPFL
from polyclinic.testing import check_method, close, equal
from tests.conftest import blobs, segmentation_sites

NAMES = ("site-0", "site-1", "site-2")


def run(method, params, sites, rounds):
    federation, state = InProcess(method, sites), method.init(params)
    for step in train(method, federation, state, rounds=rounds):
        state = step.state
    return state, federation


def test_the_global_model_is_fedavgs_and_the_average_runs(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    method = IOPFL(task, NAMES, local, alpha=0.3)
    state, federation = run(method, task.first(), sites, 2)
    plain, _ = run(FedAvg(task, local), task.first(), sites, 2)
    assert close(state.params, plain.params)
    first, _ = run(FedAvg(task, local), task.first(), sites, 1)
    w1, w2 = (local.fit(task, p, sites["site-1"], r) for r, p in enumerate((task.first(), first.params)))
    expected = tree.add(tree.scale(w1, 0.3), tree.scale(w2, 0.7))
    assert close(federation.memory["site-1"]["personal"], expected)
    assert equal(federation.memory["site-1"]["personal"], state.personal["site-1"])


def test_inside_the_personal_model_predicts(task: Classification, local: LocalTraining, sites: dict[str, Site]) -> None:
    method = IOPFL(task, NAMES, local)
    state, federation = run(method, task.first(), sites, 1)
    found = method.site_model(method.evaluation_request(state), federation.memory["site-0"])
    x = sites["site-0"].data["val"].x
    torch.testing.assert_close(
        cached_model(method.prediction_task, found).eval()(x), cached_model(task, state.personal["site-0"]).eval()(x)
    )


def test_outside_without_steps_it_is_the_mean_of_all_models() -> None:
    """Equal weights in every layer: the model whose parameters are the mean of the members'."""
    task = Classification(Network("cnn", (1, 8, 8), 2, (("width", 4), ("depth", 2), ("norm", "group"))))
    method = IOPFL(task, NAMES, LocalTraining(), steps=0)
    state = method.init(task.first())._replace(personal={n: task.first(k + 1) for k, n in enumerate(NAMES)})
    model = cached_model(method.prediction_task, method.site_model(method.evaluation_request(state), {})).eval()
    mean = {n: torch.stack([task.first(k)[n] for k in range(4)]).mean(0) for n in task.first()}
    x = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(model(x), cached_model(task, mean).eval()(x), rtol=1e-4, atol=1e-5)


def test_outside_it_becomes_surer_and_keeps_nothing(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    stranger = blobs(77, 24, (1, 8, 8), shift=0.8)

    def unsure(steps: int) -> float:
        method = IOPFL(task, NAMES, local, steps=steps, adapt_lr=0.02)
        state, _ = run(method, task.first(), sites, 2)
        params = method.site_model(method.evaluation_request(state), {})
        p = outputs(method.prediction_task, params, stranger)["score"]
        again = outputs(method.prediction_task, params, stranger)["score"]
        assert equal(p, again)
        return float(-(p * p.clamp_min(1e-8).log()).sum(1).mean())

    assert unsure(20) < unsure(0)


def test_evaluation_serves_both(task: Classification, local: LocalTraining, sites: dict[str, Site]) -> None:
    method = Evaluated(IOPFL(task, NAMES, local, steps=2), task)
    state, _ = run(method, task.first(), sites, 2)
    everyone = {**sites, "elsewhere": Site("elsewhere", {"val": blobs(5, 9, (1, 8, 8))})}
    assert set(evaluate(method, InProcess(method, everyone), state, list(everyone))) == set(everyone)


def test_masks() -> None:
    task = Segmentation(Network("unet", (1, 16, 16), 2, (("width", 2), ("norm", "batch"))))
    sites = segmentation_sites(2)
    method = IOPFL(task, tuple(sites), LocalTraining(batch_size=4), steps=2)
    check_method(method, task.first(), sites)
    found = outputs(
        method.prediction_task,
        method.site_model(method.evaluation_request(method.init(task.first())), {}),
        sites["site-0"].data["val"],
    )
    assert found["dice"].shape == (4, 1)

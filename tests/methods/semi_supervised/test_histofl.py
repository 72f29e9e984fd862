"""HistoFL: FedAvg without noise; with it, as much as is said on weights and none on biases and statistics."""

from typing import Any

import torch

from polyclinic.core.site import Site
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.task_evaluation import Evaluated, evaluate
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.semi_supervised.histofl import HistoFL
from tests.conftest import Rows
from tests.support.few_labels import run, same


def test_without_noise_it_is_fedavg(task: Classification, local: LocalTraining, sites: dict[str, Site]) -> None:
    step, _ = run(HistoFL(task, local, noise=0.0), sites, task.first(0))
    plain, _ = run(FedAvg(task, local), sites, task.first(0))
    assert same(step.state.params, plain.state.params)


def test_noise_is_in_standard_deviations_of_each_weight(local: LocalTraining, sites: dict[str, Site]) -> None:
    task = Classification(Network("mlp", (1, 8, 8), 2, (("width", 200),)))
    start, site = task.first(0), sites["site-0"]
    method = HistoFL(task, local, noise=0.5)
    request = method.request(method.init(start))
    plain = FedAvg(task, local).site_update(request, {}, site)[0].mean("update").value
    found = method.site_update(request, {}, site)[0].mean("update").value
    for name, leaf in start.items():
        gap = found[name] - plain[name]
        if name.endswith("bias"):
            assert torch.equal(gap, torch.zeros_like(gap))
        else:
            wanted = 0.5 * (leaf + plain[name]).std()
            assert abs(float(gap.std() / wanted) - 1) < 0.15
    again = method.site_update(request, {}, site)[0].mean("update").value
    assert not same(found, again)  # from the operating system, not from the study's seed


def test_batch_statistics_go_as_they_are(task: Classification, local: LocalTraining, sites: dict[str, Site]) -> None:
    request = FedAvg(task).request(FedAvg(task).init(task.first(0)))
    plain, noisy = (
        m.site_update(request, {}, sites["site-0"])[0].mean("update").value
        for m in (FedAvg(task, local), HistoFL(task, local, noise=0.5))
    )
    for name in plain:
        assert torch.equal(plain[name], noisy[name]) == ("running" in name or name.endswith("bias"))


def test_slides_of_three_hospitals() -> None:
    """Bags in which one bright instance makes a slide positive."""

    def slides(key: Any, n: Any) -> Any:
        rng = Site(key).rng("slides")
        x, y = torch.randn(n, 8, 4, generator=rng), torch.arange(n) % 2
        x[torch.arange(n), torch.randint(8, (n,), generator=rng)] += 4.0 * y[:, None]
        return Rows(x, y)

    task = Classification(Network("attention-mil", (8, 4), 2, (("attention", 8), ("width", 16))))
    sites = {k: Site(k, {"train": slides(k, 40), "val": slides(f"{k} val", 30)}) for k in ("a", "b", "c")}
    method = Evaluated(HistoFL(task, LocalTraining(epochs=6, batch_size=8, lr=0.01, optimizer="adam")), task)
    step, engine = run(method, sites, task.first(0), 5)
    scores = evaluate(method, engine, step.state, engine.sites)
    assert all(float(s["accuracy"]) > 0.75 for s in scores.values())

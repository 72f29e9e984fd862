"""The graph over labels: co-morbidity by hand, its laws, and what stays at a site."""

from typing import Any

import numpy as np
import pytest
import torch

from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.learning.networks.model_tree import cached_model
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import MultiLabel
from polyclinic.learning.tasks.task_evaluation import Evaluated, evaluate
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.personalization.label_graph import comorbidity
from polyclinic.methods.personalization.site_graph import in_graph, site_graph
from polyclinic.testing import check_method
from tests.conftest import Rows
from tests.support.known import known

TASK = MultiLabel(Network("cnn", (1, 8, 8), 3, (("width", 4), ("depth", 2))))


def test_comorbidity_by_hand() -> None:
    y = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 0], [0, 0, 1.0]])
    n = y.sum(0)
    S = np.zeros((3, 3))
    for i in range(3):
        for j in range(3):
            if i != j:
                both = (y[:, i] * y[:, j]).sum()
                S[i, j] = (both / n[j] + both / n[i]) / 2
    A = S + np.eye(3)
    d = A.sum(1) ** -0.5
    np.testing.assert_allclose(comorbidity(torch.from_numpy(y).float(), 3), d[:, None] * A * d, rtol=1e-6)
    assert torch.equal(comorbidity(torch.tensor([0, 1, 2, 2]), 3), torch.eye(3))  # classes never come together
    assert comorbidity(torch.zeros(4, 3), 3).isfinite().all()


def test_labels_without_edges_do_not_speak_to_each_other() -> None:
    """With the identity as adjacency, a node's logit depends on its own features alone; with an edge, on both."""
    method = site_graph(TASK, LocalTraining())
    model = cached_model(method.prediction_task, method.prediction_task.first()).eval()
    h = torch.randn(2, 3, 16)
    other = h.clone()
    other[:, 1] += 1
    graph = model.get_submodule("graph")
    assert torch.equal(graph(h)[:, [0, 2]], graph(other)[:, [0, 2]])
    graph.get_buffer("adjacency").copy_(comorbidity(torch.tensor([[1.0, 1, 0]]), 3))
    assert not torch.equal(graph(h)[:, 0], graph(other)[:, 0])
    assert torch.equal(graph(h)[:, 2], graph(other)[:, 2])


def sites() -> Any:
    rng, found = torch.Generator().manual_seed(0), {}
    for k in range(2):
        x = torch.randn(40, 1, 8, 8, generator=rng)
        a = (torch.rand(40, generator=rng) < 0.5).float()
        y = torch.stack([a, a if k else 1 - a, (torch.rand(40, generator=rng) < 0.3).float()], 1)
        x[:, 0, :4] += 2 * a.view(-1, 1, 1)
        found[f"s{k}"] = Site(f"s{k}", {"train": Rows(x[:28], y[:28]), "val": Rows(x[28:], y[28:])})
    return found


def test_the_graph_stays_and_knows_the_sites_comorbidity() -> None:
    method, here = site_graph(TASK, LocalTraining(batch_size=8)), sites()
    check_method(method, TASK.first(), here)
    reply, memory = method.site_update(known(method.request(method.init(TASK.first()))), {}, here["s1"])
    assert not any(in_graph(name) for name in reply.mean("update").total)
    assert all(in_graph(name) for name in memory["own"])
    expected = comorbidity(here["s1"].data["train"].y, 3)
    torch.testing.assert_close(memory["own"]["graph.adjacency"], expected)
    assert expected[0, 1] > 0.4  # here the two findings always come together


def test_it_learns_and_serves_unseen_sites() -> None:
    here = sites()
    method = Evaluated(site_graph(TASK, LocalTraining(batch_size=8, optimizer="adam", lr=0.01)), TASK)
    state = method.init(TASK.first())
    federation = InProcess(method, here)
    for step in train(method, federation, state, rounds=12):
        state = step.state
    scores = evaluate(method, federation, state, list(here))
    assert float(scores["s0"]["auc"]) > 0.6
    stranger = InProcess(method, {"elsewhere": Site("elsewhere", here["s0"].data)})
    assert "elsewhere" in evaluate(method, stranger, state, ["elsewhere"])


def test_the_body_begins_as_the_studys_model() -> None:
    method = site_graph(TASK, LocalTraining())
    params = TASK.first(5)
    begun = method.init(params).params
    assert torch.equal(begun["body.encoder.0.weight"], params["encoder.0.weight"])
    with pytest.raises(KeyError):
        begun["body.head.weight"]

"""Data vectors: one message, any order, late sites, exact removal."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyclinic.core import tree
from polyclinic.core.rounds import train, train_async
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.learning.networks.model_tree import inspect
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.one_shot.data_vectors import DataVectors
from polyclinic.methods.one_shot.merging import Merging, elected, lengths_of, merged, random_like, restored, search
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.testing import equal
from tests.conftest import blobs, little_sites


def run(method: Any, sites: Any, params: Any, server_data: Any = None, rounds: Any = 3) -> Any:
    state = method.init(params)
    for step in train(method, InProcess(method, sites, server_data=server_data), state, rounds=rounds):
        state = step.state
    return state


def test_without_restoration_it_is_one_round_of_fedavg(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    """The mean of the vectors and of the running statistics is FedAvg with equal sites."""
    ours = run(DataVectors(task, local, tuple(sites)), sites, task.first())
    theirs = run(FedAvg(task, local, uniform=True), sites, task.first(), rounds=1)
    for name, leaf in ours.params.items():
        torch.testing.assert_close(leaf, theirs.params[name], rtol=1e-5, atol=1e-6)
    assert ours.round == 1


def test_one_message_at_any_time_and_in_any_order(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    """Merging as sites arrive gives the bits of merging all at once, and a late site asks nothing of the others."""
    method = DataVectors(task, local, tuple(sites))
    together = run(method, sites, task.first())
    state, steps = method.init(task.first()), 0
    early = {name: sites[name] for name in ("site-2", "site-0")}
    for step in train_async(method, InProcess(method, early), state, updates=9, passes=1):
        state, steps = step.state, steps + 1
    assert steps == 2
    late = InProcess(method, {"site-1": sites["site-1"]})
    for step in train_async(method, late, state, updates=9, passes=1):
        state = step.state
    assert equal(state._replace(round=1), together)
    assert method.request(state) is None


@pytest.mark.parametrize("merging", [{}, {"ties": 0.3}, {"by_layer": True}, {"tune": 1}])
def test_removal_is_the_merge_without_the_site_to_the_bit(
    task: Any, local: Any, sites: dict[str, Site], merging: Any
) -> None:
    held = {"val": blobs(77, 24, (1, 8, 8)), "public": blobs(78, 24, (1, 8, 8))}
    method = DataVectors(task, local, tuple(sites), **merging)
    server = Site("server", held)
    without = method.without(run(method, sites, task.first(), held), "site-1", server)
    rest = {name: site for name, site in sites.items() if name != "site-1"}
    never = run(replace(method, sites=tuple(rest)), rest, task.first(), held)
    assert equal(without, never)
    with pytest.raises(ValueError, match="no vector of 'site-1'; there are site-0, site-2"):
        method.without(without, "site-1", server)


def test_the_last_site_removed_leaves_the_base(task: Classification, local: LocalTraining) -> None:
    sites = little_sites(count=1)
    method = DataVectors(task, local, tuple(sites))
    state = method.without(run(method, sites, task.first()), "site-0")
    assert equal(state.params, task.first())


def test_running_statistics_are_not_part_of_a_vector(task: Any, local: Any, sites: dict[str, Site]) -> None:
    method = DataVectors(task, local, tuple(sites))
    state = run(method, sites, task.first())
    running = inspect(task.model()).running
    for leaves in state.sent.values():
        assert not tree.under("vector", leaves).keys() & running
        assert tree.under("running", leaves).keys() == running


def test_restoration_gives_the_statistics_of_the_data(task: Classification) -> None:
    """Of the first normalization: mean and variance of what enters it, by numpy."""
    data, start = blobs(5, 30, (1, 8, 8), 0.7), task.first(3)
    found = restored(task, start, data, size=100)
    running = inspect(task.model()).running
    assert all(torch.equal(found[name], start[name]) for name in start if name not in running)
    entering = []
    model = task.model()
    norm = next(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    norm.register_forward_pre_hook(lambda _, x: entering.append(x[0].detach()))
    model.load_state_dict(start, strict=False)
    model(data.x)
    seen = entering[0].double().numpy()
    mean, var = (min(n for n in running if n.endswith(end)) for end in ("running_mean", "running_var"))
    np.testing.assert_allclose(found[mean], seen.mean((0, 2, 3)), atol=1e-5)
    np.testing.assert_allclose(found[var], seen.var((0, 2, 3), ddof=1), rtol=1e-4)


def test_restoration_never_sees_targets(task: Classification) -> None:
    data = blobs(5, 30, (1, 8, 8))
    other = blobs(5, 30, (1, 8, 8))
    other.y = 1 - other.y
    assert equal(restored(task, task.first(), data), restored(task, task.first(), other))


def test_the_scale_is_the_best_of_those_tried(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    labeled = blobs(77, 40, (1, 8, 8), 0.5)
    state = run(DataVectors(task, local, tuple(sites)), sites, task.first())
    vectors = {name: tree.under("vector", leaves) for name, leaves in state.sent.items()}
    losses = search(Merging(), task, task.first(), vectors, labeled)
    assert list(losses) == pytest.approx([1 / 12, 1 / 6, 1 / 4, 1 / 3, 2 / 3, 1.0])
    _, scale = merged(Merging(), task, task.first(), vectors, labeled=labeled)
    assert losses[scale] == min(losses.values())
    assert merged(Merging(scale=0.4), task, task.first(), vectors, labeled=labeled)[1] == 0.4


def test_vectors_that_learned_beat_random_ones_of_the_same_lengths(
    task: Classification, sites: dict[str, Site]
) -> None:
    """The paper's control: what was learned, not how far the model moved, is what helps."""
    local = LocalTraining(epochs=6, batch_size=8, lr=0.1)
    state = run(DataVectors(task, local, tuple(sites)), sites, task.first())
    vectors = {name: tree.under("vector", leaves) for name, leaves in state.sent.items()}
    rng = torch.Generator().manual_seed(0)
    random = {name: random_like(vector, rng) for name, vector in vectors.items()}
    for name, vector in vectors.items():
        for leaf, drawn in zip(vector.values(), random[name].values(), strict=True):
            assert float(drawn.norm()) == pytest.approx(float(leaf.norm()), rel=1e-4, abs=1e-8)
    labeled = blobs(77, 40, (1, 8, 8), 0.5)
    best, worst = (min(search(Merging(), task, task.first(), v, labeled).values()) for v in (vectors, random))
    assert best < worst - 0.1


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(-4, 4), min_size=6, max_size=6), min_size=1, max_size=4), st.integers(1, 6))
def test_ties_entry_by_entry(rows: Any, kept: Any) -> None:
    """Against the three steps written out in plain Python."""
    rows = [[x + 0.1 * i for i, x in enumerate(row)] for row in rows]  # no two entries tie
    found = tree.flatten(elected([{"w": torch.tensor(row, dtype=torch.float64)} for row in rows], kept / 6))
    cut = [[x if sorted(map(abs, row), reverse=True).index(abs(x)) < kept else 0.0 for x in row] for row in rows]
    for i, value in enumerate(found.tolist()):
        column = [row[i] for row in cut]
        plus, minus = sum(x for x in column if x > 0), -sum(x for x in column if x < 0)
        if abs(plus - minus) < 1e-9:
            continue  # the sign of a tie is rounding's
        agree = [x for x in column if x * (plus - minus) > 0]
        assert value == pytest.approx(sum(agree) / len(agree))


def test_ties_of_one_site_that_keeps_all_is_its_vector() -> None:
    one = {"a": torch.randn(3, 4), "b": torch.randn(5)}
    assert equal(elected([one], 1.0), one)


def test_lengths_by_layer_are_the_sites_average() -> None:
    """Sites that agree: the mean, whatever their number. Sites at right angles: longer than the mean by √K."""
    x, y = {"w": torch.tensor([3.0, 0.0])}, {"w": torch.tensor([0.0, 3.0])}
    for ordered, length in (([x, x, x], 3.0), ([x, y], 3.0)):
        vectors = {str(i): v for i, v in enumerate(ordered)}
        assert float(Merging(by_layer=True).direction(vectors)["w"].norm()) == pytest.approx(length)
    still = {"w": torch.zeros(2)}
    assert torch.equal(lengths_of(still, [still])["w"], still["w"])


@pytest.mark.parametrize(("wrong", "says"), [({"ties": 1.5}, "from 0 to 1"), ({"scale": float("nan")}, "finite")])
def test_wrong_settings_are_refused(wrong: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Merging(**wrong)

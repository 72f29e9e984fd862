"""FedIRM's relation matrix, masks and matching loss, written again in numpy from the paper's equations."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy

from polyclinic.core.site import Site
from polyclinic.learning.networks.model_momentum import follow_, ramp
from polyclinic.learning.objectives.class_relations import matrix, mismatch, relation_of, reliable
from polyclinic.learning.tasks.classification import Classification
from tests.conftest import Rows


def normal(*shape: Any, key: Any = "a") -> Any:
    return torch.randn(*shape, generator=Site("s").rng(key))


def numpy_matrix(logits: Any, labels: Any, classes: Any, T: Any) -> Any:
    """Equation 3: M_c = softmax(v_c / τ), v_c the mean of the class's features before the softmax."""
    rows = []
    for c in range(classes):
        mine = logits[labels == c]
        rows.append(softmax((mine.mean(0) if len(mine) else np.zeros(classes)) / T))
    return np.stack(rows)


def test_the_relation_matrix_is_the_papers() -> None:
    z, y = normal(40, 5) * 3, torch.arange(40) % 4  # class 4 is absent
    of = torch.nn.functional.one_hot(y, 5).float()
    found = matrix(z, of, 2.0).numpy()
    assert np.allclose(found, numpy_matrix(z.numpy(), y.numpy(), 5, 2.0), atol=1e-5)
    assert np.allclose(found[4], 0.2)
    assert np.allclose(found.sum(1), 1, atol=1e-6)


def test_the_matching_loss_is_the_symmetric_kl_of_the_rows_present() -> None:
    """Equation 5, as a mean over the classes that pseudo-labels found."""
    a, b = normal(5, 5).softmax(1), normal(5, 5, key="b").softmax(1)
    present = torch.tensor([1.0, 1, 0, 1, 0])
    p, q = a.double().numpy(), b.double().numpy()
    wanted = np.mean([(entropy(p[c], q[c]) + entropy(q[c], p[c])) / 2 for c in (0, 1, 3)])
    assert float(mismatch(a, b, present)) == pytest.approx(wanted, rel=1e-4)
    assert float(mismatch(a, a, present)) == pytest.approx(0, abs=1e-7)
    assert float(mismatch(a, b, torch.zeros(5))) == 0


@pytest.mark.parametrize(("confidence", "share"), [(0.3, 0.9), (0.6, 0.5), (0.0, 2.0), (0.99, 0.9)])
def test_the_masks_are_numpys(confidence: float, share: float) -> None:
    """Equation 4: confident and, over passes with dropout, certain predictions alone count."""
    z, passes = normal(30, 4) * 2, normal(10, 30, 4, key="b") * 2
    found = reliable(z, passes, confidence, share).numpy()
    p, mean = softmax(z.double().numpy(), 1), softmax(passes.double().numpy().mean(0), 1)
    for i in range(30):
        sure = p[i].max() >= confidence and entropy(mean[i]) < share * np.log(4)
        assert np.array_equal(found[i], np.eye(4)[p[i].argmax()] * sure)
    if (confidence, share) == (0.0, 2.0):
        assert found.sum() == 30
    if confidence == 0.99:
        assert found.sum() < 30


def test_a_sites_matrix_counts_only_the_classes_it_has(task: Classification) -> None:
    x = normal(12, 1, 8, 8)
    one = relation_of(task, task.first(0), Rows(x, torch.ones(12, dtype=torch.long)), 2.0)
    assert one.weight["matrix"].tolist() == [[0, 0], [1, 1]]
    none = relation_of(task, task.first(0), (), 2.0)
    both = one + none
    assert torch.equal(both.total["matrix"], one.total["matrix"])


def test_ramp_grows_from_nearly_0_to_1() -> None:
    values = [ramp(t, 30) for t in range(40)]
    assert values == sorted(values)
    assert values[0] == pytest.approx(np.exp(-5))
    assert values[15] == pytest.approx(np.exp(-5 * 0.25))
    assert values[30:] == [1.0] * 10
    assert ramp(0, 0) == 1.0


def test_a_follower_moves_by_the_share_and_keeps_its_statistics(task: Classification) -> None:
    one, two = task.model(), task.model()
    before = {name: p.clone() for name, p in one.state_dict().items()}
    two(normal(8, 1, 8, 8))
    follow_(one, two, 0.75)
    lead = two.state_dict()
    for name, leaf in one.state_dict().items():
        if "running" in name or "num_batches" in name:
            assert torch.equal(leaf, before[name])
        else:
            assert torch.allclose(leaf, 0.75 * before[name] + 0.25 * lead[name], atol=1e-6)

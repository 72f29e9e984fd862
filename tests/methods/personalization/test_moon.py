"""MOON's contrast in numpy, and the limits in which it is FedAvg."""

from typing import Any

import numpy as np
import pytest
import torch

from polyclinic.core.site import Site
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.personalization.moon import Moon, contrast
from polyclinic.testing import close, equal


def test_the_contrast_is_equation_3() -> None:
    rng = np.random.default_rng(0)
    z, near, far = rng.normal(size=(3, 5, 7))

    def cos(a: Any, b: Any) -> Any:
        return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)

    up, down = np.exp(cos(z, near) / 0.5), np.exp(cos(z, far) / 0.5)
    found = contrast(torch.from_numpy(z), torch.from_numpy(near), torch.from_numpy(far), 0.5)
    assert float(found) == pytest.approx(-np.log(up / (up + down)).mean(), rel=1e-9)


@pytest.mark.parametrize("mu", [0.0, 5.0])
def test_the_first_round_is_fedavgs(
    task: Classification, local: LocalTraining, sites: dict[str, Site], mu: float
) -> None:
    """The site's last model is then the global one, and the contrast has no slope; with μ = 0 it never has."""
    ours, plain, site = Moon(task, local, mu=mu), FedAvg(task, local), sites["site-1"]
    state = plain.init(task.first())
    same = equal if mu == 0 else close
    assert same(
        ours.site_update(ours.request(state), {}, site)[0], plain.site_update(plain.request(state), {}, site)[0]
    )


def test_later_rounds_differ(task: Classification, local: LocalTraining, sites: dict[str, Site]) -> None:
    ours, plain, site = Moon(task, local), FedAvg(task, local), sites["site-1"]
    request = plain.request(plain.init(task.first()))
    far = {"previous": task.first(9)}
    assert not equal(ours.site_update(request, far, site)[0], plain.site_update(request, {}, site)[0])

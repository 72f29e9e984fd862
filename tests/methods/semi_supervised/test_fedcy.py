"""FedCy: cycles that close and cycles that do not, clips in order, its limits, and hidden labels."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import logsumexp, softmax

from polyclinic.core.site import Site
from polyclinic.errors import DataError
from polyclinic.learning.networks.latent import encoded
from polyclinic.learning.networks.model_tree import cached_model
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.semi_supervised.fedcy import FedCy
from polyclinic.methods.semi_supervised.video_cycle import clip, cycle_back
from tests.conftest import Rows, little_sites
from tests.support.few_labels import half_labeled, near, only_labels, run, same, with_other_targets

LOCAL = LocalTraining(epochs=1, batch_size=8, lr=0.05)


def normal(*shape: Any, key: Any = "x") -> Any:
    return torch.randn(*shape, generator=Site("s").rng(key))


def test_cycling_back_is_its_equation_in_numpy() -> None:
    u, v = normal(6, 3), normal(9, 3, key="v")
    U, V = u.double().numpy(), v.double().numpy()
    terms = []
    for i in range(6):
        soft = softmax(-((U[i] - V) ** 2).sum(1) / 0.5) @ V
        back = -((soft - U) ** 2).sum(1) / 0.5
        terms.append(-(back[i] - logsumexp(back)))
    assert float(cycle_back(u, v, 0.5)) == pytest.approx(np.mean(terms), rel=1e-3)


def test_the_same_video_closes_every_cycle_and_a_still_one_closes_none() -> None:
    u = torch.linspace(0, 5, 8)[:, None]
    assert float(cycle_back(u, u, 0.01)) < 0.01
    assert float(cycle_back(torch.zeros(8, 1), u, 0.01)) == pytest.approx(np.log(8), rel=1e-4)


def videos(n: Any = 30) -> Any:
    data = Rows(torch.arange(n).float().view(-1, 1).repeat(1, 2), torch.arange(n) % 2)
    data.videos = torch.arange(n) // 10
    return data


def test_clips_are_in_order_and_of_one_video() -> None:
    data, rng = videos(), Site("s").rng("c")
    names = set()
    for _ in range(20):
        frames, name = clip(data, 4, rng)
        times = frames[:, 0]
        assert len(times) == 4
        assert (times.diff() > 0).all()
        assert (times // 10 == name).all()
        _, second = clip(data, 4, rng, other_than=name)
        assert second != name
        names.add(name)
    assert names == {0, 1, 2}
    data.videos = torch.zeros(30, dtype=torch.long)
    plain, name = clip(data, 50, rng)
    assert (len(plain), name) == (30, 0)


def test_with_labels_and_no_contrast_it_is_fedavg(task: Classification) -> None:
    sites = {name: only_labels(site) for name, site in little_sites().items()}
    step, _ = run(FedCy(task, LOCAL, contrast=0.0), sites, task.first(0))
    plain, _ = run(FedAvg(task, LOCAL), sites, task.first(0))
    assert near(step.state.params, plain.state.params)


def test_unlabeled_videos_move_the_encoder_alone_and_their_targets_nothing(task: Classification) -> None:
    sites = half_labeled(labeled=1)
    method = FedCy(task, LOCAL)
    request = method.request(method.init(task.first(0)))
    change = method.site_update(request, {}, sites["site-1"])[0].mean("update").value
    assert float(change["head.weight"].abs().max()) == 0
    assert float(change["encoder.0.weight"].abs().max()) > 0
    one, two = (run(method, s, task.first(0))[0].state.params for s in (sites, with_other_targets(sites)))
    assert same(one, two)


def test_moments_become_findable(task: Classification) -> None:
    """Videos that brighten over time: after training on their order alone, cycles close more often."""

    def video(key: Any, n: Any = 24) -> Any:
        return normal(n, 1, 8, 8, key=key) * 0.3 + torch.linspace(-2, 2, n).view(-1, 1, 1, 1)

    data = Rows(torch.cat([video("a"), video("b")]), torch.zeros(48, dtype=torch.long))
    data.videos = torch.arange(48) // 24
    site = Site("s", {"unlabeled": data})
    method = FedCy(task, LocalTraining(epochs=10, batch_size=8, lr=0.02), frames=12)
    start = task.first(0)
    end, _ = run(method, {"s": site}, start, 2)

    def loss(params: Any) -> Any:
        model = cached_model(task, params).eval()
        with torch.no_grad():
            h = torch.nn.functional.normalize(encoded(task.network, model, data.x), dim=1)
        return float(cycle_back(h[:24], h[24:]))

    assert loss(end.state.params) < loss(start) - 0.1


def test_images_of_no_video_are_refused() -> None:
    data = videos()
    data.videos = None
    with pytest.raises(DataError, match="set video in"):
        clip(data, 4, Site("s").rng("c"))

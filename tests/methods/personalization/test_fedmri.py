"""FedMRI's contrast by hand, what stays at a site, and reconstruction end to end."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from polyclinic.core import tree
from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.learning.networks.model_tree import cached_model
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.mr_reconstruction import Reconstruction, columns
from polyclinic.learning.tasks.task import InEncoder
from polyclinic.learning.tasks.task_evaluation import Evaluated, evaluate
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.personalization.fedmri import Contrasted, State, fedmri
from polyclinic.testing import check_method, close, equal
from tests.conftest import segmentation_sites
from tests.support.agreement import agree
from tests.support.known import known
from tests.support.undersampled import Accelerated

TASK = Reconstruction(Network("unet", (1, 16, 16), 1, (("width", 2), ("norm", "batch"))))


def accelerated() -> Any:
    sites = segmentation_sites(2)
    for k, (name, site) in enumerate(sites.items()):
        measured = columns(16, 2 + k, 0.2, torch.Generator().manual_seed(k))
        fewer = {role: Accelerated(site.data[role], measured) for role in ("train", "val")}
        sites[name] = replace(site, data={**site.data, **fewer})
    return sites


def test_the_contrast_is_a_ratio_of_distances_in_l1(task: Classification) -> None:
    model = cached_model(task, task.first(0))
    inside, names = InEncoder(task), [n for n, _ in model.named_parameters()]
    flat = [np.concatenate([task.first(k)[n].numpy().ravel() for n in names if inside(n)]) for k in range(4)]
    expected = abs(flat[0] - flat[1]).sum() / sum(abs(flat[0] - flat[k]).sum() for k in (2, 3))
    found = Contrasted(task)._contrast(model, task.first(1), [task.first(2), task.first(3)])
    assert float(found.detach()) == pytest.approx(expected, rel=1e-4)


def test_only_the_encoder_leaves(task: Classification, local: LocalTraining, sites: dict[str, Site]) -> None:
    inside = InEncoder(task)
    for others in (False, True):
        method = fedmri(task, local, others=others)
        reply, memory = method.site_update(known(method.request(method.init(task.first()))), {}, sites["site-0"])
        for stat in reply.parts.values():
            for leaves in stat.trees:
                assert all(inside(name) for name in leaves)
        assert not any(inside(name) for name in memory["own"])


def test_without_contrast_it_is_averaging_of_encoders(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    """β = 0: LG-FedAvg's mirror image, in which the head stays."""
    from polyclinic.methods.personalization.partial_personalization import fedper

    states = []
    for method in (fedmri(task, local, beta=0.0), fedper(task, local, uniform=True)):
        state = method.init(task.first())
        for step in train(method, InProcess(method, sites), state, rounds=2):
            state = step.state
        states.append(state.inner.params)
    assert close(*states)


def test_the_contrast_starts_when_there_is_an_old_encoder(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    ours, plain = fedmri(task, local, beta=1.0), fedmri(task, local, beta=0.0)
    request = known(ours.request(ours.init(task.first())))
    a, memory = ours.site_update(request, {}, sites["site-0"])
    assert equal(a, plain.site_update(request, {}, sites["site-0"])[0])
    again = ours.site_update(request, memory, sites["site-0"])[0]
    assert not equal(again, plain.site_update(request, memory, sites["site-0"])[0])


def test_with_others_the_contrast_covers_every_site_and_its_own(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    """As in the published loop over `prev_models`; the step is that of the same loss written out."""
    method = Contrasted(task, local, beta=2.0, weight=0.5, others=True)
    encoders = {f"site-{k}": tree.select(task.first(k + 1), InEncoder(task)) for k in range(3)}
    request = method.request(State(1, task.first(), encoders))
    found = method.site_update(request, {}, sites["site-1"])[0].mean("update").value

    def loss(model: Any, batch: Any) -> Any:
        shared = [(n, p) for n, p in model.named_parameters() if InEncoder(task)(n)]
        near = sum((p - task.first()[n]).abs().sum() for n, p in shared)
        far = sum((p - old[n]).abs().sum() for old in encoders.values() for n, p in shared)
        return 0.5 * torch.nn.functional.cross_entropy(model(batch[0]), batch[1]) + 2.0 * near / far

    end = local.fit(task, task.first(), sites["site-1"], 1, loss=loss)
    agree(found, tree.sub(end, task.first()))


@pytest.mark.parametrize("others", [False, True])
@pytest.mark.slow
def test_reconstruction(others: bool) -> None:
    sites, local = accelerated(), LocalTraining(epochs=2, batch_size=5, optimizer="adam", lr=3e-3)
    method = Evaluated(fedmri(TASK, local, others=others), TASK)
    check_method(method.inner, TASK.first(), sites, rounds=1 + others)
    if others:
        return
    federation, state = InProcess(method, sites), method.init(TASK.first())

    def error() -> float:
        """Of training images: ten at a site are too few for others."""
        scores = evaluate(method, federation, state, list(sites), "score/train").values()
        return float(np.mean([float(s["nmse"]) for s in scores]))

    untrained = error()
    for step in train(method, federation, state, rounds=30):
        state = step.state
    assert error() < 0.95 * untrained

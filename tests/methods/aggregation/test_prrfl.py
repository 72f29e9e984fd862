"""PFA against numpy's Fourier transform; DET's three stages."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from polyclinic.core import tree
from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.task import InNormalization
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.aggregation.pfa import PFA, progressive
from polyclinic.methods.aggregation.prrfl import PRRFL, macro_f1
from polyclinic.testing import close

DICE = np.random.default_rng(0)


def weights(shape: Any, count: Any = 3) -> Any:
    return {f"s{k}": {"w": torch.from_numpy(DICE.normal(size=shape).astype(np.float32))} for k in range(count)}


def by_hand(models: Any, share: Any) -> Any:
    """Section 2.1, in numpy, for weights [N, C, D1, D2] or [N, C]."""
    kernels = [m["w"].double().numpy() for m in models.values()]
    as_matrix = [k.transpose(1, 2, 3, 0).reshape(k.shape[1] * k.shape[2], -1) if k.ndim == 4 else k for k in kernels]
    h, w = as_matrix[0].shape
    spectra = [np.fft.fftshift(np.fft.fft2(m)) for m in as_matrix]
    mean = np.mean([np.abs(f) for f in spectra], 0)
    reach = [np.ceil(share * n / 2) for n in (h, w)]
    low = (np.abs(np.arange(h) - h // 2) <= reach[0])[:, None] & (np.abs(np.arange(w) - w // 2) <= reach[1])[None]
    out = []
    for f, k in zip(spectra, kernels, strict=True):
        mixed = np.where(low, mean, np.abs(f)) * np.exp(1j * np.angle(f))
        back = np.fft.ifft2(np.fft.ifftshift(mixed)).real
        n, c, *d = k.shape
        out.append(back.reshape(c, *d, n).transpose(3, 0, 1, 2) if k.ndim == 4 else back)
    return out


@pytest.mark.parametrize("shape", [(6, 5, 3, 3), (9, 7), (2, 12)])
@pytest.mark.parametrize("share", [0.1, 0.7, 0.95])
def test_pfa_is_numpys(shape: tuple[int, ...], share: float) -> None:
    models = weights(shape)
    for found, expected in zip(progressive(models, share).values(), by_hand(models, share), strict=True):
        np.testing.assert_allclose(found["w"], expected, atol=2e-5)


@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (4, 2, 3, 3, 3), (5, 8), (7,)])
def test_models_that_agree_stay_as_they_are(shape: tuple[int, ...]) -> None:
    same = weights(shape, 1)["s0"]
    for found in progressive({"a": same, "b": same}, 0.8).values():
        assert torch.allclose(found["w"], same["w"], atol=1e-5)


def test_sites_keep_their_phases_and_their_high_frequencies() -> None:
    models = weights((8, 20))
    found = progressive(models, 0.2)
    before, after = (torch.fft.fft2(m["s1"]["w"].double()) for m in (models, found))
    assert torch.allclose(
        torch.polar(torch.ones_like(before.abs()), before.angle()),
        torch.polar(torch.ones_like(after.abs()), after.angle()),
        atol=1e-3,
    )
    assert torch.allclose(before.abs()[3:5, 5:15], after.abs()[3:5, 5:15], atol=1e-3)
    mean = torch.stack([torch.fft.fft2(m["w"].double()).abs() for m in models.values()]).mean(0)
    assert torch.allclose(after.abs()[0, 0], mean[0, 0], atol=1e-3)


def test_biases_are_averaged() -> None:
    models = weights((6,))
    found = progressive(models, 0.5)
    assert torch.allclose(found["s2"]["w"], torch.stack([m["w"] for m in models.values()]).mean(0))
    assert close(found["s0"], found["s1"])


def test_macro_f1() -> None:
    said, truth = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 1, 1, 1, 0, 2])
    assert macro_f1(said, truth) == pytest.approx((2 / 4 + 4 / 5 + 2 / 3) / 3)
    assert macro_f1(truth, truth) == 1


def run(method: Any, task: Any, sites: Any, rounds: Any = 2) -> Any:
    engine, state = InProcess(method, sites), method.init(task.first(0))
    for step in train(method, engine, state, rounds=rounds):
        state = step.state
    return state, engine


def test_normalization_never_leaves_and_the_personal_model_predicts(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    method = PRRFL(task, 5, local)
    state, engine = run(method, task, sites)
    inside = InNormalization(task)
    assert state.deputies.keys() == sites.keys()
    assert not any(inside(name) for deputy in state.deputies.values() for name in deputy)
    assert close(tree.select(state.params, inside), tree.select(task.first(0), inside))
    request = method.evaluation_request(state)
    memory = engine.memory["site-1"]
    assert method.site_model(request.for_site("site-1"), memory) is memory["personal"]
    assert method.site_model(request.for_site("elsewhere"), {}) is state.params


def test_who_teaches_whom(task: Classification, local: LocalTraining, sites: dict[str, Site]) -> None:
    method, site = PRRFL(task, 5, local), sites["site-2"]
    good = local.fit(task, task.first(0), site, 0)
    for _ in range(4):
        good = local.fit(task, good, site, 0)
    bias = good["head.bias"]
    bad = {**good, "head.bias": bias + torch.tensor([100.0, -100.0])}  # answers one class only
    assert method.stage(good, {}, site) == (0, 1)  # at first the deputy recovers
    assert method.stage(bad, {"personal": good}, site) == (0, 1)
    assert method.stage(good, {"personal": good}, site) == (1, 0)
    assert replace(method, low=0.1, high=1.1).stage(bad, {"personal": good}, site) == (1, 1)


def test_alone_a_site_without_teaching_trains_as_if_by_itself(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    """PFA of one model is that model."""
    alone = {"site-1": sites["site-1"]}
    state, engine = run(PFA(task, 5, local), task, alone, 1)
    end = local.fit(task, task.first(0), sites["site-1"], 0)
    assert close(engine.memory["site-1"]["personal"], end)
    again, _ = run(PFA(task, 5, local), task, alone, 2)
    assert again.round == 2
    for name, leaf in state.deputies["site-1"].items():
        assert torch.allclose(leaf, end[name], atol=1e-5)

"""IOP-FL's running average and adaptation by hand; inside it is that average, outside a mixture that adapts."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from polyclinic.core import tree
from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.learning.networks.model_tree import cached_model, load
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.segmentation import Segmentation
from polyclinic.learning.tasks.task_evaluation import Evaluated, evaluate, outputs
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.personalization.iopfl import IOPFL
from polyclinic.methods.personalization.routing_network import Adaptation, Routed
from polyclinic.testing import check_method, close, equal
from tests.conftest import blobs, segmentation_sites
from tests.support.agreement import KINDS, agree, largest_gap, place

NAMES = ("site-0", "site-1", "site-2")


def run(method: Any, params: Any, sites: Any, rounds: Any) -> Any:
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


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_one_pass_is_the_published_step(norm: str) -> None:
    """Independent: each image has its own kernels, torch's Adam, two passes over three batches, no dropout."""
    task = Classification(Network("cnn", (1, 8, 8), 2, (("width", 8), ("depth", 2), ("norm", norm))))
    routed = Routed(task.network, 3, dropout=0.0)
    models = [task.first(k) for k in range(3)]
    data, rng = blobs(77, 12, (1, 8, 8), shift=0.8), torch.Generator().manual_seed(5)
    adapt = Adaptation(passes=2, lr=0.01, batch_size=4)
    params = routed.filled(models, True)
    found = adapt(task.with_network(routed), params, data, rng)

    own = {n: p.clone().requires_grad_() for n, p in params.items() if ".router." in n}
    norms = [n for n in params if n in ("body.encoder.1.weight", "body.encoder.1.bias")]
    norms += [n for n in params if n in ("body.encoder.5.weight", "body.encoder.5.bias")]
    own |= {n: params[n].clone().requires_grad_() for n in norms}

    def kernels(place: str, mean: torch.Tensor) -> torch.Tensor:
        w1, b1, w2, b2 = (own[f"body.{place}.router.{i}.{leaf}"] for i in (0, 2) for leaf in ("weight", "bias"))
        r = torch.sigmoid(w2 @ (w1 @ mean + b1) + b2)
        return r / r.sum()

    def normalized(x: torch.Tensor, place: str) -> torch.Tensor:
        weight, bias = own[f"body.{place}.weight"], own[f"body.{place}.bias"]
        if norm == "group":
            return F.group_norm(x, 8, weight, bias)
        return F.batch_norm(x, None, None, weight, bias, training=True)

    def conv(x: torch.Tensor, place: str) -> torch.Tensor:
        outputs = []
        for image in x:
            r = kernels(place, image.mean((1, 2)))
            kernel = sum((r[k] * models[k][f"{place}.weight"] for k in range(3)), torch.tensor(0.0))
            outputs.append(F.conv2d(image[None], kernel, padding=1))
        return torch.cat(outputs)

    def forward(x: torch.Tensor) -> torch.Tensor:
        h = F.max_pool2d(F.relu(normalized(conv(x, "encoder.0"), "encoder.1")), 2)
        h = F.relu(normalized(conv(h, "encoder.4"), "encoder.5")).mean((2, 3))
        rows = []
        for row in h:
            r = kernels("head", row)
            rows.append(sum(r[k] * (models[k]["head.weight"] @ row + models[k]["head.bias"]) for k in range(3)))
        return torch.stack(rows)

    optimizer = torch.optim.Adam(own.values(), lr=0.01)
    rng = torch.Generator().manual_seed(5)
    torch.randint(2**62, (), generator=rng)
    for _ in range(2):
        for i in range(0, 12, 4):
            x = data.x[i : i + 4]
            p, q = forward(x).softmax(1), forward(x + 0.5 * torch.randn(x.shape, generator=rng)).softmax(1)
            loss = 10 * -(p * (p + 1e-6).log()).mean() / math.log(2) + 0.1 * (p - q).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for name, leaf in own.items():
        torch.testing.assert_close(found[name], leaf.detach(), rtol=1e-4, atol=1e-5)
    assert max(float((leaf.detach() - params[name]).abs().max()) for name, leaf in own.items()) > 0.03


class Blended(nn.Module):
    """A layer whose weights are, for each image, the mixture that a small network computes from the mean input."""

    def __init__(self, layer: Any, place: str, models: Any, params: Any) -> None:
        super().__init__()
        self.layer, self.linear = layer, isinstance(layer, nn.Linear)
        self.members = [(model[f"{place}.weight"], model.get(f"{place}.bias")) for model in models]
        names = [f"body.{place}.router.{i}.{leaf}" for i in (0, 2) for leaf in ("weight", "bias")]
        self.router = {n: params[n].clone().requires_grad_() for n in names}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w1, b1, w2, b2 = self.router.values()
        outputs = []
        for image in x:
            tokens = image.reshape(-1, image.shape[-1]) if self.linear else image.flatten(1).T
            r = torch.sigmoid(w2 @ (w1 @ tokens.mean(0) + b1) + b2)
            r = r / r.sum()
            weight = sum(share * w for share, (w, _) in zip(r, self.members, strict=True))
            bias = None
            if self.members[0][1] is not None:
                bias = sum(share * b for share, (_, b) in zip(r, self.members, strict=True))
            if self.linear:
                outputs.append(F.linear(image, weight, bias))
            else:
                convolve = F.conv2d if image.ndim == 3 else F.conv3d
                outputs.append(convolve(image[None], weight, bias, self.layer.stride, self.layer.padding)[0])
        return torch.stack(outputs)


@pytest.mark.parametrize("kind", KINDS)
def test_two_passes_are_the_published_steps_on_any_network(kind: str) -> None:
    """As above, with every linear and convolutional layer replaced, and PyTorch's Adam."""
    task, sites = place(kind)
    routed, models = Routed(task.network, 3, dropout=0.0), [task.first(k) for k in range(3)]
    data, rng = sites["site-1"].data["test"], torch.Generator().manual_seed(5)
    params = routed.filled(models, True)
    found = Adaptation(passes=2, lr=0.01, batch_size=4)(task.with_network(routed), params, data, rng)

    model = load(task.network(), models[0]).train()
    adapted: dict[str, torch.Tensor] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
            blended = Blended(module, name, models, params)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, blended)
            adapted |= blended.router
        elif isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d | nn.GroupNorm | nn.LayerNorm):
            adapted |= {f"body.{name}.{n}": p for n, p in module.named_parameters()}
    optimizer, rng = torch.optim.Adam(adapted.values(), lr=0.01), torch.Generator().manual_seed(5)
    torch.randint(2**62, (), generator=rng)
    for _ in range(2):
        for x in data.x.split(4):
            p, q = model(x).softmax(1), model(x + 0.5 * torch.randn(x.shape, generator=rng)).softmax(1)
            loss = 10 * -(p * (p + 1e-6).log()).mean() / math.log(2) + 0.1 * (p - q).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    agree({n: found[n] for n in adapted}, {n: p.detach() for n, p in adapted.items()}, 1e-4)  # Adam divides by √v
    assert largest_gap({n: p.detach() for n, p in adapted.items()}, params) > 0.03


def test_the_first_member_alone_predicts_where_routing_is_off(task: Classification) -> None:
    routed = Routed(task.network, 3)
    models, x = [task.first(k) for k in range(3)], torch.randn(5, 1, 8, 8)
    model = cached_model(task.with_network(routed), routed.filled(models, False)).eval()
    torch.testing.assert_close(model(x), cached_model(task, models[0]).eval()(x))


def test_outside_it_becomes_surer_and_keeps_nothing(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    stranger = Site("elsewhere", {"test": blobs(77, 24, (1, 8, 8), shift=0.8)})

    def unsure(passes: int) -> float:
        method = IOPFL(task, NAMES, local, passes=passes, adapt_lr=0.02)
        state, _ = run(method, task.first(), sites, 2)
        request = method.evaluation_request(state)
        params = method.adapted_model(request, {}, stranger, "test")
        p = outputs(method.prediction_task, params, stranger.data["test"])["score"]
        assert equal(params, method.adapted_model(request, {}, stranger, "test"))
        return float(-(p * p.clamp_min(1e-8).log()).sum(1).mean())

    assert unsure(20) < unsure(0)


def test_evaluation_serves_both(task: Classification, local: LocalTraining, sites: dict[str, Site]) -> None:
    method = Evaluated(IOPFL(task, NAMES, local, passes=2), task)
    state, _ = run(method, task.first(), sites, 2)
    everyone = {**sites, "elsewhere": Site("elsewhere", {"val": blobs(5, 9, (1, 8, 8))})}
    assert set(evaluate(method, InProcess(method, everyone), state, list(everyone))) == set(everyone)


def test_masks() -> None:
    task = Segmentation(Network("unet", (1, 16, 16), 2, (("width", 2), ("norm", "batch"))))
    sites = segmentation_sites(2)
    method = IOPFL(task, tuple(sites), LocalTraining(batch_size=4), passes=2)
    check_method(method, task.first(), sites)
    found = outputs(
        method.prediction_task,
        method.site_model(method.evaluation_request(method.init(task.first())), {}),
        sites["site-0"].data["val"],
    )
    assert found["dice"].shape == (4, 1)

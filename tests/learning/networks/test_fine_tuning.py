"""Start weights, adapters and frozen tensors of networks."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from polyclinic.core import tree
from polyclinic.core.site import Site
from polyclinic.errors import ConfigError
from polyclinic.learning.networks.adapters import (
    Adapted,
    LowRank,
    adapt,
    factorized,
    factors,
    merge_adapters,
    product,
)
from polyclinic.learning.networks.fine_tuning import FineTuned
from polyclinic.learning.networks.model_tree import (
    cached_model,
    freeze,
    frozen,
    gradient,
    inspect,
    live_batch_norms,
    load,
    params_of,
    trainable,
)
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.dp_sgd import DPSGD
from polyclinic.learning.training.local import LocalTraining, Proximal
from tests.conftest import blobs
from tests.support.start_weights import random_state, stored, weights_of

CNN = Network("cnn", (1, 8, 8), 2, (("width", 4), ("depth", 2), ("dropout", 0.5)))


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYCLINIC_WEIGHTS", str(tmp_path / "weights"))


def in_head(name: str) -> bool:
    return name.startswith("head.")


def test_frozen_tensors_are_in_no_tree_and_get_no_gradient() -> None:
    model = freeze(CNN(), in_head)
    assert set(params_of(model)) == set(trainable(model)) == {"head.weight", "head.bias"}
    assert frozen(model) == {n for n, t in model.state_dict().items() if t.is_floating_point()} - set(params_of(model))
    assert inspect(model).trainable == ("head.weight", "head.bias")
    assert not inspect(model).statistics
    grads = gradient(model(torch.randn(4, 1, 8, 8)).sum(), model)
    assert set(grads) == {"head.weight", "head.bias"}
    assert all(p.grad is None for p in model.parameters())
    before = model.get_parameter("encoder.0.weight").clone()
    load(model, {name: torch.zeros_like(leaf) for name, leaf in params_of(model).items()})
    assert torch.equal(model.get_parameter("encoder.0.weight"), before)
    with pytest.raises(ValueError, match="unknown"):
        load(model, params_of(CNN()))


def test_frozen_batch_normalization_never_moves_whatever_calls_train() -> None:
    model = freeze(CNN(), in_head)
    for each in (model, copy.deepcopy(model)):
        norms = [m for m in each.modules() if isinstance(m, nn.BatchNorm2d)]
        before = [m.running_mean.clone() for m in norms if m.running_mean is not None]
        each.train()
        each.train(True)
        each(torch.randn(8, 1, 8, 8))
        assert all(
            torch.equal(a, m.running_mean) for a, m in zip(before, norms, strict=True) if m.running_mean is not None
        )
        assert not live_batch_norms(each)
    x, encoder = torch.randn(3, 1, 8, 8), model.get_submodule("encoder")
    assert torch.equal(encoder(x), encoder(x)), "dropout in a frozen part has no effect"
    assert copy.deepcopy(model).encoder.train.__self__ is not model.encoder  # type: ignore[union-attr]


def test_a_batch_normalization_is_live_only_if_its_statistics_are_trained() -> None:
    affine = freeze(CNN(), lambda name: in_head(name) or name.endswith(("1.weight", "1.bias")))
    assert [m.training for m in affine.train().modules() if isinstance(m, nn.BatchNorm2d)] == [False, False]
    statistics = freeze(CNN(), lambda name: in_head(name) or "running" in name)
    assert len(live_batch_norms(statistics.train())) == 2
    assert "encoder.1.running_mean" in params_of(statistics)
    assert "encoder.1.weight" not in params_of(statistics)


def test_tied_tensors_are_frozen_together() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

    assert set(params_of(freeze(Tied(), lambda name: name == "b.weight"))) == {"a.weight"}
    assert not params_of(freeze(Tied(), lambda name: False))


def test_constant_tables_of_integers_survive_loading() -> None:
    class Indexed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.BatchNorm1d(3)
            self.register_buffer("index", torch.arange(4))

    model = Indexed()
    model.layer(torch.randn(4, 3))
    load(model, params_of(model))
    assert int(model.layer.num_batches_tracked or 0) == 0
    assert model.index.tolist() == [0, 1, 2, 3]  # type: ignore[union-attr,operator]


def test_training_leaves_frozen_tensors_and_the_penalty_ignores_them() -> None:
    state = random_state(CNN)
    network: Any = FineTuned(CNN, weights_of(CNN), ("head",))
    task, site = Classification(network), Site("a", {"train": blobs(0, 24, (1, 8, 8))})
    start = task.first(0)
    for local in (
        LocalTraining(epochs=2, lr=0.1, weight_decay=0.5, optimizer="adamw"),
        LocalTraining(epochs=1, lr=0.1).with_penalty(Proximal(1.0)),
    ):
        end = local.fit(task, start, site, 0)
        assert end.keys() == start.keys()
        assert not torch.equal(end["head.weight"], start["head.weight"])
        model = cached_model(task, end)
        assert all(torch.equal(leaf, state[name]) for name, leaf in model.state_dict().items() if name in frozen(model))


def test_private_training_accepts_frozen_batch_normalization_and_clips_the_trained_part_only() -> None:
    data = blobs(0, 24, (1, 8, 8))
    site = Site("a", {"train": data})
    network = Network("cnn", (1, 8, 8), 2, (("width", 4), ("depth", 2)))
    dp = DPSGD(noise=1e-6, bound=0.01, unit="record", batch_size=24, epochs=1, lr=1.0)
    assert dp.trial(Classification(network), data)[0].startswith("DPSGD: this network has batch normalization")
    tuned: Any = FineTuned(network, weights_of(network), ("head",))
    task = Classification(tuned)
    assert dp.trial(task, data) == []
    start = task.first(0)
    change = tree.sub(dp.fit(task, start, site, 0), start)
    assert set(change) == {"head.weight", "head.bias"}
    assert 0 < tree.norm(change) <= 0.0101  # a mean of gradients, each of norm at most 0.01


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        (("head",), {"head.weight", "head.bias"}),
        (("encoder.4.*", "head"), {"encoder.4.weight", "head.weight", "head.bias"}),
        (("bias:encoder.*", "head"), {"encoder.1.bias", "encoder.5.bias", "head.weight", "head.bias"}),
        (
            ("norm:encoder.1.*", "head"),
            {"encoder.1.weight", "encoder.1.bias", "encoder.1.running_mean", "encoder.1.running_var"}
            | {"head.weight", "head.bias"},
        ),
        (("stats:encoder.1*", "head"), {"encoder.1.running_mean", "encoder.1.running_var", "head.weight", "head.bias"}),
    ],
)
def test_patterns_choose_what_is_trained(train: tuple[str, ...], expected: set[str]) -> None:
    network = FineTuned(CNN, weights_of(CNN), train)
    assert set(params_of(network())) == expected


def test_choices_that_make_no_sense_are_refused() -> None:
    start = weights_of(CNN)
    for train, message in (
        (("heads.*",), "'heads.\\*' matches no tensor"),
        (("adapters",), "'adapters' matches no tensor"),
        (("stats:*",), "matches statistics only"),
        (("layers:*",), "'layers' in 'layers:\\*' is unknown"),
        (("encoder",), "2 tensors would stay at their random start.*head.bias, head.weight"),
    ):
        with pytest.raises(ConfigError, match=message):
            FineTuned(CNN, start, train)()
    with pytest.raises(ConfigError, match="10 tensors would stay"):
        FineTuned(CNN, None, ("head",))()


def test_a_fine_tuned_network_is_a_network_to_everybody() -> None:
    network: Any = FineTuned(CNN, weights_of(CNN), ("head",))
    assert (network.name, network.inputs, network.outputs, network.options) == ("cnn", (1, 8, 8), 2, CNN.options)
    assert network.in_head("head.weight")
    assert network.in_encoder("encoder.0.weight")
    assert hash(network) == hash(copy.deepcopy(network))
    first, second = Classification(network).first(0), Classification(network).first(1)
    assert not torch.equal(first["head.weight"], second["head.weight"]), "the head starts from the study's seed"


def test_a_network_that_is_trained_whole_starts_from_the_weights() -> None:
    state = random_state(CNN)
    network: Any = FineTuned(CNN, weights_of(CNN))
    params = Classification(network).first(0)
    assert params.keys() == state.keys()
    assert all(torch.equal(params[name], state[name]) for name in state if not in_head(name))
    assert not torch.equal(params["head.weight"], state["head.weight"])


def test_running_statistics_leave_the_start_weights_as_fast_as_the_study_says() -> None:
    state, x = random_state(CNN), torch.randn(16, 1, 8, 8)
    name = "encoder.1.running_mean"
    for momentum, kept in ((None, 0.9), (0.5, 0.5), (1.0, 0.0)):
        model = FineTuned(CNN, replace(weights_of(CNN), norm_momentum=momentum))().train()
        batch = model.get_submodule("encoder.0")(x).mean((0, 2, 3))
        model(x)
        expected = kept * state[name] + (1 - kept) * batch
        torch.testing.assert_close(dict(model.named_buffers())[name], expected)


def test_a_momentum_without_batch_normalization_is_refused() -> None:
    plain = Network("mlp", (3,), 2, (("width", 4),))
    with pytest.raises(ConfigError, match="norm_momentum has no effect, because mlp has no batch normalization"):
        FineTuned(plain, replace(weights_of(plain), norm_momentum=0.1))()


LAYERS = [
    (nn.Linear(6, 5), torch.randn(3, 6)),
    (nn.Conv1d(4, 5, 3, padding=1), torch.randn(2, 4, 9)),
    (
        nn.Conv2d(4, 6, (3, 5), stride=2, padding=(1, 2), dilation=(1, 2), padding_mode="reflect"),
        torch.randn(2, 4, 12, 12),
    ),
    (nn.Conv3d(4, 5, 3, stride=(1, 2, 2)), torch.randn(2, 4, 6, 7, 8)),
]


@pytest.mark.parametrize(("layer", "x"), LAYERS, ids=lambda v: type(v).__name__)
def test_an_adapter_starts_without_effect_and_merges_exactly(layer: nn.Module, x: torch.Tensor) -> None:
    model = nn.Sequential(copy.deepcopy(layer))
    assert adapt(model, LowRank(rank=2, alpha=6.0), ()) == ("0",)
    assert torch.equal(model(x), layer(x))
    (adapted,) = model
    assert isinstance(adapted, Adapted)
    nn.init.normal_(adapted.lora_up.weight)  # type: ignore[arg-type]
    expected = model(x)
    assert not torch.allclose(expected, layer(x))
    down, up = (params_of(model)[f"0.lora_{part}.weight"] for part in ("down", "up"))
    weight = layer.weight + 3.0 * product(down, up)  # type: ignore[operator]
    assert torch.allclose(adapted.base.weight + 3.0 * product(down, up), weight)
    merged = merge_adapters(model)
    assert list(merged.state_dict()) == ["0.weight", "0.bias"]
    assert torch.allclose(merged(x), expected, atol=1e-5)


def test_factors_of_a_product_give_it_back_and_report_what_is_cut() -> None:
    rng = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 4, 3, 3, generator=rng), torch.randn(5, 2, 1, 1, generator=rng)
    weight = product(down, up)
    again_down, again_up, cut = factorized(weight, 2)
    assert again_down.shape == down.shape
    assert again_up.shape == up.shape
    assert torch.allclose(product(again_down, again_up), weight, atol=1e-5)
    assert cut == pytest.approx(0, abs=1e-5)
    one_down, one_up, cut = factorized(weight, 1)
    assert float((product(one_down, one_up) - weight).norm()) == pytest.approx(cut, rel=1e-5)
    assert factorized(torch.randn(2, 3), 5)[0].shape == (5, 3)


@pytest.mark.parametrize(
    ("model", "spec", "message"),
    [
        (nn.MultiheadAttention(8, 2), LowRank(("out_proj",), 2), "is inside nn.MultiheadAttention"),
        (nn.Sequential(nn.Conv2d(4, 4, 3, groups=4)), LowRank(("0",), 1), "is a grouped convolution"),
        (nn.Sequential(nn.Linear(4, 4)), LowRank(("0",), 4), "has 4 outputs of 4 numbers each, too few for rank 4"),
        (nn.Sequential(nn.Linear(4, 4)), LowRank(("x.*",), 1), "'x.\\*' matches no linear layer and no convolution"),
        (nn.Sequential(nn.ReLU()), LowRank(rank=1), "no layer outside the head takes adapters"),
    ],
)
def test_layers_that_cannot_have_adapters_are_refused(model: nn.Module, spec: LowRank, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adapt(model, spec, ())


def test_layers_that_share_weights_get_no_adapters() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with pytest.raises(ConfigError, match="shares its weights with another layer"):
        adapt(model, LowRank(("0",), 1), ())


def test_adapters_are_the_only_tensors_of_the_tree_and_merge_into_the_plain_network() -> None:
    network: Any = FineTuned(CNN, weights_of(CNN), ("adapters", "head"), LowRank(rank=2))
    task = Classification(network)
    params = task.first(0)
    assert set(factors(params)) == {"encoder.0", "encoder.4"}
    assert len(params) == 6
    assert task.first(0).keys() == params.keys()
    assert all(torch.equal(a, b) for a, b in zip(task.first(0).values(), params.values(), strict=True))
    torch.manual_seed(0)
    model = load(task.model(), {name: torch.randn_like(leaf) for name, leaf in params.items()}).eval()
    x = torch.randn(3, 1, 8, 8)
    expected = model(x)
    plain = merge_adapters(model)
    assert set(plain.state_dict()) == set(CNN().state_dict())
    assert torch.allclose(plain(x), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_gradients_of_single_examples_reach_adapters() -> None:
    network: Any = FineTuned(
        Network("mlp", (6,), 2), weights_of(Network("mlp", (6,), 2)), ("adapters", "head"), LowRank(rank=2)
    )
    data = blobs(0, 16, (6,))
    dp = DPSGD(noise=1e-6, bound=1.0, unit="record", batch_size=16, lr=1.0)
    task = Classification(network)
    assert dp.trial(task, data) == []
    start = task.first(0)
    change = tree.sub(dp.fit(task, start, Site("a", {"train": data}), 0), start)
    assert float(change["encoder.1.lora_up.weight"].abs().sum()) > 0


def test_weights_of_another_network_are_refused_with_the_names() -> None:
    start = stored({"x": torch.zeros(3), "y": torch.zeros(2)}, "other")
    with pytest.raises(ConfigError, match=r"task.weights: other does not fit the network cnn: 12 tensors do not fit"):
        FineTuned(CNN, start)()

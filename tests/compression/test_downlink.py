"""What sites receive, smaller: without loss if the codec has none, counted as sent, the same bits on both engines."""

from typing import Any

import pytest
import torch

pytest.importorskip("zstandard", reason="needs polyclinic[privacy]")

from polyclinic.compression.downlink import ALL, DownlinkPipeline, received_through
from polyclinic.compression.quantization import BFloat16, Int8, Sign
from polyclinic.compression.topk import TopK
from polyclinic.compression.zstd import Zstd
from polyclinic.core import serialization as saved
from polyclinic.core import tree
from polyclinic.core.pipeline import send_through
from polyclinic.core.rounds import train
from polyclinic.engines.local.in_process import InProcess
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.task_evaluation import Evaluated
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.optimization.scaffold import Scaffold
from polyclinic.methods.personalization.partial_personalization import fedbn
from polyclinic.testing import check_method
from tests.conftest import little_sites

TASK = Classification(Network("cnn", (1, 8, 8), 2, (("width", 4), ("depth", 2))))
LOCAL = LocalTraining(epochs=1, batch_size=8, lr=0.1)
METHODS: dict[str, Any] = {
    "fedavg": lambda: FedAvg(TASK, LOCAL),
    "scaffold": lambda: Scaffold(TASK, 3, LOCAL),
    "fedbn": lambda: fedbn(TASK, LOCAL),
    "sent": lambda: send_through(FedAvg(TASK, LOCAL), TopK(0.5, shared=True), Int8()),
}
FIRST = TASK.first(0)


def run(method: Any, rounds: int = 2, start: Any = None) -> Any:
    sites = little_sites()
    state = method.init(FIRST) if start is None else start
    for step in train(method, InProcess(method, sites, seed=0), state, rounds=rounds):
        state = step.state
    return state


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("transforms", [(Zstd(),), (BFloat16(), Zstd()), (Int8(), Zstd()), (Int8(),)], ids=str)
def test_every_method_keeps_its_promises(name: str, transforms: Any) -> None:
    check_method(received_through(METHODS[name](), FIRST, *transforms), FIRST, little_sites())


@pytest.mark.parametrize("name", METHODS)
def test_without_loss_it_changes_no_bit(name: str) -> None:
    plain, ours = run(METHODS[name]()), run(received_through(METHODS[name](), FIRST, Zstd()))
    assert all(torch.equal(plain.params[n], ours.params[n]) for n in plain.params)


@pytest.mark.parametrize(("transforms", "share"), [((BFloat16(),), 0.52), ((Int8(),), 0.40), ((Int8(), Zstd()), 0.75)])
def test_bytes_are_those_that_travel(transforms: Any, share: float) -> None:
    """A small model: scales, names and frames weigh more here than in a large one."""
    plain, ours = FedAvg(TASK, LOCAL), received_through(FedAvg(TASK, LOCAL), FIRST, *transforms)
    whole, request = plain.request(plain.init(FIRST)), ours.request(ours.init(FIRST))
    assert whole is not None
    assert request is not None
    assert request.nbytes("a") == tree.nbytes(request.trees[ALL]) < share * whole.nbytes("a")


@pytest.mark.parametrize(("transform", "least"), [(BFloat16(), 2.0**-8), (Int8(), 1 / 127)])
def test_only_the_model_is_rounded_and_the_server_keeps_it_whole(transform: Any, least: float) -> None:
    method = received_through(Scaffold(TASK, 3, LOCAL), FIRST, transform)
    state = run(method, rounds=1)
    whole, request = method.inner.request(state), method.request(state)
    assert whole is not None
    assert request is not None
    arrived = method.arrived(saved.decode(saved.encode(request)))
    assert arrived.trees.keys() == whole.trees.keys()
    for part, one in whole.trees.items():
        assert arrived.trees[part].keys() == one.keys()
        for name, leaf in one.items():
            error = (arrived.trees[part][name].double() - leaf.double()).abs().max() if leaf.numel() else 0.0
            assert float(error) <= (least * float(leaf.abs().max()) if part == "params" else 0.0), (part, name)
    assert any(not torch.equal(arrived.trees["params"][n], leaf) for n, leaf in whole.trees["params"].items())
    judged = Evaluated(method, TASK).site_model(method.evaluation_request(state), {})
    assert all(torch.equal(judged[n], leaf) for n, leaf in arrived.trees["params"].items())


def test_a_run_that_stops_goes_on_to_the_same_bits() -> None:
    method = received_through(FedAvg(TASK, LOCAL), FIRST, Int8(), Zstd())
    once = run(method, rounds=3)
    again = run(method, rounds=3, start=saved.decode(saved.encode(run(method, rounds=1))))
    assert all(torch.equal(once.params[n], again.params[n]) for n in once.params)


@pytest.mark.parametrize(
    ("transforms", "why"),
    [
        ((), "no downlink codec is given"),
        ((Sign(),), "Sign cannot compress requests"),
        ((TopK(0.1),), "TopK cannot"),
        ((Zstd(), Int8()), "Zstd must come last"),
        ((BFloat16(), Int8()), "numbers can be quantized once"),
    ],
)
def test_what_does_not_go_together_is_refused(transforms: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        received_through(FedAvg(TASK, LOCAL), FIRST, *transforms)


def test_a_message_that_would_unfold_beyond_the_model_is_refused() -> None:
    large = {"w": torch.zeros(2**24)}
    sender = received_through(FedAvg(TASK, LOCAL), large, Zstd())
    request = sender.request(sender.init(large))
    assert request is not None
    assert request.nbytes("a") < 10_000
    with pytest.raises(ValueError, match="exceeds the decompressed limit"):
        DownlinkPipeline(sender.inner, (Zstd(),), 100).arrived(request)

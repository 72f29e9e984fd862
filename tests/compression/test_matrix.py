"""Privacy × secrecy × compression × methods: each combination works or is refused in a sentence.

None is silently wrong: every transform is set to the limit in which it changes (nearly) nothing, so that what works
must give what the plain method gives.
"""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("cryptography", reason="needs polyclinic[privacy]")

from collections.abc import Callable

from polyclinic.compression.powersgd import PowerSGD
from polyclinic.compression.quantization import QSGD, BFloat16, Int8, LowRank, Sign
from polyclinic.compression.topk import TopK
from polyclinic.compression.zstd import Zstd
from polyclinic.core import tree
from polyclinic.core.method import Method
from polyclinic.core.pipeline import Transform, send_through
from polyclinic.core.rounds import train
from polyclinic.engines.local.in_process import InProcess
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.dp_sgd import DPSGD
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.optimization.fedopt import FedOpt
from polyclinic.methods.optimization.fedprox import FedProx
from polyclinic.methods.optimization.scaffold import Scaffold
from polyclinic.methods.personalization.partial_personalization import fedbn
from polyclinic.methods.robust.robust_method import Robust
from polyclinic.privacy.gaussian import AdaptiveClip, Clip, Gaussian
from polyclinic.privacy.sparse_vector import SparseVector, UncalibratedNoise
from polyclinic.secure_aggregation import SecureSum
from tests.conftest import little_sites

TASK = Classification(Network("cnn", (1, 8, 8), 2, (("width", 4), ("depth", 2), ("norm", "group"))))
PLAIN = LocalTraining(epochs=1, batch_size=100, lr=0.1)
PRIVATE = DPSGD(epochs=1, batch_size=100, lr=0.1, noise=1e-9, bound=1e3, unit="record")
FAR = 1e9

METHODS: dict[str, Callable[[LocalTraining], Method[Any]]] = {
    "fedavg": lambda local: FedAvg(TASK, local, uniform=True),
    "weighted": lambda local: FedAvg(TASK, local),
    "fedprox": lambda local: FedProx(TASK, local, mu=0.1, uniform=True),
    "fedbn": lambda local: fedbn(TASK, local, uniform=True),
    "scaffold": lambda local: Scaffold(TASK, 3, local),
    "fedopt": lambda local: FedOpt(TASK, local, "momentum", 1.0, uniform=True),
    "robust": lambda local: Robust(FedAvg(TASK, local, uniform=True)),
}
PRIVACY: dict[str, tuple[Transform, ...]] = {
    "open": (),
    "record": (),  # PRIVATE in place of PLAIN
    "site": (Clip(FAR), Gaussian(1e-16)),
    "adaptive": (AdaptiveClip(FAR, rate=1e-9, count_noise=0.01), Gaussian(1e-16)),
    "shared noise": (Clip(FAR), Gaussian(2e-15, share=3)),
    "sparse vector": (SparseVector(1.0, 1.0, 0.0, FAR, FAR, FAR),),
    "uncalibrated": (UncalibratedNoise(1e-9),),
}
SECRECY: dict[str, tuple[Transform, ...]] = {
    "clear": (),
    "secure": (SecureSum(threshold=3),),
    "secure weights": (SecureSum(heaviest=50.0, threshold=3),),
}
COMPRESSION: dict[str, tuple[Transform, ...]] = {
    "whole": (),
    "bf16": (BFloat16(),),
    "int8": (Int8(),),
    "qsgd": (QSGD(127, bucket=4),),
    "sign": (Sign(),),
    "top-k": (TopK(1.0),),
    "low rank": (LowRank(1.0, 1.0),),
    "power": (PowerSGD(3),),
    "shared power": (PowerSGD(3, shared=True),),
    "zstd": (Zstd(),),
    "int8+zstd": (Int8(), Zstd()),
    "low rank+int8": (LowRank(1.0, 1.0), Int8()),
}
LOSSY = {
    "sign": 3.0,
    "power": 1.0,
    "shared power": 1.5,
    "bf16": 0.02,
    "int8": 0.02,
    "qsgd": 0.06,
    "int8+zstd": 0.02,
    "low rank+int8": 0.05,
}


def combinations() -> Iterator[tuple[str, str, str, str, str]]:
    """Nearly all for FedAvg; for the other methods, those in which at most one other thing is unusual."""
    usual, rare = ("open", "clear", "whole"), {"bf16", "qsgd", "zstd", "low rank+int8"}
    for case in itertools.product(METHODS, PRIVACY, SECRECY, COMPRESSION, ("before", "after")):
        odd = sum(chosen != u for chosen, u in zip(case[1:4], usual, strict=True))
        if case[3:] != ("whole", "before") and (odd <= 1 or (case[0] == "fedavg" and case[3] not in rare)):
            yield case


def moved(method: Method[Any]) -> tree.Tree:
    """How far two rounds of ``method`` move the model."""
    first, sites = TASK.first(0), little_sites()
    state = method.init(first)
    for step in train(method, InProcess(method, sites), state, rounds=2):
        if step.lost:
            raise ValueError("; ".join(sorted(set(step.lost.values()))))
        state = step.state
    return tree.sub(state.params, first)


@pytest.fixture(scope="module")
def expected() -> dict[str, tree.Tree]:
    """What each method does by itself."""
    return {name: moved(make(PLAIN)) for name, make in METHODS.items()}


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in (1, 2))])
def test_every_combination_works_or_is_refused(part: int, expected: dict[str, tree.Tree]) -> None:
    counts, wrong = {"works": 0, "refused": 0}, []
    for name, privacy, secrecy, compression, place in itertools.islice(combinations(), part, None, 3):
        before = COMPRESSION[compression] if place == "before" else ()
        after = () if place == "before" else COMPRESSION[compression]
        transforms = (*before, *PRIVACY[privacy], *after, *SECRECY[secrecy])
        label = f"{name}: {', '.join(str(t) for t in transforms)}"
        try:
            inner = METHODS[name](PRIVATE if privacy == "record" else PLAIN)
            ours = moved(send_through(inner, *transforms) if transforms else inner)
        except (ValueError, RuntimeError) as refusal:
            counts["refused"] += 1
            if len(str(refusal).split()) < 8 or "Traceback" in str(refusal):
                wrong.append(f"{label}: refused, but not in a sentence: {refusal}")
            continue
        counts["works"] += 1
        gap = tree.norm(tree.sub(ours, expected[name])) / tree.norm(expected[name])
        # at a fiftieth of the heaviest weight, numbers lie on a grid fifty times as coarse
        if not gap <= LOSSY.get(compression, 2e-3) + 0.01 * (secrecy == "secure weights"):
            wrong.append(f"{label}: is off by {gap:.2g}")
    assert not wrong, "\n".join(wrong)
    assert counts["works"] > 26
    assert counts["refused"] > 26


@pytest.mark.parametrize(
    ("name", "privacy", "secrecy", "compression"),
    [
        ("fedavg", "record", "secure", "top-k"),
        ("fedavg", "shared noise", "secure", "top-k"),
        ("fedavg", "adaptive", "secure", "shared power"),
        ("fedavg", "site", "clear", "int8+zstd"),
        ("weighted", "open", "secure weights", "top-k"),
        ("scaffold", "open", "clear", "int8"),
        ("robust", "open", "clear", "int8+zstd"),
        ("fedbn", "record", "clear", "low rank"),
    ],
)
def test_these_must_work(name: str, privacy: str, secrecy: str, compression: str) -> None:
    inner = METHODS[name](PRIVATE if privacy == "record" else PLAIN)
    transforms = (*PRIVACY[privacy], *COMPRESSION[compression], *SECRECY[secrecy])
    assert tree.finite(moved(send_through(inner, *transforms)))


def test_batch_normalization_under_record_privacy_is_refused_with_the_remedy() -> None:
    task = replace(TASK, network=Network("cnn", (1, 8, 8), 2, (("width", 4), ("depth", 2))))
    method, sites = FedAvg(task, PRIVATE), little_sites()
    state = method.init(task.first(0))
    federation = InProcess(method, sites)
    federation.send(method.request(state), list(sites))
    assert all('norm = "group"' in arrival.lost for arrival in federation.replies())
    assert torch.get_num_threads() == 1

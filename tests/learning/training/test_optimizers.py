"""The optimizers give PyTorch's bits, without what PyTorch's classes bring along."""

import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from polyclinic.learning.training.local import LocalTraining

ROOT = Path(__file__).parents[3]
Optimizer = Literal["sgd", "adam", "adamw"]


@pytest.mark.parametrize(
    ("name", "theirs", "options"),
    [
        ("sgd", torch.optim.SGD, {}),
        ("sgd", torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.01}),
        ("sgd", torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        ("adam", torch.optim.Adam, {"weight_decay": 0.01}),
        ("adamw", torch.optim.AdamW, {"weight_decay": 0.01}),
    ],
)
def test_the_bits_are_those_of_the_classes(name: Optimizer, theirs: Any, options: Any) -> None:
    """Step by step, with a parameter that has no gradient now and then, and one that never has."""
    shapes, rng = ((3, 4), (5,), (2,)), torch.Generator().manual_seed(0)
    ours = [torch.randn(shape, generator=rng, requires_grad=True) for shape in shapes]
    copies = [leaf.detach().clone().requires_grad_() for leaf in ours]
    mine, other = LocalTraining(optimizer=name, **options)._optimizer(ours, 0.1), theirs(copies, 0.1, **options)
    for step in range(6):
        for i, (a, b) in enumerate(zip(ours, copies, strict=True)):
            gradient = torch.randn(a.shape, generator=rng)
            a.grad, b.grad = (None, None) if i == 2 or (i == 1 and step % 2) else (gradient, gradient.clone())
        mine.step()
        other.step()
        assert all(torch.equal(a, b) for a, b in zip(ours, copies, strict=True))


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_a_step_without_any_gradient_changes_nothing(name: Optimizer) -> None:
    leaf = torch.ones(3, requires_grad=True)
    LocalTraining(optimizer=name)._optimizer([leaf], 0.1).step()
    assert leaf.tolist() == [1, 1, 1]


@pytest.mark.slow
def test_training_imports_no_compiler() -> None:
    """It takes two seconds and 70 MB in each process, and nothing uses it."""
    script = (
        "import sys\nfrom tests.laws.test_methods import case\n"
        "from polyclinic.core.rounds import train\nfrom polyclinic.engines.local.in_process import InProcess\n"
        "for name in ('fedavg', 'scaffold', 'fedavgm'):\n"
        "    method, task, sites = case(name)\n"
        "    for step in train(method, InProcess(method, sites), method.init(task.first(0)), rounds=1): pass\n"
        "assert not step.lost\nprint('torch._dynamo' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"

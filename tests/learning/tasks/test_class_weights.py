"""Class weights: what they do to the loss, by hand, and that a rare class is found more often."""

import math
from typing import Any

import torch
from torch import nn

from polyclinic.learning.tasks.classification import Classification


class Says(nn.Module):
    """Log odds 0 against 1 for every example."""

    def forward(self, x: Any) -> Any:
        return torch.tensor([[0.0, 1.0]]).repeat(len(x), 1)


def test_a_weight_counts_an_example_so_often() -> None:
    batch = torch.zeros(3, 1), torch.tensor([0, 1, 1])
    rare, usual = -math.log(1 / (1 + math.e)), -math.log(math.e / (1 + math.e))
    network: Any = Says
    plain = Classification(network).loss(Says(), batch)
    weighted = Classification(network, class_weights=(4.0, 1.0)).loss(Says(), batch)
    torch.testing.assert_close(float(plain), (rare + 2 * usual) / 3, rtol=1e-5, atol=0)
    torch.testing.assert_close(float(weighted), (4 * rare + 2 * usual) / 6, rtol=1e-5, atol=0)

"""Attention over a bag of instances, such as the patches of a slide, of which only the whole has a label.

Ilse, Tomczak and Welling, "Attention-based Deep Multiple Instance Learning", ICML 2018, equation 9 (gated attention).
https://arxiv.org/abs/1802.04712.
"""

from typing import cast

import torch
from torch import Tensor, nn

from polyclinic.errors import ConfigError


class AttentionMIL(nn.Module):
    """Maps a bag [b, instances, features] to [b, outputs]. An instance of zeros is padding, with attention 0.

    A bag may have one channel before its instances, as an image has: [b, 1, instances, features].
    """

    def __init__(self, features: int, outputs: int, width: int = 64, attention: int = 32, dropout: float = 0.0) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(features, width), nn.ReLU(), nn.Dropout(dropout))
        self.content, self.gate = nn.Linear(width, attention), nn.Linear(width, attention)
        self.score = nn.Linear(attention, 1)
        self.head = nn.Linear(width, outputs)

    def attention(self, x: Tensor) -> Tensor:
        """Return the weight of each instance: [b, instances], with sum 1 in each bag."""
        x = x if x.ndim == 3 else x[:, 0]
        return self._attend(x, self.encoder(x))

    def forward(self, x: Tensor) -> Tensor:
        """Predict from the attention-weighted mean of the instances."""
        x = x if x.ndim == 3 else x[:, 0]
        h = self.encoder(x)
        return cast(Tensor, self.head((self._attend(x, h)[..., None] * h).sum(1)))  # z = Σ a_k h_k

    def _attend(self, x: Tensor, h: Tensor) -> Tensor:
        # a_k ∝ exp( wᵀ ( tanh(V h_k) ⊙ sigm(U h_k) ) )
        a = self.score(self.content(h).tanh() * self.gate(h).sigmoid())[..., 0]
        padding = (x == 0).all(2)
        a = a.masked_fill(padding & ~padding.all(1, keepdim=True), -torch.inf)
        return cast(Tensor, a.softmax(1))


def attention_mil(
    inputs: tuple[int, ...], outputs: int, width: int = 64, attention: int = 32, dropout: float = 0.0
) -> nn.Module:
    """Build the network for bags of shape ``inputs``, (instances, features) or (1, instances, features)."""
    if len(inputs) not in (2, 3) or inputs[:-2] not in ((), (1,)):
        raise ConfigError(f"attention-mil needs bags of (instances, features), not inputs of shape {inputs}")
    return AttentionMIL(inputs[-1], outputs, width, attention, dropout)

"""A vision transformer whose tensors have the names of the library timm, so that its checkpoints load without renaming.

Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, section 3.1, https://arxiv.org/abs/2010.11929; layers
are scaled as in Touvron et al., "Going deeper with Image Transformers", ICCV 2021, section 2,
https://arxiv.org/abs/2103.17239, and register tokens are those of Darcet et al., "Vision Transformers Need Registers",
ICLR 2024, https://arxiv.org/abs/2309.16588. The names, the order of tokens (class, registers, patches) and ε = 1e-6 of
layer normalizations are those of ``timm.models.vision_transformer`` (https://github.com/huggingface/pytorch-image-models).
Departures: there is no dropout and no stochastic depth.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyclinic.errors import ConfigError

EPSILON = 1e-6


class Attention(nn.Module):
    """Multi-head self-attention with one layer for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [b, n, width] to [b, n, width]."""
        b, n, width = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v)
        mixed: Tensor = self.proj(attended.transpose(1, 2).reshape(b, n, width))
        return mixed


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., width] to [..., width]."""
        mapped: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return mapped


class LayerScale(nn.Module):
    """Multiplication of each channel by a learned factor."""

    def __init__(self, width: int, start: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), start))

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., width] to [..., width]."""
        return x * self.gamma


class Block(nn.Module):
    """A transformer layer with normalization before attention and before the two linear layers."""

    def __init__(self, width: int, heads: int, hidden: int, layer_scale: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, EPSILON), nn.LayerNorm(width, EPSILON)
        self.attn, self.mlp = Attention(width, heads), Mlp(width, hidden)
        self.ls1: nn.Module = LayerScale(width, layer_scale) if layer_scale else nn.Identity()
        self.ls2: nn.Module = LayerScale(width, layer_scale) if layer_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [b, n, width] to [b, n, width]."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        mapped: Tensor = x + self.ls2(self.mlp(self.norm2(x)))
        return mapped


class PatchEmbed(nn.Module):
    """The linear map of patches to tokens."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [b, C, y, x] to tokens [b, n, width], row by row."""
        tokens: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return tokens


class TimmViT(nn.Module):
    """Maps images [b, C, y, x] to [b, outputs]."""

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: int,
        patch_size: int = 16,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_ratio: float = 4.0,
        registers: int = 0,
        layer_scale: float = 0.0,
        positions: Literal["all", "patches"] = "all",
        pool: Literal["token", "mean"] = "token",
    ) -> None:
        """Build the network with random weights.

        Args:
            inputs: (channels, y, x); the sides are multiples of ``patch_size``.
            outputs: The number of outputs.
            patch_size: The side of a patch in pixels.
            width: The number of channels of a token, a multiple of ``heads``.
            depth: The number of layers.
            heads: The number of attention heads.
            mlp_ratio: The number of hidden channels of a layer, relative to ``width``.
            registers: The number of register tokens.
            layer_scale: The first value of the factors of each channel; 0 for none.
            positions: Whether the class and register tokens have position embeddings, too.
            pool: What the head receives: the class token, or the mean of the patches' tokens.

        Raises:
            ConfigError: If sides or width do not fit.
        """
        super().__init__()
        if len(inputs) != 3 or inputs[1] % patch_size or inputs[2] % patch_size:
            raise ConfigError(
                f"timm-vit needs images whose sides are multiples of patch_size = {patch_size}, not "
                f"{' x '.join(map(str, inputs[1:]))}: set patch_size, or resize the images"
            )
        if width % heads:
            raise ConfigError(f"timm-vit: width = {width} is not a multiple of heads = {heads}")
        if positions not in ("all", "patches") or pool not in ("token", "mean"):
            raise ConfigError(f"timm-vit: positions = {positions!r} or pool = {pool!r} is unknown")
        patches = (inputs[1] // patch_size) * (inputs[2] // patch_size)
        self.extra, self.positions, self.pool = 1 + registers, positions, pool
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        if registers:
            self.reg_token = nn.Parameter(torch.zeros(1, registers, width))
        self.pos_embed = nn.Parameter(torch.empty(1, patches + (self.extra if positions == "all" else 0), width))
        self.patch_embed = PatchEmbed(inputs[0], width, patch_size)
        self.blocks = nn.Sequential(*(Block(width, heads, int(width * mlp_ratio), layer_scale) for _ in range(depth)))
        self.norm: nn.Module = nn.LayerNorm(width, EPSILON) if pool == "token" else nn.Identity()
        self.fc_norm: nn.Module = nn.LayerNorm(width, EPSILON) if pool == "mean" else nn.Identity()
        self.head = nn.Linear(width, outputs)
        self._draw()

    def _draw(self) -> None:
        """Draw the random start: normal with a standard deviation of 0.02 for weights and positions, 0 for biases."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.extra > 1:
            nn.init.normal_(self.reg_token, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the prediction [b, outputs]."""
        patches = self.patch_embed(x)
        tokens: list[Tensor] = [self.cls_token, *([self.reg_token] if self.extra > 1 else [])]
        extra = torch.cat(tokens, 1).expand(len(x), -1, -1)
        if self.positions == "all":
            h = torch.cat([extra, patches], 1) + self.pos_embed
        else:
            h = torch.cat([extra, patches + self.pos_embed], 1)
        h = self.norm(self.blocks(h))
        pooled = h[:, 0] if self.pool == "token" else h[:, self.extra :].mean(1)
        prediction: Tensor = self.head(self.fc_norm(pooled))
        return prediction

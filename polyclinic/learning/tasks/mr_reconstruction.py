"""Reconstruction of accelerated MR: an image from a part of its spectrum.

The undersampling and the three scores follow Zbontar et al., "fastMRI: An Open Dataset and Benchmarks for Accelerated
MRI", 2018, sections 5 and 6, https://arxiv.org/abs/1811.08839, for single-coil magnitude images. SSIM: Wang, Bovik,
Sheikh and Simoncelli, IEEE Transactions on Image Processing 2004, with fastMRI's uniform window of 7.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyclinic.core.tree import Tree
from polyclinic.errors import ConfigError
from polyclinic.learning.tasks.task import Batch, Task


@dataclass(frozen=True)
class Reconstruction(Task):
    """A full image from an undersampled one. Inputs and targets are float [b, C, *spatial] of the same shape.

    Attributes:
        residual: Whether the network says what to add to its input, instead of the image itself.
    """

    residual: bool = True

    kind: ClassVar[str] = "reconstruction"

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean absolute error."""
        return F.l1_loss(self.predict(model, batch[0]), batch[1])

    def predict(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """The image, [b, C, *spatial]."""
        found = model(inputs)
        found = found if isinstance(found, Tensor) else found[0]
        return inputs + found if self.residual else found

    def outputs(self, model: nn.Module, batch: Batch, *, full_metrics: bool = False) -> dict[str, Tensor]:
        """``psnr`` (dB), ``ssim`` and ``nmse`` of each image, [b]."""
        return likeness(self.predict(model, batch[0]).float(), batch[1])

    def summary(self, outputs: Tree) -> dict[str, float]:
        """Their means; ``loss`` is the mean NMSE."""
        found = {name: float(outputs[name].mean()) for name in ("psnr", "ssim", "nmse")}
        return found | {"loss": found["nmse"]}


def likeness(image: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Scores of each of [b, C, *spatial]: ``psnr`` in dB, ``ssim``, ``nmse``; the range is the truth's maximum."""
    axes = tuple(range(1, truth.ndim))
    error, energy = (image - truth).square(), truth.square().sum(axes).clamp_min(1e-12)
    peak = truth.amax(axes).clamp_min(1e-12)
    mse = error.mean(axes).clamp_min(1e-12 * peak.square())  # 120 dB for what is equal
    return {
        "psnr": 10 * (peak.square() / mse).log10(),
        "ssim": similarity(image, truth, peak),
        "nmse": error.sum(axes) / energy,
    }


def similarity(image: Tensor, truth: Tensor, peak: Tensor, width: int = 7) -> Tensor:
    """SSIM over a uniform window, of each of [b, C, *spatial]: [b]. ``peak`` [b] is the range of values."""
    side = min(width, *truth.shape[2:])
    pool: Any = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[truth.ndim - 2]
    n = side ** (truth.ndim - 2)
    wide = peak.double().view(-1, *[1] * (truth.ndim - 1))
    x, y = image.double(), truth.double()

    def mean(values: Tensor) -> Tensor:
        found: Tensor = pool(values, side, 1)
        return found

    c1, c2 = (0.01 * wide).square(), (0.03 * wide).square()
    mx, my, fix = mean(x), mean(y), n / max(n - 1, 1)  # sample variances
    vx, vy, vxy = (fix * (mean(a * b) - mean(a) * mean(b)) for a, b in ((x, x), (y, y), (x, y)))
    found = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx.square() + my.square() + c1) * (vx + vy + c2))
    each: Tensor = found.flatten(1).mean(1).float()
    return each


def columns(width: int, acceleration: float, center: float, rng: torch.Generator) -> Tensor:
    """Which columns of k-space are measured: bool [width], frequency 0 first.

    A share ``center`` around frequency 0 always is; of the others as many at random as make 1/``acceleration`` of all.

    Raises:
        ValueError: Where that is impossible.
    """
    if not acceleration >= 1 or not 0 < center <= 1:
        raise ConfigError(
            f"acceleration must be at least 1 and center within (0, 1], not {acceleration:g} and {center:g}"
        )
    k = torch.arange(width)
    near = torch.minimum(k, width - k)
    measured = near <= max(0, (round(center * width) - 1) // 2)
    rest = (~measured).nonzero().flatten()
    more = max(0, math.floor(width / acceleration) - int(measured.sum()))
    measured[rest[torch.randperm(len(rest), generator=rng)[:more]]] = True
    return measured


def undersample(images: Tensor, measured: Tensor) -> Tensor:
    """The magnitude of what is left of [b, C, *spatial] when only ``measured`` columns of its last axis are kept."""
    k = torch.fft.fftn(images.float(), dim=tuple(range(2, images.ndim)))
    kept: Tensor = torch.fft.ifftn(k * measured, dim=tuple(range(2, images.ndim)))
    magnitude: Tensor = kept.abs()
    return magnitude


@dataclass(frozen=True)
class Accelerated:
    """Images as pairs of an undersampled and a full one; the same columns for all of a site, as of one protocol.

    Attributes:
        data: Whose inputs are the full images; its targets are not used.
        measured: As ``columns`` gives it.
    """

    data: Any
    measured: Tensor

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: Tensor) -> Batch:
        images = self.data[index][0]
        return undersample(images, self.measured), images

"""Reconstruction of accelerated MR: an image from undersampled k-space.

The undersampling and the three scores follow Zbontar et al., "fastMRI: An Open Dataset and Benchmarks for Accelerated
MRI", 2018, sections 5 and 6, https://arxiv.org/abs/1811.08839, for single-coil magnitude images.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyclinic.core.tree import Tree
from polyclinic.errors import ConfigError
from polyclinic.learning.batch import Batch
from polyclinic.learning.tasks.image_quality import nmse, psnr, ssim
from polyclinic.learning.tasks.own_metrics import value_of
from polyclinic.learning.tasks.task import Task


@dataclass(frozen=True)
class Reconstruction(Task):
    """Reconstruction from an undersampled image. Inputs and targets are float [b, C, *spatial] of the same shape.

    Attributes:
        residual: Whether the network predicts a correction of its input instead of the image.
    """

    residual: bool = True

    kind: ClassVar[str] = "reconstruction"

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean absolute error."""
        return F.l1_loss(self.predict(model, batch[0]), batch[1])

    def predict(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Return the reconstructed image, [b, C, *spatial]."""
        output = model(inputs)
        output = output if isinstance(output, Tensor) else output[0]
        return inputs + output if self.residual else output

    def outputs(self, model: nn.Module, batch: Batch, *, full_metrics: bool = False) -> dict[str, Tensor]:
        """Return ``psnr`` (dB), ``ssim`` and ``nmse`` of each image, [b]."""
        images = self.predict(model, batch[0]).float()
        pairs = list(zip(images.cpu().numpy(), batch[1].cpu().numpy(), strict=True)) if self.metrics else []
        own = {name: torch.tensor([value_of(name, *pair) for pair in pairs]) for name in self.metrics}
        return likeness(images, batch[1]) | own

    def summary(self, outputs: Tree) -> dict[str, float]:
        """Compute the mean scores; ``loss`` is the mean NMSE."""
        metrics = {name: float(outputs[name].mean()) for name in ("psnr", "ssim", "nmse")}
        return metrics | {"loss": metrics["nmse"]}


def likeness(image: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Score each image of [b, C, *spatial]: ``psnr`` in dB, ``ssim``, ``nmse``. The range is the truth's maximum."""
    peak = truth.flatten(1).amax(1).clamp_min(1e-12)
    return {"psnr": psnr(image, truth, peak), "ssim": ssim(image, truth, peak), "nmse": nmse(image, truth)}


def columns(width: int, acceleration: float, center: float, rng: torch.Generator) -> Tensor:
    """Draw the measured columns of k-space: bool [width], frequency 0 first.

    The fraction ``center`` around frequency 0 is always measured; other columns are drawn at random up to
    1/``acceleration`` of all.

    Raises:
        ValueError: If ``acceleration`` or ``center`` is out of range.
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
    """Return the magnitude images [b, C, *spatial] from the ``measured`` columns of the last axis of k-space."""
    k = torch.fft.fftn(images.float(), dim=tuple(range(2, images.ndim)))
    image: Tensor = torch.fft.ifftn(k * measured, dim=tuple(range(2, images.ndim)))
    magnitude: Tensor = image.abs()
    return magnitude

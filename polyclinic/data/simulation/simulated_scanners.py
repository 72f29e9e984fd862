"""Simulated scanners: feature shift between sites that otherwise have the same kind of images.

A site's scanner is drawn once, from the study's seed and the site's name: gamma, contrast, brightness, blur and noise
level. Real scanners differ in more ways. The kinds of change follow the intensity and resolution part of Zhang et al.,
"Generalizing deep learning for medical image segmentation to unseen domains via deep stacked transformation", IEEE TMI
39:2531 (2020), https://doi.org/10.1109/TMI.2020.2973595; the ranges are chosen here.
"""

import hashlib
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from polyclinic.data.examples import DataError, Dataset, Examples, in_memory
from polyclinic.data.splits import rng_for


@dataclass(frozen=True)
class Scanner:
    """Changes that a simulated scanner applies to an image scaled to 0 to 1.

    Attributes:
        gamma: Exponent of the intensities.
        contrast: Factor, applied next.
        brightness: Offset, applied next.
        blur: Standard deviation of a Gaussian blur, in pixels.
        noise: Standard deviation of Gaussian noise.
    """

    gamma: float = 1.0
    contrast: float = 1.0
    brightness: float = 0.0
    blur: float = 0.0
    noise: float = 0.0

    @classmethod
    def of(cls, site: str, strength: float, seed: int) -> "Scanner":
        """Return the scanner of ``site``. Strength 0 changes nothing; 1 is a strong change."""
        rng = rng_for(seed, "scanner", site)
        gamma, contrast, brightness = rng.uniform(-1, 1, 3)
        blur, noise = rng.uniform(0, 1, 2)
        return cls(
            float(2 ** (gamma * strength)),
            float(1 + 0.3 * contrast * strength),
            float(0.2 * brightness * strength),
            float(1.0 * blur * strength),
            float(0.08 * noise * strength),
        )

    def __call__(self, data: Dataset) -> Examples:
        """Return the examples as this scanner shows them, with the same type, shape and targets.

        The image's own minimum and maximum correspond to 0 and 1; bytes remain bytes and are clipped. Noise depends
        only on an example's id, so it does not depend on the selection of examples.
        """
        examples = in_memory(data, "scanners = ...")
        if examples.inputs.ndim < 4:
            raise DataError("scanners = ... is for images; these examples are rows of a table")
        if not len(examples):
            return examples
        out = [self._one(x, name) for x, name in zip(examples.inputs, examples.ids, strict=True)]
        return replace(examples, inputs=torch.stack(out))

    def _one(self, image: Tensor, name: str) -> Tensor:
        x = image.float()
        low, high = x.min(), x.max()
        if image.dtype == torch.uint8:
            low, high = torch.tensor(0.0), torch.tensor(255.0)
        span = (high - low).clamp(min=1e-8)
        y = ((x - low) / span).clamp(0, 1) ** self.gamma
        y = blurred(y * self.contrast + self.brightness, self.blur)
        if self.noise:
            key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest())
            y = y + self.noise * torch.randn(y.shape, generator=torch.Generator().manual_seed(key))
        if image.dtype == torch.uint8:
            return (y.clamp(0, 1) * 255).round().to(torch.uint8)
        return y * span + low


def blurred(image: Tensor, deviation: float) -> Tensor:
    """Apply a Gaussian blur along every spatial axis, in pixels, with replicated borders. Shape [C, *spatial]."""
    if deviation < 1e-3:
        return image
    reach = max(1, math.ceil(3 * deviation))
    places = torch.arange(-reach, reach + 1).float()
    weights = torch.exp(-0.5 * (places / deviation) ** 2)  # exp(-x² / 2σ²)
    weights = weights / weights.sum()
    for axis in range(1, image.ndim):
        lines = image.movedim(axis, -1)
        flat = functional.pad(lines.reshape(-1, 1, lines.shape[-1]), (reach, reach), mode="replicate")
        image = functional.conv1d(flat, weights[None, None]).reshape(lines.shape).movedim(-1, axis)
    return image


def badge(strength: float) -> str:
    """Return the sentence that accompanies every result with simulated scanners."""
    return f"Simulated scanners: each site's images were changed by a simulated scanner of strength {strength:g}."

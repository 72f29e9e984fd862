"""Undersampled images for tests of reconstruction."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from polyclinic.learning.batch import Batch
from polyclinic.learning.tasks.mr_reconstruction import undersample


@dataclass(frozen=True)
class Accelerated:
    """Pairs of an undersampled and a full image, with the same columns for all images of a site.

    Attributes:
        data: Data whose inputs are the full images; its targets are not used.
        measured: The result of ``columns``.
    """

    data: Any
    measured: Tensor

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: Tensor) -> Batch:
        images = self.data[index][0]
        return undersample(images, self.measured), images

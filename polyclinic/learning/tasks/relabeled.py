"""Examples with other targets, for methods that correct or complete the labels of a site."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from polyclinic.learning.batch import Batch


@dataclass(frozen=True, eq=False)
class Relabeled:
    """The inputs of ``data`` with ``targets`` [n, ...] in place of its own."""

    data: Any
    targets: Tensor

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: Tensor) -> Batch:
        return self.data[index][0], self.targets[index]

"""One image on its way from a file to a tensor, and what a step of preprocessing is."""

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Picture:
    """One image as the steps see it.

    Attributes:
        pixels: float32, shape [C, *spatial] with two or three spatial axes (y, x) or (z, y, x). Pictures of 8 and 16
            bits come as 0 to 1, volumes in their own units.
        mask: int64, shape [*spatial], or None.
        spacing_mm: Millimeters between neighbors along each spatial axis, or None where the file does not say.
    """

    pixels: Tensor
    mask: Tensor | None = None
    spacing_mm: tuple[float, ...] | None = None

    @property
    def size(self) -> tuple[int, ...]:
        """Pixels along each spatial axis."""
        return tuple(self.pixels.shape[1:])


class Step(Protocol):
    """One step: fields are its options, ``name`` is its word in a study file, ``version`` changes with its numbers."""

    name: ClassVar[str]
    version: ClassVar[int]

    def __call__(self, picture: Picture) -> Picture:
        """The picture after the step."""

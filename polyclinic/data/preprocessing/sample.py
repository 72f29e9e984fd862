"""One image between file and tensor, and the protocol of a preprocessing step."""

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from polyclinic.data.geometry import Geometry


@dataclass(frozen=True)
class Picture:
    """One image as preprocessing steps see it.

    Attributes:
        pixels: float32, shape [C, *spatial] with two or three spatial axes (y, x) or (z, y, x). Pictures of 8 and 16
            bits are scaled to 0 to 1, pictures of signed or real numbers and volumes keep their values.
        mask: int64, shape [*spatial], or None. -1 marks pixels without annotation.
        spacing_mm: Millimeters between neighbors along each spatial axis, or None if the file does not state it.
        geometry: Position of the pixels in the file, or None if they come from no image file.
        truth: The mask on the file's own grid, or None. Steps that change labels change it too; steps that change the
            grid do not.
        original: The picture before all steps, if a step needs it.
        notes: Observations of the steps.
    """

    pixels: Tensor
    mask: Tensor | None = None
    spacing_mm: tuple[float, ...] | None = None
    geometry: Geometry | None = None
    truth: Tensor | None = None
    original: "Picture | None" = None
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> tuple[int, ...]:
        """Pixels along each spatial axis."""
        return tuple(self.pixels.shape[1:])


class Step(Protocol):
    """Preprocessing step. Its fields are its options, ``name`` its name in a study file, and ``version`` changes with
    its results.
    """

    name: ClassVar[str]
    version: ClassVar[int]

    def __call__(self, picture: Picture) -> Picture:
        """Return the picture after the step."""

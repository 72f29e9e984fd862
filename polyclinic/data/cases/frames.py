"""Frames of videos as examples."""

from dataclasses import dataclass
from pathlib import Path

import torch

from polyclinic.data.formats.safe_reading import LIMITS, Limits
from polyclinic.data.formats.video import frame_count, read_frame
from polyclinic.data.formats.volume import Volume
from polyclinic.errors import DataError


@dataclass(frozen=True)
class FrameSelection:
    """Which frames of a video are examples. Frames are counted from 0, in the order in which they are shown.

    Attributes:
        every: Distance between two of them: 25 selects frames 0, 25, 50, ...
        column: Instead: the column of a manifest that states the frame of each row.
    """

    every: int = 0
    column: str = ""

    def __post_init__(self) -> None:
        if self.every < 0:
            raise DataError(f"every = {self.every}: give the distance between two frames, such as 25")
        if bool(self.every) == bool(self.column):
            raise DataError("give either every, the distance between two frames, or column, which names them")

    def frames(self, path: Path, limits: Limits = LIMITS) -> "tuple[Frame, ...]":
        """Return every n-th frame of a video.

        Raises:
            Unreadable: If it cannot be read.
        """
        return tuple(Frame(number) for number in range(0, frame_count(path, limits), self.every))


@dataclass(frozen=True)
class Frame:
    """One frame of a video.

    Attributes:
        number: Its number, from 0.
    """

    number: int

    @property
    def name(self) -> str:
        """Name of the frame within its video."""
        return f"frame{self.number:07d}"

    @property
    def columns(self) -> dict[str, str]:
        """Metadata of the example."""
        return {"frame": str(self.number)}

    def read(self, path: Path, limits: Limits = LIMITS) -> Volume:
        """Read the frame: uint8 [1, rows, columns], or [3, 1, rows, columns] in color."""
        array = torch.from_numpy(read_frame(path, self.number, limits))
        color = array.ndim > 2
        pixels = array.movedim(-1, 0).unsqueeze(1).contiguous() if color else array[None]
        affine = torch.eye(4, dtype=torch.float64)
        return Volume(pixels, affine, "", "RGB" if color else "", False, positioned=False, full_scale=255.0)

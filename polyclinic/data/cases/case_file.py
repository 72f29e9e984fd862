"""One file per case: the preprocessed image and its mask, of which single patches can be read.

The file is an uncompressed safetensors file, so that a patch is a few reads of consecutive bytes: one per slice along
the first axis. Files are read by ``pread`` and not mapped, so that a file that disappears raises an error and does not
end the process; no descriptor is held between two reads, so that threads and forked processes share nothing.

An image is stored in one or two bytes per voxel where that loses nothing, or nearly nothing (``stored_as``), and
converted when a patch is read: ``value = stored / divisor + shift``, with one divisor and one shift per channel.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyclinic.core import atomic, serialization
from polyclinic.core.serialization import Corrupt, Place
from polyclinic.data.formats.value_ranges import ValueRange
from polyclinic.data.geometry import Geometry
from polyclinic.data.preprocessing.sample import Picture
from polyclinic.data.source import digest
from polyclinic.errors import DataError

VERSION = 1
MOST_PLACES = 10_000
"""Largest number of stored positions per class (nnU-Net, ``default_preprocessor.py``)."""
LEVELS = 2**16 - 2
FEWEST_LEVELS = 256
"""If the mean absolute deviation of a channel spans fewer of the 65,534 steps, the image is stored as float32."""
_SLICES = 16


@dataclass(frozen=True)
class Prepared:
    """An example after its preprocessing, ready to be stored.

    Attributes:
        picture: The image and its mask.
        values: The range of the values in its file.
        labels: The values of the mask on the original grid, in ascending order.
        notes: Observations of the reader.
    """

    picture: Picture
    values: ValueRange
    labels: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class CaseFile:
    """A stored case: what its header says, and reading of its voxels.

    Attributes:
        path: The file.
        pixels: Place of the image, [C, *spatial].
        mask: Place of the mask, [*spatial], if there is one.
        places: Places of up to ``MOST_PLACES`` positions of each class above 0, [n, axes] int32.
        divisor: Divisor of the stored values of each channel.
        shift: What is then added to each channel.
        labels: The values in the mask on the original grid, in ascending order.
        box: The first and the last voxel of the foreground along each axis; empty without foreground.
        spacing_mm: Millimeters between neighbors along each axis, if known.
        values: The range of the values in the original file.
        notes: Observations of the reader.
        geometry: Position of the stored grid in that of the original file, if it comes from one.
        truth: Place of the mask on the original grid, if that is another grid.
        hashes: Hash of the image as it is read, and of the mask.
    """

    path: Path
    pixels: Place
    mask: Place | None
    places: Mapping[int, Place]
    divisor: tuple[float, ...]
    shift: tuple[float, ...]
    labels: tuple[int, ...]
    box: tuple[tuple[int, int], ...]
    spacing_mm: tuple[float, ...] | None
    values: ValueRange
    notes: tuple[str, ...]
    geometry: Geometry | None
    truth: Place | None
    hashes: tuple[str, str]

    @property
    def size(self) -> tuple[int, ...]:
        """Voxels along each spatial axis."""
        return self.pixels.shape[1:]

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.pixels.shape[0]

    def image(self, low: Sequence[int], size: Sequence[int]) -> Tensor:
        """Return the voxels of the box of ``size`` that begins at ``low``: float32 [C, *size], 0 outside the image.

        Raises:
            DataError: If the file has changed since it was opened.
        """
        out, inside = _framed(self.size, low, size)
        values = torch.zeros(self.channels, *size)
        if inside is not None:
            part = values[(slice(None), *out)]
            part.copy_(self._read(self.pixels, inside))
            _restore(part, self.divisor, self.shift)
        return values

    def labels_at(self, low: Sequence[int], size: Sequence[int], outside: int = 0) -> Tensor:
        """Return the mask in the box of ``size`` that begins at ``low``: int64 [*size], ``outside`` beyond the image.

        Raises:
            DataError: If the file has changed since it was opened.
        """
        if self.mask is None:
            raise DataError(f"{self.path.name}: the case has no mask")
        out, inside = _framed(self.size, low, size)
        values = torch.full(tuple(size), outside, dtype=torch.int64)
        if inside is not None:
            values[out].copy_(self._read(self.mask, inside)[0])
        return values

    def original_mask(self) -> Tensor:
        """Return the mask on the grid of the original file: int64 [*original].

        Raises:
            DataError: If there is none, or the file has changed since it was opened.
        """
        if self.truth is None:
            return self.labels_at((0,) * len(self.size), self.size)
        return self._read(self.truth, [(0, side) for side in self.truth.shape])[0].long()

    def place(self, label: int, number: int) -> tuple[int, ...]:
        """Return one of the stored positions of ``label``."""
        place = self.places[label]
        row = place.shape[1] * place.dtype.itemsize
        with _opened(self.path) as handle:
            data = bytearray(row)
            _fill(handle, self.path, memoryview(data), place.start + number * row)
        return tuple(torch.frombuffer(data, dtype=place.dtype).tolist())

    def verify(self) -> bool:
        """Return whether the stored bytes have the checksum in the header. Reads the whole file."""
        try:
            content, meta = serialization.decode_with_meta(bytearray(self.path.read_bytes()), share=True)
        except (OSError, Corrupt):
            return False
        return meta.get("checksum") == _checksum(content)

    def _read(self, place: Place, inside: Sequence[tuple[int, int]]) -> Tensor:
        """Return the stored values between the bounds ``inside`` (first and last + 1 of each spatial axis).

        Shape [C, *spatial]; C is 1 for a mask.
        """
        channels, *sides = place.shape if len(place.shape) > len(inside) else (1, *place.shape)
        *outer, (top, bottom), (left, right) = inside
        height, width = sides[-2:]
        if not outer:
            starts, count = [c * height for c in range(channels)], 1
        elif (top, bottom) == (0, height):  # whole slices follow each other in the file
            starts, count = [(c * sides[0] + outer[0][0]) * height for c in range(channels)], outer[0][1] - outer[0][0]
        else:
            starts = [(c * sides[0] + z) * height for c in range(channels) for z in range(*outer[0])]
            count = 1
        buffer = torch.empty(len(starts), count * (bottom - top) * width, dtype=place.dtype)
        data, row = _bytes(buffer), buffer.shape[1] * place.dtype.itemsize
        with _opened(self.path) as handle:
            for i, start in enumerate(starts):
                at = place.start + (start + top) * width * place.dtype.itemsize
                _fill(handle, self.path, data[i * row : (i + 1) * row], at)
        slices = [stop - first for first, stop in outer]
        return buffer.view(channels, *slices, bottom - top, width)[..., left:right]


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """Open a file for the block, to be read without read-ahead. Yields its descriptor."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise _gone(path, error.strerror or type(error).__name__) from None
    try:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)
        yield handle
    finally:
        os.close(handle)


def _fill(handle: int, path: Path, buffer: memoryview, at: int) -> None:
    """Read the bytes from position ``at`` into ``buffer``."""
    while buffer:
        try:
            count = os.preadv(handle, [buffer], at)
        except OSError as error:
            raise _gone(path, error.strerror or type(error).__name__) from None
        if not count:
            raise _gone(path, "it is shorter than before")
        buffer, at = buffer[count:], at + count


def _gone(path: Path, why: str) -> DataError:
    return DataError(
        f"the stored case {path} cannot be read ({why}): it changed while the study ran. Start the study again; it is "
        "then rebuilt from the original files"
    )


def _framed(
    whole: Sequence[int], low: Sequence[int], size: Sequence[int]
) -> tuple[tuple[slice, ...], list[tuple[int, int]] | None]:
    """Return where a box lies in itself and in the image, as far as the two overlap; None if they do not."""
    inside = [(max(a, 0), min(a + n, of)) for a, n, of in zip(low, size, whole, strict=True)]
    if any(a >= b for a, b in inside):
        return (), None
    return tuple(slice(a - first, b - first) for (a, b), first in zip(inside, low, strict=True)), inside


def write(path: Path, prepared: Prepared) -> None:
    """Write a case to ``path`` atomically.

    Raises:
        OSError: If it cannot be written.
        DataError: If values are not finite.
    """
    picture = prepared.picture
    pixels, divisor, shift = stored_as(picture.pixels)
    mask = None if picture.mask is None else _small(picture.mask)
    content: dict[str, Any] = {
        "pixels": pixels,
        "mask": mask,
        "places": {} if mask is None else places_in(mask, prepared.labels),
        "divisor": divisor,
        "shift": shift,
        "labels": prepared.labels,
        "box": () if mask is None else box_of(mask),
        "spacing_mm": picture.spacing_mm,
        "values": {name: value for name, value in vars(prepared.values).items() if name != "id"},
        "notes": prepared.notes,
        "geometry": None if picture.geometry is None else picture.geometry.table,
        "truth": _small(picture.truth) if picture.truth is not None and _other_grid(picture) else None,
        "hashes": (digest(tuple(pixels.shape), divisor, shift, _bytes(pixels)), "" if mask is None else _hash(mask)),
    }
    head, tensors = serialization.header_of(content, {"case": str(VERSION), "checksum": _checksum(content)})
    with atomic.writing(path) as file:
        file.write(head)
        for tensor in tensors:
            file.write(_bytes(tensor))


def opened(path: Path, name: str = "") -> CaseFile | None:
    """Return the case at ``path`` by its header; None if there is none, or it is damaged or of another version.

    Args:
        path: The file.
        name: Name of the example, for messages about its values.
    """
    try:
        content, meta = serialization.layout(path)
        if meta.get("case") != str(VERSION):
            return None
        pixels, mask = content["pixels"], content["mask"]
        if len(content["divisor"]) != pixels.shape[0] or (mask is not None and mask.shape != pixels.shape[1:]):
            return None
        return CaseFile(
            path,
            content["pixels"],
            content["mask"],
            {int(label): place for label, place in content["places"].items()},
            content["divisor"],
            content["shift"],
            content["labels"],
            content["box"],
            content["spacing_mm"],
            ValueRange(id=name, **content["values"]),
            content["notes"],
            None if content["geometry"] is None else Geometry.of_table(content["geometry"]),
            content["truth"],
            content["hashes"],
        )
    except (OSError, Corrupt, KeyError, TypeError, ValueError, AttributeError, DataError):
        return None


def stored_as(pixels: Tensor) -> tuple[Tensor, tuple[float, ...], tuple[float, ...]]:
    """Return an image in as few bytes as suffice, with divisor and shift of each channel.

    - Bytes (8-bit pictures) remain bytes, and mean 0 to 1.
    - Whole numbers (CT, and MR without intensity steps) are kept exactly, in one or two bytes.
    - Other values are rounded to 65,534 equal steps between the channel's smallest and largest value; 0 is one of the
      steps, so that a background of 0 remains exactly 0. The error is at most half a step, such as 0.0001 for values
      from -5 to 8. Half precision (float16), which other programs use here, has steps of 0.002 to 0.004 there.
    - If the values of a channel are so unequal that their mean absolute deviation is less than 256 of these steps, the
      image is kept as float32.
    """
    channels = len(pixels)
    if pixels.dtype == torch.uint8:
        return pixels.contiguous(), (255.0,) * channels, (0.0,) * channels
    ranges = [tuple(float(end) for end in channel.aminmax()) for channel in pixels]
    if not all(math.isfinite(low) and math.isfinite(high) for low, high in ranges):
        raise DataError("the image contains NaN or infinite values after preprocessing")
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    if low >= -(2**15) and high < 2**15 and all(_whole(channel) for channel in pixels):
        kind = torch.uint8 if low >= 0 and high < 256 else torch.int16
        return pixels.to(kind).contiguous(), (1.0,) * channels, (0.0,) * channels
    divisors = tuple(_float32(LEVELS / (high - low)) if high > low else 1.0 for low, high in ranges)
    deviations = [_deviation(channel) for channel in pixels]
    if any(d * s < FEWEST_LEVELS for d, s, (low, high) in zip(divisors, deviations, ranges, strict=True) if high > low):
        return pixels.float().contiguous(), (1.0,) * channels, (0.0,) * channels
    stored, shifts = torch.empty(pixels.shape, dtype=torch.int16), []
    for out, channel, divisor, (low, high) in zip(stored, pixels, divisors, ranges, strict=True):
        middle = round((low + high) / 2 * divisor) if high > low else 0
        shifts.append(_float32(middle / divisor) if high > low else _float32(low))
        for part, values in zip(out.split(_SLICES), channel.split(_SLICES), strict=True):
            steps = (values.double() * divisor).round() - middle if high > low else torch.zeros_like(values)
            part.copy_(steps.clamp(-(2**15), 2**15 - 1))
    return stored, divisors, tuple(shifts)


def as_stored(pixels: Tensor) -> Tensor:
    """Return an image [C, *spatial] with the values that it has after it was stored and read, float32."""
    stored, divisors, shifts = stored_as(pixels)
    values = stored.float()
    _restore(values, divisors, shifts)
    return values


def _restore(values: Tensor, divisors: Sequence[float], shifts: Sequence[float]) -> None:
    """Convert stored values [C, ...] in place."""
    for channel, divisor, shift in zip(values, divisors, shifts, strict=True):
        if divisor != 1:
            channel.div_(divisor)
        if shift != 0:
            channel.add_(shift)


def places_in(mask: Tensor, labels: Sequence[int]) -> dict[str, Tensor]:
    """Return up to ``MOST_PLACES`` positions of each label above 0: int32 [n, axes], by the label as text.

    Of more positions, one is drawn at random from each of ``MOST_PLACES`` equal parts of their list in memory order.
    """
    rng, found = torch.Generator().manual_seed(0), {}
    for label in (label for label in labels if label > 0):
        where = (mask == label).flatten().nonzero().flatten()
        if not len(where):  # a structure of the original grid that is too small for this one
            continue
        if (count := len(where)) > MOST_PLACES:
            inside = torch.rand(MOST_PLACES, generator=rng, dtype=torch.float64)
            where = where[((torch.arange(MOST_PLACES) + inside) * (count / MOST_PLACES)).long().clamp(max=count - 1)]
        axes = []
        for side in reversed(mask.shape):
            axes.append(where % side)
            where = where // side
        found[str(label)] = torch.stack(axes[::-1], dim=1).int()
    return found


def box_of(mask: Tensor) -> tuple[tuple[int, int], ...]:
    """Return the first and the last voxel above 0 along each axis; nothing if there is none."""
    bounds = []
    for axis in range(mask.ndim):
        line = (mask > 0).movedim(axis, 0).flatten(1).any(1).nonzero().flatten()
        if not len(line):
            return ()
        bounds.append((int(line[0]), int(line[-1])))
    return tuple(bounds)


def _other_grid(picture: Picture) -> bool:
    return picture.geometry is not None and not picture.geometry.same_grid


def _whole(channel: Tensor) -> bool:
    return all(bool((part == part.round()).all()) for part in channel.split(_SLICES))


def _deviation(channel: Tensor) -> float:
    """Return the mean absolute deviation from the mean, which a few extreme values hardly change."""
    parts, count = channel.split(_SLICES), channel.numel()
    mean = sum(float(part.double().sum()) for part in parts) / count
    return sum(float((part.double() - mean).abs().sum()) for part in parts) / count


def _small(mask: Tensor) -> Tensor:
    low, high = (int(end) for end in mask.aminmax())
    return mask.to(torch.uint8 if low >= 0 and high < 256 else torch.int16).contiguous()


def _float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))


def _hash(tensor: Tensor) -> str:
    return digest(tuple(tensor.shape), str(tensor.dtype), _bytes(tensor))


def _checksum(content: Mapping[str, Any]) -> str:
    parts = [
        content["pixels"],
        content["mask"],
        content["truth"],
        *(place for _, place in sorted(content["places"].items())),
    ]
    return digest(*(_hash(part) for part in parts if part is not None))


def _bytes(tensor: Tensor) -> memoryview:
    data: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(data)

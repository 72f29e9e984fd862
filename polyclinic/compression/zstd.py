"""Lossless bytes: what is left to gain after numbers were made small.

Zstandard (RFC 8878) over the byte planes of every tensor: first bytes together, then second bytes, for the exponents
of neighbors are alike and their last bits are not. A frame is opened only if it says how long it is, and no further
than that; for a frame of thirty kilobytes can hold a gigabyte of zeros.
"""

import io
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from polyclinic.compression.quantization import number_limit
from polyclinic.core import serialization as bytes_of
from polyclinic.core import tree
from polyclinic.core.aggregates import WeightedMean
from polyclinic.core.pipeline import Transform
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import MissingDependency, ProtocolError

_DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16)
}


@dataclass(frozen=True)
class Zstd(Transform):
    """Sends all tensors as one compressed frame. Exact; stands last, where bytes matter.

    Attributes:
        level: From 1, fast, to 19, small.
    """

    level: int = 3

    dense: ClassVar[bool] = False

    @property
    def additive(self) -> bool:
        """No."""
        return False

    def validate(self, before: tuple[Transform, ...], after: tuple[Transform, ...]) -> list[str]:
        """Nothing can be gained, or read, after it."""
        found = [f"Zstd must come last: {type(after[0]).__name__} cannot read compressed bytes"] if after else []
        return found if 1 <= self.level <= 19 else [*found, "Zstd: level must be from 1 to 19"]

    def init(self, params: Tree) -> Trees:
        """How far a frame may unfold, in bytes."""
        return {"limit": {"bytes": 8 * number_limit(params) + tree.nbytes(params)}}

    def encode(
        self, sent: WeightedMean, notes: Trees, memory: Trees, site: Site, round: int
    ) -> tuple[WeightedMean, Trees]:
        """One frame."""
        whole = bytes_of.encode({name: leaf for key, x in sent.total.items() for name, leaf in [_planes(key, x)]})
        frame = _zstandard().ZstdCompressor(level=self.level).compress(whole)
        return WeightedMean({"zstd": torch.frombuffer(bytearray(frame), dtype=torch.uint8)}, sent.weight), memory

    def decode(self, received: WeightedMean, state: Trees) -> tuple[WeightedMean, Trees]:
        """The tensors in it.

        Raises:
            ValueError: Where the frame is broken, or would unfold beyond the limit.
        """
        if received.total.keys() != {"zstd"} or (frame := received.total["zstd"]).dtype != torch.uint8:
            raise ProtocolError("this is not one compressed frame")
        whole = bytes_of.decode(unfold(frame.contiguous().numpy().tobytes(), int(state["limit"]["bytes"])))
        if not isinstance(whole, dict) or not all(isinstance(leaf, Tensor) for leaf in whole.values()):
            raise ProtocolError("the frame holds something else than tensors")
        return WeightedMean(dict(_whole(key, leaf) for key, leaf in whole.items()), received.weight), state


def unfold(frame: bytes, limit: int) -> bytes:
    """The bytes in a Zstandard ``frame``, if they are at most ``limit``.

    Raises:
        ValueError: Where it does not say how many they are, says too many, or holds another number of them.
    """
    zstandard = _zstandard()
    try:
        size = zstandard.get_frame_parameters(frame).content_size
        if size in (zstandard.CONTENTSIZE_UNKNOWN, zstandard.CONTENTSIZE_ERROR) or size > limit:
            raise ProtocolError(f"a compressed frame of {len(frame)} bytes would unfold beyond the limit of {limit}")
        reader = zstandard.ZstdDecompressor(max_window_size=2**27).stream_reader(io.BytesIO(frame))
        whole: bytes = reader.read(size + 1)
    except zstandard.ZstdError as error:
        raise ProtocolError(f"the compressed frame is broken: {error}") from None
    if len(whole) != size:
        raise ProtocolError(f"a compressed frame says {size} bytes and holds {len(whole)}")
    return whole


def _planes(name: str, leaf: Tensor) -> tuple[str, Tensor]:
    kind = str(leaf.dtype).removeprefix("torch.")
    if not leaf.numel() or kind not in _DTYPES:
        return f"{name}:raw", leaf
    size = leaf.element_size()
    planes = leaf.contiguous().reshape(-1, 1).view(torch.uint8).T.contiguous()
    return f"{name}:{kind}", planes.reshape(size, *leaf.shape)


def _whole(key: str, planes: Tensor) -> tuple[str, Tensor]:
    name, _, kind = key.rpartition(":")
    if kind == "raw":
        return name, planes
    if kind not in _DTYPES or planes.dtype != torch.uint8 or planes.shape[0] != _DTYPES[kind].itemsize:
        raise ProtocolError(f"{key} is not what Zstd sends")
    whole = planes.reshape(planes.shape[0], -1).T.reshape(-1).view(_DTYPES[kind])
    return name, whole.reshape(planes.shape[1:])


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise MissingDependency("privacy", "Zstd needs zstandard") from error
    return zstandard

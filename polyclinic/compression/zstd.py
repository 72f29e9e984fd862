"""Lossless compression, in addition to the codecs.

Zstandard (RFC 8878) over the byte planes of every tensor: all first bytes, then all second bytes, because the exponents
of neighboring numbers are similar and their last bits are not. A frame is decompressed only if it declares its size,
and only up to this size, because a frame of thirty kilobytes can hold a gigabyte of zeros.
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
    """Sends all tensors as one compressed frame, losslessly. Must be the last transform.

    Attributes:
        level: From 1 (fast) to 19 (small).
    """

    level: int = 3

    dense: ClassVar[bool] = False

    @property
    def additive(self) -> bool:
        """Always False: compressed frames cannot be summed."""
        return False

    def validate(self, before: tuple[Transform, ...], after: tuple[Transform, ...]) -> list[str]:
        """Check that no transform follows, and the level."""
        problems = [f"Zstd must come last: {type(after[0]).__name__} cannot read compressed bytes"] if after else []
        return problems if 1 <= self.level <= 19 else [*problems, "Zstd: level must be from 1 to 19"]

    def init(self, params: Tree) -> Trees:
        """Return the maximum size of a decompressed frame, in bytes."""
        return {"limit": {"bytes": 8 * number_limit(params) + tree.nbytes(params)}}

    def encode(
        self, sent: WeightedMean, notes: Trees, memory: Trees, site: Site, round: int
    ) -> tuple[WeightedMean, Trees]:
        """Compress all tensors to one frame."""
        data = bytes_of.encode({name: leaf for key, x in sent.total.items() for name, leaf in [_planes(key, x)]})
        frame = _zstandard().ZstdCompressor(level=self.level).compress(data)
        return WeightedMean({"zstd": torch.frombuffer(bytearray(frame), dtype=torch.uint8)}, sent.weight), memory

    def decode(self, received: WeightedMean, state: Trees) -> tuple[WeightedMean, Trees]:
        """Decompress the tensors.

        Raises:
            ValueError: If the frame is corrupt, or would decompress beyond the limit.
        """
        if received.total.keys() != {"zstd"} or (frame := received.total["zstd"]).dtype != torch.uint8:
            raise ProtocolError("expected a single compressed frame")
        leaves = bytes_of.decode(unfold(frame.contiguous().numpy().tobytes(), int(state["limit"]["bytes"])))
        if not isinstance(leaves, dict) or not all(isinstance(leaf, Tensor) for leaf in leaves.values()):
            raise ProtocolError("the frame contains other values than tensors")
        return WeightedMean(dict(_joined(key, leaf) for key, leaf in leaves.items()), received.weight), state


def unfold(frame: bytes, limit: int) -> bytes:
    """Decompress a Zstandard ``frame`` if its content has at most ``limit`` bytes.

    Raises:
        ValueError: If it does not declare its size, declares more than ``limit``, or has another size.
    """
    zstandard = _zstandard()
    try:
        size = zstandard.get_frame_parameters(frame).content_size
        if size in (zstandard.CONTENTSIZE_UNKNOWN, zstandard.CONTENTSIZE_ERROR) or size > limit:
            raise ProtocolError(f"a compressed frame of {len(frame)} bytes exceeds the decompressed limit of {limit}")
        reader = zstandard.ZstdDecompressor(max_window_size=2**27).stream_reader(io.BytesIO(frame))
        content: bytes = reader.read(size + 1)
    except zstandard.ZstdError as error:
        raise ProtocolError(f"the compressed frame is corrupt: {error}") from None
    if len(content) != size:
        raise ProtocolError(f"a compressed frame declares {size} bytes and contains {len(content)}")
    return content


def _planes(name: str, leaf: Tensor) -> tuple[str, Tensor]:
    kind = str(leaf.dtype).removeprefix("torch.")
    if not leaf.numel() or kind not in _DTYPES:
        return f"{name}:raw", leaf
    size = leaf.element_size()
    flat = leaf.contiguous().as_strided((leaf.numel(), 1), (1, 1))  # a column is contiguous with any last stride
    planes = flat.view(torch.uint8).T.contiguous()
    return f"{name}:{kind}", planes.reshape(size, *leaf.shape)


def _joined(key: str, planes: Tensor) -> tuple[str, Tensor]:
    name, _, kind = key.rpartition(":")
    if kind == "raw":
        return name, planes
    if kind not in _DTYPES or planes.dtype != torch.uint8 or planes.shape[0] != _DTYPES[kind].itemsize:
        raise ProtocolError(f"{key} is not a valid tensor of Zstd")
    flat = planes.reshape(planes.shape[0], -1).T.reshape(-1).view(_DTYPES[kind])
    return name, flat.reshape(planes.shape[1:])


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise MissingDependency("privacy", "Zstd needs zstandard") from error
    return zstandard

"""Reader of videos (MP4, MOV, AVI, MKV, WebM, MPEG, WMV): single frames, by their number in order of display.

PyAV (https://pyav.org) decodes with FFmpeg. The container is that of the suffix, and only files are opened: a playlist
that names other files or addresses is refused. Frames are decoded from the beginning, because seeking is exact for some
codecs only; a thread that reads the frames of a video in order decodes each of them once.
"""

import importlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from polyclinic.data.formats.safe_reading import LIMITS, Limits, Unreadable, fits, refusing, regular_file
from polyclinic.errors import MissingDependency

_CONTAINERS = {
    **dict.fromkeys((".mp4", ".m4v", ".mov"), "mov"),
    **dict.fromkeys((".mkv", ".webm"), "matroska"),
    **dict.fromkeys((".mpg", ".mpeg"), "mpeg"),
    ".avi": "avi",
    ".wmv": "asf",
}
VIDEOS = tuple(_CONTAINERS)
"""Suffixes of videos."""
_CODECS = (
    *("h264", "hevc", "av1", "libdav1d", "libaom-av1", "vp8", "vp9", "mpeg4", "msmpeg4v3", "mpeg1video", "mpeg2video"),
    *("mjpeg", "wmv2", "wmv3", "vc1", "ffv1", "huffyuv", "rawvideo", "png"),
)
MOST_FRAMES = 2**20
"""Frames of one video, at most."""
_PERSONAL = ("title", "author", "artist", "comment", "description", "location", "location-eng", "com.apple.quicktime")


def frame_count(path: Path, limits: Limits = LIMITS) -> int:
    """Return the number of frames of a video, without decoding them.

    Raises:
        Unreadable: If it is damaged or beyond the limits.
        MissingDependency: If PyAV is not installed.
    """
    with _opened(path, limits) as (container, stream), refusing(path, "is not a sound video"):
        count, stored, end = 0, 0, 0.0
        for packet in container.demux(stream):
            stored += bool(packet.size)
            count += bool(packet.size and not packet.is_discard)
            if packet.pts is not None:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if count > MOST_FRAMES:
                raise Unreadable(path, f"has more than {MOST_FRAMES} frames")
        stated = _seconds(container, stream)
    if not count:
        raise Unreadable(path, "contains no frames")
    if stream.frames - stored > max(0.05 * stream.frames, 1):
        raise Unreadable(path, f"is truncated: {stored} of the {stream.frames} frames that it states are present")
    if stated - end > max(0.05 * stated, 1.0):
        raise Unreadable(path, f"is truncated: {end:.1f} of the {stated:.1f} seconds that it states are present")
    return count


def _seconds(container: Any, stream: Any) -> float:
    """Return the length that a video states; 0 if it states none, or only one that includes sound."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    alone = len(container.streams) == 1 and container.duration
    return container.duration / 1e6 if alone else 0.0


def frame_rate(path: Path, limits: Limits = LIMITS) -> float:
    """Return the frames per second that a video states, or 25 if it states none."""
    with _opened(path, limits) as (_, stream):
        rate = stream.average_rate
        return float(rate) if rate else 25.0


def personal_metadata(path: Path) -> list[str]:
    """Return the names of a video's metadata that may name a person or a place."""
    try:
        with _opened(path, LIMITS) as (container, _):
            keys = {str(key).lower() for key in container.metadata}
    except (Unreadable, MissingDependency):
        return []
    return sorted(f"text ({key})" for key in keys if key.startswith(_PERSONAL))


@dataclass
class _Position:
    """A video that a thread is decoding: the next frame, and its number."""

    key: tuple[str, int, int]
    number: int
    frames: Iterator[Any]


_thread = threading.local()


def read_frame(path: Path, number: int, limits: Limits = LIMITS) -> "np.ndarray[Any, Any]":
    """Return one frame: uint8 [rows, columns, 3] in RGB, or [rows, columns] if the video is gray.

    Args:
        path: The video.
        number: The frame's number, from 0.
        limits: Limits on the file and on the frame.

    Raises:
        Unreadable: If it is damaged, beyond the limits, or has no such frame.
    """
    regular_file(path, limits)
    status = path.stat()
    key = (str(path), status.st_mtime_ns, os.getpid())
    position: _Position | None = getattr(_thread, "position", None)
    if position is None or position.key != key or position.number > number:
        position = _Position(key, 0, _decoded(path, limits))
    _thread.position = None  # after an error the video is opened anew
    with refusing(path, f"frame {number} cannot be decoded"):
        while (frame := next(position.frames, None)) is not None:
            position.number += 1
            if position.number > number:
                _thread.position = position
                return _pixels(path, frame)
    raise Unreadable(path, f"has no frame {number}: {position.number} can be decoded, counted from 0")


def _decoded(path: Path, limits: Limits) -> Iterator[Any]:
    with _opened(path, limits) as (container, stream):
        size = stream.codec_context.height, stream.codec_context.width
        for frame in container.decode(stream):
            if (frame.height, frame.width) != size:
                raise Unreadable(path, "changes its size from frame to frame")
            yield frame


def _pixels(path: Path, frame: Any) -> "np.ndarray[Any, Any]":
    if any(component.bits > 8 for component in frame.format.components):
        raise Unreadable(path, "has more than 8 bits for each color: convert it to 8 bits")
    gray = len(frame.format.components) == 1 and frame.format.name.startswith("gray")
    pixels: np.ndarray[Any, Any] = frame.to_ndarray(format="gray" if gray else "rgb24")
    return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90) % 4)) if frame.rotation else pixels


@contextmanager
def _opened(path: Path, limits: Limits) -> Iterator[tuple[Any, Any]]:
    """Open a video for the block, after checking its size. Yields the container and its stream of pictures."""
    try:
        av = importlib.import_module("av")
    except ImportError:
        raise MissingDependency("video", f"{path.name} is a video: reading it needs PyAV") from None
    regular_file(path, limits)
    how: dict[str, Any] = {"format": _CONTAINERS[path.suffix.lower()], "options": {"protocol_whitelist": "file"}}
    with refusing(path, "is not a sound video"):
        container = av.open(str(path), **how)
    with container:
        streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if len(streams) != 1:
            raise Unreadable(path, f"contains {len(streams)} streams of pictures, not 1")
        context = streams[0].codec_context
        if context is None or context.name not in _CODECS:
            raise Unreadable(
                path, "is compressed by a codec that is not read: convert it to H.264 or, without loss, FFV1"
            )
        fits(path, (context.height, context.width, 3), 1, limits, "video")
        context.thread_count = 1
        yield container, streams[0]

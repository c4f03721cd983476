"""Frames of a video file that equal FFmpeg's own full decode, or a reason why there are none.

Containers lie about their length, decoders conceal damage, and seeking may land anywhere. So a file
is decoded whole once (`verify`); later reading (`frames_of`) begins only at key frames from which
decoding was then seen to give the same frames again.
"""

from __future__ import annotations

import os
import zlib
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import av
import numpy as np
import torch
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from jaxtyping import UInt8
from torch import Tensor
from torch.nn.functional import interpolate

EXTENSIONS = {
    ".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg",
    ".mts", ".ogv", ".webm", ".wmv",
}  # fmt: skip
VERSION = 3  # raise when `verify` finds or refuses other things: files are then verified again
STRICT = {"err_detect": "explode"}  # FFmpeg raises where it would conceal damage
CHECKED, APART = 4, 8  # frames compared after each seek; least distance between places to seek to

Mark = tuple[int | None, int]  # time stamp and digest of a frame


class DamagedVideo(Exception):
    """The file cannot be trusted; the message says why."""


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What the verifying pass found."""

    frames: int  # really there
    width: int  # upright, as is height
    height: int
    fps: float  # on average
    bytes: int
    turns: int  # quarter turns, counter-clockwise, that make a frame upright
    keys: list[list[int]]  # [frame number, time stamp]: where decoding may begin


@contextmanager
def _opened(path: Path | str) -> Iterator[tuple[InputContainer, av.VideoStream]]:
    try:
        # The whole path: a relative one with a colon would be of some protocol.
        name = os.path.abspath(path)
        with av.open(name, options=STRICT, metadata_errors="replace") as container:
            stream = _only_stream(container)
            stream.codec_context.options = STRICT
            stream.thread_type = "NONE"
            yield container, stream
    except (FFmpegError, OSError, ValueError, MemoryError) as error:
        raise DamagedVideo(f"cannot be decoded ({type(error).__name__}: {error})") from error


def _only_stream(container: InputContainer) -> av.VideoStream:
    cover = Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & cover]
    if len(streams) > 1:
        sizes = ", ".join(f"{stream.width} x {stream.height}" for stream in streams)
        raise DamagedVideo(f"{len(streams)} video streams ({sizes}): which one is meant?")
    if not streams:
        raise DamagedVideo("no video stream")
    if streams[0].codec_context is None:
        raise DamagedVideo("no decoder for it in this build of FFmpeg")
    return streams[0]


def _sound(frame: av.VideoFrame, number: int) -> av.VideoFrame:
    if frame.is_corrupt:
        raise DamagedVideo(f"frame {number} is corrupt")
    return frame


def _all_frames(
    path: Path | str, container: InputContainer, stream: av.VideoStream
) -> Iterator[av.VideoFrame]:
    """Yield all frames; raise DamagedVideo when one is corrupt, or some are missing."""
    packets = number = 0
    promised = sum(entry.size > 0 for entry in stream.index_entries)
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise DamagedVideo(f"packet {packets} is corrupt")
        packets += packet.size > 0
        for frame in packet.decode():
            yield _sound(frame, number)
            number += 1
    # A header counts frames that were dropped on purpose, too; what an index lists is to be there.
    if _ends_early(path):
        promised = max(promised, stream.frames)
    if packets < promised:
        raise DamagedVideo(f"cut off: {packets} of {promised} frames")


def _ends_early(path: Path | str) -> bool:
    """Return whether an AVI file is shorter than it says."""
    length, place = os.path.getsize(path), 0
    with open(path, "rb") as file:
        while place < length and file.read(4) == b"RIFF":  # several, if more than a gigabyte
            place += 8 + int.from_bytes(file.read(4), "little")
            file.seek(place)
    return place > length


def _frames_from(
    container: InputContainer, stream: av.VideoStream, start: int, time: int
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yield numbered frames from a place of ``VideoInfo.keys`` on; frame 0 needs no seeking."""
    frames = container.decode(stream)
    if start:
        container.seek(time, stream=stream)
        # What leads the key frame needs what comes before.
        first = next((f for f in frames if f.pts is not None and f.pts >= time), None)
        if first is None or first.pts != time:
            raise DamagedVideo(f"seeking to frame {start} ends elsewhere")
        yield start, _sound(first, start)
        start += 1
    for number, frame in enumerate(frames, start):
        yield number, _sound(frame, number)


def _keys(
    container: InputContainer, stream: av.VideoStream, marks: list[Mark], starts: list[int]
) -> list[list[int]]:
    """Return the key frames to seek to; none if decoding from one of them gives other frames."""
    times = [time for time, _ in marks if time is not None]
    if len(times) < len(marks) or any(b <= a for a, b in pairwise(times)):
        return []
    keys: list[list[int]] = []
    for start in starts:
        if start >= (keys[-1][0] if keys else 0) + APART:
            keys.append([start, times[start]])
    try:
        for key in keys:
            again = islice(_frames_from(container, stream, *key), CHECKED)
            found = [(frame.pts, _digest(frame)) for _, frame in again]
            if found != marks[key[0] : key[0] + CHECKED]:
                return []
    except (FFmpegError, DamagedVideo):
        return []
    return keys


def _digest(frame: av.VideoFrame) -> int:
    plane = frame.planes[0]
    lines = np.frombuffer(bytes(plane), np.uint8)
    lines = lines.reshape(-1, abs(plane.line_size))  # negative: bottom-up
    return zlib.crc32(lines[: frame.height : 2, : frame.width].tobytes())  # without padding


def _turns(frame: av.VideoFrame) -> int:
    side = frame.side_data.get("DISPLAYMATRIX")
    if side is None:
        return 0
    a, b, _, c, d = np.frombuffer(bytes(side), np.int32)[:5].astype(float)
    if a * d - b * c <= 0 or frame.rotation % 90:
        how = f"mirrored or turned by {frame.rotation} degrees"
        raise DamagedVideo(f"is to be shown {how}, which only players do")
    return frame.rotation // 90 % 4


def verify(path: Path | str) -> VideoInfo:
    """Decode the whole file once, and a little of it again from each key frame.

    Raise DamagedVideo where it is unreadable, truncated or corrupt, or has no video or two, frames
    that differ in size, or frames that are to be shown mirrored.
    """
    marks: list[Mark] = []
    starts, shape, turns = [], (0, 0), 0
    with _opened(path) as (container, stream):
        for number, frame in enumerate(_all_frames(path, container, stream)):
            size = frame.width, frame.height
            if not number:
                shape, turns = size, _turns(frame)
            if size != shape:
                differ = "frame {} is {} x {}, those before {} x {}".format(number, *size, *shape)
                raise DamagedVideo(differ)
            marks.append((frame.pts, _digest(frame)))
            if frame.key_frame:
                starts.append(number)
        if len(marks) < 2:
            raise DamagedVideo(f"{len(marks)} frame{'s' * (len(marks) != 1)} only: nothing moves")
        fps, keys = float(stream.average_rate or 0), _keys(container, stream, marks, starts)
    width, height = shape if turns % 2 == 0 else shape[::-1]
    return VideoInfo(len(marks), width, height, fps, os.path.getsize(path), turns, keys)


def frames_of(path: Path | str, index: np.ndarray, info: VideoInfo) -> Iterator[np.ndarray]:
    """Yield the frames numbered ``index`` (rising), upright, uint8 [height, width, 3].

    Raise DamagedVideo where the file is not what was verified, IndexError for a frame beyond it.
    """
    wanted, converter = deque(index.tolist()), VideoReformatter()
    if not wanted:
        return
    if not 0 <= wanted[0] <= wanted[-1] < info.frames:
        raise IndexError(f"{path}: frames {wanted[0]} to {wanted[-1]} of {info.frames}")
    with _opened(path) as (container, stream):
        start = max((key for key in info.keys if key[0] <= wanted[0]), default=[0, 0])
        same = container.size == info.bytes
        for number, frame in _frames_from(container, stream, *start) if same else ():
            if number != wanted[0]:
                continue
            # One converter of one thread: forty times faster than `to_ndarray`, the same pixels.
            pixels = converter.reformat(frame, format="rgb24", threads=1).to_ndarray()
            pixels = np.rot90(pixels, info.turns)
            if pixels.shape != (info.height, info.width, 3):
                break
            while wanted and number == wanted[0]:
                yield pixels
                wanted.popleft()
            if not wanted:
                return
    raise DamagedVideo("has changed since it was verified")


def read_square(
    path: Path | str, frames: int, size: int, info: VideoInfo | None = None
) -> tuple[UInt8[Tensor, "f s s 3"], VideoInfo]:
    """Read ``frames`` frames spread evenly over a video, resized to ``size`` x ``size`` pixels.

    A shorter video repeats some. The aspect ratio is not kept, so that the geometry of a crop tells
    nothing. Without ``info``, which is what `verify` found, the file is verified first. Raise
    DamagedVideo as `verify` does.
    """
    info = info or verify(path)
    out = torch.empty(frames, size, size, 3, dtype=torch.uint8)
    index = np.linspace(0, info.frames - 1, frames).round().astype(int)
    for row, pixels in zip(out, frames_of(path, index, info), strict=True):
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float()
        resized = interpolate(image, (size, size), mode="bilinear", antialias=True)
        row.copy_(resized[0].round().clamp(0, 255).permute(1, 2, 0))
    return out, info

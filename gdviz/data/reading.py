"""Frames out of a video file that equal FFmpeg's own full decode, or a reason why there are none.

Containers lie about their length, decoders conceal damage, and seeking may land anywhere. So a file
is decoded whole by PyAV, once (`verify`): what was counted there is all that later reading
(`frames_of`) trusts. PyAV reads from the places from which decoding was seen to give the same
frames again. Frames far from any are read by decord, where it was seen to give them.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter
from pathlib import Path

import av
import decord
import numpy as np
import torch
from av.container import InputContainer
from av.sidedata.sidedata import Type
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from torch import Tensor
from torch.nn.functional import interpolate

decord.logging.set_level(decord.logging.QUIET)
EXTENSIONS = {".avi", ".mp4", ".mkv", ".mov", ".webm", ".mpg", ".mpeg", ".m4v"}
VERSION = 1  # raise when `verify` finds or refuses other things: files are then verified again
_CHECKED, _APART = (
    4,
    8,
)  # frames compared after each seek; least distance between two places to seek to
# frames that PyAV decodes in vain before decord, which is slower to open and to convert, would have
# been faster
_NEAR = 128
_FAR = (
    255**2 / 10**4.5
)  # a PSNR of 45 dB: decord's frames equal PyAV's, or else differ by more than that in colour


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
    by_decord: (
        int  # so many frames, from the first on, are read by decord: none, all, or all but the last
    )
    keys: tuple[tuple[int, int], ...]  # (frame number, time stamp): where PyAV may begin to decode


@contextmanager
def _opened(path: Path | str) -> Iterator[tuple[InputContainer, av.VideoStream]]:
    try:
        # `explode`: FFmpeg raises where it would conceal damage.
        with av.open(
            str(path), options={"err_detect": "explode"}, metadata_errors="replace"
        ) as container:
            streams = [
                s for s in container.streams.video if not s.disposition & Disposition.attached_pic
            ]
            if len(streams) != 1:
                sizes = ", ".join(f"{s.width} x {s.height}" for s in streams)
                raise DamagedVideo(
                    f"{len(streams)} video streams ({sizes}): which one is meant?"
                    if streams
                    else "no video stream"
                )
            (stream,) = streams
            if stream.codec_context is None:
                raise DamagedVideo("no decoder for it in this build of FFmpeg")
            stream.codec_context.options = {"err_detect": "explode"}
            stream.thread_type = "NONE"
            yield container, stream
    except (av.FFmpegError, OSError, ValueError, MemoryError) as error:
        raise DamagedVideo(f"cannot be decoded ({type(error).__name__}: {error})") from error


def _sound(frame: av.VideoFrame, number: int) -> av.VideoFrame:
    if frame.is_corrupt:
        raise DamagedVideo(f"frame {number} is corrupt")
    return frame


def _frames_from(
    container: InputContainer, stream: av.VideoStream, start: int, time: int
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Numbered frames from a place of ``VideoInfo.keys`` on; frame 0 needs no seeking."""
    if start:
        container.seek(time, stream=stream)
    number, seeking = start, bool(start)
    for frame in container.decode(stream):
        if seeking and (
            frame.pts is None or frame.pts < time
        ):  # leading frames, which need what comes before
            continue
        if seeking and frame.pts != time:
            raise DamagedVideo(f"seeking to frame {start} ends elsewhere")
        seeking = False
        yield number, _sound(frame, number)
        number += 1


def _digest(frame: av.VideoFrame) -> int:
    plane = frame.planes[0]
    rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[
        : frame.height : 2, : frame.width
    ]  # the rest of a line is padding
    return zlib.crc32(rows.tobytes())


def _turns(frame: av.VideoFrame) -> int:
    side = frame.side_data.get(Type.DISPLAYMATRIX)
    if side is None:
        return 0
    a, b, _, c, d = np.frombuffer(side, np.int32)[:5].astype(float)
    if a * d - b * c <= 0 or frame.rotation % 90:
        raise DamagedVideo(
            f"is to be shown mirrored or turned by {frame.rotation} degrees, which only players do"
        )
    return frame.rotation // 90 % 4


def _keys(
    container: InputContainer, stream: av.VideoStream, marks: list[tuple[int | None, bool, int]]
) -> tuple[tuple[int, int], ...]:
    """The key frames from which decoding gives what the whole pass gave; none when one of them does
    not."""
    times = [time for time, _, _ in marks]
    if None in times or any(b <= a for a, b in pairwise(times)):
        return ()
    keys: list[tuple[int, int]] = []
    for start, (time, key, _) in enumerate(marks):
        if not key or start < (keys[-1][0] if keys else 0) + _APART:
            continue
        try:
            for number, frame in _frames_from(container, stream, start, time):
                if (frame.pts, _digest(frame)) != (marks[number][0], marks[number][2]):
                    return ()
                if number + 1 >= min(start + _CHECKED, len(marks)):
                    keys.append((start, time))
                    break
            else:
                return ()
        except (av.FFmpegError, DamagedVideo):
            return ()
    return tuple(keys)


class _Sample:
    """The first frame, two at random, and the last two of a stream whose length shows at its end
    only."""

    def __init__(self) -> None:
        self.rng, self.kept, self.last = np.random.default_rng(0), [], deque(maxlen=2)

    def add(self, number: int, frame: av.VideoFrame) -> None:
        self.last.append((number, frame))
        self.kept = self.kept or [(number, frame)] * 3
        for slot in 1, 2:
            if self.rng.random() * (number + 1) < 1:
                self.kept[slot] = number, frame

    def frames(self) -> dict[int, av.VideoFrame]:
        return dict(sorted([*self.kept, *self.last], key=itemgetter(0)))


def _rgb(frame: av.VideoFrame, converter: VideoReformatter, turns: int) -> np.ndarray:
    # One converter with one thread: forty times faster than `frame.to_ndarray`, the same pixels.
    return np.rot90(converter.reformat(frame, format="rgb24", threads=1).to_ndarray(), turns)


def _open_by_decord(path: Path | str) -> decord.VideoReader:
    # One thread, and to be dropped at once: an open decord reader decodes ahead without limit.
    return decord.VideoReader(str(path), num_threads=1, fault_tol=1)


def _trust_in_decord(
    path: Path | str,
    sample: dict[int, av.VideoFrame],
    keys: list[int],
    frames: int,
    turns: int,
    b_frames: bool,
) -> int:
    """How many frames, from the first on, decord is trusted with: it numbers key frames alike and
    gives the sampled frames."""
    trusted = frames - b_frames  # its last frame of files with B-frames depends on timing
    index, converter = [number for number in sample if number < trusted], VideoReformatter()
    try:
        reader = _open_by_decord(path)
        if (
            len(reader) != frames or list(reader.get_key_indices()) != keys
        ):  # it would seek to wrong places
            return 0
        for number, seen in zip(index, reader.get_batch(index).asnumpy(), strict=True):
            true = _rgb(sample[number], converter, turns)
            if seen.shape != true.shape or np.square(seen.astype(np.float32) - true).mean() > _FAR:
                return 0
    except decord.DECORDError:
        return 0
    return trusted


def verify(path: Path | str) -> VideoInfo:
    """Decodes the whole file once, and a little of it again: by decord, and from each key frame.

    Raises:
        DamagedVideo: unreadable, truncated or corrupt; no video in it, or two; frames that differ
            in size, or that are to be shown mirrored.
    """
    packets, marks, shape, turns, sample = 0, [], None, 0, _Sample()
    with _opened(path) as (container, stream):
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise DamagedVideo(f"packet {packets} is corrupt")
            packets += packet.size > 0
            for frame in packet.decode():
                _sound(frame, len(marks))
                if shape is None:
                    shape, turns = (frame.width, frame.height), _turns(frame)
                if shape != (frame.width, frame.height):
                    raise DamagedVideo(
                        f"frame {len(marks)} is {frame.width} x {frame.height}, those before "
                        f"{shape[0]} x {shape[1]}"
                    )
                sample.add(len(marks), frame)
                marks.append((frame.pts, frame.key_frame, _digest(frame)))
        if packets < stream.frames:
            raise DamagedVideo(
                f"cut off: {packets} of the {stream.frames} frames that its header promises"
            )
        if len(marks) < 2:
            raise DamagedVideo(f"{len(marks)} frame{'s' * (len(marks) != 1)} only: nothing moves")
        fps, b_frames = float(stream.average_rate or 0), bool(stream.codec_context.has_b_frames)
        numbers = [number for number, (_, key, _) in enumerate(marks) if key]
        by_decord = _trust_in_decord(path, sample.frames(), numbers, len(marks), turns, b_frames)
        keys = _keys(container, stream, marks)
    width, height = shape if turns % 2 == 0 else shape[::-1]
    return VideoInfo(
        len(marks), width, height, fps, Path(path).stat().st_size, turns, by_decord, keys
    )


def frames_of(path: Path | str, index: np.ndarray, info: VideoInfo) -> Iterator[np.ndarray]:
    """The frames numbered ``index`` (rising), upright, uint8 [height, width, 3], one by one.

    Raises:
        DamagedVideo: the file is not what was verified.
        IndexError: it has no such frame.
    """
    if len(index) and not 0 <= index[0] <= index[-1] < info.frames:
        raise IndexError(f"{path}: frames {index[0]} to {index[-1]} of {info.frames}")
    with suppress(OSError):  # a file that is gone is told of below
        if Path(path).stat().st_size != info.bytes:
            raise DamagedVideo("has changed since it was verified")
    start, time = max(
        (key for key in info.keys if len(index) and key[0] <= index[0]), default=(0, 0)
    )
    if len(index) and index[-1] < info.by_decord and index[-1] - start > _NEAR + 2 * len(index):
        try:
            pixels = _open_by_decord(path).get_batch(index).asnumpy()
        except decord.DECORDError as error:
            raise DamagedVideo(
                f"cannot be decoded any more (decord: {str(error).strip().splitlines()[-1]})"
            ) from error
        if pixels.shape[1:] != (info.height, info.width, 3):
            raise DamagedVideo("has changed since it was verified")
        yield from pixels
        return
    wanted = iter(np.asarray(index).tolist())
    converter, next_one = VideoReformatter(), next(wanted, None)
    with _opened(path) as (container, stream):
        for number, frame in _frames_from(container, stream, start, time):
            if next_one is None:
                return
            if number == next_one:
                pixels = _rgb(frame, converter, info.turns)
                if pixels.shape != (info.height, info.width, 3):
                    raise DamagedVideo("has changed since it was verified")
            while number == next_one:
                yield pixels
                next_one = next(wanted, None)
    if next_one is not None:
        raise DamagedVideo(f"ends before frame {next_one}: it has changed since it was verified")


def read_square(
    path: Path | str, frames: int, size: int, info: VideoInfo | None = None
) -> tuple[Tensor, VideoInfo]:
    """Reads ``frames`` frames spread evenly over a video, resized to a square.

    Args:
        path: video file.
        frames: how many to keep; a shorter video repeats some.
        size: side in pixels; the aspect ratio is not kept, so that the geometry of a crop tells
            nothing.
        info: what `verify` found; without it the file is verified first.

    Returns:
        uint8 tensor [frames, size, size, 3] and what the verifying pass found.

    Raises:
        DamagedVideo: see `verify`.
    """
    info = info or verify(path)
    out = torch.empty(frames, size, size, 3, dtype=torch.uint8)
    # Of a longer video that decord reads, the last frame is left out where it is not trusted with
    # that.
    last = ((info.frames > frames and info.by_decord) or info.frames) - 1
    index = np.linspace(0, last, frames).round().astype(int)
    for row, pixels in zip(out, frames_of(path, index, info), strict=True):
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float()
        small = interpolate(
            image, (size, size), mode="bilinear", antialias=True, align_corners=False
        )
        row.copy_(small[0].round().clamp(0, 255).permute(1, 2, 0))
    return out, info

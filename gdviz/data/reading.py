"""Frames out of a video file that equal FFmpeg's own full decode, or a reason why there are none.

Containers lie about their length, decoders conceal damage, and seeking may land anywhere. So a file
is decoded whole, once (`verify`), and later reading (`frames_of`) trusts only what was found then:
PyAV begins at key frames from which decoding was seen to give the same frames again, and decord,
which is faster far from them, reads what it was seen to read right.
"""

from __future__ import annotations

import os
import zlib
from base64 import b85decode, b85encode
from collections import deque, namedtuple
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import av
import decord
import numpy as np
import torch
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from jaxtyping import UInt8
from torch import Tensor
from torch.nn.functional import interpolate

decord.logging.set_level(decord.logging.QUIET)
EXTENSIONS = {
    ".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg",
    ".mts", ".ogv", ".webm", ".wmv",
}  # fmt: skip
Mark = namedtuple("Mark", "time key digest")  # what `verify` remembers of each frame
VERSION = 3  # raise when `verify` finds or refuses other things: files are then verified again
STRICT = {"err_detect": "explode"}  # FFmpeg raises where it would conceal damage
CHECKED, APART = 4, 8  # frames compared after each seek; least distance between places to seek to
# Frames that PyAV decodes in vain before decord, slower to open and to convert, is faster.
NEAR = 128
AT_ONCE = 64  # full frames that decord may hold
# A PSNR of 45 dB: decord's frames equal PyAV's, or else differ by more than that in colour.
FAR = 255**2 / 10**4.5


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
    by_decord: int  # frames, from the first on, left to decord: none, all, or all but the last
    keys: tuple[tuple[int, int], ...]  # (frame number, time stamp): where PyAV may begin to decode
    steps: str = ""  # microseconds from frame to frame, packed; empty where time stamps are missing

    def seconds(self) -> np.ndarray:
        """Return when each frame is shown, the first one at 0.

        Where time stamps are missing, by the frame rate. Raise DamagedVideo where that is, too.
        """
        if self.steps:
            steps = np.frombuffer(zlib.decompress(b85decode(self.steps)), np.int32)
            return np.concatenate([[0], steps.cumsum(dtype=np.int64)]) / 1e6
        if not self.fps:
            raise DamagedVideo("has neither time stamps nor a frame rate, which --view.fps needs")
        return np.arange(self.frames) / self.fps


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
    if not streams:
        raise DamagedVideo("no video stream")
    if len(streams) > 1:
        sizes = ", ".join(f"{stream.width} x {stream.height}" for stream in streams)
        raise DamagedVideo(f"{len(streams)} video streams ({sizes}): which one is meant?")
    if streams[0].codec_context is None:
        raise DamagedVideo("no decoder for it in this build of FFmpeg")
    return streams[0]


def _sound(frame: av.VideoFrame, number: int) -> av.VideoFrame:
    if frame.is_corrupt:
        raise DamagedVideo(f"frame {number} is corrupt")
    return frame


def _frames_from(
    container: InputContainer, stream: av.VideoStream, start: int, time: int
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yield numbered frames from a place of ``VideoInfo.keys`` on; frame 0 needs no seeking."""
    if start:
        container.seek(time, stream=stream)
    number, seeking = start, start > 0
    for frame in container.decode(stream):
        if seeking and (frame.pts is None or frame.pts < time):
            continue  # it leads the key frame, and needs what comes before
        if seeking and frame.pts != time:
            raise DamagedVideo(f"seeking to frame {start} ends elsewhere")
        seeking = False
        yield number, _sound(frame, number)
        number += 1


def _digest(frame: av.VideoFrame) -> int:
    plane = frame.planes[0]
    width = abs(plane.line_size)  # negative: bottom-up
    lines = np.frombuffer(bytes(plane), np.uint8).reshape(-1, width)
    return zlib.crc32(lines[: frame.height : 2, : frame.width].tobytes())  # without padding


def _turns(frame: av.VideoFrame) -> int:
    side = frame.side_data.get("DISPLAYMATRIX")
    if side is None:
        return 0
    a, b, _, c, d = np.frombuffer(side, np.int32)[:5].astype(float)
    if a * d - b * c <= 0 or frame.rotation % 90:
        how = f"mirrored or turned by {frame.rotation} degrees"
        raise DamagedVideo(f"is to be shown {how}, which only players do")
    return frame.rotation // 90 % 4


def _seeks_right(
    container: InputContainer, stream: av.VideoStream, marks: list[Mark], start: int
) -> bool:
    """Return whether decoding from key frame ``start`` gives what the whole pass gave."""
    try:
        for number, frame in _frames_from(container, stream, start, marks[start].time):
            if (frame.pts, _digest(frame)) != (marks[number].time, marks[number].digest):
                return False
            if number + 1 >= min(start + CHECKED, len(marks)):
                return True
    except (FFmpegError, DamagedVideo):
        pass
    return False


def _sample(
    sample: dict[str, tuple[int, av.VideoFrame]],
    number: int,
    frame: av.VideoFrame,
    rng: np.random.Generator,
) -> None:
    """Take the first frame, two at random, and the last two of a stream of unknown length."""
    new = number, frame
    for drawn in "one", "another":
        if rng.random() * (number + 1) < 1:  # in the end each frame is as likely to be here
            sample[drawn] = new
    sample.setdefault("first", new)
    sample["last but one"], sample["last"] = sample.get("last", new), new


def _keys(
    container: InputContainer, stream: av.VideoStream, marks: list[Mark]
) -> tuple[tuple[int, int], ...]:
    """Return the key frames to seek to; none when one is not where it seems; times rise."""
    keys: list[tuple[int, int]] = []
    for start, mark in enumerate(marks):
        if mark.key and start >= (keys[-1][0] if keys else 0) + APART:
            if not _seeks_right(container, stream, marks, start):
                return ()
            keys.append((start, mark.time))
    return tuple(keys)


def _rgb(frame: av.VideoFrame, converter: VideoReformatter, turns: int) -> np.ndarray:
    # One converter with one thread: forty times faster than `frame.to_ndarray`, the same pixels.
    return np.rot90(converter.reformat(frame, format="rgb24", threads=1).to_ndarray(), turns)


def _open_by_decord(path: Path | str) -> decord.VideoReader:
    # One thread, and to be dropped at once: an open decord reader decodes ahead without limit.
    return decord.VideoReader(os.path.abspath(path), num_threads=1, fault_tol=1)


def _decord_is_right(
    path: Path | str, sample: dict[int, av.VideoFrame], marks: list[Mark], turns: int
) -> bool:
    """Return whether decord counts frames and key frames alike and gives the sampled frames."""
    index, converter = sorted(sample), VideoReformatter()
    try:
        reader = _open_by_decord(path)
        keys = [number for number, mark in enumerate(marks) if mark.key]
        if len(reader) != len(marks) or list(reader.get_key_indices()) != keys:
            return False  # it would seek to wrong places
        for number, seen in zip(index, reader.get_batch(index).asnumpy(), strict=True):
            true = _rgb(sample[number], converter, turns)
            if seen.shape != true.shape or np.square(seen.astype(np.float32) - true).mean() > FAR:
                return False
    except decord.DECORDError:
        return False
    return True


def _ends_early(path: Path | str) -> bool:
    """Return whether an AVI file is shorter than it says."""
    length, place = os.path.getsize(path), 0
    with open(path, "rb") as file:
        # Of more than a gigabyte there are several.
        while file.seek(place) < length and file.read(4) == b"RIFF":
            place += 8 + int.from_bytes(file.read(4), "little")
    return place > length


def _decoded(
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


def verify(path: Path | str) -> VideoInfo:
    """Decode the whole file once, and a little of it again: by decord, and from each key frame.

    Raises:
        DamagedVideo: unreadable, truncated or corrupt; no video in it, or two; frames that differ
            in size, or that are to be shown mirrored.
    """
    marks, sample, rng = [], {}, np.random.default_rng(0)
    shape, turns = (0, 0), 0
    with _opened(path) as (container, stream):
        for number, frame in enumerate(_decoded(path, container, stream)):
            size = (frame.width, frame.height)
            if not number:
                shape, turns = size, _turns(frame)
            if size != shape:
                differ = "frame {} is {} x {}, those before {} x {}".format(number, *size, *shape)
                raise DamagedVideo(differ)
            _sample(sample, number, frame, rng)
            marks.append(Mark(frame.pts, frame.key_frame, _digest(frame)))
        if len(marks) < 2:
            raise DamagedVideo(f"{len(marks)} frame{'s' * (len(marks) != 1)} only: nothing moves")
        # decord's last frame of files with B-frames depends on timing.
        trusted = len(marks) - bool(stream.codec_context.has_b_frames)
        frames = {number: frame for number, frame in sample.values() if number < trusted}
        by_decord = trusted if _decord_is_right(path, frames, marks, turns) else 0
        fps, keys, steps = float(stream.average_rate or 0), (), ""
        times = [mark.time for mark in marks]
        if stream.time_base and None not in times and all(a < b for a, b in pairwise(times)):
            keys = _keys(container, stream, marks)
            micro = np.round(np.array(times) * float(stream.time_base * 1_000_000))
            steps = b85encode(zlib.compress(np.diff(micro).astype(np.int32).tobytes())).decode()
    width, height = shape if turns % 2 == 0 else shape[::-1]
    length = Path(path).stat().st_size
    return VideoInfo(len(marks), width, height, fps, length, turns, by_decord, keys, steps)


def frames_of(path: Path | str, index: np.ndarray, info: VideoInfo) -> Iterator[np.ndarray]:
    """Yield the frames numbered ``index`` (rising), upright, uint8 [height, width, 3].

    Raises:
        DamagedVideo: the file is not what was verified.
        IndexError: it has no such frame.
    """
    if not len(index):
        return
    if not 0 <= index[0] <= index[-1] < info.frames:
        raise IndexError(f"{path}: frames {index[0]} to {index[-1]} of {info.frames}")
    changed = "has changed since it was verified"
    with suppress(OSError):  # a file that is gone is told of below
        if Path(path).stat().st_size != info.bytes:
            raise DamagedVideo(changed)
    start = max((key for key in info.keys if key[0] <= index[0]), default=(0, 0))
    far = index[-1] - start[0] > NEAR + 2 * len(index)
    read = _by_decord if far and index[-1] < info.by_decord else _by_pyav
    for pixels in read(path, index, start, info.turns):
        if pixels.shape != (info.height, info.width, 3):
            raise DamagedVideo(changed)
        yield pixels


def _by_decord(
    path: Path | str, index: np.ndarray, start: tuple[int, int], turns: int
) -> Iterator[np.ndarray]:
    try:
        for part in np.split(index, range(AT_ONCE, len(index), AT_ONCE)):
            yield from _open_by_decord(path).get_batch(part).asnumpy()
    except decord.DECORDError as error:
        reason = str(error).strip().splitlines()[-1]
        raise DamagedVideo(f"cannot be decoded any more (decord: {reason})") from error


def _by_pyav(
    path: Path | str, index: np.ndarray, start: tuple[int, int], turns: int
) -> Iterator[np.ndarray]:
    wanted, converter = deque(index.tolist()), VideoReformatter()
    with _opened(path) as (container, stream):
        for number, frame in _frames_from(container, stream, *start):
            if number == wanted[0]:
                pixels = _rgb(frame, converter, turns)
            while wanted and number == wanted[0]:
                yield pixels
                wanted.popleft()
            if not wanted:
                return
    raise DamagedVideo(f"ends before frame {wanted[0]}: it has changed since it was verified")


def _frames_to_read(info: VideoInfo, frames: int, fps: float, windows: int) -> list[np.ndarray]:
    """Return the numbers of the frames to read, window by window; see :func:`read_square`."""
    if not fps:
        # Of a longer video only what decord reads, which may be all but the last frame.
        most = info.by_decord if info.frames > frames and info.by_decord else info.frames
        return [np.linspace(0, most - 1, frames).round().astype(int)]
    times = info.seconds()
    room = max(0, int(times[-1] * fps + 1e-3) + 1 - frames)
    starts = np.linspace(0, room, windows).round() if windows > 1 else [room // 2]
    between = (times[1:] + times[:-1]) / 2
    return [np.searchsorted(between, (start + np.arange(frames)) / fps) for start in starts]


def read_square(
    path: Path | str,
    frames: int,
    size: int,
    info: VideoInfo | None = None,
    fps: float = 0.0,
    windows: int = 1,
) -> tuple[UInt8[Tensor, "f s s 3"], VideoInfo]:
    """Read ``frames`` frames spread evenly over a video, resized to a square.

    With ``fps`` they are ``1 / fps`` seconds apart, each the frame next to that moment by its time
    stamp, in ``windows`` spread evenly over the video, one after the other; a single one lies in
    its middle. Where a video is shorter than a window its last frame is held.

    Args:
        path: video file.
        frames: how many to keep (of each window); a shorter video repeats some.
        size: side in pixels; the aspect ratio is not kept, so that the geometry of a crop tells
            nothing.
        info: what `verify` found; without it the file is verified first.

    Raises:
        DamagedVideo: see `verify`.
    """
    info = info or verify(path)
    kept = _frames_to_read(info, frames, fps, windows)
    out = torch.empty(len(kept) * frames, size, size, 3, dtype=torch.uint8)
    read = (pixels for index in kept for pixels in frames_of(path, index, info))
    for row, pixels in zip(out, read, strict=True):
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float()
        resized = interpolate(image, (size, size), mode="bilinear", antialias=True)
        row.copy_(resized[0].round().clamp(0, 255).permute(1, 2, 0))
    return out, info

"""Frames out of a video file: one verifying pass by PyAV, then decord."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import av
import decord
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

EXTENSIONS = {".avi", ".mp4", ".mkv", ".mov", ".webm", ".mpg", ".mpeg", ".m4v"}


class DamagedVideo(Exception):
    """The file cannot be trusted; the message says why."""


@dataclass(frozen=True)
class VideoInfo:
    """What the verifying pass found: frames really there, size in pixels, frames a second, bytes."""

    frames: int
    width: int
    height: int
    fps: float
    bytes: int


def probe(path: Path | str) -> VideoInfo:
    """Decodes the whole file once and counts what is really there.

    Containers lie about their length and decoders conceal damage; decord does so without a word.
    PyAV with ``err_detect=explode`` raises instead.

    Raises:
        DamagedVideo: unreadable, truncated or corrupt, or no video in it.
    """
    try:
        with av.open(str(path), options={"err_detect": "explode"}, metadata_errors="replace") as container:
            if not container.streams.video:
                raise DamagedVideo("no video stream")
            stream = container.streams.video[0]
            stream.codec_context.options = {"err_detect": "explode"}
            count = 0
            for frame in container.decode(stream):
                if frame.is_corrupt:
                    raise DamagedVideo(f"frame {count} is corrupt")
                count += 1
            fps, width, height = float(stream.average_rate or 0), stream.width, stream.height
    except (av.FFmpegError, OSError, ValueError) as error:
        raise DamagedVideo(f"cannot be decoded ({type(error).__name__}: {error})") from error
    if count < 2:
        raise DamagedVideo(f"only {count} frames")
    return VideoInfo(count, width, height, fps, Path(path).stat().st_size)


def _by_decord(path: Path | str, index: np.ndarray) -> np.ndarray:
    # One thread and a reader that is dropped at once: an open decord reader decodes ahead without limit.
    reader = decord.VideoReader(str(path), num_threads=1, fault_tol=1)
    if index.max() >= len(reader):
        raise DamagedVideo(f"decord sees {len(reader)} frames, frame {index.max()} was asked for")
    return reader.get_batch(index).asnumpy()


def _by_pyav(path: Path | str, index: np.ndarray) -> np.ndarray:
    with av.open(str(path), metadata_errors="replace") as container:
        frames = [f.to_ndarray(format="rgb24") for i, f in enumerate(container.decode(video=0)) if i in set(index)]
    return np.stack(frames)[np.searchsorted(np.unique(index), index)]


def read_square(path: Path | str, frames: int, size: int) -> tuple[Tensor, VideoInfo]:
    """Reads ``frames`` frames spread evenly over a video, resized to a square.

    Args:
        path: video file.
        frames: how many to keep; a shorter video repeats some.
        size: side in pixels; the aspect ratio is not kept, so that the geometry of a crop tells nothing.

    Returns:
        uint8 tensor [frames, size, size, 3] and what the verifying pass found.

    Raises:
        DamagedVideo: see ``probe``.
    """
    info = probe(path)
    # The last frame of a file with B-frames is racy in decord: leave it out of longer videos.
    last = info.frames - 1 - (info.frames > frames)
    index = np.linspace(0, last, frames).round().astype(int)
    try:
        pixels = _by_decord(path, index)
    except decord.DECORDError:  # no AV1, and no width that its scaler pads (48, 72, ...)
        try:
            pixels = _by_pyav(path, index)
        except (av.FFmpegError, ValueError) as error:  # ValueError: its frames differ in size
            raise DamagedVideo(f"cannot be decoded ({type(error).__name__}: {error})") from error
    video = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
    small = interpolate(video, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return small.round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous(), info

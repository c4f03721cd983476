"""What these tests share, light: worker processes import it, too."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np

from gdviz.data import cache as caches
from gdviz.data.motion import render
from gdviz.data.reading import DamagedVideo, frames_of, verify


def make(
    path: Path,
    *,
    codec="libx264",
    frames=40,
    size=64,
    pix_fmt="yuv420p",
    step: Callable[[int], int] = int,
    **options: str,
) -> Path:
    """A video with key frames every ten frames and whatever else ``options`` say."""
    with av.open(str(path), "w") as container:
        options = {"g": "10", "threads": "1", **options}
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width = stream.height = size
        stream.pix_fmt = pix_fmt
        for i, pixels in enumerate(render(1, 5, size=size, frames=frames)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = step(i)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def full_decode(path: Path) -> list[np.ndarray]:
    """Every frame, upright, by the plainest use of FFmpeg that there is."""
    with av.open(str(path), metadata_errors="replace") as container:
        frames = container.decode(video=0)
        return [np.rot90(f.to_ndarray(format="rgb24"), f.rotation // 90) for f in frames]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.square(np.asarray(a).astype(np.float32) - np.asarray(b)).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-6)))


def draws(frames: int) -> list[np.ndarray]:
    """A clip at a random start, a few frames anywhere, the last two."""
    rng = np.random.default_rng(frames)
    start = int(rng.integers(max(frames - 16, 1)))
    clip = np.arange(start, min(start + 16, frames))
    return [clip, np.sort(rng.integers(frames, size=6)), np.array([frames - 2, frames - 1])]


def reads_right(path: Path, index: np.ndarray, info, true: list[np.ndarray]) -> bool:
    read = frames_of(path, index, info)
    return all(psnr(seen, true[i]) > 45 for i, seen in zip(index, read, strict=True))


def judge(path: str) -> str:
    """Reads a damaged file: refused, or equal to FFmpeg's full decode."""
    try:
        info = verify(path)
    except DamagedVideo as error:
        return "refused" if str(error) and "\n" not in str(error) else "refused without a reason"
    true = full_decode(Path(path))
    assert len(true) == info.frames
    for index in draws(info.frames):
        try:
            assert reads_right(Path(path), index, info, true), path
        except DamagedVideo:
            return "refused later"
    return "equal"


def fill_or_die(*args, **kwargs) -> None:
    """Fills a shard; the process that reads b1.mp4 dies."""
    real = caches.read_square

    def read(path: Path, *rest) -> tuple:
        if path.name == "b1.mp4":
            os.kill(os.getpid(), signal.SIGKILL)
        return real(path, *rest)

    caches.read_square = read
    try:
        return caches._fill_shard(*args, **kwargs)
    finally:
        caches.read_square = real

"""What tests run in worker processes; light, since every worker imports it."""

import os
import signal
import time
from pathlib import Path

import av
import numpy as np

from gdviz.core.files import UserError
from gdviz.data import cache as caches
from gdviz.data.reading import DamagedVideo, frames_of, verify


def full_decode(path: Path) -> list[np.ndarray]:
    """Every frame, upright, by the plainest use of FFmpeg that there is."""
    with av.open(str(path), metadata_errors="replace") as container:
        return [
            np.rot90(f.to_ndarray(format="rgb24"), f.rotation // 90)
            for f in container.decode(video=0)
        ]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.square(a.astype(np.float32) - b).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-6)))


def draws(frames: int) -> list[np.ndarray]:
    """A clip at a random start, a few frames anywhere, the last two."""
    rng = np.random.default_rng(frames)
    start = int(rng.integers(max(frames - 16, 1)))
    return [
        np.arange(start, min(start + 16, frames)),
        np.sort(rng.integers(frames, size=6)),
        np.array([frames - 2, frames - 1]),
    ]


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
            assert all(
                psnr(seen, true[i]) > 45
                for i, seen in zip(index, frames_of(path, index, info), strict=True)
            ), path
        except DamagedVideo:
            return "refused later"
    return "equal"


def work(i: int, folder: str = "") -> int:
    if i == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if i == 4:
        time.sleep(60)
    if i == 5:  # dies once only, as if another one had taken the memory
        marker = Path(folder) / "died"
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return i * i


def refuse(i: int) -> None:
    raise UserError(f"job {i}")


def fill_or_die(*args, **kwargs) -> None:
    real = caches.read_square

    def read(path: Path, *rest) -> tuple:
        if path.name == "b1.mp4":
            os.kill(os.getpid(), signal.SIGKILL)
        return real(path, *rest)

    caches.read_square = read
    try:
        caches._fill_shard(*args, **kwargs)
    finally:
        caches.read_square = real

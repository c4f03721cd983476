"""Videos kept as a view needs them, in shards: as raw pixels, as JPEG, or as light H.264 files.

    STAMP/index.json, metadata.npy   written last: what the set is, which videos it lacks
    STAMP/00000/found.json           of the first sixteen videos, beside what the kind of cache
    keeps of them

A shard is the unit of parallel work and of resumption: it is there as a whole or not at all, and a
killed fill goes on with those that are not.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from gdviz.config import View
from gdviz.core.files import UserError, atomic, load_json, save_json
from gdviz.core.processes import Lost, over_processes
from gdviz.data.motion import encode
from gdviz.data.reading import DamagedVideo, VideoInfo, frames_of, read_square, verify
from gdviz.data.verified import stat, verified

# Few videos in a shard keep all cores busy on small sets; few shards can all stay open.
SHARD, SHARDS = 16, 4096


def shard_size(count: int) -> int:
    """Return how many videos a shard of a set of that size holds."""
    return max(SHARD, -(-count // SHARDS))


@runtime_checkable
class Shard(Protocol):
    """Some videos of one shape [f, h, w, 3], read frame by frame."""

    @staticmethod
    def estimate(shape: tuple[int, ...]) -> float:
        """Bytes that a video takes, about."""

    @staticmethod
    def write(folder: Path, videos: Iterator[np.ndarray | None], shape: tuple[int, ...]) -> None:
        """None stands for a video that could not be read; it is never asked for."""

    def __init__(self, folder: Path, shape: tuple[int, ...]) -> None: ...

    def read(self, place: int, frames: slice) -> np.ndarray: ...


class Memmap:
    """Raw pixels: the fastest, and the largest."""

    @staticmethod
    def estimate(shape: tuple[int, ...]) -> float:
        return float(np.prod(shape))

    @staticmethod
    def write(folder: Path, videos: Iterator[np.ndarray | None], shape: tuple[int, ...]) -> None:
        # Written, not mapped: a full disk is an error here, and a crash inside a memory map.
        with open(folder / "pixels.u8", "wb") as file:
            for video in videos:
                file.write(np.zeros(shape, np.uint8) if video is None else video)

    def __init__(self, folder: Path, shape: tuple[int, ...]) -> None:
        self.pixels = (
            np.memmap(folder / "pixels.u8", np.uint8, "r").reshape(-1, *shape).view(np.ndarray)
        )

    def read(self, place: int, frames: slice) -> np.ndarray:
        return self.pixels[place, frames]


def to_jpeg(frame: np.ndarray) -> bytes:
    """A frame [h, w, 3] as a file of full colour resolution, which small frames need: 36 to 44
    dB."""
    Image.fromarray(frame).save(out := BytesIO(), "JPEG", quality=95, subsampling=0)
    return out.getvalue()


def from_jpeg(data: bytes) -> np.ndarray:
    """Raises OSError where the bytes are no JPEG."""
    return np.asarray(Image.open(BytesIO(data), formats=["JPEG"]))


class Jpeg:
    """One JPEG a frame: a fifth of the bytes, and only the frames asked for are decoded, whatever
    their distance."""

    @staticmethod
    def estimate(shape: tuple[int, ...]) -> float:
        return shape[0] * (700 + 0.22 * np.prod(shape[1:]))

    @staticmethod
    def write(folder: Path, videos: Iterator[np.ndarray | None], shape: tuple[int, ...]) -> None:
        sizes = []
        with open(folder / "frames.jpeg", "wb") as file:
            for video in videos:
                frames = [b""] * shape[0] if video is None else map(to_jpeg, video)
                sizes += [file.write(data) for data in frames]
        np.save(folder / "offsets.npy", np.cumsum([0, *sizes]))

    def __init__(self, folder: Path, shape: tuple[int, ...]) -> None:
        self.bytes = np.memmap(folder / "frames.jpeg", np.uint8, "r").view(np.ndarray)
        self.offsets, self.frames = (
            np.load(folder / "offsets.npy", mmap_mode="r").view(np.ndarray),
            shape[0],
        )
        if len(self.bytes) != self.offsets[-1]:
            raise ValueError(f"{len(self.bytes)} bytes, not {self.offsets[-1]}")

    def read(self, place: int, frames: slice) -> np.ndarray:
        wanted = [place * self.frames + k for k in range(*frames.indices(self.frames))]
        return np.stack(
            [from_jpeg(self.bytes[self.offsets[k] : self.offsets[k + 1]]) for k in wanted]
        )


class Transcode:
    """One H.264 file a video, of short groups of pictures and no B-frames: a thirtieth of the
    bytes."""

    @staticmethod
    def estimate(shape: tuple[int, ...]) -> float:
        return 1500 + shape[0] * (100 + 0.04 * np.prod(shape[1:]))

    @staticmethod
    def write(folder: Path, videos: Iterator[np.ndarray | None], shape: tuple[int, ...]) -> None:
        for place, video in enumerate(videos):
            if video is not None:
                file, odd = (
                    folder / f"{place:02d}.mp4",
                    shape[1] % 2,
                )  # half the colour needs an even side
                encode(
                    np.pad(video, ((0, 0), (0, odd), (0, odd), (0, 0)), "edge"),
                    file,
                    crf="17",
                    g="8",
                    tune="fastdecode",
                )
                # Verified as any file is; and then read by PyAV, which opens so small a file in
                # half of decord's time.
                file.with_suffix(".json").write_text(
                    json.dumps(asdict(replace(verify(file), by_decord=0)))
                )

    def __init__(self, folder: Path, shape: tuple[int, ...]) -> None:
        self.folder, self.shape = folder, shape

    def read(self, place: int, frames: slice) -> np.ndarray:
        file, index = self.folder / f"{place:02d}.mp4", np.arange(*frames.indices(self.shape[0]))
        known = load_json(file.with_suffix(".json"))
        info = VideoInfo(**known | {"keys": tuple(map(tuple, known["keys"]))})
        return np.stack(list(frames_of(file, index, info)))[:, : self.shape[1], : self.shape[2]]


KINDS: dict[str, type[Shard]] = {"memmap": Memmap, "jpeg": Jpeg, "transcode": Transcode}


@dataclass(frozen=True)
class Cache:
    """``cache[row, frames]`` as of an array [n, f, h, w, 3]; ``frames`` is a slice. Shards are
    opened when first asked for."""

    folder: Path
    kind: str
    shape: tuple[int, ...]

    def __getitem__(self, key: tuple[int, slice]) -> np.ndarray:
        shard, place = divmod(key[0], shard_size(self.shape[0]))
        try:
            return _shard(self, shard).read(place, key[1])
        except (OSError, ValueError, IndexError, DamagedVideo) as error:
            raise UserError(
                f"{self.folder} is damaged (shard {shard}: {error}); delete it to have it made "
                "again"
            ) from None


@lru_cache(maxsize=SHARDS)
def _shard(cache: Cache, number: int) -> Shard:
    return KINDS[cache.kind](cache.folder / f"{number:05d}", cache.shape[1:])


def _read(path: Path, view: View, info: VideoInfo | str) -> tuple[np.ndarray | None, Any]:
    """A video and its (frames, width, height, fps, bytes), or None and why it is refused."""
    if isinstance(info, str):
        return None, info
    try:
        video = read_square(path, view.frames, view.size, info)[0].numpy()
    except (DamagedVideo, MemoryError) as error:
        return None, str(error) or "too little memory"
    return video, [info.frames, info.width, info.height, info.fps, info.bytes]


def _fill_shard(
    number: int,
    paths: list[Path],
    known: list[VideoInfo | str],
    *,
    folder: Path,
    view: View,
    storage: str,
) -> None:
    """Write a shard; ``.NUMBER.at`` names the video being read, should that end this process."""
    target, at = folder / f"{number:05d}", folder / f".{number:05d}.at"
    temporary = folder / f".{number:05d}.{os.getpid()}.part"
    shape, found = (view.frames, view.size, view.size, 3), []

    def videos() -> Iterator[np.ndarray | None]:  # one at a time: a shard may exceed memory
        for place, (path, info) in enumerate(zip(paths, known, strict=True)):
            at.write_text(str(place))
            video, about = _read(path, view, info)
            found.append(about)
            yield video

    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        KINDS[storage].write(temporary, videos(), shape)
        save_json(temporary / "found.json", found)
        temporary.rename(target)
    except OSError:
        if not target.exists():  # another process was faster
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        at.unlink(missing_ok=True)


def _check_room(folder: Path, storage: str, need: float, count: int) -> None:
    free = shutil.disk_usage(folder).free
    if need > free:
        raise UserError(
            f"{folder} needs about {need / 1e9:.2f} GB more and its disk has {free / 1e9:.2f} GB "
            "free; free some space, choose another --cache, or a smaller kind by --storage"
        )
    if need:
        about = f"{storage} cache of {count} videos, about {need / 1e6:.1f} MB to write"
        tqdm.write(f"{folder}: {about}")


def _save_index(folder: Path, stamp: str, rows: list[Any]) -> None:
    """Write what is known of each video, and which are left out and why."""
    numbers = [[np.nan] * 5 if isinstance(row, str) else row for row in rows]
    with atomic(folder / "metadata.npy") as temporary, open(temporary, "wb") as file:
        np.save(file, np.array(numbers, np.float32))
    skipped = {i: row for i, row in enumerate(rows) if isinstance(row, str)}
    save_json(folder / "index.json", {"fingerprint": stamp, "skipped": skipped})


def fill(
    folder: Path, paths: list[Path], view: View, storage: str, stamp: str, *, workers: Any = 1
) -> None:
    """Decode videos into a cache; go on where an earlier call stood.

    Args:
        folder: of the cache, one a fingerprint.
        paths: of the videos.
        view: size and number of frames.
        storage: kind of cache.
        stamp: fingerprint.
        workers: see `gdviz.core.processes.over_processes`.

    Raises:
        UserError: the disk is full, or would be.
    """
    found = verified(paths, folder.parent / "verified.sqlite", workers=workers)
    size, shape = shard_size(len(paths)), (view.frames, view.size, view.size, 3)
    spans = [slice(start, start + size) for start in range(0, len(paths), size)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        left = [n for n in range(len(spans)) if not (folder / f"{n:05d}").exists()]
        videos = sum(len(paths[spans[n]]) for n in left)
        _check_room(folder, storage, KINDS[storage].estimate(shape) * videos, len(paths))
        # No decoder is slower than a megabyte a second; resizing and encoding take time, too.
        sizes = [sum(max(stat(path)[0], 0) for path in paths[spans[n]]) for n in left]
        timeout = 60 + max(sizes, default=0) / 2.5e5
        work = partial(_fill_shard, folder=folder, view=view, storage=storage)
        while left:
            jobs = [(n, paths[spans[n]], found[spans[n]]) for n in left]
            title = "reading videos"
            results = over_processes(
                work, jobs, workers, title=title, unit="shard", timeout=timeout
            )
            lost = {n: r for n, r in zip(left, results, strict=True) if isinstance(r, Lost)}
            for n, result in lost.items():  # once more, without the video that did it
                place = int((folder / f".{n:05d}.at").read_text())
                found[n * size + place] = result.reason
            left = list(lost)
        shards = [load_json(folder / f"{n:05d}" / "found.json") for n in range(len(spans))]
        _save_index(folder, stamp, [row for shard in shards for row in shard])
        for stale in folder.glob(".*"):  # what a killed process was writing
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {error}; free some space or choose another --cache"
        ) from error


def open_cache(
    folder: Path, view: View, storage: str, stamp: str, count: int
) -> tuple[Cache, np.ndarray, dict[int, str]]:
    """Open a finished cache of ``count`` videos.

    Returns:
        The cache, each video's (frames, width, height, fps, bytes), and why rows were skipped.

    Raises:
        UserError: it is damaged, or of other files, another view or another version of this code.
    """
    index = load_json(folder / "index.json")
    try:
        metadata = np.load(folder / "metadata.npy")
        if index["fingerprint"] != stamp or metadata.shape != (count, 5):
            raise UserError(
                f"{folder} holds other videos than its name says; delete it to have it made again"
            )
        skipped = {int(row): reason for row, reason in index["skipped"].items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is damaged ({error}); delete it to have it made again") from None
    shape = (count, view.frames, view.size, view.size, 3)
    return Cache(folder, storage, shape), metadata, skipped

"""Videos kept as a view needs them, in shards: as raw pixels, or as light H.264 files.

    STAMP/index.json, metadata.npy   written last: what the set is, which videos it lacks
    STAMP/00000/found.json           of the first videos, beside what the kind keeps of them

A shard is the unit of parallel work and of resumption: it is there as a whole or not at all, and a
killed fill goes on with those that are not.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from gdviz.core.files import UserError, atomic, load_json, save_json
from gdviz.core.processes import Lost, over_processes
from gdviz.data._encode import encode
from gdviz.data.listing import mark_as_cache
from gdviz.data.reading import DamagedVideo, frames_of, read_square, verify
from gdviz.data.verified import Verdict, from_json, patience

# Few videos in a shard keep all cores busy on small sets; few shards are few folders. Each open one
# holds a file, of which a process may have 256 (macOS); to open it again takes 50 microseconds.
SHARD, SHARDS, OPEN = 16, 4096, 128
REMAKE = "delete it to have it made again"

Shape = tuple[int, ...]
Videos = Iterable[np.ndarray | None]  # one at a time; None could not be read, and is not asked for


def shard_size(count: int) -> int:
    """Return how many videos a shard of a set of ``count`` videos holds."""
    return max(SHARD, -(-count // SHARDS))


# A kind of cache writes videos of a shape [f, h, w, 3] into a folder, and reads frames of one.


class Memmap:
    """Raw pixels: the fastest, and the largest."""

    @staticmethod
    def write(folder: Path, videos: Videos, shape: Shape) -> None:
        # Written, not mapped: a full disk is an error here, and a crash inside a memory map.
        with open(folder / "pixels.u8", "wb") as file:
            for video in videos:
                file.write((np.zeros(shape, np.uint8) if video is None else video).tobytes())

    def __init__(self, folder: Path, shape: Shape) -> None:
        pixels = np.memmap(folder / "pixels.u8", np.uint8, "r")
        self.pixels = pixels.reshape(-1, *shape).view(np.ndarray)

    def read(self, place: int, frames: slice) -> np.ndarray:
        return self.pixels[place, frames]


class Transcode:
    """One H.264 file a video, of short groups of pictures: a thirtieth of the bytes."""

    @staticmethod
    def write(folder: Path, videos: Videos, shape: Shape) -> None:
        odd = shape[1] % 2  # half the colour needs an even side
        for place, video in enumerate(videos):
            if video is not None:
                even = np.pad(video, ((0, 0), (0, odd), (0, odd), (0, 0)), "edge")
                file = folder / f"{place:02d}.mp4"
                encode(even, file, crf="17", g="8", tune="fastdecode")
                file.with_suffix(".json").write_text(json.dumps(asdict(verify(file))))

    def __init__(self, folder: Path, shape: Shape) -> None:
        self.folder, self.shape = folder, shape

    def read(self, place: int, frames: slice) -> np.ndarray:
        file, index = self.folder / f"{place:02d}.mp4", np.arange(*frames.indices(self.shape[0]))
        info = from_json(file.with_suffix(".json").read_text())
        return np.stack(list(frames_of(file, index, info)))[:, : self.shape[1], : self.shape[2]]


KINDS = {"memmap": Memmap, "transcode": Transcode}


@dataclass(frozen=True)
class Cache:
    """``cache[row, frames]`` as of an array ``shape`` [n, f, h, w, 3]; ``frames`` is a slice.

    ``folder`` is named by the fingerprint of what it holds.
    """

    folder: Path
    kind: str
    shape: Shape
    fps: float = field(default=0.0, kw_only=True)  # see `gdviz.data.reading.read_square`
    windows: int = field(default=1, kw_only=True)

    @property
    def shards(self) -> list[tuple[Path, slice]]:
        """Folder and rows of each shard."""
        size = shard_size(self.shape[0])
        starts = range(0, self.shape[0], size)
        return [(self.folder / f"{n:05d}", slice(i, i + size)) for n, i in enumerate(starts)]

    def __getitem__(self, key: tuple[int, slice]) -> np.ndarray:
        number, place = divmod(key[0], shard_size(self.shape[0]))
        try:
            return _shard(self, number).read(place, key[1])
        except (OSError, ValueError, IndexError, TypeError, DamagedVideo) as error:
            problem = f"{self.folder} is damaged (shard {number}: {error})"
            raise UserError(f"{problem}; {REMAKE}") from None


@lru_cache(maxsize=OPEN)
def _shard(cache: Cache, number: int) -> Memmap | Transcode:
    return KINDS[cache.kind](cache.folder / f"{number:05d}", cache.shape[1:])


def _at(folder: Path) -> Path:
    """Return the file that tells the place of the video being read into a shard."""
    return folder.with_name(f".{folder.name}.at")


def _fill_shard(folder: Path, paths: list[Path], known: list[Verdict], *, cache: Cache) -> None:
    """Write a shard; a file that has changed since it was verified is left out."""
    found, shape, each = list(known), cache.shape[1:], cache.shape[1] // cache.windows

    def videos() -> Iterator[np.ndarray | None]:
        for place, (path, info) in enumerate(zip(paths, known, strict=True)):
            _at(folder).write_text(str(place))
            video = None
            if not isinstance(info, str):
                try:
                    how = (each, shape[1], info, cache.fps, cache.windows)
                    video = read_square(path, *how)[0].numpy()
                except (DamagedVideo, MemoryError) as error:
                    found[place] = str(error) or "too little memory"
            yield video

    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir()
        KINDS[cache.kind].write(part, videos(), shape)
        about = attrgetter("frames", "width", "height", "fps", "bytes")
        save_json(part / "found.json", [v if isinstance(v, str) else about(v) for v in found])
        part.rename(folder)
    except OSError:
        if not folder.exists():  # another process was faster
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def fill(cache: Cache, paths: list[Path], known: list[Verdict], *, workers: Any = 1) -> None:
    """Decode videos, of which ``known`` was found, into a cache; go on where an earlier call stood.

    Raise UserError where the disk is full.
    """
    known, work = list(known), partial(_fill_shard, cache=cache)
    try:
        cache.folder.mkdir(parents=True, exist_ok=True)
        mark_as_cache(cache.folder)
        left = [(folder, rows) for folder, rows in cache.shards if not folder.exists()]
        timeout = patience((paths[rows] for _, rows in left), 2.5e5)  # resized and encoded, too
        about = {"title": "reading videos", "unit": "shard", "timeout": timeout}
        while left:
            jobs = [(folder, paths[rows], known[rows]) for folder, rows in left]
            results = zip(left, over_processes(work, jobs, workers, **about), strict=True)
            lost = [(shard, result) for shard, result in results if isinstance(result, Lost)]
            for (folder, rows), result in lost:  # once more, without the video that did it
                known[rows.start + int(_at(folder).read_text())] = result.reason
            left = [shard for shard, _ in lost]
        _save_index(cache)
        for stale in cache.folder.glob(".*"):  # what processes were writing and reading
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    except OSError as error:
        advice = "free some space or choose another --cache"
        raise UserError(f"cannot write {cache.folder}: {error}; {advice}") from error


def _save_index(cache: Cache) -> None:
    """Write what is known of each video, and which are left out and why."""
    rows = [row for folder, _ in cache.shards for row in load_json(folder / "found.json")]
    numbers = [[np.nan] * 5 if isinstance(row, str) else row for row in rows]
    with atomic(cache.folder / "metadata.npy") as temporary, open(temporary, "wb") as file:
        np.save(file, np.array(numbers, np.float32))
    skipped = {i: row for i, row in enumerate(rows) if isinstance(row, str)}
    save_json(cache.folder / "index.json", {"fingerprint": cache.folder.name, "skipped": skipped})


def open_cache(cache: Cache) -> tuple[np.ndarray, dict[int, str]]:
    """Return each video's (frames, width, height, fps, bytes), and why rows are skipped.

    Raise UserError where the cache is not whole, or holds other videos than its name says.
    """
    index = load_json(cache.folder / "index.json")
    try:
        metadata = np.load(cache.folder / "metadata.npy")
        stamp, skipped = index["fingerprint"], {int(i): x for i, x in index["skipped"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{cache.folder} is damaged ({error}); {REMAKE}") from None
    if stamp != cache.folder.name or metadata.shape != (cache.shape[0], 5):
        raise UserError(f"{cache.folder} holds other videos than its name says; {REMAKE}")
    return metadata, skipped

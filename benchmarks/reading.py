"""How fast clips are read, from files and from the decoded cache, per second of CPU time, against plain forms of the same.

    python benchmarks/reading.py VIDEOS [--rounds 5] [--size 112] [--index-rows 1000000]

``VIDEOS`` is a folder of real videos. All ways of one table take turns clip by clip in one process, on the
same frames.
"""

from __future__ import annotations

import argparse
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import decord
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader

from gdviz.data.reader import EXTENSIONS, VideoInfo, frames_of
from gdviz.data.verified import INSERT, TABLE, verified
from gdviz.data.videos import VideoSet

LENGTH = 16


def turns(ways: dict[str, Callable[..., object]], draws: Iterable[tuple]) -> dict[str, float]:
    """Milliseconds of CPU time a call, all threads together."""
    spent: dict[str, list[float]] = defaultdict(list)
    for n, draw in enumerate(draws):
        for name in (*list(ways)[n % len(ways) :], *list(ways)[: n % len(ways)]):
            start = time.process_time()
            ways[name](*draw)
            spent[name].append(time.process_time() - start)
    return {name: 1e3 * sum(times) / len(times) for name, times in spent.items()}


def one(read: Callable[[int], np.ndarray], size: int | None) -> Tensor:
    """One clip through a DataLoader, resized if wanted, by the same code for all readers."""

    def collate(items: list[int]) -> Tensor:
        frames = torch.from_numpy(np.ascontiguousarray(read(items[0])))
        if size is None:
            return frames
        return interpolate(frames.permute(0, 3, 1, 2).float(), (size, size), mode="bilinear", antialias=True)

    return next(iter(DataLoader([0], collate_fn=collate)))


def from_files(known: dict[Path, VideoInfo], rounds: int, size: int | None) -> dict[str, float]:
    def ours(path: Path, index: np.ndarray) -> Tensor:
        return one(lambda _: np.stack(list(frames_of(path, index, known[path]))), size)

    ways = {"gdviz, verified": ours}
    ways["decord, default threads"] = lambda path, index: one(lambda _: decord.VideoReader(str(path)).get_batch(index).asnumpy(), size)
    ways["decord, one thread"] = lambda path, index: one(
        lambda _: decord.VideoReader(str(path), num_threads=1).get_batch(index).asnumpy(), size
    )
    ways["PyAV, verified"] = lambda path, index: one(
        lambda _: np.stack(list(frames_of(path, index, replace(known[path], by_decord=0)))), size
    )
    rng = np.random.default_rng(0)
    draws = [(p, int(rng.integers(i.frames - LENGTH - 1)) + np.arange(LENGTH)) for _ in range(rounds) for p, i in known.items()]
    return turns(ways, draws)


def from_cache(folder: Path, size: int, frames: int = 64, videos: int = 100) -> dict[str, float]:
    shape = (videos, frames, size, size, 3)
    np.memmap(folder / "pixels.u8", np.uint8, "w+", shape=shape)[:] = 7
    raw = np.memmap(folder / "pixels.u8", np.uint8, "r", shape=shape)
    empty = torch.zeros(videos)
    cache = VideoSet("cache", "0", raw, ("a",), empty.long(), ("train",) * videos, ("g",) * videos, empty[:, None], ())
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    batches = [(rng.integers(videos, size=8), rng.integers(frames - LENGTH, size=8)) for _ in range(100)]
    ways = {
        "raw memmap": lambda rows, starts: torch.from_numpy(np.stack([raw[r, s : s + LENGTH] for r, s in zip(rows, starts, strict=True)])),
        "decoded cache": lambda rows, starts: cache.clips(torch.from_numpy(rows), LENGTH, 1, generator),
    }
    assert len({tuple(way(*batches[0]).shape) for way in ways.values()}) == 1
    turns(ways, batches[:20])  # the file is in memory from here on
    return {name: spent / 8 for name, spent in turns(ways, batches).items()}


def index_of(folder: Path, rows: int) -> None:
    """A fresh process opens an index of many rows and looks a thousand files up."""
    db = sqlite3.connect(folder / "verified.sqlite")
    db.execute(TABLE)
    filler = ("", 200, 320, 240, 25.0, 0, 200, "[[12, 12], [24, 24], [36, 36], [48, 48]]")
    with db:
        db.executemany(INSERT, ((f"/data/videos/class{i % 400}/video{i:08d}.mp4", 300_000, 10**18 + i, 1, *filler) for i in range(rows)))
    db.close()
    code = f"""
import sys, time; from pathlib import Path; from contextlib import closing; import sqlite3, resource
from gdviz.data.verified import look_up
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
with closing(sqlite3.connect(sys.argv[1])) as db:
    count = db.execute("SELECT count(*) FROM videos").fetchone()[0]
    opened = time.perf_counter() - start
    some = range(0, {rows}, {rows} // 1000)
    known = [look_up(db, Path(f"/data/videos/class{{i % 400}}/video{{i:08d}}.mp4"), 300_000, 10**18 + i) for i in some]
assert all(info.frames == 200 for info in known)
print(f"{{count}} rows: opened and counted in {{opened:.2f}} s, 1,000 files looked up by {{time.perf_counter() - start:.2f}} s;",
      f"{{(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024:.0f}} MB more than before")
"""
    print(subprocess.run([sys.executable, "-c", code, str(folder / "verified.sqlite")], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--index-rows", type=int, default=1_000_000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = sorted(p for p in given.videos.rglob("*") if p.suffix.lower() in EXTENSIONS)
        start = time.process_time()
        found = dict(zip(paths, verified(paths, Path(folder) / "small.sqlite"), strict=True))
        known = {p: i for p, i in found.items() if isinstance(i, VideoInfo) and i.frames > LENGTH + 1}
        print(
            f"{len(known)} of {len(paths)} videos, verified in {1e3 * (time.process_time() - start) / len(paths):.0f} ms of CPU time each"
        )
        cached = from_cache(Path(folder), given.size)
        for name, spent in cached.items():
            print(
                f"{name}, clips of {LENGTH} frames of {given.size}: {spent:.2f} ms a clip, {cached['raw memmap'] / spent:.0%} of raw",
                flush=True,
            )
        for size in (None, given.size):
            table = from_files(known, given.rounds, size)
            plain = table.get("decord, default threads", np.nan)
            for name, spent in table.items():
                print(f"{name}, {f'resized to {size}' if size else 'full size'}: {spent:.1f} ms a clip, {plain / spent:.2f}x", flush=True)
        print(f"decoded cache: {plain / cached['decoded cache']:.0f}x plain decord")
        index_of(Path(folder), given.index_rows)


if __name__ == "__main__":
    main()

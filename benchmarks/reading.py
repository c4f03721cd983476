"""How fast clips are read, from files and from the caches, per second of CPU time, against plain
forms of the same, and decord (``pip install decord``).

    python benchmarks/reading.py VIDEOS [--rounds 5] [--size 112] [--index-rows 1000000]

``VIDEOS`` is a folder of real videos. All ways of one table take turns clip by clip in one process,
on the same frames; ratios are medians and quartiles over clips.
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import decord
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader

from gdviz.config import View
from gdviz.core.files import save_json
from gdviz.data.cache import KINDS, Cache, open_cache, shard_size
from gdviz.data.listing import Video
from gdviz.data.reading import EXTENSIONS, VERSION, VideoInfo, frames_of
from gdviz.data.verified import INSERT, TABLE, verified
from gdviz.data.videos import VideoSet, open_videos

LENGTH = 16


def turns(ways: dict[str, Callable[..., object]], draws: Iterable[tuple]) -> dict[str, np.ndarray]:
    """Milliseconds of CPU time of every call, all threads together."""
    spent: dict[str, list[float]] = defaultdict(list)
    for n, draw in enumerate(draws):
        for name in (*list(ways)[n % len(ways) :], *list(ways)[: n % len(ways)]):
            start = time.process_time()
            ways[name](*draw)
            spent[name].append(time.process_time() - start)
    return {name: 1e3 * np.array(times) for name, times in spent.items()}


def tell(what: str, table: dict[str, np.ndarray], against: str) -> None:
    for name, spent in table.items():
        low, middle, high = np.quantile(table[against] / spent, (0.25, 0.5, 0.75))
        print(
            f"{name}, {what}: {np.median(spent):.3f} ms a clip, {middle:.2f}x {against} ({low:.2f} "
            f"to {high:.2f})",
            flush=True,
        )


def one(read: Callable[[int], np.ndarray], size: int | None) -> Tensor:
    """One clip through a DataLoader, resized if wanted, by the same code for all readers."""

    def collate(items: list[int]) -> Tensor:
        frames = torch.from_numpy(np.ascontiguousarray(read(items[0])))
        if size is None:
            return frames
        return interpolate(
            frames.permute(0, 3, 1, 2).float(), (size, size), mode="bilinear", antialias=True
        )

    return next(iter(DataLoader([0], collate_fn=collate)))


def from_files(
    known: dict[Path, VideoInfo], rounds: int, size: int | None, caches: dict[str, VideoSet]
) -> dict[str, np.ndarray]:
    """Clips of consecutive frames of files; with ``size``, also of what the caches keep of the same
    videos."""

    def by(
        read: Callable[[Path, np.ndarray], np.ndarray],
    ) -> Callable[[Path, np.ndarray, int], Tensor]:
        return lambda path, index, row: one(lambda _: read(path, index), size)

    def cached(
        videos: VideoSet, generator: torch.Generator
    ) -> Callable[[Path, np.ndarray, int], Tensor]:
        return lambda path, index, row: one(
            lambda _: videos.clips(torch.tensor([row]), LENGTH, 1, generator)[0].numpy(), None
        )

    ways = {
        "gdviz, verified": by(
            lambda path, index: np.stack(list(frames_of(path, index, known[path])))
        ),
        "decord, default threads": by(
            lambda path, index: decord.VideoReader(str(path)).get_batch(index).asnumpy()
        ),
        "decord, one thread": by(
            lambda path, index: (
                decord.VideoReader(str(path), num_threads=1).get_batch(index).asnumpy()
            )
        ),
    }
    if size:
        ways |= {
            f"{kind} cache": cached(videos, torch.Generator().manual_seed(0))
            for kind, videos in caches.items()
        }
    rng, rows = np.random.default_rng(0), list(enumerate(known.items()))
    return turns(
        ways,
        [
            (p, int(rng.integers(i.frames - LENGTH - 1)) + np.arange(LENGTH), r)
            for _ in range(rounds)
            for r, (p, i) in rows
        ],
    )


def caches_of(paths: list[Path], folder: Path, size: int, frames: int = 64) -> dict[str, VideoSet]:
    clips, sets = (
        [
            Video(path, "ab"[i % 2], str(i), ("train", "train", "test")[i % 3])
            for i, path in enumerate(paths)
        ],
        {},
    )
    for kind in KINDS:
        view, start = View(size=size, frames=frames), time.process_time()
        sets[kind] = open_videos(clips, view, folder, name=kind, storage=kind)
        stored = sum(
            p.stat().st_size
            for p in (folder / sets[kind].pixels.folder.name).rglob("*")
            if p.is_file()
        ) / len(paths)
        filled = 1e3 * (time.process_time() - start) / len(paths)
        print(
            f"{kind} cache: {stored / 1e6:.3f} MB a video, filled in {filled:.0f} ms of CPU time "
            "each"
        )
    return sets


def from_cache(videos: VideoSet, folder: Path, stride: int) -> dict[str, np.ndarray]:
    """Batches of eight clips from a cache and a plain memory map: no decoder between them, which
    would empty the processor's caches."""
    pixels = videos.batch(torch.arange(len(videos.splits))).numpy()
    pixels.tofile(folder / "pixels.u8")
    raw, span = (
        np.memmap(folder / "pixels.u8", np.uint8, "r", shape=pixels.shape),
        (LENGTH - 1) * stride + 1,
    )
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    batches = [
        (rng.integers(len(raw), size=8), rng.integers(pixels.shape[1] - span + 1, size=8))
        for _ in range(100)
    ]

    def plain(rows: np.ndarray, starts: np.ndarray) -> Tensor:
        return torch.from_numpy(
            np.stack([raw[r, s : s + span : stride] for r, s in zip(rows, starts, strict=True)])
        )

    ways = {
        "raw numpy.memmap": plain,
        videos.name: lambda rows, starts: videos.clips(
            torch.from_numpy(rows), LENGTH, stride, generator
        ),
    }
    turns(ways, batches[:20])  # the files are in memory from here on
    return {name: spent / 8 for name, spent in turns(ways, batches).items()}


def many_rows(caches: dict[str, VideoSet], folder: Path, counts: Iterable[int]) -> None:
    """Sets of many rows, whose shards are links to one: what a clip and the index cost."""
    for kind, videos in caches.items():
        table = {}
        for count in counts:
            home, size = folder / f"{kind}{count}", shard_size(count)
            home.mkdir()
            shape = (count, *videos.pixels.shape[1:])
            (home / "one").mkdir()
            kept = (videos.pixels[row % len(videos.splits), slice(None)] for row in range(size))
            KINDS[kind].write(home / "one", kept, shape[1:])
            for n in range(-(-count // size)):
                (home / f"{n:05d}").symlink_to("one")
            np.save(home / "metadata.npy", np.ones((count, 5), np.float32))
            save_json(
                home / "index.json",
                {
                    "fingerprint": home.name,
                    "skipped": dict.fromkeys(range(0, count, 100), "is not there"),
                },
            )
            tracemalloc.start()
            start = time.perf_counter()
            pixels = Cache(home, kind, shape)
            open_cache(pixels)
            opened, grown = time.perf_counter() - start, tracemalloc.get_traced_memory()[1] / 1e6
            tracemalloc.stop()
            print(
                f"{kind} cache of {count:,} rows: opened in {opened:.2f} s, {grown:.0f} MB at most"
            )
            table[f"{count:,} rows"] = replace(videos, pixels=pixels, places=None)
        rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)

        def ways(count: int) -> Callable[[], Tensor]:
            some = table[f"{count:,} rows"]
            return lambda: some.clips(
                torch.from_numpy(rng.integers(count, size=8)), LENGTH, 1, generator
            )

        for some in table.values():  # every shard is opened once
            for n in range(0, some.pixels.shape[0], shard_size(some.pixels.shape[0])):
                some.clips(torch.tensor([n]), 2)
        tell(
            f"{kind} cache",
            {
                f"{count:,} rows": spent / 8
                for count, spent in zip(
                    counts,
                    turns({str(c): ways(c) for c in counts}, [()] * 200).values(),
                    strict=True,
                )
            },
            f"{min(counts):,} rows",
        )


def index_of(folder: Path, rows: int) -> None:
    """A fresh process opens an index of many rows and looks a thousand files up."""
    db = sqlite3.connect(folder / "verified.sqlite")
    db.execute(TABLE)
    keys = [[12 * k, 12 * k] for k in range(1, 5)]
    verdict = json.dumps(asdict(VideoInfo(200, 320, 240, 25.0, 300_000, 0, keys)))
    with db:
        db.executemany(
            INSERT,
            (
                (
                    f"/data/videos/class{i % 400}/video{i:08d}.mp4",
                    300_000,
                    10**18 + i,
                    VERSION,
                    verdict,
                )
                for i in range(rows)
            ),
        )
    db.close()
    code = f"""
import sys, time; from pathlib import Path; from contextlib import closing; import sqlite3, resource
from gdviz.data.verified import look_up
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
with closing(sqlite3.connect(sys.argv[1])) as db:
    count = db.execute("SELECT count(*) FROM verdicts").fetchone()[0]
    opened = time.perf_counter() - start
    some = range(0, {rows}, {rows} // 1000)
    names = (f"/data/videos/class{{i % 400}}/video{{i:08d}}.mp4" for i in some)
    stats = ((300_000, 10**18 + i) for i in some)
    known = [look_up(db, Path(name), stat) for name, stat in zip(names, stats)]
assert all(info.frames == 200 for info in known)
took = time.perf_counter() - start
unit = 1e6 if sys.platform == "darwin" else 1e3
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / unit
print(f"{{count}} rows: opened and counted in {{opened:.2f}} s,",
      f"1,000 files looked up by {{took:.2f}} s; {{grown:.0f}} MB more than before")
"""
    print(
        subprocess.run(
            [sys.executable, "-c", code, str(folder / "verified.sqlite")],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("videos", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--index-rows", type=int, default=1_000_000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = sorted(p for p in given.videos.rglob("*") if p.suffix.lower() in EXTENSIONS)
        if not paths:
            sys.exit(f"{given.videos}: holds no videos")
        start = time.process_time()
        found = dict(zip(paths, verified(paths, Path(folder) / "small.sqlite"), strict=True))
        known = {
            p: i for p, i in found.items() if isinstance(i, VideoInfo) and i.frames > LENGTH + 1
        }
        print(
            f"{len(known)} of {len(paths)} videos, verified in "
            f"{1e3 * (time.process_time() - start) / len(paths):.0f} ms of CPU time each"
        )
        caches = caches_of(list(known), Path(folder) / "caches", given.size)
        for videos, stride in product(caches.values(), (1, 2)):
            tell(
                f"16 frames of {given.size}, stride {stride}",
                from_cache(videos, Path(folder), stride),
                "raw numpy.memmap",
            )
        for size in (None, given.size):
            table = from_files(known, given.rounds, size, caches)
            tell(f"resized to {size}" if size else "full size", table, "decord, default threads")
        many_rows(caches, Path(folder), (1000, given.index_rows))
        index_of(Path(folder), given.index_rows)


if __name__ == "__main__":
    main()

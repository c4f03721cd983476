"""Sets of videos, in memory or in a cache; what decodes the files is `gdviz.data.reading`."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Generator, Tensor
from tqdm.auto import tqdm

from gdviz.config import MotionData, View
from gdviz.core.files import UserError, fingerprint
from gdviz.data.cache import Cache, fill, open_cache
from gdviz.data.clips import starts_and_strides
from gdviz.data.listing import SPLITS, Video, read_list
from gdviz.data.motion import make_motion, read_index
from gdviz.data.official import read_official
from gdviz.data.splits import split_by_group
from gdviz.data.verified import stat, verified

VERSION = 4  # raise when decoding, resizing or the caches change: older caches are then made again


def some_of(rows: Int[Tensor, " n"], most: int) -> Int[Tensor, " m"]:
    """Return ``rows``, or ``most`` of them, drawn at random and always the same.

    Taking every tenth, say, would miss classes where classes take turns.
    """
    if len(rows) <= most:
        return rows
    return rows[torch.randperm(len(rows), generator=Generator().manual_seed(0))[:most]]


@dataclass(frozen=True)
class VideoSet:
    """A data set; row i of every field is video i."""

    name: str
    fingerprint: str
    pixels: np.ndarray | Cache  # uint8 (n, f, h, w, 3)
    label_names: tuple[str, ...]
    labels: Tensor  # (n,) long, -1 where unlabelled; or of several labels (n, classes), 0 and 1
    splits: tuple[str, ...]
    groups: tuple[str, ...]
    metadata: Tensor  # (n, 5): frames, width, height, fps, bytes
    skipped: tuple[tuple[str, str], ...] = ()  # (path, reason)
    places: np.ndarray | None = None  # rows of ``pixels`` in use, when some videos were skipped
    audit: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # of videos; never learned
    windows: int = 1  # of each video, one after the other along its frames

    @classmethod
    def from_arrays(
        cls,
        pixels: np.ndarray,
        labels: Sequence[int] | np.ndarray,
        splits: Sequence[str] | np.ndarray,
        *,
        groups: Sequence[str] | None = None,
        label_names: Sequence[str] | None = None,
        name: str = "arrays",
    ) -> VideoSet:
        """Return a set of videos in memory, uint8 ``[n, frames, height, width, 3]``.

        Labels count from 0, -1 where unknown; several a video are ``[n, classes]``, 0 or 1. Splits
        are ``train``, ``unlabelled`` (which hides the label) or ``test``; videos of one group (by
        default each is its own) stay in one fold. Raise UserError where shapes, types, splits or
        labels do not fit.
        """
        pixels, numbers = np.asarray(pixels), np.asarray(labels)
        if pixels.ndim != 5 or pixels.shape[-1] != 3 or pixels.dtype != np.uint8:
            got = f"{pixels.dtype} {list(pixels.shape)}"
            raise UserError(f"pixels: needs uint8 [videos, frames, height, width, 3], got {got}")
        if numbers.ndim not in (1, 2) or numbers.dtype.kind not in "iu":
            raise UserError("labels: needs whole numbers, and -1 where unknown")
        if numbers.ndim == 2 and not np.isin(numbers, (-1, 0, 1)).all():
            raise UserError("labels: several a video are 0 or 1 for each class")
        count = len(pixels)
        groups = tuple(map(str, range(count) if groups is None else groups))
        splits = tuple(map(str, splits))
        for what, values in {"labels": numbers, "splits": splits, "groups": groups}.items():
            if len(values) != count:
                raise UserError(f"{what}: {len(values)} for {count} videos")
        if other := set(splits) - set(SPLITS):
            raise UserError(f"splits: {min(other)!r} is none of {', '.join(SPLITS)}")
        hidden = np.array([split == "unlabelled" for split in splits], bool)
        if (numbers[~hidden] < 0).any():
            raise UserError("labels: a video to train or test on has none")
        several = numbers.ndim == 2
        classes = numbers.shape[1] if several else max(numbers.tolist(), default=-1) + 1
        names = tuple(map(str, range(classes) if label_names is None else label_names))
        if len(names) < classes:
            raise UserError(f"label_names: {len(names)} for {classes} classes")
        about = fingerprint(numbers.tolist(), splits, groups, list(pixels.shape))
        digest = sha256(about.encode() + np.ascontiguousarray(pixels).tobytes()).hexdigest()[:16]
        hide = hidden[:, None] if several else hidden
        shown = torch.from_numpy(np.where(hide, -1, numbers).astype(np.int64))
        unknown = torch.zeros(count, 5)
        return cls(name, digest, pixels, names, shown, tuple(splits), groups, unknown)

    def rows(self, split: str) -> Int[Tensor, " rows"]:
        """Return the row numbers of a part: train, unlabelled or test."""
        return torch.tensor([i for i, s in enumerate(self.splits) if s == split], dtype=torch.long)

    @cached_property
    def training_rows(self) -> Int[Tensor, " rows"]:
        """Labelled rows first, then unlabelled ones."""
        return torch.cat([self.rows("train"), self.rows("unlabelled")])

    def _read(self, rows: Tensor, frames: Iterable[slice]) -> Tensor:
        places = rows.numpy() if self.places is None else self.places[rows.numpy()]
        read = [self.pixels[row, part] for row, part in zip(places.tolist(), frames, strict=True)]
        return torch.from_numpy(np.stack(read))

    def batch(
        self, rows: Int[Tensor, " b"], rng: Generator | None = None
    ) -> UInt8[Tensor, "b f h w 3"]:
        """Return whole videos; where they are kept as windows, one each: any by ``rng``, or the
        middle one."""
        each, which = self.pixels.shape[1] // self.windows, [self.windows // 2] * len(rows)
        if rng is not None and self.windows > 1:
            which = torch.randint(self.windows, (len(rows),), generator=rng).tolist()
        return self._read(rows, [slice(w * each, (w + 1) * each) for w in which])

    def clips(
        self,
        rows: Int[Tensor, " b"],
        length: int,
        stride: int | Tensor = 1,
        rng: Generator | None = None,
        place: float | Tensor = 0.5,
    ) -> UInt8[Tensor, "b t h w 3"]:
        """Return ``pick_frames(self.batch(rows), ...)``, reading only the frames of the clips.

        ``rng`` and ``place`` go over all windows of a video.
        """
        frames = self.pixels.shape[1]
        drawn = starts_and_strides(len(rows), frames, length, stride, rng, place, self.windows)
        # A slice is copied once, in one piece; numbers of frames would be copied frame by frame.
        parts = [
            slice(start, start + (length - 1) * step + 1, max(step, 1))
            for start, step in zip(*(x.tolist() for x in drawn), strict=True)
        ]
        return self._read(rows, parts)


def open_videos(
    videos: list[Video],
    view: View,
    cache: Path | str,
    *,
    name: str,
    storage: str = "memmap",
    workers: Any = 1,
    seed: int = 0,
) -> VideoSet:
    """Decode videos into a cache, or open the cache that an earlier call left.

    Without given splits what can be read is split by group, drawn by ``seed``. Below ``cache`` lies
    a folder for each fingerprint of files (path, size, time of change), labels, view and code
    version: anything else never opens it. ``storage`` is memmap or transcode. ``workers`` are
    processes, or a cluster; with two or more a reader that dies or hangs costs its file only. Raise
    UserError where too little is left to train and test on, or the disk is full.
    """
    paths = [video.path for video in videos]
    stats = [stat(path) for path in paths]
    _parts(videos, {i for i, (size, _) in enumerate(stats) if size < 0}, name, seed)
    about = [
        (os.path.realpath(v.path), v.label, v.group, v.split, *(v.labels or ())) for v in videos
    ]
    files = [(*row, *found) for row, found in zip(about, stats, strict=True)]
    paced = (view.fps, view.windows) if view.fps else ()
    stamp = fingerprint(files, view.size, view.frames, *paced, storage, VERSION)
    shape = (len(videos), view.windows * view.frames, view.size, view.size, 3)
    pixels = Cache(Path(cache) / stamp, storage, shape, fps=view.fps, windows=view.windows)
    if not (pixels.folder / "index.json").exists():
        known = verified(paths, Path(cache) / "verified.sqlite", workers=workers)
        # Refused, as above, before any more work.
        _parts(videos, {i for i, found in enumerate(known) if isinstance(found, str)}, name, seed)
        fill(pixels, paths, known, workers=workers)
    metadata, skipped = open_cache(pixels)
    parts = _parts(videos, skipped, name, seed)
    span = view.fps and view.frames / view.fps
    if short := int((metadata[:, 0] < span * metadata[:, 3] - 0.5).sum()):
        tqdm.write(f"{name}: the last frame of {short} videos shorter than {span:.1f} s is held")
    keep = [i for i, part in enumerate(parts) if part]
    label_of = {i: videos[i].classes for i in keep if parts[i] in ("train", "test")}
    names = tuple(sorted({label for classes in label_of.values() for label in classes}))
    listed = {label for video in videos if video.split != "unlabelled" for label in video.classes}
    if lost := sorted(listed - set(names)):
        tqdm.write(f"{name}: no video can be read of {', '.join(lost)}")
    mates = "has no label, and is of a recording that is tested on"
    left_out = [(i, skipped.get(i, mates)) for i, part in enumerate(parts) if not part]
    several = any(video.labels is not None for video in videos)
    return VideoSet(
        name=name,
        fingerprint=stamp if parts == [v.split for v in videos] else fingerprint(stamp, parts),
        pixels=pixels,
        label_names=names,
        labels=_labels([label_of.get(i) for i in keep], names, several),
        splits=tuple(parts[i] for i in keep),
        groups=tuple(videos[i].group for i in keep),
        metadata=torch.from_numpy(metadata[keep]),
        skipped=tuple((str(videos[i].path), reason) for i, reason in left_out),
        places=np.array(keep) if left_out else None,
        windows=view.windows,
    )


def _labels(
    classes_of: list[tuple[str, ...] | None], names: tuple[str, ...], several: bool
) -> Tensor:
    """Return one number a video, or a row of 0 and 1 a video; -1 where nothing is known."""
    if not several:
        return torch.tensor([names.index(found[0]) if found else -1 for found in classes_of])
    rows = [
        [-1] * len(names) if found is None else [int(name in found) for name in names]
        for found in classes_of
    ]
    return torch.tensor(rows)


def _parts(videos: list[Video], skipped: Collection[int], name: str, seed: int) -> list[str]:
    """Split the videos that are not skipped; "" stands for the others."""
    rows = [i for i in range(len(videos)) if i not in skipped]
    parts = split_by_group([videos[i] for i in rows], name, seed=seed)
    part_of = dict(zip(rows, parts, strict=True))
    return [part_of.get(i, "") for i in range(len(videos))]


def load_motion(
    cfg: MotionData, view: View, root: Path | str, *, storage: str = "memmap", workers: Any = 1
) -> VideoSet:
    """Open the embedded set: written as mp4 files under ``root`` if need be, then read back."""
    home = make_motion(root, cfg, workers=workers)
    cache, listed = Path(root) / "cache", read_list(home / "index.csv")
    videos = open_videos(listed, view, cache, name="motion", storage=storage, workers=workers)
    index = read_index(home)
    kept = range(len(index)) if videos.places is None else videos.places
    audit = {name: tuple(index[i][name] for i in kept) for name in ("motion", "domain")}
    return replace(videos, audit=audit)


def load_videos(
    source: Path | str,
    view: View,
    cache: Path | str,
    *,
    storage: str = "memmap",
    workers: Any = 1,
    seed: int = 0,
) -> VideoSet:
    """Open a set of your own: a folder, a list in a file, or an official layout (data/README.md).

    Of an official layout (UCF101, HMDB51) the first split is taken. More: :func:`open_videos`. A
    script that wants several workers calls this under ``if __name__ == "__main__":``.
    """
    official = read_official(source)
    videos = official.videos if official else read_list(source)
    how = {"name": str(source), "storage": storage, "workers": workers, "seed": seed}
    return open_videos(videos, view, cache, **how)

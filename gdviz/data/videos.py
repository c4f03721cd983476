"""Sets of videos: read once, kept in a cache (`gdviz.data.cache`) fingerprinted by files and
view."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from gdviz.config import MotionData, View
from gdviz.core.files import UserError, fingerprint
from gdviz.data.cache import Cache, fill, open_cache
from gdviz.data.clips import starts_and_strides
from gdviz.data.listing import SPLITS, Clip, check_classes, read_clips, split_by_group
from gdviz.data.motion import make_motion
from gdviz.data.official import read_official
from gdviz.data.verified import stat

VERSION = 3  # raise when decoding, resizing or the caches change: older caches are then made again


@dataclass(frozen=True)
class VideoSet:
    """A data set; row i of every field is video i."""

    name: str
    fingerprint: str
    pixels: np.ndarray | Cache  # uint8 (n, f, h, w, 3)
    label_names: tuple[str, ...]
    labels: Tensor  # (n,) long; -1 where unlabelled
    splits: tuple[str, ...]
    groups: tuple[str, ...]
    metadata: Tensor  # (n, 5): frames, width, height, fps, bytes
    skipped: tuple[tuple[str, str], ...] = ()  # (path, reason)
    places: np.ndarray | None = None  # rows of ``pixels`` in use, when some videos were skipped

    @classmethod
    def from_arrays(
        cls,
        pixels: np.ndarray,
        labels: Sequence[int] | np.ndarray,
        splits: Sequence[str],
        *,
        groups: Sequence[str] | None = None,
        label_names: Sequence[str] | None = None,
        name: str = "arrays",
    ) -> VideoSet:
        """Return a set of videos in memory.

        Args:
            pixels: uint8 ``[n, frames, height, width, 3]``.
            labels: classes from 0 on; -1 where unknown.
            splits: ``train``, ``unlabelled`` or ``test``.
            groups: recordings; videos of one stay in one fold. By default each is its own.
            label_names: of the classes; by default their numbers.
            name: what to call the set.

        Raises:
            UserError: shapes, types, splits or labels that do not fit.
        """
        pixels, numbers = np.asarray(pixels), torch.tensor([int(label) for label in labels])
        count = len(pixels)
        if pixels.ndim != 5 or pixels.shape[-1] != 3 or pixels.dtype != np.uint8:
            raise UserError(
                "pixels: needs uint8 [videos, frames, height, width, 3], got "
                f"{pixels.dtype} {list(pixels.shape)}"
            )
        groups = tuple(map(str, range(count))) if groups is None else tuple(groups)
        for what, values in {"labels": numbers, "splits": splits, "groups": groups}.items():
            if len(values) != count:
                raise UserError(f"{what}: {len(values)} for {count} videos")
        if unknown := set(splits) - set(SPLITS):
            raise UserError(f"splits: {sorted(unknown)[0]!r} is none of {', '.join(SPLITS)}")
        known = numbers >= 0
        needed = torch.tensor([split != "unlabelled" for split in splits])
        if (needed & ~known).any():
            raise UserError("labels: a video to train or test on has none")
        classes = int(numbers.max()) + 1
        names = tuple(map(str, label_names or range(classes)))
        if len(names) < classes:
            raise UserError(f"label_names: {len(names)} for {classes} classes")
        about = fingerprint(numbers.tolist(), splits, groups, list(pixels.shape))
        digest = sha256(about.encode() + np.ascontiguousarray(pixels).tobytes()).hexdigest()[:16]
        labels = torch.where(needed, numbers, -1)
        metadata = torch.zeros(count, 5)
        return cls(name, digest, pixels, names, labels, tuple(splits), groups, metadata)

    def rows(self, split: str) -> Tensor:
        """Return the row numbers of a part: train, unlabelled or test."""
        return torch.tensor([i for i, s in enumerate(self.splits) if s == split], dtype=torch.long)

    @cached_property
    def training_rows(self) -> Tensor:
        """Labelled rows first, then unlabelled ones."""
        return torch.cat([self.rows("train"), self.rows("unlabelled")])

    def _read(self, rows: Tensor, frames: Iterable[slice]) -> Tensor:
        places = rows.numpy() if self.places is None else self.places[rows.numpy()]
        read = [self.pixels[row, part] for row, part in zip(places.tolist(), frames, strict=True)]
        return torch.from_numpy(np.stack(read))

    def batch(self, rows: Tensor) -> Tensor:
        """Return whole videos, uint8 [b, f, h, w, 3]."""
        return self._read(rows, [slice(None)] * len(rows))

    def clips(
        self,
        rows: Tensor,
        length: int,
        stride: int | Tensor = 1,
        rng: Generator | None = None,
        place: float | Tensor = 0.5,
    ) -> Tensor:
        """Return ``pick_frames(self.batch(rows), ...)``: uint8 [b, length, h, w, 3].

        Only the frames of the clips are read.
        """
        frames = self.pixels.shape[1]
        drawn = starts_and_strides(len(rows), frames, length, stride, rng, place)
        # A slice is copied once, in one piece; numbers of frames would be copied frame by frame.
        parts = [
            slice(start, start + (length - 1) * step + 1, max(step, 1))
            for start, step in zip(*(x.tolist() for x in drawn), strict=True)
        ]
        return self._read(rows, parts)


def open_videos(
    clips: list[Clip],
    view: View,
    cache: Path | str,
    *,
    name: str,
    storage: str = "memmap",
    workers: Any = 1,
) -> VideoSet:
    """Decode ``clips`` into a cache, or open the cache that an earlier call left.

    Args:
        clips: what to read, with its split.
        view: size and number of frames kept.
        cache: folder for decoded sets, one sub-folder per fingerprint of files (path, size, time
            of change), labels, view and code version: anything else never opens it.
        name: what to call the set.
        storage: how decoded videos are kept: memmap, jpeg or transcode.
        workers: decoding processes, or a cluster; a reader that dies or hangs is survived with
            two or more.

    Returns:
        The set, without the videos that could not be read: they are listed in ``skipped``.

    Raises:
        UserError: some clips have several labels, too little is left to train and test on, or the
            disk is full.
    """
    if several := next((c for c in clips if c.labels), None):
        raise UserError(
            f"--data {name}: {several.path.name} may show several classes, but students are "
            "trained on videos of one class each"
        )
    stats = [(str(c.path.resolve()), c.label, c.group, c.split, *stat(c.path)) for c in clips]
    stamp = fingerprint(stats, view.size, view.frames, storage, VERSION)
    folder = Path(cache) / stamp
    if not (folder / "index.json").exists():
        fill(folder, [c.path for c in clips], view, storage, stamp, workers=workers)
    pixels, metadata, skipped = open_cache(folder, view, storage, stamp, len(clips))
    keep = [i for i in range(len(clips)) if i not in skipped]
    kept = [clips[i] for i in keep]
    check_classes(kept, Path(name))
    names = tuple(sorted({c.label for c in kept if c.label}))
    labels = [names.index(c.label) if c.label and c.split != "unlabelled" else -1 for c in kept]
    return VideoSet(
        name=name,
        # rows shift with what is left out
        fingerprint=fingerprint(stamp, sorted(skipped)) if skipped else stamp,
        pixels=pixels,
        label_names=names,
        labels=torch.tensor(labels),
        splits=tuple(c.split for c in kept),
        groups=tuple(c.group for c in kept),
        metadata=torch.from_numpy(metadata[keep]),
        skipped=tuple((str(clips[i].path), reason) for i, reason in skipped.items()),
        places=None if len(keep) == len(clips) else np.array(keep),
    )


def load_motion(
    cfg: MotionData, view: View, root: Path | str, *, storage: str = "memmap", workers: Any = 1
) -> VideoSet:
    """Open the embedded set: written as mp4 files under ``root`` if need be, then read back."""
    clips = read_clips(make_motion(root, cfg, workers=workers) / "index.csv")
    cache = Path(root) / "cache"
    return open_videos(clips, view, cache, name="motion", storage=storage, workers=workers)


def load_videos(
    source: Path | str,
    view: View,
    cache: Path | str,
    *,
    storage: str = "memmap",
    workers: Any = 1,
    seed: int = 0,
) -> VideoSet:
    """Open a set of your own: a folder of class sub-folders, a CSV, or an official layout.

    A CSV has columns path, label, group, split. Without given splits the set is split by group.
    Of an official layout (UCF101, HMDB51) the first split is taken. With two workers or more a
    file that kills or hangs its reader costs that file only; a script then calls this under
    ``if __name__ == "__main__":``. Other arguments: see :func:`open_videos`.
    """
    if official := read_official(source):
        clips, gone = official.clips, set(official.missing)
        if not any(clip.labels for clip in clips):
            check_classes([clip for clip in clips if clip not in gone], Path(source))
    else:
        clips = split_by_group(read_clips(source), seed=seed)
    return open_videos(clips, view, cache, name=str(source), storage=storage, workers=workers)

"""Sets of videos: read once, kept in a cache (`gdviz.data.cache`) that is fingerprinted by files and view."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor

from gdviz.config import MotionData, View
from gdviz.core.files import UserError, fingerprint
from gdviz.data.cache import Cache, fill, open_cache
from gdviz.data.clips import starts_and_strides
from gdviz.data.listing import Clip, check_classes, read_clips, split_by_group
from gdviz.data.motion import make_motion
from gdviz.data.official import read_official
from gdviz.data.verified import stat

VERSION = 3  # raise when decoding, resizing or the caches change: caches made by the old code are then made again


@dataclass(frozen=True)
class VideoSet:
    """A data set whose videos are in a cache; row i of every field is video i."""

    name: str
    fingerprint: str
    pixels: np.ndarray | Cache  # uint8 (n, f, h, w, 3)
    label_names: tuple[str, ...]
    labels: Tensor  # (n,) long; -1 where unlabelled
    splits: tuple[str, ...]
    groups: tuple[str, ...]
    metadata: Tensor  # (n, 5): frames, width, height, fps, bytes
    skipped: tuple[tuple[str, str], ...]  # (path, reason)
    places: np.ndarray | None = None  # rows of ``pixels`` in use, when some videos were skipped

    def rows(self, split: str) -> Tensor:
        """Row numbers of a part: train, unlabelled or test."""
        return torch.tensor([i for i, s in enumerate(self.splits) if s == split], dtype=torch.long)

    @cached_property
    def training_rows(self) -> Tensor:
        """Labelled rows first, then unlabelled ones."""
        return torch.cat([self.rows("train"), self.rows("unlabelled")])

    def _read(self, rows: Tensor, frames: Iterable[slice]) -> Tensor:
        places = rows.numpy() if self.places is None else self.places[rows.numpy()]
        return torch.from_numpy(
            np.stack(
                [self.pixels[row, part] for row, part in zip(places.tolist(), frames, strict=True)]
            )
        )

    def batch(self, rows: Tensor) -> Tensor:
        """uint8 tensor [b, f, h, w, 3]."""
        return self._read(rows, [slice(None)] * len(rows))

    def clips(
        self,
        rows: Tensor,
        length: int,
        stride: int = 1,
        rng: Generator | None = None,
        place: float | Tensor = 0.5,
    ) -> Tensor:
        """``pick_frames(self.batch(rows), ...)`` that touches the frames of the clips only: uint8 [b, length, h, w, 3]."""
        # A slice is copied once, in one piece; numbers of frames would be copied frame by frame.
        drawn = starts_and_strides(len(rows), self.pixels.shape[1], length, stride, rng, place)
        return self._read(
            rows,
            [
                slice(s, s + (length - 1) * d + 1, max(d, 1))
                for s, d in zip(*(x.tolist() for x in drawn), strict=True)
            ],
        )


def open_videos(
    clips: list[Clip], view: View, cache: Path | str, *, name: str, workers: int | str = 1
) -> VideoSet:
    """Decodes ``clips`` into a cache, or opens the cache that an earlier call left.

    Args:
        clips: what to read, with its split.
        view: size and number of frames kept.
        cache: folder for decoded sets, one sub-folder per fingerprint of files (path, size, time of
            change), labels, view and code version: anything else never opens it.
        name: what to call the set.
        workers: decoding processes; a reader that dies or hangs is survived with two or more.

    Returns:
        The set, without the videos that could not be read: they are listed in ``skipped``.

    Raises:
        UserError: some clips have several labels, too little is left to train and test on, or the disk is full.
    """
    if several := next((c for c in clips if c.labels), None):
        raise UserError(
            f"--data {name}: {several.path.name} may show several classes, but students are trained on videos of one class each"
        )
    stats = [(str(c.path.resolve()), c.label, c.group, c.split, *stat(c.path)) for c in clips]
    stamp = fingerprint(stats, view.size, view.frames, view.cache, VERSION)
    folder = Path(cache) / stamp
    if not (folder / "index.json").exists():
        fill(folder, [c.path for c in clips], view, stamp, workers=workers)
    pixels, metadata, skipped = open_cache(folder, view, stamp, len(clips))
    keep = [i for i in range(len(clips)) if i not in skipped]
    kept = [clips[i] for i in keep]
    check_classes(kept, Path(name))
    label_names = tuple(sorted({c.label for c in kept if c.label}))
    return VideoSet(
        name=name,
        fingerprint=fingerprint(stamp, sorted(skipped))
        if skipped
        else stamp,  # rows shift with what is left out
        pixels=pixels,
        label_names=label_names,
        labels=torch.tensor(
            [
                label_names.index(c.label) if c.label and c.split != "unlabelled" else -1
                for c in kept
            ]
        ),
        splits=tuple(c.split for c in kept),
        groups=tuple(c.group for c in kept),
        metadata=torch.from_numpy(metadata[keep]),
        skipped=tuple((str(clips[i].path), reason) for i, reason in skipped.items()),
        places=None if len(keep) == len(clips) else np.array(keep),
    )


def load_motion(
    cfg: MotionData, view: View, root: Path | str, *, workers: int | str = 1
) -> VideoSet:
    """The embedded data set: written as mp4 files under ``root`` if need be, then read back."""
    home = make_motion(root, cfg, workers=workers)
    clips = read_clips(home / "index.csv")
    return open_videos(clips, view, Path(root) / "cache", name="motion", workers=workers)


def load_folder(
    source: Path | str, view: View, cache: Path | str, *, workers: int | str = 1, seed: int = 0
) -> VideoSet:
    """A data set in its official layout (first split), a folder of class sub-folders, or a CSV of (path, label, group, split).

    Without given splits, it is split by group. With two workers or more, a file that kills or hangs its
    reader costs that file only; a script then calls this under ``if __name__ == "__main__":``.
    """
    if official := read_official(source):
        clips, gone = official.clips, set(official.missing)
        if not any(clip.labels for clip in clips):
            check_classes([clip for clip in clips if clip not in gone], Path(source))
    else:
        clips = split_by_group(read_clips(source), seed=seed)
    return open_videos(clips, view, cache, name=str(source), workers=workers)

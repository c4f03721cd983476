"""Decoded videos: read once, kept as one memory-mapped uint8 array, fingerprinted by files and view."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor

from gdviz.artefacts import UserError, fingerprint, load_json, save_json
from gdviz.config import MotionData, View
from gdviz.data.index import Clip, check_classes, read_clips, split_by_group
from gdviz.data.layouts import read_official
from gdviz.data.motion import make_motion
from gdviz.data.reader import DamagedVideo, VideoInfo, read_square
from gdviz.data.sampling import frame_numbers
from gdviz.data.verified import patience, stat, verified
from gdviz.parallel import Lost, over_processes

VERSION = 2  # raise when decoding or resizing changes: caches made by the old code are then made again


@dataclass(frozen=True)
class VideoSet:
    """A data set in memory-mapped form; row i of every field is video i."""

    name: str
    fingerprint: str
    pixels: np.ndarray  # uint8 (n, f, h, w, 3)
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

    def batch(self, rows: Tensor) -> Tensor:
        """uint8 tensor [b, f, h, w, 3]."""
        places = rows.numpy() if self.places is None else self.places[rows.numpy()]
        return torch.from_numpy(np.asarray(self.pixels[places]))

    def clips(self, rows: Tensor, length: int, stride: int = 1, rng: Generator | None = None) -> Tensor:
        """``pick_frames(self.batch(rows), ...)`` that touches the frames of the clips only: uint8 [b, length, h, w, 3]."""
        places = rows.numpy() if self.places is None else self.places[rows.numpy()]
        index = frame_numbers(len(rows), self.pixels.shape[1], length, stride, rng).numpy()
        return torch.from_numpy(np.asarray(self.pixels[places[:, None], index]))


def _decode(row: int, path: str, info: VideoInfo, *, view: View, out: Path, count: int) -> str:
    """Writes one video into its row of the shared array; returns why it was skipped, if it was."""
    try:
        video, _ = read_square(path, view.frames, view.size, info)
    except (DamagedVideo, MemoryError) as error:
        return str(error) or "too little memory"
    np.memmap(out, np.uint8, "r+", shape=(count, *video.shape))[row] = video.numpy()
    return ""


def open_videos(clips: list[Clip], view: View, cache: Path | str, *, name: str, workers: int = 1) -> VideoSet:
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
    stats = [(str(c.path), c.label, c.group, c.split, *stat(c.path)) for c in clips]
    stamp = fingerprint(stats, view.size, view.frames, VERSION)
    folder = Path(cache) / stamp
    if not (folder / "index.json").exists():
        _fill(folder, clips, view, workers)
    index = load_json(folder / "index.json")
    keep = [i for i, meta in enumerate(index["found"]) if not isinstance(meta, str)]
    skipped = tuple((str(clips[i].path), meta) for i, meta in enumerate(index["found"]) if isinstance(meta, str))
    kept = [clips[i] for i in keep]
    check_classes(kept, Path(name))
    label_names = tuple(sorted({c.label for c in kept if c.label}))
    shape = (len(clips), view.frames, view.size, view.size, 3)
    try:
        pixels = np.memmap(folder / "pixels.u8", np.uint8, "r", shape=shape)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is damaged ({error}); delete it to have it made again") from None
    return VideoSet(
        name=name,
        fingerprint=stamp,
        pixels=pixels,
        label_names=label_names,
        labels=torch.tensor([label_names.index(c.label) if c.label and c.split != "unlabelled" else -1 for c in kept]),
        splits=tuple(c.split for c in kept),
        groups=tuple(c.group for c in kept),
        metadata=torch.tensor([index["found"][i] for i in keep]),
        skipped=skipped,
        places=None if len(keep) == len(clips) else np.array(keep),
    )


def _fill(folder: Path, clips: list[Clip], view: View, workers: int) -> None:
    paths = [c.path for c in clips]
    found = verified(paths, folder.parent / "verified.sqlite", workers=workers)
    partial_folder = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(partial_folder, ignore_errors=True)
    try:
        partial_folder.mkdir(parents=True)
        out = partial_folder / "pixels.u8"
        size = len(clips) * view.frames * view.size**2 * 3
        with open(out, "wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk shows here, not as a crash inside a memory map
            else:
                file.truncate(size)
        work = partial(_decode, view=view, out=out, count=len(clips))
        jobs = [(i, str(clips[i].path), info) for i, info in enumerate(found) if isinstance(info, VideoInfo)]
        problems = over_processes(work, jobs, workers, title="reading videos", unit="video", timeout=patience(paths))
        for (i, _, info), problem in zip(jobs, problems, strict=True):
            reason = problem.reason if isinstance(problem, Lost) else problem
            found[i] = reason or [info.frames, info.width, info.height, info.fps, info.bytes]
        save_json(partial_folder / "index.json", {"found": found, "view": view})
        shutil.rmtree(folder, ignore_errors=True)  # one without its index is of no use
        partial_folder.rename(folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}; free some space or choose another --cache") from error
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)


def load_motion(cfg: MotionData, view: View, root: Path | str, *, workers: int = 1) -> VideoSet:
    """The embedded data set: written as mp4 files under ``root`` if need be, then read back."""
    home = make_motion(root, cfg, workers=workers)
    clips = read_clips(home / "index.csv")
    return open_videos(clips, view, Path(root) / "cache", name="motion", workers=workers)


def load_folder(source: Path | str, view: View, cache: Path | str, *, workers: int = 1, seed: int = 0) -> VideoSet:
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

"""The bundled run, ``data/example``: a finished run, thinned to 1.5 MB.

Notebooks open it where no run has been made. It is a run's folder like any other, but for its
videos, of which it has a few, and which are drawn when first asked for, and for what only the first
seed still has. ``tools/pack_example.py`` makes it anew.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gdviz.config import Profile
from gdviz.core.files import UserError, file_sha256, load_json
from gdviz.data.cache import Cache
from gdviz.data.motion import CLASSES, encode, render
from gdviz.data.reading import read_square
from gdviz.data.videos import VideoSet
from gdviz.experiment.folder import Run, Workers, open_run


@cache
def _video(profile: Profile, motion: str, seed: int) -> np.ndarray:
    """Draw, compress and read a video, as the run's were."""
    cfg, view = profile.motion, profile.view
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "video.mp4"
        encode(render(CLASSES.index(motion), seed, size=cfg.size, frames=cfg.frames), file)
        return read_square(file, view.frames, view.size)[0].numpy()


@dataclass(frozen=True)
class _Drawn(Cache):
    profile: Profile
    motions: tuple[str, ...]
    seeds: tuple[int, ...]

    def __getitem__(self, key: tuple[int, slice]) -> np.ndarray:
        row, frames = key
        return _video(self.profile, self.motions[row], self.seeds[row])[frames]


class Bundled(Run):
    """A run whose videos are drawn, not stored."""

    def videos(self, workers: Workers = 1) -> VideoSet:
        """Open the run's videos; nothing is drawn yet."""
        index: dict[str, Any] = load_json(self.folder / "index.json")
        index = {k: tuple(v) if isinstance(v, list) else v for k, v in index.items()}
        labels, view = torch.tensor(index.pop("labels")), self.profile.view
        shape = (len(labels), view.frames, view.size, view.size, 3)
        drawn = self.profile, index.pop("motions"), index.pop("seeds")
        pixels, metadata = _Drawn(self.folder, "drawn", shape, *drawn), torch.zeros(len(labels), 5)
        return VideoSet(pixels=pixels, labels=labels, metadata=metadata, **index)


def open_bundled(folder: Path) -> Bundled:
    """Open ``data/example``; raise UserError if a file is not the one that was packed."""
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        digest, file = line[:64], folder / line[66:]
        if not file.exists() or file_sha256(file) != digest:
            advice = "restore it, for instance: git checkout data/example"
            raise UserError(f"{file} is damaged or gone; {advice}")
    run = open_run(folder)
    return Bundled(run.profile, folder, cache=run.cache)

"""The bundled run, ``data/example``: a finished run, thinned to 1.5 MB.

Notebooks open it where no run has been made. It is a run's folder like any other, but for its
videos, of which it has a few, and which are drawn when first asked for, and for what only the first
seed still has. ``tools/pack_example.py`` makes it anew.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class _Drawn(Cache):
    """A cache whose videos are drawn, compressed and read as the run's were, by need."""

    profile: Profile
    motions: tuple[str, ...]
    seeds: tuple[int, ...]
    done: dict[int, np.ndarray] = field(default_factory=dict)

    def __getitem__(self, key: tuple[int, slice]) -> np.ndarray:
        row, frames = key
        if row not in self.done:
            cfg, view = self.profile.motion, self.profile.view
            label, seed = CLASSES.index(self.motions[row]), self.seeds[row]
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "video.mp4"
                encode(render(label, seed, size=cfg.size, frames=cfg.frames), file)
                self.done[row] = read_square(file, view.frames, view.size)[0].numpy()
        return self.done[row][frames]


@dataclass(frozen=True)
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
    """Open ``data/example``.

    Raises:
        UserError: a file is not the one that was packed.
    """
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        if not (folder / name).exists() or file_sha256(folder / name) != digest:
            raise UserError(
                f"{folder / name} is damaged or gone; restore it, for instance: "
                "git checkout data/example"
            )
    run = open_run(folder)
    return Bundled(run.profile, folder, cache=run.cache)

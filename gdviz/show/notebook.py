"""What every notebook opens with: ``setup()``, and ``check`` for its exercises."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from IPython.display import Markdown, display
from matplotlib import pyplot as plt
from torch import Tensor

from gdviz.config import METHODS, PROFILES, Profile
from gdviz.core.files import UserError, load_tensors
from gdviz.data.reading import read_square
from gdviz.data.videos import VideoSet, load_motion
from gdviz.experiment.folder import Run, open_run
from gdviz.show import plots
from gdviz.show.bundled import Bundled, open_bundled


@dataclass(frozen=True)
class Session:
    """What ``setup()`` found: where notebooks read and write, and what they compute on."""

    seed: int
    profile: Profile
    device: str
    root: Path
    run: Run

    def videos(self, *, labelled: int = 4, unlabelled: int = 24, test: int = 4) -> VideoSet:
        """A small set drawn afresh (videos a class), unlike the run's; kept under ``data/``."""
        sizes = {"labelled": labelled, "unlabelled": unlabelled, "test": test}
        cfg = replace(self.profile.motion, **sizes, seed=self.seed + 101)
        return load_motion(cfg, self.profile.view, self.root / "data")

    def films(self) -> tuple[np.ndarray, list[str]]:
        """The example's video files at full size, uint8 ``[n, f, h, w, 3]``, and their classes."""
        files, cfg = (
            sorted((self.root / "data/example/videos").glob("*/*.mp4")),
            self.profile.motion,
        )
        return np.stack([read_square(file, cfg.frames, cfg.size)[0].numpy() for file in files]), [
            f.parent.name for f in files
        ]

    def history(self, kind: str, name: str) -> list[dict[str, float]]:
        """Training curves of one of the run's ``teachers`` or ``students``, first seed."""
        return load_jsonl(
            self.run.folder / f"seed{self.run.profile.seeds[0]}" / kind / name / "history.jsonl"
        )

    def outputs(self, method: str) -> dict[str, Tensor]:
        """A student's ``logits`` (and ``features``) on every video of the run, first seed."""
        file = self.run.student_folder(self.run.profile.seeds[0], method) / "outputs.safetensors"
        return {name: x.float() for name, x in load_tensors(file).items()}


def check(answer: Any, right: Callable[[Any], Any], hint: str) -> None:
    """Says whether an exercise's answer is right; ``...`` is one not given yet. Raises
    AssertionError with the hint."""
    if answer is not ...:
        assert bool(right(answer)), hint
    print("not answered yet" if answer is ... else "right")


def find_run(root: Path) -> Run:
    """Return the newest finished run under ``runs/`` that has what notebooks show.

    That is all default methods and two teachers or more; else the bundled run.
    """
    done = sorted(root.glob("runs/*/summary.json"), key=lambda file: -file.stat().st_mtime)
    for folder in (file.parent for file in done if (file.parent / "results.csv").exists()):
        try:
            run = open_run(folder)
        except UserError:  # made by another version of gdviz
            continue
        if set(METHODS) <= set(run.profile.methods) and len(run.profile.teachers.tasks) > 1:
            return run
    return open_bundled(root / "data/example")


def setup(seed: int = 0, profile: str = "smoke") -> Session:
    """Seed, threads, device and figure style of a notebook; shows versions and which run is looked
    at.

    Raises:
        UserError: not started inside the project, or the example is damaged.
    """
    here = Path.cwd()
    root = next(
        (
            folder
            for folder in (here, *here.parents)
            if (folder / "data/example/SHA256SUMS").exists()
        ),
        None,
    )
    if root is None:
        raise UserError(
            f"{here} is not inside the gdviz project (no data/example above it); start Jupyter "
            "there"
        )
    os.environ.setdefault("NUMBA_NUM_THREADS", "1")  # read when UMAP is imported
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", min(4, os.cpu_count() or 1))))
    torch.set_flush_denormal(True)  # see gdviz.experiment.steps
    torch.manual_seed(seed)
    plt.switch_backend(
        mpl.get_backend()
    )  # now: a first figure within plots.style() would leave pyplot not interactive
    mpl.rcParams.update(plots._RC)
    device, run = "cuda" if torch.cuda.is_available() else "cpu", find_run(root)
    rows = {"Python": platform.python_version()} | {
        name: version(name) for name in ("gdviz", "torch", "numpy", "matplotlib")
    }
    rows |= {"device": device, "threads": torch.get_num_threads(), "seed": seed, "profile": profile}
    rows["looking at"] = f"`{run.folder.relative_to(root)}`" + (
        " (no finished run under `runs/`)" if isinstance(run, Bundled) else ""
    )
    display(
        Markdown(
            "| | |\n|---|---|\n"
            + "\n".join(f"| {name} | {value} |" for name, value in rows.items())
        )
    )
    return Session(seed, PROFILES[profile], device, root, run)

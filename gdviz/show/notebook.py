"""What every notebook opens with, ``setup()``, and answers below its questions, ``reveal``."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from IPython.display import Markdown, display
from jaxtyping import UInt8
from matplotlib import pyplot as plt
from torch import Tensor

from gdviz.config import PROFILES, SHOWN, Profile
from gdviz.core.files import UserError, load_json, load_jsonl
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
        """Draw a small set (videos a class), unlike the run's; it is kept under ``data/``."""
        sizes = {"labelled": labelled, "unlabelled": unlabelled, "test": test}
        cfg = replace(self.profile.motion, **sizes, seed=self.seed + 101)
        return load_motion(cfg, self.profile.view, self.root / "data")

    def films(self) -> tuple[UInt8[np.ndarray, "n f h w 3"], list[str]]:
        """Return the bundled run's video files at full size, and their classes."""
        files = sorted((self.root / "data/example/videos").glob("*/*.mp4"))
        cfg = self.profile.motion
        films = [read_square(file, cfg.frames, cfg.size)[0].numpy() for file in files]
        return np.stack(films), [file.parent.name for file in files]

    def history(self, kind: str, name: str) -> list[dict[str, float]]:
        """Return training curves of one of the run's "teachers" or "students", first seed."""
        folder = self.run.teacher_folder if kind == "teachers" else self.run.student_folder
        return load_jsonl(folder(self.run.profile.seeds[0], name) / "history.jsonl")

    def outputs(self, method: str) -> dict[str, Tensor]:
        """Return a student's logits (and features) of every video of the run, first seed."""
        return self.run.outputs(self.run.profile.seeds[0], method)


def reveal(text: str) -> None:
    """Show the answer to a prediction, folded: what it says is computed above it."""
    display(Markdown(f"<details><summary>Answer</summary>\n\n{text}\n\n</details>"))


def find_run(root: Path) -> Run:
    """Return the newest finished run under ``runs/`` that has what notebooks show.

    Else the bundled run. What is newer is named, and why it is not it.
    """
    runs = [*root.glob("runs/*/summary.json"), *root.glob("runs/*/*/*/summary.json")]  # of plans
    for file in sorted(runs, key=lambda file: -file.stat().st_mtime):
        try:
            run = open_run(file.parent)
            lacks = _lacks(run)
        except UserError as error:  # of another version of gdviz, say
            lacks = str(error).removeprefix(f"{file.parent}: ")
        if not lacks:
            return run
        print(f"{file.parent.relative_to(root)} is passed over: {lacks}")
    return open_bundled(root / "data/example")


def _lacks(run: Run) -> str:
    """Return what a run lacks for the notebooks, whose formulas are of one label a video."""
    if missing := [name for name in SHOWN if name not in run.profile.methods]:
        return f"it has no student of {', '.join(missing)}"
    if len(run.profile.teachers.tasks) < 2:
        return "it has one teacher"
    if "mAP" in run.results():
        return "its videos have several labels; `gdviz evaluate` and its figures show it"
    return ""


def setup(seed: int = 0) -> Session:
    """Set seed, threads and figure style of a notebook; show versions and the run looked at.

    Raise UserError if not started inside the project, or if the bundled run is damaged.
    """
    here = Path.cwd()
    roots = [f for f in (here, *here.parents) if (f / "data/example/SHA256SUMS").exists()]
    if not roots:
        problem = f"{here} is not inside the gdviz project (no data/example above it)"
        raise UserError(f"{problem}; start Jupyter there")
    os.environ.setdefault("NUMBA_NUM_THREADS", "1")  # read when UMAP is imported
    threads = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # may be "4,2", or empty
    threads = int(threads) if threads.isdecimal() else min(4, os.cpu_count() or 1)
    torch.set_num_threads(max(1, threads))
    torch.set_flush_denormal(True)  # as runs do
    torch.manual_seed(seed)
    # Now: a first figure within plots.style() would leave pyplot not interactive.
    plt.switch_backend(mpl.get_backend())
    mpl.rcParams.update(plots.STYLE)
    device, run = "cuda" if torch.cuda.is_available() else "cpu", find_run(roots[0])
    packed, held, data = "", "", load_json(run.folder / "summary.json")["data"]
    if isinstance(run, Bundled):
        packed = " (no finished run under `runs/`)"
        held = f", of which {len(run.videos().labels)} are at hand"
    rows = {"Python": platform.python_version()}
    rows |= {name: version(name) for name in ("gdviz", "torch", "numpy", "matplotlib")}
    rows |= {"device": device, "threads": str(torch.get_num_threads())}
    rows |= {"seed": str(seed)}
    rows["looking at"] = f"`{run.folder.relative_to(roots[0])}`{packed}"
    videos = sum(data["videos"].values())
    rows["its data"] = f"{data['name']}: {len(data['classes'])} classes, {videos} videos{held}"
    rows["its teachers"] = ", ".join(run.profile.teachers.tasks)
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    display(Markdown(f"| | |\n|---|---|\n{table}"))
    return Session(seed, PROFILES["smoke"], device, roots[0], run)

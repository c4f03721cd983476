"""One run, one folder: where its parts lie, and how they are opened.

    config.json       profile, data and version; a folder of another configuration is refused
    environment.json  what it ran on; source.json: where its videos are
    skipped.csv       videos that could not be read, and why
    seedN/teachers/TASK/    teacher.safetensors, bank/, history.jsonl, result.json
    seedN/graphs/           graphs.safetensors (both graphs, their edges), result.json
    seedN/graphs-EDGES/     those of controls: shuffled, uniform, truth
    seedN/students/METHOD/  student.safetensors, outputs.safetensors, history.jsonl, result.json,
                            method.safetensors where a method has trained parameters of its own
    results.csv       one row a teacher and a student: what tables and figures are made of
    summary.json      sizes, speed, baselines that see no motion
    figures/

A step is done when its result.json exists; it is written last.
"""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from gdviz.config import Profile
from gdviz.core.cluster import Cluster
from gdviz.core.files import (
    UserError,
    atomic,
    fingerprint,
    from_plain,
    load_json,
    load_tensors,
    plain,
    save_json,
)
from gdviz.core.loop import Bookkeeping
from gdviz.core.names import folder_name, split_home
from gdviz.data.motion import DOMAINS
from gdviz.data.videos import VideoSet, load_motion, load_videos
from gdviz.experiment.checks import stamp_own_teachers
from gdviz.student.edges import Graphs, open_graphs
from gdviz.teachers.bank import Bank, gather, open_readout

VERSION = 6  # raise when results change: folders of older code are then refused
Workers = int | Cluster


@dataclass(frozen=True)
class Run:
    """Where a run reads and writes. Picklable: worker processes get a copy."""

    profile: Profile
    folder: Path
    data: Path | None = None  # None: the embedded set
    cache: Path = Path("data")
    device: str = "cpu"  # auto: what the machine has that does a job
    tensorboard: bool = False

    @property
    def where(self) -> str:
        """The device of this process."""
        if self.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        return self.device

    def videos(self, workers: Workers = 1) -> VideoSet:
        """Open the run's videos; decode them first if need be.

        Raise UserError where they are not those that the folder's run began with.
        """
        view, storage, home = self.profile.view, self.profile.storage, self.cache
        if self.data is None:
            motion = self.profile.motion
            videos = load_motion(motion, view, home, storage=storage, workers=workers)
        else:
            if isinstance(workers, int):
                workers = max(2, workers)  # files of others may kill a reader
            how = {"storage": storage, "workers": workers}
            videos = load_videos(self.data, view, home / "cache", **how)
        config = self.folder / "config.json"
        if config.exists() and load_json(config).get("data") != videos.fingerprint:
            changed = f"the videos of {videos.name} have changed since this run began"
            raise UserError(f"{self.folder}: {changed}; bring them back, or choose another --out")
        return videos

    def teacher_folder(self, seed: int, task: str) -> Path:
        return self.folder / f"seed{seed}" / "teachers" / folder_name(task)

    def graphs_folder(self, seed: int, edges: str = "learned") -> Path:
        return self.folder / f"seed{seed}" / ("graphs" if edges == "learned" else f"graphs-{edges}")

    def student_folder(self, seed: int, method: str) -> Path:
        return self.folder / f"seed{seed}" / "students" / folder_name(method)

    def keep(self, checkpoint: Path, progress: str | None) -> Bookkeeping:
        """Return where a training resumes from and what it shows."""
        board = checkpoint.parent / "tensorboard" if self.tensorboard else None
        return Bookkeeping(checkpoint, progress, board)

    def home(self, task: str, workers: Workers = 1) -> VideoSet | None:
        """Open the videos that a teacher TASK@HOME is trained on; None: those of the run."""
        profile, home = self.profile, split_home(task)[1]
        if not home:
            return None
        how = {"storage": profile.storage, "workers": workers}
        if home not in DOMAINS:
            return load_videos(home, profile.view, self.cache / "cache", **how)
        sizes = {
            "labelled": profile.teachers.home_labelled,
            "unlabelled": profile.teachers.home_unlabelled,
        }
        seed = 1_000_000 + 100 * profile.motion.seed + DOMAINS.index(home)
        cfg = replace(profile.motion, domains=(home,), unnamed=0, test=1, seed=seed, **sizes)
        return load_motion(cfg, profile.view, self.cache, **how)

    def bank(self, seed: int, videos: VideoSet, shuffled: bool = False) -> Bank:
        """Open what the finished teachers of a seed say."""
        readouts = {}
        for task in self.profile.teachers.tasks:
            folder, view = self.teacher_folder(seed, task) / "bank", self.profile.view_of(task)
            readouts[task] = open_readout(folder, videos, view)
        bank = gather(readouts, videos)
        bank = bank.with_impostors() if self.profile.teachers.impostors else bank
        return bank.shuffled(videos.training_rows, seed) if shuffled else bank

    def graphs(self, seed: int, edges: str = "learned") -> Graphs:
        """Open both graphs of a seed, with learned edges or those of a control."""
        return open_graphs(self.graphs_folder(seed, edges) / "graphs.safetensors")

    def outputs(self, seed: int, method: str) -> dict[str, Tensor]:
        """Return the logits and features that a finished student has for every video."""
        file = self.student_folder(seed, method) / "outputs.safetensors"
        return {name: x.float() for name, x in load_tensors(file).items()}

    def results(self) -> pd.DataFrame:
        """Return one row a finished teacher or student, in the order of the profile.

        Raise UserError where there is none.
        """
        folders = []
        for seed in self.profile.seeds:
            folders += [self.teacher_folder(seed, task) for task in self.profile.teachers.tasks]
            folders += [self.student_folder(seed, method) for method in self.profile.methods]
        rows = [load_json(folder / "result.json") for folder in folders if is_done(folder)]
        if not rows:
            raise UserError(
                f"{self.folder}: holds nothing finished yet; the same `gdviz run` goes on"
            )
        return pd.DataFrame(rows)


def is_done(folder: Path, *files: str) -> bool:
    """Return whether a step has its result, and the files that later steps read."""
    return all((folder / name).exists() for name in ("result.json", *files))


def save_results(path: Path, results: pd.DataFrame) -> None:
    """Write a table of results as CSV."""
    with atomic(path) as temporary:
        results.to_csv(temporary, index=False)


def environment() -> dict[str, Any]:
    """Return what a result may depend on: machine and versions."""
    names = ("gdviz", "torch", "torchvision", "numpy", "scikit-learn")
    machine = {"platform": platform.platform(), "processor": platform.machine()}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {"python": platform.python_version(), **{name: version(name) for name in names}}
    return {**machine, "cpus": os.cpu_count(), "gpu": gpu, **versions}


def claim_folder(run: Run, videos: VideoSet | None = None) -> None:
    """Write config.json, or check that it is this run's; without ``videos`` look only.

    Raise UserError if the folder holds another run, or something that is not a run.
    """
    config = plain({"version": VERSION, "profile": run.profile})
    if videos:
        config |= {"data": videos.fingerprint} | stamp_own_teachers(run.profile, videos)
    file = run.folder / "config.json"
    if file.exists():
        old = load_json(file)
        with suppress(KeyError, TypeError):  # settings that have come since had their defaults
            old["profile"] = plain(from_plain(Profile, old["profile"]))
        if differing := sorted(key for key in config if old.get(key) != config[key]):
            raise UserError(
                f"--out {run.folder}: holds a run of another configuration "
                f"({', '.join(differing)} differ); choose another folder"
            )
    elif run.folder.exists() and (not run.folder.is_dir() or any(run.folder.iterdir())):
        raise UserError(f"--out {run.folder}: is not empty and holds no run; choose another folder")
    elif videos:
        save_json(file, config)


def default_folder(profile: Profile, data: Path | None) -> Path:
    """Return a folder under ``runs/`` named by data and settings."""
    return Path("runs") / f"{data.stem if data else 'motion'}-{fingerprint(profile, data)[:8]}"


def open_run(folder: Path | str) -> Run:
    """Open a run's folder; raise UserError if it holds no run, or one of another version."""
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise UserError(f"{folder}: holds no run (no config.json)")
    config = load_json(folder / "config.json")
    source = load_json(folder / "source.json")
    try:
        if config["version"] != VERSION:
            raise KeyError(f"version {config['version']}, not {VERSION}")
        profile = from_plain(Profile, config["profile"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder}: was made by another version of gdviz ({error})") from None
    data = Path(source["data"]) if source["data"] else None
    return Run(profile, folder, data, Path(source["cache"]))

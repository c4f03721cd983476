"""One run, one folder: data, teachers, edges, students, results; each step resumes where it stood.

    config.json       profile, data and code version; a folder of another configuration is refused
    environment.json  what it ran on; source.json: where its videos are
    skipped.csv       videos that could not be read, and why
    seedN/teachers/TASK/    teacher.safetensors, outputs.safetensors, clips/ (outputs by clip), history.jsonl, result.json
    seedN/edges/, edges-shuffled/   edges.safetensors, result.json
    seedN/students/METHOD/  student.safetensors, outputs.safetensors, history.jsonl, result.json,
                            representation_graph.safetensors (adapters) where that graph is used
    metrics.jsonl     one row a teacher and a student: what the table and the figures are made of
    figures/

A step is done when its result.json exists; it is written last.
"""

from __future__ import annotations

import csv
import os
import platform
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from gdviz.config import Profile
from gdviz.core import distributed as ranks
from gdviz.core.files import (
    UserError,
    atomic,
    fingerprint,
    from_plain,
    load_json,
    load_tensors,
    plain,
    save_json,
    save_jsonl,
    save_tensors,
)
from gdviz.core.loop import Bookkeeping
from gdviz.core.processes import over_processes
from gdviz.data.videos import VideoSet, load_folder, load_motion
from gdviz.experiment.checks import check_profile, recognise_own_teachers
from gdviz.experiment.metrics import accuracy, calibration_error, footprint, shortcut_baselines
from gdviz.student.distill import distill
from gdviz.student.edges import Edges, learn_edges
from gdviz.teachers.backbones import Classifier, build_backbone
from gdviz.teachers.bank import Knowledge, build_graphs, gather
from gdviz.teachers.fit import TeacherOutputs, build_teacher, outputs_of, pretrain
from gdviz.teachers.own import own_teacher
from gdviz.teachers.readout import is_whole, open_clips, predict

VERSION = 4  # raise when results change: folders of older code are then refused


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
        return (
            ("cuda" if torch.cuda.is_available() else "cpu")
            if self.device == "auto"
            else self.device
        )

    def videos(self, workers: int | str = 1) -> VideoSet:
        if self.data is None:
            return load_motion(self.profile.motion, self.profile.view, self.cache, workers=workers)
        workers = (
            workers if isinstance(workers, str) else max(2, workers)
        )  # files of others may kill a reader
        return load_folder(self.data, self.profile.view, self.cache / "cache", workers=workers)

    def teacher_folder(self, seed: int, task: str) -> Path:
        return self.folder / f"seed{seed}" / "teachers" / task.replace(":", ".")

    def edges_folder(self, seed: int, shuffled: bool) -> Path:
        return self.folder / f"seed{seed}" / ("edges-shuffled" if shuffled else "edges")

    def student_folder(self, seed: int, method: str) -> Path:
        return self.folder / f"seed{seed}" / "students" / method.replace(":", ".")

    def bookkeeping(self, checkpoint: Path, progress: str | None) -> Bookkeeping:
        board = checkpoint.parent / "tensorboard" if self.tensorboard else None
        return {"checkpoint": checkpoint, "progress": progress, "board": board}

    def knowledge(self, seed: int, videos: VideoSet) -> Knowledge:
        """What the finished teachers of a seed know."""
        tasks = self.profile.teachers.tasks
        files = {task: self.teacher_folder(seed, task) / "outputs.safetensors" for task in tasks}
        outputs = {task: TeacherOutputs(**load_tensors(file)) for task, file in files.items()}
        if self.profile.distillation.target == "video":
            return gather(outputs, videos)
        clips = (
            open_clips(file.parent / "clips", videos, self.profile.view_of(task))
            for task, file in files.items()
        )
        return gather(outputs, videos, tuple(clips))

    def edges(self, seed: int, *, shuffled: bool = False) -> Edges:
        return Edges(**load_tensors(self.edges_folder(seed, shuffled) / "edges.safetensors"))

    def metrics(self) -> list[dict[str, Any]]:
        """One row a finished teacher or student, in the order of the profile."""
        folders = [
            folder
            for seed in self.profile.seeds
            for folder in (
                *(self.teacher_folder(seed, task) for task in self.profile.teachers.tasks),
                *(self.student_folder(seed, method) for method in self.profile.methods),
            )
        ]
        return [
            load_json(folder / "result.json")
            for folder in folders
            if (folder / "result.json").exists()
        ]


@cache
def _videos(run: Run) -> VideoSet:
    """Once a process: the set is memory-mapped, but its index takes a moment to read."""
    return run.videos()


def _left(
    jobs: list[tuple[Any, ...]],
    folder: Callable[..., Path],
    *files: str,
    whole: Callable[[Path], bool] = lambda folder: True,
) -> list[tuple[Any, ...]]:
    """The jobs that are not done: a step is done when its result is there, and what later steps read.

    Ranks wait here for the first one, which has written what it had to by then.
    """
    left = [
        job
        for job in jobs
        if not (
            all((folder(*job) / name).exists() for name in ("result.json", *files))
            and whole(folder(*job))
        )
    ]
    for job in left:  # with a result, its checkpoint would be taken for a left-over
        (folder(*job) / "result.json").unlink(missing_ok=True)
    return ranks.agreed(left)


def train_teacher(run: Run, seed: int, task: str, bar: bool = False) -> None:
    """Pre-trains, fits and reads out one teacher."""
    folder, videos, profile = run.teacher_folder(seed, task), _videos(run), run.profile
    view = profile.view_of(task)
    if ":" in task:
        backbone, history, pretext, state = own_teacher(task).to(run.where), [], {}, {}
    else:
        backbone, head, history = pretrain(
            task, profile.teachers, view, videos,
            seed=seed, device=run.where, **run.bookkeeping(folder / "pretrain.ckpt", f"{task}, seed {seed}" if bar else None),
        )  # fmt: skip
        pretext = {head.metric: history[-1][head.metric]}
        state = {f"task.{k}": v for k, v in head.state_dict().items()}
    model, outputs = outputs_of(backbone, videos, profile.teachers, view, seed=seed, folder=folder)
    if not ranks.first():
        return
    test, labelled = videos.rows("test"), videos.rows("train")
    probs = torch.softmax(outputs.logits[test] / outputs.temperature, 1)
    state |= {
        f"pretrained.{k}": v
        for k, v in getattr(backbone, "backbone", backbone).state_dict().items()
    }
    save_tensors(
        folder / "teacher.safetensors",
        {f"model.{k}": v for k, v in model.state_dict().items()} | state,
    )
    save_tensors(folder / "outputs.safetensors", outputs.tensors())
    save_jsonl(folder / "history.jsonl", history)
    row = {
        "seed": seed, "kind": "teacher", "name": task,
        "accuracy": accuracy(outputs.logits[test], videos.labels[test]),
        "out_of_fold": accuracy(outputs.logits[labelled], videos.labels[labelled]),
        "calibration_error": calibration_error(probs, videos.labels[test]),
        "pretext": pretext,
    }  # fmt: skip
    save_json(folder / "result.json", row)
    for checkpoint in folder.glob("*.ckpt"):
        checkpoint.unlink(missing_ok=True)


def train_edges(run: Run, seed: int, shuffled: bool) -> None:
    """Learns the edges of both graphs, or those of the control; on one rank, because all of it takes less than to share it."""
    if not ranks.first():
        return
    folder, videos = run.edges_folder(seed, shuffled), _videos(run)
    knowledge = run.knowledge(seed, videos)
    if shuffled:
        knowledge = knowledge.shuffled(videos.training_rows, seed)
    graphs = build_graphs(knowledge, 1, videos.training_rows, run.profile.distillation)
    edges = learn_edges(knowledge, *graphs, run.profile.distillation.edges, seed=seed)
    save_tensors(folder / "edges.safetensors", vars(edges))
    final = edges.teachers[-1][videos.training_rows].mean(0)
    row = {
        "teachers": dict(zip(knowledge.teachers, final.tolist(), strict=True)),
        "pairs": dict(zip(graphs[1].names, edges.pairs[-1].tolist(), strict=True)),
    }
    save_json(folder / "result.json", row)


def train_student(run: Run, seed: int, method: str, bar: bool = False) -> None:
    """Trains and tests one student."""
    folder, videos, profile = run.student_folder(seed, method), _videos(run), run.profile
    shuffled = method == "both-shuffled"
    knowledge, edges = run.knowledge(seed, videos), run.edges(seed, shuffled=shuffled)
    if shuffled:
        knowledge = knowledge.shuffled(videos.training_rows, seed)
    student, history = distill(
        method, knowledge, edges, videos, profile.view, profile.distillation,
        seed=seed, device=run.where, **run.bookkeeping(folder / "student.ckpt", f"{method}, seed {seed}" if bar else None),
    )  # fmt: skip
    test = videos.rows("test")
    logits, features = predict(
        student.classifier, videos, torch.arange(len(videos.splits)), profile.view
    )
    if not ranks.first():
        return
    save_tensors(folder / "student.safetensors", student.classifier.state_dict())
    if student.graph is not None:
        save_tensors(folder / "representation_graph.safetensors", student.graph.state_dict())
    save_tensors(folder / "outputs.safetensors", {"logits": logits, "features": features})
    save_jsonl(folder / "history.jsonl", history)
    row = {
        "seed": seed,
        "kind": "student",
        "name": method,
        "accuracy": accuracy(logits[test], videos.labels[test]),
    }
    if method == "kd-best":
        row["teacher"] = knowledge.best_teacher()
    save_json(folder / "result.json", row)
    (folder / "student.ckpt").unlink(missing_ok=True)


def environment() -> dict[str, Any]:
    """What a result may depend on: machine and versions."""
    names = ("gdviz", "torch", "torchvision", "numpy", "scikit-learn")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "python": sys.version.split()[0], "platform": platform.platform(), "processor": platform.machine(),
        "cpus": os.cpu_count(), "gpu": gpu, **{name: version(name) for name in names},
    }  # fmt: skip


def claim_folder(run: Run, videos: VideoSet | None = None) -> None:
    """Writes config.json, or checks that it is this run's; without ``videos`` looks only, before any work.

    Raises:
        UserError: the folder holds another run, or something that is not a run.
    """
    config = plain(
        {"version": VERSION, "profile": run.profile}
        | ({"data": videos.fingerprint} if videos else {})
    )
    file = run.folder / "config.json"
    if file.exists():
        old = load_json(file)
        with suppress(KeyError, TypeError):  # settings that have come since had their defaults
            old["profile"] = plain(from_plain(Profile, old["profile"]))
        if differing := sorted(key for key in config if old.get(key) != config[key]):
            what = ", ".join(differing)
            raise UserError(
                f"--out {run.folder}: holds a run of another configuration ({what} differ); choose another folder"
            )
    elif run.folder.exists() and (not run.folder.is_dir() or any(run.folder.iterdir())):
        raise UserError(f"--out {run.folder}: is not empty and holds no run; choose another folder")
    elif videos:
        save_json(file, config)


def default_folder(profile: Profile, data: Path | None) -> Path:
    return (
        Path("runs") / f"{'motion' if data is None else data.stem}-{fingerprint(profile, data)[:8]}"
    )


def _begin(run: Run, workers: int | str) -> VideoSet:
    """Claims the folder, reads the videos, sweeps, and notes what it runs on."""
    claim_folder(run)
    videos = run.videos(workers)
    claim_folder(run, videos)
    for stale in run.folder.rglob(".*.part"):  # what a killed process was writing
        stale.unlink(missing_ok=True)
    for stale in run.folder.rglob("*.ckpt"):  # of what was finished just before a kill
        if (stale.parent / "result.json").exists():
            stale.unlink(missing_ok=True)
    recognise_own_teachers(run.profile, videos, run.teacher_folder)
    save_json(run.folder / "environment.json", environment())
    save_json(
        run.folder / "source.json",
        {"data": run.data and run.data.resolve(), "cache": run.cache.resolve()},
    )
    with atomic(run.folder / "skipped.csv") as temporary, open(temporary, "w", newline="") as file:
        csv.writer(file).writerows([("path", "reason"), *videos.skipped])
    for path, reason in videos.skipped:
        tqdm.write(f"skipped {path}: {reason}")
    return videos


def execute(run: Run, *, workers: int | str) -> list[dict[str, Any]]:
    """Does what is left of a run; returns its metrics.

    Jobs are shared among ``workers`` processes, or the machines of the Dask scheduler at that address; or, where this
    process is one of several ranks, done one after another by all ranks together. Whoever works reads the same folders.

    Raises:
        UserError: see ``claim_folder`` and ``gdviz.data``.
    """
    profile = run.profile
    check_profile(profile)
    torch.set_flush_denormal(True)  # see gdviz.core.processes: a single worker is this process
    videos = _begin(run, workers) if ranks.first() else None
    seeds, methods = profile.seeds, profile.methods
    workers = workers if ranks.world() == 1 else 1
    bars = workers == 1  # a bar of epochs below the bar of jobs

    def do(work: Callable[..., None], jobs: list[tuple[Any, ...]], title: str) -> None:
        over_processes(work, jobs, workers, title=title if ranks.first() else None)

    teachers = [(s, t) for s in seeds for t in profile.teachers.tasks]
    by_clip = profile.distillation.target == "clip"
    files = ("teacher.safetensors", "outputs.safetensors", "history.jsonl")
    left = _left(
        teachers,
        run.teacher_folder,
        *files,
        whole=lambda folder: not by_clip or is_whole(folder / "clips"),
    )
    do(partial(train_teacher, run, bar=bars), left, "teachers")
    controls = (False, True) if "both-shuffled" in methods else (False,)
    left = _left([(s, c) for s in seeds for c in controls], run.edges_folder, "edges.safetensors")
    do(partial(train_edges, run), left, "edges")
    students = [(s, m) for s in seeds for m in methods]
    left = _left(
        students, run.student_folder, "student.safetensors", "outputs.safetensors", "history.jsonl"
    )
    do(partial(train_student, run, bar=bars), left, "students")
    metrics = ranks.agreed(run.metrics())
    if ranks.first():
        save_jsonl(run.folder / "metrics.jsonl", metrics)
    if videos and not (run.folder / "summary.json").exists():
        save_json(run.folder / "summary.json", summarise(run, videos))
    return metrics


def summarise(run: Run, videos: VideoSet) -> dict[str, Any]:
    """Sizes of the teachers together and of the student, and the baselines that see no motion."""
    profile, classes = run.profile, len(videos.label_names)
    teachers = [
        footprint(
            build_teacher(task, profile.teachers, classes).to(run.where), profile.view_of(task)
        )
        for task in profile.teachers.tasks
    ]
    student = footprint(
        Classifier(build_backbone(profile.distillation.student), classes).to(run.where),
        profile.view,
    )
    parts = {split: len(videos.rows(split)) for split in ("train", "unlabelled", "test")}
    return {
        "data": {
            "name": videos.name,
            "classes": videos.label_names,
            "videos": parts,
            "skipped": len(videos.skipped),
        },
        "baselines": shortcut_baselines(videos),
        "teacher": dict(zip(profile.teachers.tasks, teachers, strict=True)),
        "student": student,
        "ratio": {key: sum(t[key] for t in teachers) / student[key] for key in student},
    }


def open_run(folder: Path | str) -> Run:
    """Opens a run's folder for reading.

    Raises:
        UserError: no run there.
    """
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise UserError(f"{folder}: holds no run (no config.json)")
    config = load_json(folder / "config.json")
    source = load_json(folder / "source.json")
    try:
        profile = from_plain(Profile, config["profile"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder}: was made by another version of gdviz ({error})") from None
    return Run(
        profile, folder, Path(source["data"]) if source["data"] else None, Path(source["cache"])
    )

"""The steps of a run: teachers, graphs, students. Each is done once, and resumes where it stood."""

from __future__ import annotations

import csv
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from gdviz.core import distributed
from gdviz.core.files import atomic, save_json, save_jsonl, save_tensors
from gdviz.core.processes import over_processes
from gdviz.data.videos import VideoSet
from gdviz.experiment.checks import check_profile, recognise_own_teachers
from gdviz.experiment.folder import Run, Workers, claim_folder, environment, is_done, save_results
from gdviz.experiment.metrics import accuracy, calibration_error, footprint, shortcut_baselines
from gdviz.student.distill import distill
from gdviz.student.edges import Graphs, build_graphs, learn_edges, save_graphs
from gdviz.student.family import build_student
from gdviz.student.methods import find_method
from gdviz.teachers.bank import is_read_out, predict
from gdviz.teachers.fit import build_teacher, fit_teacher, pretrain
from gdviz.teachers.own import OwnBackbone, find_source

TEACHER_FILES = ("teacher.safetensors", "history.jsonl")
STUDENT_FILES = ("student.safetensors", "outputs.safetensors", "history.jsonl")


@cache
def _videos(run: Run) -> VideoSet:
    """Open the set once a process: it is memory-mapped, but its index takes a moment to read."""
    return run.videos()


def train_teacher(run: Run, seed: int, task: str, bar: bool = False) -> None:
    """Pre-train, fit and read out one teacher; a network of your own is not pre-trained."""
    folder, videos, profile = run.teacher_folder(seed, task), _videos(run), run.profile
    view, source = profile.view_of(task), find_source(task)
    history: list[dict[str, float]] = []
    state: dict[str, torch.Tensor] = {}
    row: dict[str, Any] = {"seed": seed, "kind": "teacher", "name": task, "label": task}
    row |= {"colour": 4, "marker": "s", "headline": False, "shuffled": False}
    if isinstance(source, OwnBackbone):
        backbone = source.to(run.where)
    else:
        keep = run.keep(folder / "pretrain.ckpt", f"{task}, seed {seed}" if bar else None)
        backbone, head, history = pretrain(
            task, profile.teachers, view, videos, seed=seed, device=run.where, keep=keep
        )
        state = {f"task.{k}": v for k, v in head.state_dict().items()}
        state |= {f"pretrained.{k}": v for k, v in backbone.state_dict().items()}
        row |= {"pretext": head.metric, "pretext_score": history[-1][head.metric]}
    model, readout = fit_teacher(backbone, videos, profile.teachers, view, seed=seed, folder=folder)
    if not distributed.first():
        return
    test, labelled = videos.rows("test"), videos.rows("train")
    logits, truth = readout.at("logits", test), videos.labels[test]
    out_of_fold = accuracy(readout.at("logits", labelled), videos.labels[labelled])
    row |= {"accuracy": accuracy(logits, truth), "out_of_fold": out_of_fold}
    probs = torch.softmax(logits / readout.temperature, 1)
    row["calibration_error"] = calibration_error(probs, truth)
    state |= {f"model.{k}": v for k, v in model.state_dict().items()}
    save_tensors(folder / "teacher.safetensors", state)
    _finish(folder, history, row)


def learn_graphs(run: Run, seed: int, shuffled: bool) -> None:
    """Build both graphs and learn their edges; on one rank, since sharing would take longer."""
    if not distributed.first():
        return
    folder, videos, cfg = run.graphs_folder(seed, shuffled), _videos(run), run.profile.distillation
    bank = run.bank(seed, videos, shuffled)
    torch.manual_seed(seed)  # adapters are drawn, though students draw theirs anew
    dim = build_student(cfg.student, 1).backbone.dim
    logits, representation = build_graphs(bank, videos.training_rows, cfg, dim)
    edges = learn_edges(bank, logits, representation, cfg.edges, seed=seed)
    save_graphs(folder / "graphs.safetensors", Graphs(logits, representation, edges))
    mean = edges.teachers[-1][videos.training_rows].mean(0).tolist()
    row = {
        "teachers": dict(zip(bank.teachers, mean, strict=True)),
        "pairs": dict(zip(representation.names, edges.pairs[-1].tolist(), strict=True)),
    }
    save_json(folder / "result.json", row)


def train_student(run: Run, seed: int, name: str, bar: bool = False) -> None:
    """Train and test one student."""
    folder, videos, profile = run.student_folder(seed, name), _videos(run), run.profile
    method = find_method(name, profile.teachers.tasks)
    bank, graphs = run.bank(seed, videos, method.shuffled), run.graphs(seed, method.shuffled)
    keep = run.keep(folder / "student.ckpt", f"{name}, seed {seed}" if bar else None)
    cfg, view = profile.distillation, profile.view
    student, history = distill(
        name, bank, graphs, videos, view, cfg, seed=seed, device=run.where, keep=keep
    )
    every = torch.arange(len(videos.splits))
    logits, features = (x.mean(1) for x in predict(student.classifier, videos, every, view))
    if not distributed.first():
        return
    save_tensors(folder / "student.safetensors", student.classifier.state_dict())
    if list(student.method.parameters()):
        save_tensors(folder / "method.safetensors", student.method.state_dict())
    save_tensors(folder / "outputs.safetensors", {"logits": logits, "features": features})
    test = videos.rows("test")
    row: dict[str, Any] = {"seed": seed, "kind": "student", "name": name}
    row |= {"label": method.label or name, "colour": method.colour, "marker": method.marker}
    row |= {"headline": method.headline, "shuffled": method.shuffled}
    row["accuracy"] = accuracy(logits[test], videos.labels[test])
    _finish(folder, history, row | student.method.notes)


def _finish(folder: Path, history: list[dict[str, float]], row: dict[str, Any]) -> None:
    """Write a step's history and, last, its result; its checkpoints are not needed any more."""
    save_jsonl(folder / "history.jsonl", history)
    save_json(folder / "result.json", row)
    for checkpoint in folder.glob("*.ckpt"):
        checkpoint.unlink(missing_ok=True)


def _left(
    jobs: list[tuple[Any, ...]], folder: Callable[..., Path], done: Callable[[Path], bool]
) -> list[tuple[Any, ...]]:
    """Return the jobs that are not done; processes that train together agree on them."""
    left = [job for job in jobs if not done(folder(*job))]
    for job in left:  # with a result, its checkpoint would be taken for a left-over
        (folder(*job) / "result.json").unlink(missing_ok=True)
    return distributed.agreed(left)


def _teacher_is_done(folder: Path) -> bool:
    return is_done(folder, *TEACHER_FILES) and is_read_out(folder / "bank")


def _begin(run: Run, workers: Workers) -> VideoSet:
    """Claim the folder, read the videos, sweep, and note what the run is made on."""
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
    source = {"data": run.data and run.data.resolve(), "cache": run.cache.resolve()}
    save_json(run.folder / "source.json", source)
    with atomic(run.folder / "skipped.csv") as temporary, open(temporary, "w", newline="") as file:
        csv.writer(file).writerows([("path", "reason"), *videos.skipped])
    for path, reason in videos.skipped:
        tqdm.write(f"skipped {path}: {reason}")
    return videos


def execute(run: Run, *, workers: Workers) -> pd.DataFrame:
    """Do what is left of a run; return its results.

    Args:
        run: what and where.
        workers: processes, or a cluster, that share whole trainings. Where this process is one of
            several that train together, they do one training after another instead.

    Raises:
        UserError: see ``claim_folder`` and ``gdviz.data``.
    """
    profile, seeds = run.profile, run.profile.seeds
    check_profile(profile)
    torch.set_flush_denormal(True)  # as workers do: unlikely classes have denormal potentials
    videos = _begin(run, workers) if distributed.first() else None
    workers = workers if distributed.world() == 1 else 1
    bars = workers == 1  # a bar of epochs below the bar of jobs

    def do(work: Callable[..., None], jobs: list[tuple[Any, ...]], title: str) -> None:
        over_processes(work, jobs, workers, title=title if distributed.first() else None)

    teachers = [(seed, task) for seed in seeds for task in profile.teachers.tasks]
    left = _left(teachers, run.teacher_folder, _teacher_is_done)
    do(partial(train_teacher, run, bar=bars), left, "teachers")

    methods = [find_method(name, profile.teachers.tasks) for name in profile.methods]
    controls = sorted({False, *(method.shuffled for method in methods)})
    graphs = [(seed, shuffled) for seed in seeds for shuffled in controls]
    left = _left(graphs, run.graphs_folder, lambda f: is_done(f, "graphs.safetensors"))
    do(partial(learn_graphs, run), left, "graphs")

    students = [(seed, name) for seed in seeds for name in profile.methods]
    left = _left(students, run.student_folder, lambda f: is_done(f, *STUDENT_FILES))
    do(partial(train_student, run, bar=bars), left, "students")

    results = distributed.agreed(run.results())
    if videos:
        save_results(run.folder / "results.csv", results)
        if not (run.folder / "summary.json").exists():
            save_json(run.folder / "summary.json", summarise(run, videos))
    return results


def summarise(run: Run, videos: VideoSet) -> dict[str, Any]:
    """Return sizes and speed of teachers and student, and the baselines that see no motion."""
    profile, classes = run.profile, len(videos.label_names)
    teachers = {
        task: footprint(
            build_teacher(task, profile.teachers, classes).to(run.where), profile.view_of(task)
        )
        for task in profile.teachers.tasks
    }
    student = build_student(profile.distillation.student, classes).to(run.where)
    cost = footprint(student, profile.view)
    parts = {split: len(videos.rows(split)) for split in ("train", "unlabelled", "test")}
    return {
        "data": {
            "name": videos.name,
            "classes": videos.label_names,
            "videos": parts,
            "skipped": len(videos.skipped),
        },
        "baselines": shortcut_baselines(videos),
        "teacher": teachers,
        "student": cost,
        "ratio": {key: sum(t[key] for t in teachers.values()) / cost[key] for key in cost},
    }

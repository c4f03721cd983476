"""The steps of a run: teachers, graphs, students. Each is done once, and resumes where it stood."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable, Sequence
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
from gdviz.experiment.bench import footprints
from gdviz.experiment.checks import check_home, check_profile
from gdviz.experiment.folder import Run, Workers, claim_folder, environment, is_done, save_results
from gdviz.experiment.metrics import (
    accuracy,
    at_home,
    audit,
    calibration_error,
    scores,
    shortcut_baselines,
    target_accuracy,
)
from gdviz.student.distill import distill
from gdviz.student.edges import Graphs, build_graphs, fixed_edges, learn_edges, save_graphs
from gdviz.student.family import build_student
from gdviz.student.methods import Method, find_method
from gdviz.teachers.bank import as_cases, is_read_out, predict
from gdviz.teachers.fit import build_teacher, fit_teacher, pretrain
from gdviz.teachers.own import OwnBackbone, find_source

FILES = {  # of a step, beside its result, that later steps read
    "teachers": ("teacher.safetensors", "history.jsonl"),
    "graphs": ("graphs.safetensors",),
    "students": ("student.safetensors", "outputs.safetensors", "history.jsonl"),
}


FIXED = ("uniform", "truth")  # edges that are not learned


@cache
def _videos(run: Run) -> VideoSet:
    """Open the set once a process: it is memory-mapped, but its index takes a moment to read."""
    return run.videos()


_home = cache(Run.home)


def train_teacher(run: Run, seed: int, task: str, bar: bool = False) -> None:
    """Pre-train, fit and read out one teacher; a network of your own is not pre-trained."""
    folder, videos, cfg = run.teacher_folder(seed, task), _videos(run), run.profile.teachers
    view, backbone, home = run.profile.view_of(task), find_source(task), _home(run, task)
    row: dict[str, Any] = {"seed": seed, "kind": "teacher", "name": task, "label": task}
    row |= {"colour": 4, "marker": "s", "headline": False, "shuffled": False}
    history, state = [], {}
    if isinstance(backbone, OwnBackbone):
        backbone = backbone.to(run.where)
    else:
        keep = run.keep(folder / "pretrain.ckpt", f"{task}, seed {seed}" if bar else None)
        backbone, head, history = pretrain(
            task, cfg, view, home or videos, seed=seed, device=run.where, keep=keep
        )
        state = {f"task.{k}": v for k, v in head.state_dict().items()}
        state |= {f"pretrained.{k}": v for k, v in backbone.state_dict().items()}
        metric = str(head.metric)
        row |= {"pretext": metric, "pretext_score": history[-1][metric]}
    model, readout = fit_teacher(backbone, videos, cfg, view, seed=seed, folder=folder, home=home)
    if not distributed.first():
        return
    test, labelled = videos.rows("test"), videos.rows("train")
    logits, truth = readout.at("logits", test), videos.labels[test]
    row |= scores(logits, truth)
    row["out_of_fold"] = accuracy(readout.at("logits", labelled), videos.labels[labelled])
    cases, answers = as_cases(logits, truth)
    probs = torch.softmax(cases / readout.temperature, 1)
    row["calibration_error"] = calibration_error(probs, answers)
    every = torch.arange(len(videos.splits))
    row |= audit(videos, readout.at("logits", every), readout.at("features", every))
    state |= {f"model.{k}": v for k, v in model.state_dict().items()}
    save_tensors(folder / "teacher.safetensors", state)
    _finish(folder, history, row)


def learn_graphs(run: Run, seed: int, edges: str) -> None:
    """Build both graphs and their edges; on one rank, since sharing would take longer."""
    if not distributed.first():
        return
    folder, videos, cfg = run.graphs_folder(seed, edges), _videos(run), run.profile.distillation
    bank, rows = run.bank(seed, videos, edges == "shuffled"), videos.training_rows
    torch.manual_seed(seed)  # adapters are drawn, though students draw theirs anew
    dim = build_student(cfg.student, 1).backbone.dim
    logits, representation = build_graphs(bank, rows, cfg, dim)
    truth, equal = at_home(bank.teachers, videos), 1 / len(bank.teachers)
    truth, cases = truth.repeat_interleave(bank.cases_each, 0), bank.cases(rows)
    if edges in FIXED:
        share = 0.98 if edges == "truth" else 0.0  # as in routing, every teacher stays heard
        weights = share * truth + (1 - share) * equal
        found = fixed_edges(bank, logits, weights, len(representation.pairs))
    else:
        found = learn_edges(bank, logits, representation, cfg.edges, seed=seed, rows=rows)
    save_graphs(folder / "graphs.safetensors", Graphs(logits, representation, found))
    weights = found.teachers[-1][cases]
    pairs = dict(zip(representation.names, found.pairs[-1].tolist(), strict=True))
    teachers = dict(zip(bank.teachers, weights.mean(0).tolist(), strict=True))
    row: dict[str, Any] = {"teachers": teachers, "pairs": pairs}
    if edges != "shuffled":
        row["target"] = target_accuracy(videos, bank.probs(), found.teachers[-1])
        row["at_home"] = float((weights * truth[cases]).sum(1).mean())
    save_json(folder / "result.json", row)


def _edges_of(method: type[Method]) -> str:
    """Return the kind of edges a method learns under; shuffled teachers have their own kind."""
    return "shuffled" if method.shuffled else method.edges


def train_student(run: Run, seed: int, name: str, bar: bool = False) -> None:
    """Train and test one student."""
    folder, videos, cfg = run.student_folder(seed, name), _videos(run), run.profile.distillation
    method, view = find_method(name, run.profile.teachers.tasks), run.profile.view
    bank, graphs = run.bank(seed, videos, method.shuffled), run.graphs(seed, _edges_of(method))
    keep = run.keep(folder / "student.ckpt", f"{name}, seed {seed}" if bar else None)
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
    row |= scores(logits[test], videos.labels[test])
    row |= audit(videos, logits, features)
    _finish(folder, history, row | student.method.notes)


def _finish(folder: Path, history: list[dict[str, float]], row: dict[str, Any]) -> None:
    """Write a step's history and, last, its result; its checkpoints are not needed any more."""
    save_jsonl(folder / "history.jsonl", history)
    save_json(folder / "result.json", row)
    for checkpoint in folder.glob("*.ckpt"):
        checkpoint.unlink(missing_ok=True)


def begin(run: Run, workers: Workers) -> VideoSet:
    """Claim the folder, read the videos, sweep, and note what the run is made on."""
    claim_folder(run)
    videos = run.videos(workers)
    claim_folder(run, videos)
    for stale in run.folder.rglob(".*.part"):  # what a killed process was writing
        stale.unlink(missing_ok=True)
    for stale in run.folder.rglob("*.ckpt"):  # of what was finished just before a kill
        if (stale.parent / "result.json").exists():
            stale.unlink(missing_ok=True)
    for task in run.profile.teachers.tasks:
        if home := run.home(task, workers):
            check_home(task, home, videos)
    save_json(run.folder / "environment.json", environment())
    source = {"data": run.data and run.data.resolve(), "cache": run.cache.resolve()}
    save_json(run.folder / "source.json", source)
    with (
        atomic(run.folder / "skipped.csv") as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as file,
    ):
        csv.writer(file).writerows([("path", "reason"), *videos.skipped])
    if len(videos.skipped) <= 1000:
        lines = [f"skipped {path}: {reason}" for path, reason in videos.skipped]
    else:  # by reason, whatever its numbers
        alike = Counter(re.sub(r"\d+", "N", reason) for _, reason in videos.skipped)
        lines = [f"skipped {count} videos: {reason}" for reason, count in alike.most_common(20)]
        lines.append(f"all {len(videos.skipped)} are listed in {run.folder / 'skipped.csv'}")
    tqdm.write("\n".join(lines), end="\n" if lines else "")
    return videos


def execute(
    run: Run, *, workers: Workers, begun: Callable[[], None] = lambda: None
) -> pd.DataFrame:
    """Do what is left of a run; return its results. ``begun`` is called when it has its folder.

    Workers (processes, or a cluster) share whole trainings; processes that ``torchrun`` started
    do one training after another together. Raise UserError for settings, a folder or videos that
    cannot work.
    """
    check_profile(run.profile)
    torch.set_flush_denormal(True)  # as workers do: unlikely classes have denormal potentials
    videos = begin(run, workers) if distributed.first() else None
    begun()
    workers = workers if distributed.world() == 1 else 1
    bar = workers == 1  # a bar of epochs below the bar of jobs
    tasks, methods = run.profile.teachers.tasks, run.profile.methods
    kinds = sorted({"learned", *(_edges_of(find_method(name, tasks)) for name in methods)})
    steps: list[tuple[str, Callable[..., None], Callable[..., Path], Sequence[str]]] = [
        ("teachers", partial(train_teacher, run, bar=bar), run.teacher_folder, tasks),
        ("graphs", partial(learn_graphs, run), run.graphs_folder, kinds),
        ("students", partial(train_student, run, bar=bar), run.student_folder, methods),
    ]
    for title, work, folder, names in steps:
        left = []
        for job in ((seed, name) for seed in run.profile.seeds for name in names):
            done = is_done(folder(*job), *FILES[title])
            if not done or (title == "teachers" and not is_read_out(folder(*job) / "bank")):
                left.append(job)
                # With a result, its checkpoint would be taken for a left-over.
                (folder(*job) / "result.json").unlink(missing_ok=True)
        left = distributed.agreed(left)  # by processes that train together
        over_processes(work, left, workers, title=title if distributed.first() else None)
    results = distributed.agreed(run.results())
    if videos:
        save_results(run.folder / "results.csv", results)
        if not (run.folder / "summary.json").exists():
            save_json(run.folder / "summary.json", summarise(run, videos))
    return results


def summarise(run: Run, videos: VideoSet) -> dict[str, Any]:
    """Return sizes and speed of teachers and student, and the baselines that see no motion.

    The ratio of latencies is the median over rounds, in which models take turns.
    """
    profile, classes, tasks = run.profile, len(videos.label_names), run.profile.teachers.tasks
    nets = [build_teacher(task, profile.teachers, classes) for task in tasks]
    nets.append(build_student(profile.distillation.student, classes))
    views = [*map(profile.view_of, tasks), profile.view]
    models = zip([net.to(run.where) for net in nets], views, strict=True)
    (*teachers, student), times = footprints(list(models))
    ratio: dict[str, Any] = {key: sum(t[key] for t in teachers) / student[key] for key in student}
    quartiles = (times[:, :-1].sum(1) / times[:, -1]).quantile(torch.tensor([0.25, 0.5, 0.75]))
    low, ratio["latency_ms"], high = quartiles.tolist()
    parts = {split: len(videos.rows(split)) for split in ("train", "unlabelled", "test")}
    data = {"name": videos.name, "classes": videos.label_names, "videos": parts}
    return {
        "data": data | {"skipped": len(videos.skipped)},
        "baselines": shortcut_baselines(videos),
        "teacher": dict(zip(tasks, teachers, strict=True)),
        "student": student,
        "ratio": ratio | {"latency_ms_quartiles": [low, high]},
    }

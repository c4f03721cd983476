"""Make ``data/example`` anew from a finished run on the embedded data.

    python tools/pack_example.py RUN [data/example]

Kept are the results of all seeds, and of the first seed the rows of some videos; of each teacher
the means over clips.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from gdviz.core.files import (
    UserError,
    atomic,
    file_sha256,
    load_json,
    load_jsonl,
    load_tensors,
    save_json,
    save_jsonl,
    save_tensors,
)
from gdviz.data.motion import CLASSES, make_motion, read_index
from gdviz.data.videos import VideoSet
from gdviz.experiment.folder import Run, open_run, save_results
from gdviz.student.edges import save_graphs
from gdviz.teachers.bank import Readout, save_readout

KEPT = {"train": 240, "unlabelled": 120, "test": 300}  # videos of each part, at most


def _half(x: Tensor) -> Tensor:
    return x.half() if x.is_floating_point() else x


def _pack_teachers(run: Run, out: Run, videos: VideoSet, rows: Tensor, seed: int) -> None:
    bank = run.bank(seed, videos)
    for task, readout in zip(bank.teachers, bank.readouts, strict=True):
        folder = out.teacher_folder(seed, task)
        parts = {name: _half(readout.at(name, rows)) for name in ("logits", "features", "held")}
        fold, temperature = readout.fold[rows], readout.temperature
        thin = Readout.from_means(**parts, fold=fold, temperature=temperature)
        save_readout(folder / "bank", thin, videos, out.profile.view_of(task), "thinned")
        source = run.teacher_folder(seed, task)
        save_jsonl(folder / "history.jsonl", load_jsonl(source / "history.jsonl"))


def _pack_students(run: Run, out: Run, rows: Tensor, seed: int) -> None:
    """Write what students say; features of the first and the headline's alone."""
    headline = set(run.results().query("headline")["name"])
    for name in run.profile.methods:
        source, target = run.student_folder(seed, name), out.student_folder(seed, name)
        tensors = load_tensors(source / "outputs.safetensors")
        if name not in (run.profile.methods[0], *headline):
            tensors.pop("features")
        thin = {k: _half(x[rows]) for k, x in tensors.items()}
        save_tensors(target / "outputs.safetensors", thin)
        save_jsonl(target / "history.jsonl", load_jsonl(source / "history.jsonl"))
        if name in headline and (source / "method.safetensors").exists():
            shutil.copy(source / "method.safetensors", target)


def _pack_graphs(run: Run, out: Run, rows: Tensor, seed: int) -> None:
    graphs = run.graphs(seed)
    edges = graphs.edges
    thin = replace(edges, teachers=edges.teachers[:, rows], consensus=edges.consensus[:, rows])
    folder = out.graphs_folder(seed)
    save_graphs(folder / "graphs.safetensors", replace(graphs, edges=thin))
    save_json(folder / "result.json", load_json(run.graphs_folder(seed) / "result.json"))


def _pack_settings(run: Run, out: Run) -> None:
    """Write what is said of the run as a whole, and the results of all seeds."""
    config = load_json(run.folder / "config.json") | {"profile": out.profile}
    save_json(out.folder / "config.json", config)
    save_json(out.folder / "source.json", {"data": None, "cache": "data"})
    for name in ("summary.json", "environment.json"):
        save_json(out.folder / name, load_json(run.folder / name))
    for result in run.folder.glob("seed*/*/*/result.json"):
        save_json(out.folder / result.relative_to(run.folder), load_json(result))
    save_results(out.folder / "results.csv", run.results())


def _pack_videos(run: Run, out: Run, videos: VideoSet, rows: Tensor) -> None:
    """Write what videos are drawn from, and the files of a few labelled ones."""
    home = make_motion(run.cache, run.profile.motion)
    every = read_index(home)
    index = [every[i] for i in rows]
    about = {
        "name": videos.name,
        "fingerprint": videos.fingerprint,
        "label_names": videos.label_names,
        "labels": videos.labels[rows].tolist(),
        "splits": [row["split"] for row in index],
        "groups": [row["group"] for row in index],
        "motions": [row["motion"] for row in index],
        "seeds": [int(row["seed"]) for row in index],
    }
    save_json(out.folder / "index.json", about)
    for row in [row for row in index if row["split"] == "train"][: 3 * len(CLASSES)]:
        folder = out.folder / "videos" / row["label"]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(home / row["path"], folder)


def pack(run: Run, folder: Path) -> None:
    """Write the example.

    Raises:
        UserError: the run used other data, or skipped videos; ``folder`` holds something else.
    """
    holds_one = (folder / "SHA256SUMS").exists() and folder.resolve() != run.folder.resolve()
    if folder.exists() and not holds_one:
        raise UserError(f"{folder}: is there and holds no other example; choose another folder")
    videos, seed = run.videos(), run.profile.seeds[0]
    if run.data is not None or videos.skipped:
        raise UserError(f"{run.folder}: the example is made of a run on the embedded data")
    rows = torch.cat([videos.rows(part)[:count] for part, count in KEPT.items()])
    # Means over clips are kept as the one clip of a video.
    view = replace(run.profile.view, clips=1)
    distillation = replace(run.profile.distillation, target="video")
    out = Run(replace(run.profile, view=view, distillation=distillation), folder)
    shutil.rmtree(folder, ignore_errors=True)
    _pack_settings(run, out)
    _pack_videos(run, out, videos, rows)
    _pack_teachers(run, out, videos, rows, seed)
    _pack_students(run, out, rows, seed)
    _pack_graphs(run, out, rows, seed)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    lines = [f"{file_sha256(f)}  {f.relative_to(folder).as_posix()}\n" for f in files]
    with atomic(folder / "SHA256SUMS") as temporary:
        temporary.write_text("".join(lines))


if __name__ == "__main__":
    pack(open_run(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else "data/example"))

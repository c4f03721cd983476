"""``data/example``: a finished run, thinned to about 1 MB, so that notebooks open without a run.

``python -m gdviz.show.bundled RUN [data/example]`` makes it again from a finished run on the embedded data.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gdviz.config import Profile
from gdviz.core.files import (
    UserError,
    atomic,
    file_sha256,
    from_plain,
    load_json,
    load_tensors,
    save_json,
    save_jsonl,
    save_tensors,
)
from gdviz.data.motion import CLASSES, encode, make_motion, read_index, render
from gdviz.data.reading import read_square
from gdviz.data.videos import VideoSet
from gdviz.experiment.steps import Run, open_run
from gdviz.student.edges import Edges
from gdviz.teachers.bank import Knowledge

KEPT = {"train": 240, "unlabelled": 120, "test": 300}  # videos of each part, at most
WITH_FEATURES = ("labels", "both-graphs")  # students whose features are kept, too


def load_jsonl(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@dataclass
class _Drawn:
    """``pixels`` of a VideoSet whose videos are drawn, compressed and read as the run's were, when first asked for."""

    profile: Profile
    motions: list[str]
    seeds: list[int]
    done: dict[int, np.ndarray] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        view = self.profile.view
        return (len(self.motions), view.frames, view.size, view.size, 3)

    def _draw(self, row: int) -> np.ndarray:
        if row not in self.done:
            cfg, view = self.profile.motion, self.profile.view
            with tempfile.TemporaryDirectory() as folder:
                frames = render(
                    CLASSES.index(self.motions[row]),
                    self.seeds[row],
                    size=cfg.size,
                    frames=cfg.frames,
                )
                encode(frames, Path(folder) / "video.mp4")
                self.done[row] = read_square(Path(folder) / "video.mp4", view.frames, view.size)[
                    0
                ].numpy()
        return self.done[row]

    def __getitem__(self, key: tuple[int, slice]) -> np.ndarray:
        return self._draw(key[0])[key[1]]


@dataclass(frozen=True)
class Example(Run):
    """A finished run, thinned for the repository: one seed, half precision, some of the videos. Same reading methods."""

    def videos(self, workers: int | str = 1) -> VideoSet:
        index = load_json(self.folder / "index.json")
        pixels, labels = (
            _Drawn(self.profile, index.pop("motions"), index.pop("seeds")),
            torch.tensor(index.pop("labels")),
        )
        fields = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in index.items()
        }
        return VideoSet(
            pixels=pixels, labels=labels, metadata=torch.zeros(len(labels), 5), skipped=(), **fields
        )

    def knowledge(self, seed: int, videos: VideoSet) -> Knowledge:
        half = super().knowledge(seed, videos)
        return replace(half, logits=half.logits.float(), fold=half.fold.long(), **{
            name: [x.float() for x in getattr(half, name)] for name in ("features", "held_features")
        })  # fmt: skip

    def edges(self, seed: int, *, shuffled: bool = False) -> Edges:
        half = vars(super().edges(seed, shuffled=shuffled))
        return Edges(
            **{name: x.float() / x.float().sum(-1, keepdim=True) for name, x in half.items()}
        )

    def metrics(self) -> list[dict[str, Any]]:
        return load_jsonl(self.folder / "metrics.jsonl")


def open_example(folder: Path) -> Example:
    """Opens ``data/example``.

    Raises:
        UserError: a file is not the one that was packed.
    """
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        if not (folder / name).exists() or file_sha256(folder / name) != digest:
            raise UserError(
                f"{folder / name} is damaged or gone; restore it, for instance: git checkout data/example"
            )
    profile = from_plain(Profile, load_json(folder / "config.json")["profile"])
    by_video = replace(
        profile.distillation, target="video"
    )  # what teachers say of single clips is not packed
    return Example(replace(profile, distillation=by_video), folder)


def _thin(x: Tensor) -> Tensor:
    return x.half() if x.is_floating_point() else x.short()


def pack_example(run: Run, out: Path) -> None:
    """Writes ``data/example`` from a finished run on the embedded data: first seed, about 1 MB.

    Raises:
        UserError: the run used other data, or skipped videos.
    """
    videos, seed = run.videos(), run.profile.seeds[0]
    if run.data is not None or videos.skipped:
        raise UserError(
            f"{run.folder}: the example is made of a run on the embedded data, all videos readable"
        )
    rows = torch.cat([videos.rows(part)[:count] for part, count in KEPT.items()])
    home = make_motion(run.cache, run.profile.motion)
    index = [read_index(home)[i] for i in rows]
    shutil.rmtree(out, ignore_errors=True)
    for name in ("config.json", "summary.json", "environment.json"):
        save_json(out / name, load_json(run.folder / name))
    save_jsonl(out / "metrics.jsonl", run.metrics())
    save_json(out / "index.json", {
        "name": videos.name, "fingerprint": videos.fingerprint, "label_names": videos.label_names, "labels": videos.labels[rows].tolist(),
        "splits": [row["split"] for row in index], "groups": [row["group"] for row in index],
        "motions": [row["motion"] for row in index], "seeds": [int(row["seed"]) for row in index],
    })  # fmt: skip
    teachers = [run.teacher_folder(seed, task) for task in run.profile.teachers.tasks]
    for source in (
        *teachers,
        *(run.student_folder(seed, method) for method in run.profile.methods),
    ):
        target, tensors = (
            out / source.relative_to(run.folder),
            load_tensors(source / "outputs.safetensors"),
        )
        if source.parent.name == "students" and source.name not in WITH_FEATURES:
            tensors.pop("features")
        save_tensors(
            target / "outputs.safetensors",
            {k: _thin(x[rows] if x.ndim else x) for k, x in tensors.items()},
        )
        save_jsonl(target / "history.jsonl", load_jsonl(source / "history.jsonl"))
    edges = {k: _thin(x if k == "pairs" else x[:, rows]) for k, x in vars(run.edges(seed)).items()}
    save_tensors(out / f"seed{seed}/edges/edges.safetensors", edges)
    for row in [row for row in index if row["split"] == "train"][: 3 * len(CLASSES)]:
        (out / "videos" / row["label"]).mkdir(parents=True, exist_ok=True)
        shutil.copy(home / row["path"], out / "videos" / row["label"])
    files = sorted(file for file in out.rglob("*") if file.is_file())
    with atomic(out / "SHA256SUMS") as temporary:
        temporary.write_text(
            "".join(f"{file_sha256(file)}  {file.relative_to(out).as_posix()}\n" for file in files)
        )


if __name__ == "__main__":
    pack_example(open_run(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else "data/example"))

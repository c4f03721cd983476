"""A student's step with what four teachers said kept in files, next to one that asks the teachers
anew: time, and losses."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gdviz.config import Distillation, Edges, Schedule, View
from gdviz.data.clips import clip_places, to_float
from gdviz.data.videos import VideoSet
from gdviz.student.distill import distill
from gdviz.student.edges import Graphs, build_graphs, learn_edges
from gdviz.teachers.backbones import Classifier, build_backbone
from gdviz.teachers.bank import Bank, gather, open_readout, read_out

VIEW = View(size=112, frames=32, length=16, stride=1, clips=3)


@dataclass(frozen=True)
class Live(Bank):
    """A bank that asks the teachers anew."""

    models: tuple[Classifier, ...] = ()
    videos: VideoSet | None = None

    def ask(self, rows: Tensor, clips: Tensor) -> tuple[Tensor, list[Tensor]]:
        asked = torch.stack([rows, clips])
        if not torch.equal(asked, _asked[0]):  # once a step, though both graphs ask
            place = torch.tensor(clip_places(VIEW.clips))[clips]
            frames = self.videos.clips(rows, VIEW.length, VIEW.stride, place=place)
            with torch.no_grad():
                found = [model(to_float(frames).transpose(1, 2)) for model in self.models]
            logits = torch.stack([z for z, _ in found], 1)
            temperatures = torch.tensor([r.temperature for r in self.readouts])
            _asked[:] = asked, (logits / temperatures[:, None], [h for _, h in found])
        return _asked[1]

    def logits_at(self, rows: Tensor, clips: Tensor | None = None) -> Tensor:
        return super().logits_at(rows) if clips is None else self.ask(rows, clips)[0]

    def features_at(
        self, rows: Tensor, clips: Tensor | None = None, *, held: bool = False
    ) -> list[Tensor]:
        if clips is None:
            return super().features_at(rows, held=held)
        return self.ask(rows, clips)[1]


_asked: list = [torch.empty(0), None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--batch", type=int, default=6, help="clips a step, besides two labelled ones"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--student", default="tiny32n")
    parser.add_argument(
        "--classes",
        type=int,
        default=12,
        help="of two videos each, which four teachers read out first",
    )
    args = parser.parse_args()
    classes, count = args.classes, 2 * args.classes
    torch.set_num_threads(args.threads)
    rng = np.random.default_rng(0)
    pixels = rng.integers(256, size=(count, VIEW.frames, 112, 112, 3), dtype=np.uint8)
    labels, splits = (torch.arange(count) % classes).tolist(), ["train"] * count
    videos = VideoSet.from_arrays(pixels, labels, splits)
    torch.manual_seed(0)
    models = tuple(Classifier(build_backbone("r3d_18"), classes).eval() for _ in range(4))
    teachers, fold = ("a", "b", "c", "d"), torch.arange(count) // classes
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        for name, model in zip(teachers, models, strict=True):
            read_out([model], fold, videos, VIEW, Path(folder) / name)
        took = time.perf_counter() - began
        print(f"reading {count} videos out, {VIEW.clips} clips each, four teachers: {took:.0f} s")
        opened = {name: open_readout(Path(folder) / name, videos, VIEW) for name in teachers}
        cached = gather(opened, videos)
        live = Live(**vars(cached), models=models, videos=videos)
        schedule = Schedule(epochs=1, batch=args.batch, min_steps=1)
        some = replace(videos, splits=("train",) * 6 + ("test",) * (count - 6))
        edges = Edges(refreshes=1)
        cfg = Distillation(args.student, schedule, 2, target="clip", edges=edges)
        both = build_graphs(cached, torch.arange(count), cfg, 128)
        graphs = Graphs(*both, learn_edges(cached, *both, cfg.edges, seed=0))
        ratios, times = [], {"live": [], "cached": []}
        for seed in range(args.rounds):
            losses = {}
            for name, bank in (("cached", cached), ("live", live)):
                began = time.perf_counter()
                history = distill("both-graphs", bank, graphs, some, VIEW, cfg, seed=seed)[1]
                times[name].append(time.perf_counter() - began)
                losses[name] = {key: history[-1][key] for key in ("loss", "logits", "repr")}
            last = {name: seconds[-1] for name, seconds in times.items()}
            ratios.append(last["live"] / last["cached"])
            print(f"step {seed}: {last} s, {ratios[-1]:.1f}x; losses {losses}", flush=True)
    median, clips = statistics.median(ratios), args.batch + 2
    spread = f"{median:.1f}x ({min(ratios):.1f} to {max(ratios):.1f})"
    print(f"{args.threads} threads, {clips} clips of 16x112x112 a step: {spread}")


if __name__ == "__main__":
    main()

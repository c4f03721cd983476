"""A student's step with what four teachers said kept in files, next to one that asks the teachers anew: time, and losses."""

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
from gdviz.student.edges import learn_edges
from gdviz.teachers.backbones import Classifier, build_backbone
from gdviz.teachers.bank import Knowledge, build_graphs, gather
from gdviz.teachers.fit import TeacherOutputs
from gdviz.teachers.readout import open_clips, predict, read_out, stamp_of

VIEW = View(size=112, frames=32, length=16, stride=1, clips=3)


@dataclass(frozen=True)
class Live(Knowledge):
    """Asks the teachers."""

    models: tuple[Classifier, ...] = ()
    videos: VideoSet | None = None

    def ask(self, rows: Tensor, clips: Tensor) -> tuple[Tensor, list[Tensor]]:
        if not torch.equal(
            torch.stack([rows, clips]), _asked[0]
        ):  # once a step, though both graphs ask
            frames = self.videos.clips(
                rows, VIEW.length, VIEW.stride, place=torch.tensor(clip_places(VIEW.clips))[clips]
            )
            with torch.no_grad():
                said = [model(to_float(frames).transpose(1, 2)) for model in self.models]
            _asked[:] = (
                torch.stack([rows, clips]),
                (torch.stack([z for z, _ in said], 1), [h for _, h in said]),
            )
        return _asked[1]

    def said(self, rows: Tensor, clips: Tensor | None = None) -> Tensor:
        return super().said(rows) if clips is None else self.ask(rows, clips)[0]

    def shown(
        self, rows: Tensor, clips: Tensor | None = None, *, held: bool = False
    ) -> list[Tensor]:
        return super().shown(rows, held=held) if clips is None else self.ask(rows, clips)[1]


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
    labels, splits = torch.arange(count) % classes, ("train",) * (count)
    names, groups = tuple(f"c{i:02d}" for i in range(classes)), tuple(map(str, range(count)))
    videos = VideoSet(
        "random", "random", pixels, names, labels, splits, groups, torch.zeros(count, 5), ()
    )
    torch.manual_seed(0)
    models = tuple(Classifier(build_backbone("r3d_18"), classes).eval() for _ in range(4))
    teachers = ("order", "coherence", "registration", "prediction")
    with tempfile.TemporaryDirectory() as folder:
        outputs, began = {}, time.perf_counter()
        for name, model in zip(teachers, models, strict=True):
            say = lambda rows, model=model: dict(  # noqa: E731
                zip(
                    ("logits", "features"),
                    predict(model, videos, rows, VIEW, batch=6, each=True),
                    strict=True,
                )
            )
            kept = read_out(
                say, videos, VIEW, Path(folder) / name, stamp_of([model], videos, VIEW), name
            )
            fold, features = torch.arange(count) // classes, kept.mean("features")
            outputs[name] = TeacherOutputs(
                kept.mean("logits"), features, features, fold, torch.ones(())
            )
        print(
            f"reading out {count} videos, {VIEW.clips} clips each, by four teachers: {time.perf_counter() - began:.0f} s"
        )
        cached = gather(
            outputs,
            videos,
            tuple(open_clips(Path(folder) / name, videos, VIEW) for name in teachers),
        )
        live = Live(**vars(cached), models=models, videos=videos)
        schedule, some = (
            Schedule(epochs=1, batch=args.batch, min_steps=1),
            replace(videos, splits=("train",) * 6 + ("test",) * (count - 6)),
        )
        cfg = Distillation(
            args.student, schedule, labelled_batch=2, target="clip", edges=Edges(refreshes=1)
        )
        edges = learn_edges(
            cached, *build_graphs(cached, 1, torch.arange(count), cfg), cfg.edges, seed=0
        )
        ratios, times = [], {"live": [], "cached": []}
        for seed in range(args.rounds):
            losses = {}
            for name, knowledge in (("cached", cached), ("live", live)):
                began = time.perf_counter()
                _, history = distill("both-graphs", knowledge, edges, some, VIEW, cfg, seed=seed)
                times[name].append(time.perf_counter() - began)
                losses[name] = {key: history[-1][key] for key in ("loss", "logits", "repr")}
            ratios.append(times["live"][-1] / times["cached"][-1])
            print(
                f"step {seed}: cached {times['cached'][-1]:.2f} s, live {times['live'][-1]:.2f} s, {ratios[-1]:.1f}x; losses {losses}",
                flush=True,
            )
    median, clips = statistics.median(ratios), args.batch + 2
    print(
        f"{args.threads} threads, {clips} clips of 16x112x112 a step: {median:.1f}x ({min(ratios):.1f} to {max(ratios):.1f})"
    )


if __name__ == "__main__":
    main()

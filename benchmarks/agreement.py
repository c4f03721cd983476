"""How often a student answers the same in int8 as in fp32.

    python -m benchmarks.agreement RUN ...    a finished run each: docs/results/family/int8.csv
    python -m benchmarks.agreement SEED ...   at 16x112x112 (default 0): README.md here

There `light-mm` (light-m, which sees a clip minus its mean frame) learns the embedded motions from
84 labelled videos a class, drawn at 128x128, without any teacher. It is exported, quantised with
512 of these clips, and asked about 100 other videos a class. Videos, student and clips are drawn
anew by each seed.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.nn.functional import cross_entropy

from gdviz.config import MotionData, Schedule, View
from gdviz.core.loop import Bookkeeping, train
from gdviz.data.clips import augment
from gdviz.data.videos import load_motion, some_of
from gdviz.experiment.folder import open_run
from gdviz.experiment.model_folder import clips_of, export
from gdviz.student.export import export_onnx, logits_of, quantise
from gdviz.student.family import build_student

VIEW = View(size=112, frames=16, length=16, stride=1)
DATA = MotionData(labelled=84, unlabelled=0, test=100, size=128, frames=16)
SCHEDULE = Schedule(epochs=20, batch=16, lr=3e-3)


def of_runs(runs: list[str], folder: Path) -> None:
    print("student,draw,parity,agreement")
    for run in map(Path, runs):
        card = export(open_run(run), folder / "student")
        about = card["name"].partition(",")[0], run.name
        print(*about, f"{card['parity']:.1e}", f"{card['agreement']:.3f}", sep=",", flush=True)


def at_112(seed: int, folder: Path) -> None:
    videos = load_motion(replace(DATA, seed=seed), VIEW, Path("data"), workers=os.cpu_count() or 1)
    torch.manual_seed(seed)
    student, rows = build_student("light-mm", len(videos.label_names)), videos.rows("train")

    def step(picked, rng, epoch):
        clips = augment(clips_of(videos, picked, VIEW), rng)
        return cross_entropy(student(clips)[0], videos.labels[picked]), {}

    train(student, step, rows, SCHEDULE, seed=seed, keep=Bookkeeping(progress="light-mm"))
    calibration = [clips_of(videos, part, VIEW) for part in some_of(rows, 512).split(16)]
    export_onnx(student.eval(), calibration[0], folder / "fp32")
    quantise(folder / "fp32", folder / "int8", calibration)
    test = videos.rows("test")

    def said(name):
        clips = (clips_of(videos, part, VIEW) for part in test.split(16))
        return logits_of(folder / name, clips).argmax(1)

    fp32, int8 = said("fp32"), said("int8")
    right = (fp32 == videos.labels[test].numpy()).sum()
    print("light-mm", seed, len(test), right, (fp32 == int8).sum(), sep=",", flush=True)


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        words = sys.argv[1:] or ["0"]
        if all(word.isdecimal() for word in words):
            print("student,seed,clips,right,alike")
            for word in words:
                at_112(int(word), Path(folder))
        else:
            of_runs(words, Path(folder))

"""How often a student answers the same in int8 as in fp32.

    python -m benchmarks.agreement RUN ...   a line a finished run: docs/results/family/int8.csv
    python -m benchmarks.agreement           at 16x112x112, where no run is at hand

There `light-mm` (light-m, which sees a clip minus its mean frame) learns the embedded motions from
84 labelled videos a class, drawn at 128x128, without any teacher. It is exported, quantised with
512 of these clips, and asked about 100 other videos a class.
"""

import sys
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
DATA = MotionData(labelled=84, unlabelled=0, test=100, size=128, frames=16, seed=0)
SCHEDULE = Schedule(epochs=20, batch=16, lr=3e-3)


def of_runs(runs: list[str], folder: Path) -> None:
    print("student,draw,parity,agreement")
    for run in map(Path, runs):
        card = export(open_run(run), folder / "student")
        about = card["name"].partition(",")[0], run.name
        print(*about, f"{card['parity']:.1e}", f"{card['agreement']:.3f}", sep=",", flush=True)


def at_112(folder: Path) -> None:
    videos = load_motion(DATA, VIEW, Path("data"))
    torch.manual_seed(0)
    student, rows = build_student("light-mm", len(videos.label_names)), videos.rows("train")

    def step(picked, rng, epoch):
        clips = augment(clips_of(videos, picked, VIEW), rng)
        return cross_entropy(student(clips)[0], videos.labels[picked]), {}

    train(student, step, rows, SCHEDULE, seed=0, keep=Bookkeeping(progress="light-mm"))
    calibration = [clips_of(videos, part, VIEW) for part in some_of(rows, 512).split(16)]
    export_onnx(student.eval(), calibration[0], folder / "fp32")
    quantise(folder / "fp32", folder / "int8", calibration)
    test = videos.rows("test")

    def said(name):
        clips = (clips_of(videos, part, VIEW) for part in test.split(16))
        return logits_of(folder / name, clips).argmax(1)

    fp32, int8 = said("fp32"), said("int8")
    right = (fp32 == videos.labels[test].numpy()).mean()
    print(f"of {len(test)} clips fp32 is right on {right:.1%}, int8 answers alike on", end=" ")
    print(f"{(fp32 == int8).sum()}")


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        of_runs(sys.argv[1:], Path(folder)) if sys.argv[1:] else at_112(Path(folder))

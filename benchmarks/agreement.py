"""How often int8 answers as fp32 does, at 16x112x112: ``python -m benchmarks.agreement [SEED ...]``

`light-mm` (light-m, which sees a clip minus its mean frame) learns the embedded motions from 84
labelled videos a class, drawn at 128x128, without any teacher; it is exported, quantised with half
of these clips, and asked about 100 other videos a class.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.nn.functional import cross_entropy

from gdviz.config import MotionData, Schedule, View
from gdviz.core.loop import Bookkeeping, train
from gdviz.data.clips import augment, pick_frames, to_float
from gdviz.data.videos import VideoSet, load_motion
from gdviz.student.export import export_onnx, quantise
from gdviz.student.family import build_student

VIEW = View(size=112, frames=16, length=16, stride=1)
SCHEDULE = Schedule(epochs=20, batch=16, lr=3e-3)


def clips_of(videos: VideoSet, rows: torch.Tensor) -> torch.Tensor:
    frames = pick_frames(videos.batch(rows), VIEW.length, VIEW.stride)
    return to_float(frames).transpose(1, 2)


def answers(file: Path, videos: VideoSet, rows: torch.Tensor) -> torch.Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(file)
    each = [session.run(None, {"clips": clips_of(videos, r).numpy()})[0] for r in rows.split(16)]
    return torch.cat([torch.from_numpy(logits) for logits in each])


def main(seed: int, folder: Path) -> None:
    data = MotionData(labelled=84, unlabelled=0, test=100, size=128, frames=16, seed=seed)
    videos = load_motion(data, VIEW, Path("data"))
    torch.manual_seed(seed)
    student, rows = build_student("light-mm", len(videos.label_names)), videos.rows("train")

    def step(picked, rng, epoch):
        clips = augment(clips_of(videos, picked), rng)
        loss = cross_entropy(student(clips)[0], videos.labels[picked])
        return loss, {}

    history = train(
        student, step, rows, SCHEDULE, seed=seed, keep=Bookkeeping(progress=f"light-mm, {seed}")
    )
    calibration = [clips_of(videos, r) for r in rows[::2].split(16)]
    export_onnx(student.eval(), calibration[0], folder / "model.onnx")
    quantise(folder / "model.onnx", folder / "model-int8.onnx", calibration)
    test = videos.rows("test")
    full, small = (answers(folder / f"{n}.onnx", videos, test) for n in ("model", "model-int8"))
    right = (full.argmax(1) == videos.labels[test]).float().mean()
    same = (full.argmax(1) == small.argmax(1)).float().mean()
    print(
        f"seed {seed}: loss {history[-1]['loss']:.3f}; fp32 is right on {right:.1%} of {len(test)}"
    )
    print(f"seed {seed}: int8 answers alike on {same:.1%}", flush=True)


if __name__ == "__main__":
    for seed in map(int, sys.argv[1:] or ("0",)):
        with TemporaryDirectory() as folder:
            main(seed, Path(folder))

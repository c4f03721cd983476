"""What a run holds in memory as its set grows: ``python benchmarks/memory.py [ROWS ...]``

By default 100, 1,000 and 10,000 videos, whose pixels are made as they are asked for. Each count has
a process of its own: reading a teacher out, the baselines that see no motion, and an epoch of a
student. Prints the most that was held above what the imports take, in MB.
"""

import resource
import subprocess
import sys
from dataclasses import dataclass, replace

import numpy as np
import torch

from gdviz.config import Distillation, Edges, Schedule, View
from gdviz.data.videos import VideoSet
from gdviz.experiment.metrics import shortcut_baselines
from gdviz.student.distill import distill
from gdviz.student.edges import Graphs, build_graphs, learn_edges
from gdviz.teachers.backbones import Classifier, build_backbone
from gdviz.teachers.bank import gather, read_out

VIEW = View(size=64, frames=64, length=8, clips=1)  # 0.8 MB a video as bytes, 3.1 MB as floats


@dataclass(frozen=True)
class Drawn:
    """Pixels of a video, the same each time."""

    shape: tuple[int, ...]

    def __getitem__(self, key: tuple[int, slice]) -> np.ndarray:
        row, frames = key
        return np.full(self.shape[1:], row % 251, np.uint8)[frames]


def drawn(rows: int) -> VideoSet:
    """A set of ``rows`` videos: half of them to train on, of ten classes."""
    few = np.zeros((rows, 1, 1, 1, 3), np.uint8)
    splits = ["train" if row % 20 < 10 else "test" for row in range(rows)]
    videos = VideoSet.from_arrays(few, [row % 10 for row in range(rows)], splits)
    return replace(videos, pixels=Drawn((rows, VIEW.frames, VIEW.size, VIEW.size, 3)))


def held() -> float:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (1e6 if sys.platform == "darwin" else 1e3)


def measure(rows: int) -> None:
    """Do what a run does with the whole set."""
    torch.set_num_threads(1)
    videos, before = drawn(rows), held()
    fold = torch.full((rows,), -1)
    fold[videos.rows("train")] = torch.arange(len(videos.rows("train"))) % 2
    teacher = Classifier(build_backbone("tiny2"), 10)
    bank = gather({"teacher": read_out([teacher] * 3, fold, videos, VIEW)}, videos)
    after_bank = held()
    shortcut_baselines(videos)
    after_baselines = held()
    schedule = Schedule(epochs=1, batch=16, min_steps=1)
    cfg = Distillation("tiny2", schedule, edges=Edges(refreshes=1, gate_steps=2))
    graphs = build_graphs(bank, videos.training_rows, cfg, build_backbone("tiny2").dim)
    edges = learn_edges(bank, *graphs, cfg.edges, seed=0)
    distill("both-graphs", bank, Graphs(*graphs, edges), videos, VIEW, cfg, seed=0)
    steps = (after_bank - before, after_baselines - before, held() - before)
    read, baselines, whole = (f"{step:.0f}" for step in steps)
    print(f"{rows:7,} videos: read out {read}, baselines {baselines}, all {whole} MB")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        measure(int(sys.argv[2]))
    else:
        for count in sys.argv[1:] or ["100", "1000", "10000"]:
            subprocess.run([sys.executable, __file__, "--one", count], check=True)

"""Data of your own: videos in memory, here squares that move in one of four directions.

python examples/own_data.py
"""

import numpy as np

from gdviz.config import Distillation, Schedule, Teachers, View
from gdviz.data.videos import VideoSet
from gdviz.student.distill import distill
from gdviz.student.edges import Graphs, build_graphs, learn_edges
from gdviz.student.family import build_student
from gdviz.teachers.bank import gather, predict
from gdviz.teachers.fit import fit_teacher, pretrain


def squares(count):
    """Return uint8 videos [n, 12 frames, height, width, 3] and their directions."""
    rng = np.random.default_rng(0)
    square = np.zeros((16, 16, 3), np.uint8)
    square[:5, :5] = 200
    direction = rng.integers(4, size=count)
    step = np.array([(0, 1), (1, 0), (0, -1), (-1, 0)])[direction, None]  # (n, 1, 2)
    paths = rng.integers(16, size=(count, 1, 2)) + np.arange(12)[:, None] * step
    videos = [[np.roll(square, place, axis=(0, 1)) for place in path] for path in paths]
    return np.array(videos), direction.tolist()


def main(count=240):
    """Return the test accuracy of a student of two teachers and both graphs."""
    splits = ["train"] * (count // 4) + ["unlabelled"] * (count // 2) + ["test"] * (count // 4)
    videos = VideoSet.from_arrays(*squares(count), splits, name="squares")
    view = View(size=16, frames=12, length=6, stride=1)
    schedule = Schedule(epochs=15, batch=32, lr=1e-2)
    teachers = Teachers(backbone="tiny8m", pretrain=schedule, fit=schedule)
    cfg = Distillation(student="tiny4", schedule=schedule)

    readouts = {}
    for task in ("order", "prediction"):
        backbone, _, _ = pretrain(task, teachers, view, videos, seed=0)
        _, readouts[task] = fit_teacher(backbone, videos, teachers, view, seed=0)
    bank = gather(readouts, videos)  # what both say of every video
    dim = build_student(cfg.student, 4).backbone.dim
    logits, representation = build_graphs(bank, videos.training_rows, cfg, dim)
    edges = learn_edges(bank, logits, representation, cfg.edges, seed=0)
    graphs = Graphs(logits, representation, edges)
    student, _ = distill("both-graphs", bank, graphs, videos, view, cfg, seed=0)

    test = videos.rows("test")
    found = predict(student.classifier, videos, test, view)[0].mean(1).argmax(1)
    return float((found == videos.labels[test]).float().mean())


if __name__ == "__main__":
    print(f"test accuracy: {main():.3f}, by chance 0.250")

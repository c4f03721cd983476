"""Measures of the field against brute force on sizes at which they can be counted by hand."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import REPO, memory_set
from sklearn.model_selection import GridSearchCV

from gdviz.experiment import metrics
from gdviz.experiment.metrics import linear_probe, retrieval, shortcut_baselines


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_retrieval_is_what_sorting_by_cosine_gives():
    gallery, query = draw(12, 3) * torch.arange(1.0, 13)[:, None], draw(7, 3, seed=1)
    labels, truth = torch.arange(12) % 4, torch.arange(7) % 4
    found = retrieval(gallery, labels, query, truth, ks=(1, 3, 12))
    for k, value in found.items():
        hits = 0
        for q, y in zip(query, truth, strict=True):
            cosine = [float(q @ g / q.norm() / g.norm()) for g in gallery]
            nearest = sorted(range(12), key=lambda i: -cosine[i])[:k]
            hits += any(labels[i] == y for i in nearest)
        assert value == pytest.approx(hits / 7)
    assert 0 < found[1] < found[3] < found[12] == 1
    assert retrieval(gallery, labels, 5 * gallery, labels, ks=(1,)) == {1: 1.0}
    with pytest.raises(ValueError, match="n_neighbors"):
        retrieval(gallery, labels, query, truth, ks=(1, 13))


def test_the_probe_finds_what_is_linear_and_nothing_in_noise():
    labels, means = torch.arange(120) % 3, 4 * draw(3, 6, seed=2)
    features, groups = means[labels] + draw(120, 6), [str(i) for i in range(120)]
    assert linear_probe(features[:60], labels[:60], groups[:60], features[60:], labels[60:]) > 0.95
    scale = torch.logspace(-3, 3, 6)  # units do not matter: the probe standardises
    again = linear_probe(
        features[:60] * scale, labels[:60], groups[:60], features[60:] * scale, labels[60:]
    )
    assert again == pytest.approx(
        linear_probe(features[:60], labels[:60], groups[:60], features[60:], labels[60:])
    )
    noise = draw(120, 6)
    assert linear_probe(
        noise[:60], labels[:60], groups[:60], noise[60:], labels[60:]
    ) == pytest.approx(1 / 3, abs=0.2)


def test_the_penalty_is_chosen_on_whole_groups(monkeypatch):
    """Ten copies of a row of noise are foretold only if they lie in several folds."""
    seen, real = [], GridSearchCV.score
    monkeypatch.setattr(
        GridSearchCV, "score", lambda self, x, y: seen.append(self.best_score_) or real(self, x, y)
    )
    rows, labels = draw(18, 40), torch.arange(18) % 3
    for groups in ([str(i) for i in range(18) for _ in range(10)], [str(i) for i in range(180)]):
        linear_probe(
            rows.repeat_interleave(10, 0), labels.repeat_interleave(10), groups, rows, labels
        )
    assert seen[0] < 0.7 and seen[1] > 0.95
    for labels, groups in (([0, 0, 1], "abc"), ([0, 0, 1, 1], "aaaa")):
        few = torch.tensor(labels)
        with pytest.raises(ValueError, match="linear_probe: labels need two rows a class"):
            linear_probe(rows[: len(labels)], few, list(groups), rows[: len(labels)], few)


def test_baselines_hold_a_few_videos_at_a_time(finished, monkeypatch):
    videos, sizes = finished.videos(), []
    monkeypatch.setattr(metrics, "AT_ONCE", 7)
    real = type(videos).batch
    monkeypatch.setattr(
        type(videos), "batch", lambda self, rows: sizes.append(len(rows)) or real(self, rows)
    )
    few = shortcut_baselines(videos)
    assert max(sizes) == 7
    monkeypatch.setattr(metrics, "AT_ONCE", 10_000)
    assert shortcut_baselines(videos) == few


def test_the_single_frame_that_is_judged_is_the_middle_one():
    """Nothing but the fifth of eight frames tells the class."""
    rng, labels = np.random.default_rng(0), [i % 2 for i in range(60)]
    pixels = rng.integers(256, size=(60, 8, 12, 12, 3), dtype=np.uint8)
    pixels[1::2, 4, :6] = 255
    videos = memory_set(pixels, labels, ["train"] * 30 + ["test"] * 30)
    assert shortcut_baselines(videos)["single-frame"] > 0.9


@pytest.mark.slow
def test_memory_does_not_grow_with_the_set():
    """Of 130 and of 230 videos, each of which takes 3 MB as floats."""
    program = [sys.executable, str(REPO / "benchmarks" / "memory.py"), "130", "230"]
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    few, many = map(int, re.findall(r"all (\d+) MB", done.stdout))
    assert many - few < 80, done.stdout


def test_a_large_set_gives_few_frames_a_video_and_one_at_least(monkeypatch):
    videos = memory_set(np.zeros((6, 16, 12, 12, 3), np.uint8), [0, 1] * 3, ["train"] * 6)
    rows = videos.rows("train")
    for most, each in ((2**15, 4), (12, 2), (6, 1), (1, 1)):
        monkeypatch.setattr(metrics, "FRAMES", most)
        frames, middle, mean = metrics._small(videos, rows)
        assert (frames.shape[1], len(middle), len(mean)) == (each, 6, 6)


def test_the_calibration_error_is_the_gap_of_each_bin_by_its_share():
    sure = torch.tensor([0.95, 0.95, 0.65, 0.65])
    found = metrics.calibration_error(torch.stack([sure, 1 - sure], 1), torch.tensor([0, 1, 0, 0]))
    assert found == pytest.approx((2 * 0.45 + 2 * 0.35) / 4)

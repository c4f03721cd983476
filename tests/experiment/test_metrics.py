"""Measures of the field against brute force on sizes at which they can be counted by hand."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import TINY
from sklearn.model_selection import GridSearchCV

from gdviz.data.clips import to_float
from gdviz.experiment.metrics import linear_probe, per_class_accuracy, retrieval
from gdviz.show.report import evaluation
from gdviz.teachers.readout import predict


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
    with pytest.raises(ValueError, match=r"ks=\(1, 13\): the gallery holds 12"):
        retrieval(gallery, labels, query, truth, ks=(1, 13))


def test_accuracy_by_class_counts_each_class_alone():
    logits = torch.eye(4)[[0, 1, 1, 2, 0]]
    shares = per_class_accuracy(logits, torch.tensor([0, 0, 1, 2, 2]))
    assert shares[:3].tolist() == [0.5, 1.0, 0.5]
    assert math.isnan(shares[3])


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
    """Ten copies of a row of noise are foretold if they lie in several folds, and not if they share one."""
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
        with pytest.raises(ValueError, match="linear_probe: labels need two rows a class"):
            linear_probe(rows[: len(labels)], torch.tensor(labels), list(groups), rows, labels)


def test_a_finished_run_is_evaluated(finished):
    text = evaluation(finished)
    lines = {line[:32].strip(): line[32:].split() for line in text.splitlines() if line}
    head = lines["mean ± std over seeds, %"]
    assert head == ["top-1", "probe", "R@1", "R@5", "R@10", "R@20", "ECE", "ECE", "scaled"]
    chance = [
        1 - math.prod((44 - i) / (48 - i) for i in range(k)) for k in (1, 5, 10, 20)
    ]  # four clips a class among 48
    assert [float(x) for x in lines["chance"]] == pytest.approx(
        [100 / 12, 100 / 12, *(100 * c for c in chance)], abs=0.051
    )
    for row in finished.metrics():
        values = [float(x) for x in lines[f"{row['kind']}: {row['name']}"]]
        assert len(values) == 8 and all(0 <= v <= 100 for v in values)
        assert values[0] == pytest.approx(100 * row["accuracy"], abs=0.05)
        assert values[2] <= values[3] <= values[4] <= values[5]
        if row["kind"] == "teacher":
            assert values[7] == pytest.approx(100 * row["calibration_error"], abs=0.05)
    classes = [name for name in lines if name in finished.videos().label_names]
    assert len(classes) == 12
    for column, method in enumerate(
        TINY.methods
    ):  # as many test videos a class: the mean over classes is the accuracy
        mean = sum(float(lines[name][column]) for name in classes) / 12
        assert mean == pytest.approx(float(lines[f"student: {method}"][0]), abs=0.1)


def test_more_crops_are_averaged(finished):
    """What a network says of a video is the mean of what it says of the left, the middle and the right crop."""

    class Corner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, clips):
            return clips.mean((3, 4)).flatten(1), clips[:, :1, 0, 0, 0]

    videos, view = finished.videos(), replace(TINY.view, clips=1)
    logits, corner = predict(Corner(), videos, torch.arange(3), view, crops=3)
    assert logits.shape == (3, 12)
    first = to_float(
        videos.batch(torch.arange(3))[:, 2]
    )  # clips of 4 in 12 frames, stride 2, start at the third
    torch.testing.assert_close(corner[:, 0], first[:, 0, 1, :3].mean(1))

"""Expected hours: counted as trainings count, and from what a clip was seen to take."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from gdviz.config import PROFILES, Schedule
from gdviz.core.files import UserError
from gdviz.core.loop import train
from gdviz.experiment import estimate, grid
from gdviz.experiment.folder import Run
from gdviz.teachers.own import OwnBackbone, OwnClassifier, OwnView, Tapped

SMOKE = PROFILES["smoke"]


@pytest.mark.parametrize(("videos", "batch"), [(50, 16), (10, 16), (200, 16)])
def test_a_training_sees_as_many_clips_as_are_expected(videos, batch):
    schedule, seen = Schedule(epochs=2, batch=batch, min_steps=3), 0
    net = nn.Linear(1, 1)

    def step(rows, rng, epoch):
        nonlocal seen
        seen += len(rows)
        return net.weight.sum(), {}

    train(net, step, torch.arange(videos), schedule, seed=0)
    assert seen == estimate.clips_trained(schedule, videos)


def test_hours_are_clips_times_seconds(monkeypatch):
    monkeypatch.setattr(estimate, "clip_seconds", lambda *_: (3600.0, 0.0))  # an hour a clip
    count = {"train": 84, "unlabelled": 1008, "test": 960, "classes": 12}
    teachers = replace(SMOKE.teachers, tasks=("order",), strides=(2,))
    hours = estimate.hours_of(replace(SMOKE, teachers=teachers, methods=("labels",)), count, "cpu")
    pretrained, fitted = 10 * (1092 // 32) * 32, 4 * 32 * 5 * 16  # folds and all, least five steps
    assert hours == {"teachers": pretrained + fitted, "students": 24 * (1092 // 32) * (32 + 8)}


def test_networks_of_one_s_own_are_not_pre_trained(monkeypatch):
    class Own(OwnBackbone):
        def __init__(self, fitted):
            self.fitted = fitted

    monkeypatch.setattr(estimate, "clip_seconds", lambda *_: (3600.0, 0.0))
    monkeypatch.setattr(estimate, "build_teacher", lambda *_: None)
    monkeypatch.setattr(estimate, "find_source", lambda task: Own(task == "my:fitted"))
    count = {"train": 84, "unlabelled": 1008, "test": 960, "classes": 12}
    for task, clips in (("my:fitted", 0), ("my:frozen", 4 * 32 * 5 * 16)):
        teachers = replace(SMOKE.teachers, tasks=(task,), strides=(2,))
        hours = estimate.hours_of(replace(SMOKE, teachers=teachers, methods=()), count, "cpu")
        assert hours == {"teachers": clips, "students": 0}


def test_answering_costs_a_clip_of_each_video(monkeypatch):
    monkeypatch.setattr(estimate, "clip_seconds", lambda *_: (0.0, 3600.0))
    count = {"train": 2, "unlabelled": 3, "test": 5, "classes": 2}
    profile = replace(SMOKE, methods=("labels", "kd-uniform"))
    assert estimate.hours_of(profile, count, "cpu") == {"teachers": 4 * 30, "students": 2 * 30}


def test_training_is_timed_with_its_gradient_and_answering_without(monkeypatch):
    net, now = estimate.build_student("tiny8", 3), [0.0]

    def pass_by(seconds):
        now[0] += seconds

    monkeypatch.setattr(estimate, "perf_counter", lambda: now[0])
    net.register_forward_hook(lambda *_: pass_by(1))
    net.fc.weight.register_hook(lambda grad: pass_by(2))
    training, answering = estimate.clip_seconds(net, SMOKE.view, Schedule(epochs=1), "cpu")
    assert (training, answering) == (3 / 4, 1 / 4)  # of four clips
    parts = Schedule(epochs=1, batch=8, accumulate=4)
    assert estimate.clip_seconds(net, SMOKE.view, parts, "cpu") == (3 / 2, 1 / 2)  # of a part


def test_videos_are_counted_or_told(tmp_path):
    embedded = Run(SMOKE, tmp_path)
    assert estimate.count_videos(embedded, {})["unlabelled"] == 12 * 84
    away = Run(SMOKE, tmp_path, tmp_path / "away.csv")
    with pytest.raises(UserError, match=r"away\.csv: is not here"):
        estimate.count_videos(away, {})
    told = {"train": 10, "test": 5, "classes": 2}
    assert estimate.count_videos(away, told) == told | {"unlabelled": 0}


def test_each_draw_has_data_of_its_own(tmp_path):
    text = 'draws = [1, 2]\ndata = "list_{draw}.csv"\nvideos = {train = 9, test = 3, classes = 3}'
    (tmp_path / "plan.toml").write_text(text)
    plan = grid.read_plan(tmp_path / "plan.toml")
    (runs,) = plan.runs(tmp_path / "out", tmp_path, "cpu")
    assert [run.data for run in runs] == [tmp_path / f"list_{draw}.csv" for draw in (1, 2)]
    said = estimate.estimate(plan, [runs], "cpu")
    assert "9 train, 0 unlabelled, 3 test videos" in said and "hours of one process" in said


def test_a_fitted_frozen_network_is_timed(monkeypatch):
    net = nn.Sequential(nn.Conv3d(3, 4, 1), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 2))
    teacher = OwnClassifier(Tapped(net, "1", OwnView(16, 4), logits="3"))
    view = replace(SMOKE.view, size=16, length=4)
    assert min(estimate.clip_seconds(teacher, view, Schedule(epochs=1), "cpu")) > 0

"""The student's step: which clips it takes; and that hidden labels change nothing."""

from dataclasses import replace

import torch
from conftest import TINY
from torch import Generator

from gdviz.core.files import load_tensors
from gdviz.data.clips import clip_places
from gdviz.data.videos import VideoSet
from gdviz.student.distill import Lesson, Student, distill, student_step
from gdviz.student.edges import Graphs, build_graphs, learn_edges
from gdviz.student.family import build_student
from gdviz.student.methods import METHODS, Method, Setting, ThroughBothGraphs
from gdviz.teachers.bank import gather
from gdviz.teachers.fit import fit_teacher, pretrain


def lesson_of(run, view=TINY.view) -> Lesson:
    videos = run.videos()
    bank, graphs = run.bank(0, videos), run.graphs(0)
    return Lesson(videos, view, bank, graphs, TINY.distillation, "cpu")


def test_a_step_takes_labelled_clips_beside_all_or_instead_of_them(finished):
    lesson = lesson_of(finished)
    setting = Setting(lesson.bank, lesson.graphs, lesson.cfg, lesson.videos.training_rows, 16)
    rows, labelled = torch.arange(10, 20), set(lesson.videos.rows("train").tolist())
    for name, method in METHODS.items():
        picked, count = lesson.pick(method(setting), rows, Generator().manual_seed(0))
        assert len(picked) == TINY.distillation.labelled_batch + 10
        assert set(picked[:count].tolist()) <= labelled
        if name == "labels":
            assert count == len(picked)
        else:
            assert torch.equal(picked[count:], rows)


def test_clips_are_those_the_teachers_spoke_of(finished, monkeypatch):
    lesson = lesson_of(finished, replace(TINY.view, clips=3))
    seen, real = [], VideoSet.clips

    def spy(self, rows, length, stride, rng=None, place=0.5):
        seen.append((rng, place))
        return real(self, rows, length, stride, rng, place)

    monkeypatch.setattr(VideoSet, "clips", spy)
    rows, rng = torch.tensor([0, 5, 7]), Generator().manual_seed(0)
    lesson.clips(rows, None, rng)
    lesson.clips(rows, torch.tensor([2, 0, 1]), rng)
    assert seen[0] == (rng, 0.5)
    assert seen[1][1].tolist() == [clip_places(3)[c] for c in (2, 0, 1)]


def test_a_student_may_be_taught_clip_by_clip(finished):
    videos = finished.videos()
    cfg = TINY.distillation
    args = finished.bank(0, videos), finished.graphs(0), videos, TINY.view
    whole, by_clip = (
        distill("logits-graph", *args, replace(cfg, target=target), seed=0)[0]
        for target in ("video", "clip")
    )
    assert not torch.equal(whole.classifier.fc.weight, by_clip.classifier.fc.weight)


def test_hidden_labels_change_nothing(finished):
    """Labels outside the labelled part, replaced by nonsense: the same teachers, edges, student."""
    torch.set_flush_denormal(True)
    videos, cfg = finished.videos(), TINY
    train = torch.tensor([s == "train" for s in videos.splits])
    noise = torch.randint(12, (len(train),), generator=Generator().manual_seed(0))
    lying = replace(videos, labels=torch.where(train, videos.labels, noise))
    readouts = {}
    for task in cfg.teachers.tasks:
        view = cfg.view_of(task)
        backbone, _, _ = pretrain(task, cfg.teachers, view, lying, seed=0)
        readouts[task] = fit_teacher(backbone, lying, cfg.teachers, view, seed=0)[1]
    bank = gather(readouts, lying)
    both = build_graphs(bank, lying.training_rows, cfg.distillation, 16)
    graphs = Graphs(*both, learn_edges(bank, *both, cfg.distillation.edges, seed=0))
    student, _ = distill("both-graphs", bank, graphs, lying, cfg.view, cfg.distillation, seed=0)
    file = finished.student_folder(0, "both-graphs") / "student.safetensors"
    for key, value in load_tensors(file).items():
        assert torch.equal(value, student.classifier.state_dict()[key]), key


def test_a_student_hears_the_edges_of_the_moment(finished, monkeypatch):
    heard, real = [], ThroughBothGraphs.losses

    def spy(self, batch, bank, edges, moment):
        heard.append(moment)
        return real(self, batch, bank, edges, moment)

    monkeypatch.setattr(ThroughBothGraphs, "losses", spy)
    lesson = lesson_of(finished)
    moments = len(lesson.graphs.edges.teachers)
    cfg = replace(lesson.cfg, schedule=replace(lesson.cfg.schedule, epochs=2 * moments))
    args = lesson.bank, lesson.graphs, lesson.videos, lesson.view, cfg
    distill("both-graphs", *args, seed=0)
    steps = len(heard) // (2 * moments)
    assert heard == [epoch // 2 for epoch in range(2 * moments) for _ in range(steps)]


class Fixed(Method):
    """Two losses that pull a student's features, one of which comes in slowly."""

    terms, ramped = ("at_once", "slowly"), ("slowly",)

    def losses(self, batch, bank, edges, moment):
        return {"at_once": 3 * batch.features.sum(), "slowly": batch.features.square().sum()}


def test_losses_are_balanced_once_and_ramped_in(finished):
    lesson = lesson_of(finished)
    schedule = replace(lesson.cfg.schedule, epochs=10)
    lesson = replace(lesson, cfg=replace(lesson.cfg, schedule=schedule))
    setting = Setting(lesson.bank, lesson.graphs, lesson.cfg, lesson.videos.training_rows, 16)
    torch.manual_seed(0)
    student = Student(build_student("tiny4", 12), Fixed(setting))
    rows, norms = torch.arange(8), []
    for epoch, ramp in ((0, 0.5), (1, 1.0), (9, 1.0)):
        loss, terms = student_step(student, lesson, rows, Generator().manual_seed(epoch), epoch)
        once, slowly = (student.balance.factor(n) * terms[n] for n in ("at_once", "slowly"))
        torch.testing.assert_close(loss, terms["ce"] + once + ramp * slowly)
        norms.append(student.balance.norm_ce.clone())
    assert norms[0] > 0 and norms[0] == norms[1] == norms[2]  # measured in the first epoch only

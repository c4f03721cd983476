"""The student's training: cross-entropy of labelled clips, and a method's losses on all clips."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from jaxtyping import Int
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from gdviz.config import Distillation, View
from gdviz.core import distributed
from gdviz.core.loop import Bookkeeping, train
from gdviz.data.clips import augment, clip_places, to_float
from gdviz.data.videos import VideoSet
from gdviz.student.edges import Graphs
from gdviz.student.family import build_student
from gdviz.student.methods import Batch, Method, Setting, find_method
from gdviz.teachers.backbones import Classifier, Clips
from gdviz.teachers.bank import Bank, cases_of


class Balance(nn.Module):
    """Scale losses to the cross-entropy: ``lambda = scale |dCE/dh| / |dL/dh|``, h the features.

    Measured over the first epoch and then kept in buffers: the cross-entropy of a few labelled
    clips soon vanishes, and would take the other losses along.
    """

    def __init__(self, scales: dict[str, float]) -> None:
        super().__init__()
        self.scales = scales
        for name in ("ce", *scales):
            self.register_buffer(f"norm_{name}", torch.zeros(()))

    def measure(self, losses: Mapping[str, Tensor], features: Tensor) -> None:
        """Add up the norms of the losses' gradients by the features."""
        for name, loss in losses.items():
            (grad,) = torch.autograd.grad(loss, features, retain_graph=True)
            self.get_buffer(f"norm_{name}").add_(grad.norm())

    def factor(self, name: str) -> Tensor:
        """Return lambda."""
        norm = self.get_buffer(f"norm_{name}").clamp(min=1e-12)
        return self.scales[name] * self.get_buffer("norm_ce") / norm


class Student(nn.Module):
    """The student with all that is trained or remembered along: one checkpoint holds it."""

    def __init__(self, classifier: Classifier, method: Method) -> None:
        super().__init__()
        self.classifier, self.method = classifier, method
        self.balance = Balance({name: method.scale(name) for name in method.terms})


@dataclass(frozen=True)
class Lesson:
    """What every step of one training looks at."""

    videos: VideoSet
    view: View
    bank: Bank
    graphs: Graphs
    cfg: Distillation
    device: str

    @cached_property
    def labelled(self) -> Int[Tensor, " n"]:
        """Rows of the labelled training videos."""
        return self.videos.rows("train")

    def pick(self, method: Method, rows: Tensor, rng: Generator) -> tuple[Tensor, int]:
        """Return the videos of a step, and how many of them, the first ones, count as labelled.

        Labelled videos are drawn beside ``rows``, or instead of them for a method of labels only.
        """
        labelled, count = self.labelled, self.cfg.labelled_batch
        drawn = labelled[torch.randint(len(labelled), (count + len(rows),), generator=rng)]
        if method.unlabelled:
            return torch.cat([drawn[:count], rows]), count
        return drawn, len(drawn)

    def clips(self, rows: Tensor, which: Tensor | None, rng: Generator) -> Clips:
        """Return this process's augmented clips of ``rows``: from anywhere, or clip ``which``."""
        own, view, rng = distributed.deal(rows), self.view, distributed.own_generator(rng)
        if which is None:
            clips = self.videos.clips(own, view.length, view.stride, rng)
        else:
            place = torch.tensor(clip_places(view.clips))[distributed.deal(which)]
            clips = self.videos.clips(own, view.length, view.stride, place=place)
        return augment(to_float(clips.to(self.device)).transpose(1, 2), rng)


def student_step(
    student: Student, lesson: Lesson, rows: Tensor, rng: Generator, epoch: int
) -> tuple[Tensor, dict[str, Tensor | float]]:
    """Take one step: ``CE(labelled) + sum_i ramp_i lambda_i L_i``; return it and its terms."""
    classifier, method, cfg = student.classifier, student.method, lesson.cfg
    rows, labelled = lesson.pick(method, rows, rng)
    which = None
    if cfg.target == "clip":
        which = torch.randint(lesson.view.clips, rows.shape, generator=rng)

    clips = lesson.clips(rows, which, rng)
    features = distributed.gather(classifier.backbone(clips))  # from here on: the whole batch
    logits = cases_of(classifier.fc(features), lesson.bank.cases_each > 1)
    labels = lesson.videos.labels[rows[:labelled]].flatten().to(logits.device)
    loss = ce = cross_entropy(logits[: len(labels)], labels)

    moment = lesson.graphs.edges.at(epoch / cfg.schedule.epochs)
    batch = Batch(rows, which, logits, features, rng)
    terms = method.losses(batch, lesson.bank, lesson.graphs.edges, moment)
    if epoch == 0:
        student.balance.measure({"ce": ce, **terms}, features)
    for name, term in terms.items():
        ramp = min(1.0, 5 * (epoch + 1) / cfg.schedule.epochs) if name in method.ramped else 1.0
        loss = loss + student.balance.factor(name) * ramp * term
    return loss, {"ce": ce, **terms}


def distill(
    method: str,
    bank: Bank,
    graphs: Graphs,
    videos: VideoSet,
    view: View,
    cfg: Distillation,
    *,
    seed: int,
    device: str = "cpu",
    keep: Bookkeeping = Bookkeeping(),
) -> tuple[Student, list[dict[str, float]]]:
    """Train one student by a ``method`` (:func:`gdviz.student.methods.find_method`).

    For a method that wants it so, ``bank`` and ``graphs`` are shuffled already. Return the student
    and one row of logged means an epoch.

    Raises:
        UserError: unknown method.
    """
    kind = find_method(method, bank.teachers)
    torch.manual_seed(seed)
    classifier = build_student(cfg.student, len(videos.label_names))
    rows, trunk = videos.training_rows, classifier.backbone.trunk
    setting = Setting(bank, graphs, cfg, rows, classifier.backbone.dim)
    student = Student(classifier, kind(setting)).to(device)
    step = partial(student_step, student, Lesson(videos, view, bank, graphs, cfg, device))
    history = train(student, step, rows, cfg.schedule, seed=seed, compiled=[trunk], keep=keep)
    return student, history

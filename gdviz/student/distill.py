"""The student's training: cross-entropy, baselines, and the losses of both graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from gdviz.config import Distillation, View
from gdviz.core import distributed as ranks
from gdviz.core.loop import Bookkeeping, train
from gdviz.data.clips import augment, clip_places, to_float
from gdviz.data.videos import VideoSet
from gdviz.graphs import LogitsGraph
from gdviz.student.edges import Edges
from gdviz.student.losses import (
    contrastive_loss,
    decoupled_kd_loss,
    dist_loss,
    hint_loss,
    multi_teacher_kd_loss,
    relational_angle_loss,
    relational_distance_loss,
)
from gdviz.student.weighting import FOLLOW_STUDENT, POLICIES
from gdviz.teachers.backbones import Classifier, build_backbone
from gdviz.teachers.bank import Knowledge, build_graphs

# Which graph losses a method uses; the others are the baselines below and plain distillations, ``kd-*``.
GRAPHS = {
    "labels": (),
    "logits-graph": ("logits",),
    "representation-graph": ("repr",),
    "both-graphs": ("logits", "repr"),
    "both-shuffled": ("logits", "repr"),
}
NEGATIVES = 64  # clips that CRD tells a clip from


@dataclass(frozen=True)
class Seen:
    """What a baseline sees in a step: the student, the best teacher on the same clips, and layers learned along."""

    logits: Float[Tensor, "b c"]
    features: Float[Tensor, "b d"]
    teacher_logits: Float[Tensor, "b c"]
    teacher_features: Float[Tensor, "b e"]
    others: Float[Tensor, "b n e"]  # the teacher's features of other clips
    bank: int  # how many clips the others were drawn from
    labels: Tensor  # (b,) true where known, else the teacher's
    temperature: float
    student_to: nn.Linear | None  # d -> e
    teacher_to: nn.Linear | None  # e -> e


BASELINES: dict[str, Callable[[Seen], Tensor]] = {
    "fitnets": lambda s: hint_loss(s.student_to(s.features), s.teacher_features),
    "rkd": lambda s: (
        relational_distance_loss(s.features, s.teacher_features)
        + 2 * relational_angle_loss(s.features, s.teacher_features)
    ),
    "crd": lambda s: contrastive_loss(
        s.student_to(s.features), s.teacher_to(s.teacher_features), s.teacher_to(s.others), s.bank
    ),
    "dkd": lambda s: decoupled_kd_loss(s.logits, s.teacher_logits, s.labels, s.temperature),
    "dist": lambda s: dist_loss(s.logits, s.teacher_logits, s.temperature),
}
LEARNED_ALONG = {"fitnets": ("student_to",), "crd": ("student_to", "teacher_to")}


def methods_of(teachers: Sequence[str]) -> list[str]:
    """Every method that can be asked for, given the teachers' names."""
    return [
        *GRAPHS,
        *BASELINES,
        *(f"kd-{name}" for name in ("best", "learned", *POLICIES, *teachers)),
    ]


class _Balance(nn.Module):
    """Scales a distillation loss to the cross-entropy: lambda = scale * |dCE/dh| / |dL/dh|, h the student's features.

    Measured over the first epoch and then kept: the cross-entropy of a few labelled clips soon
    vanishes, and would take the distillation along. Buffers, so that a checkpoint holds them.
    """

    def __init__(self, scales: dict[str, float]) -> None:
        super().__init__()
        self.scales, self.ramps, self.measuring = scales, dict.fromkeys(scales, 1.0), True
        for name in ("ce", *scales):
            self.register_buffer(f"norm_{name}", torch.zeros(()))

    def forward(self, ce: Tensor, losses: dict[str, Tensor], features: Tensor) -> Tensor:
        """``ce + sum_i ramp_i lambda_i loss_i``."""
        if self.measuring:
            for name, loss in {"ce": ce, **losses}.items():
                (grad,) = torch.autograd.grad(loss, features, retain_graph=True)
                getattr(self, f"norm_{name}").add_(grad.norm())
        for name, loss in losses.items():
            ce = ce + self.factor(name) * self.ramps[name] * loss
        return ce

    def factor(self, name: str) -> Tensor:
        return self.scales[name] * self.norm_ce / getattr(self, f"norm_{name}").clamp(min=1e-12)


class Student(nn.Module):
    """The student with all that is trained or remembered along with it, so that one checkpoint holds it."""

    def __init__(
        self, classifier: Classifier, scales: dict[str, float], **others: nn.Module | None
    ) -> None:
        super().__init__()
        self.classifier, self.balance = classifier, _Balance(scales)
        self.graph, self.student_to, self.teacher_to = (
            others.get(name) for name in ("graph", "student_to", "teacher_to")
        )


def kd_weights(
    name: str, knowledge: Knowledge, edges: Edges, softened: Float[Tensor, "n k c"]
) -> Callable[[Tensor, int, Tensor], Float[Tensor, "b k"]]:
    """Whom plain distillation listens to: ``(rows [b], moment, student's softened probabilities [b, c]) -> weights [b, k]``.

    ``name``: a teacher, ``best``, ``learned`` (the edges of the logits graph) or one of ``gdviz.graphs.POLICIES``.
    """
    name = knowledge.best_teacher() if name == "best" else name
    if name == "learned":
        return lambda rows, moment, _: edges.teachers[moment, rows]
    if name in FOLLOW_STUDENT:
        return lambda rows, _, student: POLICIES[name](
            softened[rows].to(student), knowledge.labels[rows].to(student.device), student
        )
    if name in POLICIES:
        fixed = POLICIES[name](knowledge.probs(), knowledge.labels, None)
    else:
        fixed = torch.tensor([float(name == teacher) for teacher in knowledge.teachers]).expand(
            len(softened), -1
        )
    return lambda rows, *_: fixed[rows]


@dataclass
class _Lesson:
    """What the losses of one training share; ``moment`` and ``rng`` move with it."""

    method: str
    knowledge: Knowledge
    edges: Edges
    cfg: Distillation
    rows: Tensor  # the training videos
    student: Student
    logits_graph: LogitsGraph
    device: str
    moment: int = 0
    rng: Generator | None = None
    clips: Tensor | None = (
        None  # (b,) which of its video each clip is, if they are taught one by one
    )

    def __post_init__(self) -> None:
        self.best = self.knowledge.teachers.index(self.knowledge.best_teacher())
        if self.method.startswith("kd-"):
            softened = self.knowledge.probs(self.cfg.temperature)
            self.weigh = kd_weights(
                self.method.removeprefix("kd-"), self.knowledge, self.edges, softened
            )

    def softened(self, picked: Tensor) -> Float[Tensor, "b k c"]:
        return torch.softmax(self.knowledge.said(picked, self.clips) / self.cfg.temperature, -1)

    def match_logits(self, picked: Tensor, logits: Tensor, features: Tensor) -> Tensor:
        """The logits graph."""
        edges = (of[self.moment, picked] for of in (self.edges.teachers, self.edges.consensus))
        return self.logits_graph.loss(
            logits, *(x.to(self.device) for x in (self.softened(picked), *edges))
        )

    def match_pairs(self, picked: Tensor, logits: Tensor, features: Tensor) -> Tensor:
        """The representation graph."""
        shown = [f.to(self.device) for f in self.knowledge.shown(picked, self.clips)]
        consensus, pairs = self.edges.consensus[self.moment, picked], self.edges.pairs[self.moment]
        return self.student.graph.loss(
            features, shown, consensus.to(self.device), pairs.to(self.device)
        )

    def listen(self, picked: Tensor, logits: Tensor, features: Tensor) -> Tensor:
        """Plain distillation."""
        weights = self.weigh(
            picked, self.moment, torch.softmax(logits.detach() / self.cfg.temperature, 1)
        )
        return multi_teacher_kd_loss(
            logits,
            self.softened(picked).to(self.device),
            weights.to(self.device),
            self.cfg.temperature,
        )

    def imitate(self, picked: Tensor, logits: Tensor, features: Tensor) -> Tensor:
        """One of ``BASELINES``."""
        known, rows, student = self.knowledge.labels[picked], self.rows, self.student
        said, shown = (
            self.knowledge.said(picked, self.clips)[:, self.best],
            self.knowledge.shown(picked, self.clips)[self.best],
        )
        at = torch.randint(
            len(rows), (len(picked), min(NEGATIVES, len(rows) - 1)), generator=self.rng
        )
        at = (at + (rows[at] == picked[:, None])) % len(rows)  # never the clip itself
        truth = torch.where(known >= 0, known, said.argmax(1))
        said, shown, others, truth = (
            x.to(self.device)
            for x in (said, shown, self.knowledge.shown(rows[at])[self.best], truth)
        )
        layers = (student.student_to, student.teacher_to)
        return BASELINES[self.method](
            Seen(
                logits,
                features,
                said,
                shown,
                others,
                len(rows),
                truth,
                self.cfg.temperature,
                *layers,
            )
        )


_LOSSES = {
    "logits": _Lesson.match_logits,
    "repr": _Lesson.match_pairs,
    "kd": _Lesson.listen,
    "baseline": _Lesson.imitate,
}


def distill(
    method: str,
    knowledge: Knowledge,
    edges: Edges,
    videos: VideoSet,
    view: View,
    cfg: Distillation,
    *,
    seed: int,
    device: str = "cpu",
    **bookkeeping: Unpack[Bookkeeping],
) -> tuple[Student, list[dict[str, float]]]:
    """Trains one student: ``L = CE(labelled) + lambda_l L_logits + lambda_r ramp(t) L_repr``.

    Every step sees a batch of all training clips, on which the teachers speak, and a batch of
    labelled ones; ``labels`` fills the place of the former with labelled clips, so that all methods
    take the same number of steps on the same number of clips.

    Args:
        method: one of :func:`methods_of`. ``kd-best``, ``fitnets``, ``rkd``, ``crd``, ``dkd`` and ``dist`` see the
            teacher that is best out of fold; ``both-shuffled`` is the control, whose ``knowledge`` and
            ``edges`` come shuffled.
        knowledge: what the teachers say.
        edges: learned weights and consensus over time.
        videos: the set.
        view: how clips are taken.
        cfg: student, schedule and graphs.
        seed: of initialisation, batches and views.
        device: where to train.
        bookkeeping: checkpoint and progress bar, see :func:`gdviz.core.loop.train`.

    Returns:
        The student and one row of logged means an epoch.

    Raises:
        ValueError: unknown method, or knowledge without clips for a target that needs them.
    """
    if method not in methods_of(knowledge.teachers):
        raise ValueError(
            f"unknown method {method!r}: choose from {', '.join(methods_of(knowledge.teachers))}"
        )
    if cfg.target == "clip" and not knowledge.clips:
        raise ValueError(
            "target='clip': this knowledge is of whole videos only; gather it with the teachers' clips"
        )
    rows, labelled, places = (
        videos.training_rows,
        videos.rows("train"),
        torch.tensor(clip_places(view.clips)),
    )
    torch.manual_seed(seed)
    classifier = Classifier(build_backbone(cfg.student), len(videos.label_names))
    use = GRAPHS.get(method, ("baseline",) if method in BASELINES else ("kd",))
    logits_graph, representation_graph = build_graphs(knowledge, classifier.backbone.dim, rows, cfg)
    along: dict[str, nn.Module] = {"graph": representation_graph} if "repr" in use else {}
    if "baseline" in use:
        size = knowledge.features[knowledge.teachers.index(knowledge.best_teacher())].shape[1]
        sizes = {"student_to": classifier.backbone.dim, "teacher_to": size}
        along = {name: nn.Linear(sizes[name], size) for name in LEARNED_ALONG.get(method, ())}
    scales = dict.fromkeys(use, cfg.logits_scale) | (
        {"repr": cfg.representation_scale} if "repr" in use else {}
    )
    student = Student(classifier, scales, **along).to(device)
    lesson = _Lesson(method, knowledge, edges, cfg, rows, student, logits_graph.to(device), device)

    def on_epoch(epoch: int) -> dict[str, float]:
        progress = epoch / cfg.schedule.epochs
        lesson.moment, student.balance.measuring = edges.at(progress), epoch == 0
        if "repr" in use:  # comes in over the first fifth of the training
            student.balance.ramps["repr"] = min(1.0, 5 * (progress + 1 / cfg.schedule.epochs))
        return {}

    def step(picked: Tensor, rng: Generator) -> tuple[Tensor, dict[str, Tensor | float]]:
        lesson.rng, count = rng, cfg.labelled_batch
        draw = labelled[torch.randint(len(labelled), (count + len(picked),), generator=rng)]
        picked = draw if method == "labels" else torch.cat([draw[:count], picked])
        supervised = len(picked) if method == "labels" else count
        lesson.clips = (
            torch.randint(len(places), picked.shape, generator=rng)
            if cfg.target == "clip"
            else None
        )
        with ranks.dealt(rng):
            where = (
                {"rng": rng}
                if lesson.clips is None
                else {"place": places[ranks.deal(lesson.clips)]}
            )
            clips = videos.clips(ranks.deal(picked), view.length, view.stride, **where).to(device)
            clips = augment(to_float(clips).transpose(1, 2), rng)
        features = ranks.gather(
            classifier.backbone(clips)
        )  # from here on every rank has the whole batch
        logits = classifier.fc(features)
        ce = cross_entropy(logits[:supervised], videos.labels[picked[:supervised]].to(device))
        losses = {name: _LOSSES[name](lesson, picked, logits, features) for name in use}
        return student.balance(ce, losses, features), {"ce": ce, **losses}

    history = train(student, step, rows, cfg.schedule, seed=seed, on_epoch=on_epoch, **bookkeeping)
    return student, history

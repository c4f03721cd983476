"""The student's training: cross-entropy, baselines, and the losses of both graphs."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from gdviz.config import Distillation, View
from gdviz.data.sampling import augment, clips_of
from gdviz.data.videos import VideoSet
from gdviz.edges import Edges
from gdviz.graphs import RepresentationGraph
from gdviz.knowledge import Knowledge, build_graphs
from gdviz.losses import kd_loss
from gdviz.models import Classifier, build_backbone
from gdviz.training import train

# Which graph losses a method uses; every other known method is a plain distillation.
GRAPHS = {
    "labels": (),
    "logits-graph": ("logits",),
    "representation-graph": ("repr",),
    "both-graphs": ("logits", "repr"),
    "both-shuffled": ("logits", "repr"),
}


class _Balance(nn.Module):
    """Scales a distillation loss to the cross-entropy: lambda = scale * |dCE/dh| / |dL/dh|, h the student's features.

    Measured over the first epoch and then kept: the cross-entropy of a few labelled clips soon
    vanishes, and would take the distillation along. Buffers, so that a checkpoint holds them.
    """

    def __init__(self, scales: dict[str, float]) -> None:
        super().__init__()
        self.scales = scales
        for name in ("ce", *scales):
            self.register_buffer(f"norm_{name}", torch.zeros(()))

    def measure(self, losses: dict[str, Tensor], features: Tensor) -> None:
        for name, loss in losses.items():
            (grad,) = torch.autograd.grad(loss, features, retain_graph=True)
            getattr(self, f"norm_{name}").add_(grad.norm())

    def factor(self, name: str) -> Tensor:
        return self.scales[name] * self.norm_ce / getattr(self, f"norm_{name}").clamp(min=1e-12)


class Student(nn.Module):
    """The student with all that is trained or remembered along with it, so that one checkpoint holds it."""

    def __init__(self, classifier: Classifier, scales: dict[str, float], adapters: RepresentationGraph | None) -> None:
        super().__init__()
        self.classifier, self.balance, self.graph = classifier, _Balance(scales), adapters


def kd_target(method: str, knowledge: Knowledge, temperature: float) -> Float[Tensor, "n c"]:
    """What plain distillation shows the student: the mean of all teachers, or one of them.

    Raises:
        ValueError: ``method`` is none of ``kd-uniform``, ``kd-best``, ``kd-NAME``.
    """
    probs, name = knowledge.probs(temperature), method.removeprefix("kd-")
    if name == "uniform":
        return probs.mean(1)
    name = knowledge.best_teacher() if name == "best" else name
    if name not in knowledge.teachers or not method.startswith("kd-"):
        known = [*GRAPHS, "kd-best", "kd-uniform", *(f"kd-{t}" for t in knowledge.teachers)]
        raise ValueError(f"unknown method {method!r}: choose from {', '.join(known)}")
    return probs[:, knowledge.teachers.index(name)]


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
    checkpoint: Path | None = None,
    progress: str | None = None,
) -> tuple[Student, list[dict[str, float]]]:
    """Trains one student: ``L = CE(labelled) + lambda_l L_logits + lambda_r ramp(t) L_repr``.

    Every step sees a batch of all training clips, on which the teachers speak, and a batch of
    labelled ones; ``labels`` fills the place of the former with labelled clips, so that all methods
    take the same number of steps on the same number of clips.

    Args:
        method: ``labels``, ``kd-best`` (the teacher best out of fold), ``kd-NAME`` (that one),
            ``kd-uniform``, ``logits-graph``, ``representation-graph``, ``both-graphs``, or
            ``both-shuffled`` (the control, whose ``knowledge`` and ``edges`` come shuffled).
        knowledge: what the teachers say.
        edges: learned weights and consensus over time.
        videos: the set.
        view: how clips are taken.
        cfg: student, schedule and graphs.
        seed: of initialisation, batches and views.

    Returns:
        The student and one row of logged means an epoch.

    Raises:
        ValueError: unknown method.
    """
    rows, labelled = videos.training_rows, videos.rows("train")
    torch.manual_seed(seed)
    classifier = Classifier(build_backbone(cfg.student), len(videos.label_names))
    logits_graph, representation_graph = build_graphs(knowledge, classifier.backbone.dim, rows, cfg)
    use = GRAPHS.get(method, ("kd",))
    scales = {"logits": cfg.logits_scale, "repr": cfg.representation_scale, "kd": cfg.logits_scale}
    adapters = representation_graph if "repr" in use else None
    student = Student(classifier, {name: scales[name] for name in use}, adapters).to(device)
    softened = kd_target(method, knowledge, cfg.temperature) if use == ("kd",) else knowledge.probs(cfg.temperature)
    logits_graph.to(device)
    now = {"moment": 0, "first": True, "ramp": 0.0}

    def on_epoch(epoch: int) -> dict[str, float]:
        progress = epoch / cfg.schedule.epochs
        now.update(moment=edges.at(progress), first=epoch == 0, ramp=min(1.0, 5 * (progress + 1 / cfg.schedule.epochs)))
        return {}

    def distillation(picked: Tensor, logits: Tensor, features: Tensor) -> dict[str, Tensor]:
        losses, moment = {}, now["moment"]
        if use == ("kd",):
            losses["kd"] = kd_loss(logits, softened[picked].to(device), cfg.temperature)
        consensus = edges.consensus[moment, picked].to(device)
        if "logits" in use:
            weights = edges.teachers[moment, picked].to(device)
            losses["logits"] = logits_graph.loss(logits, softened[picked].to(device), weights, consensus)
        if "repr" in use:
            shown = [f[picked].to(device) for f in knowledge.features]
            losses["repr"] = representation_graph.loss(features, shown, consensus, edges.pairs[moment].to(device))
        return losses

    def step(picked: Tensor, rng: Generator) -> tuple[Tensor, dict[str, Tensor | float]]:
        count = cfg.labelled_batch
        draw = labelled[torch.randint(len(labelled), (count + len(picked),), generator=rng)]
        picked = draw if method == "labels" else torch.cat([draw[:count], picked])
        supervised = len(picked) if method == "labels" else count
        clips = augment(clips_of(videos.batch(picked).to(device), view.length, view.stride, rng), rng)
        logits, features = classifier(clips)
        ce = cross_entropy(logits[:supervised], videos.labels[picked[:supervised]].to(device))
        losses = distillation(picked, logits, features)
        if now["first"]:
            student.balance.measure({"ce": ce, **losses}, features)
        total = ce
        for name, loss in losses.items():
            total = total + student.balance.factor(name) * (now["ramp"] if name == "repr" else 1.0) * loss
        return total, {"ce": ce, **losses}

    history = train(student, step, rows, cfg.schedule, seed=seed, checkpoint=checkpoint, on_epoch=on_epoch, progress=progress)
    return student, history

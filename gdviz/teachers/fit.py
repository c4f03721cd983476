"""Teachers: pre-trained on a self-supervised task, fitted on the labelled part with cross-fitting, then frozen."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import torch
from jaxtyping import Float
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from gdviz.config import Schedule, Teachers, View
from gdviz.core import distributed as ranks
from gdviz.core.loop import Bookkeeping, train
from gdviz.data.clips import augment, to_float
from gdviz.data.videos import VideoSet
from gdviz.teachers.backbones import Backbone, Classifier, build_backbone
from gdviz.teachers.own import TappedClassifier, own_teacher
from gdviz.teachers.pretext import TASKS
from gdviz.teachers.readout import device_of, predict, read_out, stamp_of


@dataclass(frozen=True)
class TeacherOutputs:
    """What distillation needs to know of a frozen teacher, for every video of the set.

    Labelled training videos have *out-of-fold* logits and ``held_features``: those of a copy of the
    teacher that was fitted without that video's fold. ``features`` are all the teacher's own, because
    those of different copies live in different spaces.
    """

    logits: Float[Tensor, "n c"]
    features: Float[Tensor, "n d"]
    held_features: Float[Tensor, "n d"]
    fold: Tensor  # (n,) fold of a labelled training video, else -1
    temperature: Tensor  # () calibration temperature

    def tensors(self) -> dict[str, Tensor]:
        return dict(vars(self))


def pretrain(
    task_name: str,
    cfg: Teachers,
    view: View,
    videos: VideoSet,
    *,
    seed: int,
    device: str = "cpu",
    **bookkeeping: Unpack[Bookkeeping],
) -> tuple[Backbone, nn.Module, list[dict[str, float]]]:
    """Trains a backbone on a pretext task over all training videos, labels unseen.

    Returns:
        The backbone, the task with its head, and the history.

    Raises:
        ValueError: unknown task or backbone.
    """
    if task_name not in TASKS:
        raise ValueError(f"unknown pretext task {task_name!r}: choose from {', '.join(TASKS)}")
    torch.manual_seed(seed)
    backbone = build_backbone(cfg.backbone)
    task = TASKS[task_name](backbone.dim, view.length, view.stride)
    both = nn.ModuleDict({"backbone": backbone, "task": task}).to(device)

    def step(rows: Tensor, rng: Generator) -> tuple[Tensor, dict[str, Tensor | float]]:
        with ranks.dealt(rng):
            inputs, target = task.views(to_float(videos.batch(ranks.deal(rows)).to(device)), rng)
        loss, metric = task(backbone, inputs, target)
        return loss, {task.metric: metric}

    rows = videos.training_rows
    history = train(both, step, rows, cfg.pretrain, seed=seed, **bookkeeping)
    return backbone, task, history


def build_teacher(name: str, cfg: Teachers, classes: int) -> Classifier | TappedClassifier:
    """A teacher as it is before any training: a pretext task's, or MODULE:FUNCTION's (:func:`gdviz.teachers.own.own_teacher`)."""
    backbone = own_teacher(name) if ":" in name else build_backbone(cfg.backbone)
    return backbone if isinstance(backbone, TappedClassifier) else Classifier(backbone, classes)


def fit(
    backbone: Backbone | TappedClassifier,
    videos: VideoSet,
    rows: Tensor,
    view: View,
    schedule: Schedule,
    *,
    seed: int,
    checkpoint: Path | None = None,
) -> Classifier | TappedClassifier:
    """Fine-tunes a copy of ``backbone`` with a new linear layer on the labelled ``rows``; one that has its classes stays as it is.

    Raises:
        ValueError: such a one answers in another number of classes.
    """
    if isinstance(backbone, TappedClassifier):
        answers = predict(backbone, videos, rows[:1], view)[0].shape[1]
        if answers != len(videos.label_names):
            raise ValueError(
                f"logits={backbone.logits!r}: {answers} classes, but the data has {len(videos.label_names)}; tap features only"
            )
        return backbone
    torch.manual_seed(seed)
    device = device_of(backbone)
    model = Classifier(copy.deepcopy(backbone), len(videos.label_names)).to(device)

    def step(rows: Tensor, rng: Generator) -> tuple[Tensor, dict[str, Tensor | float]]:
        own = ranks.deal(rows)
        with ranks.dealt(rng):
            clips = augment(
                to_float(videos.clips(own, view.length, view.stride, rng).to(device)).transpose(
                    1, 2
                ),
                rng,
            )
        return cross_entropy(model(clips)[0], videos.labels[own].to(device)), {}

    train(model, step, rows, schedule, seed=seed, checkpoint=checkpoint)
    return model


def calibration_temperature(logits: Float[Tensor, "n c"], labels: Tensor) -> Tensor:
    """The t that minimises the cross-entropy of ``logits / t`` (Guo et al. 2017), from a grid in [0.25, 16]."""
    grid = torch.logspace(-2, 4, 121, base=2.0)
    losses = torch.stack([cross_entropy(logits / t, labels) for t in grid])
    return grid[losses.argmin()]


def folds_of(labels: Tensor, groups: list[str], folds: int, seed: int) -> Tensor:
    """Fold number of every labelled video; a group stays in one fold, classes are balanced."""
    folds = min(folds, int(labels.bincount().min()), len(set(groups)))
    if folds < 2:
        raise ValueError("cross-fitting needs two labelled videos a class, in different groups")
    # When every video is its own group the plain splitter balances classes exactly.
    if len(set(groups)) == len(groups):
        parts = StratifiedKFold(folds, shuffle=True, random_state=seed).split(labels, labels)
    else:
        parts = StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(
            labels, labels, groups
        )
    fold = torch.empty(len(labels), dtype=torch.long)
    for number, (_, held) in enumerate(parts):
        fold[torch.from_numpy(held)] = number
    return fold


def outputs_of(
    backbone: Backbone | TappedClassifier,
    videos: VideoSet,
    cfg: Teachers,
    view: View,
    *,
    seed: int,
    folder: Path | None = None,
) -> tuple[Classifier | TappedClassifier, TeacherOutputs]:
    """Fits the teacher's head and reads it out on every clip of every video, labelled ones by cross-fitting.

    With ``folder``, the fits resume from checkpoints ``fit-*.ckpt`` there, which the caller removes, and outputs
    by clip stay in its ``clips/`` (:mod:`gdviz.teachers.readout`). Outputs are rounded to half precision, kept or not.
    """
    train_rows = videos.rows("train")
    labels = videos.labels[train_rows]
    fold = torch.full((len(videos.splits),), -1)
    fold[train_rows] = folds_of(labels, [videos.groups[i] for i in train_rows], cfg.folds, seed)
    parts = [
        train_rows,
        *(train_rows[fold[train_rows] != number] for number in range(int(fold.max()) + 1)),
    ]
    model, *without = (
        fit(
            backbone,
            videos,
            rows,
            view,
            cfg.fit,
            seed=seed,
            checkpoint=folder and folder / f"fit-{number}.ckpt",
        )
        for number, rows in enumerate(parts)
    )

    def say(rows: Tensor) -> dict[str, Tensor]:
        logits, features = predict(model, videos, rows, view, each=True)
        held = features.clone()
        for number, judge in enumerate(without):
            own = fold[rows] == number
            if own.any():
                logits[own], held[own] = predict(judge, videos, rows[own], view, each=True)
        return {"logits": logits, "features": features, "held": held[fold[rows] >= 0]}

    clips = read_out(
        say, videos, view, folder and folder / "clips", stamp_of([model, *without], videos, view)
    )
    logits, features = clips.mean("logits"), clips.mean("features")
    held_features = features.clone()
    held_features[fold >= 0] = clips.mean("held")
    temperature = calibration_temperature(logits[train_rows], labels)
    return model, TeacherOutputs(logits, features, held_features, fold, temperature)

"""Teachers: pre-trained on a self-supervised task, fitted on the labelled part with cross-fitting, then frozen."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Unpack

import torch
from jaxtyping import Float
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from gdviz import ranks
from gdviz.config import Schedule, Teachers, View
from gdviz.data.sampling import augment, clips_of, multi_views, to_float
from gdviz.data.videos import VideoSet
from gdviz.models import Backbone, Classifier, build_backbone
from gdviz.pretext import TASKS
from gdviz.tap import TappedClassifier
from gdviz.training import Bookkeeping, train


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


def device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


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


def fit(
    backbone: Backbone | TappedClassifier, videos: VideoSet, rows: Tensor, view: View, schedule: Schedule, *, seed: int
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
            clips = augment(clips_of(videos.batch(own).to(device), view.length, view.stride, rng), rng)
        return cross_entropy(model(clips)[0], videos.labels[own].to(device)), {}

    train(model, step, rows, schedule, seed=seed)
    return model


@torch.no_grad()
def predict(
    model: Classifier | TappedClassifier, videos: VideoSet, rows: Tensor, view: View, batch: int = 128, *, crops: int = 1
) -> tuple[Tensor, Tensor]:
    """Logits [n, c] and features [n, d] of ``rows``, means over ``view.clips`` clips a video and ``crops`` of each; ranks share them."""
    model.eval()
    device = device_of(model)

    def average(part: Tensor) -> list[Tensor]:
        frames = videos.batch(part).to(device)
        seen = [model(clips) for clips in multi_views(frames, view.length, view.stride, view.clips, crops)]
        return [torch.stack(outputs).mean(0) for outputs in zip(*seen, strict=True)]

    even = rows[torch.arange(math.ceil(len(rows) / ranks.world()) * ranks.world()) % len(rows)]  # the last ones may be read twice
    seen = zip(*map(average, ranks.deal(even).split(batch)), strict=True)
    logits, features = (ranks.gather(torch.cat(parts).float())[: len(rows)].cpu() for parts in seen)
    return logits, features


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
        parts = StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(labels, labels, groups)
    fold = torch.empty(len(labels), dtype=torch.long)
    for number, (_, held) in enumerate(parts):
        fold[torch.from_numpy(held)] = number
    return fold


def outputs_of(
    backbone: Backbone | TappedClassifier, videos: VideoSet, cfg: Teachers, view: View, *, seed: int
) -> tuple[Classifier | TappedClassifier, TeacherOutputs]:
    """Fits the teacher's head and reads it out on every video, labelled ones by cross-fitting."""
    train_rows = videos.rows("train")
    labels = videos.labels[train_rows]
    model = fit(backbone, videos, train_rows, view, cfg.fit, seed=seed)
    logits, features = predict(model, videos, torch.arange(len(videos.splits)), view)
    held_features = features.clone()
    fold = folds_of(labels, [videos.groups[i] for i in train_rows], cfg.folds, seed)
    for number in range(int(fold.max()) + 1):
        held = train_rows[fold == number]
        without = fit(backbone, videos, train_rows[fold != number], view, cfg.fit, seed=seed)
        logits[held], held_features[held] = predict(without, videos, held, view)
    everywhere = torch.full((len(videos.splits),), -1)
    everywhere[train_rows] = fold
    temperature = calibration_temperature(logits[train_rows], labels)
    return model, TeacherOutputs(logits, features, held_features, everywhere, temperature)

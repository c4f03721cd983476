"""Teachers: pre-trained on a self-supervised task, fitted on the labelled part, then frozen."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Int
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from gdviz.config import Schedule, Teachers, View
from gdviz.core import distributed
from gdviz.core.files import UserError, save_tensors
from gdviz.core.loop import Bookkeeping, train
from gdviz.data.clips import augment, to_float
from gdviz.data.videos import VideoSet
from gdviz.teachers.backbones import Backbone, build_backbone
from gdviz.teachers.bank import Readout, as_cases, device_of, predict, read_out
from gdviz.teachers.own import OwnBackbone, build_classifier, find_source


def pretrain(
    name: str,
    cfg: Teachers,
    view: View,
    videos: VideoSet,
    *,
    seed: int,
    device: str = "cpu",
    keep: Bookkeeping = Bookkeeping(),
) -> tuple[Backbone, nn.Module, list[dict[str, float]]]:
    """Train a backbone on a pretext task over all training videos; labels stay unseen.

    ``name`` is of a task, or MODULE:NAME of your own. Return the backbone, the task with its head,
    and one row of logged means an epoch.

    Raises:
        UserError: no such task or backbone.
    """
    source = find_source(name)
    if isinstance(source, OwnBackbone):
        raise UserError(f"{name}: is a network that is trained already; fit it, or name a task")
    torch.manual_seed(seed)
    backbone = build_backbone(cfg.backbone)
    task = source(backbone.dim, view.length, view.stride)
    both = nn.ModuleDict({"backbone": backbone, "task": task}).to(device)

    def step(rows: Tensor, rng: Generator, epoch: int) -> tuple[Tensor, dict[str, Tensor | float]]:
        rng = distributed.own_generator(rng)
        clips = to_float(videos.batch(distributed.deal(rows), rng).to(device))
        with torch.autocast(clips.device.type, enabled=False):  # places of pixels need all digits
            inputs, target = task.views(clips, rng)
        loss, metric = task(backbone, inputs, target)
        return loss, {task.metric: metric}

    rows, schedule = videos.training_rows, cfg.pretrain
    history = train(both, step, rows, schedule, seed=seed, compiled=[backbone.trunk], keep=keep)
    return backbone, task, history


def fit(
    backbone: Backbone,
    videos: VideoSet,
    rows: Int[Tensor, " n"],
    view: View,
    schedule: Schedule,
    *,
    seed: int,
    checkpoint: Path | None = None,
) -> nn.Module:
    """Fine-tune a copy of ``backbone`` with a new linear head on the labelled ``rows``.

    A network that answers in the data's classes already stays as it is.

    Raises:
        UserError: such a network answers in another number of classes.
    """
    classes = len(videos.label_names)
    if isinstance(backbone, OwnBackbone) and backbone.fitted:
        return build_classifier(backbone, classes)
    torch.manual_seed(seed)
    device, backbone = device_of(backbone), copy.deepcopy(backbone)
    model = build_classifier(backbone, classes).to(device)

    def step(rows: Tensor, rng: Generator, epoch: int) -> tuple[Tensor, dict[str, Tensor | float]]:
        own, rng = distributed.deal(rows), distributed.own_generator(rng)
        clips = to_float(videos.clips(own, view.length, view.stride, rng).to(device))
        logits, _ = model(augment(clips.transpose(1, 2), rng))
        return cross_entropy(*as_cases(logits, videos.labels[own].to(device))), {}

    keep = Bookkeeping(checkpoint=checkpoint)
    train(model, step, rows, schedule, seed=seed, compiled=[backbone.trunk], keep=keep)
    return model


def folds_of(labels: Int[Tensor, "n ..."], groups: list[str], folds: int, seed: int) -> Tensor:
    """Return the fold of every labelled video; a group stays in one fold, classes are balanced.

    Several labels a video are not balanced.

    Raises:
        ValueError: a class has one video only, or all videos are of one group.
    """
    labels = labels if labels.ndim == 1 else torch.zeros(len(labels), dtype=torch.long)
    folds = min(folds, int(labels.bincount().min()), len(set(groups)))
    if folds < 2:
        raise ValueError("cross-fitting needs two labelled videos a class, in different groups")
    # When every video is its own group the plain splitter balances classes exactly.
    alone = len(set(groups)) == len(groups)
    splitter = StratifiedKFold if alone else StratifiedGroupKFold
    parts = splitter(folds, shuffle=True, random_state=seed)
    fold = torch.empty(len(labels), dtype=torch.long)
    for number, (_, held) in enumerate(parts.split(labels, labels, None if alone else groups)):
        fold[torch.from_numpy(held)] = number
    return fold


def fit_teacher(
    backbone: Backbone,
    videos: VideoSet,
    cfg: Teachers,
    view: View,
    *,
    seed: int,
    folder: Path | None = None,
    home: VideoSet | None = None,
) -> tuple[nn.Module, Readout]:
    """Fit a teacher on the labelled part and read it out on every clip of every video.

    For labelled videos a copy answers that was fitted without the video's fold. In ``folder`` fits
    resume from ``fit-*.ckpt``, for the caller to remove, and the readout stays in ``bank/``; None
    keeps it in memory. With ``home`` the teacher is fitted on those videos instead: it has seen no
    label of the set, and answers itself.
    """
    if home is not None:
        return _fit_at_home(backbone, videos, home, cfg, view, seed=seed, folder=folder)
    rows, fold = videos.rows("train"), torch.full((len(videos.splits),), -1)
    groups = [videos.groups[i] for i in rows]
    fold[rows] = folds_of(videos.labels[rows], groups, cfg.folds, seed)
    models = []
    for number in range(-1, int(fold.max()) + 1):  # the teacher itself leaves out no fold
        checkpoint = folder and folder / f"fit-{number + 1}.ckpt"
        part = rows[fold[rows] != number]
        models.append(fit(backbone, videos, part, view, cfg.fit, seed=seed, checkpoint=checkpoint))
    return models[0], read_out(models, fold, videos, view, folder and folder / "bank")


def _fit_at_home(
    backbone: Backbone,
    videos: VideoSet,
    home: VideoSet,
    cfg: Teachers,
    view: View,
    *,
    seed: int,
    folder: Path | None,
) -> tuple[nn.Module, Readout]:
    own, checkpoint = home.rows("train"), folder and folder / "fit-0.ckpt"
    model = fit(backbone, home, own, view, cfg.fit, seed=seed, checkpoint=checkpoint)
    fold = torch.full((len(videos.splits),), -1).index_fill(0, videos.rows("train"), 0)
    readout = read_out([model, model], fold, videos, view, folder and folder / "bank")
    if len(unlabelled := home.rows("unlabelled")) < 2:  # nothing tells then what is foreign
        return model, readout
    known = predict(model, home, unlabelled, view)[1].mean(1)
    if folder and distributed.first():
        save_tensors(folder / "bank" / "home.safetensors", {"features": known})
    return model, replace(readout, home=known)


def build_teacher(name: str, cfg: Teachers, classes: int) -> nn.Module:
    """Build a teacher as it is before any training; a network of your own is there already."""
    source = find_source(name)
    backbone = source if isinstance(source, OwnBackbone) else build_backbone(cfg.backbone)
    return build_classifier(backbone, classes)

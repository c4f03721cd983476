"""Teachers are fitted without the labels that they are judged by."""

from dataclasses import replace

import pytest
import torch
from conftest import TINY, memory_set
from torch import Generator

from gdviz.config import Teachers, View
from gdviz.core.files import UserError
from gdviz.teachers import bank as banks
from gdviz.teachers import fit as fits
from gdviz.teachers.backbones import build_backbone
from gdviz.teachers.fit import fit_teacher, folds_of, pretrain
from gdviz.teachers.pretext import TASKS


def test_folds_balance_classes_and_keep_groups_together():
    labels = torch.arange(36) % 3
    fold = folds_of(labels, [str(i) for i in range(36)], 3, seed=0)
    assert all(labels[fold == f].bincount().tolist() == [4, 4, 4] for f in range(3))
    fold = folds_of(labels, [str(i // 4) for i in range(36)], 3, seed=0)
    assert fold.unique().tolist() == [0, 1, 2]
    assert all(len(fold[i : i + 4].unique()) == 1 for i in range(0, 36, 4))
    with pytest.raises(ValueError, match="cross-fitting needs two"):
        folds_of(torch.tensor([0, 0, 1]), ["a", "b", "c"], 3, seed=0)


def test_no_labelled_clip_is_judged_by_a_teacher_that_saw_its_label(monkeypatch):
    """`fit` keeps the rows it was given, and `predict` says whether a row was among them."""
    pixels = torch.zeros(12, 2, 4, 4, 3, dtype=torch.uint8).numpy()
    videos = memory_set(pixels, [i % 3 for i in range(12)], ["train"] * 9 + ["test"] * 3)

    class Fitted(torch.nn.Module):
        def __init__(self, rows):
            super().__init__()
            self.rows = rows

    def knows(model, videos, rows, view):
        seen = torch.isin(rows, model.rows).float()[:, None, None]
        return seen.expand(-1, 2, 3).clone(), seen

    monkeypatch.setattr(fits, "fit", lambda net, videos, rows, view, cfg, **_: Fitted(rows))
    monkeypatch.setattr(banks, "stamp_of", lambda *_: "")
    monkeypatch.setattr(banks, "predict", knows)
    model, readout = fit_teacher(build_backbone("tiny4"), videos, Teachers(folds=3), View(), seed=0)
    every = torch.arange(12)
    assert model.rows.tolist() == list(range(9))  # the teacher itself is fitted on all
    features = readout.at("features", every)
    assert features[:9].all() and not features[9:].any()
    assert not readout.at("logits", every).any() and not readout.at("held", every).any()
    assert sorted(readout.fold.tolist()) == [-1] * 3 + [0] * 3 + [1] * 3 + [2] * 3


def test_pretraining_sees_no_label():
    rng = Generator().manual_seed(0)
    pixels = torch.randint(256, (16, 12, 16, 16, 3), dtype=torch.uint8, generator=rng).numpy()
    videos = memory_set(pixels, [i % 2 for i in range(16)], ["train"] * 8 + ["unlabelled"] * 8)
    other = replace(videos, labels=1 - videos.labels)
    cfg = replace(TINY.teachers, pretrain=replace(TINY.teachers.pretrain, epochs=1))
    a, b = (pretrain("order", cfg, TINY.view, v, seed=0) for v in (videos, other))
    assert a[2] == b[2]
    for name, value in a[0].state_dict().items():
        assert torch.equal(value, b[0].state_dict()[name])
    with pytest.raises(UserError, match="unknown task 'jigsaw'"):
        pretrain("jigsaw", cfg, TINY.view, videos, seed=0)


def test_views_are_made_in_full_precision(monkeypatch):
    seen, real = [], TASKS["registration"].views

    def spy(task, videos, rng):
        seen.append(torch.is_autocast_enabled("cpu"))
        return real(task, videos, rng)

    monkeypatch.setattr(TASKS["registration"], "views", spy)
    pixels = torch.randint(255, (8, 8, 16, 16, 3), dtype=torch.uint8).numpy()
    videos = memory_set(pixels, [0, 1] * 4, ["train"] * 7 + ["test"])
    short = replace(TINY.teachers.pretrain, epochs=1, min_steps=1, precision="bf16")
    cfg = replace(TINY.teachers, pretrain=short)
    pretrain("registration", cfg, View(size=16, frames=8, length=4), videos, seed=0)
    assert seen and not any(seen)


def test_a_teacher_with_a_home_is_fitted_there_alone_and_asked_of_all(monkeypatch):
    rng = Generator().manual_seed(0)
    pixels = torch.randint(255, (16, 8, 16, 16, 3), generator=rng, dtype=torch.uint8).numpy()
    labels, splits = [0, 1] * 4, ["train"] * 4 + ["unlabelled"] * 3 + ["test"]
    videos = memory_set(pixels[:8], labels, splits)
    home = memory_set(pixels[8:], labels, splits)
    seen, real = [], fits.fit

    def spy(backbone, where, rows, *rest, **how):
        seen.append((where.fingerprint, rows.tolist()))
        return real(backbone, where, rows, *rest, **how)

    monkeypatch.setattr(fits, "fit", spy)
    backbone, view = build_backbone("tiny4"), View(size=16, frames=8, length=4)
    _, readout = fit_teacher(backbone, videos, TINY.teachers, view, seed=0, home=home)
    assert seen == [(home.fingerprint, home.rows("train").tolist())]
    assert readout.home.shape[0] == len(home.rows("unlabelled"))
    train = videos.rows("train")
    assert (readout.fold[train] == 0).all() and len(readout.fold) == len(videos.splits)
    assert torch.equal(readout.at("held", train), readout.at("features", train))
    hidden = memory_set(pixels[8:], labels, ["train"] * 7 + ["test"])  # nothing without a label
    _, readout = fit_teacher(backbone, videos, TINY.teachers, view, seed=0, home=hidden)
    assert readout.home is None

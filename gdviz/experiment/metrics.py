"""What is measured: accuracy, calibration, frozen features, baselines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.model_selection import (
    GridSearchCV,
    StratifiedGroupKFold,
    StratifiedShuffleSplit,
    cross_val_score,
)
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from gdviz.core.names import split_home
from gdviz.data.clips import to_float
from gdviz.data.videos import VideoSet

AT_ONCE = 16  # videos that are held as floats
SHOTS = 5  # rows a class that a few-shot probe learns from
FRAMES = 2**15  # single frames that a baseline learns from, at most; but one of each video


def accuracy(logits: Float[Tensor, "n c"], labels: Int[Tensor, "n ..."]) -> float:
    """Return the share of rows whose largest logit is the label.

    Where rows have several labels, it is one of them; rows without any are left out.
    """
    first = logits.argmax(1)
    if labels.ndim == 1:
        return (first == labels).float().mean().item()
    some = (labels > 0).any(1)
    return labels[some].gather(1, first[some, None]).float().mean().item()


def average_precision(
    scores: Float[Tensor, "n c"], labels: Int[Tensor, "n c"]
) -> Float[Tensor, " c"]:
    """Return the area under each class's precision-recall steps; NaN for a class that no row shows.

    Its mean is mAP, as CCV reports it.
    """
    found = [
        average_precision_score(of, by) if of.any() else float("nan")
        for of, by in zip(labels.T, scores.T, strict=True)
    ]
    return torch.tensor(found)


def scores(logits: Float[Tensor, "n c"], labels: Int[Tensor, "n ..."]) -> dict[str, float]:
    """Return accuracy, and where rows have several labels mAP."""
    found = {"accuracy": accuracy(logits, labels)}
    if labels.ndim == 2:
        found["mAP"] = float(average_precision(logits, labels).nanmean())
    return found


def linear_probe(
    features: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    groups: Sequence[str],
    test_features: Float[Tensor, "m d"],
    test_labels: Int[Tensor, " m"],
) -> float:
    """Return the test accuracy of logistic regression on frozen, standardised features.

    Its L2 penalty is the best of seven by cross-validation in which a group stays in one fold.
    Raise ValueError if a class has one row only, or all rows are of one group.
    """
    folds = min(3, int(labels.bincount()[labels.unique()].min()), len(set(groups)))
    if folds < 2:
        raise ValueError("linear_probe: labels need two rows a class, in different groups")
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    penalties = {"logisticregression__C": [10.0**k for k in range(-5, 2)]}
    search: Any = GridSearchCV(probe, penalties, cv=StratifiedGroupKFold(folds))
    search.fit(features, labels, groups=groups)
    return search.score(test_features, test_labels)


def retrieval(
    gallery: Float[Tensor, "n d"],
    gallery_labels: Int[Tensor, " n"],
    query: Float[Tensor, "m d"],
    query_labels: Int[Tensor, " m"],
    ks: Sequence[int],
) -> dict[int, float]:
    """Return R@k: the share of queries with a row of their class among the k nearest by cosine.

    Source: Xu et al. 2019, section 4.4. Raise ValueError if the gallery holds fewer than k rows.
    """
    search = NearestNeighbors(n_neighbors=max(ks), metric="cosine", algorithm="brute").fit(gallery)
    near = torch.from_numpy(search.kneighbors(query, return_distance=False))
    hit = gallery_labels[near] == query_labels[:, None]  # (m, k)
    return {k: hit[:, :k].any(1).float().mean().item() for k in ks}


def at_home(teachers: Sequence[str], videos: VideoSet) -> Float[Tensor, "n k"]:
    """Return 1 where a teacher TASK@DOMAIN is at home, shared by all of that home; rows sum to 1.

    Uniform where no teacher is. For audits and upper bounds: nothing else knows the domains.
    """
    homes = [split_home(name)[1] for name in teachers]
    domains = videos.audit.get("domain", ("",) * len(videos.splits))
    known = torch.tensor([[home == domain for home in homes] for domain in domains]).float()
    known[known.sum(1) == 0] = 1
    return known / known.sum(1, keepdim=True)


def target_accuracy(
    videos: VideoSet, probs: Float[Tensor, "n k c"], weights: Float[Tensor, "n k"]
) -> float:
    """Return how often the mixture ``sum_k w_nk p_nk`` is right on unlabelled videos, by audit."""
    names = list(videos.label_names)
    motion = videos.audit.get("motion", ())
    rows = [i for i in videos.rows("unlabelled").tolist() if motion and motion[i] in names]
    truth = torch.tensor([names.index(motion[i]) for i in rows])
    mixture = (weights[rows, :, None] * probs[rows]).sum(1)
    return accuracy(mixture, truth) if rows else float("nan")


def audit(
    videos: VideoSet, logits: Float[Tensor, "n c"], features: Float[Tensor, "n d"]
) -> dict[str, float]:
    """Return what the embedded set's audit tells of a network: one number a column.

    ``accuracy: DOMAIN`` on test videos of that domain. On videos of motions that no label names:
    ``unnamed R@1``, the share whose nearest neighbour by cosine among the others shows the same
    motion, and ``unnamed probe``, few-shot accuracy (:func:`few_shot`).
    """
    test, domains = videos.rows("test"), videos.audit.get("domain", ())
    found = {}
    for domain in sorted({domains[i] for i in test} if domains else ()):
        rows = [i for i in test.tolist() if domains[i] == domain]
        found[f"accuracy: {domain}"] = accuracy(logits[rows], videos.labels[rows])
    probe = videos.rows("probe")
    if len(probe) and "motion" in videos.audit:  # not of somebody's own list
        motions = [videos.audit["motion"][i] for i in probe]
        codes = torch.tensor([sorted(set(motions)).index(m) for m in motions])
        x = features[probe]
        search = NearestNeighbors(n_neighbors=1, metric="cosine", algorithm="brute").fit(x)
        near = torch.from_numpy(search.kneighbors(return_distance=False)[:, 0])
        found["unnamed R@1"] = (codes[near] == codes).float().mean().item()
        found["unnamed probe"] = few_shot(x, codes)
    return found


def few_shot(features: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> float:
    """Return the accuracy of logistic regression (C = .1) on five rows a class, others tested.

    Features are standardised. Mean over 30 episodes drawn by a fixed seed.
    """
    size = SHOTS * len(labels.unique())
    splitter = StratifiedShuffleSplit(30, train_size=size, random_state=0)
    x = StandardScaler().fit_transform(features)
    probe = LogisticRegression(C=0.1, max_iter=1000)
    return float(cross_val_score(probe, x, labels.numpy(), cv=splitter).mean())


def calibration_error(
    probs: Float[Tensor, "n c"], labels: Int[Tensor, " n"], bins: int = 10
) -> float:
    """Return ``sum_b |b|/n |accuracy_b - confidence_b|``, equal bins (Guo et al. 2017, eq. 3)."""
    confidence, guess = probs.max(1)
    right = (guess == labels).float()
    which = (confidence * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins).index_add_(0, which, right - confidence)
    return (gap.abs().sum() / len(labels)).item()


def shortcut_baselines(videos: VideoSet) -> dict[str, float]:
    """Return test accuracies of classifiers that see no motion, fitted on the labelled part.

    - ``metadata``: 5 nearest neighbours on frame count, width, height, frame rate and file size.
    - ``single-frame``: logistic regression on one frame of 12 x 12 pixels, the middle one; trained
      on every fourth, or fewer of a large set (``FRAMES``).
    - ``mean-frame``: the same on the mean of the frames.
    - ``chance``: the largest class's share of the test part.

    Where videos have several labels each class has a classifier of its own.

    A data set on which these do well can be solved without motion: report them with any accuracy.
    """
    train, test = videos.rows("train"), videos.rows("test")
    y_train, y_test = videos.labels[train], videos.labels[test]
    fourth, _, mean = _small(videos, train)
    _, middle, test_mean = _small(videos, test)
    neighbours = make_pipeline(StandardScaler(), KNeighborsClassifier(min(5, len(train))))
    linear = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))

    def score(model: Any, x: Tensor, y: Tensor, x_test: Tensor) -> float:
        if y.ndim == 1:
            return model.fit(x, y).score(x_test, y_test)
        each = OneVsRestClassifier(model).fit(x, y)
        return accuracy(torch.from_numpy(each.predict_proba(x_test)), y_test)

    often = y_test.bincount() / len(y_test) if y_test.ndim == 1 else (y_test > 0).float().mean(0)
    every = y_train.repeat_interleave(fourth.shape[1], 0)
    return {
        "chance": often.max().item(),
        "metadata": score(neighbours, videos.metadata[train], y_train, videos.metadata[test]),
        "single-frame": score(linear, fourth.flatten(0, 1), every, middle),
        "mean-frame": score(linear, mean, y_train, test_mean),
    }


def _small(videos: VideoSet, rows: Tensor) -> tuple[Tensor, ...]:
    """Frames of 12 x 12 pixels: every fourth one or fewer, the middle one, and the mean of all."""
    found, step = [], max(4, -(-len(rows) * videos.pixels.shape[1] // videos.windows // FRAMES))
    for part in rows.split(AT_ONCE):
        frames = to_float(videos.batch(part))  # (b, f, 3, h, w)
        pooled = nn.functional.adaptive_avg_pool2d(frames.flatten(0, 1), 12)
        small = pooled.unflatten(0, frames.shape[:2]).flatten(2)
        kept = small[:, ::step].clone(), small[:, small.shape[1] // 2].clone()  # not views of all
        found.append((*kept, small.mean(1)))
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))

"""What is measured: accuracy, calibration, frozen features, size, speed, baselines."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from statistics import median

import torch
from jaxtyping import Bool, Float, Int
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gdviz.config import View
from gdviz.data.clips import to_float
from gdviz.data.videos import VideoSet
from gdviz.teachers.bank import device_of

AT_ONCE = 64  # videos that are held as floats


def accuracy(logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"]) -> float:
    """Return the share of rows whose largest logit is the label."""
    return (logits.argmax(1) == labels).float().mean().item()


def per_class_accuracy(
    logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"]
) -> Float[Tensor, " c"]:
    """Return the accuracy on each class's rows; NaN for a class without rows."""
    right, classes = (logits.argmax(1) == labels).float(), logits.shape[1]
    total = right.new_zeros(classes).index_add_(0, labels, right)
    return total / labels.bincount(minlength=classes)


def linear_probe(
    features: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    groups: Sequence[str],
    test_features: Float[Tensor, "m d"],
    test_labels: Int[Tensor, " m"],
) -> float:
    """Return the test accuracy of logistic regression on frozen, standardised features.

    Its L2 penalty is the best of seven by cross-validation over ``features``; a group stays in
    one fold.

    Raises:
        ValueError: a class has one row only, or all rows are of one group.
    """
    folds = min(3, int(labels.bincount()[labels.unique()].min()), len(set(groups)))
    if folds < 2:
        raise ValueError("linear_probe: labels need two rows a class, in different groups")
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    penalties = {"logisticregression__C": [10.0**k for k in range(-5, 2)]}
    search = GridSearchCV(probe, penalties, cv=StratifiedGroupKFold(folds))
    search.fit(features, labels, groups=groups)
    return float(search.score(test_features, test_labels))


def retrieval(
    gallery: Float[Tensor, "n d"],
    gallery_labels: Int[Tensor, " n"],
    query: Float[Tensor, "m d"],
    query_labels: Int[Tensor, " m"],
    ks: Sequence[int] = (1, 5, 10, 20),
) -> dict[int, float]:
    """Return R@k: the share of queries with a row of their class among the k nearest by cosine.

    Source: Xu et al. 2019, section 4.4.

    Raises:
        ValueError: the gallery holds fewer than k rows.
    """
    if max(ks) > len(gallery):
        raise ValueError(f"ks={tuple(ks)}: the gallery holds {len(gallery)} clips; ask for fewer")
    search = NearestNeighbors(n_neighbors=max(ks), metric="cosine", algorithm="brute").fit(gallery)
    near = torch.from_numpy(search.kneighbors(query, return_distance=False))
    hit: Bool[Tensor, "m k"] = gallery_labels[near] == query_labels[:, None]
    return {k: hit[:, :k].any(1).float().mean().item() for k in ks}


def calibration_error(
    probs: Float[Tensor, "n c"], labels: Int[Tensor, " n"], bins: int = 10
) -> float:
    """Return ``sum_b |b|/n |accuracy_b - confidence_b|``, equal bins (Guo et al. 2017, eq. 3)."""
    confidence, guess = probs.max(1)
    right = (guess == labels).float()
    which = (confidence * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins).index_add_(0, which, right - confidence)
    return (gap.abs().sum() / len(labels)).item()


def footprint(
    model: nn.Module, view: View, *, repeats: int = 7, batch: int = 8
) -> dict[str, float]:
    """Return parameters, GFLOP a clip, and median latency in ms a clip on the model's device.

    FLOPs count multiplications and additions apart (2 a MAC).
    """
    device = device_of(model)
    clips = torch.zeros(batch, 3, view.length, view.size, view.size, device=device)
    model.eval()
    with torch.inference_mode():
        with FlopCounterMode(display=False) as counter:
            model(clips[:1])
        times = []
        for _ in range(repeats + 2):
            start = time.perf_counter()
            model(clips)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append((time.perf_counter() - start) / batch * 1e3)
    return {
        "params": sum(p.numel() for p in model.parameters()),
        "gflops": counter.get_total_flops() / 1e9,
        "latency_ms": median(times[2:]),  # the first two warm caches up
    }


def shortcut_baselines(videos: VideoSet) -> dict[str, float]:
    """Return test accuracies of classifiers that see no motion, fitted on the labelled part.

    - ``metadata``: 5 nearest neighbours on frame count, width, height, frame rate and file size.
    - ``single-frame``: logistic regression on one frame of 12 x 12 pixels, trained on every fourth
      frame of a video.
    - ``mean-frame``: the same on the mean of the frames.
    - ``chance``: the largest class's share of the test part.

    A data set on which these do well can be solved without looking at motion: report them next
    to any accuracy. Videos are read a few at a time.
    """
    train, test = videos.rows("train"), videos.rows("test")
    y_train, y_test = videos.labels[train], videos.labels[test]
    some, mean = map(torch.cat, zip(*_small(videos, train), strict=True))
    seen, test_mean = map(torch.cat, zip(*_small(videos, test, middle=True), strict=True))
    neighbours = make_pipeline(StandardScaler(), KNeighborsClassifier(min(5, len(train))))
    linear = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))

    neighbours.fit(videos.metadata[train], y_train)
    found = {"chance": y_test.bincount().max().item() / len(y_test)}
    found["metadata"] = neighbours.score(videos.metadata[test], y_test)
    linear.fit(some.flatten(0, 1), y_train.repeat_interleave(some.shape[1]))
    found["single-frame"] = linear.score(seen.flatten(1), y_test)
    found["mean-frame"] = linear.fit(mean, y_train).score(test_mean, y_test)
    return found


def _small(videos: VideoSet, rows: Tensor, middle: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
    """Frames of 12 x 12 pixels: every fourth one, or the middle one, and the mean of all."""
    for part in rows.split(AT_ONCE):
        frames = to_float(videos.batch(part))  # (b, f, 3, h, w)
        pooled = nn.functional.adaptive_avg_pool2d(frames.flatten(0, 1), 12)
        small = pooled.unflatten(0, frames.shape[:2]).flatten(2)
        at = small.shape[1] // 2
        yield small[:, at : at + 1] if middle else small[:, ::4], small.mean(1)

"""What is measured: accuracy, calibration, frozen features, latency and size, and the baselines that a data set must survive."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

import torch
from jaxtyping import Float
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gdviz.config import View
from gdviz.data.clips import to_float
from gdviz.data.videos import VideoSet


def accuracy(logits: Float[Tensor, "n c"], labels: Tensor) -> float:
    """Share of rows whose largest logit is the label."""
    return (logits.argmax(1) == labels).float().mean().item()


def per_class_accuracy(logits: Float[Tensor, "n c"], labels: Tensor) -> Float[Tensor, " c"]:
    """Share of each class's rows whose largest logit is it; NaN for a class without rows."""
    right = (logits.argmax(1) == labels).float()
    return right.new_zeros(logits.shape[1]).index_add_(0, labels, right) / labels.bincount(
        minlength=logits.shape[1]
    )


def linear_probe(
    features: Float[Tensor, "n d"],
    labels: Tensor,
    groups: Sequence[str],
    test_features: Float[Tensor, "m d"],
    test_labels: Tensor,
) -> float:
    """Test accuracy of multinomial logistic regression on frozen, standardised features.

    Its L2 penalty is the best of seven by cross-validation over ``features``; a group stays in one fold.

    Raises:
        ValueError: a class has one row only, or all rows are of one group.
    """
    folds = min(3, int(labels.bincount()[labels.unique()].min()), len(set(groups)))
    if folds < 2:
        raise ValueError("linear_probe: labels need two rows a class, in different groups")
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    search = GridSearchCV(
        probe,
        {"logisticregression__C": [10.0**k for k in range(-5, 2)]},
        cv=StratifiedGroupKFold(folds),
    )
    return float(search.fit(features, labels, groups=groups).score(test_features, test_labels))


def retrieval(
    gallery: Float[Tensor, "n d"],
    gallery_labels: Tensor,
    query: Float[Tensor, "m d"],
    query_labels: Tensor,
    ks: Sequence[int] = (1, 5, 10, 20),
) -> dict[int, float]:
    """R@k: share of queries with a clip of their class among their k nearest of the gallery, by cosine (Xu et al. 2019, section 4.4).

    Raises:
        ValueError: the gallery holds less than k clips.
    """
    if max(ks) > len(gallery):
        raise ValueError(
            f"ks={tuple(ks)}: the gallery holds {len(gallery)} clips; ask for no more neighbours than that"
        )
    near = (
        NearestNeighbors(n_neighbors=max(ks), metric="cosine", algorithm="brute")
        .fit(gallery)
        .kneighbors(query, return_distance=False)
    )
    hit = gallery_labels[torch.from_numpy(near)] == query_labels[:, None]  # (m, max k)
    return {k: hit[:, :k].any(1).float().mean().item() for k in ks}


def mean_average_precision(scores: Float[Tensor, "n c"], targets: Tensor) -> float:
    """Mean over classes of sum_k (recall_k - recall_k-1) precision_k, for videos of several classes or none.

    Args:
        scores: larger for what is likelier; only their order within a class counts.
        targets: zeros and ones [n, c]. A class that is never there has no precision and is left out.

    Raises:
        ValueError: no class is ever there.
    """
    there = targets.any(0)
    if not there.any():
        raise ValueError("mean average precision needs one positive or more: every target is zero")
    return float(
        average_precision_score(
            targets[:, there].numpy(), scores[:, there].numpy(), average="macro"
        )
    )


def calibration_error(probs: Float[Tensor, "n c"], labels: Tensor, bins: int = 10) -> float:
    """Expected calibration error: sum_b |b|/n |accuracy_b - confidence_b| over equal-width bins (Guo et al. 2017, eq. 3)."""
    confidence, guess = probs.max(1)
    right = (guess == labels).float()
    which = (confidence * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins).index_add_(0, which, right - confidence)
    return (gap.abs().sum() / len(labels)).item()


def footprint(
    model: nn.Module, view: View, *, repeats: int = 7, batch: int = 8
) -> dict[str, float]:
    """Parameters, GFLOP a clip, and median latency in ms a clip of one forward pass on the model's device.

    FLOPs count multiplications and additions apart (2 a MAC).
    """
    device = next(model.parameters()).device
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
    """Test accuracy of classifiers that see no motion, fitted on the labelled part.

    - ``metadata``: 5 nearest neighbours on frame count, width, height, frame rate and file size.
    - ``single-frame``: logistic regression on one frame, 12 x 12 pixels, trained on all frames of a clip.
    - ``mean-frame``: the same on the mean of the frames.
    - ``chance``: the largest class's share of the test part.

    A data set on which these do well can be solved without looking at motion: report them next to
    any accuracy.
    """
    train, test = videos.rows("train"), videos.rows("test")
    y_train, y_test = videos.labels[train], videos.labels[test]

    def small(rows: Tensor) -> Tensor:  # (n, f, d)
        frames = to_float(videos.batch(rows))
        return (
            nn.functional.adaptive_avg_pool2d(frames.flatten(0, 1), 12)
            .unflatten(0, frames.shape[:2])
            .flatten(2)
        )

    a, b = small(train), small(test)
    neighbours = make_pipeline(StandardScaler(), KNeighborsClassifier(min(5, len(train))))
    linear = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
    frames = a.shape[1]
    middle = frames // 2
    return {
        "chance": y_test.bincount().max().item() / len(y_test),
        "metadata": neighbours.fit(videos.metadata[train], y_train).score(
            videos.metadata[test], y_test
        ),
        "single-frame": linear.fit(
            a[:, ::4].flatten(0, 1), y_train.repeat_interleave(a[:, ::4].shape[1])
        ).score(b[:, middle], y_test),
        "mean-frame": linear.fit(a.mean(1), y_train).score(b.mean(1), y_test),
    }

"""Ground costs between classes: how wrong is it to say one class where another was meant.

Every function returns ``[C, C]``: symmetric, zero diagonal, **unit mean off the diagonal**. That is
the one normalisation used throughout (entries may exceed 1): with it ``eps`` and ``eta`` mean the
same whatever the cost was built from, and a guess at random costs about 1.

Sources: ours, except that distances between class prototypes as a ground cost go back to Frogner et
al. 2015 (learning with a Wasserstein loss).
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Metric = Literal["euclidean", "cosine"]


def check_cost(cost: Float[Tensor, "classes classes"]) -> Float[Tensor, "classes classes"]:
    """Return ``cost`` unchanged if it can serve as a ground cost.

    Raises:
        ValueError: if it is not square, finite, symmetric, non-negative and zero on the diagonal; the
            message says what to do.
    """
    if cost.ndim != 2 or cost.shape[0] != cost.shape[1]:
        raise ValueError(f"a ground cost is a square [C, C] matrix, got {tuple(cost.shape)}")
    if not bool(cost.isfinite().all()):
        raise ValueError(
            "the ground cost has NaN or infinite entries: look for classes without clips"
        )
    if bool((cost < 0).any()):
        raise ValueError(
            "the ground cost has negative entries: subtract similarities from their maximum"
        )
    scale = cost.abs().max().clamp(min=1e-30)
    if bool((cost.diagonal().abs() > 1e-6 * scale).any()):
        raise ValueError("the ground cost is not zero on its diagonal: use cost.fill_diagonal_(0)")
    if bool(((cost - cost.mT).abs() > 1e-5 * scale).any()):
        raise ValueError("the ground cost is not symmetric: use (cost + cost.T) / 2")
    return cost


def normalise_cost(
    cost: Float[Tensor, "classes classes"], *, shrink: float = 0.0
) -> Float[Tensor, "classes classes"]:
    """``(1 - shrink) D / mean_{i != j} D_ij + shrink D_01``, symmetrised, zero diagonal.

    Raises:
        ValueError: if every off-diagonal entry is zero, or ``shrink`` is outside [0, 1].
    """
    if not 0 <= shrink <= 1:
        raise ValueError(f"shrink must lie in [0, 1], got {shrink}")
    classes = cost.shape[0]
    cost = 0.5 * (cost + cost.mT)
    cost = cost - torch.diag(cost.diagonal())
    mean = cost.sum() / max(classes * (classes - 1), 1)
    if classes > 1 and not bool(mean > 0):
        raise ValueError(
            "all classes are at distance zero: the rows or means do not tell them apart"
        )
    zero_one = zero_one_cost(classes, dtype=cost.dtype, device=cost.device)
    return (1 - shrink) * cost / mean.clamp(min=1e-30) + shrink * zero_one


def zero_one_cost(
    classes: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> Float[Tensor, "classes classes"]:
    """``D_ij = [i != j]``: every confusion is as bad as any other; W is then total variation.

    Example:
        >>> zero_one_cost(2)
        tensor([[0., 1.],
                [1., 0.]])
    """
    return 1 - torch.eye(classes, dtype=dtype, device=device)


def _distances(rows: Tensor, metric: Metric) -> Tensor:
    """Pairwise Euclidean distances, or ``1 - cos``. By differences: exact zeros stay exact."""
    if metric not in ("euclidean", "cosine"):
        raise ValueError(f"metric must be 'euclidean' or 'cosine', got {metric!r}")
    if metric == "cosine":
        rows = torch.nn.functional.normalize(rows, dim=-1)
        return 0.5 * torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist") ** 2
    return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")


@torch.no_grad()
def cost_from_rows(
    weight: Float[Tensor, "classes dim"], *, metric: Metric = "euclidean", shrink: float = 0.0
) -> Float[Tensor, "classes classes"]:
    """Distances between the centred rows of a teacher's linear head (ours).

    Rows are centred because a head is free up to a common shift of all its logits.

    Args:
        weight: ``[C, d]`` head weight.
        metric: ``"euclidean"`` or ``"cosine"``.
        shrink: share of the 0/1 cost to mix in, against noise in a head fitted on few clips.

    Raises:
        ValueError: on an unknown metric, a shrink outside [0, 1] or identical rows.
    """
    weight = weight.detach().double()
    return normalise_cost(_distances(weight - weight.mean(0), metric), shrink=shrink).to(
        torch.float32
    )


@torch.no_grad()
def cost_from_means(
    features: Float[Tensor, "clips dim"],
    labels: Int[Tensor, " clips"],
    classes: int,
    *,
    metric: Metric = "euclidean",
    shrink: float | None = None,
) -> Float[Tensor, "classes classes"]:
    """Distances between the class means of a teacher's features (ours).

    Args:
        features: ``[N, d]``.
        labels: ``[N]``, -1 where unknown (ignored).
        classes: C. A class without labelled clips is put at the mean distance from all others.
        metric: ``"euclidean"`` or ``"cosine"`` (of means centred on their mean).
        shrink: share of the 0/1 cost; by default ``C / (C + N_labelled)``, that is one part noise to
            each labelled clip of a class, since means of few clips are mostly noise.

    Raises:
        ValueError: if fewer than two classes have a labelled clip, or as :func:`cost_from_rows`.
    """
    known = labels >= 0
    features, labels = features[known].double(), labels[known]
    counts = torch.bincount(labels, minlength=classes)
    seen = counts > 0
    if int(seen.sum()) < 2:
        raise ValueError("cost_from_means needs labelled clips of at least two classes")
    means = features.new_zeros(classes, features.shape[1]).index_add_(0, labels, features)
    means = means[seen] / counts[seen, None]
    cost = zero_one_cost(classes, dtype=torch.float64, device=features.device)
    index = seen.nonzero().squeeze(1)
    cost[index[:, None], index[None, :]] = normalise_cost(_distances(means - means.mean(0), metric))
    shrink = classes / (classes + len(labels)) if shrink is None else shrink
    return normalise_cost(cost, shrink=shrink).to(torch.float32)


def average_costs(
    costs: Sequence[Float[Tensor, "classes classes"]],
) -> Float[Tensor, "classes classes"]:
    """Mean of the teachers' costs, each normalised first.

    Raises:
        ValueError: if there is none, or one of them fails :func:`check_cost`.
    """
    if not costs:
        raise ValueError("average_costs needs at least one cost")
    return normalise_cost(torch.stack([normalise_cost(check_cost(c)) for c in costs]).mean(0))

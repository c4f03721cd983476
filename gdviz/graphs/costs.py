"""Ground costs between classes: how wrong it is to predict one class where another is right.

Each is ``[C, C]``, symmetric, with zero diagonal and **unit mean off the diagonal** (entries may
exceed 1): ``eps`` and ``eta`` then mean the same whatever the cost was built from. Ours, except
that distances between class prototypes go back to Frogner et al. 2015.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gdviz.graphs import _dtypes

Cost = Float[Tensor, "classes classes"]


def check_cost(cost: Cost) -> Cost:
    """Return ``cost`` unchanged if it can serve as a ground cost; else raise ValueError."""
    small = 1e-5 * cost.abs().max()
    good = cost.isfinite() & (cost >= 0) & ((cost - cost.mT).abs() <= small)
    if not bool(good.all() & (cost.diagonal() <= small).all()):
        raise ValueError("a cost must be finite, non-negative, symmetric and zero on its diagonal")
    return cost


def normalise_cost(cost: Cost, *, shrink: float = 0.0) -> Cost:
    """Return ``(1 - shrink) D / mean_{i != j} D_ij + shrink D_01``, symmetric, zero diagonal.

    Raises ValueError if every off-diagonal entry is zero, or ``shrink`` is outside [0, 1].
    """
    if not 0 <= shrink <= 1:
        raise ValueError(f"shrink must lie in [0, 1], got {shrink}")
    zero_one = zero_one_cost(len(cost)).to(cost)
    cost = 0.5 * (cost + cost.mT) * zero_one
    mean = cost.sum() / zero_one.sum().clamp(min=1)
    if len(cost) > 1 and not bool(mean > 0):
        raise ValueError("all classes are at distance zero: nothing tells them apart")
    return (1 - shrink) * cost / mean.clamp(min=1e-30) + shrink * zero_one


def zero_one_cost(classes: int) -> Cost:
    """Return ``D_ij = [i != j]``: all confusions are equally bad, W is total variation."""
    return 1 - torch.eye(classes)


@torch.no_grad()
def cost_from_means(
    features: Float[Tensor, "clips dim"], labels: Int[Tensor, " clips"], classes: int
) -> Cost:
    """Return Euclidean distances between class means of features; labels of -1 are unknown (ours).

    Means of few clips are mostly noise: ``C / (C + N_labelled)`` of the result is the 0/1 cost. A
    class without labelled clips is put at the mean distance from all others. Raises ValueError if
    fewer than two classes have labelled clips, or all means agree.
    """
    known, exact = labels >= 0, _dtypes.double(features.device)
    features, labels = features[known].to(exact), labels[known]
    counts = torch.bincount(labels, minlength=classes)
    seen = (counts > 0).nonzero().squeeze(1)
    if len(seen) < 2:
        raise ValueError("cost_from_means needs labelled clips of at least two classes")
    sums = features.new_zeros(classes, features.shape[1]).index_add_(0, labels, features)
    means = sums[seen] / counts[seen, None]
    # by differences, not by a matrix product: equal means are then at distance zero exactly
    apart = torch.cdist(means, means, compute_mode="donot_use_mm_for_euclid_dist")
    cost = zero_one_cost(classes).to(means)
    cost[seen[:, None], seen[None, :]] = normalise_cost(apart)
    return normalise_cost(cost, shrink=classes / (classes + len(labels))).to(torch.float32)


def average_costs(costs: Sequence[Cost]) -> Cost:
    """Return the mean of costs, at least one, each checked and normalised."""
    return normalise_cost(torch.stack([normalise_cost(check_cost(c)) for c in costs]).mean(0))

"""Joint matchings to compare the logits graph's star with: exact, bounded from below, ordered."""

from collections.abc import Callable
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor

from gdviz.graphs.transport import Cost, TeacherProbs, Value, sinkhorn_divergence

Edges = Float[Tensor, "teachers teachers"]


def joint_matching_cost(
    probs: Float[Tensor, "teachers classes"], joint_cost: Callable[[tuple[int, ...]], float]
) -> float:
    """Compute ``min_G sum_y G(y) c(y)`` over all couplings G of K distributions ``[K, C]``.

    A linear program over the ``C^K`` outcomes ``y = (y_1, ..., y_K)``, ``joint_cost`` being c.
    Raises ImportError without scipy, ValueError if there are more than 10,000 outcomes.

    Example:
        >>> joint_matching_cost(torch.eye(3), lambda y: max(y) - min(y))
        2.0
    """
    try:
        from scipy.optimize import linprog
    except ImportError as missing:
        raise ImportError("joint_matching_cost needs scipy: pip install scipy") from missing
    teachers, classes = probs.shape
    if classes**teachers > 10_000:
        raise ValueError(f"{classes}^{teachers} joint outcomes are too many")
    outcomes = list(product(range(classes), repeat=teachers))
    marginals = torch.nn.functional.one_hot(torch.tensor(outcomes), classes).flatten(1).T
    exact = probs.cpu().double()
    exact = exact / exact.sum(-1, keepdim=True)
    costs = [joint_cost(y) for y in outcomes]
    solved = linprog(costs, A_eq=marginals.numpy(), b_eq=exact.flatten().numpy())
    return float(solved.fun)


def pairwise_matching_cost(
    probs: TeacherProbs, cost: Cost, edge_weights: Edges | None = None, *, eps: float = 0.05
) -> Value:
    """Compute ``sum_{i<j} e_ij S(p_i, p_j)``; ``e`` is 1 by default.

    As eps goes to 0, a lower bound of joint matching for ``sum_{i<j} e_ij D[y_i, y_j]``: each pair
    of its coupling is a coupling of two marginals. It is about 1% below on average.
    """
    teachers = probs.shape[-2]
    i, j = torch.triu_indices(teachers, teachers, offset=1, device=probs.device)
    e = probs.new_ones(len(i)) if edge_weights is None else edge_weights.to(probs)[i, j]
    divergence = sinkhorn_divergence(probs[..., i, :], probs[..., j, :], cost, eps=eps)
    return (e * divergence).sum(dim=-1)


def ordered_matching_cost(probs: TeacherProbs) -> Value:
    """Compute ``sum_c (max_k F_k(c) - min_k F_k(c))``, F the cumulative distributions.

    The optimum for ordered classes and the joint cost ``max_k y_k - min_k y_k``: in one dimension
    the comonotone coupling is optimal.

    Example:
        >>> float(ordered_matching_cost(torch.eye(3)))
        2.0
    """
    cumulative = probs.cumsum(dim=-1)
    return (cumulative.amax(dim=-2) - cumulative.amin(dim=-2)).sum(dim=-1)

"""Entropic optimal transport between batches of class distributions that share one ground cost.

    W_eps(a, b) = min_P <P, D> + eps KL(P || a b^T)   with  P 1 = a,  P^T 1 = b

for marginals ``a`` and ``b`` on the same C classes. Its value is ``<f, a> + <g, b>`` at the optimal
potentials, which are also its gradients (envelope theorem): no iteration is unrolled. Marginals are
rescaled to unit mass, half precision is upcast to float32, the cost is a constant.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gdviz.graphs import _dtypes, _operators, _sinkhorn
from gdviz.graphs._sinkhorn import ConvergenceWarning as ConvergenceWarning
from gdviz.graphs.costs import Cost

Left = Float[Tensor, "*left classes"]
Right = Float[Tensor, "*right classes"]
Probs = Float[Tensor, "*batch classes"]
TeacherProbs = Float[Tensor, "*batch teachers classes"]
Plan = Float[Tensor, "*batch classes classes"]
Value = Float[Tensor, "*batch"]


def _unit_mass(x: Tensor) -> Tensor:
    """Upcast from half precision and rescale to unit mass; the solvers refuse what cannot be."""
    x = _dtypes.full(x)
    return x / x.sum(dim=-1, keepdim=True).abs()


def _common(a: Tensor, b: Tensor, cost: Tensor) -> tuple[Tensor, Tensor]:
    """Return both marginals with unit mass, in one shape and dtype."""
    classes = [x.shape[-1] for x in (a, b, cost)]
    if len(set(classes)) > 1:
        raise ValueError(f"class axes of a, b and cost differ: {classes}")
    a, b = _unit_mass(a), _unit_mass(b)
    dtype, shape = torch.promote_types(a.dtype, b.dtype), torch.broadcast_shapes(a.shape, b.shape)
    return a.to(dtype).expand(shape), b.to(dtype).expand(shape)


@dataclass(frozen=True, eq=False)
class Transport:
    """A solved batch of transport problems; ``f`` and ``g`` are the potentials of a and b."""

    cost: Value  # regularised: <f, a> + <g, b>
    f: Probs
    g: Probs
    error: Value  # L1 distance of the plan's marginals from a and b (upper bound)
    converged: Bool[Tensor, ""]  # every error is below the tolerance
    a: Probs
    b: Probs
    ground: Cost
    eps: float  # in the units of the ground cost

    def plan(self) -> Plan:
        """Compute ``P = a b^T exp((f + g - D) / eps)``; rows are the classes of ``a``."""
        f, g = self.f + self.eps * self.a.log(), self.g + self.eps * self.b.log()
        return ((f[..., :, None] + g[..., None, :] - self.ground) / self.eps).exp()


def sinkhorn(
    a: Left, b: Right, cost: Cost, *, eps: float = 0.05, tol: float = 1e-6, max_iter: int = 2000
) -> Transport:
    """Solve a batch of transport problems (Cuturi 2013); leading shapes broadcast.

    The result's ``cost`` is differentiable in ``a`` and ``b``, once; nothing else of it is.

    Args:
        a, b: non-negative; zeros and one-hot rows are fine.
        cost: symmetric ground cost.
        eps: regularisation, relative to the mean off-diagonal entry of ``cost``.
        tol: L1 error of the marginals to stop at: with 1e-3 the gradient is good to 20% only.
        max_iter: number of iterations after which to give up, with a :class:`ConvergenceWarning`.

    Raises:
        ValueError: a marginal is negative, empty or not finite, or the cost cannot be used.

    Example:
        >>> a, b = torch.tensor([1.0, 0, 0]), torch.tensor([0.5, 0.5, 0])
        >>> round(float(sinkhorn(a, b, 1 - torch.eye(3)).cost), 3)
        0.5
    """
    a, b = _common(a, b, cost)
    value, *found = _operators.sinkhorn(a, b, cost, eps, tol, max_iter, None)
    ground = 0.5 * (cost + cost.mT).to(a)
    constants = (x.detach() for x in (*found, a, b, ground))
    return Transport(value, *constants, eps=_sinkhorn.absolute_eps(cost, eps)[0])


def sinkhorn_divergence(
    p: Left, q: Right, cost: Cost, *, eps: float = 0.05, tol: float = 1e-6, max_iter: int = 2000
) -> Value:
    """Compute ``S(p, q) = W(p, q) - W(p, p) / 2 - W(q, q) / 2`` (Feydy et al. 2019, eq. 3).

    Non-negative whenever ``exp(-D / eps)`` is positive semi-definite (Euclidean, cosine, 0/1 and
    tree costs are at every eps). Rounding below zero is clamped in the value, not in the gradient.
    Arguments as :func:`sinkhorn`.
    """
    options = (cost, eps, tol, max_iter)
    self_p, _ = _operators.self_sinkhorn(_common(p, p, cost)[0], *options)
    self_q, potential = _operators.self_sinkhorn(_common(q, q, cost)[0], *options)
    p, q = _common(p, q, cost)
    # q's own potential is the answer where p = q, and near it where they are near
    between = _operators.sinkhorn(p, q, *options, potential.detach().expand(q.shape))[0]
    divergence = between - 0.5 * (self_p + self_q)
    return divergence - divergence.detach().clamp(max=0)


@dataclass(frozen=True, eq=False)
class Barycenter:
    """Consensus ``b`` of K distributions, the centre of a star that couples all of them."""

    distribution: Probs
    converged: Bool[Tensor, ""]  # every L1 marginal error is below the tolerance
    p: TeacherProbs
    ground: Cost
    eps: float  # relative, as given

    @cached_property
    def plans(self) -> Float[Tensor, "*batch teachers classes classes"]:
        """Plans between ``b`` (rows) and the K teachers (columns), to 1e-7."""
        exact = _dtypes.double(self.p.device)
        centre, p = self.distribution[..., None, :].to(exact), self.p.to(exact)
        solved = sinkhorn(centre, p, self.ground, eps=self.eps, tol=1e-7)
        return solved.plan().to(self.distribution.dtype)

    def pair_plan(self, i: int, j: int) -> Plan:
        """Compute the coupling of teachers i (rows) and j (columns), ``P_i^T diag(1 / b) P_j``.

        Gluing (Agueh & Carlier 2011): given the consensus class the teachers are independent.
        """
        b = self.distribution[..., :, None]
        first, second = self.plans[..., i, :, :], self.plans[..., j, :, :]
        return first.mT @ torch.where(b > 0, second / b, 0.0)  # empty classes carry nothing


@torch.no_grad()
def barycenter(
    p: TeacherProbs,
    weights: Float[Tensor, "*batch teachers"],
    cost: Cost,
    *,
    eps: float = 0.05,
    tol: float = 1e-6,
    max_iter: int = 2000,
) -> Barycenter:
    """Solve for ``argmin_b sum_k w_k S(b, p_k)`` (Janati et al. 2020, algorithm 1).

    S is the debiased divergence: a barycenter of ``W_eps`` is blurred. Not differentiable; its L1
    error is about ``tol``. Weights are rescaled to sum 1; other arguments as :func:`sinkhorn`.
    """
    if weights.shape != p.shape[:-1] or p.shape[-1] != cost.shape[-1]:
        shapes = [tuple(x.shape) for x in (p, weights, cost)]
        raise ValueError(f"shapes of p, weights and cost do not fit: {shapes}")
    p, weights = _unit_mass(p), _unit_mass(weights)
    b, converged = _operators.barycenter(p, weights, cost, eps, tol, max_iter)
    return Barycenter(b, converged, p, cost.detach().to(p), eps)

"""Entropic optimal transport between batches of class distributions that share one ground cost.

Everything here minimises, for marginals ``a`` and ``b`` on the same ``C`` classes,

    W_eps(a, b) = min_P <P, D> + eps KL(P || a b^T)   with  P 1 = a,  P^T 1 = b,

whose value is ``<f, a> + <g, b>`` at the optimal potentials, so that ``f`` and ``g`` are also its
gradients (envelope theorem): no iteration is unrolled. ``eps`` is given relative to the mean
off-diagonal entry of ``D``. Marginals are rescaled to unit mass, half precision is upcast to float32,
the cost is a constant. The solvers are in ``_sinkhorn``.

Sources: Cuturi 2013 (Sinkhorn); Feydy et al. 2019 (debiased divergence, symmetric update);
Thibault et al. 2021 (over-relaxation); Benamou et al. 2015 (barycenter by Bregman projections);
Janati et al. 2020 (debiased barycenter); Agueh & Carlier 2011 (gluing through a barycenter).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gdviz.graphs import _sinkhorn
from gdviz.graphs._sinkhorn import ConvergenceWarning

__all__ = [
    "Barycenter",
    "ConvergenceWarning",
    "Transport",
    "barycenter",
    "glue",
    "self_cost",
    "sinkhorn",
    "sinkhorn_divergence",
    "transport_cost",
]


def _unit_mass(x: Tensor) -> Tensor:
    """Upcast from half precision and rescale to unit mass, differentiably.

    What cannot be rescaled becomes NaN or keeps its sign, which the solvers refuse: a test here would
    be a synchronisation more and break the compiler's graph.
    """
    x = x if x.dtype in _sinkhorn.KERNEL_RANGE else x.float()
    return x / x.sum(dim=-1, keepdim=True).abs()


def _common(a: Tensor, b: Tensor, cost: Tensor) -> tuple[Tensor, Tensor]:
    if not a.shape[-1] == b.shape[-1] == cost.shape[-1]:
        raise ValueError(
            f"class axes differ: a {a.shape[-1]}, b {b.shape[-1]}, cost {cost.shape[-1]}"
        )
    a, b = _unit_mass(a), _unit_mass(b)
    dtype, shape = torch.promote_types(a.dtype, b.dtype), torch.broadcast_shapes(a.shape, b.shape)
    return a.to(dtype).expand(shape), b.to(dtype).expand(shape)


@dataclass(frozen=True, eq=False)
class Transport:
    """A solved batch of transport problems.

    Attributes:
        cost: ``[*batch]`` regularised value ``<f, a> + <g, b>``.
        f: ``[*batch, C]`` potential of ``a``, the gradient of the cost with respect to ``a``.
        g: ``[*batch, C]`` potential of ``b``.
        error: ``[*batch]`` L1 distance of the plan's marginals from ``a`` and ``b`` (upper bound).
        iterations: number of iterations the slowest problem took, a tensor like all results.
        converged: whether every error is below the tolerance.
    """

    cost: Float[Tensor, "*batch"]
    f: Float[Tensor, "*batch classes"]
    g: Float[Tensor, "*batch classes"]
    error: Float[Tensor, "*batch"]
    iterations: Int[Tensor, ""]
    converged: Bool[Tensor, ""]
    a: Float[Tensor, "*batch classes"]
    b: Float[Tensor, "*batch classes"]
    ground: Float[Tensor, "classes classes"]
    eps: float  # in the units of the ground cost

    def plan(self) -> Float[Tensor, "*batch classes classes"]:
        """``P = a b^T exp((f + g - D) / eps)``: rows are the classes of ``a``. Built on each call."""
        f, g = self.f + self.eps * self.a.log(), self.g + self.eps * self.b.log()
        return ((f[..., :, None] + g[..., None, :] - self.ground) / self.eps).exp()


def sinkhorn(
    a: Float[Tensor, "*left classes"],
    b: Float[Tensor, "*right classes"],
    cost: Float[Tensor, "classes classes"],
    *,
    eps: float = 0.05,
    tol: float = 1e-6,
    max_iter: int = 2000,
) -> Transport:
    """Solve ``W_eps(a, b) = min_P <P, D> + eps KL(P || a b^T)`` for a batch (Cuturi 2013).

    Not differentiable: use :func:`transport_cost` or :func:`sinkhorn_divergence` for gradients.

    Args:
        a: ``[*batch, C]`` non-negative; rescaled to unit mass. Leading shapes broadcast.
        b: ``[*batch, C]`` likewise. Zero entries and one-hot rows are fine.
        cost: ``[C, C]`` symmetric ground cost.
        eps: regularisation, relative to the mean off-diagonal entry of ``cost``.
        tol: L1 error of the marginals to stop at. Where gradients matter keep 1e-6: at 1e-3 the value
            is good to 1e-4 but the gradient only to 20%. Not taken below 8 roundings of the dtype.
        max_iter: number of iterations after which to give up.

    Returns:
        Cost, potentials, error and a lazy ``plan()``.

    Raises:
        ValueError: on a negative, empty or non-finite marginal, or an unusable cost.

    Warns:
        ConvergenceWarning: when ``max_iter`` came first.

    Example:
        >>> cost = 1 - torch.eye(3)
        >>> solved = sinkhorn(torch.tensor([1.0, 0, 0]), torch.tensor([0.5, 0.5, 0]), cost)
        >>> round(float(solved.cost), 3)
        0.5
    """
    a, b = _common(a, b, cost)
    a, b = a.detach(), b.detach()
    solved = _sinkhorn.sinkhorn(a, b, cost, eps, tol, max_iter)
    return Transport(
        *solved, a, b, _sinkhorn.symmetric(cost, a.dtype), _sinkhorn.absolute_eps(cost, eps)[0]
    )


def transport_cost(
    a: Float[Tensor, "*left classes"],
    b: Float[Tensor, "*right classes"],
    cost: Float[Tensor, "classes classes"],
    *,
    eps: float = 0.05,
    tol: float = 1e-6,
    max_iter: int = 2000,
) -> Float[Tensor, "*batch"]:
    """``W_eps(a, b)``, differentiable in ``a`` and ``b`` (not in the cost, nor twice).

    ``dW/da = f - <f, a>`` and ``dW/db = g - <g, b>`` for unit masses: the potentials of the solved
    problem, centred because the marginals are rescaled to unit mass. Arguments as :func:`sinkhorn`.
    """
    a, b = _common(a, b, cost)
    return _sinkhorn.sinkhorn(a, b, cost, eps, tol, max_iter)[0]


def self_cost(
    p: Float[Tensor, "*batch classes"],
    cost: Float[Tensor, "classes classes"],
    *,
    eps: float = 0.05,
    tol: float = 1e-6,
    max_iter: int = 2000,
) -> Float[Tensor, "*batch"]:
    """``W_eps(p, p)``, the bias that :func:`sinkhorn_divergence` removes. Differentiable in ``p``.

    Compute it once for a frozen teacher and pass it as ``self_p``. Arguments as :func:`sinkhorn`.
    """
    p, _ = _common(p, p, cost)
    return _sinkhorn.self_sinkhorn(p, cost, eps, tol, max_iter)[0]


def sinkhorn_divergence(
    p: Float[Tensor, "*left classes"],
    q: Float[Tensor, "*right classes"],
    cost: Float[Tensor, "classes classes"],
    *,
    eps: float = 0.05,
    tol: float = 1e-6,
    max_iter: int = 2000,
    self_p: Float[Tensor, "*left"] | None = None,
) -> Float[Tensor, "*batch"]:
    """``S(p, q) = W(p, q) - W(p, p) / 2 - W(q, q) / 2`` (Feydy et al. 2019, eq. 3).

    Zero with zero gradient at ``p = q``, and non-negative whenever ``exp(-D / eps)`` is positive
    semi-definite (Euclidean, cosine, 0/1 and tree costs are at every eps). Rounding below zero is
    clamped in the value and left alone in the gradient.

    Args:
        p: ``[*batch, C]``; leading shapes of p and q broadcast.
        q: ``[*batch, C]``.
        cost: ``[C, C]`` ground cost.
        eps: as in :func:`sinkhorn`, like ``tol`` and ``max_iter``.
        tol: see there.
        max_iter: see there.
        self_p: ``self_cost(p, cost, eps=eps)`` computed before, for a constant p.

    Raises:
        ValueError: if ``self_p`` is a constant while ``p`` asks for a gradient, besides what
            :func:`sinkhorn` raises.
    """
    if self_p is None:
        self_p = self_cost(p, cost, eps=eps, tol=tol, max_iter=max_iter)
    elif torch.is_grad_enabled() and p.requires_grad and not self_p.requires_grad:
        raise ValueError("self_p is a constant but p requires grad: its gradient would be wrong")
    q, _ = _common(q, q, cost)
    self_q, potential = _sinkhorn.self_sinkhorn(q, cost, eps, tol, max_iter)
    p, q = _common(p, q, cost)
    # from q's own potential the problem is solved at once where p = q, and sooner the nearer they are
    between = _sinkhorn.sinkhorn(
        p, q, cost, eps, tol, max_iter, potential.detach().expand(q.shape)
    )[0]
    divergence = between - 0.5 * (self_p.to(between.dtype) + self_q)
    return divergence - divergence.detach().clamp(max=0)


@dataclass(frozen=True, eq=False)
class Barycenter:
    """Consensus of K distributions and its couplings with each of them.

    Attributes:
        distribution: ``[*batch, C]`` the barycenter ``b``.
        error: ``[*batch]`` largest L1 marginal error over the K plans.
        iterations: number of iterations the slowest clip took.
        converged: whether every error is below the tolerance.
    """

    distribution: Float[Tensor, "*batch classes"]
    error: Float[Tensor, "*batch"]
    iterations: Int[Tensor, ""]
    converged: Bool[Tensor, ""]
    p: Float[Tensor, "*batch teachers classes"]
    ground: Float[Tensor, "classes classes"]
    eps: float  # relative, as given

    def plans(self) -> Float[Tensor, "*batch teachers classes classes"]:
        """Optimal plans: rows are the classes of ``b``, columns those of teacher k. Solved on each call.

        Solved anew between ``b`` and ``p_k``, in float64, rather than read off the last iteration, so
        that both marginals hold to 1e-7 however early the iteration for ``b`` stopped.
        """
        exact = _sinkhorn.double(self.p.device)
        centre, p = self.distribution[..., None, :].to(exact), self.p.to(exact)
        return (
            sinkhorn(centre, p, self.ground, eps=self.eps, tol=1e-7)
            .plan()
            .to(self.distribution.dtype)
        )


@torch.no_grad()
def barycenter(
    p: Float[Tensor, "*batch teachers classes"],
    weights: Float[Tensor, "*batch teachers"],
    cost: Float[Tensor, "classes classes"],
    *,
    eps: float = 0.05,
    tol: float = 1e-6,
    max_iter: int = 2000,
    debiased: bool = True,
) -> Barycenter:
    """Entropic Wasserstein barycenter ``argmin_b sum_k w_k S(b, p_k)``, with its K plans.

    ``debiased=True`` minimises the debiased divergence S (Janati et al. 2020, algorithm 1), the one
    the loss uses. ``debiased=False`` minimises ``sum_k w_k min <P_k, D> - eps H(P_k)`` (Benamou et
    al. 2015, section 3.2), which blurs: the answer has more entropy than the teachers.

    Not differentiable: a consensus is a target. Runs in float64 inside. The L1 error of ``b`` is about
    ``tol``; a target needs no better than 1e-4.

    Args:
        p: ``[*batch, K, C]`` teacher distributions, rescaled to unit mass.
        weights: ``[*batch, K]`` non-negative, rescaled to sum 1.
        cost: ``[C, C]`` ground cost.
        eps: as in :func:`sinkhorn`, like ``tol`` and ``max_iter``.
        tol: see there.
        max_iter: see there.
        debiased: remove the entropic blur.

    Raises:
        ValueError: as :func:`sinkhorn`; also if shapes disagree.

    Warns:
        ConvergenceWarning: when ``max_iter`` came first.
    """
    if weights.shape != p.shape[:-1] or p.shape[-1] != cost.shape[-1]:
        raise ValueError(
            f"p {tuple(p.shape)}, weights {tuple(weights.shape)}, cost {tuple(cost.shape)} do not fit"
        )
    p, weights = _unit_mass(p), _unit_mass(weights)
    b, error, iterations, converged = _sinkhorn.barycenter(
        p, weights, cost, eps, tol, max_iter, debiased
    )
    return Barycenter(b, error, iterations, converged, p, cost.detach().to(p), eps)


def glue(
    plan_i: Float[Tensor, "*batch classes classes"],
    plan_j: Float[Tensor, "*batch classes classes"],
    consensus: Float[Tensor, "*batch classes"],
) -> Float[Tensor, "*batch classes classes"]:
    """Coupling of teachers i and j through the consensus: ``P_i^T diag(1 / b) P_j``.

    The gluing lemma: given the consensus class the teachers are independent. Rows are the classes of
    teacher i, columns those of teacher j; the marginals are ``p_i`` and ``p_j``.

    Args:
        plan_i: ``[*batch, C, C]`` from :meth:`Barycenter.plans` (rows: consensus classes).
        plan_j: likewise for teacher j.
        consensus: ``[*batch, C]``; classes of zero mass carry nothing and are skipped.
    """
    live = consensus > 0
    inverse = torch.where(live, 1 / torch.where(live, consensus, torch.ones_like(consensus)), 0.0)
    return plan_i.mT @ (inverse[..., :, None] * plan_j)

"""Logits graph: joint matching of the teachers' distributions through a free centre, the consensus.

Vertices: the teachers, the consensus ``b`` and the student; edges: transport plans, their costs and
learned weights. The paper's abstract has the "multi-distribution joint matching problem"; solving it
as a star with a free centre (a Wasserstein barycenter, Agueh & Carlier 2011) is ours, like the loss.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gdviz.graphs.costs import check_cost
from gdviz.graphs.transport import (
    Barycenter,
    barycenter,
    glue,
    self_cost,
    sinkhorn,
    sinkhorn_divergence,
)

if TYPE_CHECKING:
    import networkx as nx


@dataclass(frozen=True, eq=False)
class JointMatching:
    """One coupling of all K teachers, as a star around the consensus.

    Attributes:
        consensus: ``[B, C]`` the free centre.
        costs: ``[B, K]`` debiased divergence between each teacher and the consensus.
        star: the solved barycenter, with its error and convergence.
    """

    consensus: Float[Tensor, "batch classes"]
    costs: Float[Tensor, "batch teachers"]
    star: Barycenter

    def plans(self) -> Float[Tensor, "batch teachers classes classes"]:
        """Plans between consensus (rows) and teachers (columns)."""
        return self.star.plans()

    def pair_plan(self, i: int, j: int) -> Float[Tensor, "batch classes classes"]:
        """Coupling of teachers i (rows) and j (columns), read off the joint one."""
        plans = self.plans()
        return glue(plans[:, i], plans[:, j], self.consensus)


class LogitsGraph(nn.Module):
    """``L = T mean_n s_n [sum_k w_nk S(q_n, p_nk) + beta S(q_n, stopgrad b_n)]``.

    ``q_n = softmax(z_n / T)`` is the student's distribution, ``p_nk`` the teachers', ``b_n`` their
    consensus and S the debiased Sinkhorn divergence. The factor is T, not the T^2 of KL: a
    transport cost is of first order in ``q - p``, so that softening divides its gradient by T once.

    Args:
        teachers: K distinct names.
        cost: ``[C, C]`` ground cost, kept as a buffer.
        eps: regularisation, relative to the mean of the cost.
        beta: weight of the consensus.
        temperature: T.
        sample_importance: ``s_n = 1 - H(b_n) / log C`` scaled to mean 1, instead of 1: clips on which
            the consensus is unsure count less.
        tol: marginal error of the solver; ten times as much for the consensus, whose L1 error is about
            its tolerance and which is only a target.
        max_iter: iterations after which the solver gives up, with a ConvergenceWarning.

    Raises:
        ValueError: on an unusable cost, names or options; also if ``exp(-D / eps)`` is not positive
            semi-definite, because S could then be negative and the loss be gamed.
    """

    cost: Tensor
    weight_sum: Tensor
    clips_seen: Tensor

    def __init__(
        self,
        teachers: Sequence[str],
        cost: Float[Tensor, "classes classes"],
        *,
        eps: float = 0.1,
        beta: float = 1.0,
        temperature: float = 2.0,
        sample_importance: bool = True,
        tol: float = 1e-5,
        max_iter: int = 2000,
    ) -> None:
        super().__init__()
        reserved = {"consensus", "student"}
        if not teachers or len(set(teachers)) != len(teachers) or reserved & set(teachers):
            raise ValueError(f"teachers must be distinct names, none of {reserved}: {teachers}")
        if not (temperature > 0 and beta >= 0):
            raise ValueError(f"need temperature > 0 and beta >= 0, got {temperature} and {beta}")
        cost = check_cost(cost).detach().clone()
        mean = cost.double().sum() / max(cost.numel() - len(cost), 1)
        lowest = torch.linalg.eigvalsh((-cost.double() / (eps * mean)).exp())[0]
        if not float(lowest) > -1e-6:
            raise ValueError(
                f"exp(-cost / eps) has eigenvalue {float(lowest):.1e}: the divergence could be negative; use a "
                "smaller eps or a cost made of Euclidean distances"
            )
        self.teachers = tuple(teachers)
        self.beta, self.temperature, self.sample_importance = beta, temperature, sample_importance
        self.solver = {"eps": eps, "tol": tol, "max_iter": max_iter}
        self.star_solver = self.solver | {"tol": 10 * tol}
        self.register_buffer("cost", cost)
        self.register_buffer("weight_sum", torch.zeros(len(teachers), dtype=torch.float64))
        self.register_buffer("clips_seen", torch.zeros((), dtype=torch.long))

    @property
    def mean_weights(self) -> Float[Tensor, " teachers"]:
        """Mean weight of each teacher over the clips trained on so far (uniform before any)."""
        uniform = torch.full_like(self.weight_sum, 1 / len(self.teachers))
        return torch.where(
            self.clips_seen > 0, self.weight_sum / self.clips_seen.clamp(min=1), uniform
        )

    def _check(self, teacher_probs: Tensor, weights: Tensor) -> None:
        batch, (teachers, classes) = len(teacher_probs), (len(self.teachers), len(self.cost))
        if teacher_probs.shape != (batch, teachers, classes) or weights.shape != (batch, teachers):
            raise ValueError(
                f"expected teacher_probs [B, {teachers}, {classes}] and weights [B, {teachers}], "
                f"got {tuple(teacher_probs.shape)} and {tuple(weights.shape)}"
            )

    @torch.no_grad()
    def consensus(
        self,
        teacher_probs: Float[Tensor, "batch teachers classes"],
        weights: Float[Tensor, "batch teachers"],
    ) -> Float[Tensor, "batch classes"]:
        """The consensus ``b [B, C]`` alone; constant for frozen teachers, so compute it once."""
        self._check(teacher_probs, weights)
        return barycenter(teacher_probs, weights, self.cost, **self.star_solver).distribution

    @torch.no_grad()
    def self_terms(
        self,
        teacher_probs: Float[Tensor, "batch teachers classes"],
        consensus: Float[Tensor, "batch classes"],
    ) -> Float[Tensor, "batch targets"]:
        """``W(p_k, p_k)`` and, last, ``W(b, b)``: ``[B, K + 1]``, for ``loss(self_terms=...)``."""
        return self_cost(
            torch.cat([teacher_probs, consensus[:, None].to(teacher_probs)], dim=1),
            self.cost,
            **self.solver,
        )

    @torch.no_grad()
    def match(
        self,
        teacher_probs: Float[Tensor, "batch teachers classes"],
        weights: Float[Tensor, "batch teachers"],
    ) -> JointMatching:
        """Solve the joint matching: ``argmin_b sum_k w_k S(b, p_k)``, its costs and its coupling.

        Args:
            teacher_probs: ``[B, K, C]`` softened probabilities.
            weights: ``[B, K]`` edge weights.

        Raises:
            ValueError: if shapes do not fit the graph.

        Warns:
            ConvergenceWarning: if the consensus has not converged.
        """
        self._check(teacher_probs, weights)
        star = barycenter(teacher_probs, weights, self.cost, **self.star_solver)
        costs = sinkhorn_divergence(
            teacher_probs, star.distribution[:, None], self.cost, **self.solver
        )
        return JointMatching(star.distribution, costs, star)

    def loss(
        self,
        student_logits: Float[Tensor, "batch classes"],
        teacher_probs: Float[Tensor, "batch teachers classes"],
        weights: Float[Tensor, "batch teachers"],
        consensus: Float[Tensor, "batch classes"] | None = None,
        self_terms: Float[Tensor, "batch targets"] | None = None,
    ) -> Float[Tensor, ""]:
        """The loss above, a scalar >= 0; only ``student_logits`` gets a gradient.

        In training mode the weights are added to the graph's running mean.

        Args:
            student_logits: ``[B, C]`` raw logits z.
            teacher_probs: ``[B, K, C]`` probabilities, calibrated and softened at T already.
            weights: ``[B, K]`` edge weights; treated as constants, whatever made them.
            consensus: ``[B, C]`` from :meth:`consensus`, if known.
            self_terms: ``[B, K + 1]`` from :meth:`self_terms`, if known.

        Raises:
            ValueError: if shapes do not fit the graph.
        """
        self._check(teacher_probs, weights)
        with torch.autocast(student_logits.device.type, enabled=False):
            logits = (
                student_logits if student_logits.dtype == torch.float64 else student_logits.float()
            )
            teacher_probs, weights = teacher_probs.detach().to(logits), weights.detach().to(logits)
            if consensus is None:
                consensus = self.consensus(teacher_probs, weights)
            consensus = consensus.detach().to(logits)
            q = torch.softmax(logits / self.temperature, dim=-1)
            targets = torch.cat([teacher_probs, consensus[:, None]], dim=1)  # (B, K + 1, C)
            divergence = sinkhorn_divergence(
                targets,
                q[:, None],
                self.cost,
                self_p=None if self_terms is None else self_terms.detach(),
                **self.solver,
            )  # (B, K + 1)
            per_clip = (weights * divergence[:, :-1]).sum(dim=-1) + self.beta * divergence[:, -1]
            if self.training:
                self.weight_sum += weights.sum(dim=0)
                self.clips_seen += len(weights)
            return self.temperature * (self._importance(consensus) * per_clip).mean()

    def _importance(self, consensus: Tensor) -> Tensor:
        """``s_n = 1 - H(b_n) / log C`` over its batch mean; ones if no clip is surer than chance."""
        if not self.sample_importance or consensus.shape[-1] < 2:
            return torch.ones_like(consensus[:, 0])
        sure = (1 - torch.special.entr(consensus).sum(-1) / math.log(consensus.shape[-1])).clamp(
            min=0
        )
        mean = sure.mean()
        return torch.where(mean > 1e-6, sure / mean.clamp(min=1e-6), torch.ones_like(sure))

    @torch.no_grad()
    def to_networkx(
        self,
        teacher_probs: Float[Tensor, "batch teachers classes"],
        weights: Float[Tensor, "batch teachers"],
        student_probs: Float[Tensor, "batch classes"] | None = None,
    ) -> "nx.Graph":
        """The graph averaged over a batch, for plots.

        Node attribute ``kind``: teacher, consensus or student. Edge attributes: ``kind``, ``weight``,
        ``cost`` (mean divergence; for glued edges mean ``<plan, D>``), ``plan`` (mean plan, numpy
        ``[C, C]``) and ``rows`` / ``columns``, the vertex each axis of the plan belongs to. Edge kinds:

        - ``"matching"`` consensus - teacher, weight the mean learned one;
        - ``"glued"`` teacher - teacher, weight ``mean_n w_ni w_nj``, read off the joint coupling;
        - ``"distillation"`` student - teacher and student - consensus (weight beta).
        """
        import networkx as nx

        joint = self.match(teacher_probs, weights)
        plans, ground = joint.plans(), self.cost.to(teacher_probs)
        graph = nx.Graph(temperature=self.temperature, eps=self.solver["eps"], beta=self.beta)
        graph.add_node("consensus", kind="consensus")
        graph.add_nodes_from(self.teachers, kind="teacher")

        def connect(
            kind: str, rows: str, columns: str, weight: Tensor | float, cost: Tensor, plan: Tensor
        ) -> None:
            graph.add_edge(
                rows, columns, kind=kind, rows=rows, columns=columns,
                weight=float(weight), cost=float(cost.mean()), plan=plan.mean(0).cpu().numpy(),
            )  # fmt: skip

        mean = weights.mean(dim=0)
        for k, name in enumerate(self.teachers):
            connect("matching", "consensus", name, mean[k], joint.costs[:, k], plans[:, k])
        for i, j in combinations(range(len(self.teachers)), 2):
            plan = glue(plans[:, i], plans[:, j], joint.consensus)
            weight = (weights[:, i] * weights[:, j]).mean()
            connect(
                "glued",
                self.teachers[i],
                self.teachers[j],
                weight,
                (plan * ground).sum((-2, -1)),
                plan,
            )
        if student_probs is not None:
            graph.add_node("student", kind="student")
            targets = torch.cat([teacher_probs, joint.consensus[:, None]], dim=1)
            plans = sinkhorn(student_probs[:, None], targets, self.cost, **self.solver).plan()
            costs = sinkhorn_divergence(targets, student_probs[:, None], self.cost, **self.solver)
            for k, name in enumerate((*self.teachers, "consensus")):
                weight = self.beta if name == "consensus" else mean[k]
                connect("distillation", "student", name, weight, costs[:, k], plans[:, k])
        return graph


def one_class_at_a_time(
    student_logits: Float[Tensor, "batch classes"],
    teacher_probs: Float[Tensor, "batch teachers classes"],
    weights: Float[Tensor, "batch teachers"],
) -> tuple[
    Float[Tensor, "problems 2"],
    Float[Tensor, "problems teachers 2"],
    Float[Tensor, "problems teachers"],
]:
    """Multi-label data, such as CCV's, as the two-class problems "is it there or not", ``[B C, ...]`` (ours).

    What a clip shows is then a set, a vertex is a product of Bernoulli distributions ``p_c``, and under the
    Hamming distance between sets transport falls apart into classes: ``W(p, q) = sum_c |p_c - q_c|``. The
    graph's debiased divergence of each class lies between that (as eps goes to 0), whose gradient jumps
    at ``p_c = q_c``, and ``(p_c - q_c)^2`` (as eps grows), and is smooth. Unbalanced transport between the
    ``p_c`` as masses would be the other choice: it needs a price of creating mass, and would let
    probability of one class pay for another, though multi-label classes do not exclude each other.

    Args:
        student_logits: ``[B, C]`` raw logits, one sigmoid a class.
        teacher_probs: ``[B, K, C]`` sigmoids, calibrated and softened.
        weights: ``[B, K]``.

    Returns:
        The first three arguments of :meth:`LogitsGraph.loss`, :meth:`~LogitsGraph.consensus` (without the
        first) and the rest, for a graph with ``zero_one_cost(2)``. The second of the two classes is "there".
        The loss is a mean over clips and classes.

    Example:
        >>> z, p, w = one_class_at_a_time(torch.zeros(1, 3), torch.tensor([[[0.5, 0.9, 0.1]]]), torch.ones(1, 1))
        >>> p[1]
        tensor([[0.1000, 0.9000]])
    """
    z, p = student_logits.flatten(), teacher_probs.mT.flatten(0, 1)
    classes = student_logits.shape[-1]
    return (
        torch.stack([torch.zeros_like(z), z], dim=-1),
        torch.stack([1 - p, p], dim=-1),
        weights.repeat_interleave(classes, dim=0),
    )


def pairwise_matching_cost(
    probs: Float[Tensor, "*batch teachers classes"],
    cost: Float[Tensor, "classes classes"],
    edge_weights: Float[Tensor, "teachers teachers"] | None = None,
    *,
    debiased: bool = True,
    eps: float = 0.05,
    tol: float = 1e-6,
    max_iter: int = 2000,
) -> Float[Tensor, "*batch"]:
    """``sum_{i<j} e_ij W(p_i, p_j)``: the tractable lower bound of the complete graph's joint matching.

    Each pair of the best joint coupling is a coupling of its two marginals, hence the bound; it holds
    as eps goes to 0, about 1% below on average.

    Args:
        probs: ``[*batch, K, C]``.
        cost: ``[C, C]`` ground cost.
        edge_weights: ``[K, K]``, upper triangle used; ones by default.
        debiased: use ``S`` rather than ``W_eps``, which is far above W at a usable eps.
        eps: as in ``sinkhorn``, like ``tol`` and ``max_iter``.
        tol: see there.
        max_iter: see there.

    Returns:
        ``[*batch]``; zeros for a single teacher.
    """
    teachers = probs.shape[-2]
    i, j = torch.triu_indices(teachers, teachers, offset=1, device=probs.device)
    first, second = probs[..., i, :], probs[..., j, :]  # (..., E, C)
    e = probs.new_ones(len(i)) if edge_weights is None else edge_weights.to(probs)[i, j]
    options = {"eps": eps, "tol": tol, "max_iter": max_iter}
    if debiased:
        bias = self_cost(probs, cost, **options)
        value = sinkhorn(first, second, cost, **options).cost - 0.5 * (bias[..., i] + bias[..., j])
    else:
        value = sinkhorn(first, second, cost, **options).cost
    return (e * value).sum(dim=-1)


def ordered_matching_cost(
    probs: Float[Tensor, "*batch teachers classes"],
) -> Float[Tensor, "*batch"]:
    """``sum_c (max_k F_k(c) - min_k F_k(c))`` with F the cumulative distributions: no solver needed.

    For classes in order and the joint cost ``max_k y_k - min_k y_k`` (in steps of one class), this is
    the optimum over all couplings: the comonotone one is optimal in one dimension. With K = 2 it is
    the Wasserstein distance for ``D_ij = |i - j|``.

    Example:
        >>> float(ordered_matching_cost(torch.eye(3)))
        2.0
    """
    cumulative = probs.cumsum(dim=-1)
    return (cumulative.amax(dim=-2) - cumulative.amin(dim=-2)).sum(dim=-1)

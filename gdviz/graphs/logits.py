"""Logits graph: joint matching of the teachers' distributions through a free centre, the consensus.

The "multi-distribution joint matching problem" is the paper's. Solving it as a star with a free
centre, a Wasserstein barycenter (Agueh & Carlier 2011), is ours, like the loss.
"""

import math
from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gdviz.graphs import _dtypes, transport
from gdviz.graphs._sinkhorn import absolute_eps
from gdviz.graphs.costs import Cost, check_cost
from gdviz.graphs.transport import Barycenter, Probs, TeacherProbs

if TYPE_CHECKING:
    import networkx as nx

Weights = Float[Tensor, "*batch teachers"]


class LogitsGraph(nn.Module):
    """``L = T mean_n s_n [sum_k w_nk S(q_n, p_nk) + beta S(q_n, stopgrad b_n)]``.

    ``q_n = softmax(z_n / T)`` is the student's distribution, ``p_nk`` the teachers', ``b_n`` their
    consensus, S the debiased Sinkhorn divergence under the ground ``cost``, and
    ``s_n = 1 - H(b_n) / log C``, scaled to mean 1. For ``eps``, ``tol`` and ``max_iter`` see
    :func:`gdviz.graphs.sinkhorn`; the consensus, a target, is solved to ten times ``tol``.

    The factor is T, not the T^2 of KL: the unregularised transport cost is of first order in
    ``q - p``, so softening divides its gradient by T once. Where q and p differ by little against
    eps, S is of second order, like KL; ``distill`` scales losses by their gradients anyway.

    Raises ValueError if the cost, names or options cannot be used, or ``exp(-D / eps)`` is not
    positive semi-definite: S could then be negative and the loss be gamed.
    """

    cost: Tensor

    def __init__(
        self,
        teachers: Sequence[str],
        cost: Cost,
        *,
        eps: float = 0.1,
        beta: float = 1.0,
        temperature: float = 2.0,
        tol: float = 1e-5,
        max_iter: int = 2000,
    ) -> None:
        super().__init__()
        reserved = {"consensus", "student"}
        if not teachers or len(set(teachers)) != len(teachers) or reserved & set(teachers):
            raise ValueError(f"teachers must be distinct names, none of {reserved}: {teachers}")
        if not (temperature > 0 and beta >= 0):
            raise ValueError(f"need temperature > 0 and beta >= 0, got {temperature} and {beta}")
        _check_definite(check_cost(cost), eps)
        self.teachers, self.beta, self.temperature = tuple(teachers), beta, temperature
        self.solver: dict[str, Any] = {"eps": eps, "tol": tol, "max_iter": max_iter}
        # the arguments, as JSON holds them, but the cost, which is in ``state_dict``
        self.settings = {"teachers": list(teachers), "beta": beta, "temperature": temperature}
        self.settings |= self.solver
        self.register_buffer("cost", cost.detach().clone())

    def _check(self, teacher_probs: Tensor, weights: Tensor) -> None:
        expected = (len(teacher_probs), len(self.teachers), len(self.cost))
        if teacher_probs.shape != expected or weights.shape != expected[:2]:
            got = f"{tuple(teacher_probs.shape)} and {tuple(weights.shape)}"
            raise ValueError(f"expected teacher_probs and weights to fit {expected}, got {got}")

    def _divergence(self, p: Tensor, q: Tensor) -> Tensor:
        return transport.sinkhorn_divergence(p, q, self.cost, **self.solver)

    @torch.no_grad()
    def match(self, teacher_probs: TeacherProbs, weights: Weights) -> Barycenter:
        """Solve the joint matching ``argmin_b sum_k w_k S(b, p_k)`` of softened probabilities."""
        self._check(teacher_probs, weights)
        options = self.solver | {"tol": 10 * self.solver["tol"]}
        return transport.barycenter(teacher_probs, weights, self.cost, **options)

    def consensus(self, teacher_probs: TeacherProbs, weights: Weights) -> Probs:
        """Compute ``b`` alone; constant for frozen teachers, so compute it once."""
        return self.match(teacher_probs, weights).distribution

    def loss(
        self,
        student_logits: Probs,
        teacher_probs: TeacherProbs,
        weights: Weights,
        consensus: Probs | None = None,
    ) -> Float[Tensor, ""]:
        """Compute the loss above, a scalar >= 0; only ``student_logits`` gets a gradient.

        Logits z are raw ``[B, C]``; ``teacher_probs [B, K, C]`` are calibrated and softened at T
        already; ``consensus [B, C]`` is computed unless given.
        """
        self._check(teacher_probs, weights)
        if not len(teacher_probs) or student_logits.shape != teacher_probs[:, 0].shape:
            got = f"{tuple(student_logits.shape)} for {tuple(teacher_probs.shape)}"
            raise ValueError(
                f"expected logits [B, C] of one or more clips, as the teachers', got {got}"
            )
        with torch.autocast(student_logits.device.type, enabled=False):
            logits = _dtypes.full(student_logits)
            probs, weights = teacher_probs.detach().to(logits), weights.detach().to(logits)
            if consensus is None:
                consensus = self.consensus(probs, weights)
            b = consensus.detach().to(logits)
            q = torch.softmax(logits / self.temperature, dim=-1)
            targets = torch.cat([probs, b[:, None]], dim=1)  # (B, K + 1, C)
            divergence = self._divergence(targets, q[:, None])
            per_clip = (weights * divergence[:, :-1]).sum(dim=-1) + self.beta * divergence[:, -1]
            return self.temperature * (_importance(b) * per_clip).mean()

    @torch.no_grad()
    def to_networkx(
        self,
        teacher_probs: TeacherProbs,
        weights: Weights,
        student_probs: Probs | None = None,
        *,
        plans: bool = False,
    ) -> "nx.Graph":
        """Return the graph averaged over a batch, for plots and for ``networkx.write_graphml``.

        Nodes have a ``kind``: teacher, consensus or student. Edges have a ``kind``: matching
        (consensus - teacher), glued (teacher - teacher) or distillation (student - others); a
        ``weight``, for glued ones ``mean_n w_ni w_nj``; a ``cost``, the mean divergence, for glued
        ones ``<plan, D>``; and the vertices of the plan's ``rows`` and ``columns``. With ``plans``
        they have a numpy ``plan``, too, which GraphML cannot hold.
        """
        import networkx as nx

        graph = nx.Graph(temperature=self.temperature, eps=self.solver["eps"], beta=self.beta)
        graph.add_node("consensus", kind="consensus")
        graph.add_nodes_from(self.teachers, kind="teacher")

        def connect(rows, columns, kind, weight, cost, plan):
            about = {"kind": kind, "weight": float(weight), "rows": rows, "columns": columns}
            about |= {"plan": plan.mean(0).cpu().numpy()} if plans else {}
            graph.add_edge(rows, columns, cost=float(cost.mean()), **about)

        star, mean = self.match(teacher_probs, weights), weights.mean(dim=0)
        b = star.distribution
        costs = self._divergence(teacher_probs, b[:, None])
        for k, name in enumerate(self.teachers):
            connect("consensus", name, "matching", mean[k], costs[:, k], star.plans[:, k])
        for i, j in combinations(range(len(self.teachers)), 2):
            plan = star.pair_plan(i, j)
            cost, weight = (plan * self.cost.to(plan)).sum((-2, -1)), weights[:, i] * weights[:, j]
            connect(self.teachers[i], self.teachers[j], "glued", weight.mean(), cost, plan)
        if student_probs is not None:
            graph.add_node("student", kind="student")
            q, targets = student_probs[:, None], torch.cat([teacher_probs, b[:, None]], dim=1)
            found = transport.sinkhorn(q, targets, self.cost, **self.solver).plan()
            costs = self._divergence(targets, q)
            for k, name in enumerate((*self.teachers, "consensus")):
                weight = self.beta if name == "consensus" else mean[k]
                connect("student", name, "distillation", weight, costs[:, k], found[:, k])
        return graph


def _importance(consensus: Tensor) -> Tensor:
    """``1 - H(b_n) / log C`` over its mean; ones if no clip is surer than chance."""
    entropy = torch.special.entr(consensus).sum(-1) / math.log(max(consensus.shape[-1], 2))
    sure = (1 - entropy).clamp(min=0)
    mean = sure.mean()
    return torch.where(mean > 1e-6, sure / mean.clamp(min=1e-6), torch.ones_like(sure))


def _check_definite(cost: Tensor, eps: float) -> None:
    """Raise ValueError unless ``exp(-D / eps)`` is positive semi-definite."""
    unit, _ = absolute_eps(cost, eps)
    lowest = float(torch.linalg.eigvalsh((-cost.cpu().double() / unit).exp())[0])
    if not lowest > -1e-6:
        trouble = f"exp(-cost / eps) has eigenvalue {lowest:.1e}: the divergence could be negative"
        raise ValueError(f"{trouble}; use a smaller eps or a cost made of Euclidean distances")


def two_class(logits: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch classes 2"]:
    """Return logits of sigmoids as logits of "it is there or not", one problem a class (ours).

    ``(0, z)``: their softmax at a temperature is the sigmoid at it. Under the Hamming distance of
    sets of labels transport falls apart into classes, ``W(p, q) = sum_c |p_c - q_c|``: where videos
    have several labels, a :class:`LogitsGraph` with ``zero_one_cost(2)`` sees ``[B C, 2]``.

    Example:
        >>> torch.softmax(two_class(torch.tensor([0.0, 2.0])), -1)
        tensor([[0.5000, 0.5000],
                [0.1192, 0.8808]])
    """
    return torch.stack([torch.zeros_like(logits), logits], dim=-1)

"""Policies: rules that weigh teachers, behind one signature; this project's and other papers'.

A policy maps the teachers' probabilities ``[N, K, C]``, labels ``[N]`` (-1 unknown) and, where it
looks at it, the student's probabilities ``[N, C]`` to weights ``[N, K]`` whose rows sum to one. All
weights are constants to the student.
"""

from collections.abc import Callable
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

from gdviz.graphs import closed_form, evidence, fit_gate, teacher_prior, zero_one_cost
from gdviz.graphs.weights import Labels, Probs, Weights

StudentProbs = Float[Tensor, "clips classes"] | None
Policy = Callable[..., Tensor]


@torch.no_grad()
def uniform(probs: Probs, labels: Labels, student_probs: StudentProbs = None) -> Weights:
    """``w_nk = 1 / K``."""
    return torch.full_like(probs[..., 0], 1 / probs.shape[1])


@torch.no_grad()
def entropic(probs: Probs, labels: Labels, student_probs: StudentProbs = None) -> Weights:
    """Return :func:`closed_form` of the ``evidence`` under :func:`teacher_prior` (ours).

    At the 0/1 cost and ``eta = 0.25`` a teacher that errs a quarter less, by the label and by the
    others, counts ``e`` times more.
    """
    cost = zero_one_cost(probs.shape[-1]).to(probs)
    prior = teacher_prior(probs, labels, cost)
    return closed_form(evidence(probs, labels, cost), eta=0.25, log_prior=prior)


@torch.no_grad()
def gated(probs: Probs, labels: Labels, student_probs: StudentProbs = None) -> Weights:
    """Return the gate alone: 200 steps of ``fit_gate`` from :func:`teacher_prior` (ours)."""
    prior = teacher_prior(probs, labels, zero_one_cost(probs.shape[-1]).to(probs))
    gates = fit_gate(probs, labels, prior, rho=1.0, steps=200, floor=0.05)
    return next(islice(gates, 1, None))(probs)


def _against(score: Float[Tensor, "*batch teachers"]) -> Float[Tensor, "*batch teachers"]:
    """``(1 - softmax_k(score)) / (K - 1)``: the higher the score the lower the weight."""
    if score.shape[-1] == 1:
        return torch.ones_like(score)
    return (1 - torch.softmax(score, -1)) / (score.shape[-1] - 1)


def _cross_entropy(probs: Probs, labels: Labels) -> Weights:
    """``-log p_nk[y_n]`` of each teacher; rows without a label mean nothing."""
    index = labels.clamp(min=0)[:, None, None].expand(-1, probs.shape[1], 1)
    return -probs.gather(2, index).squeeze(2).clamp(min=1e-8).log()


@torch.no_grad()
def entropy_based(probs: Probs, labels: Labels, student_probs: StudentProbs = None) -> Weights:
    """``w_nk = (1 - softmax_k(H(p_nk))) / (K - 1)``: the surer teacher counts more.

    After EBKD (Kwon et al., ICASSP 2020), normalised our way. A sure but wrong teacher wins.
    """
    return _against(torch.special.entr(probs).sum(-1))


@torch.no_grad()
def confidence_aware(probs: Probs, labels: Labels, student_probs: StudentProbs = None) -> Weights:
    """``w_nk = (1 - softmax_k(CE(p_nk, y_n))) / (K - 1)`` (CA-MKD, Zhang et al., ICASSP 2022).

    Their loss on intermediate features is left out. The paper has labels everywhere: a clip without
    one gets the mean weights of those that have one (ours), or uniform weights if none has. No
    weight exceeds ``1 / (K - 1)``.
    """
    known = labels >= 0
    if not bool(known.any()):
        return uniform(probs, labels)
    weights = _against(_cross_entropy(probs, labels))
    return torch.where(known[:, None], weights, weights[known].mean(0))


@torch.no_grad()
def uncertainty(probs: Probs, labels: Labels, student_probs: StudentProbs = None) -> Weights:
    """``w_k ~ 1 / sigma_k^2``, ``sigma = argmin sum_k CE_k / sigma_k^2 + log sigma_k``.

    Kendall et al., CVPR 2018, eq. 10. ``CE_k``, a teacher's mean cross-entropy to the labels, does
    not move, so trained log-variances end at ``sigma_k^2 = 2 CE_k``. Uniform without labels.
    """
    known = labels >= 0
    if not bool(known.any()):
        return uniform(probs, labels)
    precision = 1 / _cross_entropy(probs[known], labels[known]).mean(0).clamp(min=1e-6)
    return (precision / precision.sum()).expand_as(probs[..., 0])


@torch.no_grad()
def capped_simplex_minimum(
    quadratic: Float[Tensor, "*batch k k"], linear: Float[Tensor, "*batch k"], upper: float = 1.0
) -> Float[Tensor, "*batch k"]:
    """``argmin_w <w, Q w> / 2 + <b, w>`` with ``sum w = 1``, ``0 <= w <= upper``, for a batch.

    Sequential minimal optimisation (Platt 1998): move weight from the coordinate where that gains
    most to the one where it costs least, until no pair gains more than 1e-7. Needs
    ``upper >= 1 / k``. Runs on the CPU, in float64.
    """
    q, b = quadratic.cpu().double(), linear.cpu().double()
    w = torch.full_like(b, 1 / b.shape[-1])
    for _ in range(1000):
        slope = (q @ w[..., None]).squeeze(-1) + b
        best = slope.masked_fill(w >= upper - 1e-12, torch.inf).argmin(-1, keepdim=True)
        worst = slope.masked_fill(w <= 1e-12, -torch.inf).argmax(-1, keepdim=True)
        gap = (slope.gather(-1, worst) - slope.gather(-1, best)).clamp(min=0)
        if float(gap.max()) <= 1e-7:
            break
        move = torch.zeros_like(w).scatter(-1, best, 1.0)
        move = move.scatter_add(-1, worst, -torch.ones_like(gap))
        curvature = (move * (q @ move[..., None]).squeeze(-1)).sum(-1, keepdim=True)
        room = torch.minimum(upper - w.gather(-1, best), w.gather(-1, worst))
        w = w + torch.minimum(gap / curvature.clamp(min=1e-300), room) * move
    return w.to(linear)


def gradient_space(probs: Probs, labels: Labels, student_probs: Tensor) -> Weights:
    """``argmin_w |sum_k w_k g_k|^2`` on the capped simplex (AE-KD, Du et al., NeurIPS 2020).

    ``g_k = mean_n (q_n - p_nk)`` is the gradient of KD from teacher k by the student's logits, over
    T, of the batch, whose clips have the same weights. The cap is the paper's C = 0.6, raised to
    ``1 / K`` where it must be.
    """
    g = (student_probs[:, None] - probs).mean(0)
    products = (g[:, None] * g).sum(-1)  # no matrix product: autocast would round it
    found = capped_simplex_minimum(products, torch.zeros_like(g[:, 0]), max(0.6, 1 / len(g)))
    return found.expand_as(probs[..., 0])


def trained_on_the_loss(
    probs: Probs, labels: Labels, student_probs: Tensor, *, prior: float = 0.0
) -> Weights:
    """``argmin_w sum_k w_k KL_k + prior |w - 1/K|^2``; add ``prior / K``, rescale to 1.

    ``KL_k = mean_n KL(p_nk || q_n)`` is the distillation loss itself. Kept to show why not: all
    weight goes to the teacher nearest to the student, which then comes nearer still.
    """
    weights = uniform(probs, labels)
    log_q = student_probs.clamp(min=1e-12).log()[:, None]
    loss = (torch.xlogy(probs, probs) - probs * log_q).sum(-1).mean(0)
    eye = torch.eye(len(loss)).to(loss)
    found = capped_simplex_minimum(2 * prior * eye, loss - 2 * prior * weights[0])
    return ((found + prior * weights[0]) / (1 + prior)).expand_as(weights)


def graph_distillation(probs: Probs, labels: Labels, student_probs: Tensor) -> Weights:
    """Edges learned on the distillation loss, regularised (Luo et al., ECCV 2018).

    As in their code the squared distance of the batch's mean edges to the prior weighs as much as
    the loss, and the prior is added to the edges. Ours: edges are alike on all clips of a batch and
    the optimum, where theirs come from a small network, clip by clip; the loss is KL on logits.
    """
    return trained_on_the_loss(probs, labels, student_probs, prior=1.0)


POLICIES: dict[str, Policy] = {
    "uniform": uniform,
    "entropic": entropic,
    "gated": gated,
    "ebkd": entropy_based,
    "camkd": confidence_aware,
    "aekd": gradient_space,
    "luo": graph_distillation,
    "kendall": uncertainty,
    "loss": trained_on_the_loss,
}
#: Asked anew in every step, about the student's probabilities on the batch; others once, before.
FOLLOW_STUDENT = frozenset({"aekd", "luo", "loss"})

"""Baseline distillation losses as pure functions. The two graphs' losses live in ``gdviz.graphs``.

Teachers are constants, unless a docstring says otherwise. Losses on features and relations run in
full precision outside autocast: bfloat16 Gram matrices put them off by several per cent.
"""

import math
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def kd_loss(
    student_logits: Float[Tensor, "*batch classes"],
    teacher_probs: Float[Tensor, "*batch teachers classes"],
    weights: Float[Tensor, "*batch teachers"],
    temperature: float,
) -> Float[Tensor, ""]:
    """``T^2 mean_n sum_k w_nk KL(p_nk || softmax(z_n / T))`` (Hinton et al. 2015, section 2.1).

    Its gradient is that of distillation from the mixture ``sum_k w_nk p_nk``. ``T^2`` keeps the
    size of the gradient independent of T. Weights are constants.

    Args:
        student_logits: ``[*batch, C]`` raw logits.
        teacher_probs: ``[*batch, K, C]`` probabilities, softened at ``temperature`` already.
        weights: ``[*batch, K]``.
        temperature: T > 0.

    Raises:
        ValueError: if T is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    log_q = F.log_softmax(student_logits / temperature, dim=-1)[..., None, :]  # (..., 1, C)
    p = teacher_probs.detach()
    divergence = (torch.xlogy(p, p) - p * log_q).sum(dim=-1)  # (..., K)
    return temperature**2 * (weights.detach() * divergence).sum(dim=-1).mean()


def hint_loss(
    student: Float[Tensor, "*batch dim"], teacher: Float[Tensor, "*batch dim"]
) -> Float[Tensor, ""]:
    """``mean |h_s - h_t|^2 / d`` on features of one size (FitNets, Romero et al. 2015, eq. 3).

    The regressor that maps the student's features to the teacher's size belongs to the caller.
    """
    return F.mse_loss(student, teacher.detach())


def _full(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _without_autocast(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(loss)
    def wrapped(student: Tensor, *others: Any, **options: Any) -> Tensor:
        with torch.autocast(student.device.type, enabled=False):
            return loss(student, *others, **options)

    return wrapped


def _gram_distances(x: Tensor) -> tuple[Tensor, Tensor]:
    """Gram matrix and distances ``[B, B]`` of centred rows; on the diagonal a gradient of zero."""
    x = x - x.mean(0)
    gram = x @ x.T
    square = gram.diagonal()
    squared = (square[:, None] + square[None, :] - 2 * gram).clamp(min=0)
    apart = squared > 1e-10 * square.detach().max()
    return gram, torch.where(apart, squared, 1.0).sqrt() * apart


@_without_autocast
def relational_distance_loss(
    student: Float[Tensor, "b d1"], teacher: Float[Tensor, "b d2"]
) -> Float[Tensor, ""]:
    """``mean_ij huber(d_s(i, j) / mu_s - d_t(i, j) / mu_t)``, mu the mean distance.

    RKD-D (Park et al. 2019, eqs. 5 to 7). 0 at B = 1.
    """

    def relative(x: Tensor) -> Tensor:
        distance = _gram_distances(_full(x))[1]
        total = distance.sum().clamp(min=torch.finfo(distance.dtype).tiny)
        return distance * (distance > 0).sum().clamp(min=1) / total

    return F.smooth_l1_loss(relative(student), relative(teacher.detach()))


@_without_autocast
def relational_angle_loss(
    student: Float[Tensor, "b d1"], teacher: Float[Tensor, "b d2"]
) -> Float[Tensor, ""]:
    """``mean_ijk huber(cos_s(j i k) - cos_t(j i k))`` over all angles at i.

    RKD-A (Park et al. 2019, eqs. 8 and 9). 0 at B = 1. By the Gram matrix, without the
    [B, B, d] differences: ``<x_j - x_i, x_k - x_i> = G_jk - G_ij - G_ik + G_ii``.
    """

    def cosines(x: Tensor) -> Tensor:
        gram, distance = _gram_distances(_full(x))
        tiny = torch.finfo(distance.dtype).tiny
        inverse = torch.where(distance > 0, 1 / distance.clamp(min=tiny), 0.0)
        offset = 0.5 * gram.diagonal()[:, None] - gram
        inner = gram + offset[:, :, None] + offset[:, None, :]  # [i, j, k]
        return inner * inverse[:, :, None] * inverse[:, None, :]

    return F.smooth_l1_loss(cosines(student), cosines(teacher.detach()))


@_without_autocast
def contrastive_loss(
    student: Float[Tensor, "b d"],
    teacher: Float[Tensor, "b d"],
    negatives: Float[Tensor, "b n d"],
    bank: int,
    temperature: float = 0.07,
) -> Float[Tensor, ""]:
    """``-mean_i [ log h(s_i, t_i) + sum_j log(1 - h(s_i, t_ij)) ]``, ``h = e / (e + N / M)``.

    ``e = exp(<s, t> / tau)`` (CRD, Tian et al. 2020, eqs. 10, 18, 19). Vectors are scaled to unit
    length here. Not constant: the teacher's vectors, whose embedding may be trained.

    Args:
        student: ``[B, d]`` embedded student features.
        teacher: ``[B, d]`` embedded teacher features of the same clips.
        negatives: ``[B, N, d]`` embedded teacher features of other clips.
        bank: M, how many clips negatives are drawn from.
        temperature: tau > 0.
    """
    s, t, others = (F.normalize(_full(x), dim=-1) for x in (student, teacher, negatives))
    prior = math.log(others.shape[1] / bank)
    log_prior = s.new_tensor(prior)
    right = (s * t).sum(-1) / temperature
    wrong = torch.einsum("bd,bnd->bn", s, others) / temperature
    positive = right - torch.logaddexp(right, log_prior)
    negative = prior - torch.logaddexp(wrong, log_prior)
    return -(positive + negative.sum(-1)).mean()


@_without_autocast
def decoupled_kd_loss(
    student_logits: Float[Tensor, "b c"],
    teacher_logits: Float[Tensor, "b c"],
    labels: Int[Tensor, " b"],
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Float[Tensor, ""]:
    """``T^2 mean_n [ alpha KL(b_t || b_s) + beta KL(p^_t || p^_s) ]``.

    DKD (Zhao et al. 2022, eq. 7). ``b``: true class against all others; ``p^``:
    the other classes among themselves. In the log domain: finite for any finite logits.
    """
    true = F.one_hot(labels, student_logits.shape[1]).bool()

    def parts(logits: Tensor) -> tuple[Tensor, Tensor]:
        z = _full(logits) / temperature
        rest = z.masked_fill(true, -torch.inf)
        others = rest.logsumexp(1)
        binary = F.log_softmax(torch.stack([z[true], others], 1), dim=1)
        return binary, (rest - others[:, None]).masked_fill(true, 0.0)

    (b_s, p_s), (b_t, p_t) = parts(student_logits), parts(teacher_logits.detach())
    target = (b_t.exp() * (b_t - b_s)).sum(1)
    others = (p_t.exp().masked_fill(true, 0.0) * (p_t - p_s)).sum(1)
    return temperature**2 * (alpha * target + beta * others).mean()


@_without_autocast
def dist_loss(
    student_logits: Float[Tensor, "b c"],
    teacher_logits: Float[Tensor, "b c"],
    temperature: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
) -> Float[Tensor, ""]:
    """``T^2 [ beta mean_n (1 - rho(p_s,n , p_t,n)) + gamma mean_c (1 - rho(p_s,:c , p_t,:c)) ]``.

    DIST (Huang et al. 2022, eqs. 6 to 9); rho is Pearson's correlation, over classes and over the
    clips of the batch, and 0 where one of them does not vary.
    """
    p, q = (torch.softmax(_full(z) / temperature, 1) for z in (student_logits, teacher_logits))

    def apart(a: Tensor, b: Tensor) -> Tensor:
        a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
        return (1 - F.cosine_similarity(a, b, dim=1, eps=1e-8)).mean()

    q = q.detach()
    return temperature**2 * (beta * apart(p, q) + gamma * apart(p.T, q.T))

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

Scalar = Float[Tensor, ""]
Logits = Float[Tensor, "*batch classes"]
Probs = Float[Tensor, "*batch teachers classes"]  # of several teachers
Weights = Float[Tensor, "*batch teachers"]
Features = Float[Tensor, "*batch dim"]
OtherFeatures = Float[Tensor, "*batch other"]  # of another size
Negatives = Float[Tensor, "*batch negatives dim"]


def kd_loss(logits: Logits, teacher_probs: Probs, weights: Weights, temperature: float) -> Scalar:
    """``T^2 mean_n sum_k w_nk KL(p_nk || softmax(z_n / T))`` (Hinton et al. 2015, section 2).

    Its gradient is that of distillation from the mixture ``sum_k w_nk p_nk``, whose probabilities
    are softened at T already. ``T^2`` keeps its size independent of T. Weights are constants.

    Raises:
        ValueError: T is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    log_q = F.log_softmax(logits / temperature, dim=-1)[..., None, :]  # (..., 1, C)
    p = teacher_probs.detach()
    divergence = (torch.xlogy(p, p) - p * log_q).sum(dim=-1)  # (..., K)
    return temperature**2 * (weights.detach() * divergence).sum(dim=-1).mean()


def hint_loss(student: Features, teacher: Features) -> Scalar:
    """``mean |h_s - h_t|^2 / d`` on features of one size (FitNets, Romero et al. 2015, eq. 3).

    The regressor that maps the student's features to the teacher's size belongs to the caller.
    """
    return F.mse_loss(student, teacher.detach())


def _full(x: Any) -> Any:
    floats = isinstance(x, Tensor) and x.is_floating_point()
    return x.to(torch.promote_types(x.dtype, torch.float32)) if floats else x


def _in_full_precision(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(loss)
    def wrapped(student: Tensor, *others: Any, **options: Any) -> Tensor:
        with torch.autocast(student.device.type, enabled=False):
            return loss(*map(_full, (student, *others)), **options)

    return wrapped


def _gram_distances(x: Tensor) -> tuple[Tensor, Tensor]:
    """Gram matrix and distances ``[B, B]`` of centred rows; on the diagonal a gradient of zero."""
    x = x - x.mean(0)
    gram = x @ x.T
    square = gram.diagonal()
    squared = (square[:, None] + square[None, :] - 2 * gram).clamp(min=0)
    apart = squared > 1e-10 * square.detach().max()
    return gram, torch.where(apart, squared, 1.0).sqrt() * apart


@_in_full_precision
def relational_distance_loss(student: Features, teacher: OtherFeatures) -> Scalar:
    """``mean_ij huber(d_s(i, j) / mu_s - d_t(i, j) / mu_t)``, mu the mean distance.

    RKD-D (Park et al. 2019, eqs. 5 to 7). 0 at B = 1.
    """

    def relative(x: Tensor) -> Tensor:
        distance = _gram_distances(x)[1]
        total = distance.sum().clamp(min=torch.finfo(distance.dtype).tiny)
        return distance * (distance > 0).sum().clamp(min=1) / total

    return F.smooth_l1_loss(relative(student), relative(teacher.detach()))


@_in_full_precision
def relational_angle_loss(student: Features, teacher: OtherFeatures) -> Scalar:
    """``mean_ijk huber(cos_s(j i k) - cos_t(j i k))`` over all angles at i.

    RKD-A (Park et al. 2019, eqs. 8 and 9). 0 at B = 1. By the Gram matrix, without the
    [B, B, d] differences: ``<x_j - x_i, x_k - x_i> = G_jk - G_ij - G_ik + G_ii``.
    """

    def cosines(x: Tensor) -> Tensor:
        gram, distance = _gram_distances(x)
        tiny = torch.finfo(distance.dtype).tiny
        inverse = torch.where(distance > 0, 1 / distance.clamp(min=tiny), 0.0)
        offset = 0.5 * gram.diagonal()[:, None] - gram
        inner = gram + offset[:, :, None] + offset[:, None, :]  # [i, j, k]
        return inner * inverse[:, :, None] * inverse[:, None, :]

    return F.smooth_l1_loss(cosines(student), cosines(teacher.detach()))


@_in_full_precision
def contrastive_loss(
    student: Features, teacher: Features, negatives: Negatives, bank: int, temperature: float = 0.07
) -> Scalar:
    """``-mean_i [ log h(s_i, t_i) + sum_j log(1 - h(s_i, t_ij)) ]``, ``h = e / (e + N / M)``.

    ``e = exp(<s, t> / tau)`` (CRD, Tian et al. 2020, eqs. 10, 18, 19), M the clips in the ``bank``
    that the N negatives of each clip are drawn from. Vectors are embedded by the caller and scaled
    to unit length here. The teacher's are no constants: their embedding may be trained.
    """
    s, t, others = (F.normalize(x, dim=-1) for x in (student, teacher, negatives))
    prior = math.log(others.shape[1] / bank)
    log_prior = s.new_tensor(prior)
    right = (s * t).sum(-1) / temperature
    wrong = torch.einsum("bd,bnd->bn", s, others) / temperature
    positive = right - torch.logaddexp(right, log_prior)
    negative = prior - torch.logaddexp(wrong, log_prior)
    return -(positive + negative.sum(-1)).mean()


@_in_full_precision
def decoupled_kd_loss(
    student: Logits,
    teacher: Logits,
    labels: Int[Tensor, " batch"],
    temperature: float,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Scalar:
    """``T^2 mean_n [ alpha KL(b_t || b_s) + beta KL(p^_t || p^_s) ]``.

    DKD (Zhao et al. 2022, eq. 7). ``b``: true class against all others; ``p^``: the other classes
    among themselves. In the log domain: finite for any finite logits.
    """
    true = F.one_hot(labels, student.shape[1]).bool()

    def parts(logits: Tensor) -> tuple[Tensor, Tensor]:
        z = logits / temperature
        rest = z.masked_fill(true, -torch.inf)
        others = rest.logsumexp(1)
        binary = F.log_softmax(torch.stack([z[true], others], 1), dim=1)
        return binary, (rest - others[:, None]).masked_fill(true, 0.0)

    (b_s, p_s), (b_t, p_t) = parts(student), parts(teacher.detach())
    target = (b_t.exp() * (b_t - b_s)).sum(1)
    others = (p_t.exp().masked_fill(true, 0.0) * (p_t - p_s)).sum(1)
    return temperature**2 * (alpha * target + beta * others).mean()


@_in_full_precision
def dist_loss(student: Logits, teacher: Logits, temperature: float) -> Scalar:
    """``T^2 [ mean_n (1 - rho(p_s,n , p_t,n)) + mean_c (1 - rho(p_s,:c , p_t,:c)) ]``.

    DIST (Huang et al. 2022, eqs. 6 to 9, beta = gamma = 1); rho is Pearson's correlation, over
    classes and over the clips of the batch, and 0 where one of them does not vary.
    """
    p, q = (torch.softmax(z / temperature, 1) for z in (student, teacher.detach()))

    def apart(a: Tensor, b: Tensor) -> Tensor:
        a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
        return (1 - F.cosine_similarity(a, b, dim=1, eps=1e-8)).mean()

    return temperature**2 * (apart(p, q) + apart(p.T, q.T))

"""Baseline distillation losses, as pure functions. The two graph losses live in ``gdviz.graphs``."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def kd_loss(
    student_logits: Float[Tensor, "*batch classes"],
    teacher_probs: Float[Tensor, "*batch classes"],
    temperature: float,
) -> Float[Tensor, ""]:
    """``T^2 mean_n KL(p_n || softmax(z_n / T))`` (Hinton et al. 2015, section 2.1).

    ``T^2`` keeps the size of the gradient independent of T, so it is never dropped.

    Args:
        student_logits: ``[*batch, C]`` raw logits.
        teacher_probs: ``[*batch, C]`` probabilities already softened at ``temperature``.
        temperature: T > 0.

    Raises:
        ValueError: if T is not positive.
    """
    return multi_teacher_kd_loss(student_logits, teacher_probs[..., None, :], torch.ones_like(student_logits[..., :1]), temperature)


def multi_teacher_kd_loss(
    student_logits: Float[Tensor, "*batch classes"],
    teacher_probs: Float[Tensor, "*batch teachers classes"],
    weights: Float[Tensor, "*batch teachers"],
    temperature: float,
) -> Float[Tensor, ""]:
    """``T^2 mean_n sum_k w_nk KL(p_nk || q_n)``: uniform, EBKD or any other weighting of teachers.

    Its gradient is that of KD from the mixture ``sum_k w_nk p_nk``. Teachers and weights are constants.

    Raises:
        ValueError: if T is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    log_q = F.log_softmax(student_logits / temperature, dim=-1)[..., None, :]  # (..., 1, C)
    p = teacher_probs.detach()
    divergence = (torch.xlogy(p, p) - p * log_q).sum(dim=-1)  # (..., K)
    return temperature**2 * (weights.detach() * divergence).sum(dim=-1).mean()


def hint_loss(student_features: Float[Tensor, "*batch dim"], teacher_features: Float[Tensor, "*batch dim"]) -> Float[Tensor, ""]:
    """``mean |h_s - h_t|^2 / d`` on features of one size (FitNets, Romero et al. 2015, eq. 3).

    The regressor that maps the student's features to the teacher's size belongs to the caller.
    """
    return F.mse_loss(student_features, teacher_features.detach())

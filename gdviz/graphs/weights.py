"""Learned edge weights of the two graphs, from evidence about the teachers.

Never from the distillation loss: minimised over the weights, that loss picks the teacher that is
easiest to imitate, and a constant one is easiest of all. What is used instead is how far a teacher's
out-of-fold outputs lie from the labels, and how far from the other teachers. All of it is ours unless a
docstring names a source. Nothing here passes a gradient to a student.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gdviz.graphs.costs import zero_one_cost
from gdviz.graphs.kernels import unbiased_cka
from gdviz.graphs.transport import barycenter, sinkhorn_divergence

#: A policy maps teacher probabilities ``[N, K, C]`` and labels ``[N]`` (-1 unknown) to ``[N, K]``.
Policy = Callable[[Tensor, Tensor], Tensor]

_CHUNK = 1024  # clips at a time: leave-one-out consensuses take K (K - 1) C numbers a clip


def _label_cost(probs: Tensor, labels: Tensor, cost: Tensor) -> Tensor:
    """``<p_nk, D[:, y_n]>``, the exact EMD from a prediction to a label. Rows of -1 mean nothing."""
    return torch.einsum("nkc,nc->nk", probs, cost.to(probs)[:, labels.clamp(min=0)].mT)


@torch.no_grad()
def evidence(
    probs: Float[Tensor, "clips teachers classes"],
    labels: Int[Tensor, " clips"],
    cost: Float[Tensor, "classes classes"],
    *,
    alpha: float = 0.5,
    eps: float = 0.1,
) -> Float[Tensor, "clips teachers"]:
    """``c_nk = alpha <p_nk, D[:, y_n]> + (1 - alpha) S(p_nk, barycenter of the others)``.

    The first term counts on labelled clips only, the second needs no label (a single teacher has none:
    0). S is the debiased divergence: the raw cost would call a sharp teacher far from itself.

    Args:
        probs: ``[N, K, C]``, out of fold on the labelled clips.
        labels: ``[N]``, -1 where unknown.
        cost: ``[C, C]`` ground cost.
        alpha: share of the labels, in [0, 1].
        eps: of the divergence and the consensus, see :func:`gdviz.graphs.transport.sinkhorn`.

    Raises:
        ValueError: if alpha is outside [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    clips, teachers, _ = probs.shape
    probs = probs if probs.dtype == torch.float64 else probs.float()
    labelled = (labels >= 0).to(probs)[:, None]
    total = alpha * labelled * _label_cost(probs, labels, cost)
    if teachers == 1 or alpha == 1:
        return total
    others = torch.tensor([[j for j in range(teachers) if j != k] for k in range(teachers)], device=probs.device)
    for part in torch.arange(clips, device=probs.device).split(_CHUNK):
        rest = probs[part][:, others]  # (n, K, K - 1, C)
        consensus = barycenter(rest, torch.ones_like(rest[..., 0]), cost, eps=eps, tol=1e-4).distribution
        disagreement = sinkhorn_divergence(probs[part], consensus, cost, eps=eps, tol=1e-4)
        total[part] += (1 - alpha) * disagreement
    return total


@torch.no_grad()
def teacher_prior(
    probs: Float[Tensor, "clips teachers classes"],
    labels: Int[Tensor, " clips"],
    cost: Float[Tensor, "classes classes"],
    eta: float,
) -> Float[Tensor, " teachers"]:
    """``log prior_k = log softmax_k(- mean_n <p_nk, D[:, y_n]> / eta)`` over the labelled clips.

    It hands what the labels say of each teacher on to the unlabelled clips. Without labels: uniform.
    """
    known = labels >= 0
    probs = probs if probs.dtype == torch.float64 else probs.float()
    if not bool(known.any()):
        return torch.log_softmax(probs.new_zeros(probs.shape[1]), dim=0)
    return torch.log_softmax(-_label_cost(probs[known], labels[known], cost).mean(0) / eta, dim=0)


def _with_floor(weights: Tensor, floor: float) -> Tensor:
    if not 0 <= floor <= 1:
        raise ValueError(f"floor must lie in [0, 1], got {floor}")
    return (1 - floor) * weights + floor / weights.shape[-1]


def closed_form(
    c: Float[Tensor, "*batch teachers"],
    *,
    eta: float,
    log_prior: Float[Tensor, "*prior teachers"] | None = None,
    floor: float = 0.05,
) -> Float[Tensor, "*batch teachers"]:
    """``argmin_w <w, c> + eta KL(w || prior) = softmax(log prior - c / eta)``, then the floor.

    The floor ``w <- (1 - floor) w + floor / K`` keeps every teacher heard.

    Raises:
        ValueError: if eta is not positive or floor is outside [0, 1].

    Example:
        >>> closed_form(torch.tensor([0.0, 0.0]), eta=1.0)
        tensor([0.5000, 0.5000])
    """
    if not eta > 0:
        raise ValueError(f"eta must be positive, got {eta}")
    score = -c / eta if log_prior is None else log_prior - c / eta
    return _with_floor(torch.softmax(score, dim=-1), floor)


def effective_number(weights: Float[Tensor, "*batch teachers"]) -> Float[Tensor, "*batch"]:
    """``exp(H(w))``, between 1 (one teacher decides) and K (all alike). Hill number of order 1.

    Example:
        >>> effective_number(torch.tensor([0.5, 0.5, 0.0]))
        tensor(2.)
    """
    return torch.special.entr(weights).sum(dim=-1).exp()


class Gate(nn.Module):
    """Per-clip weights from the teachers' own outputs: ``w_n = softmax_k(bias_k + <theta, phi_nk>)``.

    ``phi`` holds a teacher's log-confidence, its negative entropy over ``log C`` and its agreement
    ``<p_k, mean of the others>``. K + 3 numbers in all: it is fitted on a handful of labelled clips.
    """

    def __init__(self, log_prior: Float[Tensor, " teachers"], *, floor: float = 0.05) -> None:
        super().__init__()
        self.bias = nn.Parameter(log_prior.detach().clone())
        self.theta = nn.Parameter(torch.zeros(3, dtype=log_prior.dtype, device=log_prior.device))
        self.register_buffer("log_prior", log_prior.detach().clone())
        self.floor = floor

    def forward(self, probs: Float[Tensor, "clips teachers classes"]) -> Float[Tensor, "clips teachers"]:
        probs = probs.detach().to(self.theta.dtype)
        teachers, classes = probs.shape[1:]
        others = (probs.sum(1, keepdim=True) - probs) / max(teachers - 1, 1)
        confidence = probs.amax(-1).clamp(min=1e-12).log()
        entropy = torch.special.entr(probs).sum(-1) / math.log(max(classes, 2))
        phi = torch.stack([confidence, -entropy, (probs * others).sum(-1)], dim=-1)  # (N, K, 3)
        return _with_floor(torch.softmax(self.bias + phi @ self.theta, dim=-1), self.floor)


def gate_loss(gate: Gate, probs: Float[Tensor, "clips teachers classes"], labels: Int[Tensor, " clips"], rho: float) -> Float[Tensor, ""]:
    """``mean_n -log(sum_k w_nk p_nk[y_n]) + rho KL(mean_n w || prior)`` on labelled clips.

    The second term holds the gate to its prior on average; without it a gate fitted on a hundred clips
    bets on the teacher that was luckiest on them.
    """
    weights = gate(probs)
    right = probs.gather(2, labels[:, None, None].expand(-1, probs.shape[1], 1)).squeeze(2)  # (N, K)
    mixture = (weights * right).sum(-1).clamp(min=1e-8)
    mean = weights.mean(0)
    return -mixture.log().mean() + rho * (torch.xlogy(mean, mean) - mean * gate.log_prior).sum()


def fit_gate(
    probs: Float[Tensor, "clips teachers classes"],
    labels: Int[Tensor, " clips"],
    *,
    log_prior: Float[Tensor, " teachers"] | None = None,
    rho: float = 1.0,
    steps: int = 200,
    lr: float = 0.05,
    floor: float = 0.05,
) -> Gate:
    """Minimise :func:`gate_loss` on the labelled clips.

    Starts at the prior, full batch, Adam: deterministic. ``probs`` must be out of fold, or a teacher
    that has memorised the labelled clips wins. Without labelled clips the gate stays at the prior.
    """
    known = labels >= 0
    probs, labels = (probs if probs.dtype == torch.float64 else probs.float())[known].detach(), labels[known]
    if log_prior is None:
        log_prior = torch.log_softmax(probs.new_zeros(probs.shape[1]), dim=0)
    gate = Gate(log_prior.to(probs), floor=floor)
    if not len(labels):
        return gate.requires_grad_(False)
    optimiser = torch.optim.Adam(gate.parameters(), lr=lr)
    with torch.enable_grad():
        for _ in range(steps):
            optimiser.zero_grad()
            gate_loss(gate, probs, labels, rho).backward()
            optimiser.step()
    return gate.requires_grad_(False)


@torch.no_grad()
def uniform(probs: Float[Tensor, "clips teachers classes"], labels: Int[Tensor, " clips"]) -> Float[Tensor, "clips teachers"]:
    """``w_nk = 1 / K``."""
    return torch.full_like(probs[..., 0], 1 / probs.shape[1])


def entropic(
    probs: Float[Tensor, "clips teachers classes"],
    labels: Int[Tensor, " clips"],
    *,
    cost: Float[Tensor, "classes classes"] | None = None,
    alpha: float = 0.5,
    eta: float = 0.25,
    eps: float = 0.1,
    floor: float = 0.05,
) -> Float[Tensor, "clips teachers"]:
    """The default: :func:`closed_form` of :func:`evidence` under :func:`teacher_prior`.

    Costs have unit mean off the diagonal, so ``eta = 0.25`` lets a teacher that errs a quarter more
    often count ``e`` times less. ``cost`` defaults to 0/1.
    """
    cost = zero_one_cost(probs.shape[-1], dtype=probs.dtype, device=probs.device) if cost is None else cost
    c = evidence(probs, labels, cost, alpha=alpha, eps=eps)
    return closed_form(c, eta=eta, log_prior=teacher_prior(probs, labels, cost, eta), floor=floor)


def gated(
    probs: Float[Tensor, "clips teachers classes"],
    labels: Int[Tensor, " clips"],
    *,
    cost: Float[Tensor, "classes classes"] | None = None,
    eta: float = 0.25,
    rho: float = 1.0,
    floor: float = 0.05,
) -> Float[Tensor, "clips teachers"]:
    """:func:`fit_gate` under :func:`teacher_prior`, applied to every clip."""
    cost = zero_one_cost(probs.shape[-1], dtype=probs.dtype, device=probs.device) if cost is None else cost
    gate = fit_gate(probs, labels, log_prior=teacher_prior(probs, labels, cost, eta), rho=rho, floor=floor)
    return gate(probs)


@torch.no_grad()
def entropy_based(probs: Float[Tensor, "clips teachers classes"], labels: Int[Tensor, " clips"]) -> Float[Tensor, "clips teachers"]:
    """``w_nk = (1 - softmax_k(H(p_nk))) / (K - 1)``: the surer teacher counts more.

    After EBKD (Kwon et al., ICASSP 2020); this normalisation is ours. A sure but wrong teacher wins.
    """
    teachers = probs.shape[1]
    if teachers == 1:
        return torch.ones_like(probs[..., 0])
    return (1 - torch.softmax(torch.special.entr(probs).sum(-1), dim=-1)) / (teachers - 1)


@torch.no_grad()
def pair_weights(
    pair_grams: Float[Tensor, "pairs clips clips"],
    labels: Int[Tensor, " clips"],
    *,
    eta: float = 0.1,
    log_prior: Float[Tensor, " pairs"] | None = None,
    floor: float = 0.05,
) -> Float[Tensor, " pairs"]:
    """``v_ij = softmax(log prior + CKA(Gram(r_ij), [y = y']) / eta)`` on the labelled clips.

    CKA is the unbiased one: the biased one reads .9 on independent features. With fewer than four
    labelled clips, or one class only, there is no evidence and the prior (uniform by default) is kept.

    Args:
        pair_grams: ``[E, N, N]`` from :meth:`RepresentationGraph.pair_grams`, on held-out clips.
        labels: ``[N]``, -1 where unknown.
        eta: how much alignment outweighs the prior.
        log_prior: ``[E]``.
        floor: as in :func:`closed_form`.
    """
    known = (labels >= 0).nonzero().squeeze(1)
    alignment = pair_grams.new_zeros(len(pair_grams))
    if len(known) >= 4:
        same = (labels[known][:, None] == labels[known][None, :]).to(pair_grams)
        alignment = unbiased_cka(pair_grams[:, known][:, :, known], same)
    return closed_form(-alignment, eta=eta, log_prior=log_prior, floor=floor)

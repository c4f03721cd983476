"""Learned edge weights of the two graphs, from evidence about the teachers (ours).

Minimised over the weights, the distillation loss picks the teacher that is easiest to imitate: a
constant one. The evidence is what a teacher's predictions tell of a clip's label, and of what other
teachers predict, beyond what they would tell of any other clip: a constant teacher tells nothing.
"""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import one_hot

from gdviz.graphs import _dtypes
from gdviz.graphs.costs import Cost
from gdviz.graphs.kernels import unbiased_cka

Probs = Float[Tensor, "clips teachers classes"]
Labels = Int[Tensor, " clips"]  # -1 unknown
Weights = Float[Tensor, "clips teachers"]
PerTeacher = Float[Tensor, "*batch teachers"]


def _surplus(probs: Probs, target: Tensor, cost: Cost, base: Tensor | slice) -> Weights:
    """Compute ``<p_nk, D (t_nk - mean_m t_mk)>`` over clips m in ``base``."""
    return (probs * ((target - target[base].mean(0)) @ cost.to(probs).mT)).sum(-1)


@torch.no_grad()
def teacher_prior(probs: Probs, labels: Labels, cost: Cost) -> Float[Tensor, " teachers"]:
    """Return ``log prior_k``, with ``prior_k`` in proportion to ``max(0, g_k - se_k)``.

    ``g_k = mean_n <p_nk, D (ybar - y_n)>`` over labelled clips, ``se_k`` its standard error. For a
    teacher that is right or guesses, ``g_k`` is in proportion to its accuracy above chance, the
    best weight of a weak voter (Nitzan & Paroush 1982). A twentieth of the prior is spread evenly;
    all of it if no teacher is better than its error.
    """
    known, probs = labels >= 0, _dtypes.full(probs)
    skill = probs.new_zeros(probs.shape[1])
    if bool(known.any()):
        truth = one_hot(labels[known], probs.shape[-1]).to(probs)[:, None]
        gain = -_surplus(probs[known], truth, cost, slice(None))
        skill = (gain.mean(0) - gain.std(0, correction=0) / len(gain) ** 0.5).clamp(min=0)
    skill = skill if float(skill.sum()) > 1e-6 else torch.ones_like(skill)
    return _with_floor(skill / skill.sum(), 0.05).log()


@torch.no_grad()
def evidence(probs: Probs, labels: Labels, cost: Cost, *, alpha: float = 0.5) -> Weights:
    """``c_nk = alpha <p_nk, D (y_n - ybar)> + (1 - alpha) <p_nk, D (b_nk - bbar_k)>``, best if low.

    ``<p, D y>`` is the exact EMD from a prediction to a label, if known; ``b_nk``, the others'
    predictions averaged by :func:`teacher_prior`, stands for the label. Both are compared with
    their means over labelled clips (or all without labels), as in peer prediction (Dasgupta & Ghosh
    2013, Shnayder et al. 2016). ``probs`` must be out of fold.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    known, probs = labels >= 0, _dtypes.full(probs)
    base = known if bool(known.any()) else ~known
    truth = one_hot(labels.clamp(min=0), probs.shape[-1]).to(probs)[:, None]
    c = alpha * known[:, None] * _surplus(probs, truth, cost, base)
    if probs.shape[1] > 1:
        prior = teacher_prior(probs, labels, cost).exp()[:, None]
        others = ((prior * probs).sum(1, keepdim=True) - prior * probs) / (1 - prior)
        c += (1 - alpha) * _surplus(probs, others, cost, base)
    return c


def _with_floor(weights: Tensor, floor: float) -> Tensor:
    if not 0 <= floor <= 1:
        raise ValueError(f"floor must lie in [0, 1], got {floor}")
    return (1 - floor) * weights + floor / weights.shape[-1]


def closed_form(
    c: PerTeacher, *, eta: float, log_prior: Tensor | None = None, floor: float = 0.05
) -> PerTeacher:
    """Return ``argmin_w <w, c> + eta KL(w || prior) = softmax(log prior - c / eta)``.

    It is mixed with ``floor / K``: every teacher stays heard. ValueError if it cannot be.
    """
    if not eta > 0:
        raise ValueError(f"eta must be positive, got {eta}")
    score = -c / eta if log_prior is None else log_prior - c / eta
    return _with_floor(torch.softmax(score, dim=-1), floor)


def effective_number(weights: PerTeacher) -> Float[Tensor, "*batch"]:
    """Compute ``exp(H(w))``, between 1 (one teacher decides) and K (all alike); Hill, order 1.

    Example:
        >>> effective_number(torch.tensor([0.5, 0.5, 0.0]))
        tensor(2.)
    """
    return torch.special.entr(weights).sum(dim=-1).exp()


class Gate(nn.Module):
    """Weights of a clip from its teachers' predictions, ``w_n = softmax_k(bias_k + <theta, phi>)``.

    ``phi_nk`` holds a teacher's log-confidence, its negative entropy over ``log C`` and its
    agreement ``<p_k, mean of the others>``: K + 3 numbers to fit on a handful of labelled clips.
    """

    def __init__(self, log_prior: Float[Tensor, " teachers"], *, floor: float = 0.05) -> None:
        super().__init__()
        self.bias = nn.Parameter(log_prior.detach().clone())
        self.theta = nn.Parameter(log_prior.new_zeros(3))
        self.floor = floor

    def forward(self, probs: Probs) -> Weights:
        probs = probs.detach().to(self.theta.dtype)
        teachers, classes = probs.shape[1:]
        others = (probs.sum(1, keepdim=True) - probs) / max(teachers - 1, 1)
        confidence = probs.amax(-1).clamp(min=1e-12).log()
        entropy = torch.special.entr(probs).sum(-1) / math.log(max(classes, 2))
        phi = torch.stack([confidence, -entropy, (probs * others).sum(-1)], dim=-1)  # (N, K, 3)
        return _with_floor(torch.softmax(self.bias + phi @ self.theta, dim=-1), self.floor)


def fit_gate(
    probs: Probs, labels: Labels, log_prior: Tensor, *, rho: float, steps: int, floor: float
) -> Iterator[Gate]:
    """Yield the gate at its prior, and again after every ``steps`` steps of Adam on labelled clips.

    The loss is ``mean_n -log(sum_k w_nk p_nk[y_n]) + rho KL(mean_n w || prior)``, full batch;
    without rho the gate bets on the teacher that was luckiest on a hundred clips. ``probs`` must be
    out of fold. Without labels the gate stays at the prior.
    """
    known = labels >= 0
    probs, labels = _dtypes.full(probs)[known].detach(), labels[known]
    log_prior = log_prior.to(probs)
    right = probs.gather(2, labels[:, None, None].expand(-1, probs.shape[1], 1)).squeeze(2)
    gate = Gate(log_prior, floor=floor)
    optimiser = torch.optim.Adam(gate.parameters(), lr=0.05)
    while True:
        yield gate
        with torch.enable_grad():
            for _ in range(steps if len(labels) else 0):
                weights = gate(probs)
                mixture = (weights * right).sum(-1).clamp(min=1e-8)
                mean = weights.mean(0)
                divergence = (torch.xlogy(mean, mean) - mean * log_prior).sum()
                optimiser.zero_grad()
                (-mixture.log().mean() + rho * divergence).backward()
                optimiser.step()


@torch.no_grad()
def pair_alignment(
    pair_grams: Float[Tensor, "pairs clips clips"], labels: Labels | Int[Tensor, "clips classes"]
) -> Float[Tensor, " pairs"]:
    """Compute the unbiased ``CKA(Gram(r_ij), [y = y'])`` on labelled clips, held-out ones.

    Of several labels a clip, 0 or 1 a class, the Gram matrix is ``<y, y'>``. 0 with fewer than four
    labelled clips, one class only, or no two clips of one class. See
    ``RepresentationGraph.pair_grams``.
    """
    several = labels[:, None] if labels.ndim == 1 else labels
    known = (several >= 0).all(1).nonzero().squeeze(1)
    if len(known) < 4:
        return pair_grams.new_zeros(len(pair_grams))
    y = one_hot(several[known, 0]) if labels.ndim == 1 else labels[known]
    same = y.to(pair_grams) @ y.to(pair_grams).T
    return unbiased_cka(pair_grams[:, known][:, :, known], same)

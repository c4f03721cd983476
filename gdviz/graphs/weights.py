"""Learned edge weights of the two graphs, from evidence about the teachers.

It never looks at the distillation loss: minimised over the weights, that loss picks the teacher
that is easiest to imitate, and a constant one is easiest of all. It asks instead what a teacher's
out-of-fold outputs tell of the labels, and of what the other teachers say, *beyond what they would tell of
any other clip*: a teacher that says the same of every clip tells nothing, however near it lies to the rest.
All of it is ours unless a docstring names a source. Nothing here passes a gradient to a student.
"""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import one_hot

from gdviz.graphs.kernels import unbiased_cka

Probs = Float[Tensor, "clips teachers classes"]
Labels = Int[Tensor, " clips"]  # -1 unknown
Cost = Float[Tensor, "classes classes"]
Weights = Float[Tensor, "clips teachers"]


def _full(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _surplus(
    probs: Probs, target: Float[Tensor, "clips #teachers classes"], cost: Cost, base: Tensor
) -> Weights:
    """``<p_nk, D (t_nk - mean_m t_mk)>`` over clips m in ``base``: the cost of moving a prediction to a target, less that to any target."""
    return (probs * ((target - target[base].mean(0)) @ cost.to(probs).mT)).sum(-1)


@torch.no_grad()
def teacher_prior(probs: Probs, labels: Labels, cost: Cost) -> Float[Tensor, " teachers"]:
    """``log prior_k``, ``prior_k`` in proportion to ``max(0, g_k - se_k)``, floored at a twentieth spread evenly.

    ``g_k = mean_n <p_nk, D (ybar - y_n)>`` over labelled clips: how much nearer the labels a teacher is than to
    those of other clips, and ``se_k`` its standard error. Zero for a constant teacher, whatever it says, and in
    proportion to the accuracy above chance of one that is right or guesses, which is the best weight of a weak
    voter to first order (Nitzan & Paroush 1982). Scale-free: weak teachers are told from useless ones as well
    as strong ones are. It hands what the labels say of a teacher on to unlabelled clips. Uniform if no teacher
    has shown anything.
    """
    known, probs = labels >= 0, _full(probs)
    shown = probs.new_zeros(probs.shape[1])
    if bool(known.any()):
        gain = -_surplus(
            probs[known],
            one_hot(labels[known], probs.shape[-1]).to(probs)[:, None],
            cost,
            slice(None),
        )
        shown = (gain.mean(0) - gain.std(0, correction=0) / len(gain) ** 0.5).clamp(min=0)
    shown = shown if float(shown.sum()) > 1e-6 else torch.ones_like(shown)
    return _with_floor(shown / shown.sum(), 0.05).log()


@torch.no_grad()
def evidence(probs: Probs, labels: Labels, cost: Cost, *, alpha: float = 0.5) -> Weights:
    """``c_nk = alpha <p_nk, D (y_n - ybar)> + (1 - alpha) <p_nk, D (b_nk - bbar_k)>``, lower is better.

    ``<p, D y>`` is the exact EMD from a prediction to a label; ``b_nk`` is what the other teachers believe,
    averaged by :func:`teacher_prior`, and stands for the label. Both are compared with another clip's (bars:
    mean over labelled clips, or all without labels), as peer prediction does (Dasgupta & Ghosh 2013, Shnayder
    et al. 2016): the plain distance to the others is smallest for a teacher that is vague. The first term
    counts on labelled clips only, the second needs no label (a single teacher has none: 0).

    Args:
        probs: ``[N, K, C]``, out of fold on the labelled clips.
        labels: ``[N]``, -1 where unknown.
        cost: ``[C, C]`` ground cost.
        alpha: share of the labels, in [0, 1].

    Raises:
        ValueError: if alpha is outside [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    known, probs = labels >= 0, _full(probs)
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

    def forward(self, probs: Probs) -> Weights:
        probs = probs.detach().to(self.theta.dtype)
        teachers, classes = probs.shape[1:]
        others = (probs.sum(1, keepdim=True) - probs) / max(teachers - 1, 1)
        confidence = probs.amax(-1).clamp(min=1e-12).log()
        entropy = torch.special.entr(probs).sum(-1) / math.log(max(classes, 2))
        phi = torch.stack([confidence, -entropy, (probs * others).sum(-1)], dim=-1)  # (N, K, 3)
        return _with_floor(torch.softmax(self.bias + phi @ self.theta, dim=-1), self.floor)


def gate_loss(gate: Gate, probs: Probs, labels: Labels, rho: float) -> Float[Tensor, ""]:
    """``mean_n -log(sum_k w_nk p_nk[y_n]) + rho KL(mean_n w || prior)`` on labelled clips.

    The second term holds the gate to its prior on average; without it a gate fitted on a hundred clips
    bets on the teacher that was luckiest on them.
    """
    weights = gate(probs)
    right = probs.gather(2, labels[:, None, None].expand(-1, probs.shape[1], 1)).squeeze(
        2
    )  # (N, K)
    mixture = (weights * right).sum(-1).clamp(min=1e-8)
    mean = weights.mean(0)
    return -mixture.log().mean() + rho * (torch.xlogy(mean, mean) - mean * gate.log_prior).sum()


def fit_gate(
    probs: Probs,
    labels: Labels,
    log_prior: Float[Tensor, " teachers"],
    *,
    rho: float = 1.0,
    steps: int = 200,
    floor: float = 0.05,
) -> Iterator[Gate]:
    """Yields the gate at its prior, and again after every ``steps`` steps down :func:`gate_loss` on the labelled clips.

    Full batch, Adam: deterministic. ``probs`` must be out of fold, or a teacher that has memorised the
    labelled clips wins. Without labelled clips the gate stays at the prior.
    """
    known = labels >= 0
    probs, labels = _full(probs)[known].detach(), labels[known]
    gate = Gate(log_prior.to(probs), floor=floor)
    optimiser = torch.optim.Adam(gate.parameters(), lr=0.05)
    while True:
        yield gate
        with torch.enable_grad():
            for _ in range(steps if len(labels) else 0):
                optimiser.zero_grad()
                gate_loss(gate, probs, labels, rho).backward()
                optimiser.step()


@torch.no_grad()
def pair_alignment(
    pair_grams: Float[Tensor, "pairs clips clips"], labels: Labels
) -> Float[Tensor, " pairs"]:
    """``CKA(Gram(r_ij), [y = y'])`` on the labelled clips; 0 with fewer than four of them, or one class only.

    The unbiased CKA: the biased one reads .9 on independent features.

    Args:
        pair_grams: ``[E, N, N]`` from :meth:`RepresentationGraph.pair_grams`, on held-out clips.
        labels: ``[N]``, -1 where unknown.
    """
    known = (labels >= 0).nonzero().squeeze(1)
    if len(known) < 4:
        return pair_grams.new_zeros(len(pair_grams))
    same = (labels[known][:, None] == labels[known][None, :]).to(pair_grams)
    return unbiased_cka(pair_grams[:, known][:, :, known], same)

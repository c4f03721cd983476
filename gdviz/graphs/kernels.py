"""Gram matrices and the distances between two samples that can be read off them.

Gram matrices ``[*batch, N, N]`` of N clips: ``kxx`` of one sample, ``kyy`` of the other and ``kxy``
across, rows from the first. Clip n of one sample is clip n of the other.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

MULTIPLES = (4.0, 2.0, 1.0, 0.5, 0.25)  # of the median: widths of the Gaussian kernels

Gram = Float[Tensor, "*batch clips clips"]
Other = Float[Tensor, "*other clips clips"]
Vectors = Float[Tensor, "*batch clips dim"]
Value = Float[Tensor, "*batch"]
Labels = Int[Tensor, " some"] | Float[Tensor, "some classes"] | None


def gram(x: Vectors, y: Float[Tensor, "*batch others dim"] | None = None) -> Tensor:
    """Compute ``G_nm = <x_n, y_m>``; ``y`` defaults to ``x``."""
    return x @ (x if y is None else y).mT


def center(k: Gram) -> Gram:
    """Compute ``H K H``, ``H = I - 1 1^T / N``: K of features centred on the sample."""
    rows, columns = k.mean(dim=-1, keepdim=True), k.mean(dim=-2, keepdim=True)
    return k - rows - columns + rows.mean(dim=-2, keepdim=True)


def diagonal(k: Gram) -> Float[Tensor, "*batch clips"]:
    """Return ``k_nn``; the compiled gradient of ``Tensor.diagonal`` behind a product is wrong."""
    return (k * torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)).sum(dim=-1)


def off_diagonal(clips: int, device: torch.device | None = None) -> Bool[Tensor, "clips clips"]:
    """Return the mask of pairs of different clips."""
    return ~torch.eye(clips, dtype=torch.bool, device=device)


@torch.no_grad()
def median_bandwidth(d2: Gram) -> Value:
    """Return the median squared distance between different clips, a constant; 2 if it is 0."""
    clips = d2.shape[-1]
    if clips < 2:
        return d2.new_full(d2.shape[:-2], 2.0)  # of unit vectors at right angles
    i, j = torch.triu_indices(clips, clips, offset=1, device=d2.device)
    median = d2[..., i, j].median(dim=-1).values
    return torch.where(median > 0, median, 2.0)


def gaussian_kernels(kxx: Gram, kyy: Gram, kxy: Gram, multiple: float = 1.0) -> list[Gram]:
    """Turn Gram matrices into kernels ``mean_m exp(-d^2 / (m s))`` over ``MULTIPLES`` m.

    s is ``multiple`` of the first sample's median. A single width far below the distances would
    have no gradient. As the m halve, one exponential serves all: the rest are squares of it.
    """
    x, y = diagonal(kxx)[..., None], diagonal(kyy)[..., None]
    squares = (x + x.mT - 2 * kxx, y + y.mT - 2 * kyy, x + y.mT - 2 * kxy)
    d2 = [d.clamp(min=0) for d in squares]
    width = (MULTIPLES[0] * (multiple * median_bandwidth(d2[0])))[..., None, None]
    kernels = [torch.exp(-d / width) for d in d2]
    totals = kernels
    for _ in MULTIPLES[1:]:
        kernels = [k * k for k in kernels]
        totals = [total + k for total, k in zip(totals, kernels, strict=True)]
    return [total / len(MULTIPLES) for total in totals]


def mmd2(
    kxx: Gram,
    kyy: Gram,
    kxy: Gram,
    *,
    pair_weights: Float[Tensor, "clips clips"] | None = None,
    paired: float = 0.0,
    biased: bool = False,
) -> Value:
    """``sum_{n != m} o_nm (k(x_n, x_m) + k(y_n, y_m) - 2 k(x_n, y_m)) / sum_{n != m} o_nm``.

    The U-statistic of Gretton et al. 2012, lemma 6 and eq. 4, sometimes negative; ``biased``, and N
    = 1, count ``n = m`` too. ``pair_weights`` o by labels, see :func:`label_pair_weights`, compare
    joint distributions of feature and label (ours). Taking the clip for its own label adds
    ``paired mean_n (k(x_n, x_n) + k(y_n, y_n) - 2 k(x_n, y_n))`` (ours).
    """
    clips = kxx.shape[-1]
    o = kxx.new_ones(clips, clips) if pair_weights is None else pair_weights
    if not biased and clips > 1:
        o = o * off_diagonal(clips, kxx.device)
    h = kxx + kyy - kxy - kxy.mT  # (*batch, N, N)
    value = (o * h).sum(dim=(-2, -1)) / o.sum().clamp(min=1e-12)
    return value + paired * diagonal(h).mean(dim=-1) if paired else value


def mmd(kxx: Gram, kyy: Gram, kxy: Gram, **options: Any) -> Value:
    """Compute :func:`mmd2` of :func:`gaussian_kernels`."""
    return mmd2(*gaussian_kernels(kxx, kyy, kxy), **options)


def label_pair_weights(labels: Labels, mu: float, clips: int, like: Tensor) -> Tensor | None:
    """Compute ``1 + mu [y = y']``, or ``1 + mu <b, b'>`` of soft labels, in the dtype of ``like``.

    Unknown are -1 or, among soft labels, a row of zeros. None without labels.
    """
    if labels is None:
        return None
    if len(labels) != clips:
        raise ValueError(f"{len(labels)} labels for {clips} clips")
    if labels.is_floating_point():
        return 1 + mu * gram(labels.detach().to(like))
    same = (labels[:, None] == labels[None, :]) & (labels >= 0)[:, None]
    return 1 + mu * same.to(like)


def unbiased_hsic(k: Gram, other: Other) -> Value:
    """Unbiased Hilbert-Schmidt criterion (Song et al. 2012, eq. 5), times ``N (N - 3)``.

    ``tr(K L) + 1'K1 1'L1 / ((N-1)(N-2)) - 2 / (N-2) 1'K L 1``, zero diagonals, four clips or more.
    """
    clips = k.shape[-1]
    if clips < 4:
        raise ValueError(f"unbiased HSIC needs at least 4 clips, got {clips}")
    mask = off_diagonal(clips, k.device)
    k, other = k * mask, other * mask
    rows, other_rows = k.sum(-1), other.sum(-1)
    trace = (k * other.mT).sum(dim=(-2, -1))
    product = rows.sum(-1) * other_rows.sum(-1) / ((clips - 1) * (clips - 2))
    return trace + product - 2 / (clips - 2) * (rows * other_rows).sum(-1)


def unbiased_cka(k: Gram, other: Other) -> Value:
    """``HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))``, unbiased HSIC (Nguyen et al. 2021, eq. 3).

    About 0 on independent features, 1 on equal ones, 0 where either matrix does not vary.
    """

    def scaled(x: Tensor) -> Tensor:
        # neither scale nor a constant added to all of K changes the result, but both cost digits
        size = x.detach().abs().mean(dim=(-2, -1), keepdim=True)
        return center(x / size.clamp(min=torch.finfo(x.dtype).tiny))

    k, other = scaled(k), scaled(other)
    own, others = unbiased_hsic(k, k), unbiased_hsic(other, other)
    noise = (100 * torch.finfo(k.dtype).eps * k.shape[-1]) ** 2  # HSIC of a constant matrix
    norm = own.clamp(min=noise).sqrt() * others.clamp(min=noise).sqrt()
    varies = (own > noise) & (others > noise)
    return torch.where(varies, unbiased_hsic(k, other) / norm, 0.0)


def cka(kxx: Gram, kyy: Gram, kxy: Gram, **_: Any) -> Value:
    """``1 - unbiased_cka``, clip by clip whatever the labels; 0 for fewer than four clips."""
    return 1 - unbiased_cka(kxx, kyy) if kxx.shape[-1] > 3 else 0.0 * kyy.sum(dim=(-2, -1))


def coral(kxx: Gram, kyy: Gram, kxy: Gram, **_: Any) -> Value:
    """``|Cov(x) - Cov(y)|_F^2``, whatever the labels; 0 for one clip.

    By ``<Cov(x), Cov(y)> = |H Kxy H|_F^2 / (N-1)^2`` no covariance is formed. Deep CORAL (Sun &
    Saenko 2016, eq. 1) without ``1 / (4 d^2)``.
    """
    xx, yy, xy = (center(k).pow(2).sum(dim=(-2, -1)) for k in (kxx, kyy, kxy))
    return (xx + yy - 2 * xy) / max(kxx.shape[-1] - 1, 1) ** 2


DISTANCES = {"mmd": mmd, "cka": cka, "coral": coral}  # of ``RepresentationGraph(distance=...)``

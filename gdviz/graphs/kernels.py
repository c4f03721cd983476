"""Gram matrices and the distances between two samples that can be read off them.

Shapes: ``[*batch, N, N]`` Gram matrices of N clips; ``kxx`` of one sample, ``kyy`` of the other and
``kxy`` across, rows from the first. Clip n of one sample is clip n of the other.

The distances ``mmd``, ``cka`` and ``coral`` share one signature, ``(kxx, kyy, kxy, *, pair_weights, paired)``
with inner products of vectors, so that ``RepresentationGraph`` can swap them. ``fourier_mmd2`` is the
first of them for banks whose Gram matrices are too large to form.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

#: Widths of the Gaussian kernels in :func:`gaussian_kernel`, as multiples of the median.
MULTIPLES = (4.0, 2.0, 1.0, 0.5, 0.25)


def gram(
    x: Float[Tensor, "*batch clips dim"], y: Float[Tensor, "*batch others dim"] | None = None
) -> Float[Tensor, "*batch clips others"]:
    """``G_nm = <x_n, y_m>``; ``y`` defaults to ``x``."""
    return x @ (x if y is None else y).mT


def center(k: Float[Tensor, "*batch clips others"]) -> Float[Tensor, "*batch clips others"]:
    """``H K H`` with ``H = I - 1 1^T / N``: the Gram matrix of features centred on the sample."""
    rows, columns = k.mean(dim=-1, keepdim=True), k.mean(dim=-2, keepdim=True)
    return k - rows - columns + rows.mean(dim=-2, keepdim=True)


def squared_distances(
    kxx: Float[Tensor, "*batch clips"],
    kyy: Float[Tensor, "*batch others"],
    kxy: Float[Tensor, "*batch clips others"],
) -> Float[Tensor, "*batch clips others"]:
    """``|x_n - y_m|^2 = <x_n, x_n> + <y_m, y_m> - 2 <x_n, y_m>``, never negative.

    Args:
        kxx: ``[*batch, N]`` *diagonal* of the first Gram matrix.
        kyy: ``[*batch, M]`` diagonal of the second.
        kxy: ``[*batch, N, M]``.
    """
    return (kxx[..., :, None] + kyy[..., None, :] - 2 * kxy).clamp(min=0)


def diagonal(k: Float[Tensor, "*batch clips clips"]) -> Float[Tensor, "*batch clips"]:
    """``k_nn``. Not by ``Tensor.diagonal``: behind a matrix product its compiled gradient is wrong (torch 2.15, inductor)."""
    return (k * torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)).sum(dim=-1)


def off_diagonal(clips: int, device: torch.device | None = None) -> Bool[Tensor, "clips clips"]:
    """Mask of the pairs of different clips."""
    return ~torch.eye(clips, dtype=torch.bool, device=device)


@torch.no_grad()
def median_bandwidth(
    d2: Float[Tensor, "*batch clips clips"], default: float = 1.0
) -> Float[Tensor, "*batch"]:
    """Median squared distance between different clips, a constant; ``default`` where it is 0 or N = 1."""
    clips = d2.shape[-1]
    if clips < 2:
        return d2.new_full(d2.shape[:-2], default)
    i, j = torch.triu_indices(clips, clips, offset=1, device=d2.device)
    median = d2[..., i, j].median(dim=-1).values
    return torch.where(median > 0, median, default)


def gaussian_kernel(
    d2: Float[Tensor, "*batch clips others"], bandwidth: Float[Tensor, "*batch"]
) -> Float[Tensor, "*batch clips others"]:
    """``mean_m exp(-d^2 / (m s))`` over ``MULTIPLES`` m of the bandwidth s; in [0, 1].

    Several widths because a single one far below the distances has no gradient. The multiples are
    powers of two, so one exponential serves all: the rest are squares of it.
    """
    k = torch.exp(-d2 / (MULTIPLES[0] * bandwidth[..., None, None]))
    total = k
    for _ in MULTIPLES[1:]:
        k = k * k
        total = total + k
    return total / len(MULTIPLES)


def mmd2(
    kxx: Float[Tensor, "*batch clips clips"],
    kyy: Float[Tensor, "*batch clips clips"],
    kxy: Float[Tensor, "*batch clips clips"],
    *,
    pair_weights: Float[Tensor, "clips clips"] | None = None,
    paired: float = 0.0,
    biased: bool = False,
) -> Float[Tensor, "*batch"]:
    """``sum_{n != m} o_nm (k(x_n, x_m) + k(y_n, y_m) - 2 k(x_n, y_m)) / sum_{n != m} o_nm``.

    The U-statistic of Gretton et al. 2012, lemma 6 and eq. 4, for two samples of the same clips: zero
    on identical samples, mean zero when the distributions agree, and therefore sometimes negative.
    ``biased`` counts ``n = m`` too and is never negative.

    Weights ``o`` that form a positive semi-definite matrix make it the MMD between joint
    distributions of feature and label: ``o = 1 + mu [y = y']`` is the class-conditional version, and
    ``1 + mu <b, b'>`` the same with soft labels (ours). Taking the clip's identity for a label adds
    ``paired * mean_n (k(x_n, x_n) + k(y_n, y_n) - 2 k(x_n, y_n))``, again without bias (ours).

    Args:
        kxx: ``[*batch, N, N]`` kernel of the first sample.
        kyy: ``[*batch, N, N]`` of the second.
        kxy: ``[*batch, N, N]`` across.
        pair_weights: ``[N, N]`` o, ones by default.
        paired: weight of each clip against its own counterpart.
        biased: the V-statistic. Also used at N = 1, where the other is undefined.
    """
    clips = kxx.shape[-1]
    o = kxx.new_ones(clips, clips) if pair_weights is None else pair_weights
    if not biased and clips > 1:
        o = o * off_diagonal(clips, kxx.device)
    h = kxx + kyy - kxy - kxy.mT  # (*batch, N, N)
    value = (o * h).sum(dim=(-2, -1)) / o.sum().clamp(min=1e-12)
    return value + paired * diagonal(h).mean(dim=-1) if paired else value


def gaussian_kernels(
    kxx: Float[Tensor, "*batch clips clips"],
    kyy: Float[Tensor, "*batch clips clips"],
    kxy: Float[Tensor, "*batch clips clips"],
    multiple: float = 1.0,
) -> list[Float[Tensor, "*batch clips clips"]]:
    """Gaussian kernels of what the three Gram matrices hold, at ``multiple`` of the first sample's median bandwidth."""
    x, y = diagonal(kxx), diagonal(kyy)
    d2 = squared_distances(x, x, kxx), squared_distances(y, y, kyy), squared_distances(x, y, kxy)
    # unit vectors at right angles are at squared distance 2: the width when there is no median
    width = multiple * median_bandwidth(d2[0], default=2.0)
    return [gaussian_kernel(d, width) for d in d2]


def mmd(*grams: Float[Tensor, "*batch clips clips"], **options: Any) -> Float[Tensor, "*batch"]:
    """:func:`mmd2` of the :func:`gaussian_kernels` of ``kxx, kyy, kxy``; its options make it biased, class-conditional or paired."""
    return mmd2(*gaussian_kernels(*grams), **options)


def fourier_features(
    x: Float[Tensor, "*batch clips dim"],
    directions: Float[Tensor, "dim width_count"],
    bandwidth: Float[Tensor, "*batch"],
) -> Float[Tensor, "*batch clips features"]:
    """``phi`` with ``E <phi(x), phi(y)> = gaussian_kernel(|x - y|^2, bandwidth)`` (Rahimi & Recht 2007, algorithm 1).

    ``[cos, sin](<x, w>)`` with ``w ~ N(0, 2 / (m s))``; the multiples m take turns, so the number of
    ``directions``, standard normal columns, must be a multiple of ``len(MULTIPLES)``.
    """
    multiples = x.new_tensor(MULTIPLES).repeat(directions.shape[1] // len(MULTIPLES))
    phase = (x @ directions) * torch.sqrt(2 / (multiples * bandwidth[..., None, None]))
    return torch.cat([phase.cos(), phase.sin()], dim=-1) / directions.shape[1] ** 0.5


def fourier_mmd2(
    x: Float[Tensor, "*batch clips features"],
    y: Float[Tensor, "*batch clips features"],
    *,
    label_vectors: Float[Tensor, "clips classes"] | None = None,
    paired: float = 0.0,
    biased: bool = False,
) -> Float[Tensor, "*batch"]:
    """:func:`mmd2` with ``k = <x, y>`` and ``o_nm = <l_n, l_m>``, in time and memory linear in the number of clips.

    ``kxx + kyy - kxy - kxy^T`` is the Gram matrix of ``x - y``, so its weighted sum is ``|sum_n l_n (x_n - y_n)^T|^2``.

    Args:
        x: ``[*batch, N, R]`` :func:`fourier_features` of the first sample.
        y: ``[*batch, N, R]`` of the second.
        label_vectors: ``[N, Q]`` from :func:`label_vectors`, ones by default.
        paired: as in :func:`mmd2`, like ``biased``.
        biased: see there.
    """
    gap, clips = x - y, x.shape[-2]
    labels = x.new_ones(clips, 1) if label_vectors is None else label_vectors
    own = gap.pow(2).sum(dim=-1)  # (*batch, N)
    total, weight = (labels.mT @ gap).pow(2).sum(dim=(-2, -1)), labels.sum(dim=0).pow(2).sum()
    if not biased and clips > 1:
        same = labels.pow(2).sum(dim=-1)
        total, weight = total - (same * own).sum(dim=-1), weight - same.sum()
    return total / weight.clamp(min=1e-12) + paired * own.mean(dim=-1)


def label_vectors(labels: Tensor, mu: float, like: Tensor) -> Float[Tensor, "clips classes"]:
    """Vectors whose inner products are :func:`label_pair_weights`: ``[1, sqrt(mu) b_n]``, a one-hot ``b_n`` for an integer label."""
    soft = labels if labels.is_floating_point() else F.one_hot(labels + 1)[:, 1:]
    return torch.cat([like.new_ones(len(labels), 1), mu**0.5 * soft.detach().to(like)], dim=1)


def label_pair_weights(
    labels: Tensor | None, mu: float, clips: int, like: Tensor
) -> Float[Tensor, "clips clips"] | None:
    """``1 + mu [y = y']`` from labels ``[N]`` (-1 unknown), ``1 + mu <b, b'>`` from soft ones ``[N, C]``.

    Rows of zeros among soft labels are unknown, too. None without labels.
    """
    if labels is None:
        return None
    if labels.shape[0] != clips:
        raise ValueError(f"{labels.shape[0]} labels for {clips} clips")
    if labels.is_floating_point():
        return gram(label_vectors(labels, mu, like))
    same = (labels[:, None] == labels[None, :]) & (labels >= 0)[:, None]
    return 1 + mu * same.to(like)


def unbiased_hsic(
    k: Float[Tensor, "*left clips clips"], other: Float[Tensor, "*right clips clips"]
) -> Float[Tensor, "*batch"]:
    """Unbiased Hilbert-Schmidt independence criterion (Song et al. 2012, eq. 5), times ``N (N - 3)``.

    ``tr(K L) + 1'K1 1'L1 / ((N-1)(N-2)) - 2 / (N-2) 1'K L 1`` with zero diagonals in K and L.

    Raises:
        ValueError: with fewer than four clips.
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


def unbiased_cka(
    k: Float[Tensor, "*left clips clips"], other: Float[Tensor, "*right clips clips"]
) -> Float[Tensor, "*batch"]:
    """``HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))`` with unbiased HSIC (Nguyen et al. 2021, eq. 3).

    About 0 on independent features, 1 on equal ones. 0 where either matrix does not vary.
    """

    def scaled(x: Tensor) -> Tensor:
        # neither scale nor a constant added to all of K changes the answer, but both cost digits
        return center(
            x
            / x.detach().abs().mean(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
        )

    k, other = scaled(k), scaled(other)
    own, others = unbiased_hsic(k, k), unbiased_hsic(other, other)
    noise = (
        100 * torch.finfo(k.dtype).eps * k.shape[-1]
    ) ** 2  # HSIC of a constant matrix, by rounding
    varies = (own > noise) & (others > noise)
    norm = own.clamp(min=noise).sqrt() * others.clamp(min=noise).sqrt()
    return torch.where(varies, unbiased_hsic(k, other) / norm, 0.0)


def cka(
    kxx: Float[Tensor, "*batch clips clips"],
    kyy: Float[Tensor, "*batch clips clips"],
    kxy: Float[Tensor, "*batch clips clips"],
    **_: object,
) -> Float[Tensor, "*batch"]:
    """``1 - unbiased_cka``, clip by clip whatever the labels; 0 for fewer than four clips."""
    return 1 - unbiased_cka(kxx, kyy) if kxx.shape[-1] > 3 else 0.0 * kyy.sum(dim=(-2, -1))


def coral(
    kxx: Float[Tensor, "*batch clips clips"],
    kyy: Float[Tensor, "*batch clips clips"],
    kxy: Float[Tensor, "*batch clips clips"],
    **_: object,
) -> Float[Tensor, "*batch"]:
    """``|Cov(x) - Cov(y)|_F^2`` from Gram matrices (Deep CORAL, Sun & Saenko 2016, eq. 1).

    ``|Cov(x)|_F^2 = |H Kxx H|_F^2 / (N-1)^2`` and ``<Cov(x), Cov(y)> = |H Kxy H|_F^2 / (N-1)^2``, so that
    covariances of outer products are never formed. The original's ``1 / (4 d^2)`` is left to the caller.
    Labels are ignored. 0 for one clip.
    """
    clips = kxx.shape[-1]
    squares = [center(k).pow(2).sum(dim=(-2, -1)) for k in (kxx, kyy, kxy)]
    return (squares[0] + squares[1] - 2 * squares[2]) / max(clips - 1, 1) ** 2


#: What ``RepresentationGraph(distance=...)`` may ask for.
DISTANCES = {"mmd": mmd, "cka": cka, "coral": coral}

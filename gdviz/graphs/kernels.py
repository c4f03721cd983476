"""Gram matrices and the distances between two samples that can be read off them.

Shapes: ``[*batch, N, N]`` Gram matrices of N clips; ``kxx`` of one sample, ``kyy`` of the other and
``kxy`` across, rows from the first. Clip n of one sample is clip n of the other.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

#: Widths of the Gaussian kernels in :func:`gaussian_kernel`, as multiples of the median.
MULTIPLES = (4.0, 2.0, 1.0, 0.5, 0.25)


def gram(x: Float[Tensor, "*batch clips dim"], y: Float[Tensor, "*batch others dim"] | None = None) -> Float[Tensor, "*batch clips others"]:
    """``G_nm = <x_n, y_m>``; ``y`` defaults to ``x``."""
    return x @ (x if y is None else y).mT


def center(k: Float[Tensor, "*batch clips others"]) -> Float[Tensor, "*batch clips others"]:
    """``H K H`` with ``H = I - 1 1^T / N``: the Gram matrix of features centred on the sample."""
    rows, columns = k.mean(dim=-1, keepdim=True), k.mean(dim=-2, keepdim=True)
    return k - rows - columns + rows.mean(dim=-2, keepdim=True)


def squared_distances(
    kxx: Float[Tensor, "*batch clips"], kyy: Float[Tensor, "*batch others"], kxy: Float[Tensor, "*batch clips others"]
) -> Float[Tensor, "*batch clips others"]:
    """``|x_n - y_m|^2 = <x_n, x_n> + <y_m, y_m> - 2 <x_n, y_m>``, never negative.

    Args:
        kxx: ``[*batch, N]`` *diagonal* of the first Gram matrix.
        kyy: ``[*batch, M]`` diagonal of the second.
        kxy: ``[*batch, N, M]``.
    """
    return (kxx[..., :, None] + kyy[..., None, :] - 2 * kxy).clamp(min=0)


def off_diagonal(clips: int, device: torch.device | None = None) -> Bool[Tensor, "clips clips"]:
    """Mask of the pairs of different clips."""
    return ~torch.eye(clips, dtype=torch.bool, device=device)


@torch.no_grad()
def median_bandwidth(d2: Float[Tensor, "*batch clips clips"], default: float = 1.0) -> Float[Tensor, "*batch"]:
    """Median squared distance between different clips, a constant; ``default`` where it is 0 or N = 1."""
    clips = d2.shape[-1]
    if clips < 2:
        return d2.new_full(d2.shape[:-2], default)
    median = d2[..., off_diagonal(clips, d2.device)].median(dim=-1).values
    return torch.where(median > 0, median, default)


def gaussian_kernel(d2: Float[Tensor, "*batch clips others"], bandwidth: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch clips others"]:
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
    return value + paired * h.diagonal(dim1=-2, dim2=-1).mean(dim=-1) if paired else value


def label_pair_weights(labels: Tensor | None, mu: float, clips: int, like: Tensor) -> Float[Tensor, "clips clips"] | None:
    """``1 + mu [y = y']`` from labels ``[N]`` (-1 unknown), ``1 + mu <b, b'>`` from soft ones ``[N, C]``.

    Rows of zeros among soft labels are unknown, too. None without labels.
    """
    if labels is None:
        return None
    if labels.shape[0] != clips:
        raise ValueError(f"{labels.shape[0]} labels for {clips} clips")
    if labels.is_floating_point():
        soft = labels.detach().to(like)
        return 1 + mu * soft @ soft.mT
    same = (labels[:, None] == labels[None, :]) & (labels >= 0)[:, None]
    return 1 + mu * same.to(like)


def unbiased_hsic(k: Float[Tensor, "*left clips clips"], other: Float[Tensor, "*right clips clips"]) -> Float[Tensor, "*batch"]:
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


def unbiased_cka(k: Float[Tensor, "*left clips clips"], other: Float[Tensor, "*right clips clips"]) -> Float[Tensor, "*batch"]:
    """``HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))`` with unbiased HSIC (Nguyen et al. 2021, eq. 3).

    About 0 on independent features, 1 on equal ones. 0 where either matrix does not vary.
    """

    def scaled(x: Tensor) -> Tensor:
        # neither scale nor a constant added to all of K changes the answer, but both cost digits
        return center(x / x.detach().abs().mean(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny))

    k, other = scaled(k), scaled(other)
    own, others = unbiased_hsic(k, k), unbiased_hsic(other, other)
    noise = (100 * torch.finfo(k.dtype).eps * k.shape[-1]) ** 2  # HSIC of a constant matrix, by rounding
    varies = (own > noise) & (others > noise)
    norm = own.clamp(min=noise).sqrt() * others.clamp(min=noise).sqrt()
    return torch.where(varies, unbiased_hsic(k, other) / norm, 0.0)


def coral(
    kxx: Float[Tensor, "*batch clips clips"],
    kyy: Float[Tensor, "*batch clips clips"],
    kxy: Float[Tensor, "*batch clips clips"],
) -> Float[Tensor, "*batch"]:
    """``|Cov(x) - Cov(y)|_F^2`` from Gram matrices (Deep CORAL, Sun & Saenko 2016, eq. 1).

    ``|Cov(x)|_F^2 = |H Kxx H|_F^2 / (N-1)^2`` and ``<Cov(x), Cov(y)> = |H Kxy H|_F^2 / (N-1)^2``, so that
    covariances of outer products are never formed. The original's ``1 / (4 d^2)`` is left to the caller.
    0 for one clip.
    """
    clips = kxx.shape[-1]
    squares = [center(k).pow(2).sum(dim=(-2, -1)) for k in (kxx, kyy, kxy)]
    return (squares[0] + squares[1] - 2 * squares[2]) / max(clips - 1, 1) ** 2

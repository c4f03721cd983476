"""Routing: which teachers are at home on which clips, found without being told (ours).

Specialists are sure of themselves abroad, so neither confidence nor agreement tells who is at home.
Two other things do. A clip that lies far from all that a teacher was pre-trained on is foreign to
it; and where a teacher is good, it is right on the few labelled clips that look alike. Both are too
noisy for one clip, and are averaged over components of the space that all teachers' features span.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor

from gdviz.graphs.weights import Labels, Probs, Weights, closed_form
from gdviz.teachers.bank import Bank

NEIGHBOURS = 5
AXES = 32  # of the joint space
ETA = 0.1  # temperature of the closed form, in units of log distance
FLOOR = 0.02
# Several threads add in another order, and a student that starts from weights that differ in the
# last digit ends elsewhere: the same weights on any number of cores.
one_thread = threadpool_limits.wrap(limits=1)


@one_thread
def novelty(features: Float[Tensor, "n d"], home: Float[Tensor, "m d"]) -> Float[Tensor, " n"]:
    """Return ``log d(n) - median_m log d(m)``: how foreign clips are to a teacher.

    ``d`` is the mean distance to the five nearest clips of its home, in its features, each divided
    by its deviation there; that of a home clip m is to the other ones. Zero: as near as its own.
    A teacher whose features do not vary cannot say: NaN.
    """
    scale = home.std(0)
    if not float(scale.max()) > 1e-6:
        return features.new_full(features.shape[:1], torch.nan)
    own, clips = ((x / scale.clamp(min=1e-6)).numpy() for x in (home, features))
    search = NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(home) - 1)).fit(own)
    far, usual = (torch.from_numpy(search.kneighbors(x)[0]).mean(1) for x in (clips, None))
    return (far.clamp(min=1e-6).log() - usual.clamp(min=1e-6).log().median()).float()


def local_prior(
    membership: Float[Tensor, "n r"], probs: Probs, labels: Labels
) -> Float[Tensor, "r k"]:
    """Return ``log prior_rk``, in proportion to ``max(0, g_rk - se_rk / 2)``, on each component.

    ``g_rk = sum_n m_nr g_nk / (sum_n m_nr + 2)`` over labelled clips, shrunk as by two clips that
    tell nothing, of ``g_nk = p_nk[y_n] - mean_m p_nk[y_m]``, what a teacher says of a clip's label
    beyond what it says of labels of other clips. A fifth of the prior is spread evenly; all of it
    if no teacher gains.
    """
    known = labels >= 0
    m, y = membership[known], labels[known]
    said = probs[known][:, :, y]  # (n, k, m): of clip n, the probability of clip m's label
    gain = said.diagonal(dim1=0, dim2=2).T - said.mean(2)
    count = m.sum(0)[:, None]
    mean, square = (m.T @ x / count.clamp(min=1e-6) for x in (gain, gain.square()))
    error = ((square - mean.square()).clamp(min=0) / (count + 2)).sqrt()
    skill = (mean * count / (count + 2) - error / 2).clamp(min=0)
    total = skill.sum(1, keepdim=True)
    teachers = skill.shape[1]
    share = torch.where(total > 1e-6, skill / total.clamp(min=1e-6), 1 / teachers)
    return (0.8 * share + 0.2 / teachers).log()


def route(
    bank: Bank, rows: Int[Tensor, " n"], components: int, *, seed: int = 0
) -> Iterator[Weights]:
    """Yield weights ``w_n = sum_r m_nr closed_form(c_r, log prior = 2 log prior_r)``, without end.

    ``m`` are memberships in Gaussian components, of one covariance, of the joint space: all
    features side by side, standardised, on 32 principal axes. ``c_rk`` is a component's mean
    :func:`novelty`, where homes are known. Each time a mixture is fitted from another start, and
    what is yielded is the mean of those so far.

    Args:
        bank: what teachers say.
        rows: training videos, to which components are fitted; weights are of all videos.
        components: how many.
        seed: of the starts.
    """
    every = torch.arange(len(bank.labels))
    features = bank.features_at(every)
    space = _joint_space(features, rows, seed)
    foreign = _novelties(features, bank.homes)
    probs, total = bank.probs(), torch.zeros(len(every), len(bank.teachers))
    components = min(components, len(rows) // 4)
    start = 0
    while True:
        m = _memberships(space, rows, components, seed * 1000 + start)
        c = m[rows].T @ foreign[rows] / m[rows].sum(0).clamp(min=1e-6)[:, None]
        prior = 2 * local_prior(m, probs, bank.labels)
        total += m @ closed_form(c, eta=ETA, log_prior=prior, floor=FLOOR)
        start += 1
        yield total / start


@one_thread
def _joint_space(features: list[Tensor], rows: Tensor, seed: int) -> np.ndarray:
    joint = torch.cat(features, 1).numpy()
    axes = PCA(min(AXES, joint.shape[1], len(rows)), random_state=seed)
    return make_pipeline(StandardScaler(), axes).fit(joint[rows]).transform(joint)


@one_thread
def _memberships(space: np.ndarray, rows: Tensor, components: int, seed: int) -> Tensor:
    options = {"covariance_type": "tied", "reg_covar": 0.5, "tol": 1e-4, "max_iter": 200}
    mixture = GaussianMixture(components, random_state=seed, **options).fit(space[rows])
    return torch.from_numpy(mixture.predict_proba(space)).float()


def _novelties(features: list[Tensor], homes: tuple[Tensor | None, ...]) -> Float[Tensor, "n k"]:
    """Return every teacher's novelty; where one is unknown, the mean of the known ones, or 0."""
    found = torch.full((len(features[0]), len(features)), torch.nan)
    for k, home in enumerate(homes):
        if home is not None:
            found[:, k] = novelty(features[k], home)
    return torch.where(found.isnan(), found.nanmean(1, keepdim=True), found).nan_to_num(0.0)

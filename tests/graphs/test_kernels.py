"""Kernels and distances of samples against their definitions, and the sketch against products."""

from functools import partial

import pytest
import torch
from graph_cases import normal

from gdviz.graphs import kernels
from gdviz.graphs.sketch import TensorSketch


def grams(x, y):
    return x @ x.mT, y @ y.mT, x @ y.mT


def mmd_of(x, y, **options):
    return kernels.mmd(*grams(x, y), **options)


def test_gaussian_kernels_at_the_median():
    x, y = normal(9, 3), normal(9, 3, seed=1)
    d2 = torch.cdist(x, x) ** 2
    width = d2[kernels.off_diagonal(9)].median()
    assert float(kernels.median_bandwidth(d2)) == pytest.approx(float(width))
    assert kernels.median_bandwidth(torch.zeros(2, 3, 3)).tolist() == [2, 2]
    found = kernels.gaussian_kernels(*grams(x, y), multiple=3.0)
    for k, (a, b) in zip(found, ((x, x), (y, y), (x, y)), strict=True):
        d2 = torch.cdist(a, b) ** 2
        one_by_one = [torch.exp(-d2 / (m * 3 * width)) for m in (0.25, 0.5, 1, 2, 4)]
        torch.testing.assert_close(k, torch.stack(one_by_one).mean(0))


def test_mmd_is_its_definition():
    x, y, o = normal(6, 3), normal(6, 3, seed=1), normal(6, 6, seed=2).abs()
    o = o + o.T
    kxx, kyy, kxy = grams(x, y)
    pairs = [(n, m) for n in range(6) for m in range(6) if n != m]
    total = sum(float(o[n, m] * (kxx[n, m] + kyy[n, m] - 2 * kxy[n, m])) for n, m in pairs)
    weight = float(o.sum() - o.diagonal().sum())
    assert float(kernels.mmd2(kxx, kyy, kxy, pair_weights=o)) == pytest.approx(total / weight)
    mean_gap = ((x - y).mean(0) ** 2).sum()  # a linear kernel's biased MMD is the gap of the means
    torch.testing.assert_close(kernels.mmd2(kxx, kyy, kxy, biased=True), mean_gap)


def test_unbiased_mmd_is_zero_on_average_under_the_null_and_grows_with_a_shift():
    x, y = normal(400, 20, 4), normal(400, 20, 4, seed=1)
    null, biased = mmd_of(x, y), mmd_of(x, y, biased=True)
    noise = float(null.std()) / 20
    assert abs(float(null.mean())) < 4 * noise < 5 * noise < float(biased.mean())
    assert null.min() < 0 <= biased.min()
    shifted = [float(mmd_of(x, y + s).mean()) for s in (0.0, 0.5, 1.0, 2.0)]
    assert shifted == sorted(shifted) and shifted[1] > 0.01


def test_unbiased_cka():
    x, y = normal(64, 512), normal(64, 512, seed=1)
    kx, ky, _ = grams(x, y)
    cka = kernels.unbiased_cka
    assert abs(float(cka(kx, ky))) < 0.05
    assert float(cka(kx, kx)) == pytest.approx(1)
    assert float(cka(kx + 1e3, 3 * kx)) == pytest.approx(1)  # offset, scale
    assert float(cka(kx, torch.ones(64, 64).double())) == 0
    tiny = cka(1e-12 * kx.float(), (kx + 0.5 * ky).float())
    assert float(tiny) == pytest.approx(float(cka(kx, kx + 0.5 * ky)), abs=1e-4)


def test_unbiased_hsic_is_unbiased():
    """Mean over all 5-clip subsets equals the value on the whole set: the mark of a U-statistic."""
    k, m = (grams(x, x)[0] for x in (normal(7, 3), normal(7, 2, seed=1)))
    subsets = torch.combinations(torch.arange(7), 5)
    parts = torch.stack([kernels.unbiased_hsic(k[s][:, s], m[s][:, s]) for s in subsets]) / (5 * 2)
    torch.testing.assert_close(parts.mean(), kernels.unbiased_hsic(k, m) / (7 * 4))
    with pytest.raises(ValueError, match="4 clips"):
        kernels.unbiased_hsic(k[:3, :3], m[:3, :3])


def test_coral_is_the_gap_of_covariances():
    x, y = normal(10, 4), normal(10, 4, seed=1)
    expected = (torch.cov(x.T) - torch.cov(y.T)).pow(2).sum()
    torch.testing.assert_close(kernels.coral(*grams(x, y)), expected)


def test_label_pair_weights():
    like = torch.zeros((), dtype=torch.float64)
    o = kernels.label_pair_weights(torch.tensor([0, 1, 0, -1, -1]), 3.0, 5, like)
    assert o.dtype == like.dtype
    assert o[0, 2] == 4 and o[0, 1] == 1 and o[3, 4] == 1 and o[3, 3] == 1
    hot = torch.cat([torch.eye(2)[[0, 1, 0]], torch.zeros(2, 2)])
    torch.testing.assert_close(kernels.label_pair_weights(hot, 3.0, 5, like), o)


def test_distances_share_one_signature():
    """Zero on identical samples, not on others, and batched."""
    of = grams(normal(8, 5), normal(8, 5, seed=1))
    o = kernels.label_pair_weights(torch.arange(8) % 3, 4.0, 8, of[0])
    for distance in (*kernels.DISTANCES.values(), partial(kernels.mmd, biased=True)):
        for options in ({}, {"pair_weights": o}, {"paired": 0.3}):
            value = distance(*of, **options)
            assert value.shape == () and abs(value) > 1e-3
            assert abs(distance(*[of[0]] * 3, **options)) < 1e-12
            batch = [torch.stack([k, 2 * k, k]) for k in of]
            torch.testing.assert_close(distance(*batch, **options)[2], value)


def test_sketch_is_unbiased_also_across_pairs():
    x, pairs = [normal(2, 6, seed=s) for s in range(3)], [(0, 1), (0, 2)]
    trials = []
    for seed in range(400):
        first, second = TensorSketch(6, 16, seed=seed).double()(x, pairs)
        trials.append(torch.cat([first @ first.T, first @ second.T]))
    trials = torch.stack(trials)
    outer = [torch.einsum("ni,nj->nij", x[i], x[j]).flatten(1) for i, j in pairs]
    exact = torch.cat([outer[0] @ outer[0].T, outer[0] @ outer[1].T])
    assert ((trials.mean(0) - exact).abs() < 4 * trials.std(0) / 20).all()


def test_sketch_is_the_convolution_of_count_sketches():
    sketch, x, y = TensorSketch(5, 8), normal(5), normal(4, seed=1)
    explicit = torch.zeros(8).double()
    for i in range(5):
        for j in range(4):
            sign = sketch.sign[0, i] * sketch.sign[1, j]
            explicit[(sketch.hash[0, i] + sketch.hash[1, j]) % 8] += sign * x[i] * y[j]
    torch.testing.assert_close(sketch([x[None], y[None]], [(0, 1)])[0, 0], explicit)

"""Entropic transport: against exact solvers, by identities, by finite differences, at the edges."""

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from gdviz.graphs import _sinkhorn
from gdviz.graphs import costs as ground
from gdviz.graphs import transport as tr


def euclidean_cost(classes, seed=0, dtype=torch.float64):
    rows = torch.randn(
        classes, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return ground.normalise_cost(torch.cdist(rows, rows)).to(dtype)


def simplex(*shape, seed=0, sharp=1.5, dtype=torch.float64):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.softmax(sharp * x, dim=-1).to(dtype)


@pytest.mark.parametrize("classes", [2, 7, 20, 101])
def test_exact_cost_as_eps_vanishes(classes):
    cost, p, q = euclidean_cost(classes), simplex(6, classes), simplex(6, classes, seed=1)
    exact = np.array(
        [ot.emd2(a, b, cost.numpy()) for a, b in zip(p.numpy(), q.numpy(), strict=True)]
    )
    solved = tr.sinkhorn(p, q, cost, eps=2e-3, tol=1e-9)
    linear = (solved.plan() * cost).sum((-2, -1))
    assert solved.converged
    np.testing.assert_allclose(linear, exact, rtol=1e-3)
    # the regularised value lies above the exact one by at most eps times the plan's information
    assert (solved.cost.numpy() >= exact - 1e-9).all()
    np.testing.assert_allclose(solved.cost, exact, atol=2e-3 * np.log(classes) * 2)


@pytest.mark.parametrize("eps", [0.3, 0.1, 0.02])
def test_value_and_potentials_agree_with_pot(eps):
    cost, p, q = euclidean_cost(6), simplex(6), simplex(6, seed=1)
    plan = ot.bregman.sinkhorn_log(
        p.numpy(), q.numpy(), cost.numpy(), eps, stopThr=1e-13, numItermax=200000
    )
    solved = tr.sinkhorn(p, q, cost, eps=eps, tol=1e-12)
    torch.testing.assert_close(solved.plan(), torch.from_numpy(plan), atol=1e-8, rtol=0)
    value = (plan * cost.numpy()).sum() + eps * (plan * np.log(plan / np.outer(p, q))).sum()
    assert float(solved.cost) == pytest.approx(value, rel=1e-8)
    assert float((solved.f * p).sum()) == pytest.approx(
        value / 2
    )  # the free constant is shared evenly


def test_eps_is_relative_to_the_mean_cost():
    cost, p, q = euclidean_cost(5), simplex(5), simplex(5, seed=1)
    one, thousand = tr.sinkhorn(p, q, cost), tr.sinkhorn(p, q, 1000 * cost)
    torch.testing.assert_close(1000 * one.cost, thousand.cost)


def test_marginals_and_reported_error():
    cost, p, q = euclidean_cost(9), simplex(3, 4, 9), simplex(3, 1, 9, seed=1)
    solved = tr.sinkhorn(p, q, cost, eps=0.05, tol=1e-7)
    plan = solved.plan()
    assert plan.shape == (3, 4, 9, 9)
    off = (plan.sum(-1) - p).abs().sum(-1) + (plan.sum(-2) - q).abs().sum(-1)
    assert off.max() < 2e-7
    assert (off <= 2 * solved.error + 1e-12).all()


def test_batch_equals_loop():
    """Dropping finished columns must not mix problems up."""
    cost = euclidean_cost(8)
    p, q = simplex(30, 8, sharp=4.0), simplex(30, 8, seed=1, sharp=0.5)
    batch = tr.transport_cost(p, q, cost)
    single = torch.stack([tr.transport_cost(a, b, cost) for a, b in zip(p, q, strict=True)])
    torch.testing.assert_close(batch, single, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("eps", [0.5, 0.02])
def test_gradients_by_finite_differences(eps):
    cost = euclidean_cost(5)
    z = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    p = simplex(3, 5, seed=2).requires_grad_()
    options = {"eps": eps, "tol": 1e-13}
    check = {"eps": 1e-5, "atol": 1e-6, "rtol": 1e-5}
    assert gradcheck(
        lambda p, z: tr.transport_cost(p, z.softmax(-1), cost, **options), (p, z), **check
    )
    assert gradcheck(
        lambda p, z: tr.sinkhorn_divergence(p, z.softmax(-1), cost, **options), (p, z), **check
    )
    assert gradcheck(lambda p: tr.self_cost(p, cost, **options), (p,), **check)


def test_no_second_derivative():
    p = simplex(4).requires_grad_()
    with pytest.raises(RuntimeError, match="once only"):
        torch.autograd.grad(
            tr.transport_cost(p, simplex(4, seed=1), euclidean_cost(4)), p, create_graph=True
        )


def test_self_cost_is_the_cost_to_oneself():
    cost, p = euclidean_cost(7), simplex(5, 7, sharp=3.0)
    torch.testing.assert_close(
        tr.self_cost(p, cost, tol=1e-12), tr.transport_cost(p, p, cost, tol=1e-12)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_divergence_zero_on_identical_inputs(dtype):
    cost, p = euclidean_cost(12, dtype=dtype), simplex(4, 12, sharp=3.0, dtype=dtype)
    q = p.clone().requires_grad_()
    value = tr.sinkhorn_divergence(p, q, cost)
    value.sum().backward()
    assert value.abs().max() < 1e-6
    assert (q * q.grad).abs().max() < 1e-4


@given(
    seed=st.integers(0, 10**6),
    classes=st.integers(2, 9),
    sharp=st.floats(0.1, 20),
    eps=st.sampled_from([0.02, 0.1, 1.0]),
)
@settings(max_examples=25, deadline=None)
def test_divergence_properties(seed, classes, sharp, eps):
    """Symmetric, non-negative, blind to the order of classes, and never NaN, in float32."""
    cost = euclidean_cost(classes, seed, torch.float32)
    p, q = (
        simplex(classes, seed=seed, sharp=sharp).float(),
        simplex(classes, seed=seed + 1, sharp=sharp).float(),
    )
    forth, back = (
        tr.sinkhorn_divergence(p, q, cost, eps=eps),
        tr.sinkhorn_divergence(q, p, cost, eps=eps),
    )
    assert 0 <= forth < 10
    assert float(forth) == pytest.approx(float(back), abs=1e-5)
    order = torch.randperm(classes, generator=torch.Generator().manual_seed(seed))
    permuted = tr.sinkhorn_divergence(p[order], q[order], cost[order][:, order], eps=eps)
    assert float(permuted) == pytest.approx(float(forth), abs=1e-5)


def test_divergence_clamps_the_value_but_not_the_gradient():
    cost = euclidean_cost(5, dtype=torch.float32)
    p = simplex(64, 5, dtype=torch.float32)
    q = torch.softmax(p.log() + 1e-4 * torch.randn(64, 5), -1).requires_grad_()
    value = tr.sinkhorn_divergence(p, q, cost, tol=1e-9)
    value.sum().backward()
    assert (value >= 0).all()
    assert (q.grad.abs().sum(-1) > 0).all()


def test_precomputed_self_term():
    cost, p, q = euclidean_cost(5), simplex(3, 5), simplex(3, 5, seed=1)
    given = tr.sinkhorn_divergence(p, q, cost, self_p=tr.self_cost(p, cost))
    torch.testing.assert_close(given, tr.sinkhorn_divergence(p, q, cost))
    with pytest.raises(ValueError, match="self_p"):
        tr.sinkhorn_divergence(p.requires_grad_(), q, cost, self_p=torch.zeros(3))


@pytest.mark.parametrize("eps", [0.05, 0.005])  # product form, and float64 / log domain
def test_one_hot_zero_and_tiny_marginals(eps):
    cost = euclidean_cost(6, dtype=torch.float32)
    rows = torch.stack(
        [
            torch.eye(6)[2],
            torch.tensor([0, 0.5, 0, 0.5, 0, 0]),
            torch.tensor([1, 1e-30, 0, 1e-8, 0, 0]),
        ]
    )
    a = rows[:, None].expand(3, 3, 6).clone().requires_grad_()
    value = tr.transport_cost(a, rows, cost, eps=eps)
    value.sum().backward()
    assert value.isfinite().all() and a.grad.isfinite().all()
    assert tr.sinkhorn(rows[:, None], rows, cost, eps=eps).plan().isfinite().all()
    assert value[0, 1].item() == pytest.approx(
        float((cost[2, 1] + cost[2, 3]) / 2), rel=1e-5
    )  # only one plan exists
    zero = tr.sinkhorn_divergence(rows, rows, cost, eps=eps)
    assert zero.abs().max() < 1e-6


def test_an_overflow_is_solved_again():
    """float64 at its widest range and a class of almost no mass: over-relaxed scalings overflow."""
    line = torch.tensor([0.0, 0.2, 1.0], dtype=torch.float64)
    cost = ground.normalise_cost((line[:, None] - line).abs())
    q = torch.tensor([[0, 1, 3e-161], [1, 0, 0]], dtype=torch.float64)
    value = tr.sinkhorn_divergence(simplex(2, 3), q, cost, eps=float(cost.max()) / 300, tol=1e-9)
    assert value.isfinite().all()
    torch.testing.assert_close(value, (simplex(2, 3) * cost[[1, 0]]).sum(-1), atol=0.02, rtol=0)


def test_two_one_hots_cost_the_ground_cost():
    cost = euclidean_cost(5)
    value = tr.sinkhorn_divergence(
        torch.eye(5, dtype=torch.float64)[:, None], torch.eye(5, dtype=torch.float64), cost
    )
    torch.testing.assert_close(value, cost)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(dtype):
    cost, p, q = (
        euclidean_cost(10, dtype=torch.float32),
        simplex(4, 10).to(dtype),
        simplex(4, 10, seed=1).to(dtype),
    )
    q.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = tr.sinkhorn_divergence(p, q, cost)
    value.sum().backward()
    assert value.dtype == torch.float32 and q.grad.isfinite().all()
    exact = tr.sinkhorn_divergence(p.double(), q.detach().double(), cost.double())
    torch.testing.assert_close(value.double(), exact, atol=1e-5, rtol=1e-4)


def test_hard_problems_converge():
    """Peaked marginals at a small eps: plain Sinkhorn needs more than 20,000 iterations here."""
    cost = euclidean_cost(8, dtype=torch.float32)
    p, q = simplex(100, 8, sharp=3.0).float(), simplex(100, 8, seed=1, sharp=3.0).float()
    for eps in (0.05, 0.02):
        solved = tr.sinkhorn(p, q, cost, eps=eps)
        assert solved.converged and solved.iterations < 400


def test_rounding_in_the_cost_does_not_stall_the_solver():
    """A float32 cdist is symmetric to 1e-7 only."""
    rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    cost = torch.cdist(rows, rows) * (1 + 2e-7 * torch.randn(40, 40)).fill_diagonal_(0)
    p, q = simplex(20, 40, sharp=1.0).float(), simplex(20, 40, seed=1, sharp=1.0).float()
    assert tr.sinkhorn(p, q, cost, eps=0.02).converged


def test_not_converging_warns_and_says_so():
    cost, p, q = euclidean_cost(8), simplex(8, sharp=4.0), simplex(8, seed=1, sharp=4.0)
    with pytest.warns(tr.ConvergenceWarning, match="max_iter"):
        solved = tr.sinkhorn(p, q, cost, eps=0.02, max_iter=3)
    assert not solved.converged and solved.error > 1e-6 and solved.iterations == 3
    with pytest.warns(tr.ConvergenceWarning):
        tr.barycenter(torch.stack([p, q]), torch.ones(2), cost, eps=0.02, max_iter=3)


@pytest.mark.parametrize(
    "a",
    [
        torch.tensor([0.5, -0.5, 1.0]),
        torch.zeros(3),
        torch.tensor([0.5, float("nan"), 0.5]),
        torch.ones(2),
    ],
)
def test_bad_marginals_raise(a):
    with pytest.raises((ValueError, TypeError)):  # TypeError: shapes checked at run time
        tr.sinkhorn(a, torch.ones(3), euclidean_cost(3))


@pytest.mark.parametrize(
    "cost", [torch.zeros(3, 3), torch.ones(3, 2), torch.tensor([[0.0, 1, 2], [3, 0, 1], [1, 1, 0]])]
)
def test_bad_costs_raise(cost):
    with pytest.raises((ValueError, TypeError)):
        tr.sinkhorn(torch.ones(3), torch.ones(3), cost)


def test_barycenter_minimises_the_debiased_divergence():
    cost, p, w = (
        euclidean_cost(5),
        simplex(3, 5),
        torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
    )
    solved = tr.barycenter(p, w, cost, eps=0.2, tol=1e-12)

    def objective(b):
        return (w * tr.sinkhorn_divergence(p, b, cost, eps=0.2, tol=1e-12)).sum()

    z = solved.distribution.log().requires_grad_()
    (grad,) = torch.autograd.grad(objective(z.softmax(-1)), z)
    assert grad.abs().max() < 1e-9
    worse = [
        objective((z + 0.05 * torch.randn(5, dtype=torch.float64)).softmax(-1)) for _ in range(10)
    ]
    assert min(worse) > objective(solved.distribution)


def test_plain_barycenter_agrees_with_pot_and_blurs():
    cost, p = euclidean_cost(6), simplex(3, 6)
    w = torch.full(
        (3,), 1 / 3, dtype=torch.float64
    )  # POT 0.9.7 starts off the constraint for other weights
    plain = tr.barycenter(p, w, cost, eps=0.1, tol=1e-12, debiased=False).distribution
    reference = ot.bregman.barycenter(
        p.T.numpy(), cost.numpy(), 0.1, w.numpy(), numItermax=100000, stopThr=1e-14
    )
    np.testing.assert_allclose(plain, reference, atol=1e-8)
    sharp = tr.barycenter(p, w, cost, eps=0.1).distribution
    assert torch.special.entr(plain).sum() > torch.special.entr(sharp).sum()


def test_barycenter_of_one_teacher_or_of_equals_is_itself():
    cost, p = euclidean_cost(6), simplex(4, 1, 6)
    same = tr.barycenter(p.expand(4, 3, 6), torch.rand(4, 3) + 0.1, cost)
    torch.testing.assert_close(same.distribution, p[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(
        tr.barycenter(p, torch.ones(4, 1), cost).distribution, p[:, 0], atol=1e-5, rtol=0
    )


def test_barycenter_permutes_with_teachers_and_classes():
    cost, p, w = euclidean_cost(5), simplex(2, 3, 5), simplex(2, 3, seed=4)
    b = tr.barycenter(p, w, cost).distribution
    teachers, classes = torch.tensor([2, 0, 1]), torch.tensor([4, 1, 0, 3, 2])
    torch.testing.assert_close(
        tr.barycenter(p[:, teachers], w[:, teachers], cost).distribution, b, atol=1e-7, rtol=0
    )
    moved = tr.barycenter(p[..., classes], w, cost[classes][:, classes]).distribution
    torch.testing.assert_close(moved, b[:, classes], atol=1e-7, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_glued_couplings_have_the_teachers_marginals(dtype):
    cost = euclidean_cost(6, dtype=dtype)
    p = torch.cat([simplex(4, 2, 6), torch.eye(6, dtype=torch.float64)[:4, None]], dim=1).to(
        dtype
    )  # one-hot teacher
    star = tr.barycenter(p, torch.ones(4, 3, dtype=dtype), cost, eps=0.1, tol=1e-4)
    plans = star.plans()
    assert (plans.sum(-1) - star.distribution[:, None]).abs().sum(-1).max() < 1e-5
    glued = tr.glue(plans[:, 0], plans[:, 2], star.distribution)
    assert (glued.sum(-1) - p[:, 0]).abs().sum(-1).max() < 1e-5
    assert (glued.sum(-2) - p[:, 2]).abs().sum(-1).max() < 1e-5


def test_a_barycenter_at_a_very_small_eps():
    """Past what float64 holds as a kernel, so in the log domain; on a line it costs what its ends are apart."""
    line = torch.arange(5, dtype=torch.float64)
    cost = (line[:, None] - line).abs()
    star = tr.barycenter(
        torch.eye(5).double()[[0, 4]], torch.ones(2).double(), cost, eps=0.004, tol=1e-4
    )
    assert star.converged and float((star.plans() * cost).sum()) == pytest.approx(4, rel=1e-3)


def test_operators_keep_what_they_promise_the_compiler():
    """Schemas, fake shapes, gradients; that nothing returned is a view of an argument."""
    cost, p, q = (
        euclidean_cost(4),
        simplex(3, 4).requires_grad_(),
        simplex(3, 4, seed=1).requires_grad_(),
    )
    w = torch.full((1, 3), 1 / 3, dtype=torch.float64)
    for operator, *arguments in (
        (_sinkhorn.sinkhorn, p, q, cost, 0.1, 1e-6, 500, None),
        (_sinkhorn.self_sinkhorn, p, cost, 0.1, 1e-6, 500),
        (_sinkhorn.barycenter, p[None].detach(), w, cost, 0.1, 1e-6, 500, True),
    ):
        torch.library.opcheck(
            operator,
            tuple(arguments),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


def test_glue_skips_empty_consensus_classes():
    plan = torch.diag(torch.tensor([0.5, 0.5, 0.0]))
    torch.testing.assert_close(tr.glue(plan, plan, torch.tensor([0.5, 0.5, 0.0])), plan)


def test_costs():
    rows = torch.randn(5, 7)
    for metric in ("euclidean", "cosine"):
        cost = ground.check_cost(ground.cost_from_rows(rows + 3.0, metric=metric))
        assert float(cost.sum() / 20) == pytest.approx(1, rel=1e-6)
        torch.testing.assert_close(
            cost, ground.cost_from_rows(rows, metric=metric), atol=1e-5, rtol=1e-5
        )
    labels = torch.tensor([0, 0, 1, 2, -1, -1])
    means = ground.cost_from_means(torch.randn(6, 4), labels, 4)
    assert float(means.sum() / 12) == pytest.approx(1, rel=1e-6)
    assert (
        means[3, :3].std() < 1e-6 < means[0, 1:3].std()
    )  # the unseen class is equally far from all
    torch.testing.assert_close(ground.cost_from_rows(rows, shrink=1.0), ground.zero_one_cost(5))
    torch.testing.assert_close(ground.average_costs([7 * means, means]), means)


@pytest.mark.parametrize(
    ("cost", "advice"),
    [
        (torch.eye(3), "diagonal"),
        (torch.tensor([[0.0, 1], [2, 0]]), "symmetric"),
        (torch.tensor([[0.0, float("inf")], [1, 0]]), "NaN or inf"),
        (torch.tensor([[0.0, -1], [-1, 0]]), "negative"),
    ],
)
def test_check_cost_says_what_is_wrong(cost, advice):
    with pytest.raises(ValueError, match=advice):
        ground.check_cost(cost)

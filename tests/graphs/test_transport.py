"""Entropic transport: against exact solvers, by identities, by finite differences, at the edges."""

import numpy as np
import ot
import pytest
import torch
from graph_cases import euclidean_cost, line_cost, normal, simplex
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from gdviz.graphs import _operators
from gdviz.graphs.transport import Barycenter, ConvergenceWarning, barycenter, sinkhorn
from gdviz.graphs.transport import sinkhorn_divergence as divergence

# A longer step errs by its square where a class has next to no mass.
DIFFERENCES = {"eps": 2e-6, "atol": 1e-6, "rtol": 1e-5}


@pytest.mark.parametrize("classes", [2, 7, 20, 101])
def test_exact_cost_as_eps_vanishes(classes):
    cost, p, q = euclidean_cost(classes), simplex(6, classes), simplex(6, classes, seed=1)
    pairs = zip(p.numpy(), q.numpy(), strict=True)
    exact = np.array([ot.emd2(a, b, cost.numpy()) for a, b in pairs])
    solved = sinkhorn(p, q, cost, eps=2e-3, tol=1e-9)
    assert solved.converged
    np.testing.assert_allclose((solved.plan() * cost).sum((-2, -1)), exact, rtol=1e-3)
    # the regularised value lies above the exact one by at most eps times the plan's information
    assert (solved.cost.numpy() >= exact - 1e-9).all()
    np.testing.assert_allclose(solved.cost, exact, atol=2e-3 * np.log(classes) * 2)


@pytest.mark.parametrize("eps", [0.3, 0.1, 0.02])
def test_value_and_potentials_agree_with_pot(eps):
    cost, p, q = euclidean_cost(6), simplex(6), simplex(6, seed=1)
    options = {"stopThr": 1e-13, "numItermax": 200_000}
    plan = ot.bregman.sinkhorn_log(p.numpy(), q.numpy(), cost.numpy(), eps, **options)
    solved = sinkhorn(p, q, cost, eps=eps, tol=1e-12)
    torch.testing.assert_close(solved.plan(), torch.from_numpy(plan), atol=1e-8, rtol=0)
    value = (plan * cost.numpy()).sum() + eps * (plan * np.log(plan / np.outer(p, q))).sum()
    assert float(solved.cost) == pytest.approx(value, rel=1e-8)
    assert float((solved.f * p).sum()) == pytest.approx(value / 2)  # the constant is shared evenly


def test_eps_is_relative_to_the_mean_cost():
    cost, p, q = euclidean_cost(5), simplex(5), simplex(5, seed=1)
    torch.testing.assert_close(1000 * sinkhorn(p, q, cost).cost, sinkhorn(p, q, 1000 * cost).cost)


def test_marginals_and_reported_error():
    cost, p, q = euclidean_cost(9), simplex(3, 4, 9), simplex(3, 1, 9, seed=1)
    solved = sinkhorn(p, q, cost, eps=0.05, tol=1e-7)
    plan = solved.plan()
    assert plan.shape == (3, 4, 9, 9)
    off = (plan.sum(-1) - p).abs().sum(-1) + (plan.sum(-2) - q).abs().sum(-1)
    assert off.max() < 2e-7
    assert (off <= 2 * solved.error + 1e-12).all()


def test_batch_equals_loop():
    """Dropping finished columns must not mix problems up."""
    cost = euclidean_cost(8)
    p, q = simplex(30, 8, sharp=4.0), simplex(30, 8, seed=1, sharp=0.5)
    single = torch.stack([sinkhorn(a, b, cost).cost for a, b in zip(p, q, strict=True)])
    torch.testing.assert_close(sinkhorn(p, q, cost).cost, single, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("eps", [0.5, 0.02])
def test_gradients_by_finite_differences(eps):
    cost, options = euclidean_cost(5), {"eps": eps, "tol": 1e-13}
    z = normal(3, 5, seed=1).requires_grad_()
    p = simplex(3, 5, seed=2).requires_grad_()
    for value in (lambda *x: sinkhorn(*x, cost, **options).cost, lambda *x: divergence(*x, cost)):
        assert gradcheck(lambda p, z: value(p, z.softmax(-1)), (p, z), **DIFFERENCES)  # noqa: B023


def test_only_the_cost_is_differentiable_and_once():
    p = simplex(4).requires_grad_()
    solved = sinkhorn(p, simplex(4, seed=1), euclidean_cost(4))
    assert not (solved.f.requires_grad or solved.error.requires_grad or solved.plan().requires_grad)
    with pytest.raises(RuntimeError, match="once only"):
        torch.autograd.grad(solved.cost, p, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_divergence_zero_on_identical_inputs(dtype):
    cost, p = euclidean_cost(12, dtype=dtype), simplex(4, 12, sharp=3.0, dtype=dtype)
    q = p.clone().requires_grad_()
    value = divergence(p, q, cost)
    value.sum().backward()
    assert value.abs().max() < 1e-6
    assert (q * q.grad).abs().max() < 1e-4


def test_divergence_is_its_formula():
    cost, p, q = euclidean_cost(7), simplex(5, 7, sharp=3.0), simplex(5, 7, seed=1)
    across, of_p, of_q = (sinkhorn(a, b, cost, tol=1e-12).cost for a, b in ((p, q), (p, p), (q, q)))
    torch.testing.assert_close(divergence(p, q, cost, tol=1e-12), across - (of_p + of_q) / 2)


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
    p, q = (simplex(classes, seed=seed + i, sharp=sharp).float() for i in (0, 1))
    value = float(divergence(p, q, cost, eps=eps))
    assert 0 <= value < 10
    assert float(divergence(q, p, cost, eps=eps)) == pytest.approx(value, abs=1e-5)
    order = torch.randperm(classes, generator=torch.Generator().manual_seed(seed))
    permuted = divergence(p[order], q[order], cost[order][:, order], eps=eps)
    assert float(permuted) == pytest.approx(value, abs=1e-5)


def test_divergence_clamps_the_value_but_not_the_gradient():
    cost, p = euclidean_cost(5, dtype=torch.float32), simplex(64, 5, dtype=torch.float32)
    q = torch.softmax(p.log() + 1e-4 * torch.randn(64, 5), -1).requires_grad_()
    value = divergence(p, q, cost, tol=1e-9)
    value.sum().backward()
    assert (value >= 0).all()
    assert (q.grad.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("eps", [0.05, 0.005])  # product form, and float64 / log domain
def test_one_hot_zero_and_tiny_marginals(eps):
    cost = euclidean_cost(6, dtype=torch.float32)
    rows = [[0, 0, 1, 0, 0, 0], [0, 0.5, 0, 0.5, 0, 0], [1, 1e-30, 0, 1e-8, 0, 0]]
    rows = torch.tensor(rows)
    a = rows[:, None].expand(3, 3, 6).clone().requires_grad_()
    solved = sinkhorn(a, rows, cost, eps=eps)
    solved.cost.sum().backward()
    for x in (solved.cost, solved.plan(), a.grad):
        assert x.isfinite().all()
    only = float((cost[2, 1] + cost[2, 3]) / 2)  # one plan exists
    assert solved.cost[0, 1].item() == pytest.approx(only, rel=1e-5)
    assert divergence(rows, rows, cost, eps=eps).abs().max() < 1e-6


def test_two_one_hots_cost_the_ground_cost():
    cost, hot = euclidean_cost(5), torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(divergence(hot[:, None], hot, cost), cost)


def test_an_overflow_is_solved_again():
    """float64 at its widest range and a class of almost no mass: scalings overflow."""
    cost = line_cost(0.0, 0.2, 1.0)
    q = torch.tensor([[0, 1, 3e-161], [1, 0, 0]], dtype=torch.float64)
    value = divergence(simplex(2, 3), q, cost, eps=float(cost.max()) / 300, tol=1e-9)
    torch.testing.assert_close(value, (simplex(2, 3) * cost[[1, 0]]).sum(-1), atol=0.02, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(dtype):
    cost = euclidean_cost(10, dtype=torch.float32)
    p, q = (simplex(4, 10, seed=i).to(dtype) for i in (0, 1))
    q.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = divergence(p, q, cost)
    value.sum().backward()
    assert value.dtype == torch.float32 and q.grad.isfinite().all()
    exact = divergence(p.double(), q.detach().double(), cost.double())
    torch.testing.assert_close(value.double(), exact, atol=1e-5, rtol=1e-4)


def test_hard_problems_converge():
    """Peaked marginals at a small eps: plain Sinkhorn needs more than 20,000 iterations here."""
    cost = euclidean_cost(8, dtype=torch.float32)
    p, q = (simplex(100, 8, sharp=3.0, seed=i).float() for i in (0, 1))
    for eps in (0.05, 0.02):
        assert sinkhorn(p, q, cost, eps=eps, max_iter=400).converged


def test_what_newtons_method_leaves_is_taken_up_again_from_a_larger_eps():
    """Masses down to 1e-40: parts of the plan exchange next to nothing, and the method stalls."""
    p, q = (simplex(100, 20, sharp=1.0, seed=i) for i in (14, 15))
    q = q * 10.0 ** -torch.randint(41, q.shape, generator=torch.Generator().manual_seed(7))
    q[:, 0] += 1e-3
    assert sinkhorn(p, q, 1 - torch.eye(20).double(), eps=0.004).converged


def test_rounding_in_the_cost_does_not_stall_the_solver():
    """A float32 cdist is symmetric to 1e-7 only."""
    cost = euclidean_cost(40).float() * (1 + 2e-7 * torch.randn(40, 40))
    p, q = (simplex(20, 40, sharp=1.0, seed=i).float() for i in (0, 1))
    solved = sinkhorn(p, q, cost, eps=0.02)
    assert solved.converged and (solved.plan().sum(-2) - q).abs().sum(-1).max() < 1e-5


def test_not_converging_warns_and_says_so():
    cost, p, q = euclidean_cost(8), simplex(8, sharp=4.0), simplex(8, seed=1, sharp=4.0)
    with pytest.warns(ConvergenceWarning, match="within 3 iterations"):
        solved = sinkhorn(p, q, cost, eps=0.02, max_iter=3)
    assert not solved.converged and solved.error > 1e-6
    with pytest.warns(ConvergenceWarning, match="self term"):
        _operators.self_sinkhorn(simplex(8), cost, 1.0, 1e-6, 3)
    with pytest.warns(ConvergenceWarning, match="barycenter"):
        star = barycenter(torch.stack([p, q]), torch.ones(2), cost, eps=0.02, max_iter=3)
    assert not star.converged


ONES, NAN = torch.ones(3), float("nan")


@pytest.mark.parametrize(
    ("a", "cost"),
    [
        *((torch.tensor(a), euclidean_cost(3)) for a in ([0.5, -0.5, 1.0], [0.0, 0, 0])),
        *((torch.tensor(a), euclidean_cost(3)) for a in ([0.5, NAN, 0.5], [1.0, 1.0])),
        *((ONES, cost) for cost in (torch.zeros(3, 3), torch.ones(3, 2))),
        (ONES, torch.tensor([[0.0, 1, 2], [3, 0, 1], [1, 1, 0]])),
    ],
)
def test_bad_marginals_and_costs_raise(a, cost):
    with pytest.raises((ValueError, TypeError)):  # TypeError: shapes checked at run time
        sinkhorn(a, ONES, cost)
    with pytest.raises((ValueError, TypeError)):
        barycenter(torch.stack([a, a]), torch.ones(2), cost)


def test_barycenter_minimises_the_divergence():
    cost, p, w = euclidean_cost(5), simplex(3, 5), torch.tensor([0.5, 0.3, 0.2]).double()
    b = barycenter(p, w, cost, eps=0.2, tol=1e-12).distribution

    def objective(b):
        return (w * divergence(p, b, cost, eps=0.2, tol=1e-12)).sum()

    z = b.log().requires_grad_()
    (grad,) = torch.autograd.grad(objective(z.softmax(-1)), z)
    assert grad.abs().max() < 1e-9
    nearby = ((z + 0.05 * torch.randn(5)).softmax(-1) for _ in range(10))
    assert min(map(objective, nearby)) > objective(b)


def test_barycenter_agrees_with_pot():
    cost, p, w = euclidean_cost(6), simplex(3, 6), torch.full((3,), 1 / 3, dtype=torch.float64)
    found = barycenter(p, w, cost, eps=0.1, tol=1e-12).distribution
    options = {"numItermax": 100_000, "stopThr": 1e-14}
    expected = ot.bregman.barycenter_debiased(p.T.numpy(), cost.numpy(), 0.1, w.numpy(), **options)
    np.testing.assert_allclose(found, expected, atol=1e-8)


def test_barycenter_of_one_teacher_or_of_equals_is_itself():
    cost, p = euclidean_cost(6), simplex(4, 1, 6)
    for many in (p, p.expand(4, 3, 6)):
        found = barycenter(many, torch.rand(many.shape[:2]) + 0.1, cost).distribution
        torch.testing.assert_close(found, p[:, 0], atol=1e-5, rtol=0)


def test_barycenter_permutes_with_teachers_and_classes():
    cost, p, w = euclidean_cost(5), simplex(2, 3, 5), simplex(2, 3, seed=4)
    b = barycenter(p, w, cost).distribution
    teachers, classes = torch.tensor([2, 0, 1]), torch.tensor([4, 1, 0, 3, 2])
    same = barycenter(p[:, teachers], w[:, teachers], cost).distribution
    torch.testing.assert_close(same, b, atol=1e-7, rtol=0)
    moved = barycenter(p[..., classes], w, cost[classes][:, classes]).distribution
    torch.testing.assert_close(moved, b[:, classes], atol=1e-7, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_glued_couplings_have_the_teachers_marginals(dtype):
    cost, one_hot = euclidean_cost(6, dtype=dtype), torch.eye(6)[:4, None]
    p = torch.cat([simplex(4, 2, 6), one_hot], dim=1).to(dtype)
    star = barycenter(p, torch.ones(4, 3, dtype=dtype), cost, eps=0.1, tol=1e-4)
    assert (star.plans.sum(-1) - star.distribution[:, None]).abs().sum(-1).max() < 1e-5
    glued = star.pair_plan(0, 2)
    assert (glued.sum(-1) - p[:, 0]).abs().sum(-1).max() < 1e-5
    assert (glued.sum(-2) - p[:, 2]).abs().sum(-1).max() < 1e-5


def test_gluing_skips_empty_consensus_classes():
    b, cost = torch.tensor([0.5, 0.5, 0.0]), 1 - torch.eye(3)
    star = Barycenter(b, torch.tensor(True), b.expand(2, 3), cost, 0.01)
    torch.testing.assert_close(star.pair_plan(0, 1), torch.diag(b))


def test_a_barycenter_at_a_very_small_eps():
    """In the log domain, as float64 does not hold the kernel; on a line it costs its length."""
    cost, ends = line_cost(*range(5)), torch.eye(5).double()[[0, 4]]
    star = barycenter(ends, torch.ones(2).double(), cost, eps=0.004, tol=1e-4)
    assert star.converged
    assert float((star.plans * cost).sum()) == pytest.approx(float(cost[0, 4]), rel=1e-3)


def test_plans_of_a_barycenter_with_classes_that_are_all_but_empty():
    """Newton's method stalls in one potential here, and not in the other."""
    p, cost = simplex(20, 3, 20, seed=2, sharp=8.0), euclidean_cost(20, 2)
    star = barycenter(p, torch.ones(20, 3), cost, eps=0.005, tol=1e-4)
    assert (star.plans.sum(-2) - p).abs().sum(-1).max() < 1e-6
    assert (star.plans.sum(-1) - star.distribution[:, None]).abs().sum(-1).max() < 1e-6


def test_operators_keep_what_they_promise_the_compiler():
    """Schemas, fake shapes, gradients; that nothing returned is a view of an argument."""
    p, q = (simplex(3, 4, seed=i).requires_grad_() for i in (0, 1))
    options, w = (euclidean_cost(4), 0.1, 1e-6, 500), torch.full((1, 3), 1 / 3).double()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for operator, *arguments in (
        (_operators.sinkhorn, p, q, *options, None),
        (_operators.self_sinkhorn, p, *options),
        (_operators.barycenter, p[None].detach(), w, *options),
    ):
        torch.library.opcheck(operator, tuple(arguments), test_utils=tests)

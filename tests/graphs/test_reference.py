"""The star of the logits graph, and its alternatives, against brute-force joint matching."""

import builtins
from itertools import combinations

import pytest
import torch
from graph_cases import euclidean_cost, simplex

from gdviz.graphs.reference import (
    joint_matching_cost,
    ordered_matching_cost,
    pairwise_matching_cost,
)
from gdviz.graphs.transport import barycenter


@pytest.mark.parametrize(
    ("classes", "teachers", "seed"), [(3, 3, 0), (4, 3, 1), (3, 4, 2), (4, 4, 3)]
)
def test_star_with_free_centre_is_the_joint_matching(classes, teachers, seed):
    """Barycenter value = multi-marginal optimum for the cost min_z sum_k w_k D[z, y_k]."""
    cost, p = euclidean_cost(classes, seed), simplex(teachers, classes, seed=seed)
    w = simplex(teachers, seed=seed + 9)
    exact = joint_matching_cost(p, lambda y: float((cost[:, list(y)] @ w).min()))
    star = barycenter(p, w, cost, eps=0.01, tol=1e-4, max_iter=20_000)
    value = float((w[:, None, None] * star.plans * cost).sum())
    assert value == pytest.approx(exact, rel=2e-2)
    assert value >= exact - 1e-6  # any consensus is feasible, none can be better


@pytest.mark.parametrize("seed", range(4))
def test_pairwise_cost_bounds_the_complete_graph_from_below(seed):
    cost, p, e = euclidean_cost(4, seed), simplex(3, 4, seed=seed), simplex(3, 3, seed=seed)

    def joint_cost(y):
        return sum(float(e[i, j] * cost[y[i], y[j]]) for i, j in combinations(range(3), 2))

    exact = joint_matching_cost(p, joint_cost)
    bound = float(pairwise_matching_cost(p, cost, e, eps=0.003))
    assert 0.9 * exact <= bound <= exact * (1 + 1e-3)
    assert pairwise_matching_cost(p[None, :1], cost).tolist() == [0]  # a single teacher


@pytest.mark.parametrize(("classes", "teachers"), [(4, 2), (4, 3), (3, 4)])
def test_ordered_classes_in_closed_form(classes, teachers):
    p = simplex(teachers, classes, seed=classes)
    exact = joint_matching_cost(p, lambda y: max(y) - min(y))
    assert float(ordered_matching_cost(p)) == pytest.approx(exact, abs=1e-9)


def test_brute_force_says_what_it_needs(monkeypatch):
    with pytest.raises(ValueError, match="too many"):
        joint_matching_cost(simplex(5, 7), max)
    find = builtins.__import__

    def without_scipy(name, *args):
        if name.startswith("scipy"):
            raise ImportError(name)
        return find(name, *args)

    monkeypatch.setattr(builtins, "__import__", without_scipy)
    with pytest.raises(ImportError, match="pip install scipy"):
        joint_matching_cost(torch.eye(2), max)

"""Logits graph: joint matching against brute-force linear programs, the loss, and what it must not do."""

import warnings
from itertools import combinations, product

import numpy as np
import ot
import pytest
import torch
from scipy.optimize import linprog
from torch.autograd import gradcheck

from gdviz.graphs import costs as ground
from gdviz.graphs import transport as tr
from gdviz.graphs.logits import (
    LogitsGraph,
    one_class_at_a_time,
    ordered_matching_cost,
    pairwise_matching_cost,
)


def euclidean_cost(classes, seed=0):
    rows = torch.randn(
        classes, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return ground.normalise_cost(torch.cdist(rows, rows))


def simplex(*shape, seed=0, sharp=1.5):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.softmax(sharp * x, dim=-1)


def multi_marginal(probs, joint_cost):
    """Optimum over all C^K couplings of the K rows of ``probs``, by linear programming."""
    teachers, classes = probs.shape
    tuples = list(product(range(classes), repeat=teachers))
    rows = np.array(
        [[float(y[k] == c) for y in tuples] for k in range(teachers) for c in range(classes)]
    )
    solved = linprog(
        [joint_cost(y) for y in tuples], A_eq=rows, b_eq=probs.numpy().ravel(), method="highs"
    )
    assert solved.status == 0
    return solved.fun


@pytest.fixture
def batch():
    graph = LogitsGraph(["a", "b", "c"], euclidean_cost(5), eps=0.1, tol=1e-7)
    return graph, torch.randn(6, 5, dtype=torch.float64), simplex(6, 3, 5), simplex(6, 3, seed=3)


@pytest.mark.parametrize(
    ("classes", "teachers", "seed"), [(3, 3, 0), (4, 3, 1), (3, 4, 2), (4, 4, 3)]
)
def test_star_with_free_centre_is_the_joint_matching(classes, teachers, seed):
    """Barycenter value = multi-marginal optimum for the cost min_z sum_k w_k D[z, y_k]."""
    cost, p, w = (
        euclidean_cost(classes, seed),
        simplex(teachers, classes, seed=seed),
        simplex(teachers, seed=seed + 9),
    )
    exact = multi_marginal(
        p, lambda y: min(float((w * cost[z, list(y)]).sum()) for z in range(classes))
    )
    star = tr.barycenter(p, w, cost, eps=0.01, tol=1e-4, max_iter=20000)
    value = float((w[:, None, None] * star.plans() * cost).sum())
    assert value == pytest.approx(exact, rel=2e-2)
    assert value >= exact - 1e-6  # any consensus is feasible, none can be better


@pytest.mark.parametrize("seed", range(4))
def test_pairwise_cost_bounds_the_complete_graph_from_below(seed):
    cost, p = euclidean_cost(4, seed), simplex(3, 4, seed=seed)
    e = simplex(3, 3, seed=seed)
    exact = multi_marginal(
        p, lambda y: sum(float(e[i, j] * cost[y[i], y[j]]) for i, j in combinations(range(3), 2))
    )
    bound = float(pairwise_matching_cost(p, cost, e, eps=0.003))
    assert bound <= exact * (1 + 1e-3)
    assert bound >= 0.9 * exact


@pytest.mark.parametrize(("classes", "teachers"), [(4, 2), (4, 3), (3, 4)])
def test_ordered_classes_in_closed_form(classes, teachers):
    p = simplex(teachers, classes, seed=classes)
    exact = multi_marginal(p, lambda y: max(y) - min(y))
    assert float(ordered_matching_cost(p)) == pytest.approx(exact, abs=1e-9)


def test_pairwise_cost_of_one_teacher_is_zero():
    assert pairwise_matching_cost(simplex(2, 1, 4), euclidean_cost(4)).tolist() == [0, 0]


def test_matching_costs_and_pair_plans(batch):
    graph, _, p, w = batch
    joint = graph.match(p, w)
    expected = tr.sinkhorn_divergence(p, joint.consensus[:, None], graph.cost, eps=0.1)
    torch.testing.assert_close(joint.costs, expected, atol=1e-6, rtol=0)
    plan = joint.pair_plan(0, 2)
    assert (plan.sum(-1) - p[:, 0]).abs().sum(-1).max() < 1e-5
    assert (plan.sum(-2) - p[:, 2]).abs().sum(-1).max() < 1e-5


def test_all_weight_on_one_teacher_makes_it_the_consensus(batch):
    graph, _, p, _ = batch
    w = torch.tensor([0.0, 1.0, 0.0]).expand(6, 3)
    torch.testing.assert_close(graph.match(p, w).consensus, p[:, 1], atol=1e-4, rtol=0)


def test_loss_is_its_formula(batch):
    graph, z, p, w = batch
    b = graph.consensus(p, w)
    q = (z / 2).softmax(-1)
    s = 1 - torch.special.entr(b).sum(-1) / np.log(5)
    targets = [tr.sinkhorn_divergence(q, x, graph.cost, eps=0.1) for x in (*p.unbind(1), b)]
    per_clip = sum(w[:, k] * targets[k] for k in range(3)) + targets[3]
    expected = 2.0 * (s / s.mean() * per_clip).mean()
    torch.testing.assert_close(graph.loss(z, p, w), expected, atol=1e-6, rtol=1e-5)
    given = graph.loss(z, p, w, b, graph.self_terms(p, b))
    torch.testing.assert_close(given, expected, atol=1e-6, rtol=1e-5)


def test_loss_gradient_by_finite_differences(batch):
    graph, z, p, w = batch
    graph = LogitsGraph(["a", "b", "c"], graph.cost, tol=1e-13)
    b = graph.match(p, w).consensus
    assert gradcheck(
        lambda z: graph.loss(z, p, w, b), (z.requires_grad_(),), eps=1e-5, atol=1e-6, rtol=1e-5
    )


def test_loss_scalar_zero_on_identical_inputs_never_negative(batch):
    graph, z, _, w = batch
    same = (z / 2).softmax(-1)[:, None].expand(6, 3, 5)
    z.requires_grad_()
    value = graph.loss(z, same, w)
    (grad,) = torch.autograd.grad(value, z)
    assert value.shape == () and 0 <= value.detach() < 1e-5
    assert grad.abs().max() < 1e-3  # the consensus is solved to 1e-6 only
    for seed in range(5):
        assert graph.loss(simplex(6, 5, seed=seed).log(), simplex(6, 3, 5, seed=seed + 9), w) >= 0


def test_loss_leads_the_student_to_the_consensus_side(batch):
    graph, _, p, w = batch
    z = torch.zeros(6, 5, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([z], lr=0.4)
    for _ in range(60):
        loss = graph.loss(z, p, w)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    b = graph.consensus(p, w)
    assert ((z / 2).softmax(-1) - b).abs().sum(-1).max() < 0.05  # both terms are least at b


def test_only_the_student_gets_a_gradient(batch):
    graph, z, p, w = batch
    z, p, w = z.requires_grad_(), p.requires_grad_(), w.requires_grad_()
    graph.loss(z, p, w).backward()
    assert z.grad.abs().sum() > 0 and p.grad is None and w.grad is None


def test_loss_permutes(batch):
    graph, z, p, w = batch
    value = graph.loss(z, p, w)
    clips, teachers, classes = torch.randperm(6), torch.tensor([2, 0, 1]), torch.randperm(5)
    torch.testing.assert_close(
        graph.loss(z[clips], p[clips], w[clips]), value, atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        graph.loss(z, p[:, teachers], w[:, teachers]), value, atol=1e-5, rtol=1e-5
    )
    moved = LogitsGraph(["a", "b", "c"], graph.cost[classes][:, classes], tol=1e-7)
    torch.testing.assert_close(
        moved.loss(z[:, classes], p[..., classes], w), value, atol=1e-5, rtol=1e-5
    )


def test_sample_importance_prefers_sure_clips():
    graph = LogitsGraph(["a"], ground.zero_one_cost(4))
    sure, unsure = torch.tensor([0.97, 0.01, 0.01, 0.01]), torch.full((4,), 0.25)
    s = graph._importance(torch.stack([sure, unsure]))
    assert float(s.mean()) == pytest.approx(1) and s[0] > 1.9 and s[1] < 1e-5
    torch.testing.assert_close(graph._importance(unsure.expand(3, 4)), torch.ones(3))


def test_single_teacher_single_clip_and_large_logits():
    graph = LogitsGraph(["only"], ground.zero_one_cost(3))
    z = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True)
    value = graph.loss(z, torch.tensor([[[0.0, 1.0, 0.0]]]), torch.ones(1, 1))
    value.backward()
    assert value.isfinite() and z.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype):
    graph = LogitsGraph(["a", "b"], ground.zero_one_cost(6))
    z, p, w = (
        torch.randn(3, 6).to(dtype).requires_grad_(),
        simplex(3, 2, 6).to(dtype),
        torch.full((3, 2), 0.5),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = graph.loss(z, p, w)
    value.backward()
    assert value.dtype == torch.float32 and z.grad.isfinite().all() and z.grad.abs().sum() > 0
    torch.testing.assert_close(
        value.double(), graph.double().loss(z.double(), p.double(), w), atol=1e-3, rtol=1e-2
    )


def test_state_dict_restores_cost_and_mean_weights(batch):
    graph, z, p, w = batch
    assert graph.mean_weights.tolist() == pytest.approx([1 / 3] * 3)
    graph.loss(z, p, w)
    graph.eval().loss(z, p, 1 - w)  # evaluation leaves no trace
    other = LogitsGraph(["a", "b", "c"], ground.zero_one_cost(5, dtype=torch.float64))
    other.load_state_dict(graph.state_dict())
    torch.testing.assert_close(other.cost, graph.cost)
    torch.testing.assert_close(other.mean_weights, w.mean(0))


def test_to_networkx(batch):
    graph, z, p, w = batch
    g = graph.to_networkx(p, w, (z / 2).softmax(-1))
    kinds = {name: data["kind"] for name, data in g.nodes(data=True)}
    assert kinds == {
        "consensus": "consensus",
        "a": "teacher",
        "b": "teacher",
        "c": "teacher",
        "student": "student",
    }
    assert g.number_of_edges() == 3 + 3 + 4
    marginals = dict(zip("abc", p.mean(0).numpy(), strict=True)) | {
        "student": (z / 2).softmax(-1).mean(0).numpy()
    }
    for _, _, edge in g.edges(data=True):
        assert edge["cost"] >= 0 and edge["plan"].shape == (5, 5)
        for axis, name in ((1, edge["rows"]), (0, edge["columns"])):
            if name != "consensus":
                np.testing.assert_allclose(edge["plan"].sum(axis), marginals[name], atol=1e-5)
    assert g.edges["consensus", "b"]["weight"] == pytest.approx(float(w[:, 1].mean()))
    assert g.edges["a", "c"]["kind"] == "glued"
    assert "student" not in graph.to_networkx(p, w)


@pytest.mark.parametrize("names", [[], ["a", "a"], ["student", "b"]])
def test_bad_names_raise(names):
    with pytest.raises(ValueError, match="distinct"):
        LogitsGraph(names, ground.zero_one_cost(3))


def test_bad_shapes_and_costs_raise(batch):
    graph, z, p, w = batch
    with pytest.raises(ValueError, match="expected"):
        graph.loss(z, p[:, :2], w[:, :2])
    gap = torch.tensor(
        [[0, 0.1, 5.0], [0.1, 0, 0.1], [5, 0.1, 0]]
    )  # violates the triangle inequality
    with pytest.raises(ValueError, match="negative"):
        LogitsGraph(["a"], gap, eps=1.0)


def test_sets_of_labels_cost_one_class_at_a_time():
    """All 2^C sets as classes under the Hamming distance: the exact transport is ``sum_c |p_c - q_c|``, ours is near it."""
    bits = torch.tensor(list(product((0.0, 1.0), repeat=3)), dtype=torch.float64)
    p, z = (
        torch.tensor([0.9, 0.2, 0.5], dtype=torch.float64),
        torch.tensor([-1.0, 0.3, 2.0], dtype=torch.float64),
    )
    sets = [torch.where(bits > 0, x, 1 - x).prod(-1) for x in (p, z.sigmoid())]
    exact = ot.emd2(sets[0].numpy(), sets[1].numpy(), torch.cdist(bits, bits, p=1).numpy())
    assert exact == pytest.approx(float((p - z.sigmoid()).abs().sum()))
    options = {"beta": 0.0, "temperature": 1.0, "sample_importance": False, "tol": 1e-10}
    problems = one_class_at_a_time(
        z[None].requires_grad_(), p[None, None], torch.ones(1, 1).double()
    )
    sharp, wide = (
        LogitsGraph(["a"], ground.zero_one_cost(2).double(), eps=eps, **options)
        for eps in (0.01, 100.0)
    )
    consensus = problems[1][:, 0]  # of a single teacher
    assert 3 * sharp.loss(*problems, consensus).item() == pytest.approx(exact, abs=0.05)
    assert 3 * wide.loss(*problems, consensus).item() == pytest.approx(
        float((p - z.sigmoid()).pow(2).sum()), rel=0.02
    )


def test_multi_label_loss_gradient_and_consensus():
    graph = LogitsGraph(["a", "b"], ground.zero_one_cost(2).double(), tol=1e-13)
    z, p = (
        torch.randn(2, 3, dtype=torch.float64, requires_grad=True),
        torch.rand(2, 2, 3, dtype=torch.float64),
    )
    w = simplex(2, 2)
    b = graph.consensus(*one_class_at_a_time(z, p, w)[1:])
    assert gradcheck(
        lambda z: graph.loss(*one_class_at_a_time(z, p, w), b), (z,), eps=1e-5, atol=1e-6, rtol=1e-5
    )
    low, high = p.amin(1).flatten(), p.amax(1).flatten()
    assert (
        (b[:, 1] > low - 1e-6) & (b[:, 1] < high + 1e-6)
    ).all()  # between the teachers, class by class
    agreed = (z / 2).sigmoid().detach()[:, None].expand(2, 2, 3)
    assert graph.loss(*one_class_at_a_time(z, agreed, w)) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("known", [False, True])
def test_compiles_without_graph_breaks(known):
    graph = LogitsGraph(["a", "b", "c"], euclidean_cost(5))
    z, p, w = (
        torch.randn(6, 5, dtype=torch.float64, requires_grad=True),
        simplex(6, 3, 5),
        simplex(6, 3, seed=3),
    )
    b = graph.consensus(p, w)
    given = (b, graph.self_terms(p, b)) if known else ()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the compiler's own making
        values = [
            loss(z, p, w, *given)
            for loss in (graph.loss, torch.compile(graph.loss, fullgraph=True))
        ]
        gradients = [torch.autograd.grad(value, z)[0] for value in values]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*gradients)
    assert graph.clips_seen == 12  # the compiled one counts as well

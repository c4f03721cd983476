"""Logits graph: the loss by its formula, what it must not do, and that it can be stored."""

import json
from itertools import product

import networkx as nx
import numpy as np
import ot
import pytest
import torch
from graph_cases import euclidean_cost, normal, simplex
from safetensors.torch import load, save
from torch.autograd import gradcheck

from gdviz.graphs.costs import zero_one_cost
from gdviz.graphs.logits import LogitsGraph, _importance, two_class
from gdviz.graphs.transport import sinkhorn_divergence


@pytest.fixture
def batch():
    graph = LogitsGraph(["a", "b", "c"], euclidean_cost(5), eps=0.1, tol=1e-7)
    return graph, normal(6, 5, seed=7), simplex(6, 3, 5), simplex(6, 3, seed=3)


def test_all_weight_on_one_teacher_makes_it_the_consensus(batch):
    graph, _, p, _ = batch
    w = torch.tensor([0.0, 1.0, 0.0]).expand(6, 3)
    torch.testing.assert_close(graph.match(p, w).distribution, p[:, 1], atol=1e-4, rtol=0)


def test_loss_is_its_formula(batch):
    graph, z, p, w = batch
    graph = LogitsGraph("abc", graph.cost, eps=0.1, beta=0.5, temperature=3.0, tol=1e-7)
    b, q = graph.consensus(p, w), (z / 3).softmax(-1)
    s = 1 - torch.special.entr(b).sum(-1) / np.log(5)
    targets = [sinkhorn_divergence(q, x, graph.cost, eps=0.1) for x in (*p.unbind(1), b)]
    per_clip = sum(w[:, k] * targets[k] for k in range(3)) + 0.5 * targets[3]
    expected = 3.0 * (s / s.mean() * per_clip).mean()
    for given in ((), (b,)):
        torch.testing.assert_close(graph.loss(z, p, w, *given), expected, atol=1e-6, rtol=1e-5)


def test_loss_gradient_by_finite_differences(batch):
    graph, z, p, w = batch
    graph = LogitsGraph(["a", "b", "c"], graph.cost, tol=1e-13)
    b, check = graph.consensus(p, w), {"eps": 1e-5, "atol": 1e-6, "rtol": 1e-5}
    assert gradcheck(lambda z: graph.loss(z, p, w, b), (z.requires_grad_(),), **check)


def test_loss_scalar_zero_on_identical_inputs_never_negative(batch):
    graph, z, _, w = batch
    same = (z / 2).softmax(-1)[:, None].expand(6, 3, 5)
    value = graph.loss(z.requires_grad_(), same, w)
    (grad,) = torch.autograd.grad(value, z)
    assert value.shape == () and 0 <= value.detach() < 1e-5
    assert grad.abs().max() < 1e-3  # the consensus is solved to 1e-6 only
    for seed in range(5):
        assert graph.loss(simplex(6, 5, seed=seed).log(), simplex(6, 3, 5, seed=seed + 9), w) >= 0


def test_loss_leads_the_student_to_the_consensus(batch):
    graph, _, p, w = batch
    z = torch.zeros(6, 5, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([z], lr=0.4)
    for _ in range(60):
        optimiser.zero_grad()
        graph.loss(z, p, w).backward()
        optimiser.step()
    gap = ((z / 2).softmax(-1) - graph.consensus(p, w)).abs().sum(-1)
    assert gap.max() < 0.05  # both terms are least there


def test_only_the_student_gets_a_gradient(batch):
    graph, z, p, w = (x.requires_grad_() for x in batch)
    graph.loss(z, p, w).backward()
    assert z.grad.abs().sum() > 0 and p.grad is None and w.grad is None


def test_loss_permutes(batch):
    graph, z, p, w = batch
    clips, teachers, classes = torch.randperm(6), torch.tensor([2, 0, 1]), torch.randperm(5)
    moved = LogitsGraph(["a", "b", "c"], graph.cost[classes][:, classes], tol=1e-7)
    for value in (
        graph.loss(z[clips], p[clips], w[clips]),
        graph.loss(z, p[:, teachers], w[:, teachers]),
        moved.loss(z[:, classes], p[..., classes], w),
    ):
        torch.testing.assert_close(value, graph.loss(z, p, w), atol=1e-5, rtol=1e-5)


def test_importance_prefers_sure_clips():
    sure, unsure = torch.tensor([0.97, 0.01, 0.01, 0.01]), torch.full((4,), 0.25)
    s = _importance(torch.stack([sure, unsure]))
    assert float(s.mean()) == pytest.approx(1) and s[0] > 1.9 and s[1] < 1e-5
    torch.testing.assert_close(_importance(unsure.expand(3, 4)), torch.ones(3))


def test_single_teacher_single_clip_and_large_logits():
    graph = LogitsGraph(["only"], zero_one_cost(3))
    z = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True)
    value = graph.loss(z, torch.tensor([[[0.0, 1.0, 0.0]]]), torch.ones(1, 1))
    value.backward()
    assert value.isfinite() and z.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype):
    graph = LogitsGraph(["a", "b"], zero_one_cost(6))
    z, p = torch.randn(3, 6).to(dtype).requires_grad_(), simplex(3, 2, 6).to(dtype)
    w = torch.full((3, 2), 0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = graph.loss(z, p, w)
    value.backward()
    assert value.dtype == torch.float32 and z.grad.isfinite().all() and z.grad.abs().sum() > 0
    exact = graph.double().loss(z.double(), p.double(), w)
    torch.testing.assert_close(value.double(), exact, atol=1e-3, rtol=1e-2)


def test_settings_and_state_give_the_graph_back(batch):
    _, z, p, w = (x if isinstance(x, LogitsGraph) else x.float() for x in batch)
    options = {"eps": 0.3, "beta": 0.5, "temperature": 3.0, "tol": 1e-3, "max_iter": 77}
    graph = LogitsGraph(("a", "b", "c"), euclidean_cost(5).float(), **options)
    settings, state = json.loads(json.dumps(graph.settings)), load(save(graph.state_dict()))
    other = LogitsGraph(cost=state["cost"], **settings)
    other.load_state_dict(state)
    assert other.settings == graph.settings and settings.items() >= options.items()
    assert torch.equal(other.loss(z, p, w), graph.loss(z, p, w))
    assert torch.equal(other.consensus(p, w), graph.consensus(p, w))


def test_to_networkx(batch):
    graph, z, p, w = batch
    q = (z / 2).softmax(-1)
    g = graph.to_networkx(p, w, q, plans=True)
    kinds = {"consensus": "consensus", "student": "student"} | dict.fromkeys("abc", "teacher")
    assert dict(g.nodes(data="kind")) == kinds and g.number_of_edges() == 3 + 3 + 4
    of = {"student": q, "consensus": graph.consensus(p, w)}
    of |= dict(zip("abc", p.unbind(1), strict=True))
    for _, _, edge in g.edges(data=True):
        assert edge["cost"] >= 0 and edge["plan"].shape == (5, 5)
        for axis, name in ((1, edge["rows"]), (0, edge["columns"])):
            np.testing.assert_allclose(edge["plan"].sum(axis), of[name].mean(0), atol=1e-5)
    assert g.edges["consensus", "b"]["weight"] == pytest.approx(float(w[:, 1].mean()))
    assert g.edges["a", "c"]["weight"] == pytest.approx(float((w[:, 0] * w[:, 2]).mean()))
    assert g.edges["a", "c"]["kind"] == "glued" and g.edges["student", "consensus"]["weight"] == 1
    assert "student" not in graph.to_networkx(p, w)


def test_to_networkx_can_be_written_as_graphml(batch, tmp_path):
    graph, _, p, w = batch
    g = graph.to_networkx(p, w, p[:, 0])
    nx.write_graphml(g, tmp_path / "graph.xml")
    read = nx.read_graphml(tmp_path / "graph.xml")
    assert dict(read.nodes) == dict(g.nodes) and read.adj == g.adj


def test_what_does_not_fit_is_refused(batch):
    graph, z, p, w = batch
    for names in ([], ["a", "a"], ["student", "b"]):
        with pytest.raises(ValueError, match="distinct"):
            LogitsGraph(names, zero_one_cost(3))
    for few in ((p[:, :2], w[:, :2]), (p, w[:, :1])):
        with pytest.raises((ValueError, TypeError)):  # TypeError: shapes checked at run time
            graph.loss(z, *few)
        with pytest.raises((ValueError, TypeError)):
            graph.loss(z, *few, graph.consensus(p, w))
    gap = torch.tensor([[0, 0.1, 5.0], [0.1, 0, 0.1], [5, 0.1, 0]])  # no triangle inequality
    with pytest.raises(ValueError, match="negative"):
        LogitsGraph(["a"], gap, eps=1.0)


def test_sets_of_labels_cost_one_class_at_a_time():
    """All 2^C sets as classes under the Hamming distance: W is ``sum_c |p_c - q_c|``, ours near."""
    bits = torch.tensor(list(product((0.0, 1.0), repeat=3)), dtype=torch.float64)
    p, z = torch.tensor([0.9, 0.2, 0.5]).double(), torch.tensor([-1.0, 0.3, 2.0]).double()
    sets = [torch.where(bits > 0, x, 1 - x).prod(-1) for x in (p, z.sigmoid())]
    exact = ot.emd2(*(s.numpy() for s in sets), torch.cdist(bits, bits, p=1).numpy())
    assert exact == pytest.approx(float((p - z.sigmoid()).abs().sum()))
    logits, targets = two_class(z), torch.stack([1 - p, p], -1)

    def cost(eps):
        q = logits.softmax(-1)
        return float(sinkhorn_divergence(q, targets, zero_one_cost(2), eps=eps).sum())

    assert cost(0.01) == pytest.approx(exact, abs=0.05)
    assert cost(100.0) == pytest.approx(float((p - z.sigmoid()).pow(2).sum()), rel=0.02)


def test_multi_label_loss_and_consensus():
    graph = LogitsGraph(["a", "b"], zero_one_cost(2).double())
    z, p, w = normal(2, 3), torch.rand(2, 2, 3, dtype=torch.float64), simplex(2, 2)
    w = w.repeat_interleave(3, 0)

    def cases(p):  # of teachers
        return torch.stack([1 - p, p], -1).transpose(1, 2).flatten(0, 1)

    b = graph.consensus(cases(p), w)
    between = (b[:, 1] > p.amin(1).flatten() - 1e-6) & (b[:, 1] < p.amax(1).flatten() + 1e-6)
    assert between.all()  # class by class
    agreed = (z / 2).sigmoid()[:, None].expand(2, 2, 3)
    logits = two_class(z).flatten(0, 1)
    assert graph.loss(logits, cases(agreed), w) < 1e-6
    assert graph.loss(logits, cases(p), w) > 1e-3


@pytest.mark.parametrize("clips", [0, 1, 3])
def test_logits_of_other_clips_than_the_teachers_are_refused(unchecked, clips):
    graph = LogitsGraph(["a", "b"], zero_one_cost(3))
    probs, weights = torch.full((5, 2, 3), 1 / 3), torch.full((5, 2), 0.5)
    with pytest.raises(ValueError, match=r"expected logits .* as the teachers'"):
        graph.loss(torch.zeros(clips, 3), probs, weights)
    if not clips:
        with pytest.raises(ValueError, match="of one or more clips"):
            graph.loss(torch.zeros(0, 3), probs[:0], weights[:0])

"""Representation graph: both routes, the loss, what it sees and must not do, and its storage."""

import json

import networkx as nx
import pytest
import torch
from graph_cases import normal
from safetensors.torch import load, save
from torch.autograd import gradcheck

from gdviz.graphs import kernels
from gdviz.graphs.representation import RepresentationGraph

DISTANCES = ("mmd", "cka", "coral")
ONES = torch.ones(3)


def make(dims=(5, 7, 6), clips=12, student=4, **options):
    torch.manual_seed(0)
    names = [f"t{k}" for k in range(len(dims))]
    graph = RepresentationGraph(names, dims, student, **options).double()
    features = [normal(clips, d, seed=d) * 3 + 5 for d in dims]
    graph.fit_scalers(features)
    return graph, normal(clips, student, seed=99), features


def undo_scaling(graph, k, columns=slice(None)):
    """Make an adapter that recovers teacher k from the student's coordinates ``columns``."""
    weight = torch.zeros_like(graph.adapters[k].weight)
    weight[:, columns] = torch.diag(1 / getattr(graph, f"std_{k}"))
    graph.adapters[k].weight.data = weight


def test_kernel_route_equals_outer_products():
    graph, h, features = make()
    x, s, found = (
        graph.teacher_vectors(features),
        graph.student_vectors(h),
        graph.pair_grams(features),
    )
    distances = graph.distances(h, features)
    for e, (i, j) in enumerate(graph.pairs):
        r, rs = (torch.einsum("ni,nj->nij", v[i], v[j]).flatten(1) for v in (x, s))
        torch.testing.assert_close(found[e], r @ r.T, atol=1e-9, rtol=0)
        exact = kernels.mmd(r @ r.T, rs @ rs.T, r @ rs.T, paired=0.3)
        torch.testing.assert_close(distances[e], exact, atol=1e-6, rtol=0)


def test_sketch_route_approaches_kernel_route():
    exact, h, features = make()
    graph, _, _ = make(route="sketch", sketch_dim=2**14)
    for of in (lambda g: g.distances(h, features), lambda g: g.pair_grams(features)):
        torch.testing.assert_close(of(graph), of(exact), atol=0.03, rtol=0)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("route", ["kernel", "sketch"])
def test_loss_gradient_by_finite_differences(route, distance):
    options = {"route": route, "distance": distance, "sketch_dim": 32}
    graph, h, features = make(dims=(3, 4), clips=6, student=3, **options)
    labels, weight = torch.tensor([0, 1, 0, 1, -1, -1]), graph.adapters[0].weight

    def loss(h):
        return graph.loss(h, features, labels, torch.ones(1).double())

    assert gradcheck(loss, (h.requires_grad_(),), eps=1e-6, atol=1e-6, rtol=1e-5)
    (gradient,), direction = torch.autograd.grad(loss(h), weight), normal(*weight.shape)
    ends = []
    for step in (1e-5, -2e-5):
        weight.data += step * direction
        ends.append(loss(h).item())
    slope = (ends[0] - ends[1]) / 2e-5
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("distance", DISTANCES)
def test_distance_is_zero_when_the_student_is_the_teachers(distance):
    graph, _, _ = make(dims=(4, 4), student=4, distance=distance)
    x = normal(10, 4) - normal(10, 4).mean(0)
    graph.fit_scalers([x, x])
    for k in range(2):
        undo_scaling(graph, k)
    value = graph.loss(x, [x, x], torch.arange(10) % 3, torch.ones(1))
    assert abs(value.item()) < 1e-8
    assert graph.loss(normal(10, 4, seed=5), [x, x], None, torch.ones(1)).abs() > 1e-3


@pytest.mark.parametrize("kind", ["hard", "soft", "paired"])
def test_what_sees_the_right_vectors_on_the_wrong_clips(kind):
    """Plain MMD cannot tell; class weights, hard or soft, and the paired term can."""
    classes = torch.arange(60) % 3
    x = 2 * normal(3, 4)[classes] + 0.3 * normal(60, 4, seed=1)
    y = 2 * normal(3, 4, seed=2)[classes]
    labels = {"hard": classes, "soft": torch.eye(3)[classes].double(), "paired": None}[kind]
    h = torch.cat([x, y], 1)
    h = h - h.mean(0)
    swapped = h.roll(1, dims=0)  # every clip gets the vector of a clip of the next class

    def gap(**options):
        graph, _, _ = make(dims=(4, 4), student=8, **options)
        graph.fit_scalers([x, y])
        for k in range(2):
            undo_scaling(graph, k, slice(4 * k, 4 * k + 4))
        right, wrong = (graph.loss(v, [x, y], labels, torch.ones(1)).item() for v in (h, swapped))
        assert abs(right) < 1e-6
        return wrong

    assert abs(gap(mu=0.0, paired=0.0)) < 0.03
    assert gap(**({"mu": 0.0, "paired": 0.3} if kind == "paired" else {"paired": 0.0})) > 0.1


def test_training_on_the_loss_teaches_the_student_the_classes():
    """No labels: a linear student on noisy inputs must come out with class structure."""
    classes = torch.arange(64) % 4
    latent = 2 * normal(4, 6)[classes] + 0.5 * normal(64, 6, seed=1)
    features = [torch.tanh(latent @ normal(6, 8, seed=s)) for s in (2, 3)]
    inputs = torch.cat([latent @ normal(6, 10, seed=4) / 3, 3 * normal(64, 10, seed=5)], 1)
    torch.manual_seed(0)
    graph = RepresentationGraph(["a", "b"], [8, 8], 5).double()
    student = torch.nn.Linear(20, 5).double()
    graph.fit_scalers(features)
    same = (classes[:, None] == classes[None, :]).double()

    def alignment():
        return float(kernels.unbiased_cka(kernels.gram(student(inputs).detach()), same))

    before = alignment()
    optimiser = torch.optim.Adam([*student.parameters(), *graph.parameters()], lr=0.02)
    for _ in range(80):
        optimiser.zero_grad()
        graph.loss(student(inputs), features, None, torch.ones(1)).backward()
        optimiser.step()
    assert before < 0.3 and alignment() > 0.5


def test_few_clips_one_teacher_and_a_collapsed_student():
    for dims, clips in (((5,), 6), ((5, 7), 1), ((5,), 1), ((5, 7), 2)):
        for distance in DISTANCES:
            graph, h, features = make(dims=dims, clips=clips, distance=distance)
            value = graph.loss(h.requires_grad_(), features, None, torch.ones(1))
            value.backward()
            assert value.isfinite() and h.grad.isfinite().all()
    assert graph.pairs == ((0, 1),) and make(dims=(5,))[0].names == ("t0+t0",)
    graph, h, features = make()
    collapsed = torch.zeros_like(h).requires_grad_()
    graph.loss(collapsed, [torch.zeros_like(f) for f in features], None, ONES).backward()
    assert collapsed.grad.isfinite().all()


def test_loss_is_linear_in_weights_permutes_with_clips_and_spares_the_teachers():
    graph, h, features = make()
    labels, v = torch.arange(12) % 3, torch.tensor([0.2, 0.3, 0.5], requires_grad=True)
    features = [f.requires_grad_() for f in features]
    value = graph.loss(h, features, labels, v)
    expected = (v.detach().double() * graph.distances(h, features, labels)).sum()
    torch.testing.assert_close(value, expected)
    order = torch.randperm(12)
    moved = graph.loss(h[order], [f[order] for f in features], labels[order], v)
    torch.testing.assert_close(moved, value)
    value.backward()
    assert v.grad is None and all(f.grad is None for f in features)
    assert all(a.weight.grad.abs().sum() > 0 for a in graph.adapters)


def test_a_new_student_is_not_on_a_saddle():
    """A student at right angles to all teachers has a gradient; products of cosines had none."""
    graph, h, features = make()
    for adapter in graph.adapters:
        torch.nn.init.zeros_(adapter.weight)
    graph.loss(h, features, None, ONES).backward()
    assert all(adapter.weight.grad.norm() > 1e-3 for adapter in graph.adapters)


def test_scalers_remove_offset_scale_and_dead_coordinates():
    graph, h, features = make()
    value = graph.loss(h, features, None, ONES)
    moved = [1e3 + 50 * f for f in features]
    graph.fit_scalers(moved)
    torch.testing.assert_close(graph.loss(h, moved, None, ONES), value, atol=1e-8, rtol=0)
    dead = [torch.cat([f[:, :-1], torch.full((12, 1), 7.0)], 1) for f in features]
    graph.fit_scalers(dead)
    assert graph.loss(h, dead, None, ONES).isfinite()
    assert graph.teacher_vectors(dead)[0][:, -2].abs().max() == 0  # the last is the constant one


@pytest.mark.parametrize("route", ["kernel", "sketch"])
def test_settings_and_state_give_the_graph_back(route):
    options = {"distance": "coral", "mu": 2.0, "paired": 0.1, "sketch_dim": 64, "seed": 3}
    graph, h, features = make(route=route, **options)
    graph, h, features = graph.float(), h.float(), [f.float() for f in features]
    settings, state = json.loads(json.dumps(graph.settings)), load(save(graph.state_dict()))
    other = RepresentationGraph(**settings)
    assert not torch.equal(other.adapters[0].weight, graph.adapters[0].weight)
    other.load_state_dict(state)
    assert other.settings == graph.settings and settings.items() >= options.items()
    labels = torch.arange(12) % 3
    assert torch.equal(other.loss(h, features, labels, ONES), graph.loss(h, features, labels, ONES))
    assert torch.equal(other.pair_grams(features), graph.pair_grams(features))


def test_adapters_are_drawn_anew_as_at_construction():
    graph = RepresentationGraph(["a", "b"], [5, 6], 4)
    first = [a.weight.clone() for a in graph.adapters]
    torch.manual_seed(3)
    expected = RepresentationGraph(["a", "b"], [5, 6], 4)
    after = torch.rand(())
    torch.manual_seed(3)
    graph.reset_adapters()
    assert torch.equal(torch.rand(()), after)  # no draw more, none fewer
    for adapter, old, new in zip(graph.adapters, first, expected.adapters, strict=True):
        assert torch.equal(adapter.weight, new.weight) and not torch.equal(adapter.weight, old)


@pytest.mark.parametrize("route", ["kernel", "sketch"])
def test_autocast(route):
    graph, h, features = make(route=route, sketch_dim=256)
    h, features = h.half().requires_grad_(), [f.bfloat16() for f in features]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = graph.float().loss(h, features, None, ONES)
    value.backward()
    assert value.dtype == torch.float32 and h.grad.isfinite().all() and h.grad.abs().sum() > 0


def test_to_networkx(tmp_path):
    graph, h, features = make()
    distances = graph.distances(h, features).detach()
    g = graph.to_networkx(torch.tensor([0.2, 0.3, 0.5]), distances)
    assert set(g.nodes) == {"student", "t0+t1", "t0+t2", "t1+t2"}
    assert g.edges["t1+t2", "student"]["weight"] == pytest.approx(0.5)
    assert g.edges["t0+t1", "student"]["distance"] == float(distances[0])
    assert (g.nodes["t0+t2"]["first"], g.nodes["t0+t2"]["second"]) == ("t0", "t2")
    nx.write_graphml(g, tmp_path / "graph.xml")
    read = nx.read_graphml(tmp_path / "graph.xml")
    assert dict(read.nodes) == dict(g.nodes) and read.adj == g.adj


def test_bad_arguments_raise():
    for arguments in ((["a", "a"], [2, 2]), (["a"], [2, 2]), ([], [])):
        with pytest.raises(ValueError, match="distinct"):
            RepresentationGraph(*arguments, 3)
    for unknown in ({"distance": "emd"}, {"route": "short"}):
        with pytest.raises((ValueError, TypeError)):  # TypeError: annotations checked at run time
            RepresentationGraph(["a"], [2], 3, **unknown)
    graph, h, features = make()
    with pytest.raises(ValueError, match="sizes"):
        graph.loss(h, features[:2], None, ONES)
    with pytest.raises(ValueError, match="pair weights"):
        graph.loss(h, features, None, torch.ones(2))
    with pytest.raises((ValueError, TypeError)):
        graph.loss(h, features, torch.zeros(5, dtype=torch.long), ONES)


@pytest.mark.parametrize(("clips", "others"), [(1, 5), (3, 5), (0, 0)])
def test_features_of_other_clips_than_the_teachers_are_refused(unchecked, clips, others):
    graph = RepresentationGraph(["a", "b"], [4, 4], 6)
    features = [torch.randn(others, 4)] * 2
    with pytest.raises(ValueError, match="expected features of the same clips, one or more"):
        graph.loss(torch.randn(clips, 6), features, None, torch.ones(1))

"""Representation graph: kernels against their definitions, sketch against outer products, the loss."""

import warnings
from functools import partial

import pytest
import torch
from torch.autograd import gradcheck

from gdviz.graphs import kernels
from gdviz.graphs.representation import RepresentationGraph
from gdviz.graphs.sketch import TensorSketch


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(dims=(5, 7, 6), clips=12, student=4, **options):
    torch.manual_seed(0)
    graph = RepresentationGraph(
        [f"t{k}" for k in range(len(dims))], dims, student, **options
    ).double()
    features = [normal(clips, d, seed=d) * 3 + 5 for d in dims]
    graph.fit_scalers(features)
    return graph, normal(clips, student, seed=99), features


class Loss(torch.nn.Module):
    """``RepresentationGraph.loss`` as a forward, for ``functional_call``."""

    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def forward(self, *args):
        return self.graph.loss(*args)


def mmd_of(x, y, **options):
    return kernels.mmd(x @ x.mT, y @ y.mT, x @ y.mT, **options)


def test_gaussian_kernel_and_median():
    d2 = torch.cdist(normal(9, 3), normal(9, 3)) ** 2
    width = kernels.median_bandwidth(d2)
    assert float(width) == pytest.approx(float(d2[kernels.off_diagonal(9)].median()))
    expected = torch.stack([torch.exp(-d2 / (m * width)) for m in (0.25, 0.5, 1, 2, 4)]).mean(0)
    torch.testing.assert_close(kernels.gaussian_kernel(d2, width), expected)
    assert kernels.median_bandwidth(torch.zeros(2, 3, 3), default=2.0).tolist() == [2, 2]


def test_mmd_is_its_definition():
    x, y, o = normal(6, 3), normal(6, 3, seed=1), normal(6, 6, seed=2).abs()
    o = o + o.T
    kxx, kyy, kxy = x @ x.T, y @ y.T, x @ y.T
    total = sum(
        float(o[n, m] * (kxx[n, m] + kyy[n, m] - 2 * kxy[n, m]))
        for n in range(6)
        for m in range(6)
        if n != m
    )
    weight = float(o.sum() - o.diagonal().sum())
    assert float(kernels.mmd2(kxx, kyy, kxy, pair_weights=o)) == pytest.approx(total / weight)
    mean_gap = ((x - y).mean(0) ** 2).sum()  # a linear kernel's biased MMD is the gap of the means
    torch.testing.assert_close(kernels.mmd2(kxx, kyy, kxy, biased=True), mean_gap)


def test_unbiased_mmd_is_zero_on_average_under_the_null_and_grows_with_a_shift():
    x, y = normal(400, 20, 4), normal(400, 20, 4, seed=1)
    null, biased = mmd_of(x, y), mmd_of(x, y, biased=True)
    assert abs(float(null.mean())) < 4 * float(null.std()) / 20
    assert float(biased.mean()) > 5 * float(null.std()) / 20  # the test can tell the two apart
    assert null.min() < 0 <= biased.min()
    shifted = [float(mmd_of(x, y + s).mean()) for s in (0.0, 0.5, 1.0, 2.0)]
    assert shifted == sorted(shifted) and shifted[1] > 0.01


def test_unbiased_cka():
    x, y = normal(64, 512), normal(64, 512, seed=1)
    kx, ky = x @ x.T, y @ y.T
    assert abs(float(kernels.unbiased_cka(kx, ky))) < 0.05
    assert float(kernels.unbiased_cka(kx, kx)) == pytest.approx(1)
    torch.testing.assert_close(
        kernels.unbiased_cka(kx + 1e3, 3 * kx), torch.tensor(1.0).double()
    )  # offset, scale
    assert float(kernels.unbiased_cka(kx, torch.ones(64, 64).double())) == 0
    tiny = kernels.unbiased_cka(1e-12 * kx.float(), (kx + 0.5 * ky).float())
    assert float(tiny) == pytest.approx(float(kernels.unbiased_cka(kx, kx + 0.5 * ky)), abs=1e-4)
    with pytest.raises(ValueError, match="4 clips"):
        kernels.unbiased_hsic(kx[:3, :3], kx[:3, :3])


def test_unbiased_hsic_is_unbiased():
    """Mean over all 5-clip subsets equals the value on the whole set: the mark of a U-statistic."""
    k, m = normal(7, 3) @ normal(7, 3).T, normal(7, 2, seed=1) @ normal(7, 2, seed=1).T
    subsets = torch.combinations(torch.arange(7), 5)
    parts = torch.stack([kernels.unbiased_hsic(k[s][:, s], m[s][:, s]) for s in subsets]) / (5 * 2)
    torch.testing.assert_close(parts.mean(), kernels.unbiased_hsic(k, m) / (7 * 4))


def test_coral_is_the_gap_of_covariances():
    x, y = normal(10, 4), normal(10, 4, seed=1)
    expected = (torch.cov(x.T) - torch.cov(y.T)).pow(2).sum()
    torch.testing.assert_close(kernels.coral(x @ x.T, y @ y.T, x @ y.T), expected)


def test_label_pair_weights():
    labels = torch.tensor([0, 1, 0, -1, -1])
    o = kernels.label_pair_weights(labels, 3.0, 5, torch.zeros(()))
    assert o[0, 2] == 4 and o[0, 1] == 1 and o[3, 4] == 1 and o[3, 3] == 1
    hot = torch.cat([torch.eye(2)[[0, 1, 0]], torch.zeros(2, 2)])
    torch.testing.assert_close(kernels.label_pair_weights(hot, 3.0, 5, torch.zeros(())), o)


def test_sketch_is_unbiased_also_across_pairs():
    x = [normal(2, 6, seed=s) for s in range(3)]
    pairs = [(0, 1), (0, 2)]
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
    with pytest.raises(ValueError, match="6 entries"):
        sketch([normal(1, 6)], [(0, 0)])


def test_kernel_route_equals_outer_products():
    graph, h, features = make()
    x, s = graph.teacher_vectors(features), graph.student_vectors(h)
    distances = graph.distances(h, features)
    for e, (i, j) in enumerate(graph.pairs):
        r = torch.einsum("ni,nj->nij", x[i], x[j]).flatten(1)
        rs = torch.einsum("ni,nj->nij", s[i], s[j]).flatten(1)
        torch.testing.assert_close(graph.pair_grams(features)[e], r @ r.T, atol=1e-9, rtol=0)
        torch.testing.assert_close(distances[e], mmd_of(r, rs, paired=0.3), atol=1e-6, rtol=0)


def test_sketch_route_approaches_kernel_route():
    values = []
    for options in ({"route": "kernel"}, {"route": "sketch", "sketch_dim": 2**14}):
        graph, h, features = make(**options)
        values.append(graph.distances(h, features))
    torch.testing.assert_close(*values, atol=0.03, rtol=0)
    assert graph.pair_features(features).shape == (3, 12, 2**14)
    gram = torch.einsum(
        "enm,epm->enp", graph.pair_features(features), graph.student_pair_features(h)
    )
    x, s = graph.teacher_vectors(features), graph.student_vectors(h)
    torch.testing.assert_close(gram[1], (x[0] @ s[0].T) * (x[2] @ s[2].T), atol=0.05, rtol=0)


@pytest.mark.parametrize("distance", ["mmd", "cka", "coral"])
@pytest.mark.parametrize("route", ["kernel", "sketch"])
def test_loss_gradient_by_finite_differences(route, distance):
    graph, h, features = make(
        dims=(3, 4), clips=6, student=3, route=route, distance=distance, sketch_dim=32
    )
    labels, v = torch.tensor([0, 1, 0, 1, -1, -1]), torch.ones(1).double()

    def loss(h, weight):
        return torch.func.functional_call(
            Loss(graph), {"graph.adapters.0.weight": weight}, (h, features, labels, v)
        )

    weight = graph.adapters[0].weight.detach().clone().requires_grad_()
    assert gradcheck(loss, (h.requires_grad_(), weight), eps=1e-6, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("distance", ["mmd", "cka", "coral"])
def test_distance_is_zero_when_the_student_is_the_teachers(distance):
    dims = (4, 4)
    graph, _, _ = make(dims=dims, student=4, distance=distance)
    x = normal(10, 4)
    x = x - x.mean(0)
    graph.fit_scalers([x, x])
    for k in range(2):  # the adapter that undoes the standardisation
        graph.adapters[k].weight.data = torch.diag(1 / getattr(graph, f"std_{k}"))
    value = graph.loss(x, [x, x], torch.arange(10) % 3, torch.ones(1))
    assert abs(value.item()) < 1e-8
    assert graph.loss(normal(10, 4, seed=5), [x, x], None, torch.ones(1)).abs() > 1e-3


@pytest.mark.parametrize("kind", ["hard", "soft", "paired"])
def test_what_sees_the_right_vectors_on_the_wrong_clips(kind):
    """Plain MMD cannot tell; class weights, hard or soft, and the paired term can."""
    classes = torch.arange(60) % 3
    x, y = (
        2 * normal(3, 4)[classes] + 0.3 * normal(60, 4, seed=1),
        2 * normal(3, 4, seed=2)[classes],
    )
    labels = {"hard": classes, "soft": torch.eye(3)[classes].double(), "paired": None}[kind]
    h = torch.cat([x, y], 1) - torch.cat([x, y], 1).mean(0)
    swapped = h.roll(1, dims=0)  # every clip gets the vector of a clip of the next class

    def gap(**options):
        graph, _, _ = make(dims=(4, 4), student=8, **options)
        graph.fit_scalers([x, y])
        for k in range(2):  # adapters that recover both teachers exactly
            weight = torch.zeros(4, 8)
            weight[:, 4 * k : 4 * k + 4] = torch.diag(1 / getattr(graph, f"std_{k}"))
            graph.adapters[k].weight.data = weight.double()
        right, wrong = (graph.loss(v, [x, y], labels, torch.ones(1)).item() for v in (h, swapped))
        assert abs(right) < 1e-6
        return wrong

    assert abs(gap(class_conditional=False, paired=0.0)) < 0.03
    assert gap(class_conditional=kind != "paired", paired=0.3 if kind == "paired" else 0.0) > 0.1


def test_training_on_the_loss_teaches_the_student_the_classes():
    """No labels: a linear student on noisy inputs must come out with class structure."""
    classes = torch.arange(64) % 4
    latent = 2 * normal(4, 6)[classes] + 0.5 * normal(64, 6, seed=1)
    features = [torch.tanh(latent @ normal(6, 8, seed=s)) for s in (2, 3)]
    inputs = torch.cat([latent @ normal(6, 10, seed=4) / 3, 3 * normal(64, 10, seed=5)], 1)
    torch.manual_seed(0)
    graph, student = (
        RepresentationGraph(["a", "b"], [8, 8], 5).double(),
        torch.nn.Linear(20, 5).double(),
    )
    graph.fit_scalers(features)
    same = (classes[:, None] == classes[None, :]).double()

    def alignment():
        h = student(inputs).detach()
        return float(kernels.unbiased_cka(h @ h.T, same))

    before = alignment()
    optimiser = torch.optim.Adam([*student.parameters(), *graph.parameters()], lr=0.02)
    for _ in range(80):
        loss = graph.loss(student(inputs), features, None, torch.ones(1))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert before < 0.3 and alignment() > 0.5


def test_edge_cases():
    for dims, clips in (((5,), 6), ((5, 7), 1), ((5,), 1), ((5, 7), 2)):
        for distance in ("mmd", "cka", "coral"):
            graph, h, features = make(dims=dims, clips=clips, distance=distance)
            h.requires_grad_()
            value = graph.loss(h, features, None, torch.ones(1))
            value.backward()
            assert value.isfinite() and h.grad.isfinite().all()
    assert graph.pairs == ((0, 1),) and make(dims=(5,))[0].names == ("t0+t0",)
    graph, h, features = make()
    constant = (
        torch.zeros(12, 4).double().requires_grad_()
    )  # a collapsed student still gets a finite push
    graph.loss(constant, [torch.zeros_like(f) for f in features], None, torch.ones(3)).backward()
    assert constant.grad.isfinite().all()


def test_loss_is_linear_in_weights_permutes_with_clips_and_spares_the_teachers():
    graph, h, features = make()
    labels, v = torch.arange(12) % 3, torch.tensor([0.2, 0.3, 0.5], requires_grad=True)
    features = [f.requires_grad_() for f in features]
    value = graph.loss(h, features, labels, v)
    torch.testing.assert_close(
        value, (v.detach().double() * graph.distances(h, features, labels)).sum()
    )
    order = torch.randperm(12)
    torch.testing.assert_close(
        graph.loss(h[order], [f[order] for f in features], labels[order], v), value
    )
    value.backward()
    assert v.grad is None and all(f.grad is None for f in features)
    assert all(a.weight.grad.abs().sum() > 0 for a in graph.adapters)


def test_scalers_remove_offset_scale_and_dead_coordinates():
    graph, h, features = make()
    value = graph.loss(h, features, None, torch.ones(3))
    moved = [1e3 + 50 * f for f in features]
    graph.fit_scalers(moved)
    torch.testing.assert_close(graph.loss(h, moved, None, torch.ones(3)), value, atol=1e-8, rtol=0)
    dead = [torch.cat([f[:, :-1], torch.full((12, 1), 7.0)], 1) for f in features]
    graph.fit_scalers(dead)
    assert graph.loss(h, dead, None, torch.ones(3)).isfinite()
    assert graph.teacher_vectors(dead)[0][:, -2].abs().max() == 0  # the last is the constant one


def test_state_dict_restores_scalers_and_hashes():
    graph, h, features = make(seed=3)
    torch.manual_seed(5)
    other = RepresentationGraph(graph.teachers, (5, 7, 6), 4, seed=4).double()
    assert not torch.equal(other.sketch.hash, graph.sketch.hash)
    other.load_state_dict(graph.state_dict())
    torch.testing.assert_close(
        other.loss(h, features, None, torch.ones(3)), graph.loss(h, features, None, torch.ones(3))
    )
    torch.testing.assert_close(other.pair_features(features), graph.pair_features(features))


@pytest.mark.parametrize("route", ["kernel", "sketch"])
def test_autocast(route):
    graph, h, features = make(route=route, sketch_dim=256)
    graph = graph.float()
    h, features = h.half().requires_grad_(), [f.bfloat16() for f in features]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = graph.loss(h, features, None, torch.ones(3))
    value.backward()
    assert value.dtype == torch.float32 and h.grad.isfinite().all() and h.grad.abs().sum() > 0


def test_to_networkx():
    graph, h, features = make()
    g = graph.to_networkx(torch.tensor([0.2, 0.3, 0.5]), graph.distances(h, features).detach())
    assert set(g.nodes) == {"student", "t0+t1", "t0+t2", "t1+t2"}
    assert g.edges["t1+t2", "student"]["weight"] == pytest.approx(0.5)
    assert g.nodes["t0+t2"]["teachers"] == ("t0", "t2")


def test_bad_arguments_raise():
    for arguments in ((["a", "a"], [2, 2]), (["a"], [2, 2]), ([], [])):
        with pytest.raises(ValueError, match="distinct"):
            RepresentationGraph(*arguments, 3)
    with pytest.raises((ValueError, TypeError)):  # TypeError: annotations checked at run time
        RepresentationGraph(["a"], [2], 3, distance="emd")
    graph, h, features = make()
    with pytest.raises(ValueError, match="sizes"):
        graph.loss(h, features[:2], None, torch.ones(3))
    with pytest.raises(ValueError, match="pair weights"):
        graph.loss(h, features, None, torch.ones(2))
    with pytest.raises((ValueError, TypeError)):
        graph.loss(h, features, torch.zeros(5, dtype=torch.long), torch.ones(3))


def test_a_new_student_is_not_on_a_saddle():
    """Student vectors at right angles to all teachers' still have a gradient; products of their cosines alone had none."""
    graph, h, features = make()
    for adapter in graph.adapters:
        torch.nn.init.zeros_(adapter.weight)
    graph.loss(h, features, None, torch.ones(3)).backward()
    assert all(adapter.weight.grad.norm() > 1e-3 for adapter in graph.adapters)


@pytest.mark.parametrize(
    "options",
    [{}, {"biased": True}, {"paired": 0.3}, {"labels": torch.tensor([0, 1, 0, -1, 2, 2])}],
)
def test_fourier_mmd_is_the_exact_one_in_expectation(options):
    x, y, options = normal(6, 3), normal(6, 3, seed=1) + 0.5, dict(options)
    labels = options.pop("labels", None)
    exact_weights = None if labels is None else kernels.label_pair_weights(labels, 4.0, 6, x)
    exact = kernels.mmd(x @ x.T, y @ y.T, x @ y.T, pair_weights=exact_weights, **options)
    width = kernels.median_bandwidth(torch.cdist(x, x) ** 2)
    vectors = None if labels is None else kernels.label_vectors(labels, 4.0, x)
    drawn = []
    for seed in range(400):
        phi = [kernels.fourier_features(v, normal(3, 20, seed=seed), width) for v in (x, y)]
        drawn.append(kernels.fourier_mmd2(*phi, label_vectors=vectors, **options))
    drawn = torch.stack(drawn)
    assert abs(drawn.mean() - exact) < 4 * drawn.std() / 20
    assert drawn.std() < 2 * abs(exact)  # so that the line above can fail


def test_fourier_features_serve_a_bank_of_ten_thousand():
    graph, h, features = make(
        dims=(5, 4), clips=10_000, distance="fourier", sketch_dim=32, directions=50
    )
    with torch.no_grad():
        value = graph.float().loss(
            h.float(), [f.float() for f in features], torch.arange(10_000) % 3, torch.ones(1)
        )
    graph, h, features = make(
        dims=(5, 4), clips=200, distance="fourier", sketch_dim=512, directions=5000
    )
    exact, _, _ = make(dims=(5, 4), clips=200, route="sketch", sketch_dim=512)
    exact.load_state_dict(
        {name: v for name, v in graph.state_dict().items() if name != "directions"}
    )
    torch.testing.assert_close(
        *(g.distances(h, features, torch.arange(200) % 3) for g in (graph, exact)),
        atol=0.01,
        rtol=0.05,
    )
    assert value.isfinite()


def test_distances_share_one_signature():
    x, y, labels = normal(8, 5), normal(8, 5, seed=1), torch.arange(8) % 3
    grams, o = (x @ x.T, y @ y.T, x @ y.T), kernels.label_pair_weights(labels, 4.0, 8, x)
    same = (grams[0],) * 3
    for distance in (*kernels.DISTANCES.values(), partial(kernels.mmd, biased=True)):
        for options in ({}, {"pair_weights": o}, {"paired": 0.3}):
            assert (
                distance(*grams, **options).shape == () and abs(distance(*grams, **options)) > 1e-3
            )
            assert abs(distance(*same, **options)) < 1e-12
            batch = [torch.stack([k, k]) for k in grams]
            torch.testing.assert_close(distance(*batch, **options)[1], distance(*grams, **options))
    for distance in (*kernels.DISTANCES, "fourier"):
        graph, h, features = make(distance=distance)
        assert graph.loss(h, features, labels.repeat(2)[:12], torch.ones(3)).shape == ()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("route", "distance"),
    [("kernel", "mmd"), ("sketch", "mmd"), ("kernel", "cka"), ("kernel", "fourier")],
)
def test_compiles_without_graph_breaks(route, distance):
    graph, h, features = make(route=route, distance=distance, sketch_dim=64, directions=20)
    labels, v = torch.softmax(normal(12, 3), -1), torch.tensor([0.2, 0.3, 0.5])
    inputs = (h.requires_grad_(), *graph.parameters())
    with warnings.catch_warnings():
        # of the compiler's own making; and it leaves complex numbers, of the sketch's transforms, to eager kernels
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings(
            "ignore", "Torchinductor does not support code generation for complex"
        )
        values = [
            loss(h, features, labels, v)
            for loss in (graph.loss, torch.compile(graph.loss, fullgraph=True))
        ]
        gradients = [torch.autograd.grad(value, inputs) for value in values]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*gradients)

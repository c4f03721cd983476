"""Both losses on random cases: finite numbers only, and no iteration stops short in silence."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from gdviz.graphs import (
    ConvergenceWarning,
    LogitsGraph,
    RepresentationGraph,
    sinkhorn,
    zero_one_cost,
)
from gdviz.graphs.costs import normalise_cost

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
KINDS = ("plain", "one-hot", "near zero", "identical", "constant", "huge")


def names(count):
    return [f"t{k}" for k in range(count)]


def teachers_and_student(rng, kind, clips, teachers, classes, temperature):
    """Softened distributions ``[B, K, C]`` and logits ``[B, C]``, which fp16 holds."""
    sharp = 10 ** rng.uniform(-1, 1.5)
    z = sharp * rng.normal(size=(clips, teachers, classes))
    logits = sharp * rng.normal(size=(clips, classes))
    if kind == "huge":
        logits = logits * 1e4
    if kind == "constant":
        z, logits = 0 * z, 0 * logits
    if kind == "identical":
        z = np.repeat(logits[:, None], teachers, axis=1)
    p = np.exp((z - z.max(-1, keepdims=True)) / temperature)
    if kind == "one-hot":
        p = np.eye(classes)[rng.integers(classes, size=(clips, teachers))]
    if kind == "near zero":
        p = p * 10.0 ** rng.integers(-40, 1, size=p.shape)
        p[..., 0] += 1e-3
    p = torch.from_numpy(p / p.sum(-1, keepdims=True))
    return p, torch.from_numpy(logits).clamp(-6e4, 6e4)


def is_silent(loss, student, dtype):
    """Value and gradient are finite; return whether there was no warning of non-convergence."""
    student.requires_grad_()
    half = dtype.itemsize == 2
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        with torch.autocast("cpu", dtype=dtype if half else torch.bfloat16, enabled=half):
            value = loss(student)
        value.backward()
    assert value.isfinite() and student.grad.isfinite().all()
    return not any(issubclass(w.category, ConvergenceWarning) for w in caught)


def check_logits_graph(seed, kind, dtype, clips, teachers, classes, eps, temperature, euclidean):
    rng, dtype = np.random.default_rng(seed), DTYPES[dtype]
    cost = zero_one_cost(classes)
    if euclidean:
        rows = torch.from_numpy(rng.normal(size=(classes, 1 + seed % 8)))
        apart = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
        cost = normalise_cost(apart).float()
    graph = LogitsGraph(names(teachers), cost, eps=eps, temperature=temperature)
    made = teachers_and_student(rng, kind, clips, teachers, classes, temperature)
    p, z = (x.to(dtype) for x in made)
    w = torch.from_numpy(rng.dirichlet(np.full(teachers, 0.3), size=clips)).float()
    if is_silent(lambda z: graph.loss(z, p, w), z, dtype):
        # silence means convergence: solved again, the plans' own marginals are those asked for
        logits = z.detach().to(torch.promote_types(dtype, torch.float32))
        q = (logits / temperature).softmax(-1)[:, None].expand(-1, teachers, -1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            plan = sinkhorn(p, q, graph.cost, **graph.solver).plan()
        target = p.to(plan) / p.to(plan).sum(-1, keepdim=True)
        assert (plan.sum(-1) - target).abs().sum(-1).max() < 2e-4
        assert (plan.sum(-2) - q).abs().sum(-1).max() < 2e-4


def check_representation_graph(seed, kind, dtype, clips, teachers, size, route, distance, labels):
    rng, dtype = np.random.default_rng(seed), DTYPES[dtype]
    scale = 10 ** rng.uniform(-3, 3)
    sizes = [size + k % 3 for k in range(teachers)]
    x = [torch.from_numpy(scale * rng.normal(size=(clips, d))) for d in sizes]
    h = torch.from_numpy(scale * rng.normal(size=(clips, size)))
    if kind in ("constant", "identical"):
        h, x = 0 * h, [v if kind == "identical" else 0 * v + 7 for v in x]
    if kind == "one-hot":
        x = [torch.from_numpy(np.eye(d)[rng.integers(d, size=clips)]) for d in sizes]
    if kind == "near zero":
        h, x = 1e-30 * h, [1e-30 * v for v in x]
    if kind == "huge":
        h = 1e4 * h
    h, x = h.clamp(-6e4, 6e4).to(dtype), [v.to(dtype) for v in x]
    options = {"route": route, "distance": distance, "sketch_dim": 64}
    graph = RepresentationGraph(names(teachers), sizes, size, **options)
    graph = graph.double() if dtype == torch.float64 else graph
    if seed % 4:
        graph.fit_scalers(x)
    y = {
        "none": None,
        "hard": torch.arange(clips) % 3 - 1,
        "soft": torch.softmax(torch.from_numpy(rng.normal(size=(clips, 5))), -1),
    }
    v = torch.from_numpy(rng.dirichlet(np.ones(len(graph.pairs))))
    assert is_silent(lambda h: graph.loss(h, x, y[labels], v), h, dtype)


COMMON = {
    "seed": st.integers(0, 2**32 - 1),
    "kind": st.sampled_from(KINDS),
    "dtype": st.sampled_from(sorted(DTYPES)),
}


def logits_cases(clips, teachers, classes):
    return check_logits_graph, {
        "clips": st.integers(1, clips),
        "teachers": st.sampled_from(teachers),
        "classes": st.sampled_from(classes),
        "eps": st.floats(np.log10(0.005), 0).map(lambda e: 10**e)
        | st.sampled_from([1.0, 0.1, 0.005]),
        "temperature": st.sampled_from([0.5, 1.0, 4.0, 20.0]),
        "euclidean": st.booleans(),
    }


CASES = {
    "small": logits_cases(5, [1, 2, 4, 16], [2, 3, 5, 10]),
    "medium": logits_cases(3, [1, 4], [51, 101]),
    "large": logits_cases(1, [1, 2], [1000]),
    "features": (
        check_representation_graph,
        {
            "clips": st.integers(1, 12),
            "teachers": st.sampled_from([1, 2, 4, 16]),
            "size": st.sampled_from([1, 2, 7, 64]),
            "route": st.sampled_from(["kernel", "sketch"]),
            "distance": st.sampled_from(["mmd", "cka", "coral"]),
            "labels": st.sampled_from(["none", "hard", "soft"]),
        },
    ),
}


def run(which, count):
    check, options = CASES[which]
    few = settings(
        max_examples=count,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
        phases=(Phase.generate,),  # shrinking a failure here takes longer than reading it
    )
    few(given(**COMMON, **options)(check))()


@pytest.mark.parametrize(("which", "count"), [("small", 47), ("medium", 3), ("features", 50)])
def test_finite_on_a_hundred_cases(which, count):
    run(which, count)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("which", "count"), [("small", 4000), ("medium", 150), ("large", 10), ("features", 5840)]
)
def test_finite_on_ten_thousand_cases(which, count):
    run(which, count)

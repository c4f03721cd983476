"""What the graphs need: few packages, and no float64 where a device lacks it."""

import subprocess
import sys

import pytest
import torch
from graph_cases import normal, simplex
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gdviz.graphs import (
    LogitsGraph,
    RepresentationGraph,
    _dtypes,
    _sinkhorn,
    barycenter,
    closed_form,
    cost_from_means,
    evidence,
    fit_gate,
    pair_alignment,
    sinkhorn,
    teacher_prior,
)

SOLVERS = {
    "gdviz::sinkhorn": _sinkhorn.solve,
    "gdviz::self_sinkhorn": _sinkhorn.solve_self,
    "gdviz::barycenter": _sinkhorn.solve_barycenter,
}
LABELS = torch.tensor([0, 1, 2, 3, 0, 1, -1, -1])


class WithoutFloat64(TorchDispatchMode):
    """Refuse every operation that makes a float64 tensor, as Apple's GPUs do, in solvers too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name in SOLVERS:
            with self:
                return SOLVERS[name](*args)
        made = func(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, torch.Tensor) and x.dtype == torch.float64:
                raise TypeError(f"{name} made float64")
        return made


def through_logits_graph(graph, z, p, w):
    graph.loss(z, p, w).backward()
    graph.to_networkx(p, w, z.detach().softmax(-1))


def through_representation_graph(graph, h, features):
    graph.fit_scalers(features)
    graph.loss(h, features, LABELS, torch.ones(1)).backward()
    pair_alignment(graph.pair_grams(features), LABELS)


def through_weights(p, cost):
    c, prior = evidence(p, LABELS, cost), teacher_prior(p, LABELS, cost)
    gates = fit_gate(p, LABELS, prior, rho=1.0, steps=2, floor=0.05)
    next(gates)
    closed_form(c, eta=0.3, log_prior=next(gates)(p).log())


def cases():
    z, p, w = normal(8, 4).float().requires_grad_(), simplex(8, 2, 4).float(), torch.ones(8, 2)
    sharp = simplex(8, 2, 4, sharp=9.0).float()
    cost = cost_from_means(normal(8, 3), LABELS, 4)
    features, h = [normal(8, d).float() for d in (3, 5)], normal(8, 6).float().requires_grad_()
    graphs = LogitsGraph("ab", cost), RepresentationGraph("ab", [3, 5], 6)
    return {
        "logits graph": lambda: through_logits_graph(graphs[0], z, p, w),
        "representation graph": lambda: through_representation_graph(graphs[1], h, features),
        "weights": lambda: through_weights(p, cost),
        "cost": lambda: cost_from_means(features[0], LABELS, 4),
        "newton": lambda: sinkhorn(sharp[:, 0], sharp[:, 1], cost, eps=0.01, tol=1e-4),
        "sharp barycenter": lambda: barycenter(sharp, w, cost, eps=0.005, tol=1e-2),
    }


@pytest.mark.parametrize("case", cases())
def test_no_float64_on_a_device_that_lacks_it(case, monkeypatch):
    assert _dtypes.double(torch.device("mps")) == torch.float32
    run = cases()[case]
    if case != "weights":  # elsewhere float64 is made where there is no such device
        with WithoutFloat64(), pytest.raises(TypeError, match="made float64"):
            run()
    monkeypatch.setattr(_dtypes, "double", lambda device: torch.float32)
    with WithoutFloat64():
        run()


def test_no_parameter_or_buffer_is_float64():
    cost = cost_from_means(normal(8, 3), LABELS, 4)
    sketched = RepresentationGraph("ab", [3, 5], 6, route="sketch", sketch_dim=16)
    for graph in (LogitsGraph("ab", cost), sketched):
        assert all(x.dtype != torch.float64 for x in graph.state_dict().values())


def test_importing_the_graphs_loads_torch_numpy_and_jaxtyping_alone():
    code = """
import sys
import numpy, torch, jaxtyping
before = set(sys.modules)
import gdviz.graphs, gdviz.graphs.reference
expected = {*sys.stdlib_module_names, "torch", "jaxtyping"}
print(*(name for name in set(sys.modules) - before if name.split(".")[0] not in expected))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert "gdviz.graphs" in loaded
    assert all(name == "gdviz" or name.startswith("gdviz.graphs") for name in loaded), loaded

"""Compile one loss whole, as a program: checks of shapes at run time cannot be traced.

``python compiled.py logits`` or ``python compiled.py ROUTE-DISTANCE``.
"""

import sys
import warnings

import torch
from graph_cases import euclidean_cost, normal, simplex

from gdviz.graphs import LogitsGraph, RepresentationGraph


def logits_case(name):
    graph, p, w = LogitsGraph("abc", euclidean_cost(5)), simplex(6, 3, 5), simplex(6, 3, seed=3)
    known = (graph.consensus(p, w),) if name == "logits-known" else ()
    return graph.loss, normal(6, 5).requires_grad_(), (p, w, *known), ()


def representation_case(name):
    route, distance = name.split("-")
    options = {"route": route, "distance": distance, "sketch_dim": 64}
    graph = RepresentationGraph("abc", (5, 7, 6), 4, **options).double()
    features = [normal(12, d, seed=d) for d in (5, 7, 6)]
    labels, v = torch.softmax(normal(12, 3), -1), torch.tensor([0.2, 0.3, 0.5])
    return graph.loss, normal(12, 4).requires_grad_(), (features, labels, v), graph.parameters()


def compare(name):
    case = logits_case if name.startswith("logits") else representation_case
    loss, student, rest, parameters = case(name)
    inputs = (student, *parameters)
    values = [f(student, *rest) for f in (loss, torch.compile(loss, fullgraph=True))]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(value, inputs) for value in values))


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # of the compiler's own making
    compare(sys.argv[1])

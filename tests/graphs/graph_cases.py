"""Distributions, costs and features that the tests of the graphs are about."""

import torch

from gdviz.graphs.costs import normalise_cost


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def simplex(*shape, seed=0, sharp=1.5, dtype=torch.float64):
    return torch.softmax(sharp * normal(*shape, seed=seed), dim=-1).to(dtype)


def euclidean_cost(classes, seed=0, dtype=torch.float64):
    rows = normal(classes, 4, seed=seed)
    return normalise_cost(torch.cdist(rows, rows)).to(dtype)


def line_cost(*places):
    line = torch.tensor(places, dtype=torch.float64)
    return normalise_cost((line[:, None] - line).abs())

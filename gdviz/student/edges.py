"""Both graphs of a run: built once from the bank, their edge weights learned, saved and opened.

Weights come from evidence about the teachers, never from the student. Their whole path over a
training is therefore learned before it, once for all students of a seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from gdviz import graphs as g
from gdviz.config import Distillation
from gdviz.config import Edges as EdgesConfig
from gdviz.core.files import UserError, load_tensors, meta_of, save_tensors
from gdviz.data.videos import some_of
from gdviz.graphs import LogitsGraph, RepresentationGraph
from gdviz.graphs.costs import normalise_cost
from gdviz.student.routing import route
from gdviz.teachers.bank import Bank

CLIPS_AT_ONCE = 2**16  # a consensus takes some ten float64 copies of what it is of
SCALED_BY = 10_000  # videos that tell the scale of features, which may be larger than memory


@dataclass(frozen=True)
class Edges:
    """Edge weights at R moments of a training, on cases n of the bank."""

    teachers: Float[Tensor, "r n k"]
    consensus: Float[Tensor, "r n c"]
    pairs: Float[Tensor, "r e"]
    temperatures: Float[Tensor, "r k"]  # of the teachers, calibrated under these weights

    def at(self, progress: float) -> int:
        """Return the moment in force when a share ``progress`` in [0, 1) of a training is done."""
        return int(progress * len(self.teachers))


@dataclass(frozen=True)
class Graphs:
    """Both graphs over the teachers, and their edges."""

    logits: LogitsGraph
    representation: RepresentationGraph
    edges: Edges


def ground_cost(bank: Bank, shrink: float) -> Float[Tensor, "c c"]:
    """Return distances between class means of out-of-fold logits, averaged over teachers (ours).

    ``shrink`` is the share of the 0/1 cost mixed in: 0 only the teachers', 1 only the 0/1 cost.
    """
    known, classes = bank.labels >= 0, bank.logits.shape[-1]
    each = bank.logits[known].unbind(1)
    # A teacher that says the same of every clip has no opinion on how far apart classes are.
    telling = [z for z in each if float(z.std(0).max()) > 1e-6]
    costs = [g.cost_from_means(z, bank.labels[known], classes) for z in telling]
    return normalise_cost(g.average_costs(costs or [g.zero_one_cost(classes)]), shrink=shrink)


def build_graphs(
    bank: Bank, rows: Int[Tensor, " n"], cfg: Distillation, student_dim: int = 1
) -> tuple[LogitsGraph, RepresentationGraph]:
    """Build both graphs over the teachers; the training videos ``rows`` set scales of features."""
    cost, names, t = ground_cost(bank, cfg.cost_shrink), bank.teachers, cfg.temperature
    logits = LogitsGraph(names, cost, eps=cfg.eps, beta=cfg.beta, temperature=t, tol=1e-4)
    representation = RepresentationGraph(names, bank.dims, student_dim, distance=cfg.distance)
    representation.fit_scalers(bank.features_at(some_of(rows, SCALED_BY)))
    return logits, representation


def learn_edges(
    bank: Bank,
    logits_graph: LogitsGraph,
    representation_graph: RepresentationGraph,
    cfg: EdgesConfig,
    *,
    seed: int,
    rows: Int[Tensor, " n"] | None = None,
) -> Edges:
    """Learn both graphs' edge weights (ours; docs/method.md).

    Teachers: ``w_n = floor(softmax(log gate_n - c_n / eta))``, the closed form of
    ``min_w <w, c_n> + eta KL(w || gate_n)``, with :func:`gdviz.graphs.evidence` ``c`` and a gate
    that starts at :func:`gdviz.graphs.teacher_prior` and takes ``cfg.gate_steps`` steps down the
    mixture's cross-entropy from one moment to the next (:func:`gdviz.graphs.fit_gate`). With
    ``cfg.components`` they are those of :func:`gdviz.student.routing.route` on training ``rows``,
    by default all.

    Pairs: ``v = floor(softmax(CKA / eta_pairs))``. The CKA with the labels' Gram matrix is taken
    within each fold (features of different folds live in different spaces) on a random half of
    its clips, and averaged over folds and over the moments so far.
    """
    if cfg.components and bank.cases_each > 1:
        needs = "routing needs one label a video; take --distillation.edges.components 0"
        raise UserError(f"--distillation.edges.components {cfg.components}: {needs}")
    found = _gated(bank, logits_graph.cost, cfg)
    if cfg.components:
        every = torch.arange(len(bank.fold))
        found = route(bank, every if rows is None else rows, cfg.components, seed=seed)
    rng, moments, agreement = Generator().manual_seed(seed), [], []
    for w in islice(found, cfg.refreshes):
        with torch.no_grad():
            # Under weights that differ little from clip to clip teachers stay as calibrated.
            t = bank.recalibrated(w) if cfg.components else torch.ones(len(bank.teachers))
            agreement.append(_pair_agreement(bank, representation_graph, rng))
            mean = torch.stack(agreement).mean(0)
            v = g.closed_form(-mean, eta=cfg.eta_pairs, floor=cfg.floor)
            moments.append((w, _consensus(bank, logits_graph, w, t), v, t))
    return Edges(*map(torch.stack, zip(*moments, strict=True)))


def _gated(bank: Bank, cost: Tensor, cfg: EdgesConfig) -> Iterator[Tensor]:
    """Yield the closed form of the evidence at each moment of the gate, without end."""
    probs, labels = bank.probs(), bank.labels
    c = g.evidence(probs, labels, cost, alpha=cfg.alpha)
    prior = g.teacher_prior(probs, labels, cost)
    gates = g.fit_gate(probs, labels, prior, rho=cfg.rho, steps=cfg.gate_steps, floor=cfg.floor)
    for gate in gates:
        yield g.closed_form(c, eta=cfg.eta, log_prior=gate(probs).log().detach(), floor=cfg.floor)


def fixed_edges(
    bank: Bank, logits_graph: LogitsGraph, weights: Float[Tensor, "n k"], pairs: int
) -> Edges:
    """Return edges of one moment with given weights over teachers, and equal ones over pairs."""
    t = bank.recalibrated(weights)
    consensus = _consensus(bank, logits_graph, weights, t)
    return Edges(weights[None], consensus[None], torch.full((1, pairs), 1 / pairs), t[None])


def _consensus(
    bank: Bank, graph: LogitsGraph, weights: Float[Tensor, "n k"], t: Float[Tensor, " k"]
) -> Float[Tensor, "n c"]:
    probs = bank.probs(graph.temperature * t)
    parts = zip(probs.split(CLIPS_AT_ONCE), weights.split(CLIPS_AT_ONCE), strict=True)
    return torch.cat([graph.consensus(p, w) for p, w in parts])


def _pair_agreement(bank: Bank, graph: RepresentationGraph, rng: Generator) -> Tensor:
    """Mean over folds of the CKA of pairs and labels, on half of each fold: [e]."""
    known, found = (bank.fold >= 0).nonzero().squeeze(1), []
    for fold in range(int(bank.fold.max()) + 1):
        rows = known[bank.fold[known] == fold]
        rows = rows[torch.randperm(len(rows), generator=rng)[: max(4, len(rows) // 2)]]
        grams = graph.pair_grams(bank.features_at(rows, held=True))
        found.append(g.pair_alignment(grams, bank.targets[rows]))
    return torch.stack(found).mean(0) if found else torch.zeros(len(graph.pairs))


def save_graphs(path: Path, graphs: Graphs) -> None:
    """Write both graphs and their edges into one file."""
    both = {"logits": graphs.logits, "representation": graphs.representation}
    parts = {name: graph.state_dict() for name, graph in both.items()}
    parts["edges"] = vars(graphs.edges)
    tensors = {f"{part}.{name}": x for part, of in parts.items() for name, x in of.items()}
    save_tensors(path, tensors, **{name: graph.settings for name, graph in both.items()})


def open_graphs(path: Path) -> Graphs:
    """Open what :func:`save_graphs` wrote.

    Raises:
        UserError: the file is missing or damaged.
    """
    parts, settings = {}, meta_of(path)
    for key, x in load_tensors(path).items():
        part, _, name = key.partition(".")
        parts.setdefault(part, {})[name] = x
    logits = LogitsGraph(cost=parts["logits"]["cost"], **settings["logits"])
    logits.load_state_dict(parts["logits"])
    representation = RepresentationGraph(**settings["representation"])
    representation.load_state_dict(parts["representation"])
    moments, _, teachers = parts["edges"]["teachers"].shape
    plain = {"temperatures": torch.ones(moments, teachers)}  # files from before there were any
    return Graphs(logits, representation, Edges(**plain | parts["edges"]))

"""Both graphs of a run: built once from the bank, their edge weights learned, saved and opened.

Weights come from evidence about the teachers, never from the student. Their whole path over a
training is therefore learned before it, once for all students of a seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from gdviz import graphs as g
from gdviz.config import Distillation
from gdviz.config import Edges as EdgesConfig
from gdviz.core.files import load_tensors, meta_of, save_tensors
from gdviz.graphs import LogitsGraph, RepresentationGraph
from gdviz.graphs.costs import normalise_cost
from gdviz.teachers.bank import Bank

CLIPS_AT_ONCE = 2**16  # a consensus takes some ten float64 copies of what it is of
SCALED_BY = 10_000  # videos that tell the scale of features, which may be larger than memory


@dataclass(frozen=True)
class Edges:
    """Edge weights at R moments of a training; rows n are videos."""

    teachers: Float[Tensor, "r n k"]
    consensus: Float[Tensor, "r n c"]
    pairs: Float[Tensor, "r e"]

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
    representation.fit_scalers(bank.features_at(rows[:: 1 + len(rows) // SCALED_BY]))
    return logits, representation


def learn_edges(
    bank: Bank,
    logits_graph: LogitsGraph,
    representation_graph: RepresentationGraph,
    cfg: EdgesConfig,
    *,
    seed: int,
) -> Edges:
    """Learn both graphs' edge weights (ours; docs/method.md).

    Teachers: ``w_n = floor(softmax(log gate_n - c_n / eta))``, the closed form of
    ``min_w <w, c_n> + eta KL(w || gate_n)``, with :func:`gdviz.graphs.evidence` ``c`` and a gate
    that starts at :func:`gdviz.graphs.teacher_prior` and takes ``cfg.gate_steps`` steps down the
    mixture's cross-entropy from one moment to the next (:func:`gdviz.graphs.fit_gate`).

    Pairs: ``v = floor(softmax(CKA / eta_pairs))``. The CKA with the labels' Gram matrix is taken
    within each fold (features of different folds live in different spaces) on a random half of
    its clips, and averaged over folds and over the moments so far.
    """
    probs, softened, labels = bank.probs(), bank.probs(logits_graph.temperature), bank.labels
    c = g.evidence(probs, labels, logits_graph.cost, alpha=cfg.alpha)
    prior = g.teacher_prior(probs, labels, logits_graph.cost)
    gates = g.fit_gate(probs, labels, prior, rho=cfg.rho, steps=cfg.gate_steps, floor=cfg.floor)
    rng = Generator().manual_seed(seed)
    weights, consensus, pairs, agreement = [], [], [], []
    for gate in islice(gates, cfg.refreshes):
        with torch.no_grad():
            w = g.closed_form(c, eta=cfg.eta, log_prior=gate(probs).log(), floor=cfg.floor)
            parts = zip(softened.split(CLIPS_AT_ONCE), w.split(CLIPS_AT_ONCE), strict=True)
            weights.append(w)
            consensus.append(torch.cat([logits_graph.consensus(p, part) for p, part in parts]))
            agreement.append(_pair_agreement(bank, representation_graph, rng))
            mean = torch.stack(agreement).mean(0)
            pairs.append(g.closed_form(-mean, eta=cfg.eta_pairs, floor=cfg.floor))
    return Edges(*map(torch.stack, (weights, consensus, pairs)))


def _pair_agreement(bank: Bank, graph: RepresentationGraph, rng: Generator) -> Tensor:
    """Mean over folds of the CKA of pairs and labels, on half of each fold: [e]."""
    known, found = (bank.labels >= 0).nonzero().squeeze(1), []
    for fold in range(int(bank.fold.max()) + 1):
        rows = known[bank.fold[known] == fold]
        rows = rows[torch.randperm(len(rows), generator=rng)[: max(4, len(rows) // 2)]]
        grams = graph.pair_grams(bank.features_at(rows, held=True))
        found.append(g.pair_alignment(grams, bank.labels[rows]))
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
    return Graphs(logits, representation, Edges(**parts["edges"]))

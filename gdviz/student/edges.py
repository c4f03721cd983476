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

from gdviz.config import Distillation
from gdviz.config import Edges as EdgesConfig
from gdviz.core.files import load_tensors, meta_of, save_tensors
from gdviz.graphs import (
    LogitsGraph,
    RepresentationGraph,
    average_costs,
    closed_form,
    cost_from_means,
    evidence,
    fit_gate,
    pair_alignment,
    teacher_prior,
    zero_one_cost,
)
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
    costs = [cost_from_means(z, bank.labels[known], classes) for z in telling]
    return normalise_cost(average_costs(costs or [zero_one_cost(classes)]), shrink=shrink)


def build_graphs(
    bank: Bank, rows: Int[Tensor, " n"], cfg: Distillation, student_dim: int = 1
) -> tuple[LogitsGraph, RepresentationGraph]:
    """Build both graphs over the teachers.

    Args:
        bank: what the teachers say.
        rows: training videos; they set the scales of features.
        cfg: options of the graphs.
        student_dim: size of the student's features.
    """
    logits_graph = LogitsGraph(
        bank.teachers,
        ground_cost(bank, cfg.cost_shrink),
        eps=cfg.eps,
        beta=cfg.beta,
        temperature=cfg.temperature,
        tol=1e-4,
    )
    representation_graph = RepresentationGraph(
        bank.teachers, bank.dims, student_dim, distance=cfg.distance
    )
    representation_graph.fit_scalers(bank.features_at(rows[:: 1 + len(rows) // SCALED_BY]))
    return logits_graph, representation_graph


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
    c = evidence(probs, labels, logits_graph.cost, alpha=cfg.alpha)
    prior = teacher_prior(probs, labels, logits_graph.cost)
    gates = fit_gate(probs, labels, prior, rho=cfg.rho, steps=cfg.gate_steps, floor=cfg.floor)
    rng = Generator().manual_seed(seed)
    weights, consensus, pairs, agreement = [], [], [], []
    for gate in islice(gates, cfg.refreshes):
        with torch.no_grad():
            log_gate = gate(probs).log()
            w = closed_form(c, eta=cfg.eta, log_prior=log_gate, floor=cfg.floor)
            parts = zip(softened.split(CLIPS_AT_ONCE), w.split(CLIPS_AT_ONCE), strict=True)
            weights.append(w)
            consensus.append(torch.cat([logits_graph.consensus(p, part) for p, part in parts]))
            agreement.append(_pair_agreement(bank, representation_graph, rng))
            mean = torch.stack(agreement).mean(0)
            pairs.append(closed_form(-mean, eta=cfg.eta_pairs, floor=cfg.floor))
    return Edges(torch.stack(weights), torch.stack(consensus), torch.stack(pairs))


def _pair_agreement(bank: Bank, graph: RepresentationGraph, rng: Generator) -> Tensor:
    """Mean over folds of the CKA of pairs and labels, on half of each fold: [e]."""
    known, found = (bank.labels >= 0).nonzero().squeeze(1), []
    for fold in range(int(bank.fold.max()) + 1):
        rows = known[bank.fold[known] == fold]
        rows = rows[torch.randperm(len(rows), generator=rng)[: max(4, len(rows) // 2)]]
        grams = graph.pair_grams(bank.features_at(rows, held=True))
        found.append(pair_alignment(grams, bank.labels[rows]))
    return torch.stack(found).mean(0) if found else torch.zeros(len(graph.pairs))


def save_graphs(path: Path, graphs: Graphs) -> None:
    """Write both graphs and their edges into one file."""
    parts = {
        "logits": graphs.logits.state_dict(),
        "representation": graphs.representation.state_dict(),
        "edges": vars(graphs.edges),
    }
    tensors = {f"{part}.{name}": x for part, of in parts.items() for name, x in of.items()}
    settings = {"logits": graphs.logits.settings, "representation": graphs.representation.settings}
    save_tensors(path, tensors, **settings)


def open_graphs(path: Path) -> Graphs:
    """Open what :func:`save_graphs` wrote.

    Raises:
        UserError: the file is missing or damaged.
    """
    tensors, settings = load_tensors(path), meta_of(path)

    def part(name: str) -> dict[str, Tensor]:
        prefix = f"{name}."
        return {k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}

    logits = LogitsGraph(cost=part("logits")["cost"], **settings["logits"])
    logits.load_state_dict(part("logits"))
    representation = RepresentationGraph(**settings["representation"])
    representation.load_state_dict(part("representation"))
    return Graphs(logits, representation, Edges(**part("edges")))

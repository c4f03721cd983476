"""Learned edges of both graphs, over time: from evidence about the teachers, never from the student.

Because nothing here depends on the student, the whole path of the weights over a training is
learned before it, once for all students of a seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from gdviz.config import Edges as EdgesConfig
from gdviz.graphs import (
    LogitsGraph,
    RepresentationGraph,
    closed_form,
    evidence,
    fit_gate,
    pair_alignment,
    teacher_prior,
)
from gdviz.teachers.bank import Knowledge

CLIPS_AT_ONCE = 2**16  # a consensus takes some ten float64 copies of what it is of


@dataclass(frozen=True)
class Edges:
    """Edge weights at R moments of a training; rows n are videos."""

    teachers: Float[Tensor, "r n k"]
    consensus: Float[Tensor, "r n c"]
    pairs: Float[Tensor, "r e"]

    def at(self, progress: float) -> int:
        """The moment in force when a share ``progress`` in [0, 1) of the training is done."""
        return int(progress * len(self.teachers))


def learn_edges(
    knowledge: Knowledge,
    logits_graph: LogitsGraph,
    representation_graph: RepresentationGraph,
    cfg: EdgesConfig,
    *,
    seed: int,
) -> Edges:
    """Learns both graphs' edge weights.

    Teachers: ``w_n = floor(softmax(log gate_n - c_n / eta))``, the closed form of
    ``min_w <w, c_n> + eta KL(w || gate_n)``, with evidence ``c`` (``gdviz.graphs.evidence``) and a
    gate that starts at what the labels say of each teacher (``gdviz.graphs.teacher_prior``, which
    hands it on to unlabelled clips) and descends the cross-entropy of the mixture
    ``sum_k gate_nk p_nk`` on out-of-fold outputs of labelled clips (``gdviz.graphs.fit_gate``),
    ``cfg.gate_steps`` steps from one moment to the next. All of it is known before the student is:
    bad teachers are out from the first moment on.

    Pairs: ``v = floor(softmax(CKA / eta_pairs))``. The CKA with the label Gram matrix is taken
    within each fold (features of different folds live in different spaces) on a random half of its
    clips, and averaged over folds and over the moments so far.

    Source: ours (see docs/method.md).
    """
    probs, labels = knowledge.probs(), knowledge.labels
    known = (labels >= 0).nonzero().squeeze(1)
    cost, prior = (
        evidence(probs, labels, logits_graph.cost, alpha=cfg.alpha),
        teacher_prior(probs, labels, logits_graph.cost),
    )
    softened = knowledge.probs(logits_graph.temperature)
    gates = fit_gate(probs, labels, prior, rho=cfg.rho, steps=cfg.gate_steps, floor=cfg.floor)
    rng = Generator().manual_seed(seed)
    weights, consensus, pairs, agreement = [], [], [], []
    for gate in islice(gates, cfg.refreshes):
        with torch.no_grad():
            weights.append(
                closed_form(cost, eta=cfg.eta, log_prior=gate(probs).log(), floor=cfg.floor)
            )
            parts = zip(
                softened.split(CLIPS_AT_ONCE), weights[-1].split(CLIPS_AT_ONCE), strict=True
            )
            consensus.append(torch.cat([logits_graph.consensus(p, w) for p, w in parts]))
            agreement.append(_pair_agreement(knowledge, representation_graph, known, rng))
            mean_agreement = torch.stack(agreement).mean(0)
            pairs.append(closed_form(-mean_agreement, eta=cfg.eta_pairs, floor=cfg.floor))
    return Edges(torch.stack(weights), torch.stack(consensus), torch.stack(pairs))


def _pair_agreement(
    knowledge: Knowledge, graph: RepresentationGraph, known: Tensor, rng: Generator
) -> Float[Tensor, " e"]:
    """Mean over folds of the CKA between pair Gram matrices and the label Gram matrix, on half of each fold."""
    out = []
    for fold in range(int(knowledge.fold.max()) + 1):
        rows = known[knowledge.fold[known] == fold]
        rows = rows[torch.randperm(len(rows), generator=rng)[: max(4, len(rows) // 2)]]
        grams = graph.pair_grams(knowledge.shown(rows, held=True))
        out.append(pair_alignment(grams, knowledge.labels[rows]))
    return torch.stack(out).mean(0) if out else torch.zeros(len(graph.pairs))

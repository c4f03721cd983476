"""The two graphs between teachers and student, and the tensor code they rest on."""

from gdviz.graphs.costs import average_costs, check_cost, cost_from_means, zero_one_cost
from gdviz.graphs.logits import LogitsGraph, two_class
from gdviz.graphs.representation import RepresentationGraph
from gdviz.graphs.sketch import TensorSketch
from gdviz.graphs.transport import ConvergenceWarning, barycenter, sinkhorn, sinkhorn_divergence
from gdviz.graphs.weights import (
    closed_form,
    effective_number,
    evidence,
    fit_gate,
    pair_alignment,
    teacher_prior,
)

__all__ = ["LogitsGraph", "RepresentationGraph", "TensorSketch", "two_class"]
__all__ += ["average_costs", "check_cost", "cost_from_means", "zero_one_cost"]
__all__ += ["ConvergenceWarning", "barycenter", "sinkhorn", "sinkhorn_divergence"]
__all__ += ["closed_form", "effective_number", "evidence", "fit_gate", "pair_alignment"]
__all__ += ["teacher_prior"]

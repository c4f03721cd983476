"""The two graphs between teachers and student, and the tensor code they rest on."""

from gdviz.graphs.costs import (
    average_costs,
    check_cost,
    cost_from_means,
    cost_from_rows,
    zero_one_cost,
)
from gdviz.graphs.logits import (
    JointMatching,
    LogitsGraph,
    one_class_at_a_time,
    ordered_matching_cost,
    pairwise_matching_cost,
)
from gdviz.graphs.representation import RepresentationGraph
from gdviz.graphs.sketch import TensorSketch
from gdviz.graphs.transport import (
    Barycenter,
    ConvergenceWarning,
    Transport,
    barycenter,
    glue,
    self_cost,
    sinkhorn,
    sinkhorn_divergence,
    transport_cost,
)
from gdviz.graphs.weights import (
    Gate,
    closed_form,
    effective_number,
    evidence,
    fit_gate,
    pair_alignment,
    teacher_prior,
)

__all__ = [
    "Barycenter",
    "ConvergenceWarning",
    "Gate",
    "JointMatching",
    "LogitsGraph",
    "RepresentationGraph",
    "TensorSketch",
    "Transport",
    "average_costs",
    "barycenter",
    "check_cost",
    "closed_form",
    "cost_from_means",
    "cost_from_rows",
    "effective_number",
    "evidence",
    "fit_gate",
    "glue",
    "one_class_at_a_time",
    "ordered_matching_cost",
    "pair_alignment",
    "pairwise_matching_cost",
    "self_cost",
    "sinkhorn",
    "sinkhorn_divergence",
    "teacher_prior",
    "transport_cost",
    "zero_one_cost",
]

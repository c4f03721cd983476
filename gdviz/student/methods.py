"""Methods: what a student learns from its teachers, besides the labels. Each is one small class.

Write your own in a file of yours and name it MODULE:NAME wherever a method is asked for
(docs/own.md). Nothing outside this module knows a method by its name: how a method is called and
drawn, which clips it takes and whether its teachers are shuffled are fields of its class.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from gdviz.config import Distillation
from gdviz.core.files import UserError
from gdviz.core.names import resolve
from gdviz.graphs import sinkhorn_divergence
from gdviz.student import losses
from gdviz.student.edges import Edges, Graphs
from gdviz.student.weighting import FOLLOW_STUDENT, POLICIES, Policy
from gdviz.teachers.bank import Bank

POLICY_LABELS = {
    "uniform": "uniform average (KD)",
    "ebkd": "EBKD",
    "camkd": "CA-MKD (KD)",
    "aekd": "AE-KD",
    "luo": "Luo et al. (KD)",
}
NEGATIVES = 64  # clips that CRD tells a clip from


@dataclass(frozen=True)
class Setting:
    """What a method is built from: all that is known before the first step."""

    bank: Bank
    graphs: Graphs
    cfg: Distillation
    rows: Int[Tensor, " n"]  # the training videos
    student_dim: int


@dataclass(frozen=True)
class Batch:
    """One step's clips as the student sees them.

    Where videos have several labels, cases are classes of videos, "is it there?"; else q = b.
    """

    rows: Int[Tensor, " b"]  # their videos
    clips: Int[Tensor, " b"] | None  # which clip of its video each is; None: any
    logits: Float[Tensor, "q c"]  # of their cases
    features: Float[Tensor, "b d"]
    rng: Generator

    def to(self, x: Tensor) -> Tensor:
        """Return ``x`` on the student's device."""
        return x.to(self.logits.device)


class Method(nn.Module):
    """A method: parameters that are trained beside the student, and losses.

    Subclass it, or write any module of this shape: ``Method(setting)`` with these fields and
    ``losses(batch, bank, edges, moment)``.
    """

    label: ClassVar[str] = ""  # in tables and figures
    colour: ClassVar[int] = 4  # of plots.COLOURS; 4 is grey, 6 is the ink of a graph's student
    marker: ClassVar[str] = "o"
    unlabelled: ClassVar[bool] = True  # False: every clip of a step is a labelled one
    headline: ClassVar[bool] = False  # True: tables compare all others with it
    edges: ClassVar[str] = "learned"  # or uniform, or truth
    shuffled: ClassVar[bool] = False  # True: learns from teachers dealt to wrong clips; must lose
    terms: ClassVar[tuple[str, ...]] = ()  # names of its losses
    ramped: ClassVar[tuple[str, ...]] = ()  # those that come in over the first fifth

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.cfg = setting.cfg
        self.notes: dict[str, str] = {}  # what belongs beside the result

    def scale(self, term: str) -> float:
        """Return the gradient norm of a loss relative to the cross-entropy's."""
        return self.cfg.representation_scale if term == "repr" else self.cfg.logits_scale

    def losses(self, batch: Batch, bank: Bank, edges: Edges, moment: int) -> dict[str, Tensor]:
        """Return named scalars, which are balanced against the cross-entropy of the labels.

        ``moment`` says which of the learned weights in ``edges`` are in force.
        """
        raise NotImplementedError

    def softened(
        self, batch: Batch, bank: Bank, temperatures: Float[Tensor, " k"] | None = None
    ) -> Float[Tensor, "b k c"]:
        """Return the teachers' probabilities at the temperature of distillation.

        ``temperatures`` divide each teacher's logits first: see :meth:`Bank.recalibrated`.
        """
        logits = bank.logits_at(batch.rows, batch.clips)
        if temperatures is not None:
            logits = logits / temperatures[:, None]
        return batch.to(torch.softmax(logits / self.cfg.temperature, -1))


class LabelsOnly(Method):
    """Cross-entropy of the labels alone, on as many clips and steps as every other method."""

    label, unlabelled = "labels only", False

    def losses(self, batch: Batch, bank: Bank, edges: Edges, moment: int) -> dict[str, Tensor]:
        return {}


class ThroughLogitsGraph(Method):
    """:meth:`gdviz.graphs.LogitsGraph.loss` under the learned edges."""

    label, terms = "logits graph", ("logits",)

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.logits_graph = copy.deepcopy(setting.graphs.logits)

    def losses(self, batch: Batch, bank: Bank, edges: Edges, moment: int) -> dict[str, Tensor]:
        probs = self.softened(batch, bank, edges.temperatures[moment])
        at = moment, bank.cases(batch.rows)
        weights, consensus = batch.to(edges.teachers[at]), batch.to(edges.consensus[at])
        return {"logits": self.logits_graph.loss(batch.logits, probs, weights, consensus)}


class ThroughRepresentationGraph(Method):
    """:meth:`gdviz.graphs.RepresentationGraph.loss` under the learned edges, with its adapters."""

    label, terms, ramped = "representation graph", ("repr",), ("repr",)

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.graph = copy.deepcopy(setting.graphs.representation)
        self.graph.reset_adapters()

    def losses(self, batch: Batch, bank: Bank, edges: Edges, moment: int) -> dict[str, Tensor]:
        features = [batch.to(f) for f in bank.features_at(batch.rows, batch.clips)]
        labels = bank.soft_labels(edges.consensus[moment, bank.cases(batch.rows)])
        weights = batch.to(edges.pairs[moment])
        return {"repr": self.graph.loss(batch.features, features, batch.to(labels), weights)}


class ThroughBothGraphs(ThroughRepresentationGraph):
    """Both graphs' losses."""

    label, colour, marker, headline = "both graphs", 6, "s", True
    terms = ("logits", "repr")

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.logits_part = ThroughLogitsGraph(setting)

    def losses(self, batch: Batch, bank: Bank, edges: Edges, moment: int) -> dict[str, Tensor]:
        first = self.logits_part.losses(batch, bank, edges, moment)
        return first | super().losses(batch, bank, edges, moment)


class Shuffled(ThroughBothGraphs):
    """The control: both graphs, with what the teachers say dealt to wrong clips."""

    label, colour, marker, headline = "shuffled teachers (control)", 4, "X", False
    shuffled = True


class UniformEdges(ThroughBothGraphs):
    """Both graphs under equal edges."""

    label, headline, edges = "both graphs, equal edges", False, "uniform"
    colour, marker = 4, "o"


class TrueEdges(ThroughBothGraphs):
    """Both graphs under edges to the teacher at home: an upper bound, by audit."""

    label, headline, edges = "both graphs, edges from the truth", False, "truth"
    colour, marker = 4, "o"


class KDByLearnedEdges(Method):
    """Plain distillation, ``T^2 mean_n sum_k w_nk KL(p_nk || q_n)``, weighted by learned edges."""

    label, marker, terms = "learned edges (KD)", "v", ("kd",)

    fixed: Float[Tensor, "m k"] | None = None  # other weights, known before the training
    calibrated: Float[Tensor, " k"] | None = None  # temperatures under those

    def weights(self, batch: Batch, bank: Bank, edges: Edges, moment: int) -> Tensor:
        """Return the teachers' weights ``[q, k]`` on these cases."""
        every = edges.teachers[moment] if self.fixed is None else self.fixed
        return every[bank.cases(batch.rows)]

    def temperatures(self, edges: Edges, moment: int) -> Tensor | None:
        """Return what divides each teacher's logits: the edges' own, or what fits ``fixed``."""
        return edges.temperatures[moment] if self.fixed is None else self.calibrated

    def losses(self, batch: Batch, bank: Bank, edges: Edges, moment: int) -> dict[str, Tensor]:
        weights = batch.to(self.weights(batch, bank, edges, moment))
        probs = self.softened(batch, bank, self.temperatures(edges, moment))
        temperature = self.cfg.temperature
        return {"kd": losses.kd_loss(batch.logits, probs, weights, temperature)}


class KDByTrueEdges(KDByLearnedEdges):
    """Weights are on the teacher at home: an upper bound, by audit."""

    label, edges = "edges from the truth (KD)", "truth"


class KDByPolicy(KDByLearnedEdges):
    """Weights by a policy, asked once before the training, or in every step if it ``follows``."""

    policy: ClassVar[Policy]
    follows: ClassVar[bool] = False  # the student

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        if not self.follows:
            probs, labels = setting.bank.probs(), setting.bank.labels
            self.fixed = type(self).policy(probs, labels, None)
            # Calibrated under weights that have not seen the label of the clip they weigh, and so
            # cannot hide a mistake on it: every clip comes again, as one without a label.
            again = torch.cat([probs, probs]), torch.cat([labels, torch.full_like(labels, -1)])
            unseen = type(self).policy(*again, None)[len(labels) :]
            self.calibrated = setting.bank.recalibrated(unseen)

    def temperatures(self, edges: Edges, moment: int) -> Tensor | None:
        return self.calibrated

    def weights(self, batch: Batch, bank: Bank, edges: Edges, moment: int) -> Tensor:
        if not self.follows:
            return super().weights(batch, bank, edges, moment)
        each, cases = bank.cases_each, bank.cases(batch.rows)
        student = torch.softmax(batch.logits.detach() / self.cfg.temperature, 1)
        probs = torch.softmax(bank.logits[cases] / self.cfg.temperature, -1).to(student)
        # Of several labels the cases of a video are one distribution, over (class, is it there?).
        video = probs.unflatten(0, (-1, each)).transpose(1, 2).flatten(2) / each  # (b, k, each c)
        own = student.unflatten(0, (-1, each)).flatten(1) / each
        weights = type(self).policy(video, batch.to(bank.labels[cases[::each]]), own)
        return weights.repeat_interleave(each, 0)


class KDByOne(KDByLearnedEdges):
    """One teacher: the one that is best out of fold, unless ``teacher`` names one."""

    label = "best teacher (KD)"
    teacher: ClassVar[str | None] = None

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        names = setting.bank.teachers
        one = names.index(self.teacher) if self.teacher else setting.bank.best_teacher()
        self.notes = {} if self.teacher else {"teacher": names[one]}
        self.fixed = torch.eye(len(names))[one].expand(len(setting.bank.labels), -1)


class FromBest(Method):
    """A baseline that imitates the teacher that is best out of fold."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.best, self.rows = setting.bank.best_teacher(), setting.rows
        self.teacher_dim = setting.bank.dims[self.best]

    def losses(self, batch: Batch, bank: Bank, edges: Edges, moment: int) -> dict[str, Tensor]:
        logits = batch.to(bank.logits_at(batch.rows, batch.clips)[:, self.best])
        features = batch.to(bank.features_at(batch.rows, batch.clips)[self.best])
        return {self.terms[0]: self.loss(batch, bank, logits, features)}

    def loss(self, batch: Batch, bank: Bank, logits: Tensor, features: Tensor) -> Tensor:
        """Return the loss, given that teacher's calibrated logits [b, c] and features [b, e]."""
        raise NotImplementedError


class FitNets(FromBest):
    """Regress the teacher's features (Romero et al. 2015)."""

    label, terms = "FitNets", ("hint",)

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.regress = nn.Linear(setting.student_dim, self.teacher_dim)

    def loss(self, batch: Batch, bank: Bank, logits: Tensor, features: Tensor) -> Tensor:
        return losses.hint_loss(self.regress(batch.features), features)


class RKD(FromBest):
    """Keep distances and angles between clips (Park et al. 2019; angles count twice)."""

    label, terms = "RKD", ("rkd",)

    def loss(self, batch: Batch, bank: Bank, logits: Tensor, features: Tensor) -> Tensor:
        distance = losses.relational_distance_loss(batch.features, features)
        return distance + 2 * losses.relational_angle_loss(batch.features, features)


class CRD(FromBest):
    """Tell the teacher's features of a clip from those of others (Tian et al. 2020)."""

    label, terms = "CRD", ("crd",)

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.student_to = nn.Linear(setting.student_dim, self.teacher_dim)
        self.teacher_to = nn.Linear(self.teacher_dim, self.teacher_dim)

    def loss(self, batch: Batch, bank: Bank, logits: Tensor, features: Tensor) -> Tensor:
        rows, count = self.rows, min(NEGATIVES, len(self.rows) - 1)
        at = torch.randint(len(rows), (len(batch.rows), count), generator=batch.rng)
        at = (at + (rows[at] == batch.rows[:, None])) % len(rows)  # never the clip itself
        others = batch.to(bank.features_at(rows[at].flatten())[self.best]).unflatten(0, at.shape)
        own = self.student_to(batch.features), self.teacher_to(features)
        return losses.contrastive_loss(*own, self.teacher_to(others), len(rows))


class DKD(FromBest):
    """Decoupled distillation (Zhao et al. 2022); the teacher's class where no label is known."""

    label, terms = "DKD", ("dkd",)

    def loss(self, batch: Batch, bank: Bank, logits: Tensor, features: Tensor) -> Tensor:
        known = batch.to(bank.labels[bank.cases(batch.rows)])
        labels = torch.where(known >= 0, known, logits.argmax(1))
        return losses.decoupled_kd_loss(batch.logits, logits, labels, self.cfg.temperature)


class WKD(FromBest):
    """``T mean_n S(q_n, p_n)``: transport to the teacher (after WKD-L, Lv et al. 2024).

    Ours: the ground cost is the logits graph's, theirs is made of CKA between classes; S is
    debiased, where they take a smaller eps; the class of the label is not told apart.
    """

    label, terms = "WKD (logits)", ("wkd",)
    cost: Tensor

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.register_buffer("cost", setting.graphs.logits.cost.clone())

    def loss(self, batch: Batch, bank: Bank, logits: Tensor, features: Tensor) -> Tensor:
        t = self.cfg.temperature
        q, p = (torch.softmax(x / t, -1) for x in (batch.logits.float(), logits))
        return t * sinkhorn_divergence(q, p, self.cost, eps=self.cfg.eps).mean()


class DIST(FromBest):
    """Keep correlations within and between classes (Huang et al. 2022)."""

    label, terms = "DIST", ("dist",)

    def loss(self, batch: Batch, bank: Bank, logits: Tensor, features: Tensor) -> Tensor:
        return losses.dist_loss(batch.logits, logits, self.cfg.temperature)


def _by_policy(name: str) -> type[Method]:
    fields = {"policy": staticmethod(POLICIES[name]), "follows": name in FOLLOW_STUDENT}
    fields["label"] = POLICY_LABELS.get(name, f"{name} (KD)")
    return type(f"KD_{name}", (KDByPolicy,), fields)


METHODS: dict[str, type[Method]] = {
    "labels": LabelsOnly,
    "kd-best": KDByOne,
    "kd-learned": KDByLearnedEdges,
    **{f"kd-{name}": _by_policy(name) for name in POLICIES},
    "fitnets": FitNets,
    "rkd": RKD,
    "crd": CRD,
    "dkd": DKD,
    "dist": DIST,
    "wkd": WKD,
    "logits-graph": ThroughLogitsGraph,
    "representation-graph": ThroughRepresentationGraph,
    "both-graphs": ThroughBothGraphs,
    "both-shuffled": Shuffled,
    "both-uniform": UniformEdges,
    "both-truth": TrueEdges,
    "kd-truth": KDByTrueEdges,
}


def find_method(name: str, teachers: Sequence[str]) -> type[Method]:
    """Return a method's class: of ``METHODS``, ``kd-TEACHER``, or MODULE:NAME of your own.

    Raises:
        UserError: no such method, or the object of that name is none.
    """
    single = {
        f"kd-{t}": type("KDFromOne", (KDByOne,), {"label": f"{t} (KD)", "teacher": t})
        for t in teachers
    }
    method = resolve(name, METHODS | single, "method")
    if isinstance(method, type) and callable(getattr(method, "losses", None)):
        return method
    raise UserError(f"{name}: is no method; name a class with losses(batch, bank, edges, moment)")

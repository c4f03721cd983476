"""Representation graph: pairwise bilinear ensembles of teacher features against the student's.

Vertices are pairs of teachers ``i < j``, ``r_ij = x_i (x) x_j``, and the student's counterpart
``r^s_ij = s_i (x) s_j``. The "pairwise ensembled representations" are the paper's; the kernel
route, the class weights and the learned edges are ours.

``x_k = [u_k, 1] / sqrt 2`` with the teacher's pooled feature ``u_k``, standardised and of unit
length, and ``s_k`` likewise with ``A_k h_s``, ``h_s`` centred on the batch. Without the constant
coordinate (ours) cosines near zero, of a new student, multiply to nothing, and so do their
gradients.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gdviz.graphs import _dtypes, kernels
from gdviz.graphs.sketch import TensorSketch

if TYPE_CHECKING:
    import networkx as nx

Student = Float[Tensor, "clips student_dim"]
Teachers = Sequence[Float[Tensor, "clips _"]]  # one of each teacher, [N, d_k]
Labels = Int[Tensor, " clips"] | Float[Tensor, "clips classes"] | None
PerPair = Float[Tensor, " pairs"]


def _unit(x: Tensor) -> Tensor:
    """``[u, 1] / sqrt 2`` with ``u = x / |x|``, smooth where x vanishes (its gradient <= 1e3)."""
    u = x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + 1e-6) / x.shape[-1] ** 0.5
    return torch.cat([u, torch.ones_like(u[..., :1])], dim=-1) * 0.5**0.5


class RepresentationGraph(nn.Module):
    """``L_repr = sum_ij v_ij d(r_ij, r^s_ij)`` over pairs of teachers.

    The only pair of a single teacher is ``(0, 0)``, the ensemble with itself.

    Args:
        teachers, teacher_dims, student_dim: K distinct names; feature sizes ``d_k`` and ``d_s``.
        route: ``"kernel"`` (exact: ``<x (x) y, x' (x) y'> = <x, x'> <y, y'>``, no outer product is
            formed) or ``"sketch"`` (explicit Tensor Sketch vectors; noisier and slower).
        distance: ``"mmd"`` (unbiased, Gaussian kernels), ``"cka"`` or ``"coral"`` (covariances).
        mu: weight, in the MMD, of pairs of clips by their labels, see :meth:`loss`.
        paired: weight, in the MMD, of each clip against its own counterpart (ours): the MMD alone
            is content with the right vectors on the wrong clips.
        sketch_dim, seed: size and hashes of the sketch.

    Raises:
        ValueError: options are unknown, names repeated or sizes do not match the names.
    """

    adapters: Any  # nn.ModuleList of K nn.Linear

    def __init__(
        self,
        teachers: Sequence[str],
        teacher_dims: Sequence[int],
        student_dim: int,
        *,
        route: Literal["kernel", "sketch"] = "kernel",
        distance: Literal["mmd", "cka", "coral"] = "mmd",
        mu: float = 4.0,
        paired: float = 0.3,
        sketch_dim: int = 4096,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not teachers or not len(set(teachers)) == len(teachers) == len(teacher_dims):
            raise ValueError(f"need distinct teachers and their sizes: {teachers}, {teacher_dims}")
        if route not in ("kernel", "sketch") or distance not in kernels.DISTANCES:
            raise ValueError(f"unknown route {route!r} or distance {distance!r}")
        self.teachers, self.teacher_dims = tuple(teachers), list(teacher_dims)
        self.route, self.distance, self.mu, self.paired = route, distance, mu, paired
        # the arguments, as JSON holds them
        self.settings = {"teachers": list(teachers), "teacher_dims": list(teacher_dims)}
        self.settings |= {"student_dim": student_dim, "route": route, "distance": distance}
        self.settings |= {"mu": mu, "paired": paired, "sketch_dim": sketch_dim, "seed": seed}
        self.pairs = tuple(combinations(range(len(teachers)), 2)) or ((0, 0),)
        self.names = tuple(f"{teachers[i]}+{teachers[j]}" for i, j in self.pairs)
        self.adapters = nn.ModuleList(nn.Linear(student_dim, d, bias=False) for d in teacher_dims)
        for k, d in enumerate(teacher_dims):
            self.register_buffer(f"mean_{k}", torch.zeros(d))
            self.register_buffer(f"std_{k}", torch.ones(d))
        if route == "sketch":
            self.sketch = TensorSketch(max(teacher_dims) + 1, sketch_dim, seed=seed)

    def reset_adapters(self) -> None:
        """Draw the adapters anew, in their order, as at construction."""
        for adapter in self.adapters:
            adapter.reset_parameters()

    def _scaled_by(self, teacher_features: Teachers) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield each teacher's features with the mean and deviation they are standardised by."""
        sizes = [x.shape[-1] for x in teacher_features]
        if sizes != self.teacher_dims:
            raise ValueError(f"teacher features have sizes {sizes}, not {self.teacher_dims}")
        for k, x in enumerate(teacher_features):
            yield x.detach(), self.get_buffer(f"mean_{k}"), self.get_buffer(f"std_{k}")

    @torch.no_grad()
    def fit_scalers(self, teacher_features: Teachers) -> None:
        """Set the mean and deviation that standardise features, 0 and 1 until then."""
        for x, mean, std in self._scaled_by(teacher_features):
            x = x.to(_dtypes.double(x.device))
            deviation = x.std(dim=0, unbiased=False)
            # a coordinate that never moves carries nothing: leave it at its zero instead of 0 / 0
            moves = deviation > 1e-6 * deviation.max().clamp(min=1e-12)
            mean.copy_(x.mean(dim=0))
            std.copy_(torch.where(moves, deviation, torch.inf))

    def teacher_vectors(self, teacher_features: Teachers) -> list[Float[Tensor, "clips _"]]:
        """Return standardised unit vectors ``x_k [N, d_k + 1]`` of the K teachers, constants."""
        scaled = self._scaled_by(teacher_features)
        return [_unit((x.to(mean.dtype) - mean) / std) for x, mean, std in scaled]

    def student_vectors(self, student_features: Student) -> list[Float[Tensor, "clips _"]]:
        """Return adapted unit vectors ``s_k [N, d_k + 1]``, centred on the batch if N > 1."""
        h = student_features.to(self.adapters[0].weight.dtype)
        h = h - h.mean(dim=0) if len(h) > 1 else h
        return [_unit(adapter(h)) for adapter in self.adapters]

    def _pair_grams(self, x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
        """Compute ``<x_i, y_i'> <x_j, y_j'>`` for every pair: ``[E, N, N]``."""
        if self.route == "sketch":
            first = self.sketch(x, self.pairs)
            return kernels.gram(first, first if y is x else self.sketch(y, self.pairs))
        grams = torch.stack([kernels.gram(a, b) for a, b in zip(x, y, strict=True)])  # (K, N, N)
        i, j = zip(*self.pairs, strict=True)
        return grams[list(i)] * grams[list(j)]

    def pair_grams(self, teacher_features: Teachers) -> Float[Tensor, "pairs clips clips"]:
        """Compute the Gram matrices ``[E, N, N]`` of the teachers' pair vertices."""
        x = self.teacher_vectors(teacher_features)
        return self._pair_grams(x, x)

    def distances(
        self, student_features: Student, teacher_features: Teachers, labels: Labels = None
    ) -> PerPair:
        """Compute ``d(r_ij, r^s_ij)`` for every pair; arguments as :meth:`loss`."""
        counts = {len(student_features), *map(len, teacher_features)}
        if len(counts) > 1 or 0 in counts:
            raise ValueError(
                f"expected features of the same clips, one or more, got {counts} clips"
            )
        with torch.autocast(student_features.device.type, enabled=False):
            x, s = self.teacher_vectors(teacher_features), self.student_vectors(student_features)
            grams = [self._pair_grams(*v) for v in ((x, x), (s, s), (x, s))]  # (E, N, N) each
            o = kernels.label_pair_weights(labels, self.mu, len(student_features), grams[0])
            return kernels.DISTANCES[self.distance](*grams, pair_weights=o, paired=self.paired)

    def loss(
        self,
        student_features: Student,
        teacher_features: Teachers,
        labels: Labels,
        pair_weights: PerPair,
    ) -> Float[Tensor, ""]:
        """Compute ``L_repr = sum_ij v_ij d(r_ij, r^s_ij)``; the unbiased MMD may be below zero.

        In the MMD pairs of clips count ``1 + mu [y = y']`` by ``labels`` (-1 unknown), or
        ``1 + mu <b_n, b_m>`` by soft ones ``[B, C]``, such as the logits graph's consensus (ours).
        ``teacher_features``, K tensors ``[B, d_k]``, and ``pair_weights``, in the order of
        ``pairs``, are constants. A batch of fewer than four clips gives 0 with ``"cka"``.
        """
        if len(pair_weights) != len(self.pairs):
            raise ValueError(f"{len(pair_weights)} pair weights for {len(self.pairs)} pairs")
        distances = self.distances(student_features, teacher_features, labels)
        return (pair_weights.detach().to(distances) * distances).sum()

    def to_networkx(self, pair_weights: PerPair, distances: PerPair) -> "nx.Graph":
        """Return a star of pairs ``"a+b"``, of ``first`` and ``second``, around ``"student"``.

        Edges have a weight and a distance. ``networkx.write_graphml`` can write it.
        """
        import networkx as nx

        graph = nx.Graph(route=self.route, distance=self.distance)
        graph.add_node("student", kind="student")
        for e, (name, (i, j)) in enumerate(zip(self.names, self.pairs, strict=True)):
            values = {"weight": float(pair_weights[e]), "distance": float(distances[e])}
            graph.add_node(name, kind="pair", first=self.teachers[i], second=self.teachers[j])
            graph.add_edge(name, "student", kind="distance", **values)
        return graph

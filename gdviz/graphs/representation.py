"""Representation graph: pairwise bilinear ensembles of teacher features against the student's.

Vertices are pairs of teachers ``i < j``, ``r_ij = x_i (x) x_j``, and the student's counterpart
``r^s_ij = s_i (x) s_j`` with ``s_k = A_k h_s``. The paper's abstract has the "pairwise ensembled
representations"; the kernel route, the class weights and the learned edges are ours.

Every factor carries a constant coordinate (ours): with x = [u, 1] the products hold u_i (x) u_j and
u_i, u_j themselves. Without it the loss has a saddle where a new student starts: cosines near zero
multiply to nothing, and so do their gradients. On the embedded data a student of this graph alone then
stayed at chance; with the coordinate it learned.

Scale. ``x_k`` is the teacher's pooled feature standardised per coordinate (buffers, see
``fit_scalers``) and divided by its length; ``h_s`` is centred on the batch, adapted, and divided by its
length too. Products of unit vectors stay in [-1, 1] whatever the feature sizes.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gdviz.graphs import kernels
from gdviz.graphs.sketch import TensorSketch

if TYPE_CHECKING:
    import networkx as nx


_BANDWIDTH_CLIPS = 512  # at least so many, evenly spaced, tell a bank's median distance


def _unit(x: Tensor) -> Tensor:
    """``x / |x|``, smooth where x vanishes (a gradient of at most 1e3 instead of infinite)."""
    mean_square = x.pow(2).mean(dim=-1, keepdim=True)
    return x * torch.rsqrt(mean_square + 1e-6) / x.shape[-1] ** 0.5


def _with_one(x: Tensor) -> Tensor:
    """``[x, 1] / sqrt 2`` for unit x: unit again, and products of two such vectors hold both of first order, too."""
    return torch.cat([x, torch.ones_like(x[..., :1])], dim=-1) * 0.5**0.5


class RepresentationGraph(nn.Module):
    """``L_repr = sum_ij v_ij d(r_ij, r^s_ij)`` over pairs of teachers.

    A single teacher has no pair; its vertex is then ``(0, 0)``, the second-order ensemble with itself.

    Args:
        teachers: K distinct names.
        teacher_dims: K feature sizes ``d_k``.
        student_dim: ``d_s``.
        route: ``"kernel"`` (exact: ``<x (x) y, x' (x) y'> = <x, x'> <y, y'>``, no outer product is
            formed) or ``"sketch"`` (explicit Tensor Sketch vectors; noisier and slower).
        distance: ``"mmd"`` (unbiased, Gaussian kernels), ``"cka"`` (1 - unbiased CKA, clip by clip),
            ``"coral"`` (covariances) or ``"fourier"``: the MMD by random Fourier features of the sketch
            vectors, whatever the route, without an N x N matrix; for banks of thousands of clips.
        class_conditional: weight pairs of clips by their labels in the MMD, see ``loss``.
        mu: strength of that weight.
        paired: weight, in the MMD, of each clip against its own counterpart (ours). The MMD alone is
            content with the right vectors on the wrong clips: on a toy with six classes a student
            trained on it alone fell from 0.61 (random features) to 0.49, with class weights 0.63, with
            ``paired=0.3`` it rose to 0.92 without any label. 0 gives the plain MMD.
        sketch_dim: size of the sketch vectors.
        directions: number of random directions of ``"fourier"``, a multiple of 5; the error falls as
            ``1 / sqrt(directions)``.
        seed: of the sketch's hashes and the directions.

    Raises:
        ValueError: on unknown options, repeated names or sizes that do not match the names.
    """

    def __init__(
        self,
        teachers: Sequence[str],
        teacher_dims: Sequence[int],
        student_dim: int,
        *,
        route: Literal["kernel", "sketch"] = "kernel",
        distance: Literal["mmd", "cka", "coral", "fourier"] = "mmd",
        class_conditional: bool = True,
        mu: float = 4.0,
        paired: float = 0.3,
        sketch_dim: int = 4096,
        directions: int = 500,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if (
            not teachers
            or len(set(teachers)) != len(teachers)
            or len(teachers) != len(teacher_dims)
        ):
            raise ValueError(
                f"need distinct teachers and one size each, got {teachers} and {teacher_dims}"
            )
        if route not in ("kernel", "sketch") or distance not in (*kernels.DISTANCES, "fourier"):
            raise ValueError(f"unknown route {route!r} or distance {distance!r}")
        if directions <= 0 or directions % len(kernels.MULTIPLES):
            raise ValueError(
                f"directions must be a positive multiple of {len(kernels.MULTIPLES)}, got {directions}"
            )
        self.teachers, self.route, self.distance = tuple(teachers), route, distance
        self.mu = mu if class_conditional else 0.0
        self.paired = paired
        self.pairs = tuple(combinations(range(len(teachers)), 2)) or ((0, 0),)
        self.names = tuple(f"{teachers[i]}+{teachers[j]}" for i, j in self.pairs)
        self.adapters = nn.ModuleList(nn.Linear(student_dim, d, bias=False) for d in teacher_dims)
        for k, d in enumerate(teacher_dims):
            self.register_buffer(f"mean_{k}", torch.zeros(d))
            self.register_buffer(f"std_{k}", torch.ones(d))
        self.sketch = TensorSketch(max(teacher_dims) + 1, sketch_dim, seed=seed)
        if distance == "fourier":
            generator = torch.Generator().manual_seed(seed)
            self.register_buffer(
                "directions", torch.randn(sketch_dim, directions, generator=generator)
            )

    @torch.no_grad()
    def fit_scalers(self, teacher_features: Sequence[Float[Tensor, "clips _"]]) -> None:
        """Set the mean and deviation that standardise each teacher's features ``[N, d_k]``.

        Until it is called they are 0 and 1; features far from centred then all look alike.

        Raises:
            ValueError: if a number or size of features does not fit.
        """
        for k, x in enumerate(self._checked(teacher_features)):
            mean, std = getattr(self, f"mean_{k}"), getattr(self, f"std_{k}")
            deviation = x.double().std(dim=0, unbiased=False)
            mean.copy_(x.double().mean(dim=0))
            # a coordinate that never moves carries nothing: leave it at its zero instead of 0 / 0
            std.copy_(
                torch.where(
                    deviation > 1e-6 * deviation.max().clamp(min=1e-12), deviation, torch.inf
                )
            )

    def _checked(self, teacher_features: Sequence[Tensor]) -> Sequence[Tensor]:
        sizes = [a.out_features for a in self.adapters]
        if [x.shape[-1] for x in teacher_features] != sizes:
            raise ValueError(
                f"teacher features have sizes {[x.shape[-1] for x in teacher_features]}, not {sizes}"
            )
        return teacher_features

    def teacher_vectors(
        self, teacher_features: Sequence[Float[Tensor, "clips _"]]
    ) -> list[Float[Tensor, "clips _"]]:
        """Standardised unit vectors ``x_k [N, d_k]`` of the K teachers, constants."""
        vectors = []
        for k, x in enumerate(self._checked(teacher_features)):
            mean, std = getattr(self, f"mean_{k}"), getattr(self, f"std_{k}")
            vectors.append(_with_one(_unit((x.detach().to(mean.dtype) - mean) / std)))
        return vectors

    def student_vectors(
        self, student_features: Float[Tensor, "clips student_dim"]
    ) -> list[Float[Tensor, "clips _"]]:
        """Adapted unit vectors ``s_k [N, d_k]``, centred on the batch (a single clip is not)."""
        h = student_features.to(self.adapters[0].weight.dtype)
        h = h - h.mean(dim=0) if len(h) > 1 else h
        return [_with_one(_unit(adapter(h))) for adapter in self.adapters]

    def _pair_grams(self, x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
        """``<x_i, y_i'> <x_j, y_j'>`` for every pair: ``[E, N, N]``."""
        if self.route == "sketch":
            first = self.sketch(x, self.pairs)
            return kernels.gram(first, first if y is x else self.sketch(y, self.pairs))
        grams = torch.stack([kernels.gram(a, b) for a, b in zip(x, y, strict=True)])  # (K, N, N)
        i, j = zip(*self.pairs, strict=True)
        return grams[list(i)] * grams[list(j)]

    def pair_grams(
        self, teacher_features: Sequence[Float[Tensor, "clips _"]]
    ) -> Float[Tensor, "pairs clips clips"]:
        """Gram matrices ``[E, N, N]`` of the teachers' pair vertices, for ``weights.pair_weights``."""
        x = self.teacher_vectors(teacher_features)
        return self._pair_grams(x, x)

    @torch.no_grad()
    def pair_features(
        self, teacher_features: Sequence[Float[Tensor, "clips _"]]
    ) -> Float[Tensor, "pairs clips sketch"]:
        """Explicit (sketched) vectors ``[E, N, m]`` of the teachers' pair vertices, for UMAP or a bank."""
        return self.sketch(self.teacher_vectors(teacher_features), self.pairs)

    @torch.no_grad()
    def student_pair_features(
        self, student_features: Float[Tensor, "clips student_dim"]
    ) -> Float[Tensor, "pairs clips sketch"]:
        """The student's counterparts ``[E, N, m]``, in the same space as :meth:`pair_features`."""
        return self.sketch(self.student_vectors(student_features), self.pairs)

    def distances(
        self,
        student_features: Float[Tensor, "clips student_dim"],
        teacher_features: Sequence[Float[Tensor, "clips _"]],
        labels: Tensor | None = None,
    ) -> Float[Tensor, " pairs"]:
        """``d(r_ij, r^s_ij)`` for every pair, ``[E]``; arguments as :meth:`loss`."""
        with torch.autocast(student_features.device.type, enabled=False):
            x, s = self.teacher_vectors(teacher_features), self.student_vectors(student_features)
            if self.distance == "fourier":
                return self._fourier(self.sketch(x, self.pairs), self.sketch(s, self.pairs), labels)
            grams = (
                self._pair_grams(x, x),
                self._pair_grams(s, s),
                self._pair_grams(x, s),
            )  # (E, N, N) each
            o = kernels.label_pair_weights(labels, self.mu, len(student_features), grams[0])
            return kernels.DISTANCES[self.distance](*grams, pair_weights=o, paired=self.paired)

    def _fourier(self, r: Tensor, rs: Tensor, labels: Tensor | None) -> Tensor:
        few = r[:, :: max(1, r.shape[1] // _BANDWIDTH_CLIPS)]
        square = few.pow(2).sum(-1)
        width = kernels.median_bandwidth(
            kernels.squared_distances(square, square, kernels.gram(few)), default=2.0
        )
        features = [kernels.fourier_features(v, self.directions, width) for v in (r, rs)]
        o = None if labels is None else kernels.label_vectors(labels, self.mu, r)
        return kernels.fourier_mmd2(*features, label_vectors=o, paired=self.paired)

    def loss(
        self,
        student_features: Float[Tensor, "clips student_dim"],
        teacher_features: Sequence[Float[Tensor, "clips _"]],
        labels: Int[Tensor, " clips"] | Float[Tensor, "clips classes"] | None,
        pair_weights: Float[Tensor, " pairs"],
    ) -> Float[Tensor, ""]:
        """``L_repr = sum_ij v_ij d(r_ij, r^s_ij)``; the unbiased MMD may be slightly negative.

        MMD alone ignores which clip is which, so pairs of clips count ``1 + mu [y = y']``. Without
        labels give soft ones, for instance the logits graph's consensus: ``1 + mu <b_n, b_m>`` (ours);
        ``paired`` needs neither. A batch of one uses the biased MMD (the other is undefined there), a
        batch of fewer than four gives 0 with ``"cka"``.

        Args:
            student_features: ``[B, d_s]`` pooled features.
            teacher_features: K tensors ``[B, d_k]``; constants.
            labels: ``[B]`` integers (-1 unknown), or ``[B, C]`` probabilities, or None. Ignored by
                ``"cka"``, which compares clip by clip anyway, and ``"coral"``.
            pair_weights: ``[E]`` in the order of ``self.pairs``; a constant.

        Raises:
            ValueError: if sizes do not fit.
        """
        if pair_weights.shape != (len(self.pairs),):
            raise ValueError(
                f"expected {len(self.pairs)} pair weights, got {tuple(pair_weights.shape)}"
            )
        distances = self.distances(student_features, teacher_features, labels)
        return (pair_weights.detach().to(distances) * distances).sum()

    def to_networkx(
        self, pair_weights: Float[Tensor, " pairs"], distances: Float[Tensor, " pairs"]
    ) -> "nx.Graph":
        """Star of pair vertices ``"a+b"`` around ``"student"``; edges carry ``weight`` and ``distance``."""
        import networkx as nx

        graph = nx.Graph(route=self.route, distance=self.distance)
        graph.add_node("student", kind="student")
        for e, (i, j) in enumerate(self.pairs):
            graph.add_node(
                self.names[e], kind="pair", teachers=(self.teachers[i], self.teachers[j])
            )
            graph.add_edge(
                self.names[e],
                "student",
                kind="distance",
                weight=float(pair_weights[e]),
                distance=float(distances[e]),
            )
        return graph

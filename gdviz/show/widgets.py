"""Widgets: controls above a picture, thin shells over the graphs' functions and ``gdviz.show.plots``.

A widget *is* its pure method ``show(**values) -> (Figure, numbers)``; the rest, shared by all, connects it to
sliders. Every control has a name and a read-out and answers to the arrow keys.
"""

from __future__ import annotations

import base64
import html
import io
import math
import warnings
from collections.abc import Sequence
from typing import Any

import ipywidgets as ipw
import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from gdviz import graphs
from gdviz.graphs import LogitsGraph, RepresentationGraph, TensorSketch, kernels
from gdviz.show import plots

Shown = tuple[Figure, dict[str, float | str]]


class Explorer:
    """Controls, a read-out and a picture that follow each other.

    Subclasses define ``show``. What it raises is shown in place of the read-out, kept in ``errors`` and
    raised again: nothing fails in silence.

    Args:
        controls: one ipywidget for each argument of ``show``; its description is its label.
    """

    def __init__(self, **controls: ipw.ValueWidget) -> None:
        self.controls, self.errors = controls, []
        self.readout, self.picture = (
            ipw.HTML(),
            ipw.Image(format="png", layout=ipw.Layout(max_width="100%")),
        )
        self.widget = ipw.VBox([*controls.values(), self.readout, self.picture])
        for control in controls.values():
            control.style, control.layout = {"description_width": "11em"}, ipw.Layout(width="32em")
            control.observe(self.refresh, "value")
        self.refresh()

    def show(self, **values: Any) -> Shown:
        raise NotImplementedError

    def draw(self, **values: Any) -> Figure:
        """The picture for the given values; those left out are the controls'."""
        return self.show(**self.values | values)[0]

    @property
    def values(self) -> dict[str, Any]:
        return {name: control.value for name, control in self.controls.items()}

    def refresh(self, change: Any = None) -> None:
        """Draws what the controls say. An observer of each of them."""
        try:
            figure, numbers = self.show(**self.values)
            buffer = io.BytesIO()
            with plots.style():
                figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
        except Exception as error:
            self.errors.append(error)
            text = html.escape(f"{type(error).__name__}: {error}")
            self.readout.value = f"<b role='alert'>{text}</b> (the picture below is older)"
            raise
        self.picture.value = buffer.getvalue()
        words = {
            name: html.escape(v) if isinstance(v, str) else f"{v:.3g}"
            for name, v in numbers.items()
        }
        said = (f"{html.escape(name)} <b>{word}</b>" for name, word in words.items())
        self.readout.value = f"<span role='status'>{' &nbsp;·&nbsp; '.join(said)}</span>"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        """The live widget, and the picture for where no kernel runs: a saved notebook, a web page."""
        return self.widget._repr_mimebundle_() | {
            "image/png": base64.b64encode(self.picture.value).decode()
        }


def _figure(width: float, height: float, panels: int) -> tuple[Figure, Sequence[Axes]]:
    """A figure that pyplot does not know of: nothing to close, nothing shown twice."""
    figure = Figure(figsize=(width, height))
    return figure, np.atleast_1d(figure.subplots(1, panels))


def _slider(
    label: str, value: float, low: float, high: float, step: float = 0.05
) -> ipw.ValueWidget:
    """Whole numbers if all of these are."""
    kind = (
        ipw.IntSlider
        if all(isinstance(v, int) for v in (value, low, high, step))
        else ipw.FloatSlider
    )
    return kind(
        value=value, min=low, max=high, step=step, description=label, continuous_update=False
    )


def _log_slider(
    label: str, value: float, low: float, high: float, base: int = 10, step: float = 0.1
) -> ipw.ValueWidget:
    exponents = {"min": math.log(low, base), "max": math.log(high, base), "step": step}
    return ipw.FloatLogSlider(
        value=value, base=base, **exponents, description=label, readout_format=".3g", continuous_update=False
    )  # fmt: skip


class PlanExplorer(Explorer):
    """What transport between two teachers' distributions is, and what ``eps`` and a softening temperature do to it.

    Args:
        probs: ``[N, K, C]`` teacher probabilities.
        names: K teachers.
        class_names: C classes.
        cost: ``[C, C]`` ground cost.
    """

    def __init__(
        self,
        probs: Float[Tensor, "clips teachers classes"],
        names: Sequence[str],
        class_names: Sequence[str],
        cost: Tensor,
    ) -> None:
        self.probs, self.names, self.class_names, self.cost = probs, list(names), class_names, cost
        super().__init__(
            clip=_slider("clip", 0, 0, len(probs) - 1, 1),
            first=ipw.Dropdown(options=self.names, value=names[0], description="from teacher"),
            second=ipw.Dropdown(options=self.names, value=names[-1], description="to teacher"),
            eps=_log_slider("regularisation eps", 0.1, 0.01, 1),
            temperature=_log_slider("temperature T", 1, 0.5, 20),
        )

    @plots.style()
    def show(
        self, clip: int, first: str, second: str, eps: float, temperature: float = 1.0
    ) -> Shown:
        p = (self.probs[clip].clamp(min=1e-30).log() / temperature).softmax(
            -1
        )  # p^(1/T), to unit mass
        i, j = self.names.index(first), self.names.index(second)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", graphs.ConvergenceWarning)  # the read-out tells
            solved = graphs.sinkhorn(p[i], p[j], self.cost, eps=eps)
            consensus = graphs.barycenter(p, torch.ones_like(p[:, 0]), self.cost, eps=eps, tol=1e-4)
        figure, (bars, heat) = _figure(9, 3.8, 2)
        at = np.arange(len(self.class_names))
        for k, (name, q) in enumerate(
            [(first, p[i]), (second, p[j]), ("consensus of all", consensus.distribution)]
        ):
            look = {"color": plots.PALETTE[k], "ec": "white", "hatch": ("", "////", "....")[k]}
            bars.barh(at + (k - 1) * 0.27, q.numpy(), 0.27, label=name, **look)
        bars.set(
            yticks=at,
            yticklabels=self.class_names,
            xlabel="probability",
            xlim=(0, 1),
            ylim=(len(at) - 0.4, -0.6),
        )
        bars.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
        plan = solved.plan()
        plots.plot_plan(plan, self.class_names, first, second, heat)
        converged = "yes" if solved.converged and consensus.converged else "no: raise eps"
        moved = float((plan * self.cost).sum())
        return figure, {
            "cost of the plan": moved,
            "marginal error": float(solved.error),
            "converged": converged,
        }


class EdgeExplorer(Explorer):
    """How evidence about the teachers becomes edge weights of the logits graph.

    Args:
        probs: ``[N, K, C]`` out-of-fold teacher probabilities; a hundred clips are plenty.
        labels: ``[N]``, -1 where unknown.
        names: K teachers.
        cost: ``[C, C]`` ground cost.
    """

    def __init__(
        self,
        probs: Float[Tensor, "clips teachers classes"],
        labels: Int[Tensor, " clips"],
        names: Sequence[str],
        cost: Tensor,
    ) -> None:
        self.probs, self.labels, self.cost, self.graph = (
            probs,
            labels,
            cost,
            LogitsGraph(names, cost),
        )
        # Evidence is linear in alpha: found once at both ends.
        self.agreement, self.truth = (
            graphs.evidence(probs, labels, cost, alpha=alpha) for alpha in (0.0, 1.0)
        )
        super().__init__(
            eta=_log_slider("temperature eta", 0.1, 0.01, 10),
            alpha=_slider("share of labels alpha", 0.5, 0.0, 1.0),
            prior=_slider("strength of prior", 1.0, 0.0, 1.0),
            floor=_slider("floor", 0.05, 0.0, 1.0),
        )

    def weights(
        self, eta: float, alpha: float, prior: float, floor: float
    ) -> Float[Tensor, "clips teachers"]:
        """``softmax(prior log prior_k - c_nk / eta)`` with the floor, ``[N, K]``."""
        c = alpha * self.truth + (1 - alpha) * self.agreement
        log_prior = prior * graphs.teacher_prior(self.probs, self.labels, self.cost)
        return graphs.closed_form(c, eta=eta, log_prior=log_prior, floor=floor)

    @plots.style()
    def show(self, **values: float) -> Shown:
        weights = self.weights(**values)
        figure, (ax,) = _figure(6, 4.6, 1)
        plots.plot_logits_graph(
            self.graph.to_networkx(self.probs, weights.to(self.probs)), ax, vmax=1.0
        )
        mean, teachers = weights.mean(0), len(self.graph.teachers)
        return figure, {
            "effective number of teachers": f"{float(graphs.effective_number(mean)):.2f} of {teachers}",
            "within a clip": f"{float(graphs.effective_number(weights).mean()):.2f}",
            "heaviest": f"{self.graph.teachers[int(mean.argmax())]} ({float(mean.max()):.2f})",
        }


class BandwidthExplorer(Explorer):
    """Why several kernel widths: far from the median the MMD has no gradient.

    Args:
        teacher_features: K tensors ``[N, d_k]``.
        student_features: ``[N, d_s]``.
        labels: ``[N]``, -1 where unknown.
        graph: the trained representation graph; by default a new one, with random adapters.
    """

    def __init__(
        self,
        teacher_features: Sequence[Tensor],
        student_features: Tensor,
        labels: Tensor,
        graph: RepresentationGraph | None = None,
    ) -> None:
        self.student, self.labels = student_features.detach(), labels
        if graph is None:
            names, sizes = zip(
                *((f"teacher {k}", x.shape[1]) for k, x in enumerate(teacher_features)), strict=True
            )
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                graph = RepresentationGraph(names, sizes, student_features.shape[1])
            graph.fit_scalers(teacher_features)
        self.graph, self.teachers = graph, graph.teacher_vectors(teacher_features)
        pairs = list(zip(graph.names, graph.pairs, strict=True))
        super().__init__(
            pair=ipw.Dropdown(options=pairs, value=pairs[0][1], description="pair of teachers"),
            multiple=_log_slider("bandwidth / median", 1.0, 0.01, 100),
        )

    def mmd(self, pair: tuple[int, int], multiple: float) -> tuple[Tensor, float, float]:
        """Kernels ``[3, N, N]`` (teachers, student, across), the MMD² and the length of its gradient."""
        h = self.student.clone().requires_grad_()
        x, s = ([v[k] for k in pair] for v in (self.teachers, self.graph.student_vectors(h)))
        grams = [
            kernels.gram(a[0], b[0]) * kernels.gram(a[1], b[1]) for a, b in ((x, x), (s, s), (x, s))
        ]
        k = torch.stack(kernels.gaussian_kernels(*grams, multiple))
        o = kernels.label_pair_weights(self.labels, self.graph.mu, len(h), k)
        value = kernels.mmd2(*k, pair_weights=o, paired=self.graph.paired)
        (gradient,) = torch.autograd.grad(value, h)
        return k.detach(), value.item(), gradient.norm().item()

    @plots.style()
    def show(self, pair: tuple[int, int], multiple: float) -> Shown:
        k, value, slope = self.mmd(pair, multiple)
        figure, (left, right) = _figure(9, 3.4, 2)
        mask = kernels.off_diagonal(k.shape[-1])
        for of, name, line in zip(
            k, ("teachers", "student", "teachers to student"), plots.LINES, strict=False
        ):
            left.hist(
                of[mask].numpy(),
                np.linspace(0, 1, 41),
                density=True,
                histtype="step",
                lw=1.6,
                ls=line,
                label=name,
            )
        left.set(xlabel="kernel between two clips", ylabel="density", xlim=(0, 1))
        left.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
        grid = np.geomspace(0.01, 100, 17)
        curves = np.array([self.mmd(pair, m)[1:] for m in grid])
        for curve, name, look in zip(
            curves.T, ("MMD²", "gradient norm"), ("o-", "s--"), strict=True
        ):
            right.plot(grid, curve / abs(curve).max(), look, ms=4, label=f"{name} / its maximum")
        right.axvline(multiple, color=plots.INK, lw=1)
        right.set(xscale="log", xlabel="bandwidth / median squared distance")
        right.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
        return figure, {
            "MMD²": value,
            "gradient norm": slope,
            "mean kernel across": float(k[2].mean()),
        }


class SketchExplorer(Explorer):
    """What a Tensor Sketch costs against the exact product of Gram matrices, for one pair of teachers.

    Args:
        teacher_features: at least two tensors ``[N, d_k]``; the first two are used, standardised.
        seed: of the hashes.
    """

    def __init__(self, teacher_features: Sequence[Float[Tensor, "clips _"]], seed: int = 0) -> None:
        graph = RepresentationGraph(
            ("first", "second"), [x.shape[1] for x in teacher_features[:2]], 1
        )
        graph.fit_scalers(teacher_features[:2])
        self.vectors, self.seed = graph.teacher_vectors(teacher_features[:2]), seed
        self.exact = graph.pair_grams(teacher_features[:2])[0]
        super().__init__(size=_log_slider("size of the sketch", 512, 16, 8192, base=2, step=1))

    def sketched(self, size: int) -> tuple[Tensor, float]:
        """Gram matrix ``[N, N]`` of the sketches, and its relative error ``|G - exact| / |exact|``."""
        sketch = TensorSketch(max(v.shape[1] for v in self.vectors), size, seed=self.seed)
        gram = kernels.gram(sketch(self.vectors, [(0, 1)])[0])
        return gram, float((gram - self.exact).norm() / self.exact.norm())

    @plots.style()
    def show(self, size: float) -> Shown:
        gram, error = self.sketched(round(size))
        figure, (left, right) = _figure(9, 3.6, 2)
        left.plot(
            self.exact.flatten().numpy(),
            gram.flatten().numpy(),
            ".",
            ms=3,
            alpha=0.5,
            rasterized=True,
        )
        left.axline((0, 0), slope=1, color=plots.INK, lw=1)
        left.set(xlabel="exact inner product", ylabel=f"from sketches of size {round(size)}")
        sizes = 2 ** np.arange(4, 14)
        errors = [self.sketched(int(m))[1] for m in sizes]
        right.loglog(sizes, errors, "o-", ms=4, label="this sketch")
        right.set_xscale("log", base=2)
        right.plot(
            sizes,
            errors[0] * (sizes / sizes[0]) ** -0.5,
            ls=":",
            color=plots.FAINT,
            label="one over root of the size",
        )
        right.plot(size, error, "D", ms=9, color=plots.PALETTE[2], mec=plots.INK)
        right.set(xlabel="size of the sketch", ylabel="relative error of the Gram matrix")
        right.legend()
        outer = math.prod(v.shape[1] for v in self.vectors)
        return figure, {
            "relative error": error,
            "numbers a clip": f"{round(size)} (outer product: {outer})",
        }


class MotionPlayer(Explorer):
    """Plays videos, frame by frame or by the clock.

    Args:
        videos: uint8 ``[n, f, h, w, 3]``.
        titles: n names.
    """

    def __init__(self, videos: np.ndarray, titles: Sequence[str]) -> None:
        self.videos, self.titles = videos, titles
        last = videos.shape[1] - 1
        super().__init__(
            clip=_slider("clip", 0, 0, len(videos) - 1, 1), frame=_slider("frame", 0, 0, last, 1)
        )
        self.play = ipw.Play(min=0, max=last, interval=125, repeat=True)
        ipw.link((self.play, "value"), (self.controls["frame"], "value"))
        self.widget.children = (self.play, *self.widget.children)

    @plots.style()
    def show(self, clip: int, frame: int) -> Shown:
        figure, (ax,) = _figure(3, 3, 1)
        ax.imshow(self.videos[clip, frame], interpolation="nearest")
        ax.set_title(self.titles[clip])
        ax.axis("off")
        return figure, {
            "clip": self.titles[clip],
            "frame": f"{frame + 1} of {self.videos.shape[1]}",
        }

"""Widgets: controls above a picture, thin shells over the graphs' functions and the plots.

A widget *is* its method ``draw(axes, **values) -> numbers``; the rest, shared by all, connects it
to controls on a page, with a kernel (``Explorer``) or without (``Explorer.static``).
"""

from __future__ import annotations

import html
import inspect
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, cast

import numpy as np
import pandas as pd
import seaborn as sns
import torch
from jaxtyping import Float, Int, UInt8
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from gdviz import graphs
from gdviz.graphs import LogitsGraph, RepresentationGraph, TensorSketch, kernels
from gdviz.show import comparisons, plots
from gdviz.show.figures import Finished
from gdviz.show.static import Control, Page, block, log_scale, play, shown
from gdviz.student.routing import novelty

Probs = Float[Tensor, "clips teachers classes"]
Labels = Int[Tensor, " clips"]  # -1 where unknown
Cost = Float[Tensor, "classes classes"]
Features = Sequence[Float[Tensor, "clips _"]]  # of each teacher
Names = Sequence[str]
Panels = Sequence[Axes]
Numbers = dict[str, float | str]
ABOVE: dict[str, Any] = {"loc": "lower center", "bbox_to_anchor": (0.5, 1)}


class Explorer:
    """Controls, a read-out and a picture that follow each other, with a kernel or without.

    Subclasses define ``draw``; the first line of their docstring is the picture's name. What
    ``draw`` raises is shown in place of the read-out and raised again: nothing fails in silence.

    Args:
        controls: one for each value of ``draw``.
    """

    size = 9.0, 3.6  # of the picture, in inches
    panels = 2
    rows, widths = 1, (1.0, 1.0)  # of panels; relative widths of a row's

    def __init__(self, **controls: Control) -> None:
        self.controls = controls
        self.title = (inspect.getdoc(self) or "").splitlines()[0]
        pages = [control.page for control in controls.values()]
        self.page = Page(title=self.title, controls=pages)
        self.kept = lru_cache(100)(self.drawn)  # going back to a picture takes no time
        self.page.observe(self.refresh, "at")
        self.move(**{name: control.start for name, control in controls.items()})

    def draw(self, axes: Panels, **values: Any) -> Numbers:
        """Draw for these values of the controls; return the read-out's numbers."""
        raise NotImplementedError

    @plots.style()
    def show(self, **values: Any) -> tuple[Figure, Numbers]:
        """Return the picture for these values, unknown to pyplot, and the read-out's numbers."""
        figure = Figure(figsize=self.size)
        columns = self.panels // self.rows
        grid = figure.subplots(
            self.rows, columns, squeeze=False, width_ratios=self.widths[:columns]
        )
        with warnings.catch_warnings():
            # What is drawn may stop a little early; read-outs tell where it matters.
            warnings.simplefilter("ignore", graphs.ConvergenceWarning)
            return figure, self.draw(grid.flatten().tolist(), **values)

    def values_at(self, *at: int) -> dict[str, Any]:
        """Return a value of each control, by its number."""
        controls = zip(self.controls.items(), at, strict=True)
        return {name: control.values[k] for (name, control), k in controls}

    @property
    def values(self) -> dict[str, Any]:
        """What the controls stand at."""
        return self.values_at(*self.page.at)

    def drawn(self, *at: int) -> dict[str, str]:
        """Return picture and read-out, as a page shows them, for these numbers of values."""
        return shown(self.title, *self.show(**self.values_at(*at)))

    def move(self, **values: Any) -> None:
        """Set controls to some of their values, and show what they stand at."""
        values = self.values | values if self.page.at else values
        self.page.at = [list(c.values).index(values[name]) for name, c in self.controls.items()]

    def refresh(self, change: Any = None) -> None:
        """Show what the controls stand at; each of them calls it."""
        at = {"at": self.page.at}
        try:
            self.page.shown = self.kept(*self.page.at) | at
        except Exception as error:
            text = html.escape(f"{type(error).__name__}: {error}")
            alert = f"<b role='alert'>{text}</b> (the picture is older)"
            self.page.shown = {"picture": "", "alt": ""} | self.page.shown | {"readout": alert} | at
            raise

    def static(self) -> str:
        """Return HTML of the explorer that needs no kernel, no server and no network."""
        return block(self.title, self.controls, self.values, self.show)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        """Return the live explorer, and the one for where no kernel runs.

        Within JupyterLab that is the picture alone: a table of pictures takes seconds.
        """
        live, seen = self.page._repr_mimebundle_() or ({}, {}), self.page.shown
        still = f'<img src="{seen["picture"]}" alt="{html.escape(seen["alt"])}">'
        within = "JPY_SESSION_NAME" in os.environ  # Jupyter's server tells its kernels
        return live[0] | {"text/html": still if within else self.static()}


class PlanExplorer(Explorer):
    """What transport between two teachers' distributions is; what eps and a temperature do to it.

    ``names`` are the teachers', ``cost`` is the ground cost. Of many classes those with most mass
    are drawn.
    """

    def __init__(self, probs: Probs, names: Names, class_names: Names, cost: Cost) -> None:
        self.probs, self.names, self.class_names, self.cost = probs, list(names), class_names, cost
        super().__init__(
            clip=Control("clip", range(len(probs)), 0),
            first=Control("from teacher", names, names[0], kind="buttons"),
            second=Control("to teacher", names, names[-1], still=6, kind="buttons"),
            eps=Control("regularisation eps", log_scale(0.01, 1, 21), 0.1, still=3),
            temperature=Control("temperature T", log_scale(0.5, 20, 17), 1.0, still=2),
        )

    def draw(
        self, axes: Panels, clip: int, first: str, second: str, eps: float, temperature: float
    ) -> Numbers:
        bars, heat = axes
        p = (self.probs[clip].clamp(min=1e-30).log() / temperature).softmax(-1)
        a, b = p[self.names.index(first)], p[self.names.index(second)]
        solved = graphs.sinkhorn(a, b, self.cost, eps=eps)
        consensus = graphs.barycenter(p, torch.ones_like(p[:, 0]), self.cost, eps=eps, tol=1e-4)
        plan, drawn = solved.plan(), torch.stack([a, b, consensus.distribution])
        heaviest = drawn.sum(0).argsort(descending=True)[: plots.NAMED].sort().values
        labels = plots.as_text([self.class_names[c] for c in heaviest.tolist()])
        shown = pd.DataFrame(drawn.T[heaviest], labels, [first, second, "consensus of all"])
        shown.plot.barh(ax=bars, width=0.81, ec="white", xlim=(0, 1), legend=False)
        for container, hatch in zip(bars.containers, ("", "////", "...."), strict=True):
            plt.setp(container, hatch=hatch)
        bars.set(xlabel="probability", ylim=(len(labels) - 0.4, -0.6))
        bars.legend(ncols=3, **ABOVE)
        plots.plot_plan(plan[heaviest][:, heaviest], labels, first, second, heat)
        converged = bool(solved.converged) and bool(consensus.converged)
        return {
            "cost of the plan": float((plan * self.cost).sum()),
            "marginal error": float(solved.error),
            "converged": "yes" if converged else "no: raise eps",
        }


class EdgeExplorer(Explorer):
    """How evidence about the teachers becomes edge weights of the logits graph.

    ``probs`` are out of fold; a hundred clips are plenty. ``names`` are the teachers'.
    """

    size, panels = (6.0, 3.6), 1

    def __init__(self, probs: Probs, labels: Labels, names: Names, cost: Cost) -> None:
        self.probs, self.graph = probs, LogitsGraph(names, cost)
        # Evidence is linear in alpha: both ends of it are enough.
        self.agreement = graphs.evidence(probs, labels, cost, alpha=0.0)
        self.truth = graphs.evidence(probs, labels, cost, alpha=1.0)
        self.prior = graphs.teacher_prior(probs, labels, cost)
        share = [k / 20 for k in range(21)]
        super().__init__(
            eta=Control("temperature eta", log_scale(0.01, 10, 31), 0.1, still=5),
            alpha=Control("share of labels alpha", share, 0.5, still=3),
            prior=Control("strength of prior", share, 1.0, still=2),
            floor=Control("floor", share, 0.05),
        )

    def weights(
        self, eta: float, alpha: float, prior: float, floor: float
    ) -> Float[Tensor, "clips teachers"]:
        """Return ``softmax(prior log prior_k - c_nk / eta)`` with the floor, ``[N, K]``."""
        c = torch.lerp(self.agreement, self.truth, alpha)
        return graphs.closed_form(c, eta=eta, log_prior=prior * self.prior, floor=floor)

    def draw(self, axes: Panels, **values: float) -> Numbers:
        weights = self.weights(**values)
        graph = self.graph.to_networkx(self.probs, weights.to(self.probs))
        plots.plot_logits_graph(graph, axes[0], vmax=1.0)
        mean, effective = weights.mean(0), graphs.effective_number
        return {
            "effective number of teachers": f"{float(effective(mean)):.2f} of {len(mean)}",
            "within a clip": f"{float(effective(weights).mean()):.2f}",
            "heaviest": f"{self.graph.teachers[int(mean.argmax())]} ({float(mean.max()):.2f})",
        }


class BandwidthExplorer(Explorer):
    """Why several kernel widths: far from the median the MMD has no gradient."""

    def __init__(
        self,
        teacher_features: Features,
        student_features: Float[Tensor, "clips student_dim"],
        labels: Labels,
        graph: RepresentationGraph,
    ) -> None:
        self.student, self.labels, self.graph = student_features.detach(), labels, graph
        self.teachers, names = graph.teacher_vectors(teacher_features), graph.teachers
        self.multiples = np.geomspace(0.01, 100, 17)
        self.curves = cache(lambda pair: [self.mmd(pair, m)[1:] for m in self.multiples])
        super().__init__(
            first=Control("first of the pair", names, names[0], kind="buttons"),
            second=Control("second of the pair", names, names[-1], still=4, kind="buttons"),
            multiple=Control("bandwidth / median", log_scale(0.01, 100, 41), 1.0, still=9),
        )

    def mmd(self, pair: tuple[int, int], multiple: float) -> tuple[Tensor, float, float]:
        """Return kernels ``[3, N, N]`` (teachers, student, across), the MMD² and its slope.

        The slope is the length of the gradient in the student's features.
        """
        h = self.student.clone().requires_grad_()
        x, s, (i, j) = self.teachers, self.graph.student_vectors(h), pair

        def gram(a: Features, b: Features) -> Tensor:
            return kernels.gram(a[i], b[i]) * kernels.gram(a[j], b[j])

        k = torch.stack(kernels.gaussian_kernels(gram(x, x), gram(s, s), gram(x, s), multiple))
        o = kernels.label_pair_weights(self.labels, self.graph.mu, len(h), k)
        value = kernels.mmd2(k[0], k[1], k[2], pair_weights=o, paired=self.graph.paired)
        (gradient,) = torch.autograd.grad(value, h)
        return k.detach(), value.item(), gradient.norm().item()

    def draw(self, axes: Panels, first: str, second: str, multiple: float) -> Numbers:
        left, right = axes
        pair = self.graph.teachers.index(first), self.graph.teachers.index(second)
        k, value, slope = self.mmd(pair, multiple)
        mask, bins = kernels.off_diagonal(k.shape[-1]), np.linspace(0, 1, 41)
        names = "teachers", "student", "teachers to student"
        for of, name, line in zip(k, names, plots.LINES[:3], strict=True):
            look = {"stat": "density", "element": "step", "fill": False, "lw": 1.6, "ls": line}
            sns.histplot(of[mask].numpy(), bins=bins, label=name, ax=left, **look)
        left.set(xlabel="kernel between two clips", ylabel="density", xlim=(0, 1))
        left.legend(ncols=3, **ABOVE)
        values, slopes = np.array(self.curves(pair)).T
        values, slopes = values / abs(values).max(), slopes / slopes.max()
        right.plot(self.multiples, values, "o-", ms=4, label="MMD² / its maximum")
        right.plot(self.multiples, slopes, "s--", ms=4, label="gradient norm / its maximum")
        right.axvline(multiple, color=plots.INK, lw=1)
        right.set(xscale="log", xlabel="bandwidth / median squared distance")
        right.legend(ncols=2, **ABOVE)
        return {"MMD²": value, "gradient norm": slope, "mean kernel across": float(k[2].mean())}


class SketchExplorer(Explorer):
    """What a Tensor Sketch costs against the exact product of Gram matrices.

    The pair is the first two teachers, standardised.
    """

    def __init__(self, teacher_features: Features) -> None:
        pair = list(teacher_features[:2])
        graph = RepresentationGraph(("first", "second"), [x.shape[1] for x in pair], 1)
        graph.fit_scalers(pair)
        self.vectors = graph.teacher_vectors(pair)
        self.exact = graph.pair_grams(pair)[0]
        self.sizes = [2**k for k in range(4, 14)]
        self.errors = [self.sketched(size)[1] for size in self.sizes]
        super().__init__(size=Control("size of the sketch", self.sizes, 512, still=10))

    def sketched(self, size: int) -> tuple[Float[Tensor, "clips clips"], float]:
        """Return the sketches' Gram matrix ``G``, and its error ``|G - exact| / |exact|``."""
        sketch = TensorSketch(max(v.shape[1] for v in self.vectors), size, seed=0)
        gram = kernels.gram(sketch(self.vectors, [(0, 1)])[0])
        return gram, float((gram - self.exact).norm() / self.exact.norm())

    def draw(self, axes: Panels, size: int) -> Numbers:
        left, right = axes
        gram, error = self.sketched(size)
        dots = {"ms": 3, "alpha": 0.5, "rasterized": True}
        left.plot(self.exact.flatten().numpy(), gram.flatten().numpy(), ".", **dots)
        left.axline((0, 0), slope=1, color=plots.INK, lw=1)
        left.set(xlabel="exact inner product", ylabel=f"from sketches of size {size}")
        right.loglog(self.sizes, self.errors, "o-", ms=4, label="this sketch")
        root = self.errors[0] * (np.array(self.sizes) / self.sizes[0]) ** -0.5
        right.plot(self.sizes, root, ls=":", color=plots.FAINT, label="one over root of the size")
        right.plot(size, error, "D", ms=9, color=plots.PALETTE[2], mec=plots.INK)
        right.set_xscale("log", base=2)
        right.set(xlabel="size of the sketch", ylabel="relative error of the Gram matrix")
        right.legend()
        outer = math.prod(v.shape[1] for v in self.vectors)
        numbers = f"{size} (outer product: {outer})"
        return {"relative error": error, "numbers a clip": numbers}


class ClipExplorer(Explorer):
    """A clip beside what teachers, consensus and student say of it, and both graphs as they learn.

    ``look`` is a finished run of one label a video, ``clips`` some of its videos. The read-out says
    why a teacher weighs what it does: how foreign the clip is to each where their homes are known,
    else how far each is from the others' opinion (the smaller the better for its weight).
    """

    size, panels, rows, widths = (11.5, 6.4), 4, 2, (1.0, 1.6)

    def __init__(self, look: Finished, clips: Labels) -> None:
        self.look, self.clips, self.edges = look, clips, look.graphs.edges
        bank, graph, moments = look.bank, look.graphs.logits, range(len(self.edges.teachers))
        self.probs = torch.stack([look.probs(moment)[clips] for moment in moments])
        self.student = torch.softmax(look.outputs["logits"][clips] / graph.temperature, 1)
        self.frames = look.videos.batch(clips).numpy()[:, ::2]
        self.distances = look.distances()
        if known := all(home is not None for home in bank.homes):
            homes = zip(bank.features_at(clips), cast(Any, bank.homes), strict=True)
            self.against = torch.stack([novelty(x, home) for x, home in homes], 1)
        else:
            unknown = torch.full_like(clips, -1)
            self.against = graphs.evidence(bank.probs()[clips], unknown, graph.cost, alpha=0.0)
        self.reason = "foreign to" if known else "apart from the others (less weighs more)"
        super().__init__(
            clip=Control("clip", range(len(clips)), 0, still=3),
            moment=Control("moment of the training", moments, moments[-1], still=4),
        )

    def draw(self, axes: Panels, clip: int, moment: int) -> Numbers:
        screen, says, left, right = axes
        screen.set_title(f"frames that networks see, {self.frames.shape[2]} pixels wide")
        look, row, edges = self.look, int(self.clips[clip]), self.edges
        weights, names = edges.teachers[moment, row], look.bank.teachers
        play(screen, self.frames[clip])
        probs, consensus = self.probs[moment, clip], edges.consensus[moment, row]
        said = torch.cat([probs, consensus[None], self.student[clip, None]])
        classes = said.sum(0).argsort(descending=True)[: plots.NAMED].sort().values
        speakers = [f"{plots.short(n)}  {w:.2f}" for n, w in zip(names, weights, strict=True)]
        labels = plots.as_text([plots.short(look.videos.label_names[c]) for c in classes.tolist()])
        frame = pd.DataFrame(said[:, classes], [*speakers, "consensus", "student"], labels)
        bar = {"label": "probability"}
        sns.heatmap(frame, vmin=0, vmax=1, cmap="cividis", ax=says, cbar_kws=bar)
        says.tick_params(labelsize=7)
        one = probs[None], weights[None], self.student[clip, None]
        plots.plot_logits_graph(look.graphs.logits.to_networkx(*one), left, vmax=1.0)
        pairs = look.graphs.representation.to_networkx(edges.pairs[moment], self.distances)
        plots.plot_representation_graph(pairs, right)
        label, words = int(look.videos.labels[row]), look.videos.label_names
        why = ", ".join(f"{n} {c:.2f}" for n, c in zip(names, self.against[clip], strict=True))
        return {
            "moment": f"{moment + 1} of {len(edges.teachers)}",
            "truth": words[label] if label >= 0 else "not labelled",
            "consensus": f"{words[int(consensus.argmax())]} ({float(consensus.max()):.2f})",
            "student": f"{words[int(said[-1].argmax())]} ({float(said[-1].max()):.2f})",
            self.reason: why,
        }


class ClipMap(Explorer):
    """A map of clips, as UMAP places their features: the one that is chosen plays.

    ``points [N, 2]``, ``videos [N, f, h, w, 3]`` and ``labels [N]``, -1 unknown, are of one order.
    """

    size, widths = (9.0, 3.8), (2.0, 1.0)

    def __init__(
        self,
        points: np.ndarray,
        videos: UInt8[np.ndarray, "n f h w 3"],
        labels: Labels,
        names: Names,
    ) -> None:
        self.points, self.videos, self.labels, self.names = points, videos, labels, names
        self.order = np.argsort(points[:, 0], kind="stable").tolist()  # from left to right
        places = range(len(points))
        super().__init__(place=Control("clip, from the left", places, 0, still=12))

    def draw(self, axes: Panels, place: int) -> Numbers:
        clip = self.order[place]
        plots.plot_embedding(self.points, self.labels, self.names, axes[0])
        axes[0].scatter(*self.points[clip], s=150, fc="none", ec=plots.INK, lw=2)
        play(axes[1], self.videos[clip][::2])
        label = int(self.labels[clip])
        return {"clip": str(clip), "shows": self.names[label] if label >= 0 else "not labelled"}


class TrainingReplay(Explorer):
    """A training as it went: a student's losses and features, and both graphs' edges, by epoch.

    ``history`` is of the student; ``features [epochs, N, d]`` of some clips after each epoch are
    seen along the two main axes of the last one; ``teachers [moments, K]`` and
    ``pairs [moments, E]`` are mean weights.
    """

    size, panels, rows, widths = (11.5, 6.6), 4, 2, (1.0, 1.0)

    def __init__(
        self,
        history: Sequence[Mapping[str, float]],
        features: Float[Tensor, "epochs n d"],
        labels: Labels,
        class_names: Names,
        teachers: Float[Tensor, "moments k"],
        pairs: Float[Tensor, "moments e"],
        names: Names,
        pair_names: Names,
    ) -> None:
        self.history, self.labels, self.class_names = history, labels, class_names
        self.edges = (teachers, names, "teachers"), (pairs, pair_names, "pairs")
        centred = features - features.mean(1, keepdim=True)
        main = torch.linalg.svd(centred[-1], full_matrices=False).Vh[:2]
        self.points = (centred @ main.T).numpy()
        epochs = range(len(history))
        super().__init__(epoch=Control("epoch", epochs, epochs[-1], still=12, kind="player"))

    def draw(self, axes: Panels, epoch: int) -> Numbers:
        losses, clips, *edges = axes
        done, row = (epoch + 1) / len(self.history), self.history[epoch]
        keys = [key for key in self.history[0] if key not in ("epoch", "loss")]
        plots.plot_history(self.history, keys, losses)
        losses.axvline(epoch, color=plots.INK, lw=1)
        losses.set_ylabel("losses")
        plots.plot_embedding(self.points[epoch], self.labels, self.class_names, clips)
        widest = 1.05 * np.abs(self.points).max((0, 1))
        clips.set(xlim=(-widest[0], widest[0]), ylim=(-widest[1], widest[1]))
        clips.set_title(f"features of {len(self.labels)} clips after epoch {epoch}", loc="left")
        for ax, (weights, names, what) in zip(edges, self.edges, strict=True):
            moment = min(int(epoch / len(self.history) * len(weights)), len(weights) - 1)
            plots.plot_edges_over_training(weights, names, ax)
            ax.axvline(moment, color=plots.INK, lw=1)
            ax.set_title(f"{what}, moment {moment}", loc="left")
        return {"done": f"{done:.0%}"} | {key: float(row[key]) for key in keys}


class ModelPicker(Explorer):
    """Which model for so many milliseconds a clip: the most accurate one that keeps the budget.

    ``table`` is of :func:`gdviz.experiment.report.tradeoff`.
    """

    size, panels = (8.0, 3.8), 1

    def __init__(self, table: pd.DataFrame) -> None:
        self.table: Any = table
        budgets = log_scale(0.8 * self.table["ms"].min(), 1.25 * self.table["ms"].max(), 25)
        start = budgets[len(budgets) // 2]
        super().__init__(budget=Control("budget, ms a clip", budgets, start, still=25))

    def draw(self, axes: Panels, budget: float) -> Numbers:
        comparisons.plot_front(self.table, "ms", axes[0])
        axes[0].axvspan(budget, axes[0].get_xlim()[1], color=plots.FAINT, alpha=0.15, lw=0)
        within = self.table[self.table["ms"] <= budget]
        if not len(within):
            return {"take": f"none takes {budget:g} ms"}
        best = within.loc[within["mean"].idxmax()]
        ring = {"s": 200, "fc": "none", "ec": plots.INK, "lw": 1.5}
        axes[0].scatter(best["ms"], best["mean"], **ring)
        accuracy = f"{best['mean']:.1f} % ({best['low']:.1f} to {best['high']:.1f})"
        name = best["label"] if best["kind"] == "student" else best["name"]
        return {
            "take": f"{best['network']}, {name}",
            "right on": accuracy,
            "ms to spare": budget - float(best["ms"]),
            "parameters": f"{best['params']:,.0f}",
        }


class MotionPlayer(Explorer):
    """Plays videos, frame by frame or by the clock."""

    size, panels = (3.0, 3.0), 1

    def __init__(self, videos: UInt8[np.ndarray, "n f h w 3"], titles: Names) -> None:
        self.videos, self.titles = videos, titles
        clips, frames = map(range, videos.shape[:2])
        super().__init__(
            clip=Control("clip", clips, 0, still=3),
            frame=Control("frame", frames, 0, still=20, kind="player"),
        )

    def draw(self, axes: Panels, clip: int, frame: int) -> Numbers:
        axes[0].imshow(self.videos[clip, frame], interpolation="nearest")
        axes[0].set_title(plots.as_text(self.titles)[clip])
        axes[0].axis("off")
        return {"clip": self.titles[clip], "frame": f"{frame + 1} of {self.videos.shape[1]}"}

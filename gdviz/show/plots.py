"""Figures: ``plot_*(data, ax=None) -> Axes``, no input or output, no lasting change of settings.

Arrays may be numpy's or torch's. Categories differ by colour *and* by marker or line style, weights
by colour *and* width. ``save_figure`` is the only function that writes.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import matplotlib as mpl
import networkx as nx
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from scipy.optimize import isotonic_regression

from gdviz.core.files import atomic

Names = Sequence[str]
Place = Axes | None  # where to draw; None: in a new figure
# petroff6, darkened to a contrast of 3 on white; as far apart for colour-blind readers as before
PALETTE = ("#4a8cfa", "#d68300", "#d0202f", "#80307a", "#88888d", "#5210b0")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h", "*")
LINES = ("-", "--", "-.", ":")
INK, FAINT = "#222222", "#6e6e6e"
# cividis from a visible yellow to dark blue: on white the heavier edge must be the darker one
_WEIGHTS = mpl.colormaps["cividis_r"](np.linspace(0.12, 1, 128))
WEIGHTS = LinearSegmentedColormap.from_list("weights", _WEIGHTS)
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": mpl.cycler(color=PALETTE),
    "image.cmap": "cividis",
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 200,
    "pdf.fonttype": 42,  # text stays text
    "svg.fonttype": "none",
    "svg.hashsalt": "gdviz",
}
style = partial(mpl.rc_context, STYLE)  # for a ``with`` block, or a decorator
NUMBERED = 5  # teachers of a graph whose edges have room for numbers
NAMED = 12  # lines or classes of which each has room for its name
_SHAPES = {"teacher": "o", "consensus": "D", "student": "s"}
_CENTRED: dict[str, Any] = {"ha": "center", "va": "center"}
_ON_WHITE = {"boxstyle": "round,pad=0.12", "fc": "white", "ec": "none", "alpha": 0.92}


def save_figure(fig: Figure, folder: Path | str, stem: str) -> list[Path]:
    """Write ``stem.pdf``, ``.svg`` and ``.png``; the same figure gives the same bytes.

    Raises:
        UserError: the disk refused the write.
    """
    no_dates = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {"Software": None}}
    paths = [Path(folder) / f"{stem}.{kind}" for kind in no_dates]
    with style():
        fig.set_dpi(STYLE["savefig.dpi"])  # small text is narrower at a lower resolution
        fig.draw_without_rendering()
        fig.set_layout_engine("none")  # solved anew, it would move by a fraction of a pixel
        for path, (kind, metadata) in zip(paths, no_dates.items(), strict=True):
            with atomic(path) as temporary:
                fig.savefig(temporary, format=kind, metadata=metadata)
    return paths


def _array(values: Any) -> np.ndarray:
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def _axes(ax: Place, width: float = 5.6, height: float = 3.6) -> Axes:
    return plt.subplots(figsize=(width, height))[1] if ax is None else ax


def figure_of(ax: Axes) -> Figure:
    """Return the figure that holds a plot."""
    return cast(Figure, ax.figure)


def _apart(places: np.ndarray, gap: float) -> np.ndarray:
    """Move numbers as little as needed (least squares) for each two to be ``gap`` apart."""
    order, steps = np.argsort(places, kind="stable"), gap * np.arange(len(places))
    moved = np.empty(len(places))
    moved[order] = isotonic_regression(places[order] - steps).x + steps
    return moved


def _name(ax: Axes, names: Names, points: np.ndarray, colours: Names, side: int = 1) -> None:
    """Name points right (``side`` 1) or left (-1) of them and apart, each joined by a line."""
    figure_of(ax).draw_without_rendering()  # lays out: how high is the plot?
    inches = ax.get_window_extent().height / figure_of(ax).dpi
    heights = points[:, 1] * 72 * inches / np.ptp(ax.get_ylim())
    ups = _apart(heights, 12) - heights
    look: dict[str, Any] = {"textcoords": "offset points", "va": "center"}
    look["ha"] = "left" if side > 0 else "right"
    lead = {"arrowstyle": "-", "lw": 0.8, "shrinkA": 1, "relpos": (0 if side > 0 else 1, 0.5)}
    for name, point, up, colour in zip(names, points, ups, colours, strict=True):
        ax.annotate(name, point, (18 * side, up), arrowprops=lead | {"color": colour}, **look)


def _number(value: float, digits: int = 2) -> str:
    """Return a number as cells hold it, without a zero before the point."""
    return f"{value:.{digits}f}".removeprefix("0")


def _edge(
    ax: Axes, a: Any, b: Any, share: float, gid: str, bend: float = 0.0, dashed: bool = False
) -> None:
    """Draw an edge; ``share`` is its weight as a share of the heaviest."""
    look: dict[str, Any] = {"lw": 0.8 + 5.2 * share, "zorder": 1 + share}
    if dashed:
        look = {"lw": 0.6 + share, "ls": (0, (4, 3))}
    curve = {"arrowstyle": "-", "connectionstyle": f"arc3,rad={bend}", "shrinkA": 0, "shrinkB": 0}
    ax.add_patch(FancyArrowPatch(a, b, color=WEIGHTS(share), gid=gid, **look, **curve))


def _vertex(ax: Axes, place: Any, kind: str) -> None:
    colour = PALETTE[list(_SHAPES).index(kind)]
    ax.scatter(*place, s=200, marker=_SHAPES[kind], c=colour, ec=INK, lw=1, zorder=3)


def _finish_graph(ax: Axes, norm: Normalize, heaviest: float, note: str) -> None:
    """Add a note below and the colour bar, pointed if a weight lies beyond it."""
    over = "max" if heaviest > (norm.vmax or 0) * (1 + 1e-6) else "neither"
    bar = ScalarMappable(norm, WEIGHTS)
    ax.figure.colorbar(bar, ax=ax, extend=over, shrink=0.8, pad=0.02, label="edge weight")
    ax.text(0.5, -0.02, note, transform=ax.transAxes, ha="center", va="top")
    ax.set_aspect("equal")
    ax.axis("off")


@style()
def plot_logits_graph(graph: nx.Graph, ax: Place = None, *, vmax: float | None = None) -> Axes:
    """Draw ``LogitsGraph.to_networkx``: teachers, their consensus and the student, left to right.

    A teacher's weight stands beside its name: its edges to consensus and student both have it.
    Dashed are the couplings of two teachers, of up to ``NUMBERED`` of them. Give panels to be
    compared the same ``vmax``, the weight at the end of the colour bar; by default the heaviest
    teacher's. The consensus' weight beta may lie beyond it: the bar is then pointed.
    """
    edges = [edge for *_, edge in graph.edges(data=True)]
    weights = {edge["columns"]: edge["weight"] for edge in edges if edge["kind"] == "matching"}
    glued = 1 < len(weights) <= NUMBERED
    ax = _axes(ax, 5.6, max(2.8, 0.8 + 0.22 * len(weights)))
    rows = np.linspace(1, -1, len(weights))
    at = {name: (0.0, y) for name, y in zip(weights, rows, strict=True)}
    at |= {"consensus": (1.3, 0.0), "student": (2.6, 0.0)}
    norm = Normalize(0, vmax or max(weights.values()), clip=True)
    for edge in edges:
        kind, a, b = edge["kind"], edge["rows"], edge["columns"]
        around = 0.25 if at[b][1] >= 0 else -0.25  # from the student past the consensus
        bend = {"matching": 0.0, "glued": 0.35, "distillation": around * (b != "consensus")}[kind]
        if kind != "glued" or glued:
            share = float(norm(edge["weight"]))
            _edge(ax, at[a], at[b], share, f"{kind}:{a}|{b}", bend, dashed=kind == "glued")
    for node in graph:
        _vertex(ax, at[node], graph.nodes[node]["kind"])
    left = -0.45 if glued else -0.15
    for name, weight in weights.items():
        ax.text(left, at[name][1], f"{name}  {weight:.2f}", ha="right", va="center")
    offset: dict[str, Any] = {"textcoords": "offset points", "va": "center"}
    ax.annotate("consensus", at["consensus"], (6, -12), **offset)
    if "student" in graph:
        ax.annotate("student", at["student"], (12, 0), **offset)
        ax.text(1.95, 0.06, f"beta {graph.graph['beta']:.2f}", ha="center", va="bottom")
    room = 0.3 + 0.08 * (6 + max(map(len, weights)))  # for names
    ax.set(xlim=(left - room, 3.3 if "student" in graph else 1.9), ylim=(-1.15, 1.15))
    note = "dashed: teacher to teacher, read off the joint coupling" if glued else ""
    _finish_graph(ax, norm, max(edge["weight"] for edge in edges), note)
    return ax


@style()
def plot_representation_graph(graph: nx.Graph, ax: Place = None) -> Axes:
    """Draw ``RepresentationGraph.to_networkx`` over the teachers: an edge is a pair of them.

    On an edge stand its learned weight and the pair's distance to the student's counterpart. Beyond
    ``NUMBERED`` teachers both are in a matrix instead: weights below the diagonal, distances above.
    """
    pairs = {graph.nodes[p]["teachers"]: edge for _, p, edge in graph.edges("student", data=True)}
    names = list(dict.fromkeys(name for pair in pairs for name in pair))
    distance = {"mmd": "MMD²", "cka": "1 - CKA", "coral": "CORAL"}[graph.graph["distance"]]
    if len(names) > NUMBERED:
        return _pair_matrix(names, pairs, distance, ax)
    ax = _axes(ax, 6.0, 4.0)
    turn = np.pi / 2 + np.pi * (1 - 2 * np.arange(len(names))) / len(names)
    at = dict(zip(names, np.stack([np.cos(turn), np.sin(turn)], 1), strict=True))
    heaviest = max(edge["weight"] for edge in pairs.values())
    norm = Normalize(0, heaviest)
    for (a, b), edge in pairs.items():
        if a != b:  # a single teacher's vertex is its ensemble with itself
            _edge(ax, at[a], at[b], float(norm(edge["weight"])), f"pair:{a}|{b}")
        # the diagonals of a square meet in the middle
        reach = 0.32 if len(names) == 4 and np.allclose(at[a], -at[b]) else 0.5
        x, y = at[a] + reach * (at[b] - at[a]) + (0, 0.3 * (a == b))
        text = f"{edge['weight']:.2f}\n{edge['distance']:.3f}"
        ax.text(x, y, text, bbox=_ON_WHITE, zorder=4, **_CENTRED)
    for name, (x, y) in at.items():
        _vertex(ax, (x, y), "teacher")
        ha = "center" if abs(x) < 0.1 else "left" if x > 0 else "right"
        ax.annotate(name, (x, y), (12 * x, 14 * y), textcoords="offset points", ha=ha, va="center")
    room = 1.2 + 0.065 * max(map(len, names))  # for names
    ax.set(xlim=(-room, room), ylim=(-1.4, 1.2))
    _finish_graph(ax, norm, heaviest, f"on an edge: learned weight, {distance} to the student")
    return ax


def _pair_matrix(names: Names, pairs: Mapping[Any, Any], distance: str, ax: Place) -> Axes:
    weights = np.full((len(names), len(names)), np.nan)
    for (a, b), edge in pairs.items():
        weights[names.index(b), names.index(a)] = edge["weight"]
    note = f"below the diagonal: learned weight; above: {distance} to the student"
    ax = _heat(weights, names, ("", note, "edge weight"), ax, WEIGHTS)
    for (a, b), edge in pairs.items():
        text = _number(edge["distance"])
        ax.text(names.index(b), names.index(a), text, fontsize=6, **_CENTRED)
    return ax


def _heat(
    matrix: Any, labels: Names, about: Names, ax: Place, cmap: Any = "cividis", digits: int = 2
) -> Axes:
    """Draw a matrix ``about`` rows, columns and values; of more than ``NAMED`` without numbers."""
    ax, values = _axes(ax, 5.2, 4.2), _array(matrix).astype(float)
    image = ax.imshow(values, cmap, aspect="auto", interpolation="nearest", vmin=0)
    ax.figure.colorbar(image, ax=ax, shrink=0.8, label=about[2])
    few, step = len(labels) <= NAMED, 1 + (len(labels) - 1) // 30
    for (row, column), value in np.ndenumerate(values):
        if few and round(value, digits) > 0:
            light = image.to_rgba(value)[1] > 0.45  # green: most of what the eye calls light
            look = {"color": INK if light else "white", "fontsize": 6, **_CENTRED}
            ax.text(column, row, _number(value, digits), **look)
    turned: dict[str, Any] = {"rotation": 90}
    if few:
        turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    at, named, size = range(0, len(labels), step), list(labels)[::step], 8 if few else 6
    ax.set_yticks(at, named, fontsize=size)
    ax.set_xticks(at, named, fontsize=size, **turned)
    ax.set(ylabel=about[0], xlabel=about[1])
    return ax


@style()
def plot_plan(plan: Any, labels: Names, rows: str, columns: str, ax: Place = None) -> Axes:
    """Draw a plan ``[C, C]``: the mass of class i at ``rows`` that goes to j at ``columns``."""
    return _heat(plan, labels, (rows, columns, "mass"), ax)


@style()
def plot_cost(cost: Any, labels: Names, ax: Place = None) -> Axes:
    """Draw a ground cost ``[C, C]``, of unit mean off the diagonal."""
    about = "class meant", "class said", "ground cost (mean 1)"
    return _heat(cost, labels, about, ax, digits=1)


@style()
def plot_confusion(counts: Any, labels: Names, ax: Place = None) -> Axes:
    """Draw confusions ``[C, C]`` (rows: truth) as shares of a row; one without clips is empty."""
    counts = _array(counts).astype(float)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    about = "true class", "predicted class", "share of the true class"
    return _heat(shares, labels, about, ax)


def _lines(x: np.ndarray, series: np.ndarray, names: Names, ax: Axes, shares: bool = False) -> Axes:
    """Draw one line a name, thin unless it ends among the ``NAMED`` highest; name those."""
    last = [np.flatnonzero(np.isfinite(y))[-1] for y in series]
    ends = np.array([(x[at], y[at]) for y, at in zip(series, last, strict=True)])
    named = sorted(np.argsort(-ends[:, 1], kind="stable")[:NAMED].tolist())
    every = max(1, len(x) // 8)
    for k, y in enumerate(series):
        look: dict[str, Any] = {"color": FAINT, "lw": 0.5, "zorder": 1}
        if k in named:
            look = {"color": PALETTE[k % 6], "ls": LINES[k // 6 % 4], "marker": MARKERS[k % 11]}
        ax.plot(x, y, ms=4, markevery=(k % every, every), **look)
    ax.set(xlabel="epoch")
    if shares:
        ax.set_ylim(0, 1.06 * series.max())
    _name(ax, [str(names[k]) for k in named], ends[named], [PALETTE[k % 6] for k in named])
    return ax


@style()
def plot_edges_over_training(history: Any, names: Names, ax: Place = None) -> Axes:
    """Draw weights ``[moments, n]`` of n edges, and the uniform weight 1 / n, dotted.

    Of more than ``NAMED`` edges those that end heaviest are named; the others are thin.
    """
    history, uniform = _array(history), 1 / len(names)
    ax = _lines(np.arange(len(history)), history.T, names, _axes(ax), shares=True)
    ax.axhline(uniform, color=FAINT, ls=":", lw=1.2)
    ax.set(xlabel="moment of the training", ylabel=f"edge weight (dotted: uniform, {uniform:.2g})")
    ax.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    return ax


@style()
def plot_history(history: Sequence[Mapping[str, float]], keys: Names, ax: Place = None) -> Axes:
    """Draw the numbers ``keys`` of rows as trainings return them; missing ones leave a gap."""
    rows = pd.DataFrame(list(history))
    rows = rows if "epoch" in rows else rows.assign(epoch=rows.index)
    return _lines(rows["epoch"].to_numpy(), rows[list(keys)].to_numpy(float).T, keys, _axes(ax))


@style()
def plot_embedding(points: Any, labels: Any, names: Names, ax: Place = None) -> Axes:
    """Scatter ``points [N, 2]`` by class; clips without a label (-1) are faint dots.

    Up to twice ``NAMED`` classes are in a legend; of more, names stand at their classes' medians,
    the most frequent first, where there is room.
    """
    ax, points, labels = _axes(ax, 5.2, 3.8), _array(points), _array(labels)
    few = len(names) <= 2 * NAMED
    if (labels < 0).any():
        ax.scatter(*points[labels < 0].T, s=7, c="#bbbbbb", lw=0, label="unlabelled")
    for k, name in enumerate(names):
        look = {"marker": MARKERS[k % 11], "c": PALETTE[k % 6], "ec": "white", "lw": 0.4}
        ax.scatter(*points[labels == k].T, s=28 if few else 10, label=name, **look)
    ax.set(xticks=[], yticks=[], xlabel="first coordinate", ylabel="second coordinate")
    if few:
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), ncols=1 + len(names) // 13)
        return ax
    ax.margins(0.15)
    figure_of(ax).draw_without_rendering()  # lays out: how large is the plot?
    taken: list[Any] = []
    for k in pd.Series(labels[labels >= 0]).value_counts().index:
        x, y = np.median(points[labels == k], axis=0)
        text = ax.text(x, y, names[k], fontsize=6, bbox=_ON_WHITE, **_CENTRED)
        if text.get_window_extent().count_overlaps(taken):
            text.remove()
        else:
            taken.append(text.get_window_extent())
    return ax


def embed(features: Any, seed: int = 0) -> np.ndarray:
    """Return UMAP's ``[N, 2]`` of ``features [N, d]`` (McInnes et al. 2018).

    It repeats itself on one kind of machine only.
    """
    x = _array(features)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"umap|numba|pynndescent|sklearn")
        import umap

        neighbours = min(15, len(x) - 1)
        return umap.UMAP(n_neighbors=neighbours, random_state=seed, n_jobs=1).fit_transform(x)


@style()
def plot_accuracy(results: pd.DataFrame, ax: Place = None, *, chance: float | None = None) -> Axes:
    """Draw each model's mean accuracy, standard deviation and, as ticks, its seeds.

    Rows as of ``Run.results``: ``kind``, ``name``, ``label``, ``accuracy`` in [0, 1], ``colour``
    (of the palette), ``marker``, ``headline`` (in bold), ``shuffled`` (the control, in italics).
    """
    models = _models(results)
    ax = _axes(ax, 5.6, 0.8 + 0.24 * len(models))
    for y, rows in enumerate(models):
        model, values = rows.iloc[0], 100 * rows["accuracy"].to_numpy()
        spread = values.std(ddof=1) if len(values) > 1 else 0.0
        colour = PALETTE[model["colour"]]
        look = {"fmt": model["marker"], "ms": 6, "mec": INK, "mew": 0.6, "capsize": 3, "zorder": 3}
        ax.errorbar(values.mean(), y, xerr=spread, color=colour, **look)
        ax.plot(values, np.full(len(values), y + 0.26), "|", color=colour, ms=6, zorder=2)
        number = f"{values.mean():.1f}" + (f" ± {spread:.1f}" if len(values) > 1 else "")
        beside = {"transform": ax.get_yaxis_transform(), "va": "center"}
        beside["fontweight"] = "bold" if model["headline"] else "normal"
        beside["fontstyle"] = "italic" if model["shuffled"] else "normal"
        ax.text(-0.02, y, _full_name(model), ha="right", **beside)
        ax.text(1.02, y, number, **beside)
    if chance is not None:
        ax.axvline(100 * chance, color=FAINT, ls=":", lw=1)
        above = {"transform": ax.get_xaxis_transform(), "va": "bottom"}
        ax.text(100 * chance, 1, " chance", color=FAINT, **above)
    ax.set(yticks=[], ylim=(len(models) - 0.4, -0.6))
    ax.set_xlabel("top-1 accuracy, % (mean ± standard deviation; ticks: seeds)")
    return ax


def _models(results: pd.DataFrame) -> list[pd.DataFrame]:
    """Return the rows of each model, in the order of first appearance."""
    return [rows for _, rows in results.groupby(["kind", "name"], sort=False)]


def _full_name(model: Any) -> str:
    return f"teacher: {model['label']}" if model["kind"] == "teacher" else model["label"]


@style()
def plot_tradeoff(
    results: pd.DataFrame,
    x: Literal["latency_ms", "params", "gflops"] = "latency_ms",
    ax: Place = None,
) -> Axes:
    """Draw each model's mean accuracy against its cost, the column ``x``, on a log scale.

    Other columns are :func:`plot_accuracy`'s. The cheaper half is named on the left.
    """
    ax, models = _axes(ax), _models(results)
    points = np.array([(rows[x].mean(), 100 * rows["accuracy"].mean()) for rows in models])
    firsts = [rows.iloc[0] for rows in models]
    for point, model in zip(points, firsts, strict=True):
        look = {"marker": model["marker"], "c": PALETTE[model["colour"]], "ec": INK, "lw": 0.6}
        ax.scatter(*point, s=40, zorder=3, **look)
    costs = {"latency_ms": "latency, ms a clip", "params": "parameters", "gflops": "GFLOPs a clip"}
    ax.set(xscale="log", xlabel=costs[x], ylabel="top-1 accuracy, %")
    ax.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5)))
    ax.xaxis.set_major_formatter(ticker.EngFormatter(sep="") if x == "params" else "{x:g}")
    ax.xaxis.set_minor_formatter("")
    ax.margins(0.9, 0.15)
    cheap = points[:, 0] <= np.sqrt(points[:, 0].min() * points[:, 0].max())
    for side, half in ((-1, np.flatnonzero(cheap)), (1, np.flatnonzero(~cheap))):
        names = [_full_name(firsts[k]) for k in half]
        _name(ax, names, points[half], [PALETTE[firsts[k]["colour"]] for k in half], side)
    return ax


@style()
def plot_filmstrip(
    clips: Any,
    titles: Names | None = None,
    ax: Place = None,
    *,
    columns: Names | None = None,
    every: int = 1,
) -> Axes:
    """Draw every so many frames of n clips, a clip a row.

    Clips are normalised floats ``[n, 3, t, h, w]``, (x - 0.5) / 0.25, or uint8 ``[n, t, h, w, 3]``,
    or ``[t, h, w, 3]`` of one clip; ``columns`` are written over frames instead of their numbers.
    """
    frames = _array(clips)
    if frames.dtype != np.uint8:
        unit = np.clip(frames.transpose(0, 2, 3, 4, 1) * 0.25 + 0.5, 0, 1)
        frames = (255 * unit).round().astype(np.uint8)
    frames = frames.reshape(-1, *frames.shape[-4:])[:, ::every]
    n, t, height, width = frames.shape[:4]
    ax = _axes(ax, 0.9 * t + 0.9, 0.9 * n + 0.3)
    gap = 1 + width // 24
    framed = np.pad(frames, [(0, 0), (0, 0), (0, gap), (0, gap), (0, 0)], constant_values=255)
    height, width = height + gap, width + gap
    ax.imshow(framed.swapaxes(1, 2).reshape(n * height, t * width, 3), interpolation="nearest")
    numbers = [f"{every * j}" if j else "frame 0" for j in range(t)]
    ax.set_xticks((np.arange(t) + 0.5) * width, columns or numbers)
    ax.set_yticks((np.arange(n) + 0.5) * height, titles or [""] * n)
    ax.tick_params(length=0, labeltop=True, labelbottom=False)
    ax.spines[:].set_visible(False)
    return ax

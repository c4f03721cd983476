"""Figures: ``plot_*(data, ax=None) -> Axes``, no input or output, no lasting change of matplotlib's settings.

Arrays may be numpy's or torch's. Categories differ by colour *and* by marker or line style; weights by
colour *and* width. ``save_figure`` is the only function that writes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from matplotlib.transforms import Bbox
from scipy.optimize import isotonic_regression

from gdviz.core.files import atomic

if TYPE_CHECKING:
    import networkx as nx

PALETTE = ("#5790fc", "#f89c20", "#e42536", "#964a8b", "#9c9ca1", "#7a21dd")  # petroff6
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h", "*")
LINES = ("-", "--", "-.", ":")
INK, FAINT = "#222222", "#6e6e6e"
#: cividis from a visible yellow to dark blue: on white paper the heavier edge must be the darker one.
WEIGHTS = LinearSegmentedColormap.from_list(
    "weights", mpl.colormaps["cividis_r"](np.linspace(0.12, 1, 128))
)
METHOD_NAMES = {
    "labels": "labels only", "kd-best": "best teacher (KD)", "kd-uniform": "uniform average (KD)",
    "logits-graph": "logits graph", "representation-graph": "representation graph", "both-graphs": "both graphs",
    "both-shuffled": "shuffled teachers (control)",
}  # fmt: skip
_NODES = {
    "teacher": ("o", PALETTE[0]),
    "pair": ("h", PALETTE[0]),
    "consensus": ("D", PALETTE[1]),
    "student": ("s", PALETTE[2]),
}
_RC = {
    "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 10, "axes.labelsize": 9, "legend.fontsize": 8,
    "xtick.labelsize": 8, "ytick.labelsize": 8, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": FAINT,
    "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False,
    "axes.prop_cycle": mpl.cycler(color=PALETTE), "image.cmap": "cividis", "legend.frameon": False,
    "figure.constrained_layout.use": True, "figure.figsize": (5.6, 3.6), "savefig.dpi": 200,
    "pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "gdviz",
}  # fmt: skip


@contextmanager
def style(**overrides: Any) -> Iterator[None]:
    """Fonts, sizes and colours of every figure here, for a ``with`` block or as a decorator."""
    with mpl.rc_context(_RC | overrides):
        yield


def save_figure(fig: Figure, folder: Path | str, stem: str) -> list[Path]:
    """Writes ``stem.pdf``, ``.svg`` and ``.png``; the same figure gives the same bytes.

    The layout is solved by the first call and then stays: solved again it would move by a fraction of a pixel.

    Raises:
        UserError: the disk refused the write.
    """
    no_dates = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {"Software": None}}
    paths = [Path(folder) / f"{stem}.{kind}" for kind in no_dates]
    with style():
        fig.draw_without_rendering()
        fig.set_layout_engine("none")
        for path, (kind, metadata) in zip(paths, no_dates.items(), strict=True):
            with atomic(path) as temporary:
                fig.savefig(temporary, format=kind, metadata=metadata)
    return paths


def _array(values: Any) -> np.ndarray:
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def _axes(ax: Axes | None, width: float = 5.6, height: float = 3.6) -> Axes:
    return plt.subplots(figsize=(width, height))[1] if ax is None else ax


def _draw_graph(
    graph: nx.Graph,
    at: Mapping[str, tuple[float, float]],
    texts: Mapping[str, str],
    vmax: float,
    ax: Axes,
) -> None:
    """Vertices by shape, edges by width and colour under one norm from 0 to ``vmax``, and the colour bar.

    Weights are printed on all but glued edges, and beyond four teachers on the consensus' only: a
    student's edge has its teacher's weight.
    """
    norm = Normalize(0, vmax, clip=True)
    box = {"boxstyle": "round,pad=0.12", "fc": "white", "ec": "none", "alpha": 0.92}
    kinds = dict(graph.nodes(data="kind"))
    crowded = list(kinds.values()).count("teacher") > 4
    for *ends, edge in sorted(graph.edges(data=True), key=lambda e: e[2]["weight"]):
        u, v = sorted(ends, key=lambda node: (node != "student", node != "consensus"))  # hub first
        kind, share, a, b = (
            edge["kind"],
            float(norm(edge["weight"])),
            np.array(at[u]),
            np.array(at[v]),
        )
        # Glued edges bow away from the consensus, and so does the student's edge to a teacher behind it.
        hidden = kind == "distillation" and b[1] > 0.5 and abs(b[0]) < 0.1
        bend = 0.22 * (np.sign(a[0] * b[1] - a[1] * b[0]) or 1) if kind == "glued" else 0.3 * hidden
        look = (
            {"ls": (0, (4, 3)), "lw": 0.6 + share, "zorder": 1}
            if kind == "glued"
            else {"lw": 0.8 + 5.2 * share, "zorder": 2}
        )
        curve = {
            "arrowstyle": "-",
            "connectionstyle": f"arc3,rad={bend}",
            "shrinkA": 0,
            "shrinkB": 0,
        }
        ax.add_patch(
            FancyArrowPatch(a, b, color=WEIGHTS(share), gid=f"{kind}:{u}|{v}", **look, **curve)
        )
        if (
            kind in ("matching", "distance")
            or v == "consensus"
            or (kind == "distillation" and not (crowded or hidden))
        ):
            reach = 0.95 / np.linalg.norm(b - a) if kind == "distillation" else 0.58
            ax.text(
                *(a + (b - a) * reach),
                f"{edge['weight']:.2f}",
                ha="center",
                va="center",
                fontsize=8,
                bbox=box,
                zorder=4,
            )
    for kind in dict.fromkeys(kinds.values()):
        members, (marker, colour) = (
            np.array([at[node] for node in graph if kinds[node] == kind]),
            _NODES[kind],
        )
        ax.scatter(*members.T, s=230, marker=marker, c=colour, ec=INK, lw=1, zorder=3, label=kind)
    for node, text in texts.items():
        (x, y), above = at[node], at[node][1] > 0
        ha, va = (
            ("left" if x > 0 else "right", "center")
            if abs(x) > 0.35
            else ("center", "bottom" if above else "top")
        )
        shift = (12 * np.sign(x), 0) if abs(x) > 0.35 else (0, 11 if above else -11)
        ax.annotate(
            text, (x, y), shift, textcoords="offset points", ha=ha, va=va, bbox=box, zorder=3.5
        )
    over = any(edge["weight"] > vmax * (1 + 1e-6) for *_, edge in graph.edges(data=True))
    bar = ax.figure.colorbar(
        ScalarMappable(norm, WEIGHTS),
        ax=ax,
        extend="max" if over else "neither",
        shrink=0.7,
        pad=0.02,
    )
    bar.set_label("edge weight (colour and width)")
    ax.set_aspect("equal")
    ax.axis("off")


@style()
def plot_logits_graph(
    graph: nx.Graph, ax: Axes | None = None, *, vmax: float | None = None
) -> Axes:
    """The logits graph of ``LogitsGraph.to_networkx``: teachers around their consensus, the student outside.

    Give panels to be compared the same ``vmax``, the weight at the end of the colour bar; by default the
    heaviest teacher's. The consensus' weight beta may lie beyond it: the bar is then pointed.
    """
    ax = _axes(ax, 5.6, 5.2)
    teachers = [node for node, kind in graph.nodes(data="kind") if kind == "teacher"]
    turn = -np.pi / 2 + 2 * np.pi * (np.arange(len(teachers)) + 0.5) / len(
        teachers
    )  # a gap below, for the student
    at = {name: (np.cos(t), np.sin(t)) for name, t in zip(teachers, turn, strict=True)}
    at |= {"consensus": (0.0, 0.0), "student": (0.0, -1.9)}
    heaviest = max(graph.edges["consensus", name]["weight"] for name in teachers)
    _draw_graph(graph, at, dict(zip(graph, graph, strict=True)), vmax or heaviest, ax)
    if len(teachers) > 1:
        ax.plot(
            [],
            [],
            ls=(0, (4, 3)),
            lw=1,
            color=FAINT,
            label="teacher to teacher, read off the joint coupling",
        )
        ax.legend(handles=ax.lines[-1:], loc="upper center", bbox_to_anchor=(0.5, 0.0))
    ax.set(xlim=(-1.25, 1.25), ylim=(-2.15 if "student" in graph else -1.2, 1.2))
    return ax


@style()
def plot_representation_graph(
    graph: nx.Graph, ax: Axes | None = None, *, vmax: float | None = None
) -> Axes:
    """The representation graph: one vertex a pair of teachers, around the student; same encoding."""
    ax = _axes(ax, 5.6, 4.6)
    pairs = [node for node in graph if node != "student"]
    turn = np.pi / 2 + 2 * np.pi * np.arange(len(pairs)) / len(pairs)
    at = {name: (np.cos(t), np.sin(t)) for name, t in zip(pairs, turn, strict=True)} | {
        "student": (0.0, 0.0)
    }
    distance = {"mmd": "MMD²", "cka": "1 - CKA", "coral": "CORAL"}[graph.graph["distance"]]
    texts = {
        p: p.replace("+", " +\n") + f"\n{distance} {graph.edges[p, 'student']['distance']:.3f}"
        for p in pairs
    }
    _draw_graph(
        graph,
        at,
        texts | {"student": "student"},
        vmax or max(edge["weight"] for *_, edge in graph.edges(data=True)),
        ax,
    )
    ax.set(xlim=(-1.15, 1.15), ylim=(-1.15, 1.15))
    return ax


def _heat(
    matrix: Any,
    ax: Axes | None,
    labels: Sequence[str],
    scale: str,
    sides: tuple[str, str],
    digits: int = 2,
    vmax: float = 0.0,
) -> Axes:
    """Heat map with a colour bar; numbers in the cells of up to 10 classes, names of up to 30."""
    import seaborn as sns

    ax, values = _axes(ax, 4.8, 4.0), _array(matrix).astype(float)
    numbers = [
        [f"{v:.{digits}f}".removeprefix("0") if round(v, digits) > 0 else "" for v in row]
        for row in values
    ]
    names = list(labels) if len(labels) <= 30 else False
    sns.heatmap(
        values, ax=ax, vmin=0, vmax=vmax or max(values.max(), 1e-12), cmap="cividis", xticklabels=names, yticklabels=names,
        annot=np.array(numbers) if len(labels) <= 10 else None, fmt="", annot_kws={"size": 7}, cbar_kws={"label": scale, "shrink": 0.8},
    )  # fmt: skip
    plt.setp(ax.get_yticklabels(), rotation=0, va="center")
    plt.setp(ax.get_xticklabels(), rotation=45, ha="right", rotation_mode="anchor")
    ax.set(ylabel=sides[0], xlabel=sides[1], box_aspect=1)
    return ax


@style()
def plot_plan(
    plan: Any, labels: Sequence[str], rows: str, columns: str, ax: Axes | None = None
) -> Axes:
    """One transport plan ``[C, C]``: how much mass of class i at ``rows`` goes to class j at ``columns``."""
    return _heat(plan, ax, labels, "mass", (rows, columns))


@style()
def plot_cost(cost: Any, labels: Sequence[str], ax: Axes | None = None) -> Axes:
    """The ground cost ``[C, C]``, unit mean off the diagonal."""
    return _heat(cost, ax, labels, "ground cost (mean 1)", ("class meant", "class said"), digits=1)


@style()
def plot_confusion(counts: Any, labels: Sequence[str], ax: Axes | None = None) -> Axes:
    """Confusion ``[C, C]`` (rows: truth) as shares of each row; a class without clips stays empty."""
    counts = _array(counts).astype(float)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return _heat(
        shares, ax, labels, "share of the true class", ("true class", "predicted class"), vmax=1.0
    )


def _lines(
    x: np.ndarray,
    series: Sequence[np.ndarray],
    names: Sequence[str],
    ax: Axes,
    low: float | None = None,
) -> Axes:
    """One line a name, named right of its end; names are moved apart as little as needed."""
    for k, y in enumerate(series):
        every = max(1, len(x) // 8)
        ax.plot(
            x,
            y,
            LINES[k // 6 % 4],
            color=PALETTE[k % 6],
            marker=MARKERS[k % 11],
            ms=4,
            markevery=(k % every, every),
        )
    ax.set(xlabel="epoch", ylim=(low, None))
    last = [np.flatnonzero(np.isfinite(y))[-1] for y in series]
    ends = np.array([y[at] for y, at in zip(series, last, strict=True)])
    points = (
        ax.get_window_extent().height / ax.figure.dpi * 72 / np.ptp(ax.get_ylim())
    )  # per unit of y
    order, steps = np.argsort(ends, kind="stable"), 11 * np.arange(len(ends))
    place = np.empty(len(ends))
    place[order] = isotonic_regression(ends[order] * points - steps).x + steps
    for k, name in enumerate(names):
        lead = {"arrowstyle": "-", "color": PALETTE[k % 6], "lw": 0.8, "shrinkA": 0, "shrinkB": 2}
        shift = (18, place[k] - ends[k] * points)
        ax.annotate(
            name,
            (x[last[k]], ends[k]),
            shift,
            textcoords="offset points",
            va="center",
            fontsize=8,
            arrowprops=lead,
        )
    return ax


@style()
def plot_edges_over_training(history: Any, names: Sequence[str], ax: Axes | None = None) -> Axes:
    """Weights ``[epochs, n]`` of n edges, one line each, and the uniform weight ``1 / n``, dotted."""
    history = _array(history)
    ax = _lines(np.arange(len(history)), history.T, names, _axes(ax), low=0)
    ax.axhline(
        1 / len(names),
        color=FAINT,
        ls=":",
        lw=1.2,
        zorder=0,
        label=f"uniform, {1 / len(names):.2f}",
    )
    ax.legend(handles=ax.lines[-1:], loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
    ax.set_ylabel("edge weight")
    return ax


@style()
def plot_history(
    history: Sequence[Mapping[str, float]], keys: Sequence[str], ax: Axes | None = None
) -> Axes:
    """Training curves: the numbers ``keys`` of rows such as ``train`` returns; missing ones leave a gap."""
    x = np.array([row.get("epoch", i) for i, row in enumerate(history)])
    return _lines(
        x,
        [np.array([row.get(key, np.nan) for row in history], dtype=float) for key in keys],
        keys,
        _axes(ax),
    )


@style()
def plot_embedding(points: Any, labels: Any, names: Sequence[str], ax: Axes | None = None) -> Axes:
    """Scatter of ``points [N, 2]`` by class; clips without a label (-1) are faint dots."""
    ax, points, labels = _axes(ax, 5.2, 3.8), _array(points), _array(labels)
    if (labels < 0).any():
        ax.scatter(*points[labels < 0].T, s=7, c="#bbbbbb", lw=0, label="unlabelled")
    for k, name in enumerate(names):
        ax.scatter(
            *points[labels == k].T,
            s=28,
            marker=MARKERS[k % 11],
            c=PALETTE[k % 6],
            ec="white",
            lw=0.4,
            label=name,
        )
    if len(names) <= 24:
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), ncols=1 + len(names) // 13)
    ax.set(xticks=[], yticks=[], xlabel="first coordinate", ylabel="second coordinate")
    return ax


def embed(features: Any, seed: int = 0) -> np.ndarray:
    """UMAP of ``features [N, d]`` to ``[N, 2]`` (McInnes et al. 2018): reproducible on one kind of machine only."""
    x = _array(features)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"umap|numba|pynndescent|sklearn")
        import umap

        return umap.UMAP(
            n_neighbors=min(15, len(x) - 1), random_state=seed, n_jobs=1
        ).fit_transform(x)


@style()
def plot_accuracy(
    rows: Sequence[Mapping[str, Any]], ax: Axes | None = None, chance: float | None = None
) -> Axes:
    """Accuracy per method, in the order of first appearance: mean, standard deviation, a tick a seed.

    Rows: ``method`` (a key of ``METHOD_NAMES`` or ``"teacher:<name>"``), ``seed``, ``accuracy`` in [0, 1].
    """
    methods = list(dict.fromkeys(row["method"] for row in rows))
    ax = _axes(ax, 6.0, 0.8 + 0.34 * len(methods))
    ax.set_yticks(
        range(len(methods)),
        [METHOD_NAMES.get(m, m.replace("teacher:", "teacher: ")) for m in methods],
    )
    for y, method in enumerate(methods):
        values = 100 * np.array([row["accuracy"] for row in rows if row["method"] == method])
        spread = values.std(ddof=1) if len(values) > 1 else 0.0
        plain = "s" if method.startswith("teacher:") else "o", FAINT
        marker, colour = {"both-graphs": ("D", PALETTE[0]), "both-shuffled": ("X", PALETTE[2])}.get(
            method, plain
        )
        ax.errorbar(
            values.mean(),
            y,
            xerr=spread,
            fmt=marker,
            ms=7,
            color=colour,
            mec=INK,
            mew=0.6,
            capsize=3,
            zorder=3,
        )
        ax.plot(values, np.full(len(values), y + 0.26), "|", color=colour, ms=6, zorder=2)
        text = f"{values.mean():.1f}" + (f" ± {spread:.1f}" if len(values) > 1 else "")
        number = ax.text(1.02, y, text, transform=ax.get_yaxis_transform(), va="center", fontsize=8)
        for label in (number, ax.get_yticklabels()[y]):
            label.set_fontweight("bold" if method == "both-graphs" else "normal")
            label.set_fontstyle("italic" if method == "both-shuffled" else "normal")
    if chance is not None:
        ax.axvline(100 * chance, color=FAINT, ls=":", lw=1)
        ax.text(
            100 * chance,
            1,
            " chance",
            transform=ax.get_xaxis_transform(),
            va="bottom",
            fontsize=8,
            color=FAINT,
        )
    ax.set(
        xlabel="top-1 accuracy, % (mean ± standard deviation; ticks: seeds)",
        ylim=(len(methods) - 0.4, -0.6),
    )
    return ax


@style()
def plot_tradeoff(
    rows: Sequence[Mapping[str, Any]],
    x: Literal["latency_ms", "params", "gflops"] = "latency_ms",
    ax: Axes | None = None,
) -> Axes:
    """Accuracy against cost on a log scale; rows of ``name``, ``kind``, ``accuracy`` in [0, 1] and the costs."""
    ax, at = _axes(ax), [(row[x], 100 * row["accuracy"]) for row in rows]
    for k, kind in enumerate(dict.fromkeys(row["kind"] for row in rows)):
        of = np.array([point for point, row in zip(at, rows, strict=True) if row["kind"] == kind])
        ax.scatter(*of.T, s=50, marker=MARKERS[k], c=PALETTE[k % 6], ec=INK, lw=0.6, label=kind)
    names = {"latency_ms": "latency, ms a clip", "params": "parameters", "gflops": "GFLOPs a clip"}
    ax.set(xscale="log", xlabel=names[x], ylabel="top-1 accuracy, %")
    ax.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(ticker.EngFormatter(sep="") if x == "params" else "{x:g}")
    ax.xaxis.set_minor_formatter("")
    ax.margins(0.22, 0.15)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4)
    ax.figure.draw_without_rendering()  # sizes on paper are needed to keep the names apart
    taken = [Bbox.from_bounds(*(dot - 4), 8, 8) for dot in ax.transData.transform(at)]
    for row, point in zip(rows, at, strict=True):
        text = ax.annotate(
            METHOD_NAMES.get(row["name"], row["name"]),
            point,
            (8, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
        for dy, side in [(dy, side) for dy in (0, 12, -12, 24, -24) for side in (1, -1)]:
            text.set(position=(8 * side, dy), ha="left" if side > 0 else "right")
            box = text.get_window_extent()
            if ax.bbox.x0 < box.x0 and box.x1 < ax.bbox.x1 and not box.count_overlaps(taken):
                break
        taken.append(box)
    return ax


def plot_filmstrip(
    clips: Any, titles: Sequence[str] | None = None, *, every: int = 1, scale: float = 0.9
) -> Figure:
    """Every so many frames of n clips, one row a clip, time to the right; frames are ``scale`` inches wide.

    Clips: normalised floats ``[n, 3, t, h, w]`` ((x - 0.5) / 0.25) or uint8 ``[n, t, h, w, 3]`` or ``[t, h, w, 3]``.
    """
    frames = _array(clips)
    if frames.dtype != np.uint8:
        frames = np.clip(frames.transpose(0, 2, 3, 4, 1) * 0.25 + 0.5, 0, 1)
    frames = frames[None] if frames.ndim == 4 else frames
    frames = frames[:, ::every]  # (n, t, h, w, 3)
    n, t = frames.shape[:2]
    with style():
        fig, axes = plt.subplots(n, t, figsize=(scale * t + 0.9, scale * n + 0.3), squeeze=False)
        for (i, j), ax in np.ndenumerate(axes):
            ax.imshow(frames[i, j], interpolation="nearest")
            ax.set(xticks=[], yticks=[], title="" if i else f"{j * every}" if j else "frame 0")
            ax.spines[:].set_visible(False)
        for i, title in enumerate(titles or []):
            axes[i, 0].set_ylabel(title, rotation=0, ha="right", va="center")
    return fig

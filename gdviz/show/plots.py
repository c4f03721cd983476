"""Figures: ``plot_*(data, ax=None) -> Axes``, no input or output, no lasting change of settings.

Arrays may be numpy's or torch's. Categories differ by colour *and* by marker or line style, weights
by colour *and* width. ``save_figure`` is the only function that writes.
"""

from __future__ import annotations

import math
import tempfile
import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import matplotlib as mpl
import networkx as nx
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from matplotlib.rcsetup import cycler
from scipy.optimize import isotonic_regression
from threadpoolctl import threadpool_limits

from gdviz.core.files import atomic

Names = Sequence[str]
Place = Axes | None  # where to draw; None: in a new figure
# petroff6, darkened to a contrast of 3 on white; as far apart for colour-blind readers as before
PALETTE = ("#4a8cfa", "#d68300", "#d0202f", "#80307a", "#88888d", "#5210b0")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h", "*")
LINES = ("-", "--", "-.", ":")
INK, FAINT = "#222222", "#6e6e6e"
COLOURS = (*PALETTE, INK)  # of models: teachers have those of the palette, as in the graphs
# cividis from a visible yellow to dark blue: on white the heavier edge must be the darker one
_WEIGHTS = mpl.colormaps["cividis_r"](np.linspace(0.12, 1, 128))
WEIGHTS = LinearSegmentedColormap.from_list("weights", _WEIGHTS)
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=PALETTE),
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
SMALL = 6  # points: the smallest text
WHOLE = 14  # characters of a class's name that every matrix has room for
_CENTRED: dict[str, Any] = {"ha": "center", "va": "center"}
_RIGHT: dict[str, Any] = {"ha": "right", "va": "center"}
OFFSET: dict[str, Any] = {"textcoords": "offset points", "va": "center"}
_ON_WHITE = {"boxstyle": "round,pad=0.12", "fc": "white", "ec": "none", "alpha": 0.92}


def save_figure(fig: Figure, folder: Path | str, stem: str) -> list[Path]:
    """Write ``stem.pdf``, ``.svg`` and ``.png``; the same figure gives the same bytes.

    Raises:
        UserError: the disk refused the write.
    """
    no_dates = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {"Software": None}}
    paths = []
    with style():
        fig.set_dpi(STYLE["savefig.dpi"])  # small text is narrower at a lower resolution
        fig.draw_without_rendering()
        fig.set_layout_engine("none")  # solved anew, it would move by a fraction of a pixel
        for kind, metadata in no_dates.items():
            paths.append(Path(folder) / f"{stem}.{kind}")
            with atomic(paths[-1]) as temporary:
                fig.savefig(temporary, format=kind, metadata=metadata)
    return paths


def figure_of(ax: Axes) -> Figure:
    """Return the figure that holds a plot."""
    return cast(Figure, ax.figure)


def _array(values: Any) -> np.ndarray:
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def axes_or_new(ax: Place, width: float = 5.6, height: float = 3.6) -> Axes:
    """Return ``ax``, or the axes of a new figure of ``width`` by ``height`` inches."""
    return plt.subplots(figsize=(width, height))[1] if ax is None else ax


def look_of(k: int) -> dict[str, Any]:
    """Return colour and marker of category k."""
    return {"c": PALETTE[k % 6], "marker": MARKERS[k % 11]}


def name_points(ax: Axes, names: Any, points: np.ndarray, colours: Names, side: int = 1) -> None:
    """Name points right (``side`` 1) or left (-1) of them, each joined to its name by a line.

    Names move as little as needed (least squares) to be 12 points apart.
    """
    heights = points[:, 1] * size_in_points(ax)[1] / np.ptp(ax.get_ylim())
    order, steps = np.argsort(heights, kind="stable"), 12 * np.arange(len(names))
    moved = isotonic_regression(heights[order] - steps).x + steps
    lead = {"arrowstyle": "-", "lw": 0.8, "shrinkA": 1, "relpos": (0 if side > 0 else 1, 0.5)}
    for k, height in zip(order, moved, strict=True):
        look = {"arrowprops": lead | {"color": colours[k]}, "ha": "left" if side > 0 else "right"}
        place = 18 * side, height - heights[k]
        ax.annotate(names[k], tuple(points[k]), place, **look, **OFFSET)


def as_text(names: Sequence[Any]) -> list[str]:
    """Return class names with ``$`` escaped: matplotlib would read ``pay_$^$`` as a formula."""
    return [str(name).replace("$", r"\$") for name in names]


def short(name: str, most: int = 20) -> str:
    """Return a name of at most ``most`` characters: of a longer one begin and end."""
    end = most // 3
    return name if len(name) <= most else f"{name[: most - end - 1]}…{name[-end:]}"


def size_in_points(ax: Axes) -> tuple[float, float]:
    """Return a plot's width and height in points, as its figure is laid out now."""
    if engine := figure_of(ax).get_layout_engine():
        engine.execute(figure_of(ax))
    box, dpi = ax.get_window_extent(), figure_of(ax).dpi
    return 72 * box.width / dpi, 72 * box.height / dpi


def _length(ax: Axes, texts: Iterable[str], size: float) -> float:
    """Return the length of the longest of texts, in points."""
    drawn = [ax.text(0, 0, text, fontsize=size) for text in texts]
    length = max(text.get_window_extent().width for text in drawn) * 72 / figure_of(ax).dpi
    for text in drawn:
        text.remove()
    return length


def _page(ax: Axes, norm: Normalize, over: bool, note: str) -> tuple[float, float, float]:
    """Turn a plot into a page measured in points, with a colour bar on its right, a note below.

    Return the width left of the bar, the height and the height of the note. The bar is pointed if a
    weight lies beyond it; it lies within the plot, so that panels side by side have one layout.
    """
    ax.axis("off")
    full, height = size_in_points(ax)
    ax.set(xlim=(0, full), ylim=(0, height))
    width = full - 48
    place = ax.inset_axes((width + 10, 0.1 * height, 8, 0.8 * height), transform=ax.transData)
    look: dict[str, Any] = {"extend": "max" if over else "neither", "label": "edge weight"}
    bar = figure_of(ax).colorbar(ScalarMappable(norm, WEIGHTS), cax=place, **look)
    bar.ax.tick_params(labelsize=7)
    lines = textwrap.wrap(note, max(20, int(width / 3.9)))
    ax.text(width / 2, 0, "\n".join(lines), fontsize=7, ha="center", va="bottom")
    return width, height, 10.0 * len(lines)


def _edge(
    ax: Axes, a: Any, b: Any, share: float, gid: str, bend: float = 0.0, dashed: bool = False
) -> None:
    """Draw an edge; ``share`` is its weight as a share of the heaviest."""
    look: dict[str, Any] = {"lw": 0.8 + 4.2 * share, "zorder": 1 + share}
    if dashed:
        look = {"lw": 0.6 + share, "ls": (0, (4, 3))}
    curve = {"arrowstyle": "-", "connectionstyle": f"arc3,rad={bend}", "shrinkA": 0, "shrinkB": 0}
    ax.add_patch(FancyArrowPatch(a, b, color=WEIGHTS(share), gid=gid, **look, **curve))


def _vertices(ax: Axes, at: Mapping[str, Any], size: float) -> None:
    """Draw teachers, each with its colour and marker, and what is no teacher in black and white."""
    others = {"consensus": {"marker": "D", "c": "white"}, "student": {"marker": "s", "c": INK}}
    for k, (name, place) in enumerate(at.items()):
        look = others.get(name) or look_of(k)
        area = 150 if name in others else size**2
        ax.scatter(*place, s=area, ec=INK, lw=1, zorder=3, **look)


@style()
def plot_logits_graph(graph: nx.Graph, ax: Place = None, *, vmax: float | None = None) -> Axes:
    """Draw ``LogitsGraph.to_networkx``: teachers on the left, their consensus and the student.

    A teacher's weight stands beside its name: its edges to consensus and student both have it.
    Dashed are the couplings of two teachers, of up to ``NUMBERED`` of them. The colour bar ends at
    ``vmax`` (panels to be compared need the same), by default at the heaviest teacher's weight; it
    is pointed where beta, the weight of the consensus, lies beyond.
    """
    edges = list(graph.edges.values())
    weights = {edge["columns"]: edge["weight"] for edge in edges if edge["kind"] == "matching"}
    glued, student = 1 < len(weights) <= NUMBERED, "student" in graph
    ax = axes_or_new(ax, 5.6, max(2.8, 0.8 + 0.22 * len(weights)))
    top = vmax or max(weights.values())
    over = max(edge["weight"] for edge in edges) > top * (1 + 1e-6)
    note = "dashed: teacher to teacher, read off the joint coupling" if glued else ""
    width, height, below = _page(ax, Normalize(0, top), over, note)
    pitch = (height - below) / len(weights)
    size, vertex = min(8.0, max(SMALL, 0.8 * pitch)), min(13.0, 0.75 * pitch)
    names = {name: f"{short(name)}  {weight:.2f}" for name, weight in weights.items()}
    names_end = _length(ax, names.values(), size) + 2
    bend = 0.3 if glued else 0.0
    first = names_end + vertex / 2 + 3 + bend / 2 * (height - below - pitch)
    heights = height - pitch * (0.5 + np.arange(len(weights)))
    at = {name: (first, y) for name, y in zip(weights, heights, strict=True)}
    centre, last = (height + below) / 2, width - _length(ax, ["consensus"], 8) / 2 - 2
    apart = min(0.25 * (height - below), 60) if student else 0
    at |= {"consensus": (last, centre + apart)}
    at |= {"student": (last, centre - apart)} if student else {}
    for edge in edges:
        kind, a, b = edge["kind"], edge["rows"], edge["columns"]
        if kind != "glued" or glued:
            share, dashed = min(1.0, edge["weight"] / top), kind == "glued"
            _edge(ax, at[a], at[b], share, f"{kind}:{a}|{b}", bend * dashed, dashed)
    for name, text in names.items():
        ax.text(names_end, at[name][1], text, fontsize=size, **_RIGHT)
    ax.text(last, at["consensus"][1] + 14, "consensus", bbox=_ON_WHITE, zorder=4, **_CENTRED)
    if student:
        ax.text(last, at["student"][1] - 14, "student", bbox=_ON_WHITE, zorder=4, **_CENTRED)
        text = f"beta {graph.graph['beta']:.2f}"
        ax.text(last, centre, text, fontsize=7, bbox=_ON_WHITE, zorder=4, **_CENTRED)
    _vertices(ax, at, vertex)
    return ax


@style()
def plot_representation_graph(graph: nx.Graph, ax: Place = None) -> Axes:
    """Draw ``RepresentationGraph.to_networkx`` over the teachers, and the same as a matrix.

    An edge is a pair, its width and colour are the learned weight. In the matrix, beside the graph
    or below it, stand weights below the diagonal and above it the distances of the pairs to the
    student's counterparts; a single teacher's pair with itself has both in its cell.
    """
    pairs = {
        (graph.nodes[p]["first"], graph.nodes[p]["second"]): edge
        for _, p, edge in graph.edges("student", data=True)
    }
    names = list(dict.fromkeys(name for pair in pairs for name in pair))
    count, heaviest = len(names), max(edge["weight"] for edge in pairs.values())
    distance = {"mmd": "MMD²", "cka": "1 - CKA", "coral": "CORAL"}[graph.graph["distance"]]
    note = f"below the diagonal: learned weight; above: {distance} to the student"
    ax, norm = axes_or_new(ax, 6.75, 3.4), Normalize(0, heaviest)
    width, height, below = _page(ax, norm, False, note)
    height -= below
    beside = width > 1.2 * height
    w, h = (width / 2, height) if beside else (width, height / 2)
    left, low = (w, below) if beside else (0.0, below)  # of the matrix
    size = 8.0 if count <= NUMBERED else 7.0
    label = {name: short(name, 20 if count < 5 else 14) for name in names}
    length = _length(ax, label.values(), size)

    turn = np.pi / 2 - 2 * np.pi * np.arange(count) / count + np.pi / count * (count in (2, 4))
    centre = np.array([w / 2, low + h / 2 + (0 if beside else h)])
    ways = np.stack([np.cos(turn), np.sin(turn)], 1)
    # Names of a few stand above or below their vertices, others beside them.
    aside = np.abs(ways[:, 1]) < 0.5 if count < 5 else np.abs(ways[:, 0]) > 0.1
    rooms = (w / 2 - np.where(aside, length + 12, length / 2)) / np.abs(ways[:, 0]).clip(0.3)
    radius = min(rooms.min(), h / 2 - 20)
    at = dict(zip(names, centre + radius * ways * (count > 1), strict=True))
    for (a, b), edge in pairs.items():
        if a != b:
            _edge(ax, at[a], at[b], edge["weight"] / heaviest, f"pair:{a}|{b}")
    for name, (x, y), side in zip(names, ways, aside, strict=True):
        ha, place = "center", (0, math.copysign(13, y))
        if side:
            ha, place = ("left" if x > 0 else "right"), (10 * x, 12 * y)
        ax.annotate(label[name], at[name], place, fontsize=size, ha=ha, **OFFSET)
    _vertices(ax, at, 11.0)

    side = min((w - length - 10) / count, (h - length - 10) / count, 44.0)
    start = left + (w - length - side * count) / 2 + length
    across = start + side * np.arange(count + 1)
    down = low + h - 4 - side * np.arange(count + 1)
    values = np.full((count, count), np.nan)
    for (a, b), edge in pairs.items():
        i, j = names.index(a), names.index(b)
        values[j, i] = edge["weight"]
        cells = {(j, i): f"{edge['weight']:.2f}", (i, j): f"{edge['distance']:.2f}"}
        if i == j:
            cells = {(i, i): f"{edge['weight']:.2f}\n{edge['distance']:.2f}"}
        for (row, column), text in cells.items():
            shade = norm(edge["weight"]) > 0.45 and row >= column
            look = {"color": "white" if shade else INK, "fontsize": SMALL} | _CENTRED
            x, y = across[column] + side / 2, down[row] - side / 2
            ax.text(x, y, text.replace("0.", "."), **look)
    ax.pcolormesh(across, down, values, cmap=WEIGHTS, norm=norm, zorder=0)
    for k, name in enumerate(names):
        look = {"fontsize": min(size, max(SMALL, 0.85 * side))}
        ax.text(start - 3, down[k] - side / 2, label[name], **look, **_RIGHT)
        turned = {"rotation": 45, "rotation_mode": "anchor", "ha": "right", "va": "center"}
        ax.text(across[k] + side / 2, down[-1] - 6, label[name], **look, **turned)
    return ax


def _heat(
    matrix: Any, labels: Names, about: Names, ax: Place, cmap: Any = "cividis", digits: int = 2
) -> Axes:
    """Draw a matrix ``about`` rows, columns and values, as many names and numbers as have room.

    If a name is too long all are numbered and it is shortened; up to ``NAMED`` classes' whole names
    are listed below, where they leave the matrix two thirds of the height.
    """
    ax = axes_or_new(ax, 5.2, 4.2)
    width, height = size_in_points(ax)
    most = max(WHOLE, min(24, int(0.05 * width)))
    whole = [f"{k} {name}" for k, name in enumerate(labels, 1) if len(name) > most]
    if whole:
        labels = [f"{k} {short(name, most)}" for k, name in enumerate(labels, 1)]
    listed = [textwrap.fill(name, int(width / 4)) for name in whole if len(labels) <= NAMED]
    below = 8 * sum(name.count("\n") + 1 for name in listed)
    listed, below = (listed, below) if below < height / 3 else ([], 0)
    length = 3.8 * max(map(len, labels))
    room = min(width - length - 80, height - length - 30 - below)  # of the matrix
    step, few = math.ceil(7.5 * len(labels) / max(room, 15)), len(labels) <= NAMED
    numbered, size = few and room / len(labels) > 12, 8 if few and not whole else SMALL
    labels = as_text(labels)
    frame = pd.DataFrame(_array(matrix), labels, labels)
    numbers = frame.map(lambda v: f"{v:.{digits}f}".lstrip("0") if round(v, digits) > 0 else "")
    look = {"annot": numbers if numbered else None, "fmt": "", "annot_kws": {"fontsize": SMALL}}
    look |= {"cbar_kws": {"shrink": 0.8, "label": about[2]}, "rasterized": True, "ax": ax}
    sns.heatmap(frame, vmin=0, cmap=cmap, xticklabels=step, yticklabels=step, **look)
    shades = ax.collections[0].to_rgba(frame.to_numpy()[frame.notna()])
    for text, shade in zip(ax.texts, shades, strict=numbered):
        text.set_color(INK if shade[1] > 0.45 else "white")  # green: most of what the eye sees
    turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if few else {"rotation": 90}
    plt.setp(ax.get_xticklabels(), fontsize=size, **turned)
    plt.setp(ax.get_yticklabels(), fontsize=size, rotation=0)
    ax.set_ylabel(about[0])
    if listed:
        ax.set_xlabel("\n".join([about[1], *as_text(listed)]), fontsize=SMALL, loc="right")
    else:
        ax.set_xlabel(about[1])
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
    return _heat(shares, labels, ("true class", "predicted class", "share of a row"), ax)


def _lines(x: np.ndarray, series: np.ndarray, names: Names, ax: Axes) -> Axes:
    """Draw one line a name, thin unless it ends among the ``NAMED`` highest; name those."""
    last = [np.flatnonzero(np.isfinite(y))[-1] for y in series]
    ends = np.array([(x[at], y[at]) for y, at in zip(series, last, strict=True)])
    named = sorted(np.argsort(-ends[:, 1], kind="stable")[:NAMED].tolist())
    every = max(1, len(x) // 8)
    for k, y in enumerate(series):
        look: dict[str, Any] = {"c": FAINT, "lw": 0.5, "zorder": 1}
        if k in named:
            look = look_of(k) | {"ls": LINES[k // 6 % 4]}
        ax.plot(x, y, ms=4, markevery=(k % every, every), **look)
    ax.set(xlabel="epoch")
    name_points(ax, [str(names[k]) for k in named], ends[named], [PALETTE[k % 6] for k in named])
    return ax


@style()
def plot_edges_over_training(history: Any, names: Names, ax: Place = None) -> Axes:
    """Draw weights ``[moments, n]`` of n edges, and the uniform weight 1 / n, dotted.

    Of more than ``NAMED`` edges those that end heaviest are named; the others are thin.
    """
    history, uniform, ax = _array(history), 1 / len(names), axes_or_new(ax)
    ax.set_ylim(0, 1.06 * history.max())
    _lines(np.arange(len(history)), history.T, names, ax)
    ax.axhline(uniform, color=FAINT, ls=":", lw=1.2)
    ax.set(xlabel="moment of the training", ylabel=f"edge weight (dotted: uniform, {uniform:.2g})")
    ax.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    return ax


@style()
def plot_history(history: Sequence[Mapping[str, float]], keys: Names, ax: Place = None) -> Axes:
    """Draw the numbers ``keys`` of rows as trainings return them; missing ones leave a gap."""
    rows = pd.DataFrame(list(history))
    epochs = np.asarray(rows.get("epoch", rows.index))
    return _lines(epochs, rows[list(keys)].to_numpy(float).T, keys, axes_or_new(ax))


@style()
def plot_embedding(points: Any, labels: Any, names: Names, ax: Place = None) -> Axes:
    """Scatter ``points [N, 2]`` by class; clips without a label (-1) are faint dots.

    Up to twice ``NAMED`` classes are in a legend (half as many below a narrow plot); of more, names
    stand at their classes' medians, the most frequent first, where there is room.
    """
    ax, points, labels = axes_or_new(ax, 5.2, 3.8), _array(points), _array(labels)
    names = as_text([short(name) for name in names])
    narrow = size_in_points(ax)[0] < 250 and max(map(len, names)) > WHOLE
    few = len(names) <= (1 if narrow else 2) * NAMED
    if (labels < 0).any():
        ax.scatter(*points[labels < 0].T, s=7, c="#bbbbbb", lw=0, label="unlabelled")
    for k, name in enumerate(names):
        look = look_of(k) | {"s": 28 if few else 10, "ec": "white", "lw": 0.4}
        ax.scatter(*points[labels == k].T, label=name, **look)
    ax.set(xticks=[], yticks=[], xlabel="first coordinate", ylabel="second coordinate")
    if few:
        place = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "ncols": 1 + len(names) // 13}
        if narrow:  # no room beside it
            place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.12), "ncols": 2}
            place |= {"fontsize": SMALL}
        ax.legend(**place)
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
    # numba sets the number of threads that PyTorch has, too: set back afterwards.
    with threadpool_limits(limits=1), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"umap|numba|pynndescent|sklearn")
        return _umap()(min(15, len(x) - 1), random_state=seed, n_jobs=1).fit_transform(x)


def _umap() -> Any:
    try:
        from umap import UMAP
    except RuntimeError:  # numba can write neither beside UMAP nor in the home folder
        config: Any = import_module("numba.core.config")
        config.CACHE_DIR = tempfile.mkdtemp()
        from umap import UMAP
    return UMAP


@style()
def plot_filmstrip(
    clips: Any, titles: Names = (), ax: Place = None, *, columns: Names = (), every: int = 1
) -> Axes:
    """Draw every so many frames of n clips, a clip a row.

    Clips are normalised floats ``[n, 3, t, h, w]``, (x - 0.5) / 0.25, or uint8 ``[n, t, h, w, 3]``;
    ``columns`` are written over frames instead of their numbers.
    """
    frames = _array(clips)
    if frames.dtype != np.uint8:
        unit = np.clip(frames.transpose(0, 2, 3, 4, 1) * 0.25 + 0.5, 0, 1)
        frames = (255 * unit).round().astype(np.uint8)
    frames = frames[:, ::every]
    n, t, height, width = frames.shape[:4]
    ax = axes_or_new(ax, 0.9 * t + 0.9, 0.9 * n + 0.3)
    gap = 1 + width // 24
    framed = np.pad(frames, [(0, 0), (0, 0), (0, gap), (0, gap), (0, 0)], constant_values=255)
    height, width = height + gap, width + gap
    ax.imshow(framed.swapaxes(1, 2).reshape(n * height, t * width, 3), interpolation="nearest")
    numbers = [f"{every * j}" if j else "frame 0" for j in range(t)]
    ax.set_xticks((np.arange(t) + 0.5) * width, columns or numbers)
    ax.set_yticks((np.arange(n) + 0.5) * height, as_text(titles or [""] * n))
    ax.tick_params(length=0, labeltop=True, labelbottom=False)
    ax.spines[:].set_visible(False)
    return ax

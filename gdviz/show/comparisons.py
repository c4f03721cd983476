"""Figures that compare models: of a run over seeds, of an experiment over draws, against costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib import ticker
from matplotlib.axes import Axes

from gdviz.experiment.report import open_results, wide
from gdviz.experiment.statistics import compare, summarise
from gdviz.experiment.tables import spread
from gdviz.show import plots

ROW = 0.22  # inches


def _intervals(
    ax: Axes, names: list[str], points: list[list[float]], middle: str, found: pd.DataFrame
) -> None:
    """Draw a row a name: a dot a draw, the mean (column ``middle``), and its interval."""
    for y, own in enumerate(points):
        mean, low, high = (float(found[column].iloc[y]) for column in (middle, "low", "high"))
        ax.plot(own, [y] * len(own), "o", ms=2.5, color=plots.INK, alpha=0.55, mew=0, zorder=3)
        if np.isfinite(low):
            ax.plot([low, high], [y, y], "-", lw=2.2, color=plots.PALETTE[0])
        ax.plot(mean, y, "D", ms=5, color=plots.PALETTE[0], mec="white", mew=0.6)
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.grid(axis="x", lw=0.4, color="#dddddd")
    ax.set_axisbelow(True)


@plots.style()
def plot_students(table: pd.DataFrame, measure: str, ax: Axes | None = None) -> Axes:
    """Draw every student's mean with its 95 % interval, and each draw as a dot.

    ``table`` has draws as rows and students as columns (:func:`gdviz.experiment.report.wide`).
    """
    found = summarise(table)
    ax = plots.axes_or_new(ax, 5.5, 0.8 + ROW * len(found))
    points = [(100 * table[name].dropna()).tolist() for name in found.index]
    _intervals(ax, list(found.index), points, "mean", found)
    ax.set_xlabel(f"{measure}, %")
    return ax


@plots.style()
def plot_contrasts(
    table: pd.DataFrame, contrasts: list[tuple[str, str]], ax: Axes | None = None
) -> Axes:
    """Draw every paired difference with its 95 % interval; a star where Holm's p is below .05."""
    found = compare(table, contrasts)
    ax = plots.axes_or_new(ax, 5.5, 0.8 + ROW * len(found))
    points = [(100 * (table[a] - table[b])).dropna().tolist() for a, b in contrasts]
    names = [
        f"{a} − {b}{' *' if p < 0.05 else ''}"
        for (a, b), p in zip(contrasts, found["p_holm"], strict=True)
    ]
    _intervals(ax, names, points, "difference", found)
    ax.axvline(0, lw=0.8, color=plots.INK)
    ax.set_xlabel("difference, points (* Holm's p < .05)")
    return ax


def _models(results: pd.DataFrame) -> list[tuple[str, dict[str, Any], pd.DataFrame]]:
    """Return each model's name, first row and rows, in the order of first appearance.

    A teacher has the look that it has in the graphs.
    """
    found, teachers = {}, results.query("kind == 'teacher'")["name"].drop_duplicates().tolist()
    for row in results.to_dict("records"):
        if row["kind"] == "teacher":
            k = teachers.index(row["name"])
            row |= {"colour": k % 6, "marker": plots.MARKERS[k % 11]}
        found.setdefault((row["kind"], row["name"]), []).append(row)
    role = {"teacher": "teacher: ", "student": ""}
    return [(role[r[0]["kind"]] + r[0]["label"], r[0], pd.DataFrame(r)) for r in found.values()]


@plots.style()
def plot_accuracy(
    results: pd.DataFrame, ax: plots.Place = None, *, chance: float | None = None
) -> Axes:
    """Draw each model's mean accuracy, standard deviation and, as ticks, its seeds.

    Rows as of ``Run.results``: ``kind``, ``name``, ``label``, ``accuracy`` in [0, 1], ``colour``
    (of ``COLOURS``), ``marker``, ``headline`` (in bold), ``shuffled`` (the control, in italics).
    """
    models = _models(results)
    ax = plots.axes_or_new(ax, 5.6, 0.8 + 0.24 * len(models))
    for y, (name, model, rows) in enumerate(models):
        values, look = 100 * rows["accuracy"], {"color": plots.COLOURS[model["colour"]], "ms": 6}
        bar = {"fmt": model["marker"], "mec": plots.INK, "mew": 0.6, "capsize": 3, "zorder": 3}
        ax.errorbar(values.mean(), y, xerr=values.std() if len(values) > 1 else 0, **look, **bar)
        ax.plot(values, [y + 0.26] * len(values), "|", zorder=2, **look)
        beside = {"transform": ax.get_yaxis_transform(), "va": "center"}
        beside["fontweight"] = "bold" if model["headline"] else "normal"
        beside["fontstyle"] = "italic" if model["shuffled"] else "normal"
        ax.text(-0.02, y, name, ha="right", **beside)
        ax.text(1.02, y, spread(rows["accuracy"]), **beside)
    if chance is not None:
        ax.axvline(100 * chance, color=plots.FAINT, ls=":", lw=1)
        above = {"transform": ax.get_xaxis_transform(), "va": "bottom"}
        ax.text(100 * chance, 1, " chance", color=plots.FAINT, **above)
    ax.set(yticks=[], ylim=(len(models) - 0.4, -0.6))
    ax.set_xlabel("top-1 accuracy, %\n(mean ± standard deviation; ticks: seeds)")
    return ax


COSTS = {"params": "parameters", "gflops": "GFLOPs a clip", "peak_mb": "MB of tensors"}
COSTS |= dict.fromkeys(("ms", "latency_ms"), "latency, ms a clip")


def _against_cost(ax: Axes, x: str) -> None:
    """Name the axes of accuracies against a cost, and scale that by its logarithm."""
    ax.set(xscale="log", xlabel=COSTS[x], ylabel="top-1 accuracy, %")
    ax.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5)))
    ax.xaxis.set_major_formatter(ticker.EngFormatter(sep="") if x == "params" else "{x:g}")
    ax.xaxis.set_minor_formatter("")


@plots.style()
def plot_tradeoff(results: pd.DataFrame, x: str = "latency_ms", ax: plots.Place = None) -> Axes:
    """Draw each model's mean accuracy against its cost, the column ``x``, on a log scale.

    ``x`` is latency_ms, params or gflops; other columns are :func:`plot_accuracy`'s. The cheaper
    half is named on the left. In a narrow plot names are in a legend.
    """
    ax, (names, firsts, each) = plots.axes_or_new(ax), zip(*_models(results), strict=True)
    points = np.array([(rows[x].mean(), 100 * rows["accuracy"].mean()) for rows in each])
    colours = [plots.COLOURS[model["colour"]] for model in firsts]
    for point, model, colour, name in zip(points, firsts, colours, names, strict=True):
        look = {"marker": model["marker"], "c": colour, "label": name}
        ax.scatter(*point, s=40, zorder=3, ec=plots.INK, lw=0.6, **look)
    _against_cost(ax, x)
    if plots.size_in_points(ax)[0] < 260:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, fontsize=7)
        return ax
    ax.margins(0.9, 0.15)
    cheap = points[:, 0] <= np.sqrt(points[:, 0].min() * points[:, 0].max())
    for side, half in ((-1, np.flatnonzero(cheap)), (1, np.flatnonzero(~cheap))):
        own, shades = [names[k] for k in half], [colours[k] for k in half]
        plots.name_points(ax, own, points[half], shades, side)
    return ax


@plots.style()
def plot_front(table: Any, x: str = "ms", ax: plots.Place = None) -> Axes:
    """Draw accuracies with intervals against a cost: rows of ``gdviz.experiment.report.tradeoff``.

    ``x`` is ms, params, gflops or peak_mb. An arrow leads from a network that learned from labels
    alone to the same one distilled by the headline's method; the dashed line is the Pareto front.
    """
    ax, teachers = plots.axes_or_new(ax), 0
    for row in table.to_dict("records"):
        if row["kind"] == "teacher":
            look, label, teachers = plots.look_of(teachers), f"teacher: {row['name']}", teachers + 1
        else:
            look = {"c": plots.COLOURS[int(row["colour"])], "marker": row["marker"]}
            label = row["label"]
        seen = ax.get_legend_handles_labels()[1]
        ax.plot([row[x]] * 2, [row["low"], row["high"]], lw=1.2, c=look["c"], zorder=2)
        look |= {"s": 36, "ec": plots.INK, "lw": 0.6, "label": None if label in seen else label}
        ax.scatter(row[x], row["mean"], zorder=3, **look)
    students = table.query("kind == 'student'")
    for network, rows in students.groupby("network", sort=False):
        plain, taught = (rows[rows[k] == v] for k, v in (("unlabelled", False), ("headline", True)))
        if len(plain) and len(taught):
            ends = [(row[x].iloc[0], row["mean"].iloc[0]) for row in (taught, plain)]
            arrow = {"arrowstyle": "->", "color": plots.FAINT, "shrinkA": 5, "shrinkB": 5}
            ax.annotate("", *ends, arrowprops=arrow)
        lowest = rows[["low", "mean"]].min().min()  # of few draws there is no interval
        ax.annotate(network, (rows[x].iloc[0], lowest), (0, -9), ha="center", **plots.OFFSET)
    best = table.sort_values([x, "mean"], ascending=[True, False])
    best = best[best["mean"] > best["mean"].cummax().shift(fill_value=-1)]
    ends = [*best[x], table[x].max()], [*best["mean"], best["mean"].max()]
    front: dict[str, Any] = {"c": plots.FAINT, "lw": 1, "zorder": 1, "label": "Pareto front"}
    ax.step(*ends, "--", where="post", **front)
    _against_cost(ax, x)
    ax.margins(0.12)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=7)
    return ax


def draw_comparisons(folder: Path) -> list[Path]:
    """Draw an experiment's students and contrasts, one figure a measure, beside its results."""
    results, contrasts, measures = open_results(folder)
    paths = []
    for measure in measures:
        table, stem = wide(results, measure), measure.replace(" ", "_").replace("@", "_at_")
        axes = {f"{stem}_students": plot_students(table, measure)}
        if contrasts:
            axes[f"{stem}_contrasts"] = plot_contrasts(table, contrasts)
        for name, ax in axes.items():
            paths += plots.save_figure(plots.figure_of(ax), folder / "figures", name)
            plt.close(plots.figure_of(ax))
    return paths

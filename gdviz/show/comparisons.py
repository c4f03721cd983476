"""Figures of an experiment: students over draws, and the differences it was made for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from gdviz.experiment.report import open_results, wide
from gdviz.experiment.statistics import compare, summarise
from gdviz.show import plots

ROW = 0.22  # inches


def _axes(rows: int, ax: Axes | None) -> Axes:
    return plt.subplots(figsize=(5.5, 0.8 + ROW * rows))[1] if ax is None else ax


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
    ax = _axes(len(found), ax)
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
    ax = _axes(len(found), ax)
    points = [(100 * (table[a] - table[b])).dropna().tolist() for a, b in contrasts]
    names = [
        f"{a} − {b}{' *' if p < 0.05 else ''}"
        for (a, b), p in zip(contrasts, found["p_holm"], strict=True)
    ]
    _intervals(ax, names, points, "difference", found)
    ax.axvline(0, lw=0.8, color=plots.INK)
    ax.set_xlabel("difference, points (* Holm's p < .05)")
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

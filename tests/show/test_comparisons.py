"""Figures of experiments: the numbers of the report, and room for every name."""

import shutil
from itertools import pairwise

import pandas as pd
import pytest

from gdviz.experiment.statistics import compare, summarise
from gdviz.show.comparisons import draw_comparisons, plot_contrasts, plot_students
from gdviz.show.plots import figure_of

TABLE = pd.DataFrame({"ours": [0.6, 0.7, 0.65, 0.72], "theirs": [0.5, 0.55, 0.6, 0.5]})


def rows_of(ax):
    """Return the dots, the mean and the interval of each row."""
    lines = [line for line in ax.get_lines() if line.get_label().startswith("_child")]
    by_row = {}
    for line in lines:
        ys = set(line.get_ydata())
        if len(ys) == 1:
            by_row.setdefault(ys.pop(), []).append(sorted(line.get_xdata()))
    return by_row


def test_students_are_drawn_as_they_are_summarised():
    ax = plot_students(TABLE, "accuracy")
    found, (dots, interval, mean) = summarise(TABLE), rows_of(ax)[0]
    assert dots == pytest.approx([60, 65, 70, 72]) and mean == pytest.approx([66.75])
    assert interval == pytest.approx(found.loc["ours", ["low", "high"]].tolist())
    assert [t.get_text() for t in ax.get_yticklabels()] == ["ours", "theirs"]


def test_contrasts_are_drawn_as_they_are_compared():
    ax = plot_contrasts(TABLE, [("ours", "theirs")])
    found, (dots, interval, mean) = compare(TABLE, [("ours", "theirs")]), rows_of(ax)[0]
    assert mean == pytest.approx(found["difference"].tolist()) and len(dots) == 4
    assert interval == pytest.approx(found.loc[0, ["low", "high"]].tolist())
    assert "*" not in ax.get_yticklabels()[0].get_text()  # four draws cannot be significant
    many = pd.concat([TABLE, TABLE + 0.01])
    assert plot_contrasts(many, [("ours", "theirs")]).get_yticklabels()[0].get_text()[-1] == "*"


def test_every_measure_of_an_experiment_is_drawn(tmp_path):
    shutil.copytree("docs/results/specialists", tmp_path / "table")
    paths = draw_comparisons(tmp_path / "table")
    assert {p.name for p in paths if p.suffix == ".png"} == {
        "accuracy_students.png",
        "accuracy_contrasts.png",
    }


def test_no_name_is_cut():
    names = {f"a method with quite a long name {n}": TABLE["ours"] for n in range(30)}
    ax = plot_students(pd.DataFrame(names), "accuracy")
    fig = figure_of(ax)
    fig.canvas.draw()
    boxes = [t.get_window_extent() for t in ax.get_yticklabels()]
    assert all(box.x0 >= 0 for box in boxes)
    assert all(a.y0 >= b.y1 - 1 for a, b in pairwise(boxes))

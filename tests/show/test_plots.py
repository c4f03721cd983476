"""Plots hold what they promise, change nothing around them, and are the same bytes twice."""

import os
import re
import subprocess
import sys
from itertools import combinations

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.patches import FancyArrowPatch

from gdviz.core.files import UserError
from gdviz.graphs import LogitsGraph, RepresentationGraph, zero_one_cost
from gdviz.show import comparisons, plots

TEACHERS = ["order", "coherence", "registration", "prediction", "pace", "clip-order", "rotation"]
TEACHERS += ["contrast", "masked", "sound", "colour", "depth"]
CLASSES = ["left", "right", "anticlockwise", "clockwise", "up", "down"]


@pytest.fixture(autouse=True)
def _nothing_left_behind():
    before = dict(mpl.rcParams)
    yield
    assert dict(mpl.rcParams) == before
    plt.close("all")


def logits_graph(teachers=4, student=True, heavy=0.7):
    g = torch.Generator().manual_seed(teachers)
    probs = torch.randn(4, teachers, 5, generator=g).mul(2).softmax(-1)
    weights = torch.ones(teachers)
    if teachers > 1:
        rest = (1 - heavy) * torch.softmax(torch.arange(teachers - 1.0), 0)
        weights = torch.cat([torch.tensor([heavy]), rest])
    graph = LogitsGraph(TEACHERS[:teachers], zero_one_cost(5))
    return graph.to_networkx(probs, weights.expand(4, -1), probs[:, 0] if student else None)


def representation_graph(teachers=4, distance="mmd"):
    graph = RepresentationGraph(TEACHERS[:teachers], [4] * teachers, 3, distance=distance)
    g = torch.Generator().manual_seed(teachers)
    weights = torch.softmax(torch.randn(len(graph.pairs), generator=g), 0)
    return graph.to_networkx(weights, torch.linspace(0.1, 0.6, len(graph.pairs)))


@pytest.fixture(scope="module")
def graph():
    return logits_graph()


def texts(ax):
    return [t.get_text() for t in ax.findobj(mpl.text.Text) if t.get_text()]


def edges(ax):
    return {p.get_gid(): p for p in ax.patches if isinstance(p, FancyArrowPatch)}


def assert_apart(ax, wanted=None):
    """No two texts overlap (all, or those wanted), and none leaves the figure."""
    ax.figure.draw_without_rendering()
    shown = [t for t in ax.texts if t.get_text() and (wanted is None or t.get_text() in wanted)]
    boxes = [mpl.text.Text.get_window_extent(t).shrunk(0.98, 0.9) for t in shown]
    pairs = combinations(range(len(shown)), 2)
    assert [(shown[i], shown[j]) for i, j in pairs if boxes[i].overlaps(boxes[j])] == []
    page = ax.figure.bbox
    corners = [corner for box in boxes for corner in (box.min, box.max)]
    assert [corner for corner in corners if not page.contains(*corner)] == []
    return len(shown)


def colour_bar(ax):
    return ax.child_axes[0]


# graphs


@pytest.mark.parametrize("teachers", [1, 2, 4, 5, 9, 12])
def test_logits_graph_draws_every_edge_and_keeps_names_and_weights_apart(teachers):
    graph = logits_graph(teachers)
    ax = plots.plot_logits_graph(graph)
    glued = {frozenset(e[:2]) for e in graph.edges(data="kind") if e[2] == "glued"}
    drawn = {frozenset(gid.split(":")[1].split("|")) for gid in edges(ax)}
    expected = {frozenset(e) for e in graph.edges}
    assert drawn == (expected if teachers <= plots.NUMBERED else expected - glued)
    weights = {n: graph.edges["consensus", n]["weight"] for n in TEACHERS[:teachers]}
    named = {f"{name}  {weight:.2f}" for name, weight in weights.items()}
    assert named | {"consensus", "student"} <= set(texts(ax))
    assert_apart(ax)
    looks = {
        (tuple(c.get_facecolor()[0]), c.get_paths()[0].vertices.tobytes()) for c in ax.collections
    }
    assert len(looks) == teachers + 2  # of vertices


def test_width_and_colour_follow_weight_and_glued_edges_are_thin_and_dashed(graph):
    drawn = edges(plots.plot_logits_graph(graph))
    weight = {gid: graph.edges[gid.split(":")[1].split("|")]["weight"] for gid in drawn}
    solid = sorted((gid for gid in drawn if not gid.startswith("glued")), key=weight.get)
    widths = [drawn[gid].get_linewidth() for gid in solid]
    shades = [np.dot(drawn[gid].get_edgecolor()[:3], (0.2, 0.7, 0.1)) for gid in solid]
    assert widths == sorted(widths)
    assert widths[0] < widths[-1]
    assert shades == sorted(shades, reverse=True)  # heavier is darker on white paper
    for gid, patch in drawn.items():
        dashed = patch.get_linestyle() not in ("-", "solid")
        assert dashed == gid.startswith("glued")
        assert not dashed or patch.get_linewidth() < 2


def test_panels_with_one_vmax_share_limits_and_widths(graph):
    _, (left, right) = plt.subplots(1, 2)
    for ax, of in ((left, graph), (right, logits_graph(heavy=0.4))):
        assert plots.plot_logits_graph(of, ax, vmax=0.8) is ax
    assert [colour_bar(ax).get_ylim() for ax in (left, right)] == [(0, 0.8)] * 2
    a, b = (edges(ax)["matching:consensus|order"].get_linewidth() for ax in (left, right))
    assert (a - 0.8) / (b - 0.8) == pytest.approx(0.7 / 0.4, rel=1e-5)


def test_colour_bar_ends_at_the_heaviest_teacher_and_points_beyond_for_beta(graph):
    bar = colour_bar(plots.plot_logits_graph(graph))
    assert bar.get_ylim() == pytest.approx((0, 0.7))
    assert bar._colorbar.extend == "max"
    without = colour_bar(plots.plot_logits_graph(logits_graph(student=False)))
    assert without._colorbar.extend == "neither"


@pytest.mark.parametrize("width", [3.25, 6.75])
def test_four_specialists_keep_their_whole_names_and_names_stay_apart(width):
    names = ("registration@plain", "contrast@noise", "prediction@snow", "registration@pan")
    space = RepresentationGraph(names, [4] * 4, 3)
    _, ax = plt.subplots(figsize=(width, 4.5 if width < 5 else 3.4), layout="constrained")
    plots.plot_representation_graph(space.to_networkx(torch.full((6,), 1 / 6), torch.rand(6)), ax)
    ax.figure.draw_without_rendering()
    around = [t for t in ax.texts if t.get_text() in names and not t.get_rotation()]
    assert sorted(t.get_text() for t in around) == sorted(2 * names)  # and beside the matrix
    boxes = [t.get_window_extent() for t in around]
    assert all(box.count_overlaps(boxes) == 1 for box in boxes)


@pytest.mark.parametrize("teachers", [1, 2, 3, 4, 5, 9, 12])
def test_representation_graph_is_drawn_over_teachers_and_as_a_matrix(teachers):
    graph = representation_graph(teachers, "cka")
    ax = plots.plot_representation_graph(graph)
    pairs = {
        (graph.nodes[p]["first"], graph.nodes[p]["second"]): e
        for _, p, e in graph.edges("student", data=True)
    }
    drawn = {tuple(g.removeprefix("pair:").split("|")): p for g, p in edges(ax).items()}
    assert drawn.keys() == {pair for pair in pairs if pair[0] != pair[1]}
    by_weight = sorted(drawn, key=lambda pair: pairs[pair]["weight"])
    widths = [drawn[pair].get_linewidth() for pair in by_weight]
    assert widths == sorted(widths)
    mesh = next(c for c in ax.collections if isinstance(c, mpl.collections.QuadMesh))
    shown = mesh.get_array().filled(np.nan)
    for (a, b), edge in pairs.items():
        i, j = TEACHERS.index(a), TEACHERS.index(b)
        assert shown[j, i] == pytest.approx(edge["weight"])
        assert i == j or np.isnan(shown[i, j])
    if teachers > 1:
        numbers = [e[k] for e in pairs.values() for k in ("weight", "distance")]
        expected = sorted(f"{n:.2f}".replace("0.", ".") for n in numbers)
        assert sorted(t for t in texts(ax) if t[0] == "." or t == "1.00") == expected
    assert "1 - CKA to the student" in " ".join(texts(ax)).replace("\n", " ")
    assert sum(t in TEACHERS for t in texts(ax)) == 3 * teachers  # graph, rows and columns


def test_panels_side_by_side_have_one_layout():
    with plots.style():
        _, panels = plt.subplots(1, 2, figsize=(11, 4.4))
    places = []
    for ax in panels:
        plots.plot_representation_graph(representation_graph(), ax)
        mesh = next(c for c in ax.collections if isinstance(c, mpl.collections.QuadMesh))
        places.append(mesh.get_coordinates()[0, 0])
    np.testing.assert_allclose(places[0], places[1], rtol=0.1)
    width, height = np.ptp(panels[0].get_xlim()), np.ptp(panels[0].get_ylim())
    box = panels[0].get_window_extent()
    assert box.width / box.height == pytest.approx(width / height, rel=0.1)  # not stretched


def test_a_teacher_looks_the_same_in_every_plot(graph):
    def looks(ax):
        dots = [c for c in ax.collections if isinstance(c, mpl.collections.PathCollection)]
        return [(tuple(c.get_facecolor()[0]), len(c.get_paths()[0].vertices)) for c in dots]

    expected = looks(plots.plot_representation_graph(representation_graph()))
    assert len(set(expected)) == 4
    assert looks(plots.plot_logits_graph(graph))[:4] == expected
    rows = [results().query("name == 'order'").assign(name=t, label=t) for t in TEACHERS[:4]]
    rows = pd.concat([*rows, results().query("kind == 'student'")]).assign(latency_ms=1.0)
    assert looks(comparisons.plot_tradeoff(rows))[:4] == expected
    lines = plots.plot_edges_over_training(np.full((3, 4), 0.25), TEACHERS[:4]).lines
    assert [to_rgba(line.get_color()) for line in lines[:4]] == [colour for colour, _ in expected]


LONG = "Pretending to put something behind something, which is not there"
PAGES = [
    (f"{what}-{count}-{width}", what, count, width)
    for width in (3.25, 6.75)
    for what, counts in {
        "logits": (1, 2, 4, 9, 12),
        "representation": (1, 2, 4, 9, 12),
        "plan": (2, 8, 60, 101),
        "long": (2, 8, 60, 101),
        "accuracy": (1, 12),
        "tradeoff": (1, 12),
        "edges": (1, 4, 12),
    }.items()
    for count in counts
]


def draw(what, count, ax):
    values = np.random.default_rng(0).dirichlet(np.full(count, 0.5), max(count, 6))
    if what == "logits":
        return plots.plot_logits_graph(logits_graph(count), ax)
    if what == "representation":
        return plots.plot_representation_graph(representation_graph(count), ax)
    if what in ("plan", "long"):
        names = [f"{k} {LONG}" if what == "long" and k % 2 else f"class {k}" for k in range(count)]
        return plots.plot_plan(values[:count], names, "order", "pace", ax)
    if what == "edges":
        return plots.plot_edges_over_training(values, TEACHERS[:count], ax)
    each = [results().query("name == 'order'").assign(name=t, label=t) for t in TEACHERS[:count]]
    rows = pd.concat([*each, results().query("kind == 'student'")])
    rows["accuracy"] = 0.6 + 0.002 * np.arange(len(rows))
    rows["latency_ms"] = np.where(rows["kind"] == "teacher", 30.0, 3.0)
    return (comparisons.plot_accuracy if what == "accuracy" else comparisons.plot_tradeoff)(
        rows, ax=ax
    )


def drawn_texts(figure):
    """What can be read; matplotlib keeps ticks beyond the limits, and does not draw them."""
    figure.draw_without_rendering()
    beyond = set()
    for axis in (axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)):
        low, high = sorted(axis.get_view_interval())
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
            if not low <= tick.get_loc() <= high:
                beyond |= {tick.label1, tick.label2}
    texts = figure.findobj(mpl.text.Text)
    return [t for t in texts if t.get_text().strip() and t.get_visible() and t not in beyond]


@pytest.mark.parametrize(
    ("what", "count", "width"), [p[1:] for p in PAGES], ids=[p[0] for p in PAGES]
)
def test_texts_of_a_column_and_of_a_page_are_apart_whole_and_large_enough(what, count, width):
    heights = {"logits": max(2.2, 0.8 + 0.22 * count), "accuracy": 0.9 + 0.24 * (count + 3)}
    heights |= {"representation": 5.5 if width < 5 else 3.4, "edges": 2.8, "tradeoff": 3.2}
    with plots.style():
        figure, ax = plt.subplots(figsize=(width, heights.get(what, 1.1 * width)))
        draw(what, count, ax)
    shown = drawn_texts(figure)
    assert min(t.get_fontsize() for t in shown) >= 6
    boxes = []
    for text in shown:
        box = mpl.text.Text.get_window_extent(text)
        assert figure.bbox.padded(2).contains(*box.min), text
        assert figure.bbox.padded(2).contains(*box.max), text
        turned = text.get_rotation() % 90  # its upright box would be much too large
        boxes += [] if turned else [(text, box.shrunk(0.98, 0.85))]
    overlaps = [(a, b) for (a, x), (b, y) in combinations(boxes, 2) if x.overlaps(y)]
    assert overlaps == []


def test_long_names_are_shortened_numbered_and_listed_whole():
    names = [f"{LONG} {k}" for k in range(3)]
    ax = plots.plot_cost(np.eye(3), names)
    labels = [t.get_text() for t in ax.get_yticklabels()]
    assert len(set(labels)) == 3
    assert all(label[0] == str(k) and "…" in label for k, label in enumerate(labels, 1))
    below = ax.get_xlabel().replace("\n", " ")
    assert all(f"{k} {name}" in below for k, name in enumerate(names, 1))
    assert plots.short("registration", 12) == "registration"
    assert plots.short(LONG, 12) == "Pretend…here"


# matrices


@pytest.mark.parametrize("classes", [3, 12, 60, 101])
def test_matrices_show_numbers_of_few_classes_and_names_that_can_be_read(classes):
    names = [f"a long name {i}" for i in range(classes)]
    values = np.random.default_rng(0).dirichlet(np.ones(classes), classes) / classes
    ax = plots.plot_plan(torch.tensor(values), names, "order", "pace")
    np.testing.assert_allclose(ax.collections[0].get_array(), values)
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("order", "pace")
    numbers = [t.get_text() for t in ax.texts if t.get_text()]
    assert len(numbers) == ((values.round(2) > 0).sum() if classes <= plots.NAMED else 0)
    ax.figure.draw_without_rendering()
    labels = ax.get_yticklabels()
    assert labels[0].get_text() == names[0]
    assert 1 < len(labels) <= 31
    boxes = [label.get_window_extent().shrunk(1, 0.9) for label in labels]
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))


def test_confusion_is_in_shares_of_the_true_class_and_costs_have_one_digit():
    ax = plots.plot_confusion(torch.tensor([[3, 1], [0, 0]]), CLASSES[:2])
    np.testing.assert_allclose(ax.collections[0].get_array(), [[0.75, 0.25], [0, 0]])
    assert [t.get_text() for t in ax.texts] == [".75", ".25", "", ""]
    dark, light = (linear(t.get_color()).mean() for t in ax.texts[:2])
    assert dark < 0.1 and light == 1  # each against its own ground
    cost = plots.plot_cost(torch.tensor([[0.0, 10.04], [0.96, 0.0]]), CLASSES[:2])
    assert [t.get_text() for t in cost.texts] == ["", "10.0", "1.0", ""]


# lines and dots


@pytest.mark.parametrize("count", [2, 6, 12, 66])
def test_ends_of_lines_are_named_apart_the_heaviest_first(count):
    weights = np.random.default_rng(0).dirichlet(np.full(count, 5.0), 8)
    weights[-1] = 1 / count + np.arange(count) * 1e-6  # all end in nearly the same place
    names = [f"edge {i}" for i in range(count)]
    ax = plots.plot_edges_over_training(weights, names)
    np.testing.assert_allclose(ax.lines[1].get_ydata(), weights[:, 1])
    named = {*names[-plots.NAMED :]}
    assert named == {t.get_text() for t in ax.texts}
    assert assert_apart(ax) == len(named)
    lines = ax.lines[:count][-len(named) :]
    assert len({(n.get_color(), n.get_linestyle(), n.get_marker()) for n in lines}) == len(named)
    assert ax.lines[-1].get_ydata()[0] == pytest.approx(1 / count)
    assert ax.get_ylim() == (0, pytest.approx(1.06 * weights.max()))


def test_history_leaves_gaps_for_missing_numbers():
    rows = [{"epoch": i, "loss": 1.0 / (i + 1)} | ({"acc": 0.5} if i % 2 else {}) for i in range(6)]
    ax = plots.plot_history(rows, ["loss", "acc"])
    assert np.isnan(ax.lines[1].get_ydata()).sum() == 3
    assert {"loss", "acc"} <= set(texts(ax))
    (at,) = (t.xy for t in ax.texts if t.get_text() == "acc")
    np.testing.assert_allclose(at, (5, 0.5))
    assert plots.plot_history([{"loss": 1.0}], ["loss"], ax) is ax


def test_embedding_draws_every_point_once_and_names_classes_in_a_legend():
    labels = torch.tensor([0, 1, 1, 2, -1, -1, 7])
    ax = plots.plot_embedding(torch.randn(7, 2), labels, CLASSES)
    counts = [int((labels == c).sum()) for c in (-1, *range(len(CLASSES)))]
    assert [len(c.get_offsets()) for c in ax.collections] == counts
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["unlabelled", *CLASSES]


def test_embedding_names_many_classes_in_the_plot_where_there_is_room():
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 60
    points = 3 * torch.randn(60, 2, generator=g)[labels] + 0.1 * torch.randn(600, 2, generator=g)
    ax = plots.plot_embedding(points, labels, [f"class {c}" for c in range(60)])
    assert ax.get_legend() is None
    assert assert_apart(ax) > 20
    for text in ax.texts:
        own = points[labels == int(text.get_text().split()[1])]
        np.testing.assert_allclose(text.get_position(), np.median(own, 0), rtol=1e-5)


@pytest.mark.slow
def test_umap_keeps_clusters_together_and_repeats():
    # Compiling takes 20 s, 18 points uncompiled 2 s; numba reads the switch on import only.
    code = """
import numpy as np
from gdviz.show.plots import embed
which = np.arange(18) % 2
x = np.random.default_rng(0).normal(size=(18, 8)) + 8 * np.eye(8)[which]
a, b = embed(x, 3), embed(x, 3)
assert a.shape == (18, 2) and np.isfinite(a).all() and (a == b).all()
d = np.linalg.norm(a[:, None] - a, axis=-1) + 1e9 * np.eye(18)
assert (which[d.argmin(1)] == which).all()
"""
    env = os.environ | {"NUMBA_DISABLE_JIT": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_umap_runs_where_numba_can_keep_nothing():
    # Of the places where numba keeps what it compiled only one that is named stays.
    code = """
from numba.core import caching
impl = caching.CacheImpl
impl._locator_classes = [c for c in impl._locator_classes if "UserProvided" in c.__name__]
assert impl._locator_classes
from gdviz.show.plots import _umap
assert _umap().__name__ == "UMAP"
"""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# results


def results(seeds=3):
    plain = {"kind": "student", "colour": 4, "marker": "o", "headline": False, "shuffled": False}
    models = [
        {"kind": "teacher", "label": "order", "marker": "s"},
        {"label": "labels only"},
        {"label": "both graphs", "headline": True, "colour": 0, "marker": "D"},
        {"label": "control", "shuffled": True, "colour": 2, "marker": "X"},
    ]
    return pd.DataFrame(
        plain | model | {"name": model["label"], "seed": s, "accuracy": 0.4 + 0.05 * i + 0.01 * s}
        for s in range(seeds)
        for i, model in enumerate(models)
    )


def test_accuracy_shows_mean_and_spread_of_each_model_in_order():
    ax = comparisons.plot_accuracy(results(), chance=0.125)
    names = ["teacher: order", "labels only", "both graphs", "control"]
    assert [t.get_text() for t in ax.texts[:-1:2]] == names
    assert [t.get_text() for t in ax.texts[1::2]] == [f"{41 + 5 * i}.0 ± 1.0" for i in range(4)]
    bold = {t.get_text() for t in ax.texts if t.get_fontweight() == "bold"}
    italic = {t.get_text() for t in ax.texts if t.get_fontstyle() == "italic"}
    assert (bold, italic) == ({"both graphs", "51.0 ± 1.0"}, {"control", "56.0 ± 1.0"})
    assert ax.texts[-1].get_text() == " chance"
    assert [c.lines[0].get_xdata()[0] for c in ax.containers] == pytest.approx([41, 46, 51, 56])
    looks = [(c.lines[0].get_marker(), c.lines[0].get_color()) for c in ax.containers]
    assert looks[2] == ("D", plots.PALETTE[0])
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first row is on top
    assert_apart(ax)


def test_one_seed_has_no_spread():
    shown = texts(comparisons.plot_accuracy(results(1)))
    assert "50.0" in shown
    assert not any("±" in t for t in shown if t[0].isdigit())


@pytest.mark.parametrize("x", ["latency_ms", "params", "gflops"])
@pytest.mark.parametrize("ratio", [1.0, 10.0])
def test_tradeoff_names_every_model_once_and_apart(x, ratio):
    teachers = [results().query("name == 'order'").assign(name=t, label=t) for t in TEACHERS[:9]]
    rows = pd.concat([*teachers, results().query("kind == 'student'")])
    rows[x] = np.where(rows["kind"] == "teacher", 3 * ratio, 3)
    rows["accuracy"] = 0.6 + 0.002 * np.arange(len(rows))
    ax = comparisons.plot_tradeoff(rows, x)
    assert ax.get_xscale() == "log"
    names = [*(f"teacher: {t}" for t in TEACHERS[:9]), "labels only", "both graphs", "control"]
    assert sorted(t.get_text() for t in ax.texts) == sorted(names)
    assert_apart(ax)
    points = np.concatenate([c.get_offsets() for c in ax.collections])
    means = rows.groupby(["kind", "name"], sort=False)["accuracy"].mean()
    np.testing.assert_allclose(points[:, 1], 100 * means)


def test_filmstrip_undoes_the_normalisation_and_puts_frames_in_rows():
    frames = np.random.default_rng(0).integers(0, 256, (2, 6, 8, 8, 3), dtype=np.uint8)
    floats = (torch.from_numpy(frames).permute(0, 4, 1, 2, 3) / 255 - 0.5) / 0.25
    for clips in (frames, floats):
        ax = plots.plot_filmstrip(clips, ["left", "right"], every=2)
        shown, step = ax.images[0].get_array(), 8 + 1
        assert shown.shape == (2 * step, 3 * step, 3)
        np.testing.assert_array_equal(shown[step : step + 8, step : step + 8], frames[1, 2])
        assert (shown[8] == 255).all()
        assert [t.get_text() for t in ax.get_yticklabels()] == ["left", "right"]
        assert [t.get_text() for t in ax.get_xticklabels()] == ["frame 0", "2", "4"]
    one = plots.plot_filmstrip(frames[:1], columns=list("abcdef"))
    assert [t.get_text() for t in one.get_xticklabels()] == list("abcdef")


# files and colours


def saved(figure, folder):
    return [path.read_bytes() for path in plots.save_figure(figure, folder, "figure")]


@pytest.mark.parametrize(
    "draw", [plots.plot_logits_graph, lambda _: comparisons.plot_accuracy(results())]
)
def test_saved_twice_is_the_same_bytes(graph, tmp_path, draw):
    figure = draw(graph).figure
    first = saved(figure, tmp_path)
    assert first == saved(figure, tmp_path) == saved(draw(graph).figure, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["figure.pdf", "figure.png", "figure.svg"]


def test_saved_files_have_no_dates_and_text_stays_text(graph, tmp_path):
    pdf, svg, png = saved(plots.plot_logits_graph(graph).figure, tmp_path)
    assert pdf.startswith(b"%PDF")
    assert b"CreationDate" not in pdf
    assert b"/FontFile2" in pdf
    assert b">consensus</text>" in svg
    assert b"<dc:date>" not in svg
    assert png.startswith(b"\x89PNG")


def test_a_refused_write_is_told_and_leaves_nothing(graph, tmp_path):
    (tmp_path / "logits.pdf").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        plots.save_figure(plots.plot_logits_graph(graph).figure, tmp_path, "logits")
    assert [p.name for p in tmp_path.iterdir()] == ["logits.pdf"]


# Machado et al. 2009: linear RGB as seen without red, green or blue cones.
SEEN = {
    "all": np.eye(3),
    "protan": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deutan": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritan": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}


def linear(colour):
    c = np.array(to_rgb(colour))
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    xyz = np.array([[0.412, 0.358, 0.181], [0.213, 0.715, 0.072], [0.019, 0.119, 0.951]]) @ rgb
    x, y, z = np.cbrt(np.maximum(xyz / (0.951, 1, 1.089), 1e-6))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("eyes", SEEN)
def test_the_palette_keeps_colours_apart_for_colour_blind_readers(eyes):
    seen = [lab(np.clip(np.array(SEEN[eyes]) @ linear(c), 0, 1)) for c in plots.PALETTE]
    assert min(np.linalg.norm(a - b) for a, b in combinations(seen, 2)) > 25


def test_the_palette_is_dark_enough_for_white_paper():
    light = [linear(colour) @ (0.2126, 0.7152, 0.0722) for colour in plots.PALETTE]
    assert all(1.05 / (y + 0.05) > 2.9 for y in light)


@pytest.mark.slow
def test_an_embedding_leaves_pytorch_its_threads():
    """numba sets them, and sums over other threads differ in the last digit."""
    before = torch.get_num_threads()
    plots.embed(torch.randn(12, 4))
    assert torch.get_num_threads() == before


def test_a_class_named_like_mathematics_is_drawn_letter_by_letter(tmp_path):
    names = ("pay_$^$", "$")
    axes = [
        plots.plot_plan(torch.eye(2), names, "a", "b"),
        plots.plot_embedding(torch.randn(4, 2), torch.tensor([0, 0, 1, 1]), names),
        plots.plot_filmstrip(torch.zeros(2, 3, 4, 8, 8), names),
    ]
    for k, ax in enumerate(axes):
        plots.save_figure(plots.figure_of(ax), tmp_path, str(k))
        assert "pay_$^$" in (tmp_path / f"{k}.svg").read_text(), k


@pytest.mark.parametrize(("width", "classes"), [(3.25, 10), (6.75, 10), (3.25, 24), (3.25, 60)])
def test_long_names_leave_an_embedding_most_of_its_figure(width, classes):
    names = [f"Something falling like a feather or paper, {c}" for c in range(classes)]
    points, labels = torch.randn(120, 2), torch.arange(120) % classes
    with plots.style():
        fig, ax = plt.subplots(figsize=(width, 0.7 * width))
        plots.plot_embedding(points, labels, names, ax)
        fig.draw_without_rendering()
        box, whole = ax.get_window_extent(), fig.bbox
        drawn = ax.get_tightbbox()
    assert box.width > 0.6 * whole.width and box.height > 0.35 * whole.height
    assert drawn.x0 >= -1 and drawn.x1 <= whole.x1 + 1 and drawn.y0 >= -1


def test_logarithmic_axes_have_numbers_not_markup(tmp_path):
    with plots.style():
        fig, ax = plt.subplots()
        ax.semilogx([0.01, 0.1, 1], [1, 2, 3])
        plots.save_figure(fig, tmp_path, "log")
    drawn = re.sub("<!--.*?-->", "", (tmp_path / "log.svg").read_text())
    assert "mathdefault" not in drawn

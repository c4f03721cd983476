"""Figures hold what they promise, change nothing around them, and are the same bytes twice."""

import os
import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pytest
import torch

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch

from gdviz.config import METHODS
from gdviz.core.files import UserError
from gdviz.data.motion import CLASSES
from gdviz.graphs import LogitsGraph, RepresentationGraph, zero_one_cost
from gdviz.show import plots

NAMES = ("order", "coherence", "registration", "prediction")
pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(autouse=True)
def _nothing_left_behind():
    before = dict(mpl.rcParams)
    yield
    assert dict(mpl.rcParams) == before
    plt.close("all")


def logits_graph(teachers=4, student=True, heavy=0.7):
    g = torch.Generator().manual_seed(teachers)
    probs = torch.randn(4, teachers, 5, generator=g).mul(2).softmax(-1)
    rest = (1 - heavy) * torch.softmax(torch.arange(teachers - 1.0), 0)
    weights = (
        torch.cat([torch.tensor([heavy]), rest]).expand(4, -1) if teachers > 1 else torch.ones(4, 1)
    )
    names = [*NAMES, "pace", "colour", "sound"][:teachers]
    return LogitsGraph(names, zero_one_cost(5)).to_networkx(
        probs, weights, probs[:, 0] if student else None
    )


@pytest.fixture(scope="module")
def graph():
    return logits_graph()


def texts(ax):
    return [t.get_text() for t in ax.findobj(mpl.text.Text) if t.get_text()]


def patches(ax):
    return {p.get_gid(): p for p in ax.patches if isinstance(p, FancyArrowPatch)}


def boxes(ax, wanted):
    ax.figure.draw_without_rendering()
    return [mpl.text.Text.get_window_extent(t) for t in ax.texts if t.get_text() in wanted]


def colour_bar(ax):
    return next(a for a in ax.figure.axes if a is not ax)


def test_logits_graph_draws_every_edge_and_names_every_vertex(graph):
    ax = plots.plot_logits_graph(graph)
    drawn = patches(ax)
    assert {frozenset(gid.split(":")[1].split("|")) for gid in drawn} == {
        frozenset(e) for e in graph.edges
    }
    assert set(NAMES) | {"consensus", "student"} <= set(texts(ax))
    for name in NAMES:
        assert f"{graph.edges['consensus', name]['weight']:.2f}" in texts(ax)
    assert (
        len({tuple(c.get_paths()[0].vertices.ravel()) for c in ax.collections}) == 3
    )  # shapes of vertices


def test_width_and_colour_follow_weight_and_glued_edges_are_thin_and_dashed(graph):
    drawn = patches(plots.plot_logits_graph(graph))
    solid = [
        (graph.edges[g.split(":")[1].split("|")]["weight"], p)
        for g, p in drawn.items()
        if not g.startswith("glued")
    ]
    solid.sort(key=lambda pair: pair[0])
    widths = [p.get_linewidth() for _, p in solid]
    shades = [np.dot(p.get_edgecolor()[:3], (0.2, 0.7, 0.1)) for _, p in solid]
    assert widths == sorted(widths) and widths[0] < widths[-1]
    assert shades == sorted(shades, reverse=True)  # heavier is darker on white paper
    for gid, patch in drawn.items():
        dashed = patch.get_linestyle() != "-" and patch.get_linestyle() != "solid"
        assert dashed == gid.startswith("glued")
        assert not dashed or patch.get_linewidth() < 2


def test_panels_with_one_vmax_share_limits_and_widths(graph):
    fig, (left, right) = plt.subplots(1, 2)
    other = logits_graph(heavy=0.4)
    for ax, of in ((left, graph), (right, other)):
        plots.plot_logits_graph(of, ax, vmax=0.8)
    assert [bar.get_ylim() for bar in fig.axes[2:]] == [(0, 0.8)] * 2
    a, b = (patches(ax)["matching:consensus|order"].get_linewidth() for ax in (left, right))
    assert (a - 0.8) / (b - 0.8) == pytest.approx(0.7 / 0.4, rel=1e-5)


def test_colour_bar_ends_at_the_heaviest_teacher_and_points_beyond_for_beta(graph):
    bar = colour_bar(plots.plot_logits_graph(graph))
    assert bar.get_ylim() == pytest.approx((0, 0.7)) and bar._colorbar.extend == "max"
    assert (
        colour_bar(plots.plot_logits_graph(logits_graph(student=False)))._colorbar.extend
        == "neither"
    )


@pytest.mark.parametrize("teachers", [1, 2, 3, 5, 7])
def test_any_number_of_teachers_keeps_names_apart(teachers):
    graph = logits_graph(teachers)
    ax = plots.plot_logits_graph(graph)
    extents = boxes(ax, set(graph))
    assert len(extents) == teachers + 2
    assert not any(a.overlaps(b) for i, a in enumerate(extents) for b in extents[:i])


def test_representation_graph_has_one_edge_a_pair_with_weight_and_distance():
    rg = RepresentationGraph(NAMES, [4, 4, 5, 6], 3)
    graph = rg.to_networkx(
        torch.tensor([0.3, 0.2, 0.2, 0.15, 0.1, 0.05]), torch.linspace(0.1, 0.6, 6)
    )
    ax = plots.plot_representation_graph(graph)
    said = texts(ax)
    assert len(patches(ax)) == 6 and said.count("0.20") == 2
    for name, distance in zip(rg.names, np.linspace(0.1, 0.6, 6), strict=True):
        assert name.replace("+", " +\n") + f"\nMMD² {distance:.3f}" in said


@pytest.mark.parametrize("classes", [5, 20, 40])
def test_heat_maps_show_the_matrix_they_were_given(classes):
    matrix = (
        np.random.default_rng(0).dirichlet(np.ones(classes * classes)).reshape(classes, classes)
    )
    labels = [f"c{i}" for i in range(classes)]
    ax = plots.plot_plan(torch.tensor(matrix), labels, "consensus", "order")
    np.testing.assert_allclose(ax.collections[0].get_array(), matrix)
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("consensus", "order")
    assert ([t.get_text() for t in ax.get_yticklabels()] == labels) == (classes <= 30)
    assert bool(ax.texts) == (classes <= 10)


def test_cost_and_confusion_are_scaled_as_said():
    ax = plots.plot_cost(zero_one_cost(3), "abc")
    assert [t.get_text() for t in ax.texts if t.get_text()] == ["1.0"] * 6
    ax = plots.plot_confusion(torch.tensor([[3, 1, 0], [0, 2, 0], [0, 0, 0]]), "abc")
    np.testing.assert_allclose(
        ax.collections[0].get_array(), [[0.75, 0.25, 0], [0, 1, 0], [0, 0, 0]]
    )
    assert ax.collections[0].get_clim() == (0, 1)


def test_edges_over_training_names_lines_without_overlap_and_marks_uniform():
    weights = torch.full((5, 6), 1 / 6) + 1e-4 * torch.arange(
        6
    )  # six lines that end at the same place
    names = [f"edge {i}" for i in range(6)]
    ax = plots.plot_edges_over_training(weights, names)
    np.testing.assert_allclose(ax.lines[2].get_ydata(), weights[:, 2])
    assert ax.lines[6].get_ydata()[0] == pytest.approx(1 / 6)
    extents = boxes(ax, set(names))
    assert len(extents) == 6 and not any(
        a.overlaps(b) for i, a in enumerate(extents) for b in extents[:i]
    )
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in ax.lines[:6]}
    assert len(looks) == 6 and len({line.get_marker() for line in ax.lines[:6]}) == 6


def test_fifteen_edges_can_be_told_apart():
    ax = plots.plot_edges_over_training(
        np.random.default_rng(0).dirichlet(np.ones(15), 8), [str(i) for i in range(15)]
    )
    assert (
        len({(line.get_color(), line.get_linestyle(), line.get_marker()) for line in ax.lines[:15]})
        == 15
    )


def test_history_leaves_gaps_for_missing_numbers():
    rows = [
        {"epoch": i, "loss": 1.0 / (i + 1)} | ({"accuracy": 0.5} if i % 2 else {}) for i in range(6)
    ]
    ax = plots.plot_history(rows, ["loss", "accuracy"])
    assert np.isnan(ax.lines[1].get_ydata()).sum() == 3
    assert {"loss", "accuracy"} <= set(texts(ax))


def test_embedding_draws_every_point_once():
    labels = torch.tensor([0, 1, 1, 2, -1, -1, 7])
    ax = plots.plot_embedding(torch.randn(7, 2), labels, CLASSES)
    assert [len(c.get_offsets()) for c in ax.collections] == [
        2,
        *(int((labels == c).sum()) for c in range(len(CLASSES))),
    ]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["unlabelled", *CLASSES]


def test_umap_keeps_clusters_together_and_repeats():
    # Compiling UMAP takes 20 s and running 18 points uncompiled 2 s; numba reads the switch on import only.
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
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def accuracy_rows():
    methods = (*METHODS, "teacher:order")
    return [
        {"method": m, "seed": s, "accuracy": 0.4 + 0.05 * i + 0.01 * s}
        for i, m in enumerate(methods)
        for s in range(3)
    ]


def test_accuracy_shows_mean_and_spread_of_each_method_in_order():
    ax = plots.plot_accuracy(accuracy_rows(), chance=0.125)
    ticks = ax.get_yticklabels()
    assert [t.get_text() for t in ticks] == [
        *(plots.METHOD_NAMES[m] for m in METHODS),
        "teacher: order",
    ]
    assert {t.get_text() for t in ticks if t.get_fontweight() == "bold"} == {"both graphs"}
    assert {t.get_text() for t in ticks if t.get_fontstyle() == "italic"} == {
        "shuffled teachers (control)"
    }
    assert {"41.0 ± 1.0", "66.0 ± 1.0", " chance"} <= set(texts(ax))
    assert ax.containers[0].lines[0].get_xdata()[0] == pytest.approx(41)
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first row is on top


def test_one_seed_has_no_spread():
    ax = plots.plot_accuracy([{"method": "labels", "seed": 0, "accuracy": 0.5}])
    assert "50.0" in texts(ax) and not any("±" in t and "50" in t for t in texts(ax))


@pytest.mark.parametrize("x", ["latency_ms", "params", "gflops"])
def test_tradeoff_names_every_model_once_and_apart(x):
    rows = [
        {
            "name": f"model {i}",
            "kind": "teacher" if i < 3 else "student",
            "accuracy": 0.6 + 0.002 * i,
        }
        | {
            "latency_ms": 3 + 30 * (i < 3),
            "params": 8e4 * (1 + 9 * (i < 3)),
            "gflops": 0.3 * (1 + (i < 3)),
        }
        for i in range(6)
    ]
    ax = plots.plot_tradeoff(rows, x)
    names = {row["name"] for row in rows}
    extents = boxes(ax, names)
    assert ax.get_xscale() == "log" and len(extents) == 6
    assert not any(a.overlaps(b) for i, a in enumerate(extents) for b in extents[:i])
    assert all(ax.bbox.x0 <= b.x0 and b.x1 <= ax.bbox.x1 for b in extents)


def test_filmstrip_undoes_the_normalisation():
    frames = np.random.default_rng(0).integers(0, 256, (2, 6, 8, 8, 3), dtype=np.uint8)
    floats = (torch.from_numpy(frames).permute(0, 4, 1, 2, 3) / 255 - 0.5) / 0.25
    for clips, scale in ((frames, 1), (floats, 255)):
        fig = plots.plot_filmstrip(clips, ["left", "right"], every=2)
        assert len(fig.axes) == 6
        np.testing.assert_allclose(
            fig.axes[4].images[0].get_array() * scale, frames[1, 2], atol=1e-3
        )
        assert [a.get_ylabel() for a in fig.axes[::3]] == ["left", "right"]
    assert len(plots.plot_filmstrip(frames[0]).axes) == 6


def saved(figure, folder):
    return [path.read_bytes() for path in plots.save_figure(figure, folder, "figure")]


@pytest.mark.parametrize(
    "draw", [plots.plot_logits_graph, lambda g: plots.plot_accuracy(accuracy_rows())]
)
def test_saved_twice_is_the_same_bytes(graph, tmp_path, draw):
    figure = draw(graph).figure
    first = saved(figure, tmp_path)
    assert first == saved(figure, tmp_path) == saved(draw(graph).figure, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["figure.pdf", "figure.png", "figure.svg"]


def test_saved_files_have_no_dates_and_text_stays_text(graph, tmp_path):
    pdf, svg, png = saved(plots.plot_logits_graph(graph).figure, tmp_path)
    assert pdf.startswith(b"%PDF") and b"CreationDate" not in pdf and b"/FontFile2" in pdf
    assert b">registration</text>" in svg and b"<dc:date>" not in svg
    assert png.startswith(b"\x89PNG")


def test_a_refused_write_is_told_and_leaves_nothing(graph, tmp_path):
    (tmp_path / "logits.pdf").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        plots.save_figure(plots.plot_logits_graph(graph).figure, tmp_path, "logits")
    assert [p.name for p in tmp_path.iterdir()] == ["logits.pdf"]


def test_every_plot_takes_axes_and_has_no_nan_in_its_text(graph):
    fig, ax = plt.subplots()
    assert plots.plot_history([{"epoch": 0, "loss": 1.0}], ["loss"], ax) is ax
    for drawn in (plots.plot_accuracy(accuracy_rows()), plots.plot_logits_graph(graph)):
        assert drawn.figure is not fig and not any("nan" in t.lower() for t in texts(drawn))

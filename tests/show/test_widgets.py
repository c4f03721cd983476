"""Widgets: picture and read-out follow the controls, numbers are right, and errors are heard."""

import base64
import io
import json
import re
import warnings
from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from gdviz import graphs
from gdviz.graphs import RepresentationGraph, closed_form, evidence, teacher_prior, zero_one_cost
from gdviz.show import comparisons, plots, static, widgets
from gdviz.show.figures import open_finished

NAMES, CLASSES = ("order", "coherence", "registration"), ("left", "right", "up", "down")


def cast(classes=4):
    g = torch.Generator().manual_seed(0)
    truth = torch.randint(classes, (24,), generator=g)
    skill = torch.tensor([4.0, 2.0, 0.0])[:, None]
    logits = torch.randn(24, 3, classes, generator=g) + skill * torch.eye(classes)[truth][:, None]
    features = [torch.randn(24, d, generator=g) + torch.eye(4, d)[truth % 4] * 3 for d in (5, 6, 7)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        graph = RepresentationGraph(NAMES, [5, 6, 7], 4)
    graph.fit_scalers(features)
    return {
        "probs": logits.softmax(-1),
        "labels": torch.where(torch.arange(24) < 12, truth, -1),
        "features": features,
        "student": torch.randn(24, 4, generator=g) + torch.eye(4)[truth % 4],
        "cost": zero_one_cost(classes),
        "graph": graph,
    }


def family():
    """Two networks, by labels and distilled, and their teacher."""
    rows = [("big", "teacher", "order", 50, 9), ("small", "student", "labels", 30, 1)]
    rows += [("small", "student", "both-graphs", 45, 1), ("large", "student", "labels", 40, 4)]
    rows += [("large", "student", "both-graphs", 44, 4)]
    table = pd.DataFrame(rows, columns=["network", "kind", "name", "mean", "ms"])
    looks = {"labels": ("labels only", 4, "o", False, False)}
    looks |= {"both-graphs": ("both graphs", 6, "s", True, True)}
    fields = ["label", "colour", "marker", "headline", "unlabelled"]
    look = [looks.get(name, (None,) * 5) for name in table["name"]]
    costs = {"params": 1000 * table["ms"], "gflops": table["ms"], "peak_mb": table["ms"]}
    table = table.assign(low=table["mean"] - 2, high=table["mean"] + 2, **costs)
    return table.join(pd.DataFrame(look, columns=fields))


CAST = cast()
HISTORY = [{"epoch": e, "loss": 3.0 - e, "ce": 2.0 - e, "repr": 1.0 / (e + 1)} for e in range(4)]
VIDEOS = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8, 3), dtype=np.uint8)
MAKE = {
    "plan": lambda c: widgets.PlanExplorer(c["probs"], NAMES, CLASSES, c["cost"]),
    "edges": lambda c: widgets.EdgeExplorer(c["probs"], c["labels"], NAMES, c["cost"]),
    "bandwidth": lambda c: widgets.BandwidthExplorer(
        c["features"], c["student"], c["labels"], c["graph"]
    ),
    "sketch": lambda c: widgets.SketchExplorer(c["features"]),
    "player": lambda c: widgets.MotionPlayer(VIDEOS, ["a", "b <i>"]),
    "map": lambda c: widgets.ClipMap(
        np.array([[0.0, 1.0], [2.0, 0.0]]), VIDEOS, torch.tensor([1, -1]), CLASSES
    ),
    "replay": lambda c: widgets.TrainingReplay(
        HISTORY,
        torch.stack([c["student"] * (1 + k) for k in range(4)]),
        c["labels"],
        CLASSES,
        c["probs"][:2].mean(2).softmax(1),
        torch.full((2, 3), 1 / 3),
        NAMES,
        "abc",
    ),
    "picker": lambda c: widgets.ModelPicker(family()),
}
CHANGES = {
    "plan": {"clip": 3, "first": NAMES[1], "second": NAMES[1], "eps": 0.5, "temperature": 4.0},
    "edges": {"eta": 1.0, "alpha": 0.0, "prior": 0.0, "floor": 0.5},
    "bandwidth": {"first": "registration", "second": "order", "multiple": 10.0},
    "sketch": {"size": 64},
    "player": {"clip": 1, "frame": 2},
    "map": {"place": 1},
    "replay": {"epoch": 1},
    "picker": {"budget": 0.8},
}
EACH_CHANGE = [(name, *change) for name, of in CHANGES.items() for change in of.items()]


@pytest.fixture(scope="module")
def made():
    return {name: make(CAST) for name, make in MAKE.items()}


@pytest.mark.parametrize(("name", "control", "value"), EACH_CHANGE)
def test_a_control_changes_the_picture_and_the_read_out_and_back(made, name, control, value):
    widget = made[name]
    was, before = widget.values[control], widget.page.shown
    widget.move(**{control: value})
    assert widget.values[control] == value
    assert widget.page.shown["at"] == widget.page.at
    for part in ("picture", "readout", "alt"):
        assert widget.page.shown[part] != before[part]
    widget.move(**{control: was})
    assert widget.page.shown == before


@pytest.mark.parametrize("name", MAKE)
def test_the_page_moves_the_explorer_by_numbers_of_values(made, name):
    widget = made[name]
    before, shown = widget.page.at, widget.page.shown
    for k, control in enumerate(widget.page.controls):
        assert control["label"]
        assert len(set(control["texts"])) == len(control["texts"]) > 1
        widget.page.at = [
            (at + (i == k)) % len(widget.page.controls[i]["texts"]) for i, at in enumerate(before)
        ]
        assert widget.page.shown["at"] == widget.page.at
    widget.page.at = before
    assert widget.page.shown == shown
    assert "nan" not in shown["readout"].lower()


def test_sliders_of_a_log_scale_say_the_value():
    scale = static.log_scale(0.01, 1, 21)
    assert (scale[0], scale[10], scale[-1]) == (0.01, 0.1, 1.0)
    ratios = np.divide(scale[1:], scale[:-1])
    assert ratios == pytest.approx(np.full(20, 10**0.1), rel=0.05)
    texts = static.Control("eps", scale, 0.1).page["texts"]
    assert (texts[0], texts[3], texts[-1]) == ("0.01", "0.02", "1")


@pytest.mark.parametrize("name", MAKE)
def test_show_is_pure(made, name):
    widget, settings = made[name], dict(mpl.rcParams)
    before = widget.values, widget.page.shown
    figure, numbers = widget.show(**widget.values | CHANGES[name])
    assert isinstance(figure, Figure)
    assert numbers
    assert (widget.values, widget.page.shown) == before
    assert dict(mpl.rcParams) == settings
    assert plt.get_fignums() == []  # pyplot never hears of it


class Fragile(widgets.Explorer):
    """A number."""

    size, panels, limit = (1.0, 1.0), 1, 2

    def draw(self, axes, x):
        if x > self.limit:
            raise ValueError("x <b>too</b> large")
        axes[0].bar(0, x)
        return {"x </script>": x}


def number(start=1, still=6):
    return static.Control("x", range(6), start, still=still)


def test_a_clip_plays_in_its_picture_and_nothing_else_moves():
    widget = MAKE["map"](CAST)
    frames = Image.open(io.BytesIO(base64.b64decode(widget.page.shown["picture"].split(",")[1])))
    assert frames.n_frames == len(VIDEOS[0][::2]) and frames.info["loop"] == 0
    seen = []
    for k in range(frames.n_frames):
        frames.seek(k)
        seen.append(np.asarray(frames.convert("RGB")).astype(int))
    moved = np.abs(seen[1] - seen[0]).max(-1) > 0
    ys, xs = np.nonzero(moved)
    box = slice(ys.min(), ys.max() + 1), slice(xs.min(), xs.max() + 1)
    assert moved[box].mean() > 0.9 and xs.min() > 0.5 * moved.shape[1]
    beside = (
        seen[0][box[0], [xs.min() - 3, xs.max() + 3]],
        seen[0][[ys.min() - 3, ys.max() + 3], box[1]],
    )
    assert all((edge == 255).all() for edge in beside)  # nothing of the first frame is left over
    small = np.asarray(Image.fromarray(seen[1][box].astype(np.uint8)).resize((8, 8), 0)).astype(int)
    assert np.abs(small - VIDEOS[0][2]).max() <= 2


def test_the_picker_takes_the_most_accurate_model_within_the_budget():
    widget = MAKE["picker"](CAST)
    takes = {b: widget.show(budget=b)[1]["take"] for b in (0.5, 1, 5, 9)}
    assert takes == {0.5: "none takes 0.5 ms", 1: "small, both graphs", 5: "small, both graphs"} | {
        9: "big, order"
    }
    ax = comparisons.plot_front(family())
    (front,) = [line for line in ax.lines if line.get_label() == "Pareto front"]
    assert sorted(set(front.get_ydata())) == [45, 50]
    arrows = [text for text in ax.texts if text.arrow_patch]
    assert {(a.xyann[1], a.xy[1]) for a in arrows} == {(30, 45), (40, 44)}
    plt.close("all")


def test_a_clip_beside_what_is_said_of_it(finished):
    look = open_finished(finished)
    t = torch.linspace(0.2, 3, 6).view(3, 2)  # at each moment teachers are heard anew
    edges = replace(look.graphs.edges, temperatures=t)
    look = replace(look, graphs=replace(look.graphs, edges=edges))
    widget = widgets.ClipExplorer(look, look.test[:3])
    clip, names = int(look.test[1]), look.videos.label_names
    first, last = (widget.show(clip=1, moment=m) for m in (0, 2))
    assert last[1]["truth"] == names[look.videos.labels[clip]]
    consensus = look.graphs.edges.consensus[2, clip]
    assert last[1]["consensus"].startswith(names[int(consensus.argmax())])
    says = last[0].axes[1]
    weights = [float(label.get_text().split()[1]) for label in says.get_yticklabels()[:2]]
    assert weights == pytest.approx(look.graphs.edges.teachers[2, clip].tolist(), abs=0.006)
    drawn = np.asarray(says.collections[0].get_array()).reshape(4, -1)
    np.testing.assert_allclose(drawn[2], consensus.numpy(), atol=1e-6)
    np.testing.assert_allclose(drawn[:2], look.probs(2)[clip], atol=1e-6)
    drawn = np.asarray(first[0].axes[1].collections[0].get_array()).reshape(4, -1)
    np.testing.assert_allclose(drawn[:2], look.probs(0)[clip], atol=1e-6)
    before = [label.get_text() for label in first[0].axes[1].get_yticklabels()]
    assert before != [label.get_text() for label in says.get_yticklabels()]


def test_an_error_in_a_handler_is_raised_and_shown_then_forgotten():
    widget = Fragile(x=number())
    picture = widget.page.shown["picture"]
    with pytest.raises(ValueError, match="too"):
        widget.move(x=4)
    assert "ValueError: x &lt;b&gt;too" in widget.page.shown["readout"]
    assert "role='alert'" in widget.page.shown["readout"]
    assert widget.page.shown["picture"] == picture
    assert widget.page.shown["at"] == [4]  # no longer drawing
    widget.move(x=2)
    assert "alert" not in widget.page.shown["readout"]
    with pytest.raises(ValueError, match="too"):
        Fragile(x=number(4))
    with pytest.raises(ValueError, match="too"):
        widget.static()


# without a kernel


def table(block):
    """What a block's script is given."""
    data = block.rsplit("still(", 1)[1]
    return json.JSONDecoder().raw_decode(data)[0]


def test_without_a_kernel_each_place_of_the_controls_has_the_picture_the_kernel_draws(monkeypatch):
    monkeypatch.setattr(Fragile, "limit", 99)
    widget = Fragile(x=number())
    data = table(widget.static())
    assert data["at"] == [1]
    for x, shown in enumerate(data["shown"]):
        widget.move(x=x)
        assert shown == {k: v for k, v in widget.page.shown.items() if k != "at"}
        png = base64.b64decode(shown["picture"].partition(",")[2])
        assert Image.open(io.BytesIO(png)).size == (110, 110)
    assert len({shown["picture"] for shown in data["shown"]}) == 6


@pytest.mark.parametrize("name", ["plan", "edges", "player"])
def test_a_block_is_whole_small_and_starts_where_the_explorer_stands(made, name, monkeypatch):
    calls = []
    monkeypatch.setattr(static, "MOST", 8)
    monkeypatch.setattr(
        static,
        "shown",
        lambda title, figure, numbers: (
            calls.append(numbers)
            or {"picture": f"data:,{len(calls)}", "alt": "a", "readout": json.dumps(numbers)}
        ),
    )
    widget = made[name]
    data = table(block := widget.static())
    counts = [len(control["texts"]) for control in data["controls"]]
    assert 1 < len(data["shown"]) == np.prod(counts) <= 8
    first = data["shown"][int(np.ravel_multi_index(data["at"], counts))]
    assert json.loads(first["readout"]) == widget.show(**widget.values)[1]
    assert f'<img src="{first["picture"]}"' in block  # shown where scripts do not run
    fixed = {control.label for control in widget.controls.values()}
    fixed -= {control["label"] for control in data["controls"]}
    assert all(label in block.rsplit("</script>", 1)[1] for label in fixed)
    assert not re.search(r"https?://|\bimport\b|\bfetch\b|\bsrc=\"(?!data:)", block)
    assert block.count("</script>") == 1


def test_a_bundle_holds_the_live_explorer_and_the_block():
    widget = Fragile(x=number(still=2))
    widget.limit = 99
    bundle = widget._repr_mimebundle_()
    view = bundle["application/vnd.jupyter.widget-view+json"]
    assert view["model_id"] == widget.page.model_id
    assert bundle["text/html"] == widget.static()
    assert static.SCRIPT in bundle["text/html"]


def test_within_jupyterlab_the_table_of_pictures_is_not_made(monkeypatch):
    monkeypatch.setenv("JPY_SESSION_NAME", "03.ipynb")
    widget = Fragile(x=number())
    monkeypatch.setattr(Fragile, "show", None)
    text = widget._repr_mimebundle_()["text/html"]
    assert text.startswith("<img") and widget.page.shown["picture"] in text


def test_going_back_to_a_picture_draws_nothing(monkeypatch):
    widget, show, calls = Fragile(x=number()), Fragile.show, []
    monkeypatch.setattr(Fragile, "show", lambda self, x: calls.append(x) or show(self, x=x))
    seen = []
    for x in (0, 2, 0, 2):
        widget.move(x=x)
        seen.append(widget.page.shown)
    assert calls == [0, 2] and seen[:2] == seen[2:] and seen[0] != seen[1]


def test_a_replay_sees_features_along_the_main_axes_of_the_last_epoch():
    points = MAKE["replay"](CAST).points
    x = CAST["student"] - CAST["student"].mean(0)
    assert np.allclose(points[1], 2 * points[0], atol=1e-5)  # as the features of the test do
    variance = torch.linalg.svdvals(x)[:2].square().sum().item()
    assert np.square(points[0]).sum() == pytest.approx(variance, rel=1e-4)


def test_a_replay_shows_the_epoch_it_stands_at():
    widget = MAKE["replay"](CAST)
    for epoch in (0, 2):
        figure, numbers = widget.show(epoch=epoch)
        losses, clips, teachers, pairs = figure.axes
        dots = np.concatenate([c.get_offsets() for c in clips.collections])
        assert sorted(map(tuple, dots)) == sorted(map(tuple, widget.points[epoch].astype(float)))
        assert np.abs(dots).max() < clips.get_xlim()[1] and f"epoch {epoch}" in clips.get_title(
            "left"
        )
        assert losses.lines[-1].get_xdata()[0] == epoch and numbers["ce"] == HISTORY[epoch]["ce"]
        moments = [ax.lines[-1].get_xdata()[0] for ax in (teachers, pairs)]
        assert moments == [epoch // 2] * 2  # two moments, four epochs


def plan(explorer, *values):
    """Show the plan explorer at a clip, two teachers, eps and a temperature of 1."""
    names = "clip", "first", "second", "eps"
    return explorer.show(**dict(zip(names, values, strict=True)), temperature=1.0)


def test_plan_of_a_teacher_to_itself_costs_nothing_and_more_eps_costs_more(made):
    def cost(eps):
        return plan(made["plan"], 2, "order", "coherence", eps)[1]["cost of the plan"]

    costs = [cost(eps) for eps in (0.02, 0.2, 1.0)]
    p, q = made["plan"].probs[2, 0], made["plan"].probs[2, 1]
    assert costs == sorted(costs)
    assert costs[0] == pytest.approx(0.5 * float((p - q).abs().sum()), rel=0.02)
    same = plan(made["plan"], 2, "order", "order", 0.02)[1]
    assert same["cost of the plan"] < 1e-3
    assert same["marginal error"] < 1e-5
    assert same["converged"] == "yes"


def test_a_solver_that_gave_up_is_told_without_a_warning(made, monkeypatch):
    solve = widgets.graphs.sinkhorn
    weak = {"tol": 1e-12, "max_iter": 1}
    monkeypatch.setattr(widgets.graphs, "sinkhorn", lambda *a, **k: solve(*a, **k, **weak))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        numbers = plan(made["plan"], 1, "order", "registration", 0.01)[1]
    assert numbers["converged"] == "no: raise eps"


def test_of_many_classes_the_plan_shows_the_heaviest():
    many = cast(classes=60)
    names = [f"class {c}" for c in range(60)]
    explorer = widgets.PlanExplorer(many["probs"], NAMES, names, many["cost"])
    bars, heat, _ = plan(explorer, 0, "order", "coherence", 0.1)[0].axes
    shown = [t.get_text() for t in bars.get_yticklabels()]
    assert shown == [t.get_text() for t in heat.get_yticklabels()] == sorted(shown, key=names.index)
    assert len(shown) == plots.NAMED
    assert names[int(many["probs"][0, :2].sum(0).argmax())] in shown
    at = [names.index(name) for name in shown]
    whole = graphs.sinkhorn(*many["probs"][0, :2], many["cost"], eps=0.1).plan()
    np.testing.assert_allclose(heat.collections[0].get_array(), whole[at][:, at], atol=1e-6)


def test_edges_agree_with_the_default_policy_and_span_the_effective_number(made):
    explorer, probs, labels = made["edges"], CAST["probs"], CAST["labels"]
    c, prior = (
        evidence(probs, labels, CAST["cost"], alpha=0.3),
        teacher_prior(probs, labels, CAST["cost"]),
    )
    expected = closed_form(c, eta=0.2, log_prior=prior, floor=0.1)
    found = explorer.weights(eta=0.2, alpha=0.3, prior=1.0, floor=0.1)
    torch.testing.assert_close(found, expected)
    even = explorer.show(eta=0.1, alpha=0.5, prior=1.0, floor=1.0)[1]
    assert even["effective number of teachers"] == "3.00 of 3"
    sharp = explorer.show(eta=0.01, alpha=1.0, prior=1.0, floor=0.0)[1]
    assert float(sharp["effective number of teachers"].split()[0]) < 2
    assert sharp["heaviest"].startswith("order")


def test_bandwidth_of_one_is_the_loss_of_the_graph(made):
    explorer, graph = made["bandwidth"], CAST["graph"]
    expected = graph.distances(CAST["student"], CAST["features"], CAST["labels"]).detach()
    for pair, value in zip(graph.pairs, expected, strict=True):
        kernel, mmd, slope = explorer.mmd(pair, 1.0)
        assert mmd == pytest.approx(float(value), abs=1e-5)
        assert slope > 0
        assert kernel.shape == (3, 24, 24)
    # too narrow: no gradient
    assert explorer.mmd(graph.pairs[0], 1e-3)[2] < 0.05 * explorer.mmd(graph.pairs[0], 1.0)[2]


def test_sketch_error_falls_with_size_and_the_global_seed_stays():
    features = torch.randn(2, 30, 64, generator=torch.Generator().manual_seed(0)).unbind()
    explorer = widgets.SketchExplorer(features)
    state = torch.get_rng_state()
    errors = [explorer.sketched(m)[1] for m in (32, 512, 8192)]
    assert [explorer.errors[k] for k in (1, 5, 9)] == errors
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 0
    torch.testing.assert_close(torch.get_rng_state(), state)


def test_a_player_says_title_and_frame(made):
    player = made["player"]
    assert player.page.controls[1]["kind"] == "player"
    player.move(clip=1, frame=2)
    assert "3 of 3" in player.page.shown["readout"]
    assert "b &lt;i&gt;" in player.page.shown["readout"]
    player.move(clip=0, frame=0)

"""Widgets: picture and read-out follow the controls, numbers are right, and errors are heard."""

import base64
import warnings

import ipywidgets
import matplotlib as mpl
import numpy as np
import pytest
import torch

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from gdviz import graphs
from gdviz.graphs import RepresentationGraph, zero_one_cost
from gdviz.show import plots, widgets
from gdviz.student.weighting import entropic

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


CAST = cast()
VIDEOS = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8, 3), dtype=np.uint8)
MAKE = {
    "plan": lambda c: widgets.PlanExplorer(c["probs"], NAMES, CLASSES, c["cost"]),
    "edges": lambda c: widgets.EdgeExplorer(c["probs"], c["labels"], NAMES, c["cost"]),
    "bandwidth": lambda c: widgets.BandwidthExplorer(
        c["features"], c["student"], c["labels"], c["graph"]
    ),
    "sketch": lambda c: widgets.SketchExplorer(c["features"]),
    "player": lambda c: widgets.MotionPlayer(VIDEOS, ["a", "b <i>"]),
}
CHANGES = {
    "plan": {"clip": 3, "first": NAMES[1], "second": NAMES[1], "eps": 0.5, "temperature": 4.0},
    "edges": {"eta": 1.0, "alpha": 0.0, "prior": 0.0, "floor": 0.5},
    "bandwidth": {"first": "registration", "second": "order", "multiple": 8.0},
    "sketch": {"size": 64.0},
    "player": {"clip": 1, "frame": 2},
}
EACH_CHANGE = [(name, *change) for name, of in CHANGES.items() for change in of.items()]


@pytest.fixture(scope="module")
def made():
    return {name: make(CAST) for name, make in MAKE.items()}


@pytest.mark.parametrize(("name", "control", "value"), EACH_CHANGE)
def test_a_control_changes_the_picture_and_the_read_out_and_back(made, name, control, value):
    widget = made[name]
    was, before = widget.values[control], (widget.readout.value, widget.picture.value)
    widget.controls[control].value = value
    assert widget.values[control] == value
    assert widget.readout.value != before[0]
    assert widget.picture.value != before[1]
    widget.controls[control].value = was
    assert (widget.readout.value, widget.picture.value) == before


@pytest.mark.parametrize("name", MAKE)
def test_every_control_is_named_answers_keys_and_the_picture_stays_offline(made, name):
    widget = made[name]
    assert "nan" not in widget.readout.value.lower()
    assert all(control.description for control in widget.controls.values())
    for control in widget.controls.values():
        assert not isinstance(control, ipywidgets.Dropdown)  # JupyterLab takes its arrow keys
        assert isinstance(control, ipywidgets.ToggleButtons) or control.readout
    bundle = widget._repr_mimebundle_()
    assert base64.b64decode(bundle["image/png"]) == widget.picture.value
    assert widget.picture.value[:4] == b"\x89PNG"
    view = bundle["application/vnd.jupyter.widget-view+json"]
    assert view["model_id"] == widget.widget.model_id
    parts = {*widget.controls.values(), widget.readout, widget.picture}
    assert parts <= set(widget.widget.children)


@pytest.mark.parametrize("name", MAKE)
def test_show_is_pure(made, name):
    widget, settings = made[name], dict(mpl.rcParams)
    before = widget.values, widget.readout.value, widget.picture.value
    figure, numbers = widget.show(**widget.values | CHANGES[name])
    assert isinstance(figure, Figure)
    assert numbers
    assert (widget.values, widget.readout.value, widget.picture.value) == before
    assert dict(mpl.rcParams) == settings
    assert plt.get_fignums() == []  # pyplot never hears of it


class Fragile(widgets.Explorer):
    def draw(self, axes, x):
        if x > 2:
            raise ValueError("x <b>too</b> large")
        return {"x": x}


def test_an_error_in_a_handler_is_raised_and_shown_then_forgotten():
    widget = Fragile(x=ipywidgets.IntSlider(1, 0, 5, description="x"))
    picture = widget.picture.value
    with pytest.raises(ValueError, match="too"):
        widget.controls["x"].value = 4
    assert "ValueError: x &lt;b&gt;too" in widget.readout.value
    assert "role='alert'" in widget.readout.value
    assert widget.picture.value == picture
    widget.controls["x"].value = 2
    assert "alert" not in widget.readout.value
    with pytest.raises(ValueError, match="too"):
        Fragile(x=ipywidgets.IntSlider(4, 0, 5, description="x"))


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
    expected = entropic(probs, labels, cost=CAST["cost"], alpha=0.3, eta=0.2, floor=0.1)
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
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 0
    torch.testing.assert_close(torch.get_rng_state(), state)


def test_playing_moves_the_frame(made):
    player = made["player"]
    player.play.value = 2
    assert player.values["frame"] == 2
    assert "3 of 3" in player.readout.value
    player.controls["clip"].value = 1
    assert "b &lt;i&gt;" in player.readout.value
    player.controls["clip"].value = player.play.value = 0

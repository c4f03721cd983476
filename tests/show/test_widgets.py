"""Widgets: the picture and the read-out follow the controls, numbers are right, and errors are heard."""

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

from gdviz.graphs import RepresentationGraph, zero_one_cost
from gdviz.show import widgets
from gdviz.student.weighting import entropic

NAMES, CLASSES = ("order", "coherence", "registration"), ("left", "right", "up", "down")
pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module")
def cast():
    g = torch.Generator().manual_seed(0)
    truth = torch.randint(4, (24,), generator=g)
    skill = torch.tensor([4.0, 2.0, 0.0])[:, None]
    probs = (torch.randn(24, 3, 4, generator=g) + skill * torch.eye(4)[truth][:, None]).softmax(-1)
    labels = torch.where(torch.arange(24) < 12, truth, -1)
    features = [torch.randn(24, d, generator=g) + torch.eye(4, d)[truth] * 3 for d in (5, 6, 7)]
    student = torch.randn(24, 4, generator=g) + torch.eye(4)[truth]
    return {
        "probs": probs,
        "labels": labels,
        "features": features,
        "student": student,
        "cost": zero_one_cost(4),
    }


MAKE = {
    "plan": lambda c: widgets.PlanExplorer(c["probs"], NAMES, CLASSES, c["cost"]),
    "edges": lambda c: widgets.EdgeExplorer(c["probs"], c["labels"], NAMES, c["cost"]),
    "bandwidth": lambda c: widgets.BandwidthExplorer(c["features"], c["student"], c["labels"]),
    "sketch": lambda c: widgets.SketchExplorer(c["features"]),
    "player": lambda c: widgets.MotionPlayer(
        np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8, 3), dtype=np.uint8), ["a", "b <i>"]
    ),
}
CHANGES = [
    ("plan", "clip", 3), ("plan", "first", "coherence"), ("plan", "second", "coherence"), ("plan", "eps", 0.5),
    ("plan", "temperature", 4.0),
    ("edges", "eta", 1.0), ("edges", "alpha", 0.0), ("edges", "prior", 0.0), ("edges", "floor", 0.5),
    ("bandwidth", "pair", (1, 2)), ("bandwidth", "multiple", 8.0), ("sketch", "size", 64.0),
    ("player", "clip", 1), ("player", "frame", 2),
]  # fmt: skip


@pytest.fixture(scope="module")
def made(cast):
    return {name: make(cast) for name, make in MAKE.items()}


@pytest.mark.parametrize(("name", "control", "value"), CHANGES)
def test_a_control_changes_the_picture_and_the_read_out_and_back(made, name, control, value):
    widget = made[name]
    was, before = widget.values[control], (widget.readout.value, widget.picture.value)
    widget.controls[control].value = value
    assert widget.values[control] == value
    assert widget.readout.value != before[0] and widget.picture.value != before[1]
    widget.controls[control].value = was
    assert (widget.readout.value, widget.picture.value) == before


@pytest.mark.parametrize("name", MAKE)
def test_every_control_is_named_and_read_out_and_the_picture_stays_offline(made, name):
    widget = made[name]
    assert widget.errors == [] and "nan" not in widget.readout.value.lower()
    assert all(control.description for control in widget.controls.values())
    sliders = [c for c in widget.controls.values() if not isinstance(c, ipywidgets.Dropdown)]
    assert sliders and all(slider.readout for slider in sliders)
    bundle = widget._repr_mimebundle_()
    assert (
        base64.b64decode(bundle["image/png"]) == widget.picture.value
        and widget.picture.value[:4] == b"\x89PNG"
    )
    view = bundle["application/vnd.jupyter.widget-view+json"]
    assert view["model_id"] == widget.widget.model_id
    assert {*widget.controls.values(), widget.readout, widget.picture} <= set(
        widget.widget.children
    )


@pytest.mark.parametrize("name", MAKE)
def test_draw_is_pure(made, name):
    widget = made[name]
    before, settings = (
        (widget.values, widget.readout.value, widget.picture.value),
        dict(mpl.rcParams),
    )
    control, value = next((c, v) for n, c, v in CHANGES if n == name)
    assert isinstance(widget.draw(**{control: value}), Figure)
    assert (widget.values, widget.readout.value, widget.picture.value) == before
    assert dict(mpl.rcParams) == settings and plt.get_fignums() == []  # pyplot never hears of it


class Fragile(widgets.Explorer):
    def show(self, x):
        if x > 2:
            raise ValueError("x <b>too</b> large")
        return Figure(), {"x": x}


def test_an_error_in_a_handler_is_raised_shown_and_recorded_then_forgotten():
    widget = Fragile(x=ipywidgets.IntSlider(1, 0, 5, description="x"))
    picture = widget.picture.value
    with pytest.raises(ValueError, match="too"):
        widget.controls["x"].value = 4
    assert (
        "ValueError: x &lt;b&gt;too" in widget.readout.value
        and "role='alert'" in widget.readout.value
    )
    assert [type(e) for e in widget.errors] == [ValueError] and widget.picture.value == picture
    widget.controls["x"].value = 2
    assert "alert" not in widget.readout.value and len(widget.errors) == 1


def test_an_error_at_birth_is_raised():
    with pytest.raises(ValueError, match="too"):
        Fragile(x=ipywidgets.IntSlider(4, 0, 5, description="x"))


def test_plan_of_a_teacher_to_itself_costs_nothing_and_more_eps_costs_more(made):
    costs = [
        made["plan"].show(2, "order", "coherence", eps)[1]["cost of the plan"]
        for eps in (0.02, 0.2, 1.0)
    ]
    p, q = made["plan"].probs[2, 0], made["plan"].probs[2, 1]
    assert costs == sorted(costs) and costs[0] == pytest.approx(
        0.5 * float((p - q).abs().sum()), rel=0.02
    )
    numbers = made["plan"].show(2, "order", "order", 0.02)[1]
    assert (
        numbers["cost of the plan"] < 1e-3
        and numbers["marginal error"] < 1e-5
        and numbers["converged"] == "yes"
    )


def test_a_solver_that_gave_up_is_told_without_a_warning(made, monkeypatch):
    solve = widgets.graphs.sinkhorn
    monkeypatch.setattr(
        widgets.graphs, "sinkhorn", lambda *a, **k: solve(*a, **k, tol=1e-12, max_iter=1)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        numbers = made["plan"].show(1, "order", "registration", 0.01)[1]
    assert numbers["converged"] == "no: raise eps"


def test_edges_agree_with_the_default_policy_and_span_the_effective_number(made, cast):
    explorer = made["edges"]
    expected = entropic(
        cast["probs"], cast["labels"], cost=cast["cost"], alpha=0.3, eta=0.2, floor=0.1
    )
    torch.testing.assert_close(explorer.weights(eta=0.2, alpha=0.3, prior=1.0, floor=0.1), expected)
    assert (
        explorer.show(eta=0.1, alpha=0.5, prior=1.0, floor=1.0)[1]["effective number of teachers"]
        == "3.00 of 3"
    )
    sharp = explorer.show(eta=0.01, alpha=1.0, prior=1.0, floor=0.0)[1]
    assert float(sharp["effective number of teachers"].split()[0]) < 2 and sharp[
        "heaviest"
    ].startswith("order")


def test_bandwidth_of_one_is_the_loss_of_the_graph(cast):
    graph = RepresentationGraph(NAMES, [5, 6, 7], 4)
    graph.fit_scalers(cast["features"])
    explorer = widgets.BandwidthExplorer(cast["features"], cast["student"], cast["labels"], graph)
    expected = graph.distances(cast["student"], cast["features"], cast["labels"]).detach()
    for pair, value in zip(graph.pairs, expected, strict=True):
        kernel, mmd, slope = explorer.mmd(pair, 1.0)
        assert mmd == pytest.approx(float(value), abs=1e-5) and slope > 0
        assert kernel.shape == (3, 24, 24)
    assert (
        explorer.mmd(graph.pairs[0], 1e-3)[2] < 0.05 * explorer.mmd(graph.pairs[0], 1.0)[2]
    )  # too narrow: no gradient


def test_sketch_error_falls_with_size_and_the_global_seed_stays():
    explorer = widgets.SketchExplorer(
        torch.randn(2, 30, 64, generator=torch.Generator().manual_seed(0)).unbind()
    )
    state = torch.get_rng_state()
    errors = [explorer.sketched(m)[1] for m in (32, 512, 8192)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 0
    torch.testing.assert_close(torch.get_rng_state(), state)


def test_playing_moves_the_frame(made):
    player = made["player"]
    player.play.value = 2
    assert player.values["frame"] == 2 and "3 of 3" in player.readout.value
    player.controls["clip"].value = 1
    assert "b &lt;i&gt;" in player.readout.value
    player.controls["clip"].value = player.play.value = 0

"""Figures of a finished run, and of what a run may be: few teachers or many, with many classes."""

import shutil
from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch

mpl.use("Agg")
from matplotlib import pyplot as plt

from gdviz.config import Distillation
from gdviz.core.files import UserError, load_tensors
from gdviz.data.videos import VideoSet
from gdviz.show import figures, plots
from gdviz.student.edges import Graphs, build_graphs, learn_edges
from gdviz.teachers.bank import Readout, gather

ROW = {"colour": 4, "marker": "o", "headline": False, "shuffled": False}


def look_of(count, classes, videos=240):
    """What figures show of a run with that many teachers and classes, without a training."""
    g, names = torch.Generator().manual_seed(0), [f"teacher {k}" for k in range(count)]
    labels = torch.arange(videos) % classes
    splits = ["train"] * (videos // 2) + ["test"] * (videos // 2)
    fold = torch.where(torch.arange(videos) < videos // 2, torch.arange(videos) % 3, -1)
    pixels = np.zeros((videos, 2, 2, 2, 3), np.uint8)
    classes_named = [f"a long class {c}" for c in range(classes)]
    videos = VideoSet.from_arrays(pixels, labels.tolist(), splits, label_names=classes_named)

    def random(size):
        return torch.randn(len(labels), size, generator=g) + 3 * torch.eye(classes, size)[labels]

    readouts = {name: Readout.from_means(random(classes), random(16), fold) for name in names}
    bank, cfg = gather(readouts, videos), Distillation()
    graphs = build_graphs(bank, videos.training_rows, cfg, 8)
    edges = learn_edges(bank, *graphs, cfg.edges, seed=0)
    models = [ROW | {"kind": "teacher", "name": name, "label": name} for name in names]
    models.append(ROW | {"kind": "student", "name": "plain", "label": "labels only"})
    models.append(models[-1] | {"name": "ours", "label": "both graphs", "headline": True})
    results = pd.DataFrame(
        model | {"seed": seed, "accuracy": 0.5 + 0.01 * i + 0.02 * seed}
        for seed in range(2)
        for i, model in enumerate(models)
    )
    cost = {"latency_ms": 0.4, "params": 4e4, "gflops": 0.02}
    teachers = {name: {key: 9 * value for key, value in cost.items()} for name in names}
    summary = {"baselines": {"chance": 0.1}, "teacher": teachers, "student": cost}
    outputs = {"logits": random(classes), "features": random(8)}
    graphs, student = Graphs(*graphs, edges), results.iloc[-1]
    return figures.Finished(videos, bank, graphs, True, results, summary, student, outputs)


@pytest.fixture(autouse=True)
def _closed(monkeypatch):
    monkeypatch.setattr(plots, "embed", lambda x: np.asarray(x)[:, :2])  # UMAP takes its time
    with plots.style():
        yield
    plt.close("all")


@pytest.mark.parametrize(("teachers", "classes"), [(1, 2), (2, 12), (9, 60)])
def test_every_figure_of_any_number_of_teachers_keeps_its_texts_on_the_page(teachers, classes):
    look = look_of(teachers, classes)
    for name, draw in figures.FIGURES.items():
        ax = draw(look)
        if ax is None:
            assert (name, teachers) == ("transport_plan", 1)
            continue
        figure = ax.figure
        assert figure.get_figwidth() <= 7, "text would be too small at the width of a page"
        figure.draw_without_rendering()
        texts = [t for t in figure.findobj(mpl.text.Text) if t.get_text() and t.get_visible()]
        assert min(t.get_fontsize() for t in texts) >= 6, name
        page = figure.bbox.padded(1)
        for text in (text for ax in figure.axes for text in ax.texts):
            box = mpl.text.Text.get_window_extent(text)
            assert page.contains(*box.min), (name, text)
            assert page.contains(*box.max), (name, text)


def test_figures_show_the_run_s_numbers():
    look = look_of(3, 4)
    weights = look.graphs.edges.teachers[-1][look.test].mean(0)
    texts = [t.get_text() for t in figures.FIGURES["logits_graph"](look).figure.axes[0].texts]
    assert texts[1:4] == [f"teacher {k}  {w:.2f}" for k, w in enumerate(weights.tolist())]
    plan = figures.FIGURES["transport_plan"](look).figure.axes[0]
    heavy = {f"teacher {k}" for k in weights.topk(2).indices.tolist()}
    assert {plan.get_ylabel(), plan.get_xlabel()} == heavy
    above, below = figures.FIGURES["edge_weights"](look).figure.axes
    known = look.graphs.edges.teachers[:, look.videos.training_rows].mean(1)
    np.testing.assert_allclose(above.lines[0].get_ydata(), known[:, 0])
    np.testing.assert_allclose(below.lines[0].get_ydata(), look.graphs.edges.pairs[:, 0])
    time, size = figures.FIGURES["tradeoff"](look).figure.axes
    points = np.concatenate([c.get_offsets() for c in size.collections])
    np.testing.assert_allclose(points, [*((36e4, 51 + k) for k in range(3)), (4e4, 54), (4e4, 55)])
    assert (time.get_xlabel(), size.get_xlabel()) == ("latency, ms a clip", "parameters")


def test_teachers_are_drawn_as_the_student_hears_them_recalibrated():
    look = look_of(3, 4)
    t = torch.ones_like(look.graphs.edges.temperatures)
    t[-1] = torch.tensor([0.5, 1.0, 4.0])
    edges = replace(look.graphs.edges, temperatures=t)
    look = replace(look, graphs=replace(look.graphs, edges=edges))
    t = look.graphs.logits.temperature * torch.tensor([0.5, 1.0, 4.0])[:, None]
    torch.testing.assert_close(look.probs(), torch.softmax(look.bank.logits / t, -1))
    first = look.bank.probs(look.graphs.logits.temperature)
    torch.testing.assert_close(look.probs(0), first)
    plan = look.matched(plans=True)["teacher 0"]["teacher 2"]
    whose = [int(plan[end][-1]) for end in ("rows", "columns")]
    rows, columns = look.probs()[look.test].mean(0)[whose]
    np.testing.assert_allclose(plan["plan"].sum(1), rows, atol=5e-3)
    np.testing.assert_allclose(plan["plan"].sum(0), columns, atol=5e-3)


def test_a_run_without_a_finished_student_is_named(finished, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "run")
    run = replace(finished, folder=tmp_path / "run")
    for file in run.folder.glob("seed0/students/*/result.json"):
        file.unlink()
    with pytest.raises(UserError, match="holds no finished student"):
        figures.open_finished(run)


def test_a_student_without_adapters_has_no_representation_graph():
    assert figures.FIGURES["representation_graph"](replace(look_of(2, 3), adapted=False)) is None


def test_a_finished_run_is_drawn_with_its_trained_adapters(finished, tmp_path, monkeypatch):
    look = figures.open_finished(finished)
    assert look.student["label"] == "both graphs"
    assert look.adapted
    state = load_tensors(finished.student_folder(0, look.student["name"]) / "method.safetensors")
    trained = look.graphs.representation.adapters[0].weight
    assert torch.equal(trained, state["graph.adapters.0.weight"])
    written = figures.draw_figures(finished, tmp_path)
    names = {f"{name}.{kind}" for name in figures.FIGURES for kind in ("pdf", "svg", "png")}
    assert {path.name for path in written} == names == {path.name for path in tmp_path.iterdir()}
    monkeypatch.setattr(figures, "FIGURES", {})
    monkeypatch.setattr(plots, "WHOLE", 3)  # longer names are shortened: what are they?
    figures.draw_figures(finished, tmp_path)
    numbered = [f"{k} {name}" for k, name in enumerate(look.videos.label_names, 1)]
    assert (tmp_path / "classes.txt").read_text().splitlines() == numbered


def test_what_cannot_be_drawn_is_told(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "FIGURES", {"never": lambda look: None})
    assert figures.draw_figures(finished, tmp_path) == []
    assert "never: not drawn" in capsys.readouterr().out

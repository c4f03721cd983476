"""Figures of a finished run: graphs, edges and embeddings of its first seed, accuracy of all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm.auto import tqdm

from gdviz.core.files import load_json, load_tensors
from gdviz.data.videos import VideoSet
from gdviz.experiment.folder import Run
from gdviz.graphs import effective_number
from gdviz.show import plots
from gdviz.student.edges import Graphs
from gdviz.teachers.bank import Bank


@dataclass(frozen=True)
class Finished:
    """What figures show: all results, and the first seed's teachers, graphs and one student."""

    run: Run
    videos: VideoSet
    bank: Bank
    graphs: Graphs
    results: pd.DataFrame
    method: str  # that student's: the headline method if it was trained
    outputs: dict[str, Tensor]  # its logits and features
    test: Tensor

    @classmethod
    def open(cls, run: Run) -> Finished:
        """Open what a finished run holds."""
        seed, videos, results = run.profile.seeds[0], run.videos(), run.results()
        ours = results[results["headline"].eq(True)]["name"]
        method = ours.iloc[0] if len(ours) else run.profile.methods[-1]
        outputs = load_tensors(run.student_folder(seed, method) / "outputs.safetensors")
        outputs = {name: x.float() for name, x in outputs.items()}
        bank, graphs, test = run.bank(seed, videos), run.graphs(seed), videos.rows("test")
        return cls(run, videos, bank, graphs, results, method, outputs, test)

    @property
    def label(self) -> str:
        """How the student's method is called."""
        return str(self.results.set_index("name").loc[[self.method], "label"].iloc[0])


def _logits_graph(look: Finished) -> Figure | None:
    if len(look.bank.teachers) < 2:  # no plan between two
        return None
    test, logits_graph = look.test, look.graphs.logits
    temperature = logits_graph.temperature
    student = torch.softmax(look.outputs["logits"][test] / temperature, 1)
    weights = look.graphs.edges.teachers[-1][test]
    graph = logits_graph.to_networkx(look.bank.probs(temperature)[test], weights, student)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6), width_ratios=(1.25, 1))
    plots.plot_logits_graph(graph, left)
    heaviest = sorted(look.bank.teachers, key=lambda t: -graph["consensus"][t]["weight"])
    edge = graph[heaviest[0]][heaviest[1]]
    plots.plot_plan(edge["plan"], look.videos.label_names, edge["rows"], edge["columns"], right)
    return figure


def _representation_graph(look: Finished) -> Figure | None:
    folder = look.run.student_folder(look.run.profile.seeds[0], look.method)
    file = folder / "method.safetensors"
    if not file.exists():  # a method without adapters
        return None
    state, prefix = load_tensors(file), "graph."
    trained = {k.removeprefix(prefix): x for k, x in state.items() if k.startswith(prefix)}
    if not trained:
        return None
    graph, edges, test = look.graphs.representation, look.graphs.edges, look.test
    graph.load_state_dict(trained)
    with torch.no_grad():
        distances = graph.distances(
            look.outputs["features"][test], look.bank.features_at(test), edges.consensus[-1][test]
        )
    figure, axes = plt.subplots(figsize=(5.4, 4.6))
    plots.plot_representation_graph(graph.to_networkx(edges.pairs[-1], distances), axes)
    return figure


def _edge_weights(look: Finished) -> Figure:
    edges, rows = look.graphs.edges, look.videos.training_rows
    teachers = edges.teachers[:, rows]
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    within = effective_number(teachers[-1]).mean()
    panels = (
        ("teachers", teachers.mean(1), within, look.bank.teachers),
        ("pairs", edges.pairs, effective_number(edges.pairs[-1]), look.graphs.representation.names),
    )
    for ax, (what, weights, number, names) in zip(axes, panels, strict=True):
        plots.plot_edges_over_training(weights.numpy(), names, ax)
        title = f"{what}: effective number {number:.1f} of {len(names)}"
        ax.set_title(title, loc="left", pad=24)
        ax.set_xlabel("moment of the training")
    return figure


def _embeddings(look: Finished) -> Figure | None:
    if len(look.test) < 5:  # UMAP needs neighbours
        return None
    weights = look.graphs.edges.teachers[-1][look.videos.training_rows].mean(0)
    best, test = int(weights.argmax()), look.test
    names = look.bank.teachers[best], look.label
    features = look.bank.features_at(test)[best], look.outputs["features"][test]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.4))
    titles = f"teacher: {names[0]}", f"student: {names[1]}"
    for ax, title, x in zip(axes, titles, features, strict=True):
        points = plots.embed(x.numpy())
        plots.plot_embedding(points, look.videos.labels[test], look.videos.label_names, ax)
        ax.set_title(title)
    if legend := axes[0].get_legend():  # one for both
        legend.remove()
    return figure


def _accuracy(look: Finished) -> Figure:
    baselines = load_json(look.run.folder / "summary.json")["baselines"]
    figure, axes = plt.subplots(figsize=(6.4, 4.4))
    plots.plot_accuracy(look.results, axes, chance=baselines["chance"])
    return figure


def _tradeoff(look: Finished) -> Figure:
    results, summary = look.results, load_json(look.run.folder / "summary.json")
    shown = [*look.bank.teachers, look.run.profile.methods[0], look.method]
    points = []
    for (kind, name), rows in results.groupby(["kind", "name"], sort=False):
        if name in shown:
            cost = summary["teacher"][name] if kind == "teacher" else summary["student"]
            about = {"name": rows["label"].iloc[0], "kind": kind}
            points.append(about | {"accuracy": rows["accuracy"].mean()} | cost)
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), sharey=True)
    for ax, x in zip(axes, ("latency_ms", "params", "gflops"), strict=True):
        plots.plot_tradeoff(points, x, ax)
    return figure


FIGURES: dict[str, Callable[[Finished], Figure | None]] = {
    "logits_graph": _logits_graph,
    "representation_graph": _representation_graph,
    "edge_weights": _edge_weights,
    "embeddings": _embeddings,
    "accuracy": _accuracy,
    "tradeoff": _tradeoff,
}


def draw_figures(run: Run, out: Path) -> list[Path]:
    """Draw ``FIGURES`` of a finished run as PDF, SVG and PNG; return the files.

    A figure that a run cannot fill is left out with a line.
    """
    look, written = Finished.open(run), []
    with plots.style():
        for name, draw in FIGURES.items():
            figure = draw(look)
            if figure is None:
                tqdm.write(f"{name}: not drawn, this run is too small for it or lacks the method")
                continue
            written += plots.save_figure(figure, out, name)
            plt.close(figure)
    return written

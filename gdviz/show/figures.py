"""Figures of a finished run: graphs, edges and embeddings of its first seed, accuracy of all.

They are made for a width of 5 to 7 inches: their text can be read there. The plots themselves may
be 3.25 inches wide.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx as nx
import pandas as pd
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from torch import Tensor
from tqdm.auto import tqdm

from gdviz.core.files import UserError, atomic, in_a_line, load_json, load_tensors
from gdviz.data.videos import VideoSet
from gdviz.experiment.folder import Run
from gdviz.graphs import effective_number
from gdviz.show import comparisons, plots
from gdviz.student.edges import Graphs
from gdviz.teachers.bank import Bank, cases_of


@dataclass(frozen=True)
class Finished:
    """What figures show: all results; of the first seed the teachers, graphs and one student.

    That is the student of the headline method, or of the last one.
    """

    videos: VideoSet
    bank: Bank
    graphs: Graphs
    adapted: bool  # the representation graph has that student's adapters
    results: pd.DataFrame
    summary: dict[str, Any]
    student: pd.Series  # its row of the results
    outputs: dict[str, Tensor]  # its logits and features of every video

    @property
    def test(self) -> Tensor:
        """Rows of the test videos."""
        return self.videos.rows("test")

    def probs(self, moment: int = -1) -> Tensor:
        """Return what teachers say of all cases, as the student hears it at a moment [m, k, c]."""
        t = self.graphs.logits.temperature * self.graphs.edges.temperatures[moment]
        return self.bank.probs(t)

    def matched(self, plans: bool = False) -> nx.Graph:
        """Return the logits graph of the test videos, with the student, and plans if asked for."""
        test, graph = self.test, self.graphs.logits
        said = cases_of(self.outputs["logits"][test], self.bank.cases_each > 1)
        student, cases = torch.softmax(said / graph.temperature, 1), self.bank.cases(test)
        weights = self.graphs.edges.teachers[-1][cases]
        return graph.to_networkx(self.probs()[cases], weights, student, plans=plans)

    @torch.no_grad()
    def distances(self) -> Tensor:
        """Return the distance of each pair's vertex to the student's, on the test videos."""
        test, edges = self.test, self.graphs.edges
        features = self.outputs["features"][test], self.bank.features_at(test)
        labels = self.bank.soft_labels(edges.consensus[-1][self.bank.cases(test)])
        return self.graphs.representation.distances(*features, labels)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of what the logits graph's plans move mass between."""
        return self.videos.label_names if self.bank.cases_each == 1 else ("not there", "there")


def open_finished(run: Run) -> Finished:
    """Open what a finished run holds.

    Raises:
        UserError: something is missing or damaged.
    """
    seed, videos, results = run.profile.seeds[0], run.videos(), run.results()
    students = results.query("kind == 'student'")
    if not len(students):
        raise UserError(f"{run.folder}: holds no finished student; the same `gdviz run` goes on")
    ours = students.query("headline")
    student = (ours if len(ours) else students).iloc[-1]
    folder, graphs = run.student_folder(seed, student["name"]), run.graphs(seed)
    file, prefix = folder / "method.safetensors", "graph."
    state = load_tensors(file) if file.exists() else {}
    adapters = {k.removeprefix(prefix): x for k, x in state.items() if k.startswith(prefix)}
    if adapters:
        graphs.representation.load_state_dict(adapters)
    outputs = run.outputs(seed, student["name"])
    bank, summary = run.bank(seed, videos), load_json(run.folder / "summary.json")
    return Finished(videos, bank, graphs, bool(adapters), results, summary, student, outputs)


def _plan(look: Finished) -> Axes | None:
    """The plan between the two heaviest teachers."""
    if len(look.bank.teachers) < 2:
        return None
    graph = look.matched(plans=True)
    a, b = sorted(look.bank.teachers, key=lambda t: -graph["consensus"][t]["weight"])[:2]
    edge = graph[a][b]
    return plots.plot_plan(edge["plan"], look.classes, edge["rows"], edge["columns"])


def _representation_graph(look: Finished) -> Axes | None:
    if not look.adapted:
        return None
    graph, pairs = look.graphs.representation, look.graphs.edges.pairs[-1]
    return plots.plot_representation_graph(graph.to_networkx(pairs, look.distances()))


def _edge_weights(look: Finished) -> Axes:
    edges, pairs = look.graphs.edges, look.graphs.representation.names
    teachers = edges.teachers[:, look.bank.cases(look.videos.training_rows)]
    _, axes = plt.subplots(2, figsize=(5.6, 6.4))
    for ax, what, names, mean, last in (
        # pairs first: the room that their names take makes both plots lower
        (axes[1], "pairs", pairs, edges.pairs, edges.pairs[-1]),
        (axes[0], "teachers", look.bank.teachers, teachers.mean(1), teachers[-1]),
    ):
        plots.plot_edges_over_training(mean, names, ax)
        effective = float(effective_number(last).mean())
        ax.set_title(f"effective number of {what}: {effective:.1f} of {len(names)}", loc="left")
    return axes[0]


def _embeddings(look: Finished) -> Axes | None:
    if len(look.test) < 5:  # UMAP needs neighbours
        return None
    weights = look.graphs.edges.teachers[-1][look.bank.cases(look.videos.training_rows)].mean(0)
    best, names = int(weights.argmax()), look.videos.label_names
    shown = {
        f"teacher: {look.bank.teachers[best]}": look.bank.features_at(look.test)[best],
        f"student: {look.student['label']}": look.outputs["features"][look.test],
    }
    _, axes = plt.subplots(1, 2, figsize=(6.75, 3.0))
    labels = look.videos.labels[look.test]
    if labels.ndim == 2:  # the first class that a video shows
        labels = torch.where((labels > 0).any(1), labels.argmax(1), -1)
    for ax, (title, features) in zip(axes, shown.items(), strict=True):
        plots.plot_embedding(plots.embed(features), labels, names, ax)
        ax.set_title(title)
    if legend := axes[0].get_legend():  # one for both
        legend.remove()
    return axes[0]


def _tradeoff(look: Finished) -> Axes:
    """The teachers, the first method's student (by default of the labels) and the headline's."""
    results, students = look.results, look.results.query("kind == 'student'")
    compared = results["name"].isin([students["name"].iloc[0], look.student["name"]])
    shown = results[compared | (results["kind"] == "teacher")]
    costs = [look.summary["teacher"].get(name, look.summary["student"]) for name in shown["name"]]
    shown = shown.join(pd.DataFrame(costs, index=shown.index))
    _, axes = plt.subplots(2, figsize=(5.6, 5.2))
    comparisons.plot_tradeoff(shown, "latency_ms", axes[0])
    return comparisons.plot_tradeoff(shown, "params", axes[1])


FIGURES: dict[str, Callable[[Finished], Axes | None]] = {  # an axes of each figure
    "logits_graph": lambda look: plots.plot_logits_graph(look.matched()),
    "transport_plan": _plan,
    "representation_graph": _representation_graph,
    "edge_weights": _edge_weights,
    "embeddings": _embeddings,
    "accuracy": lambda look: comparisons.plot_accuracy(
        look.results, chance=look.summary["baselines"]["chance"]
    ),
    "tradeoff": _tradeoff,
}


def draw_figures(run: Run, out: Path) -> list[Path]:
    """Draw ``FIGURES`` of a finished run as PDF, SVG and PNG; return the files.

    A figure that a run cannot fill, or that cannot be drawn, is left out with a line. Names of
    classes that figures shorten are written to ``classes.txt``, with their numbers.
    """
    look, written = open_finished(run), []
    if max(map(len, look.videos.label_names)) > plots.WHOLE:
        lines = [f"{k} {name}\n" for k, name in enumerate(look.videos.label_names, 1)]
        with atomic(out / "classes.txt") as file:
            file.write_text("".join(lines), encoding="utf-8")
    with plots.style():
        for name, draw in FIGURES.items():
            reason = "this run is too small for it or lacks the method"
            try:
                if ax := draw(look):
                    written += plots.save_figure(plots.figure_of(ax), out, name)
                    continue
            except UserError:  # there is no place to write to
                raise
            except Exception as error:
                reason = in_a_line(error)
            finally:
                plt.close("all")
            tqdm.write(f"{name}: not drawn, {reason}")
    return written

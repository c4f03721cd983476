"""A finished run as a table and as figures."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from math import comb
from pathlib import Path
from statistics import mean, stdev

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from gdviz.core.files import load_json, load_tensors
from gdviz.data.videos import VideoSet
from gdviz.experiment.metrics import (
    accuracy,
    calibration_error,
    linear_probe,
    per_class_accuracy,
    retrieval,
)
from gdviz.experiment.steps import Run
from gdviz.graphs import LogitsGraph, RepresentationGraph, effective_number
from gdviz.show import plots
from gdviz.student.edges import Edges
from gdviz.teachers.bank import Knowledge, build_graphs
from gdviz.teachers.fit import TeacherOutputs, build_teacher, calibration_temperature
from gdviz.teachers.readout import predict


def scores(run: Run) -> dict[tuple[str, str], list[float]]:
    """Test accuracies over seeds by (kind, name)."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in run.metrics():
        found[row["kind"], row["name"]].append(row["accuracy"])
    return dict(found)


def _percent(values: list[float]) -> str:
    return f"{100 * mean(values):5.1f}" + (
        f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
    )


def table(run: Run) -> str:
    """Mean and spread (standard deviation over seeds) of every teacher and student, sizes and baselines, as text."""
    summary = load_json(run.folder / "summary.json")
    data = summary["data"]
    count = data["videos"]
    lines = [
        f"{data['name']}: {count['train']} labelled, {count['unlabelled']} unlabelled, {count['test']} test videos, "
        f"{len(data['classes'])} classes, {data['skipped']} skipped; {len(run.profile.seeds)} seeds",
        "",
        f"{'':34}top-1 (mean ± std)",
    ]
    lines += [
        f"  {'baseline: ' + name:32}{100 * value:5.1f}"
        for name, value in summary["baselines"].items()
    ]
    found = scores(run)
    for (kind, name), values in found.items():
        lines.append(f"  {kind + ': ' + name:32}{_percent(values)}")
    both = found.get(("student", "both-graphs"), [])
    others = [
        name
        for (kind, name), values in found.items()
        if kind == "student" and name != "both-graphs" and len(values) == len(both)
    ]
    lines += ["", f"{'both-graphs less, seed by seed':34}points"] if others else []
    for name in others:
        lines.append(
            f"  {name:32}{_percent([a - b for a, b in zip(both, found['student', name], strict=True)])}"
        )
    ratio, student = summary["ratio"], summary["student"]
    lines += [
        "",
        f"the student has {student['params']:,} parameters, takes {student['gflops'] * 1e3:.1f} MFLOP and "
        f"{student['latency_ms']:.2f} ms a clip:",
        f"{ratio['params']:.1f} times smaller, {ratio['gflops']:.1f} times fewer FLOPs and {ratio['latency_ms']:.1f} times faster "
        "than the teachers together",
    ]
    return "\n".join(lines)


def _measures(
    videos: VideoSet, logits: Tensor, probs: Tensor, features: Tensor
) -> dict[str, float]:
    train, test = videos.rows("train"), videos.rows("test")
    labels, truth, groups = (
        videos.labels[train],
        videos.labels[test],
        [videos.groups[i] for i in train],
    )
    found = retrieval(
        features[train],
        labels,
        features[test],
        truth,
        [k for k in (1, 5, 10, 20) if k <= len(train)],
    )
    return {
        "top-1": accuracy(logits[test], truth),
        "probe": linear_probe(features[train], labels, groups, features[test], truth),
        **{f"R@{k}": value for k, value in found.items()},
        "ECE": calibration_error(torch.softmax(logits[test], 1), truth),
        "ECE scaled": calibration_error(probs[test], truth),
    }


def _scaled(logits: Tensor, labels: Tensor, test: Tensor) -> Tensor:
    """Probabilities of the test rows, every other one by the temperature that is best on the rest: no row judges itself."""
    probs = torch.full_like(logits, torch.nan)
    for half, rest in ((test[::2], test[1::2]), (test[1::2], test[::2])):
        probs[half] = torch.softmax(
            logits[half] / calibration_temperature(logits[rest], labels[rest]), 1
        )
    return probs


def _before_labels(run: Run, videos: VideoSet, seed: int, task: str) -> Tensor:
    """Features of a teacher's backbone as the pretext task left it, or of one's own, for the labelled and the test videos."""
    model = build_teacher(task, run.profile.teachers, len(videos.label_names)).to(
        run.where
    )  # its head is not used
    state = load_tensors(run.teacher_folder(seed, task) / "teacher.safetensors").items()
    model.backbone.load_state_dict(
        {k.removeprefix("pretrained."): v for k, v in state if k.startswith("pretrained.")}
    )
    rows, features = (
        torch.cat([videos.rows("train"), videos.rows("test")]),
        torch.zeros(len(videos.splits), model.backbone.dim),
    )
    features[rows] = predict(model, videos, rows, run.profile.view_of(task))[1]
    return features


def _chance(labels: Tensor, truth: Tensor, ks: list[int]) -> dict[str, float]:
    """What the largest class gives, and what neighbours drawn from the gallery's ``labels`` without looking do."""
    most = truth.bincount().max().item() / len(truth)
    alike = [int((labels == y).sum()) for y in truth]
    hit = {
        f"R@{k}": 1 - mean(comb(len(labels) - m, k) / comb(len(labels), k) for m in alike)
        for k in ks
    }
    return {"top-1": most, "probe": most, **hit}


def evaluation(run: Run) -> str:
    """What the field reports of frozen features, and calibration, of a finished run's teachers and students, as text.

    Probe and retrieval (gallery: labelled clips; queries: test clips) see of a teacher its backbone as the pretext task
    left it, before any label, and of a student its features. ECE is before and after temperature scaling: a teacher's
    temperature is fitted out of fold, a student's on the other half of the test part. Then top-1 by class.
    """
    videos = run.videos()
    train, test = videos.rows("train"), videos.rows("test")
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    by_class: dict[str, list[Tensor]] = defaultdict(list)
    for seed in run.profile.seeds:
        for task in run.profile.teachers.tasks:
            teacher = TeacherOutputs(
                **load_tensors(run.teacher_folder(seed, task) / "outputs.safetensors")
            )
            probs = torch.softmax(teacher.logits / teacher.temperature, 1)
            features = _before_labels(run, videos, seed, task)
            found[f"teacher: {task}"].append(_measures(videos, teacher.logits, probs, features))
        for method in run.profile.methods:
            outputs = load_tensors(run.student_folder(seed, method) / "outputs.safetensors")
            probs = _scaled(outputs["logits"], videos.labels, test)
            found[f"student: {method}"].append(
                _measures(videos, outputs["logits"], probs, outputs["features"])
            )
            by_class[method].append(
                per_class_accuracy(outputs["logits"][test], videos.labels[test])
            )
    columns = list(next(iter(found.values()))[0])
    ks = [int(name[2:]) for name in columns if name.startswith("R@")]
    rows = {"chance": [_chance(videos.labels[train], videos.labels[test], ks)], **found}
    lines = [f"{'mean ± std over seeds, %':32}" + "".join(f"{name:>13}" for name in columns)]
    for name, seeds in rows.items():
        lines.append(
            f"  {name:30}"
            + "".join(
                f"{_percent([row[c] for row in seeds]).strip():>13}"
                for c in columns
                if c in seeds[0]
            )
        )
    lines += [
        "",
        f"{'by class, mean over seeds, %':32}" + "".join(f"  {method}" for method in by_class),
    ]
    for k, label in enumerate(videos.label_names):
        shares = (
            f"{100 * mean(float(seed[k]) for seed in seeds):{len(method) + 2}.1f}"
            for method, seeds in by_class.items()
        )
        lines.append(f"  {label:30}" + "".join(shares))
    return "\n".join(lines)


@dataclass(frozen=True)
class _Finished:
    """What figures show: all seeds' metrics, and the first seed's teachers, edges and one student."""

    run: Run
    videos: VideoSet
    knowledge: Knowledge
    edges: Edges
    method: str
    outputs: dict[str, Tensor]  # of that student: logits, features
    test: Tensor

    @classmethod
    def open(cls, run: Run) -> _Finished:
        seed, videos, methods = run.profile.seeds[0], run.videos(), run.profile.methods
        method = "both-graphs" if "both-graphs" in methods else methods[-1]
        outputs = load_tensors(run.student_folder(seed, method) / "outputs.safetensors")
        return cls(
            run,
            videos,
            run.knowledge(seed, videos),
            run.edges(seed),
            method,
            outputs,
            videos.rows("test"),
        )

    def graphs(self) -> tuple[LogitsGraph, RepresentationGraph]:
        dim = self.outputs["features"].shape[1]
        return build_graphs(
            self.knowledge, dim, self.videos.training_rows, self.run.profile.distillation
        )


def _logits_graph(look: _Finished) -> Figure | None:
    if len(look.knowledge.teachers) < 2:  # no plan between two
        return None
    test, temperature = look.test, look.run.profile.distillation.temperature
    student_probs = torch.softmax(look.outputs["logits"][test] / temperature, 1)
    graph = look.graphs()[0].to_networkx(
        look.knowledge.probs(temperature)[test], look.edges.teachers[-1][test], student_probs
    )
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6), width_ratios=(1.25, 1))
    plots.plot_logits_graph(graph, left)
    first, second = sorted(look.knowledge.teachers, key=lambda t: -graph["consensus"][t]["weight"])[
        :2
    ]
    edge = graph[first][second]
    plots.plot_plan(edge["plan"], look.videos.label_names, edge["rows"], edge["columns"], right)
    return figure


def _representation_graph(look: _Finished) -> Figure | None:
    file = (
        look.run.student_folder(look.run.profile.seeds[0], look.method)
        / "representation_graph.safetensors"
    )
    if not file.exists():  # a student of the logits graph alone has no adapters
        return None
    trained, test = look.graphs()[1], look.test
    trained.load_state_dict(load_tensors(file))
    with torch.no_grad():
        features = look.knowledge.shown(test)
        distances = trained.distances(
            look.outputs["features"][test], features, look.edges.consensus[-1][test]
        )
    figure, axes = plt.subplots(figsize=(5.4, 4.6))
    plots.plot_representation_graph(trained.to_networkx(look.edges.pairs[-1], distances), axes)
    return figure


def _edge_weights(look: _Finished) -> Figure:
    teachers, pairs = look.edges.teachers[:, look.videos.training_rows], look.edges.pairs
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    for ax, what, weights, number, names in (
        (
            axes[0],
            "teachers",
            teachers.mean(1),
            effective_number(teachers[-1]).mean(),
            look.knowledge.teachers,
        ),
        (axes[1], "pairs", pairs, effective_number(pairs[-1]), look.graphs()[1].names),
    ):
        plots.plot_edges_over_training(weights.numpy(), names, ax)
        ax.set_title(f"{what}: effective number {number:.1f} of {len(names)}", loc="left", pad=24)
        ax.set_xlabel("moment of the training")
    return figure


def _embeddings(look: _Finished) -> Figure:
    weights = look.edges.teachers[-1][look.videos.training_rows].mean(0)
    best = int(weights.argmax())
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4))
    for ax, title, features in (
        (left, f"teacher: {look.knowledge.teachers[best]}", look.knowledge.features[best]),
        (
            right,
            f"student: {plots.METHOD_NAMES.get(look.method, look.method)}",
            look.outputs["features"],
        ),
    ):
        points = plots.embed(features[look.test].numpy())
        plots.plot_embedding(points, look.videos.labels[look.test], look.videos.label_names, ax)
        ax.set_title(title)
    if legend := left.get_legend():  # one for both
        legend.remove()
    return figure


def _accuracy(look: _Finished) -> Figure:
    metrics = [
        {
            "seed": m["seed"],
            "accuracy": m["accuracy"],
            "method": m["name"] if m["kind"] == "student" else f"teacher:{m['name']}",
        }
        for m in look.run.metrics()
    ]
    figure, axes = plt.subplots(figsize=(6.4, 4.4))
    plots.plot_accuracy(
        metrics, axes, chance=load_json(look.run.folder / "summary.json")["baselines"]["chance"]
    )
    return figure


def _tradeoff(look: _Finished) -> Figure:
    found, summary = scores(look.run), load_json(look.run.folder / "summary.json")
    points = [
        {
            "name": t,
            "kind": "teacher",
            "accuracy": mean(found["teacher", t]),
            **summary["teacher"][t],
        }
        for t in look.knowledge.teachers
    ]
    compared = [m for m in ("labels", look.method) if ("student", m) in found]
    points += [
        {"name": m, "kind": "student", "accuracy": mean(found["student", m]), **summary["student"]}
        for m in compared
    ]
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), sharey=True)
    for ax, x in zip(axes, ("latency_ms", "params", "gflops"), strict=True):
        plots.plot_tradeoff(points, x, ax)
    return figure


FIGURES = {
    "logits_graph": _logits_graph, "representation_graph": _representation_graph, "edge_weights": _edge_weights,
    "embeddings": _embeddings, "accuracy": _accuracy, "tradeoff": _tradeoff,
}  # fmt: skip


def draw_figures(run: Run, out: Path) -> list[Path]:
    """Draws ``FIGURES`` of a finished run as PDF, SVG and PNG: graphs, edges and embeddings of its first seed, accuracy of all."""
    look, written = _Finished.open(run), []
    with plots.style():
        for name, draw in FIGURES.items():
            if figure := draw(look):
                written += plots.save_figure(figure, out, name)
                plt.close(figure)
    return written

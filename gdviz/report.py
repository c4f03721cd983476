"""A finished run as a table and as figures."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

import matplotlib.pyplot as plt
import torch

from gdviz import plots
from gdviz.artefacts import load_json, load_tensors
from gdviz.graphs import effective_number
from gdviz.knowledge import build_graphs
from gdviz.run import Run


def scores(run: Run) -> dict[tuple[str, str], list[float]]:
    """Test accuracies over seeds by (kind, name)."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in run.metrics():
        found[row["kind"], row["name"]].append(row["accuracy"])
    return dict(found)


def _percent(values: list[float]) -> str:
    return f"{100 * mean(values):5.1f}" + (f" ± {100 * stdev(values):.1f}" if len(values) > 1 else "")


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
    lines += [f"  {'baseline: ' + name:32}{100 * value:5.1f}" for name, value in summary["baselines"].items()]
    found = scores(run)
    for (kind, name), values in found.items():
        lines.append(f"  {kind + ': ' + name:32}{_percent(values)}")
    both = found.get(("student", "both-graphs"), [])
    others = [name for (kind, name), values in found.items() if kind == "student" and name != "both-graphs" and len(values) == len(both)]
    lines += ["", f"{'both-graphs less, seed by seed':34}points"] if others else []
    for name in others:
        lines.append(f"  {name:32}{_percent([a - b for a, b in zip(both, found['student', name], strict=True)])}")
    ratio, student = summary["ratio"], summary["student"]
    lines += [
        "",
        f"the student has {student['params']:,} parameters, takes {student['gflops'] * 1e3:.1f} MFLOP and "
        f"{student['latency_ms']:.2f} ms a clip:",
        f"{ratio['params']:.1f} times smaller, {ratio['gflops']:.1f} times fewer FLOPs and {ratio['latency_ms']:.1f} times faster "
        "than the teachers together",
    ]
    return "\n".join(lines)


def draw_figures(run: Run, out: Path) -> list[Path]:
    """Draws the run's first seed (graphs, edges, embeddings) and all seeds (accuracy, trade-off) as PDF, SVG and PNG."""
    seed, videos = run.profile.seeds[0], run.videos()
    knowledge, edges = run.knowledge(seed, videos), run.edges(seed)
    rows, test = videos.training_rows, videos.rows("test")
    logits_graph, representation_graph = build_graphs(knowledge, 1, rows, run.profile.distillation)
    students = run.profile.methods
    shown = "both-graphs" if "both-graphs" in students else students[-1]
    outputs = load_tensors(run.student_folder(seed, shown) / "outputs.safetensors")
    written: list[Path] = []

    def save(name: str, figure: plt.Figure) -> None:
        written.extend(plots.save_figure(figure, out, name))
        plt.close(figure)

    with plots.style():
        temperature = run.profile.distillation.temperature
        student_probs = torch.softmax(outputs["logits"] / temperature, 1)
        graph = logits_graph.to_networkx(knowledge.probs(temperature)[test], edges.teachers[-1][test], student_probs[test])
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6), width_ratios=(1.25, 1))
        plots.plot_logits_graph(graph, left)
        first, second = sorted(knowledge.teachers, key=lambda t: -graph["consensus"][t]["weight"])[:2]
        edge = graph[first][second]
        plots.plot_plan(edge["plan"], videos.label_names, edge["rows"], edge["columns"], right)
        save("logits_graph", figure)

        file = run.student_folder(seed, shown) / "representation_graph.safetensors"
        if file.exists():  # a student of the logits graph alone has no adapters
            trained = build_graphs(knowledge, outputs["features"].shape[1], rows, run.profile.distillation)[1]
            trained.load_state_dict(load_tensors(file))
            with torch.no_grad():
                features = [f[test] for f in knowledge.features]
                distances = trained.distances(outputs["features"][test], features, edges.consensus[-1][test])
            figure, axes = plt.subplots(figsize=(5.4, 4.6))
            plots.plot_representation_graph(trained.to_networkx(edges.pairs[-1], distances), axes)
            save("representation_graph", figure)

        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
        plots.plot_edges_over_training(edges.teachers[:, rows].mean(1).numpy(), knowledge.teachers, left)
        left.set_title(
            f"teachers: effective number {effective_number(edges.teachers[-1][rows]).mean():.1f} of {len(knowledge.teachers)}",
            loc="left",
            pad=24,
        )
        plots.plot_edges_over_training(edges.pairs.numpy(), representation_graph.names, right)
        right.set_title(
            f"pairs: effective number {effective_number(edges.pairs[-1]):.1f} of {len(representation_graph.pairs)}", loc="left", pad=24
        )
        for ax in (left, right):
            ax.set_xlabel("moment of the training")
        save("edge_weights", figure)

        best = max(range(len(knowledge.teachers)), key=lambda k: float(edges.teachers[-1][rows, k].mean()))
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4))
        plots.plot_embedding(plots.embed(knowledge.features[best][test].numpy()), videos.labels[test], videos.label_names, left)
        left.set_title(f"teacher: {knowledge.teachers[best]}")
        plots.plot_embedding(plots.embed(outputs["features"][test].numpy()), videos.labels[test], videos.label_names, right)
        right.set_title(f"student: {plots.METHOD_NAMES.get(shown, shown)}")
        save("embeddings", figure)

        summary = load_json(run.folder / "summary.json")
        metrics = [
            {"seed": m["seed"], "accuracy": m["accuracy"], "method": m["name"] if m["kind"] == "student" else f"teacher:{m['name']}"}
            for m in run.metrics()
        ]
        figure, axes = plt.subplots(figsize=(6.4, 4.4))
        plots.plot_accuracy(metrics, axes, chance=summary["baselines"]["chance"])
        save("accuracy", figure)

        found = scores(run)
        tasks = run.profile.teachers.tasks
        points = [{"name": t, "kind": "teacher", "accuracy": mean(found["teacher", t]), **summary["teacher"][t]} for t in tasks]
        compared = [m for m in ("labels", shown) if ("student", m) in found]
        points += [{"name": m, "kind": "student", "accuracy": mean(found["student", m]), **summary["student"]} for m in compared]
        figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), sharey=True)
        for ax, x in zip(axes, ("latency_ms", "params", "gflops"), strict=True):
            plots.plot_tradeoff(points, x, ax)
        save("tradeoff", figure)
    return written

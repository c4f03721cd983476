"""A finished run as text: the table of results, and what the field reports of frozen features."""

from __future__ import annotations

from math import comb

import pandas as pd
import torch
from torch import Tensor

from gdviz.core.files import load_json, load_tensors
from gdviz.data.videos import VideoSet
from gdviz.experiment.folder import Run
from gdviz.experiment.metrics import (
    accuracy,
    calibration_error,
    linear_probe,
    per_class_accuracy,
    retrieval,
)
from gdviz.teachers.bank import Readout, calibration_temperature, open_readout, predict
from gdviz.teachers.fit import build_teacher


def spread(values: pd.Series) -> str:
    """Return "mean ± standard deviation" of shares, in percent."""
    text = f"{100 * values.mean():.1f}"
    return text + (f" ± {100 * values.std():.1f}" if len(values) > 1 else "")


def gains(results: pd.DataFrame) -> pd.DataFrame:
    """Return what the headline method gains on each other student: rows are seeds."""
    students = results[results["kind"] == "student"]
    ours = students[students["headline"]]["name"]
    wide = students.pivot(index="seed", columns="name", values="accuracy")
    if ours.empty:
        return wide.iloc[:, :0]
    wide = wide[list(dict.fromkeys(students["name"]))]
    return wide.rsub(wide[ours.iloc[-1]], axis=0).drop(columns=ours.iloc[-1])


def table(run: Run) -> str:
    """Return mean and spread over seeds of teachers and students, sizes and baselines."""
    summary, results = load_json(run.folder / "summary.json"), run.results()
    data, count = summary["data"], summary["data"]["videos"]
    lines = [
        f"{data['name']}: {count['train']} labelled, {count['unlabelled']} unlabelled, "
        f"{count['test']} test videos, {len(data['classes'])} classes, {data['skipped']} skipped; "
        f"{len(run.profile.seeds)} seeds",
        "",
        f"{'':34}top-1 (mean ± std)",
    ]
    lines += [f"  {f'baseline: {k}':32}{100 * v:.1f}" for k, v in summary["baselines"].items()]
    for (kind, name), rows in results.groupby(["kind", "name"], sort=False):
        lines.append(f"  {f'{kind}: {name}':32}{spread(rows['accuracy'])}")
    gained = gains(results)
    if len(gained.columns):
        lines += ["", f"{'gain of both graphs, seed by seed':34}points"]
        lines += [f"  {name:32}{spread(gained[name])}" for name in gained]
    ratio, student = summary["ratio"], summary["student"]
    lines += [
        "",
        f"the student has {student['params']:,} parameters, takes {student['gflops'] * 1e3:.1f} "
        f"MFLOP and {student['latency_ms']:.2f} ms a clip:",
        f"{ratio['params']:.1f} times smaller, {ratio['gflops']:.1f} times fewer FLOPs and "
        f"{ratio['latency_ms']:.1f} times faster than the teachers together",
    ]
    return "\n".join(lines)


def _measures(
    videos: VideoSet, logits: Tensor, probs: Tensor, features: Tensor
) -> dict[str, float]:
    """Measure what a network says; ``probs`` are of the test rows."""
    train, test = videos.rows("train"), videos.rows("test")
    labels, truth = videos.labels[train], videos.labels[test]
    groups = [videos.groups[i] for i in train]
    ks = [k for k in (1, 5, 10, 20) if k <= len(train)]
    found = retrieval(features[train], labels, features[test], truth, ks)
    return {
        "top-1": accuracy(logits[test], truth),
        "probe": linear_probe(features[train], labels, groups, features[test], truth),
        **{f"R@{k}": value for k, value in found.items()},
        "ECE": calibration_error(torch.softmax(logits[test], 1), truth),
        "ECE scaled": calibration_error(probs, truth),
    }


def _scaled(logits: Tensor, labels: Tensor) -> Tensor:
    """Probabilities, every other row by the temperature of the rest: no row judges itself."""
    probs = torch.empty_like(logits)
    for half, rest in (
        (slice(0, None, 2), slice(1, None, 2)),
        (slice(1, None, 2), slice(0, None, 2)),
    ):
        temperature = calibration_temperature(logits[rest], labels[rest])
        probs[half] = torch.softmax(logits[half] / temperature, 1)
    return probs


def _before_labels(run: Run, videos: VideoSet, seed: int, task: str) -> Tensor:
    """Features of a teacher's backbone before it saw a label, for labelled and test videos."""
    model = build_teacher(task, run.profile.teachers, len(videos.label_names)).to(run.where)
    state = load_tensors(run.teacher_folder(seed, task) / "teacher.safetensors")
    prefix = "pretrained."
    before = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if before:  # a network of one's own is as it was
        model.backbone.load_state_dict(before)
    rows = torch.cat([videos.rows("train"), videos.rows("test")])
    found = predict(model, videos, rows, run.profile.view_of(task))[1].mean(1)
    features = torch.zeros(len(videos.splits), found.shape[1])
    features[rows] = found
    return features


def _teacher(run: Run, videos: VideoSet, seed: int, task: str) -> dict[str, float]:
    folder = run.teacher_folder(seed, task) / "bank"
    readout: Readout = open_readout(folder, videos, run.profile.view_of(task))
    logits = readout.at("logits", torch.arange(len(videos.splits)))
    probs = torch.softmax(logits[videos.rows("test")] / readout.temperature, 1)
    return _measures(videos, logits, probs, _before_labels(run, videos, seed, task))


def _chance(labels: Tensor, truth: Tensor, ks: list[int]) -> dict[str, float]:
    """What the largest class gives, and what neighbours drawn from ``labels`` blindly do."""
    most = truth.bincount().max().item() / len(truth)
    row, total = {"top-1": most, "probe": most}, len(labels)
    for k in ks:
        missed = [comb(total - int((labels == y).sum()), k) / comb(total, k) for y in truth]
        row[f"R@{k}"] = 1 - sum(missed) / len(missed)
    return row


def evaluation(run: Run) -> str:
    """Return what the field reports of frozen features, and calibration, of a finished run.

    Probe and retrieval (gallery: labelled clips; queries: test clips) see of a teacher its
    backbone as the pretext task left it, before any label, and of a student its features. ECE is
    before and after temperature scaling: a teacher's temperature is fitted out of fold, a
    student's on the other half of the test part. Then top-1 by class.
    """
    videos = run.videos()
    train, test = videos.rows("train"), videos.rows("test")
    truth, rows, by_class = videos.labels[test], [], {}
    for seed in run.profile.seeds:
        for task in run.profile.teachers.tasks:
            rows.append({"name": f"teacher: {task}"} | _teacher(run, videos, seed, task))
        for method in run.profile.methods:
            outputs = load_tensors(run.student_folder(seed, method) / "outputs.safetensors")
            logits, features = outputs["logits"], outputs["features"]
            measured = _measures(videos, logits, _scaled(logits[test], truth), features)
            rows.append({"name": f"student: {method}"} | measured)
            by_class[method, seed] = per_class_accuracy(logits[test], truth).tolist()
    found = pd.DataFrame(rows)
    ks = [int(name[2:]) for name in found if name.startswith("R@")]
    shown = found.groupby("name", sort=False).agg(spread)
    chance = pd.Series(_chance(videos.labels[train], truth, ks)).map("{:.1%}".format)
    shown.loc["chance"] = chance.str.rstrip("%").reindex(shown.columns).fillna("")
    classes = (
        100 * pd.DataFrame(by_class, index=videos.label_names).T.groupby(level=0, sort=False).mean()
    )
    return "\n".join(
        [
            "mean ± std over seeds, %",
            shown.to_string(index_names=False),
            "",
            "by class, mean over seeds, %",
            classes.T.to_string(float_format="{:.1f}".format),
        ]
    )

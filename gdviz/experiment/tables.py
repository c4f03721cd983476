"""A finished run as text: the table of results, and what the field reports of frozen features."""

from __future__ import annotations

from math import comb
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from gdviz.core.files import load_json, load_tensors
from gdviz.data.videos import VideoSet
from gdviz.experiment import metrics
from gdviz.experiment.folder import Run
from gdviz.teachers.bank import calibration_temperature, open_readout, predict
from gdviz.teachers.fit import build_teacher


def spread(values: Any) -> str:
    """Return "mean ± standard deviation" of shares, in percent."""
    text = f"{100 * values.mean():.1f}"
    return text + (f" ± {100 * values.std():.1f}" if len(values) > 1 else "")


def gains(results: pd.DataFrame) -> pd.DataFrame:
    """Return what the headline method gains on each other student: rows are seeds."""
    students = results.query("kind == 'student'")
    wide = students.pivot_table("accuracy", "seed", "name", sort=False)
    ours = students.query("headline")["name"].tolist()[-1:]
    gained = wide.rsub(wide[ours[0]], axis=0) if ours else wide.iloc[:, :0]
    return gained.drop(columns=ours)


def table(run: Run) -> str:
    """Return mean and spread over seeds of teachers and students, sizes and baselines."""
    summary, results = load_json(run.folder / "summary.json"), run.results()
    data, count = summary["data"], summary["data"]["videos"]
    lines = [
        f"{data['name']}: {count['train']} labelled, {count['unlabelled']} unlabelled, "
        f"{count['test']} test videos, {len(data['classes'])} classes, {data['skipped']} skipped; "
        f"{len(run.profile.seeds)} seeds",
        "",
        f"{'':34}top-1{', mAP' if 'mAP' in results else ''} (mean ± std)",
    ]
    lines += [f"  {f'baseline: {k}':32}{100 * v:.1f}" for k, v in summary["baselines"].items()]
    models = results["kind"] + ": " + results["name"]
    columns = [name for name in ("accuracy", "mAP") if name in results]
    means = results.groupby(models, sort=False)[columns].agg(spread)
    lines += [f"  {name:32}{'   '.join(row)}" for name, *row in means.itertuples()]
    gained = gains(results)
    if len(gained.columns):
        lines += ["", f"{'gain of both graphs, seed by seed':34}points"]
        lines += [f"  {name:32}{text}" for name, text in gained.agg(spread).items()]
    ratio, student = summary["ratio"], summary["student"]
    faster = f"{ratio['latency_ms']:.1f} times faster"
    if "latency_ms_quartiles" in ratio:  # not so in runs of older code
        faster += " (quartiles {:.1f} and {:.1f})".format(*ratio["latency_ms_quartiles"])
    lines += [
        "",
        f"the student has {student['params']:,} parameters, takes {student['gflops'] * 1e3:.1f} "
        f"MFLOP and {student['latency_ms']:.2f} ms a clip:",
        f"{ratio['params']:.1f} times smaller, {ratio['gflops']:.1f} times fewer FLOPs and "
        f"{faster} than the teachers together",
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
    found = metrics.retrieval(features[train], labels, features[test], truth, ks)
    return {
        "top-1": metrics.accuracy(logits[test], truth),
        "probe": metrics.linear_probe(features[train], labels, groups, features[test], truth),
        **{f"R@{k}": value for k, value in found.items()},
        "ECE": metrics.calibration_error(torch.softmax(logits[test], 1), truth),
        "ECE scaled": metrics.calibration_error(probs, truth),
    }


def _scaled(logits: Tensor, labels: Tensor) -> Tensor:
    """Probabilities, every other row by the temperature of the rest: no row judges itself."""
    probs = torch.empty_like(logits)
    for half in (0, 1):
        temperature = calibration_temperature(logits[1 - half :: 2], labels[1 - half :: 2])
        probs[half::2] = torch.softmax(logits[half::2] / temperature, 1)
    return probs


def _teacher(run: Run, videos: VideoSet, seed: int, task: str) -> dict[str, float]:
    """Measure a teacher; its features are those of its backbone before it saw a label."""
    folder, view = run.teacher_folder(seed, task), run.profile.view_of(task)
    readout, test = open_readout(folder / "bank", videos, view), videos.rows("test")
    logits = readout.at("logits", torch.arange(len(videos.splits)))
    probs = torch.softmax(logits[test] / readout.temperature, 1)
    model = build_teacher(task, run.profile.teachers, len(videos.label_names)).to(run.where)
    state, prefix = load_tensors(folder / "teacher.safetensors"), "backbone."
    before = {
        k.replace("pretrained.", prefix): x for k, x in state.items() if k.startswith("pretrained.")
    }
    model.load_state_dict(before, strict=False)  # none of one's own network, which is as it was
    rows = torch.cat([videos.rows("train"), test])
    found = predict(model, videos, rows, view)[1].mean(1)
    features = torch.zeros(len(videos.splits), found.shape[1])
    features[rows] = found
    return _measures(videos, logits, probs, features)


def _chance(labels: Tensor, truth: Tensor, ks: list[int]) -> dict[str, float]:
    """What the largest class gives, and what neighbours drawn from ``labels`` blindly do."""
    most = truth.bincount().max().item() / len(truth)
    row, total = {"top-1": most, "probe": most}, len(labels)
    for k in ks:
        missed = [comb(total - int((labels == y).sum()), k) / comb(total, k) for y in truth]
        row[f"R@{k}"] = 1 - sum(missed) / len(missed)
    return row


def _evaluation_of_several(run: Run, videos: VideoSet) -> str:
    """Return top-1, mAP and average precision by class, where videos have several labels.

    Probe, retrieval and ECE, as the field reports them, know one label a video.
    """
    results, test, by_class = run.results(), videos.rows("test"), {}
    models = results["kind"] + ": " + results["name"]
    shown = {
        title: results.groupby(models, sort=False)[column].agg(spread)
        for title, column in (("top-1", "accuracy"), ("mAP", "mAP"))
    }
    for method in run.profile.methods:
        logits = [run.outputs(seed, method)["logits"][test] for seed in run.profile.seeds]
        each = [metrics.average_precision(z, videos.labels[test]) for z in logits]
        by_class[method] = 100 * torch.stack(each).mean(0).numpy()
    classes = pd.DataFrame(by_class, index=list(videos.label_names))
    text = pd.DataFrame(shown).to_string(), classes.to_string(float_format="{:.1f}".format)
    title = "average precision by class, mean over seeds, %"
    return f"mean ± std over seeds, %\n{text[0]}\n\n{title}\n{text[1]}"


def evaluation(run: Run) -> str:
    """Return what the field reports of frozen features, and calibration, of a finished run.

    Probe and retrieval (gallery: labelled clips; queries: test clips) see of a teacher its
    backbone as the pretext task left it, before any label, and of a student its features. ECE is
    before and after temperature scaling: a teacher's temperature is fitted out of fold, a
    student's on the other half of the test part. Then top-1 by class. Where videos have several
    labels: top-1 and mAP.
    """
    videos, rows, by_class = run.videos(), [], []
    if videos.labels.ndim == 2:
        return _evaluation_of_several(run, videos)
    train, test = videos.rows("train"), videos.rows("test")
    truth = videos.labels[test]
    names = [videos.label_names[label] for label in truth]
    for seed in run.profile.seeds:
        for task in run.profile.teachers.tasks:
            rows.append({"name": f"teacher: {task}"} | _teacher(run, videos, seed, task))
        for method in run.profile.methods:
            outputs = run.outputs(seed, method)
            logits, features = outputs["logits"], outputs["features"]
            measured = _measures(videos, logits, _scaled(logits[test], truth), features)
            rows.append({"name": f"student: {method}"} | measured)
            right = 100.0 * (logits[test].argmax(1) == truth)
            by_class.append(pd.DataFrame({"class": names, "method": method, "right": right}))
    shown = pd.DataFrame(rows).groupby("name", sort=False).agg(spread)
    ks = [int(name[2:]) for name in shown if name.startswith("R@")]
    chance = _chance(videos.labels[train], truth, ks)
    shown.loc["chance"] = [f"{100 * chance[k]:.1f}" if k in chance else "" for k in shown]
    classes = pd.concat(by_class).pivot_table("right", "class", "method", sort=False)
    classes = classes.reindex(videos.label_names)
    text = shown.to_string(index_names=False), classes.to_string(float_format="{:.1f}".format)
    return "mean ± std over seeds, %\n{}\n\nby class, mean over seeds, %\n{}".format(*text)

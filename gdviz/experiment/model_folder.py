"""A finished run's student as a folder that labels videos anywhere: models, labels, model card."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binomtest
from torch import Tensor

from gdviz.config import View
from gdviz.core.files import UserError, file_sha256, load_json, load_tensors, save_json
from gdviz.data.clips import pick_frames, to_float
from gdviz.data.videos import VideoSet, some_of
from gdviz.experiment.folder import Run
from gdviz.experiment.metrics import accuracy
from gdviz.student import predict
from gdviz.student.export import export_onnx, quantise
from gdviz.student.family import build_student
from gdviz.teachers.backbones import Classifier, Clips
from gdviz.teachers.bank import as_cases, calibration_temperature
from gdviz.teachers.bank import predict as answers_of

CARD = """# {name}

A video classifier: {params:,} parameters, clips of {length} frames of {size} x {size} pixels.
Distilled by gdviz, method `{method}`, from {teachers}.

| | |
|---|---|
| data | {data}, {classes} classes |
| videos | {train} labelled, {unlabelled} unlabelled, {test} to test |
| top-1, test videos | {accuracy:.1f} % (Wilson, 95 %: {low:.1f} to {high:.1f}), seed {seed} |
| over the run's seeds | {seeds} |
| in int8 | {int8} of {convolutions} convolutions; agrees on {agreement:.1f} % of test videos |
| ONNX against PyTorch | logits differ by {parity:.1e} at most |
| speed when trained | {latency:.2f} ms a clip, one thread, PyTorch, on the machine of the run |

Confidences are calibrated by one temperature, {temperature:.2f}, fitted on the test videos: it
changes no answer. A video is seen as {frames} frames {spread}.

Limits: it knows the classes of `labels.json` and always names one of them. It was tested on videos
like those that it was trained on, and nothing is known of others. What the data's licence says of
models trained on them applies to this one.

Use: `gdviz predict FOLDER VIDEO...`, or without gdviz `python FOLDER/predict.py FOLDER VIDEO...`
(numpy, av, onnxruntime).
"""


def clips_of(videos: VideoSet, rows: Tensor, view: View) -> Clips:
    """Return the middle clip of each of these videos, as networks see it."""
    frames = pick_frames(videos.batch(rows), view.length, view.stride)
    return to_float(frames).transpose(1, 2)


def spread_of(view: View) -> str:
    """Return which frames of a video are seen, in words."""
    if view.fps:
        return f"of each {view.frames / view.fps:.1f} s, {view.fps:g} a second"
    return "spread evenly over it, whatever its length"


def _choose(run: Run, method: str, seed: int | None) -> dict[str, Any]:
    """Return the row of the results that is asked for; by default the headline's first seed."""
    students = run.results().query("kind == 'student'")
    if not len(students):
        raise UserError(f"{run.folder}: holds no finished student")
    ours = students.query("headline")["name"].tolist()
    method = method or (ours or students["name"].tolist())[-1]
    rows: Any = students[students["name"] == method]
    if seed is not None:
        rows = rows[rows["seed"] == seed]
    if not len(rows):
        there = ", ".join(dict.fromkeys(students["name"]))
        seeds = ", ".join(map(str, run.profile.seeds))
        raise UserError(f"{run.folder}: no student {method!r} of that seed; {there}; seeds {seeds}")
    return rows.iloc[0].to_dict()


def _open_student(run: Run, row: dict[str, Any], classes: int) -> Classifier:
    classifier = build_student(run.profile.distillation.student, classes)
    file = run.student_folder(row["seed"], row["name"]) / "student.safetensors"
    classifier.load_state_dict(load_tensors(file))
    return classifier.eval()


@torch.no_grad()
def _check(folder: Path, classifier: Classifier, videos: VideoSet, run: Run) -> dict[str, float]:
    """Return how far ONNX is from PyTorch, and how often int8 answers alike."""
    test, clips = videos.rows("test"), clips_of(videos, videos.rows("test")[:64], run.profile.view)
    full, small = (predict.Student(folder, name) for name in ("model.onnx", "model-int8.onnx"))
    logits: Any = full.session.run(None, {"clips": clips.numpy()})[0]
    expected = classifier(clips)[0]
    apart = float((torch.from_numpy(logits) - expected).abs().max())
    if not apart <= 1e-4 * max(1.0, float(expected.abs().max())):
        raise UserError(f"{folder.name}: ONNX answers {apart:.1e} away from PyTorch: not exported")
    both = [
        [student.probabilities(videos.batch(row[None])[0].numpy()).argmax() for row in test]
        for student in (full, small)
    ]
    same = sum(a == b for a, b in zip(*both, strict=True)) / len(test)
    return {"parity": apart, "agreement": 100 * same}


def export(run: Run, out: Path, method: str = "", seed: int | None = None) -> dict[str, Any]:
    """Write a student's folder; return what its model card says.

    Raises:
        UserError: no such student, ONNX that answers otherwise, or ``out`` holds something else.
    """
    if out.exists() and not (out / "preprocessing.json").exists():
        raise UserError(f"--out {out}: is there and holds no exported student; choose another")
    row, videos, view = _choose(run, method, seed), run.videos(), run.profile.view
    test, several = videos.rows("test"), videos.labels.ndim == 2
    classifier = _open_student(run, row, len(videos.label_names))
    logits = answers_of(classifier, videos, test, view)[0].mean(1)
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        training = some_of(videos.training_rows, 512)
        calibration = [clips_of(videos, rows, view) for rows in training.split(16)]
        export_onnx(classifier, calibration[0], part / "model.onnx")
        int8, convolutions = quantise(part / "model.onnx", part / "model-int8.onnx", calibration)
        about = {"size": view.size, "frames": view.frames, "length": view.length}
        about |= {"stride": view.stride, "clips": view.clips, "fps": view.fps}
        about |= {"mean": 0.5, "std": 0.25}
        temperature = calibration_temperature(*as_cases(logits, videos.labels[test]))
        about |= {"temperature": temperature, "several": several}
        save_json(part / "preprocessing.json", about)
        save_json(part / "labels.json", videos.label_names)
        card = about | {"int8": int8, "convolutions": convolutions, "spread": spread_of(view)}
        card |= _check(part, classifier, videos, run)
        card |= _facts(run, row, videos, accuracy(logits, videos.labels[test]))
        (part / "README.md").write_text(CARD.format(**card), encoding="utf-8")
        shutil.copy(predict.__file__, part / "predict.py")
        names = sorted(path.name for path in part.iterdir())
        sums = "".join(f"{file_sha256(part / name)}  {name}\n" for name in names)
        (part / "SHA256SUMS").write_text(sums)
        shutil.rmtree(out, ignore_errors=True)
        part.rename(out)
    except OSError as error:
        advice = "free some space or choose another folder"
        raise UserError(f"--out {out}: {error}; {advice}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return card


def _facts(run: Run, row: dict[str, Any], videos: VideoSet, right: float) -> dict[str, Any]:
    """Return what the model card says of data, teachers, accuracy and speed."""
    summary, results = load_json(run.folder / "summary.json"), run.results()
    same = 100 * results[results["name"] == row["name"]]["accuracy"]
    seeds = f"mean {same.mean():.1f} %, " if len(same) > 1 else ""
    count = {split: len(videos.rows(split)) for split in ("train", "unlabelled", "test")}
    wilson = binomtest(round(right * count["test"]), count["test"]).proportion_ci(method="wilson")
    return count | {
        "name": f"{run.profile.distillation.student}, {row['label']}",
        "method": row["name"],
        "seed": row["seed"],
        "teachers": ", ".join(f"`{task}`" for task in run.profile.teachers.tasks),
        "data": videos.name,
        "classes": len(videos.label_names),
        "accuracy": 100 * right,
        "low": 100 * wilson.low,
        "high": 100 * wilson.high,
        "seeds": seeds + ", ".join(f"{x:.1f}" for x in same),
        "params": summary["student"]["params"],
        "latency": summary["student"]["latency_ms"],
    }

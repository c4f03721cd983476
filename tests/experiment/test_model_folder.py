"""Exports: the same answers as PyTorch's, whole folders only, and a card that tells the truth."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch

from gdviz.config import View
from gdviz.core.files import UserError
from gdviz.data.clips import clip_places, to_float
from gdviz.experiment import model_folder as module
from gdviz.experiment.model_folder import export
from gdviz.student import predict
from gdviz.student.export import export_onnx
from gdviz.student.family import build_student
from gdviz.teachers.bank import calibration_temperature

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")


def test_the_folder_holds_models_labels_and_a_card(exported_card, finished):
    out, card = exported_card
    videos = finished.videos()
    assert json.loads((out / "labels.json").read_text()) == list(videos.label_names)
    for line in (out / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
    row = finished.results().set_index("name").loc["both-graphs"]
    assert card["method"] == "both-graphs"
    assert card["accuracy"] == pytest.approx(100 * row["accuracy"])
    assert card["low"] < card["accuracy"] < card["high"] and card["parity"] < 1e-4
    text = (out / "README.md").read_text()
    assert f"{card['accuracy']:.1f} %" in text and "`both-graphs`" in text
    assert card["int8"] == 0 < card["convolutions"]  # a tiny student's are three-dimensional
    assert f"0 of {card['convolutions']} convolutions" in text


def test_its_answers_are_those_of_the_run(exported_card, finished):
    out, card = exported_card
    videos, student = finished.videos(), predict.load_student(out)
    file = finished.student_folder(0, "both-graphs") / "outputs.safetensors"
    logits = module.load_tensors(file)["logits"]
    for row in videos.rows("test")[:6].tolist():
        p = student.probabilities(videos.batch(torch.tensor([row]))[0].numpy())
        expected = torch.softmax(logits[row] / card["temperature"], 0)
        np.testing.assert_allclose(p, expected.numpy(), atol=1e-4)


def test_it_sees_the_clips_that_were_tested_on(exported_card, finished):
    out, _ = exported_card
    videos, view, student = finished.videos(), finished.profile.view, predict.load_student(out)
    seen = []

    class Spy:
        def run(self, names, feed):
            seen.append(feed["clips"])
            return [np.zeros((len(feed["clips"]), 12), np.float32)]

    student.session, row = Spy(), torch.tensor([5])
    student.probabilities(videos.batch(row)[0].numpy())
    at = [videos.clips(row, view.length, view.stride, place=p) for p in clip_places(view.clips)]
    expected = torch.cat([to_float(clip).transpose(1, 2) for clip in at])
    np.testing.assert_allclose(seen[0], expected.numpy(), atol=1e-5)


def test_its_temperature_is_the_one_that_calibrates(exported_card, finished):
    videos = finished.videos()
    file = finished.student_folder(0, "both-graphs") / "outputs.safetensors"
    test = videos.rows("test")
    logits = module.load_tensors(file)["logits"][test]
    assert (
        exported_card[1]["temperature"] == calibration_temperature(logits, videos.labels[test]) != 1
    )


def test_another_method_is_exported_and_an_unknown_one_is_named(finished, exported, tmp_path):
    shutil.copytree(exported, tmp_path / "a")
    assert export(finished, tmp_path / "a", method="labels")["method"] == "labels"  # replaces it
    assert "`labels`" in (tmp_path / "a" / "README.md").read_text()
    with pytest.raises(UserError, match=r"no student 'lables'.*labels, kd-best"):
        export(finished, tmp_path / "b", method="lables")
    with pytest.raises(UserError, match="seeds 0"):
        export(finished, tmp_path / "b", seed=7)
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="holds no exported student"):
        export(finished, tmp_path / "mine")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "mine"]


def test_nothing_is_left_where_onnx_answers_otherwise(finished, tmp_path, monkeypatch):
    def wrong(classifier, clips, path):
        other = build_student("tiny4", classifier.fc.out_features).eval()
        export_onnx(other, clips, path)

    monkeypatch.setattr(module, "export_onnx", wrong)
    with pytest.raises(UserError, match="away from PyTorch"):
        export(finished, tmp_path / "student")
    assert not list(tmp_path.iterdir())


def test_several_labels_are_answered_one_by_one(exported_card, finished):
    out, _ = exported_card
    student = predict.load_student(out)
    student.about = student.about | {"several": True}
    frames = finished.videos().batch(torch.tensor([0]))[0].numpy()
    p = student.probabilities(frames)
    student.about["several"], odds = False, p / (1 - p)
    np.testing.assert_allclose(odds / odds.sum(), student.probabilities(frames), atol=1e-5)


def test_a_card_says_which_frames_are_seen():
    assert module.spread_of(View()) == "spread evenly over it, whatever its length"
    assert module.spread_of(View(frames=36, fps=12.0)) == "of each 3.0 s, 12 a second"

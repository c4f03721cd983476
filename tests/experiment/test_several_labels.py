"""Videos of several classes, or of none: a whole run on CCV's layout, and what differs in it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY
from sklearn.metrics import average_precision_score
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from gdviz.config import Schedule, View
from gdviz.core.files import UserError, load_tensors
from gdviz.data.motion import encode
from gdviz.data.videos import VideoSet
from gdviz.experiment.folder import Run
from gdviz.experiment.metrics import accuracy, average_precision
from gdviz.experiment.steps import execute
from gdviz.experiment.tables import evaluation, table
from gdviz.graphs import pair_alignment, two_class
from gdviz.graphs.kernels import unbiased_cka
from gdviz.show.figures import draw_figures
from gdviz.student.distill import distill
from gdviz.student.edges import Graphs, build_graphs, learn_edges
from gdviz.teachers.bank import Readout, as_cases, calibration_temperature, gather, predict

CLASSES = ("red", "green", "blue")
METHODS = ("labels", "kd-best", "kd-aekd", "wkd", "both-graphs", "both-shuffled")


def test_cases_are_binary_problems():
    torch.manual_seed(0)
    z, y = torch.randn(5, 3), torch.randint(2, (5, 3))
    cases, there = as_cases(z, y)
    expected = binary_cross_entropy_with_logits(z, y.float())
    torch.testing.assert_close(cross_entropy(cases, there), expected)
    torch.testing.assert_close(torch.softmax(cases / 2, 1)[:, 1], torch.sigmoid(z / 2).flatten())
    one = torch.tensor([0, 2, 1, 1, 0])
    assert as_cases(z, one)[0] is z and as_cases(z, one)[1] is one


def test_measures_of_several_labels():
    torch.manual_seed(0)
    z, y = torch.randn(40, 3), torch.randint(2, (40, 3))
    z[:, 2], y[:, 2] = y[:, 2], y[:, 2]
    expected = average_precision_score(y, z, average=None)
    torch.testing.assert_close(average_precision(z, y), torch.tensor(expected).float())
    assert average_precision(z, y)[2] == 1
    assert average_precision(z, 0 * y).isnan().all()
    hits = [bool(y[n, z[n].argmax()]) for n in range(40) if y[n].any()]
    assert accuracy(z, y) == pytest.approx(sum(hits) / len(hits))


def colours(labels: np.ndarray, seed: int) -> np.ndarray:
    """Frames that blink in the colour of every class that they show, beside noise."""
    rng = np.random.default_rng(seed)
    frames = rng.integers(60, 120, (12, 32, 32, 3), dtype=np.uint8)
    for c, there in enumerate(labels):
        if there:
            frames[::2, 10 * c : 10 * c + 10, :, c] = 250
    return frames


def spots(labels: np.ndarray, seed: int) -> np.ndarray:
    """Six frames of noise with a spot, somewhere, in the colour of every class that they show."""
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 220, (6, 16, 16, 3), dtype=np.uint8)
    for c in np.flatnonzero(labels):
        x, y = rng.integers(0, 11, 2)
        frames[:, x : x + 5, y : y + 5] = 0
        frames[:, x : x + 5, y : y + 5, c] = 255
    return frames


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("ccv")
    rng = np.random.default_rng(0)
    lists, videos = root / "lists", root / "videos"
    lists.mkdir()
    (lists / "categoryName.txt").write_text("\n".join(CLASSES))
    for part, count in (("train", 30), ("test", 20)):
        labels = rng.integers(0, 2, (count, 3))
        (lists / f"{part}VidID.txt").write_text("\n".join(f"{part}{n}" for n in range(count)))
        (lists / f"{part}Label.txt").write_text("\n".join(" ".join(map(str, r)) for r in labels))
        for n, row in enumerate(labels):
            encode(colours(row, n), videos / f"{part}{n}.mp4")
    schedule = replace(TINY.distillation.schedule, epochs=4, min_steps=6)
    distillation = replace(TINY.distillation, schedule=schedule)
    fit = replace(TINY.teachers.fit, epochs=8, min_steps=6)
    teachers = replace(TINY.teachers, fit=fit)
    profile = replace(TINY, teachers=teachers, distillation=distillation, methods=METHODS)
    run = Run(profile, root / "run", root, root / "cache")
    execute(run, workers=1)
    return run


def test_labels_are_rows_and_videos_without_any_teach_unlabelled(run):
    videos = run.videos()
    assert videos.label_names == tuple(sorted(CLASSES)) and videos.labels.shape == (50, 3)
    assert (videos.labels[videos.rows("unlabelled")] == -1).all()
    assert len(videos.rows("unlabelled")) > 0
    assert (videos.labels[videos.rows("train")] > 0).any(1).all()
    assert (videos.labels[videos.rows("test")] == 0).all(1).any()  # tested on, of no class


def test_what_is_measured_is_in_the_results(run):
    results = run.results().set_index("name")
    videos = run.videos()
    test = videos.rows("test")
    said = load_tensors(run.student_folder(0, "both-graphs") / "outputs.safetensors")["logits"]
    precision = average_precision(said[test], videos.labels[test])
    assert results.loc["both-graphs", "mAP"] == pytest.approx(float(precision.mean()))
    assert results.loc["order", "mAP"] > (videos.labels[test] > 0).float().mean() + 0.1


@pytest.mark.slow
def test_the_student_learns_from_teachers_and_the_control_does_not():
    """Teachers that know what 120 unlabelled videos show; six labels alone say little."""
    rng = np.random.default_rng(1)
    y = rng.integers(0, 2, (206, 3))
    splits = ["train"] * 6 + ["unlabelled"] * 120 + ["test"] * 80
    pixels = np.stack([spots(row, n) for n, row in enumerate(y)])
    videos = VideoSet.from_arrays(pixels, y, splits)
    truth, fold = torch.from_numpy(6.0 * y - 3), torch.arange(206) % 2
    fold[6:] = -1
    made = {
        name: Readout.from_means(truth + noise * torch.randn(206, 3), truth, fold)
        for name, noise in {"a": 0.5, "b": 1.0}.items()
    }
    bank, view = gather(made, videos), View(size=16, frames=6, length=4, stride=1, clips=1)
    schedule = Schedule(epochs=12, batch=16, lr=1e-2, min_steps=10)
    cfg = replace(TINY.distillation, student="tiny8", schedule=schedule)
    found = {}
    for name in ("labels", "both-graphs", "both-shuffled"):
        dealt = bank.shuffled(videos.training_rows, 0) if name == "both-shuffled" else bank
        both = build_graphs(dealt, videos.training_rows, cfg, 32)
        graphs = Graphs(*both, learn_edges(dealt, *both, cfg.edges, seed=0))
        student, _ = distill(name, dealt, graphs, videos, view, cfg, seed=0)
        logits = predict(student.classifier, videos, videos.rows("test"), view)[0].mean(1)
        found[name] = float(average_precision(logits, videos.labels[videos.rows("test")]).mean())
    assert found["both-graphs"] > found["labels"] + 0.1
    assert found["both-graphs"] > found["both-shuffled"] + 0.1


def test_edges_are_of_each_class_of_each_video(run):
    videos = run.videos()
    bank, graphs = run.bank(0, videos), run.graphs(0)
    assert bank.cases_each == 3 and len(graphs.logits.cost) == 2
    assert graphs.edges.teachers.shape[1:] == (150, 2) and graphs.edges.consensus.shape[2] == 2
    row = torch.tensor([4])
    assert bank.cases(row).tolist() == [12, 13, 14]
    expected = two_class(
        torch.stack([r.at("logits", row) / r.temperature for r in bank.readouts], 1)
    )
    torch.testing.assert_close(bank.logits_at(row), expected[0].transpose(0, 1))
    shuffled = bank.shuffled(videos.training_rows, 0)
    told = bank.logits_at(shuffled.dealt[row])
    assert torch.equal(shuffled.logits_at(row), told)


def test_cases_become_the_soft_labels_of_their_videos(run):
    bank = run.bank(0, run.videos())
    there = torch.rand(6, 3)
    cases = torch.stack([1 - there, there], -1).flatten(0, 1)
    assert torch.equal(bank.soft_labels(cases), there)


def test_pairs_are_weighed_by_all_labels_of_a_video():
    torch.manual_seed(0)
    labels, x = torch.randint(2, (12, 3)), torch.randn(12, 5)
    grams = torch.stack([x @ x.T, labels.float() @ labels.float().T])
    found = pair_alignment(grams, labels)
    assert found[1] == pytest.approx(1) and found[0] < 0.5
    known = labels.clone()
    known[9:] = -1  # nothing is known of them
    expected = unbiased_cka(grams[0, :9, :9], grams[1, :9, :9])
    torch.testing.assert_close(pair_alignment(grams, known)[0], expected)


def test_tables_and_figures_are_made(run, tmp_path):
    assert "top-1, mAP" in table(run)
    said = evaluation(run)
    assert "mAP" in said and "average precision by class" in said and "both-graphs" in said
    drawn = {path.stem for path in draw_figures(run, tmp_path)}
    assert {"logits_graph", "representation_graph", "transport_plan", "embeddings"} <= drawn


def test_a_teacher_that_tells_gets_the_weight():
    """Of three classes one teacher knows all, one says what is often there."""
    torch.manual_seed(0)
    y = (torch.rand(60, 3) < 0.3).long()
    knows = 6.0 * y - 3 + torch.randn(60, 3)
    blind = torch.full((60, 3), -0.85)  # the logit of .3
    pixels = np.zeros((60, 2, 8, 8, 3), np.uint8)
    videos = VideoSet.from_arrays(pixels, y.numpy(), ["train"] * 60)
    assert videos.labels.shape == (60, 3)
    fold, x = torch.arange(60) % 2, torch.randn(60, 4)
    made = {
        name: Readout.from_means(z, x, fold, temperature=calibration_temperature(*as_cases(z, y)))
        for name, z in {"knows": knows, "blind": blind}.items()
    }
    bank = gather(made, videos)
    assert bank.best_teacher() == 0
    cfg = TINY.distillation
    graphs = build_graphs(bank, videos.training_rows, cfg)
    edges = learn_edges(bank, *graphs, cfg.edges, seed=0)
    assert edges.teachers[-1].mean(0)[0] > 0.8
    routed = replace(cfg.edges, components=2)
    with pytest.raises(UserError, match="components 2: routing needs one label a video"):
        learn_edges(bank, *graphs, routed, seed=0)


def test_labels_that_are_no_rows_of_zeros_and_ones_are_refused():
    pixels = np.zeros((2, 2, 8, 8, 3), np.uint8)
    with pytest.raises(UserError, match="0 or 1 for each class"):
        VideoSet.from_arrays(pixels, np.array([[0, 2], [1, 0]]), ["train", "test"])

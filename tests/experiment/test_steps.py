"""A run is the same run however often it is started, killed or starved; and no hidden label reaches it."""

import itertools
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY
from runs import assert_same_run, start, tensors_of

from gdviz.config import Profile
from gdviz.core import loop as training
from gdviz.core.files import UserError, load_json, load_tensors, save_json
from gdviz.experiment import steps
from gdviz.experiment.checks import check_profile
from gdviz.experiment.steps import Run, execute, open_run
from gdviz.graphs import LogitsGraph, RepresentationGraph
from gdviz.show.report import draw_figures, evaluation, table
from gdviz.student.distill import BASELINES, distill, kd_weights
from gdviz.student.edges import learn_edges
from gdviz.student.weighting import POLICIES
from gdviz.teachers.bank import build_graphs, gather
from gdviz.teachers.fit import outputs_of, pretrain
from gdviz.teachers.pretext import TASKS


def another(run: Run, folder: Path, **changes) -> Run:
    """The same run, from the same videos, elsewhere."""
    return replace(run, folder=folder, **changes)


def test_what_a_finished_run_holds(finished):
    rows = finished.metrics()
    assert [(r["kind"], r["name"]) for r in rows] == [
        ("teacher", t) for t in TINY.teachers.tasks
    ] + [("student", m) for m in TINY.methods]
    assert all(0 <= r["accuracy"] <= 1 for r in rows)
    assert (finished.folder / "skipped.csv").read_text().split() == ["path,reason"]
    assert load_json(finished.folder / "summary.json")["baselines"].keys() >= {
        "chance",
        "metadata",
        "single-frame",
        "mean-frame",
    }
    reread = open_run(finished.folder)
    assert reread.profile == TINY
    assert reread.metrics() == rows
    students = [
        load_tensors(finished.student_folder(0, m) / "student.safetensors") for m in TINY.methods
    ]
    keys = students[0].keys()
    assert all(
        not all(torch.equal(a[k], b[k]) for k in keys) for a, b in itertools.pairwise(students)
    )


def test_the_same_seed_gives_the_same_run_and_another_one_does_not(finished, tmp_path):
    execute(another(finished, tmp_path / "again"), workers=1)
    assert_same_run(finished.folder, tmp_path / "again")
    other = replace(
        TINY,
        seeds=(1,),
        methods=("labels",),
        teachers=replace(TINY.teachers, tasks=("order",), strides=(2,)),
    )
    execute(another(finished, tmp_path / "other", profile=other), workers=1)
    a, b = (
        load_tensors(f / "student.safetensors")
        for f in (finished.student_folder(0, "labels"), tmp_path / "other/seed1/students/labels")
    )
    assert not torch.equal(a["fc.weight"], b["fc.weight"])


class Killed(BaseException):
    """Like SIGKILL, nothing may catch it."""


def until_done(run: Run, failure: type[BaseException]) -> int:
    for attempt in range(60):
        steps._videos.cache_clear()
        try:
            execute(run, workers=1)
        except failure:
            continue
        return attempt
    raise AssertionError("the run does not get on")


def test_killed_after_every_checkpoint(finished, tmp_path, monkeypatch):
    """Each training saves after every step, dies after every third, within epochs and between, and goes on from there."""
    real, saved = training.save_checkpoint, []

    def save_and_die(path, state):
        real(path, state)
        saved.append((path, state["at"]["step"]))
        if len(saved) % 3 == 0:
            raise Killed

    monkeypatch.setattr(training, "SAVE_EVERY_S", -1.0)
    monkeypatch.setattr(training, "save_checkpoint", save_and_die)
    attempts = until_done(another(finished, tmp_path / "run"), Killed)
    trainings = (2 + TINY.teachers.folds) * len(TINY.teachers.tasks) + len(
        TINY.methods
    )  # teachers are fitted, too
    assert attempts == len(saved) // 3 and len(saved) == 10 * trainings
    assert len(set(saved)) == 5 * len({path for path, _ in saved})
    assert_same_run(finished.folder, tmp_path / "run")


def test_a_disk_that_fills_up_again_and_again(finished, tmp_path, monkeypatch):
    real, writes = os.fsync, []

    def fsync(fd):
        writes.append(fd)
        if len(writes) % 11 == 0:
            raise OSError(28, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    assert until_done(another(finished, tmp_path / "run"), UserError) > 3
    assert_same_run(finished.folder, tmp_path / "run")


def test_a_finished_run_is_not_done_again(finished, monkeypatch):
    files = [
        p
        for p in finished.folder.rglob("*")
        if p.suffix in (".safetensors", ".ckpt") or p.name in ("result.json", "summary.json")
    ]
    before, rows = {p: p.stat().st_mtime_ns for p in files}, finished.metrics()
    for name in ("pretrain", "learn_edges", "distill", "summarise"):
        monkeypatch.setattr(steps, name, None)
    began = time.monotonic()
    assert execute(finished, workers=2) == rows  # no job is left, so no worker is started
    assert time.monotonic() - began < 5
    assert (
        float(torch.tensor([1e-38]) * 1e-2) == 0
    )  # a hundred times slower where denormal numbers are kept
    assert {p: p.stat().st_mtime_ns for p in files} == before


def test_what_was_deleted_is_made_again(finished, tmp_path):
    run = another(finished, tmp_path / "run")
    shutil.copytree(finished.folder, run.folder)
    outputs = run.teacher_folder(0, "order") / "outputs.safetensors"
    outputs.write_bytes(outputs.read_bytes()[:50])
    (run.folder / "seed0/edges/result.json").unlink()
    with pytest.raises(UserError, match=r"order/outputs\.safetensors is damaged.*delete it"):
        execute(run, workers=1)
    outputs.unlink()
    shutil.rmtree(run.student_folder(0, "both-graphs"))
    execute(run, workers=1)
    assert_same_run(finished.folder, run.folder)


def test_hidden_labels_change_nothing(finished):
    """Labels outside the labelled part, replaced by nonsense, leave teacher, edges and student as they were."""
    torch.set_flush_denormal(True)
    videos, cfg = finished.videos(), TINY
    known = gather({"order": outputs(finished)}, videos)
    train = torch.tensor([s == "train" for s in videos.splits])
    assert (known.labels[~train] == -1).all()
    assert torch.equal(known.labels[train], videos.labels[train])
    noise = torch.randint(12, (len(train),), generator=torch.Generator().manual_seed(0))
    lying = replace(videos, labels=torch.where(train, videos.labels, noise))
    found = {}
    for task in cfg.teachers.tasks:
        view = cfg.view_of(task)
        backbone, _, _ = pretrain(task, cfg.teachers, view, lying, seed=0)
        found[task] = outputs_of(backbone, lying, cfg.teachers, view, seed=0)[1]
    knowledge = gather(found, lying)
    edges = learn_edges(
        knowledge,
        *build_graphs(knowledge, 1, lying.training_rows, cfg.distillation),
        cfg.distillation.edges,
        seed=0,
    )
    student, _ = distill("both-graphs", knowledge, edges, lying, cfg.view, cfg.distillation, seed=0)
    for key, value in load_tensors(
        finished.student_folder(0, "both-graphs") / "student.safetensors"
    ).items():
        assert torch.equal(value, student.classifier.state_dict()[key]), key


@pytest.mark.parametrize(
    "method", [*BASELINES, *(f"kd-{name}" for name in ("learned", *POLICIES, *TINY.teachers.tasks))]
)
def test_every_baseline_trains(finished, method):
    """One epoch of a loss that is finite, reaches the student's features and changes what it learns."""
    check_profile(replace(TINY, methods=(method,)))
    videos = finished.videos()
    cfg = replace(
        TINY.distillation, schedule=replace(TINY.distillation.schedule, epochs=1, min_steps=1)
    )
    knowledge, edges = finished.knowledge(0, videos), finished.edges(0)
    trained, history = distill(method, knowledge, edges, videos, TINY.view, cfg, seed=0)
    plain, _ = distill("labels", knowledge, edges, videos, TINY.view, cfg, seed=0)
    (name,) = trained.balance.scales
    assert name == ("baseline" if method in BASELINES else "kd")
    assert math.isfinite(history[0][name]) and getattr(trained.balance, f"norm_{name}") > 0
    assert not torch.equal(trained.classifier.fc.weight, plain.classifier.fc.weight)


def test_kd_from_one_teacher_is_what_a_weight_of_one_says(finished):
    videos = finished.videos()
    knowledge, edges, rows = finished.knowledge(0, videos), finished.edges(0), torch.arange(5)
    best = knowledge.teachers.index(knowledge.best_teacher())
    weights = kd_weights("best", knowledge, edges, knowledge.probs())(rows, 0, torch.zeros(0))
    assert torch.equal(weights, torch.eye(2)[best].expand(5, 2))
    learned = kd_weights("learned", knowledge, edges, knowledge.probs())(rows, 1, torch.zeros(0))
    assert torch.equal(learned, edges.teachers[1, :5])
    with pytest.raises(
        ValueError, match=r"unknown method 'kd-best-of-all': choose from labels.*fitnets.*kd-camkd"
    ):
        distill("kd-best-of-all", knowledge, edges, videos, TINY.view, TINY.distillation, seed=0)


def outputs(run: Run) -> steps.TeacherOutputs:
    return steps.TeacherOutputs(
        **load_tensors(run.teacher_folder(0, "order") / "outputs.safetensors")
    )


def test_labelled_clips_are_judged_by_a_teacher_that_did_not_see_them(finished):
    """Folds cover the labelled part and nothing else, and the whole teacher's logits differ from the out-of-fold ones."""
    out, videos = outputs(finished), finished.videos()
    train = torch.tensor([s == "train" for s in videos.splits])
    assert ((out.fold >= 0) == train).all()
    state = load_tensors(finished.teacher_folder(0, "order") / "teacher.safetensors")
    whole = out.features @ state["model.fc.weight"].T + state["model.fc.bias"]
    same = (whole - out.logits).abs().amax(1) < 2e-3  # outputs are kept in half precision
    assert same[~train].all()
    assert not same[train].any()


def test_one_teacher_alone_goes_through_to_its_figures(finished, tmp_path):
    profile = replace(
        TINY,
        teachers=replace(TINY.teachers, tasks=("order",), strides=(2,)),
        methods=("labels", "both-graphs"),
    )
    run = another(finished, tmp_path / "run", profile=profile)
    execute(run, workers=1)
    drawn = {path.stem for path in draw_figures(run, tmp_path / "figures")}
    assert "accuracy" in drawn and "logits_graph" not in drawn  # there is no plan between two


def test_a_teacher_of_ones_own_goes_through_a_run(finished, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from torchvision.models.video import mc3_18\nfrom gdviz.teachers.own import TappedBackbone, TappedClassifier\n"
        "def at(layer):\n    return TappedBackbone(mc3_18(), layer, size=16, length=4)\n"
        "def net():\n    return at('layer1')\n"
        "def other():\n    return at('layer1.0')\n"
        "def answers():\n    return TappedClassifier(net(), 'fc')\n"
        "def nothing():\n    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    profile = replace(
        TINY,
        teachers=replace(TINY.teachers, tasks=("order", "mine:net")),
        methods=("labels", "both-graphs", "kd-mine:net"),
    )
    run = another(finished, tmp_path / "run", profile=profile)
    rows = execute(run, workers=1)
    assert [row["name"] for row in rows] == [
        "order",
        "mine:net",
        "labels",
        "both-graphs",
        "kd-mine:net",
    ]
    assert "mine:net" in evaluation(run) and "mine:net" in table(run)
    monkeypatch.setattr(sys.modules["mine"], "net", sys.modules["mine"].other)
    with pytest.raises(UserError, match="mine:net: returns another network than when"):
        execute(run, workers=1)
    answers = replace(
        profile,
        teachers=replace(TINY.teachers, tasks=("order", "mine:answers")),
        methods=("labels",),
    )
    with pytest.raises(UserError, match="mine:answers: answers in 400 classes, the data has 12"):
        execute(another(run, tmp_path / "refused", profile=answers), workers=1)
    for name, message in (
        ("mine:none", "no attribute 'none'"),
        ("yours:net", "No module"),
        ("mine:nothing", "returned int"),
    ):
        with pytest.raises(UserError, match=f"--teachers.tasks {name}: .*{message}"):
            check_profile(replace(TINY, teachers=replace(TINY.teachers, tasks=("order", name))))


# --- refusals, before any work


def test_other_folders_are_refused(finished, tmp_path):
    changed = replace(TINY, distillation=replace(TINY.distillation, beta=3.0))
    with pytest.raises(UserError, match="another configuration"):
        execute(replace(finished, profile=changed), workers=1)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    for name in ("notes", "file"):
        with pytest.raises(UserError, match=f"--out .*{name}: is not empty and holds no run"):
            execute(another(finished, tmp_path / name, cache=tmp_path / "none"), workers=1)
    assert not (tmp_path / "none").exists()
    assert os.listdir(tmp_path / "notes") == ["mine.txt"]
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"bad.config\.json is not JSON"):
        execute(another(finished, tmp_path / "bad"), workers=1)


def test_a_run_from_before_a_setting_is_still_that_run(finished, tmp_path):
    config = load_json(finished.folder / "config.json")
    del config["profile"]["distillation"]["schedule"]["ema"]
    save_json(tmp_path / "config.json", config)
    steps.claim_folder(another(finished, tmp_path))
    config["profile"]["distillation"]["beta"] = 3.0
    save_json(tmp_path / "config.json", config)
    with pytest.raises(UserError, match="another configuration"):
        steps.claim_folder(another(finished, tmp_path))


def vary(part: str, **changes) -> Profile:
    return replace(TINY, **({part: replace(getattr(TINY, part), **changes)} if part else changes))


BAD = {
    "task": (vary("teachers", tasks=("order", "jigsaw")), "--teachers.tasks: unknown 'jigsaw'"),
    "backbone": (vary("teachers", backbone="resnet50"), "--teachers.backbone resnet50: unknown"),
    "student": (vary("distillation", student="tiny"), "--distillation.student tiny: unknown"),
    "method": (vary("", methods=("labels", "kd-pace")), "--methods: unknown 'kd-pace'"),
    "method twice": (vary("", methods=("labels", "labels")), "--methods"),
    "strides": (vary("teachers", strides=(1, 2, 3)), "--teachers.strides: 3 strides for 2 tasks"),
    "no seeds": (vary("", seeds=()), "--seeds"),
    "clip": (vary("view", length=12), "--view.length 12"),
    "long clip": (
        replace(
            vary("view", length=11), teachers=replace(TINY.teachers, tasks=("order", "clip-order"))
        ),
        "--teachers.tasks clip-order: ",
    ),
    "parts": (
        vary("teachers", fit=replace(TINY.teachers.fit, accumulate=3)),
        "--teachers.fit: 16 clips",
    ),
    "average": (
        vary("distillation", schedule=replace(TINY.distillation.schedule, ema=1.0)),
        "--distillation.schedule: needs",
    ),
    "epochs": (
        vary("teachers", pretrain=replace(TINY.teachers.pretrain, epochs=0)),
        "--teachers.pretrain",
    ),
}


def test_every_task_is_a_setting():
    every = replace(
        TINY,
        teachers=replace(TINY.teachers, tasks=tuple(TASKS), strides=(1,) * len(TASKS)),
        methods=("kd-clip-order",),
    )
    check_profile(every)


@pytest.mark.parametrize(("profile", "message"), BAD.values(), ids=BAD)
def test_bad_settings_are_found_before_any_work(tmp_path, profile, message):
    with pytest.raises(UserError) as caught:
        execute(Run(profile, tmp_path / "run", cache=tmp_path / "data"), workers=1)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_too_few_labelled_videos_are_found_before_training(tmp_path):
    with pytest.raises(UserError, match="1 to train on"):
        execute(
            Run(
                vary("motion", labelled=1, unlabelled=1, test=2),
                tmp_path / "run",
                cache=tmp_path / "data",
            ),
            workers=1,
        )
    assert not (tmp_path / "run").exists()


# --- slow: real processes


def kill_when(process: subprocess.Popen, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 900
    while not ready():
        assert process.poll() is None, process.stdout.read()[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.3)  # into the middle of what has begun
    assert process.poll() is None, "finished before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
def test_sigkill_in_every_phase_and_at_random_moments_changes_nothing(tmp_path):
    """Killed while videos are drawn, and in the middle of teachers, edges and students; with two workers, against one. Then whenever."""
    calm = Run(TINY, tmp_path / "calm", cache=tmp_path / "calm-data")
    process = start(calm, "--workers", "1")
    text, _ = process.communicate(timeout=900)
    assert process.returncode == 0, text[-2000:]
    run = Run(TINY, tmp_path / "run", cache=tmp_path / "data")
    done = run.folder / "seed0"
    phases = {
        "data": lambda: len(list(run.cache.rglob("*.mp4"))) > 3,
        "teachers": lambda: (run.folder / "config.json").exists(),
        "one teacher": lambda: any(done.glob("teachers/*/result.json")),
        "edges": lambda: len(list(done.glob("teachers/*/result.json"))) == 2,
        "students": lambda: (
            (done / "edges/result.json").exists() and (done / "edges-shuffled/result.json").exists()
        ),
    }
    for ready in phases.values():
        kill_when(start(run, "--workers", "2"), ready)
        assert not (run.folder / "metrics.jsonl").exists()

    def finish(process: subprocess.Popen, folder: Path) -> None:
        text, _ = process.communicate(timeout=900)
        assert process.returncode == 0, text[-2000:]
        assert_same_run(calm.folder, folder)

    finish(start(run, "--workers", "2"), run.folder)
    begun, rng = tmp_path / "begun", random.Random(0)
    hasty = f"import gdviz.core.loop as t; t.SAVE_EVERY_S = 0.2; open({str(begun)!r}, 'w'); from gdviz.cli import main; main()"
    kills, again = 0, 0
    while kills < 20:
        begun.unlink(missing_ok=True)
        run = Run(TINY, tmp_path / f"random{again}", cache=tmp_path / f"random-data{again}")
        process = start(run, "--workers", "1", main=("-c", hasty))
        while not begun.exists():
            assert process.poll() is None, process.stdout.read()[-2000:]
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 3))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
        else:  # it got through
            finish(process, run.folder)
            again += 1
    finish(start(run, "--workers", "1"), run.folder)


@pytest.mark.slow
def test_real_videos_go_through(ut_interaction, tmp_path):
    (tmp_path / "cache").mkdir()
    flags = (
        "--profile smoke --teachers.pretrain.epochs 1 --teachers.fit.epochs 2 --distillation.schedule.epochs 2 --seeds 0 1 "
        "--methods labels both-graphs --workers 2"
    )
    command = [
        sys.executable,
        "-m",
        "gdviz.cli",
        "run",
        *flags.split(),
        "--data",
        str(ut_interaction),
        "--out",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(
        [*command, "--cache", str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"MPLBACKEND": "Agg"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    for line in (
        "baseline: metadata",
        "baseline: mean-frame",
        "student: both-graphs",
        "teacher: registration",
    ):
        assert line in done.stdout
    videos = open_run(tmp_path / "run").videos()
    assert videos.label_names == (
        "hand_shaking",
        "hugging",
        "kicking",
        "pointing",
        "punching",
        "pushing",
    )
    sides = [
        {g for g, s in zip(videos.groups, videos.splits, strict=True) if s == side}
        for side in ("train", "test")
    ]
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == {str(i) for i in range(1, 11)}
    assert len(list((tmp_path / "run" / "figures").glob("*.pdf"))) >= 4


def test_a_student_hears_the_edges_of_the_moment(finished, monkeypatch):
    videos = finished.videos()
    knowledge, edges = finished.knowledge(0, videos), finished.edges(0)
    moments = len(edges.teachers)
    # every moment listens to another teacher, and pairs tell the moment
    teachers = torch.eye(len(knowledge.teachers))[torch.arange(moments) % 2][:, None].expand_as(
        edges.teachers
    )
    edges = replace(
        edges,
        teachers=teachers,
        pairs=torch.arange(moments).float()[:, None].expand_as(edges.pairs),
    )
    heard, real = {"logits": [], "pairs": []}, (LogitsGraph.loss, RepresentationGraph.loss)

    def logits_loss(self, z, probs, weights, consensus):
        heard["logits"].append(weights)
        return real[0](self, z, probs, weights, consensus)

    def pairs_loss(self, h, features, labels, weights):
        heard["pairs"].append(int(weights[0]))
        return real[1](self, h, features, labels, weights)

    monkeypatch.setattr(LogitsGraph, "loss", logits_loss)
    monkeypatch.setattr(RepresentationGraph, "loss", pairs_loss)
    cfg = replace(TINY.distillation, schedule=replace(TINY.distillation.schedule, epochs=moments))
    distill("both-graphs", knowledge, edges, videos, TINY.view, cfg, seed=0)
    assert heard["pairs"] == sorted(heard["pairs"]) and set(heard["pairs"]) == set(range(moments))
    for moment, weights in zip(heard["pairs"], heard["logits"], strict=True):
        assert (weights == teachers[moment, 0]).all()

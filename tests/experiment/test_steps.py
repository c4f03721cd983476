"""A run is the same run however often it is started, killed or starved."""

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from runs import assert_same_run, start
from torch import nn

from gdviz.config import Schedule
from gdviz.core import loop
from gdviz.core.files import UserError, load_json, load_tensors, save_json
from gdviz.data.motion import CLASSES, render
from gdviz.data.videos import VideoSet
from gdviz.experiment import steps
from gdviz.experiment.folder import Run, claim_folder, open_run
from gdviz.experiment.steps import execute
from gdviz.student.methods import ThroughBothGraphs
from gdviz.teachers.own import OwnView, Tapped


def another(run: Run, folder: Path, **changes) -> Run:
    """The same run, from the same videos, elsewhere."""
    return replace(run, folder=folder, **changes)


def test_what_a_finished_run_holds(finished):
    rows = finished.results()
    names = [
        *(("teacher", t) for t in TINY.teachers.tasks),
        *(("student", m) for m in TINY.methods),
    ]
    assert list(zip(rows["kind"], rows["name"], strict=True)) == names
    assert (finished.folder / "skipped.csv").read_text().split() == ["path,reason"]
    baselines = load_json(finished.folder / "summary.json")["baselines"]
    assert baselines.keys() >= {"chance", "metadata", "single-frame", "mean-frame"}
    reread = open_run(finished.folder)
    assert reread.profile == TINY and reread.results().equals(rows)
    students = [
        load_tensors(finished.student_folder(0, m) / "student.safetensors") for m in TINY.methods
    ]
    for a, b in itertools.combinations(students, 2):
        assert not torch.equal(a["fc.weight"], b["fc.weight"])


def test_a_control_of_one_s_own_is_taught_nothing_of_the_right_clips(finished, monkeypatch):
    class Mine(ThroughBothGraphs):
        shuffled = True

    asked = []

    def stop(run, seed, edges="learned"):
        asked.append(edges)
        raise StopIteration

    monkeypatch.setattr(Run, "graphs", stop)
    monkeypatch.setattr(steps, "find_method", lambda *_: Mine)
    with pytest.raises(StopIteration):
        steps.train_student(finished, 0, "mine")
    assert asked == ["shuffled"]


def test_a_run_with_another_network_of_one_s_own_is_refused(finished, tmp_path, monkeypatch):
    mine, videos = types.ModuleType("mine"), finished.videos()
    monkeypatch.setitem(sys.modules, "mine", mine)
    teachers = replace(TINY.teachers, tasks=("order", "mine:net"))
    run = another(finished, tmp_path / "run", profile=replace(TINY, teachers=teachers))
    for size in (2, 2, 3):
        mine.net = lambda size=size: Tapped(nn.Conv3d(3, size, 1), "", OwnView(16, 4))
        refused = pytest.raises(UserError, match=r"--teachers\.tasks mine:net differ")
        with refused if size == 3 else nullcontext():
            claim_folder(run, videos)


def test_a_home_with_other_classes_is_refused(tmp_path, monkeypatch):
    pixels, splits = np.zeros((2, 2, 4, 4, 3), np.uint8), ["train", "train"]
    own, home = (
        VideoSet.from_arrays(pixels, [0, 1], splits, label_names=names) for names in ("ab", "ac")
    )
    monkeypatch.setattr(Run, "videos", lambda run, workers=1: own)
    monkeypatch.setattr(Run, "home", lambda run, task, workers=1: home)
    with pytest.raises(UserError, match="order: its home has other classes, 'b' is one"):
        steps.begin(Run(TINY, tmp_path / "run", cache=tmp_path), 1)


def test_the_same_seed_gives_the_same_run_and_another_one_does_not(finished, tmp_path):
    execute(another(finished, tmp_path / "again"), workers=1)
    assert_same_run(finished.folder, tmp_path / "again")
    teachers = replace(TINY.teachers, tasks=("order",), strides=(2,))
    other = replace(TINY, seeds=(1,), methods=("labels",), teachers=teachers)
    execute(another(finished, tmp_path / "other", profile=other), workers=1)
    folders = finished.student_folder(0, "labels"), tmp_path / "other/seed1/students/labels"
    a, b = (load_tensors(folder / "student.safetensors") for folder in folders)
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
    """Each training saves after every step, dies after every third, and goes on from there."""
    real, saved = loop.save_checkpoint, []

    def save_and_die(path, state):
        real(path, state)
        saved.append(path)
        if len(saved) % 3 == 0:
            raise Killed

    monkeypatch.setattr(loop, "SAVE_EVERY_S", -1.0)
    monkeypatch.setattr(loop, "save_checkpoint", save_and_die)
    attempts = until_done(another(finished, tmp_path / "run"), Killed)
    trainings = (2 + TINY.teachers.folds) * len(TINY.teachers.tasks) + len(TINY.methods)
    assert attempts == len(saved) // 3 and len(saved) == 6 * trainings
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
    kept = (".safetensors", ".ckpt")
    files = [p for p in finished.folder.rglob("*") if p.suffix in kept or p.name == "result.json"]
    before, rows = {p: p.stat().st_mtime_ns for p in files}, finished.results()
    for name in ("pretrain", "learn_edges", "distill", "summarise"):
        monkeypatch.setattr(steps, name, None)
    assert execute(finished, workers=2).equals(rows)
    assert float(torch.tensor([1e-38]) * 1e-2) == 0  # denormal numbers are slow, and flushed
    assert {p: p.stat().st_mtime_ns for p in files} == before


def test_what_was_deleted_is_made_again(finished, tmp_path):
    run = another(finished, tmp_path / "run")
    shutil.copytree(finished.folder, run.folder)
    part = run.teacher_folder(0, "order") / "bank/00000.safetensors"
    part.write_bytes(part.read_bytes()[:50])
    (run.folder / "seed0/graphs/result.json").unlink()
    with pytest.raises(UserError, match=r"order/bank/00000\.safetensors is damaged.*delete it"):
        execute(run, workers=1)
    part.unlink()
    shutil.rmtree(run.student_folder(0, "both-graphs"))
    execute(run, workers=1)
    assert_same_run(finished.folder, run.folder)


def test_labelled_clips_are_judged_by_a_teacher_that_did_not_see_them(finished):
    """On labelled clips alone the teacher's own head says something else than what is kept."""
    videos = finished.videos()
    readout = finished.bank(0, videos).readouts[0]
    train, every = (
        torch.tensor([s == "train" for s in videos.splits]),
        torch.arange(len(videos.splits)),
    )
    assert ((readout.fold >= 0) == train).all()
    state = load_tensors(finished.teacher_folder(0, "order") / "teacher.safetensors")
    whole = readout.at("features", every) @ state["model.fc.weight"].T + state["model.fc.bias"]
    same = (whole - readout.at("logits", every)).abs().amax(1) < 2e-3  # half precision
    assert same[~train].all() and not same[train].any()


def drawn() -> VideoSet:
    """Six labelled, 28 unlabelled and twelve test videos of each motion, 16 pixels wide."""
    splits = ["train"] * 6 + ["unlabelled"] * 28 + ["test"] * 12
    each = [(c, 1000 * c + k) for c in range(len(CLASSES)) for k in range(len(splits))]
    films = (render(label, seed, size=32, frames=16) for label, seed in each)
    small = [f.reshape(16, 16, 2, 16, 2, 3).mean((2, 4)).round().astype(np.uint8) for f in films]
    return VideoSet.from_arrays(np.stack(small), [c for c, _ in each], splits * len(CLASSES))


def test_both_graphs_beat_labels_only_and_the_shuffled_control(tmp_path, monkeypatch, unchecked):
    profile = replace(
        TINY,
        view=replace(TINY.view, size=16, frames=16, length=8, clips=1),
        teachers=replace(
            TINY.teachers,
            tasks=("registration",),
            strides=(1,),
            backbone="tiny8m",
            pretrain=Schedule(epochs=16, batch=16, min_steps=20),
            fit=Schedule(epochs=32, batch=16, lr=5e-3, min_steps=3),
        ),
        distillation=replace(
            TINY.distillation,
            student="tiny8n",
            temperature=1.0,
            eps=0.3,
            schedule=Schedule(epochs=16, batch=32, lr=1e-2, min_steps=16),
        ),
        methods=("labels", "both-graphs", "both-shuffled"),
    )
    videos = drawn()  # without files, which this is not about
    monkeypatch.setattr(Run, "videos", lambda run, workers=1: videos)
    rows = execute(Run(profile, tmp_path / "run", cache=tmp_path), workers=1)
    found = rows.set_index("name")["accuracy"]
    assert found["both-graphs"] > found["labels"] + 0.05, found
    assert found["both-graphs"] > found["both-shuffled"] + 0.1, found


def test_one_teacher_alone_goes_through(finished, tmp_path):
    teachers = replace(TINY.teachers, tasks=("order",), strides=(2,))
    profile = replace(TINY, teachers=teachers, methods=("labels", "both-graphs"))
    rows = execute(another(finished, tmp_path / "run", profile=profile), workers=1)
    assert rows["accuracy"].notna().all() and len(rows) == 3


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
    claim_folder(another(finished, tmp_path))
    config["profile"]["distillation"]["beta"] = 3.0
    save_json(tmp_path / "config.json", config)
    with pytest.raises(UserError, match="another configuration"):
        claim_folder(another(finished, tmp_path))


def test_a_run_of_another_version_is_not_opened(finished, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "run")
    config = load_json(tmp_path / "run/config.json")
    save_json(tmp_path / "run/config.json", config | {"version": 4})
    with pytest.raises(UserError, match=r"another version of gdviz .*version 4"):
        open_run(tmp_path / "run")


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


def finish(process: subprocess.Popen) -> None:
    text, _ = process.communicate(timeout=900)
    assert process.returncode == 0, text[-2000:]


@pytest.fixture(scope="module")
def calm(tmp_path_factory) -> Run:
    """An undisturbed run of one process."""
    root = tmp_path_factory.mktemp("calm")
    run = Run(TINY, root / "run", cache=root / "data")
    finish(start(run, "--workers", "1"))
    return run


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
def test_sigkill_in_every_phase_changes_nothing(calm, tmp_path):
    """While videos are drawn, in the middle of teachers, graphs and students; two workers."""
    run = Run(TINY, tmp_path / "run", cache=tmp_path / "data")
    done = run.folder / "seed0"
    phases = {
        "data": lambda: len(list(run.cache.rglob("*.mp4"))) > 3,
        "teachers": lambda: (run.folder / "config.json").exists(),
        "one teacher": lambda: any(done.glob("teachers/*/result.json")),
        "graphs": lambda: len(list(done.glob("teachers/*/result.json"))) == 2,
        "students": lambda: len(list(done.glob("graphs*/result.json"))) == 2,
    }
    for ready in phases.values():
        kill_when(start(run, "--workers", "2"), ready)
        assert not (run.folder / "results.csv").exists()
    finish(start(run, "--workers", "2"))
    assert_same_run(calm.folder, run.folder)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
def test_sigkill_at_random_moments_changes_nothing(calm, tmp_path):
    begun, rng = tmp_path / "begun", random.Random(0)
    hasty = (
        f"import gdviz.core.loop as t; t.SAVE_EVERY_S = 0.2; open({str(begun)!r}, 'w'); "
        "from gdviz.cli import main; main()"
    )
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
            finish(process)
            assert_same_run(calm.folder, run.folder)
            again += 1
    finish(start(run, "--workers", "1"))
    assert_same_run(calm.folder, run.folder)


@pytest.mark.slow
def test_real_videos_go_through(ut_interaction, tmp_path):
    flags = (
        "--profile smoke --teachers.pretrain.epochs 1 --teachers.fit.epochs 2 --seeds 0 1 "
        "--distillation.schedule.epochs 2 --methods labels both-graphs --workers 2"
    )
    where = ["--data", ut_interaction, "--out", tmp_path / "run", "--cache", tmp_path / "cache"]
    command = [sys.executable, "-m", "gdviz.cli", "run", *flags.split(), *map(str, where)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"MPLBACKEND": "Agg"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    for name in ("baseline: metadata", "student: both-graphs", "teacher: registration"):
        assert name in done.stdout
    videos = open_run(tmp_path / "run").videos()
    assert videos.label_names[:3] == ("hand_shaking", "hugging", "kicking")
    pairs = list(zip(videos.groups, videos.splits, strict=True))
    train, test = ({g for g, s in pairs if s == side} for side in ("train", "test"))
    assert not train & test and train | test == {str(i) for i in range(1, 11)}
    assert len(list((tmp_path / "run" / "figures").glob("*.pdf"))) >= 4

"""Finished runs whose videos, disk or names are not what a run would like."""

import csv
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import REPO, TINY

from gdviz.config import View
from gdviz.core.files import UserError, load_json, save_json
from gdviz.data._encode import encode
from gdviz.data.motion import render
from gdviz.data.videos import VideoSet
from gdviz.experiment import steps
from gdviz.experiment.folder import Run, open_run
from gdviz.experiment.steps import execute
from gdviz.experiment.tables import evaluation
from gdviz.show import figures

ODD_CLASSES = ("pay_$^$", "一二三 \U0001f600")
SMALL = replace(
    TINY,
    view=View(size=16, frames=6, length=4, stride=1),
    teachers=replace(TINY.teachers, strides=(1, 1)),
    methods=("labels", "both-graphs"),
)


def copied(run: Run, where: Path) -> Run:
    """A finished run that is told of other videos, as many as it had."""
    save_json(where / "config.json", load_json(run.folder / "config.json"))
    save_json(where / "source.json", load_json(run.folder / "source.json"))
    return replace(run, folder=where)


def test_a_run_whose_videos_have_changed_is_refused_wherever_it_is_opened(finished, tmp_path):
    run = copied(finished, tmp_path / "run")
    assert run.videos().fingerprint == load_json(run.folder / "config.json")["data"]
    save_json(run.folder / "config.json", load_json(run.folder / "config.json") | {"data": "old"})
    doors = {
        "evaluate": lambda: evaluation(open_run(run.folder)),
        "figures": lambda: figures.draw_figures(open_run(run.folder), tmp_path / "figures"),
        "notebooks": lambda: open_run(run.folder).videos(),
        "run": lambda: execute(run, workers=1),
    }
    for name, door in doors.items():
        with pytest.raises(UserError, match="the videos of motion have changed since this run"):
            door()
        assert not (tmp_path / "figures").exists(), name


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> Run:
    """A run on two classes with odd names, with three test clips."""
    root = tmp_path_factory.mktemp("odd")
    parts = ["train", "train", "train", "test"]
    for label, name in enumerate(ODD_CLASSES):
        for i, part in enumerate(parts[: 4 - label] + ["test"] * label):
            path = root / "videos" / part / name / f"{label}{i}.mp4"
            encode(render(label, i + 10 * label, size=32, frames=8), path)
    run = Run(SMALL, root / "run", root / "videos", root / "cache")
    execute(run, workers=1)
    return run


@pytest.mark.filterwarnings("ignore:Glyph:UserWarning")
def test_odd_names_and_two_test_clips_cost_no_figure_but_the_embedding(odd, tmp_path, capsys):
    assert len(odd.videos().rows("test")) == 2
    drawn = {path.stem for path in figures.draw_figures(odd, tmp_path)}
    assert drawn == set(figures.FIGURES) - {"embeddings"}
    assert "embeddings: not drawn, this run is too small" in capsys.readouterr().out
    assert "pay_$^$" in evaluation(odd)


@pytest.mark.filterwarnings("ignore:Glyph:UserWarning")
def test_a_figure_that_fails_is_told_and_takes_no_other_along(odd, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("cannot cache function\nno locator")  # numba, in a read-only package

    few = {"logits_graph": fail, "edge_weights": figures.FIGURES["edge_weights"]}
    monkeypatch.setattr(figures, "FIGURES", few)
    drawn = {path.stem for path in figures.draw_figures(odd, tmp_path)}
    assert "edge_weights" in drawn and "logits_graph" not in drawn
    out = capsys.readouterr().out
    assert "logits_graph: not drawn, RuntimeError: cannot cache function\n" in out
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        figures.draw_figures(odd, tmp_path / "file")


def test_more_than_a_thousand_skipped_files_are_told_by_reason(tmp_path, monkeypatch, capsys):
    skipped = [(f"{i}.mp4", f"cut off: {i} of 2000 frames") for i in range(1500)]
    skipped += [(f"x{i}.mp4", "no video stream") for i in range(9)]
    videos = VideoSet.from_arrays(
        torch.zeros(4, 2, 2, 2, 3, dtype=torch.uint8).numpy(), [0, 1, 0, 1], ["train"] * 4
    )
    videos = replace(videos, skipped=tuple(skipped))
    monkeypatch.setattr(Run, "videos", lambda self, workers=1: videos)
    run = Run(SMALL, tmp_path / "run", cache=tmp_path)
    steps.begin(run, 1)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "skipped 1500 videos: cut off: N of N frames",
        "skipped 9 videos: no video stream",
        f"all 1509 are listed in {run.folder / 'skipped.csv'}",
    ]
    with open(run.folder / "skipped.csv", newline="") as file:
        assert [tuple(row) for row in csv.reader(file)][1:] == skipped


def test_what_a_notebook_leaves_in_the_environment_stops_no_command(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.mp4").write_bytes(b"")
    command = [sys.executable, "-m", "gdviz.cli", "data", "check", str(tmp_path)]
    left = {"MPLBACKEND": "module://not_installed", "HOME": "/nonexistent"}
    environment = os.environ | {"PYTHONPATH": str(REPO)} | left
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, "a: 1 videos\n")
    assert "Traceback" not in done.stderr


UNGUARDED = """
from gdviz.config import View
from gdviz.data.videos import load_videos
load_videos({root!r}, View(size=16, frames=6), {cache!r}, workers=2)
"""


@pytest.mark.slow
def test_a_script_without_a_main_guard_is_told_what_it_is(video_folder, tmp_path):
    script = tmp_path / "mine.py"
    script.write_text(UNGUARDED.format(root=str(video_folder()), cache=str(tmp_path / "cache")))
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment
    )
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "a worker could not start; a script keeps what it does under `if __name__ ==" in last

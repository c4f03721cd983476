"""The examples do what they say, in whole runs and in worker processes too."""

import json
import re
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import REPO, TINY
from torch import Generator

from gdviz import commands
from gdviz.core.files import UserError, load_tensors
from gdviz.experiment.folder import Run, open_run
from gdviz.experiment.steps import execute
from gdviz.teachers.backbones import build_backbone
from gdviz.teachers.own import find_source
from gdviz.teachers.pretext import common

TASK, TEACHER = "examples.own_task:ArrowOfTime", "examples.own_teacher:videomae"
METHOD = "examples.own_method:KDAndHint"


@pytest.fixture(autouse=True)
def _at_the_repository(monkeypatch):
    monkeypatch.chdir(REPO)
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_a_run_of_all_three_in_worker_processes(tmp_path):
    pytest.importorskip("transformers", reason="needs gdviz[hub]")
    teachers = replace(TINY.teachers, tasks=("order", TASK, TEACHER), strides=(2, 2, 1))
    profile = replace(TINY, teachers=teachers, methods=("labels", METHOD, "both-graphs"))
    results = execute(Run(profile, tmp_path / "run", cache=tmp_path / "data"), workers=2)
    assert results["name"].tolist() == [*teachers.tasks, *profile.methods]
    row = results.set_index("name")
    assert row.loc[TASK, "pretext"] == "accuracy" and 0 < row.loc[TASK, "pretext_score"] <= 1
    assert row.loc[METHOD, "label"] == "KD and hint"

    run = open_run(tmp_path / "run")
    bank = run.bank(0, run.videos())
    assert bank.teachers == teachers.tasks and bank.dims == [16, 16, 32]
    folder = run.student_folder(0, METHOD)
    assert load_tensors(folder / "method.safetensors")["regress.weight"].shape == (64, 16)
    epochs = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert len(epochs) == 2 and {"ce", "kd", "hint"} < set(epochs[-1])


def test_the_arrow_of_time_is_learned_where_there_is_one(monkeypatch):
    """A square that grows; played backwards it shrinks."""
    task_of = find_source(TASK)
    torch.manual_seed(0)
    backbone = build_backbone("tiny4")
    task, rng = task_of(backbone.dim, 4, 2), Generator().manual_seed(0)
    assert task.metric == "accuracy" and task.chance == 1 / 2
    side = torch.arange(16)
    inside = (side < 3 + torch.arange(12)[:, None]).float()  # (f, w)
    videos = (inside[:, :, None] * inside[:, None])[None, :, None].expand(16, 12, 3, 16, 16)
    monkeypatch.setattr(common, "augment", lambda clips, rng, strength: clips)
    inputs, target = task.views(videos, Generator().manual_seed(1))
    sizes = inputs.mean((1, 3, 4)).diff(dim=1)
    assert (sizes[target == 0] > 0).all() and (sizes[target == 1] < 0).all()
    optimiser = torch.optim.Adam([*backbone.parameters(), *task.parameters()], lr=1e-2)
    for _ in range(20):
        loss, accuracy = task(backbone, *task.views(videos, rng))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert float(accuracy) > 0.9


@pytest.mark.slow
def test_a_student_learns_data_in_memory():
    from examples.own_data import main, squares

    pixels, direction = squares(40)
    steps = {0: (0, 1), 1: (1, 0), 2: (0, -1), 3: (-1, 0)}
    for video, way in zip(pixels, direction, strict=True):
        assert all((np.roll(a, steps[way], (0, 1)) == b).all() for a, b in pairwise(video))
    assert main() > 0.6


def test_the_guide_is_cut_from_the_examples():
    code = "".join(file.read_text() for file in (REPO / "examples").glob("*.py")).splitlines()
    guide = (REPO / "docs" / "own.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", guide, re.S)
    assert len(blocks) == 4
    assert [line for block in blocks for line in block.splitlines() if line not in code] == []
    commands = re.findall(r"`(gdviz run .*examples.*)`", guide)
    assert len(commands) == 3 and all(command in code for command in commands)
    assert all((REPO / "docs" / path).exists() for path in re.findall(r"\]\((.*?)\)", guide))


@pytest.mark.parametrize("name", ["own_task", "own_teacher", "own_method"])
def test_the_command_in_a_docstring_is_one(name, monkeypatch, tmp_path):
    """Its flags are taken, and what it names is found; the run itself is left out."""
    text = (REPO / "examples" / f"{name}.py").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("gdviz run ")]
    began = []
    monkeypatch.setattr(commands.steps, "execute", lambda run, **_: began.append(run) or stop())

    def stop():
        raise UserError("far enough")

    with pytest.raises(SystemExit, match="far enough"):
        commands.execute("run", [*line.split()[2:], "--out", str(tmp_path)])
    (run,) = began
    assert f"examples.{name}:" in str((run.profile.teachers.tasks, run.profile.methods))

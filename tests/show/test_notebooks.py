"""Notebooks: their form, their links, the example they start from; and, slow, that each runs, with its solutions."""

import json
import os
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import nbformat
import pytest
import torch

mpl.use("Agg")

from gdviz.config import METHODS, Distillation, MotionData, Profile, Schedule, Teachers
from gdviz.core.files import UserError, save_json, save_jsonl
from gdviz.data.clips import pick_frames
from gdviz.experiment.steps import Run, execute
from gdviz.show.bundled import Example, open_example, pack_example
from gdviz.show.notebook import Session, check, find_run, setup

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)


def read(path):
    return nbformat.read(path, as_version=4)


def cells(path, kind):
    return [cell for cell in read(path).cells if cell.cell_type == kind]


def prose(path):
    return "\n\n".join(cell.source for cell in cells(path, "markdown"))


def solutions(text):
    """The code of the folded solutions in a cell's text."""
    return re.findall(r"<details>.*?```python\n(.*?)```.*?</details>", text, re.DOTALL)


def test_there_are_seven_in_order():
    assert [name[:2] for name in NAMES] == [f"{i:02}" for i in range(7)]


@each
def test_committed_without_outputs_for_the_kernel_python3(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert "widgets" not in notebook.metadata
    assert all(not cell.outputs and cell.execution_count is None for cell in cells(path, "code"))
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)


@each
def test_template(path):
    first, second = read(path).cells[:2]
    assert first.source.startswith(f"# {path.stem[:2]} · ")
    for word in ("Question", "Objectives", "Prerequisites", "Reads", "Writes", "Cost"):
        assert re.search(rf"\*\*{word}\.?\*\*", first.source, re.IGNORECASE), word
    assert "CPU" in first.source
    assert "GPU" in first.source
    assert "memory" in first.source
    assert "setup()" in second.source
    code = cells(path, "code")
    assert len(code) <= 30
    assert max(len(cell.source.splitlines()) for cell in code) <= 15
    assert sum("setup()" in cell.source for cell in code) == 1
    assert any("assert " in cell.source for cell in code)
    text = prose(path)
    assert "**Predict.**" in text
    assert "**Look.**" in text
    assert "## Recap" in text
    assert re.search(r"\[(abstract|second-hand|ours)\]", text), "statements need their source"


@each
def test_exercises_have_a_difficulty_minutes_a_check_and_a_folded_solution(path):
    titles = re.findall(
        r"^\*\*\d · .+?\*\* \((easy|medium|hard), \d+ minutes\)", prose(path), re.MULTILINE
    )
    asked = [cell.source for cell in cells(path, "code") if "answer = ..." in cell.source]
    assert 2 <= len(titles) <= 3
    assert len(asked) == len(titles) == len(solutions(prose(path)))
    for question, solution in zip(asked, solutions(prose(path)), strict=True):
        (name,) = re.findall(r"def (check_\w+)\(answer\)", question)
        assert f"{name}(answer)" in question.split("answer = ...")[1]
        assert f"{name}(answer)" in solution


@each
def test_links_resolve(path):
    links = re.findall(r"\]\(([^)\s]+)\)", prose(path))
    assert links
    for link in links:
        assert link.startswith("https://") or (path.parent / link).exists(), link
    number = NAMES.index(path.stem)
    assert NOTEBOOKS[(number + 1) % len(NOTEBOOKS)].name in prose(path).rsplit("## Recap", 1)[1], (
        "a link to the next"
    )


@each
def test_no_magics_and_no_private_names(path):
    source = "\n".join(cell.source for cell in cells(path, "code"))
    assert not re.search(r"^\s*[%!]", source, re.MULTILINE)
    assert not re.search(r"import .*\b_\w+|\b(gdviz|plots|graphs|report)\._\w+", source)


def test_the_example_is_small_and_reads_like_a_run():
    folder = ROOT / "data/example"
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 1.5e6
    run = open_example(folder)
    seed, videos = run.profile.seeds[0], run.videos()
    knowledge, edges = run.knowledge(seed, videos), run.edges(seed)
    n, teachers, classes = (
        len(videos.labels),
        len(run.profile.teachers.tasks),
        len(videos.label_names),
    )
    assert knowledge.logits.shape == (n, teachers, classes)
    assert knowledge.logits.dtype == edges.teachers.dtype == torch.float32
    assert edges.teachers.shape[1:] == (n, teachers)
    assert edges.consensus.shape[1:] == (n, classes)
    assert (knowledge.labels >= 0).sum() == len(videos.rows("train"))
    assert ((knowledge.fold >= 0) == (knowledge.labels >= 0)).all()
    torch.testing.assert_close(edges.pairs.sum(1), torch.ones(len(edges.pairs)))
    assert {(m["kind"], m["name"]) for m in run.metrics()} == {
        *(("teacher", task) for task in run.profile.teachers.tasks), *(("student", m) for m in run.profile.methods)
    }  # fmt: skip
    batch = videos.batch(torch.tensor([0, n - 1]))
    view = run.profile.view
    assert batch.shape == (2, view.frames, view.size, view.size, 3)
    assert batch.dtype == torch.uint8
    assert torch.equal(videos.clips(torch.tensor([0, n - 1]), 4, 2), pick_frames(batch, 4, 2))


def test_the_renderer_still_draws_what_the_run_saw():
    run = open_example(ROOT / "data/example")
    session, videos = Session(0, run.profile, "cpu", ROOT, run), run.videos()
    films, titles = session.films()
    file = sorted((ROOT / "data/example/videos").glob("*/*.mp4"))[0]
    drawn = videos.batch(torch.tensor([videos.groups.index(str(int(file.stem)))]))[0].float()
    shrunk = torch.nn.functional.adaptive_avg_pool2d(
        torch.tensor(films[0]).movedim(-1, 1).float(), drawn.shape[1]
    ).movedim(1, -1)
    assert len(films) == len(titles) == 3 * len(set(titles))
    assert (drawn - shrunk).abs().mean() < 4, (
        "draw the example anew: python -m gdviz.show.bundled RUN"
    )


def test_a_damaged_example_is_refused(tmp_path):
    shutil.copytree(ROOT / "data/example", tmp_path / "example")
    with open(tmp_path / "example/metrics.jsonl", "a") as file:
        file.write("\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged"):
        open_example(tmp_path / "example")
    (tmp_path / "example/metrics.jsonl").unlink()
    with pytest.raises(UserError, match="or gone"):
        open_example(tmp_path / "example")


def test_setup_outside_the_project_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="not inside the gdviz project"):
        setup()


def test_the_newest_finished_run_comes_before_the_example(tmp_path):
    shutil.copytree(ROOT / "data/example", tmp_path / "data/example")
    assert isinstance(find_run(tmp_path), Example)
    for age, (name, finished) in enumerate({"old": True, "new": True, "unfinished": False}.items()):
        folder, config = (
            tmp_path / "runs" / name,
            json.loads((tmp_path / "data/example/config.json").read_text()),
        )
        save_json(folder / "config.json", config)
        save_json(folder / "source.json", {"data": None, "cache": "data"})
        if finished:
            save_json(folder / "summary.json", {})
            save_jsonl(folder / "metrics.jsonl", [])
            os.utime(folder / "summary.json", (1e9 + age, 1e9 + age))
    assert find_run(tmp_path).folder.name == "new"


def test_check_tells_right_from_wrong_from_not_yet(capsys):
    check(..., lambda x: x == 1, "one")
    check(1, lambda x: x == 1, "one")
    assert capsys.readouterr().out.split("\n")[:2] == ["not answered yet", "right"]
    with pytest.raises(AssertionError, match="one"):
        check(2, lambda x: x == 1, "one")


@pytest.mark.slow
def test_packing_keeps_what_the_run_says(tmp_path):
    one = Schedule(epochs=1, batch=16)
    profile = Profile(
        motion=replace(MotionData(), labelled=4, unlabelled=2, test=2),
        teachers=Teachers(tasks=("order", "registration"), strides=(2, 2), backbone="tiny4", pretrain=one, fit=one, folds=2),
        distillation=Distillation(student="tiny2", schedule=one), seeds=(0,),
    )  # fmt: skip
    run = Run(profile, tmp_path / "run", cache=tmp_path / "data")
    execute(run, workers=1)
    pack_example(run, tmp_path / "example")
    packed, videos = open_example(tmp_path / "example"), run.videos()
    again = packed.videos()
    assert again.splits == videos.splits
    assert again.labels.tolist() == videos.labels.tolist()
    assert torch.equal(again.batch(torch.arange(3)), videos.batch(torch.arange(3)))
    torch.testing.assert_close(
        packed.knowledge(0, again).logits, run.knowledge(0, videos).logits, atol=2e-2, rtol=2e-3
    )
    torch.testing.assert_close(packed.edges(0).teachers, run.edges(0).teachers, atol=2e-3, rtol=0)
    assert packed.metrics() == run.metrics()
    assert [m["name"] for m in packed.metrics() if m["kind"] == "student"] == list(METHODS)


NONSENSE = """
try:
    {check}(float("nan"))
except (AssertionError, TypeError, ValueError):
    pass
else:
    raise AssertionError("{check} takes anything")
"""


def with_solutions(notebook):
    """The notebook as a reader leaves it: each solution pasted in and run, and each check tried on nonsense."""
    out = []
    for cell in notebook.cells:
        out.append(cell)
        for code in solutions(cell.source) if cell.cell_type == "markdown" else ():
            (name,) = set(re.findall(r"check_\w+(?=\(answer\))", code))
            solution = nbformat.v4.new_code_cell(code, metadata={"solution": True})
            out += [solution, nbformat.v4.new_code_cell(NONSENSE.format(check=name))]
    notebook.cells = out
    return notebook


@pytest.mark.slow
@each
@pytest.mark.filterwarnings("default")
def test_runs_without_a_run_made_before(path, tmp_path):
    from nbclient import NotebookClient

    shutil.copytree(ROOT / "data/example", tmp_path / "data/example")
    (tmp_path / "notebooks").mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"} | {
        "OMP_NUM_THREADS": "1",
        "NUMBA_NUM_THREADS": "1",
    }
    notebook = with_solutions(read(path))
    client = NotebookClient(
        notebook,
        timeout=90,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path / "notebooks")}},
    )
    start = time.monotonic()
    client.execute(env=environment)
    assert time.monotonic() - start < 120
    outputs = [
        output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    ]
    assert not [o for o in outputs if o.output_type == "error"]
    assert not [o.text for o in outputs if o.output_type == "stream" and o.name == "stderr"]
    state = json.dumps(notebook.metadata.get("widgets", {}))
    assert '"output_type": "error"' not in state
    assert "role='alert'" not in state
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 3, "figures must be shown"
    for cell in notebook.cells:
        if cell.metadata.get("solution"):
            assert "right" in "".join(o.get("text", "") for o in cell.outputs), cell.source

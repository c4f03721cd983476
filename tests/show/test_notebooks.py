"""Notebooks: their form, their links and what they open with; and, slow, that each runs."""

import json
import os
import re
import shutil
import time
from pathlib import Path

import matplotlib as mpl
import nbformat
import pytest
import torch

mpl.use("Agg")

from gdviz.core.files import UserError, load_json, save_json
from gdviz.show.bundled import Bundled, open_bundled
from gdviz.show.notebook import check, find_run, setup

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


def test_setup_outside_the_project_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="not inside the gdviz project"):
        setup()


def test_the_newest_finished_run_comes_before_the_bundled_one(tmp_path):
    shutil.copytree(ROOT / "data/example", tmp_path / "data/example")
    assert isinstance(find_run(tmp_path), Bundled)
    config = load_json(ROOT / "data/example/config.json")
    profile = config["profile"]
    fewer = config | {"profile": profile | {"methods": ["labels"]}}
    teachers = profile["teachers"] | {"tasks": ["order"], "strides": [2]}
    alone = config | {"profile": profile | {"teachers": teachers}}
    runs = {"old": config, "new": config, "unfinished": config, "fewer": fewer, "alone": alone}
    runs["other"] = config | {"version": -1}
    for age, (name, of) in enumerate(runs.items()):
        folder = tmp_path / "runs" / name
        save_json(folder / "config.json", of)
        save_json(folder / "source.json", {"data": None, "cache": "data"})
        if name != "unfinished":
            save_json(folder / "summary.json", {})
            os.utime(folder / "summary.json", (1e9 + age, 1e9 + age))
    assert find_run(tmp_path).folder.name == "new"


def test_a_session_opens_the_run_it_looks_at(monkeypatch):
    monkeypatch.chdir(ROOT / "notebooks")
    find = "gdviz.show.notebook.find_run"
    monkeypatch.setattr(find, lambda root: open_bundled(root / "data/example"))
    settings = dict(mpl.rcParams)
    session = setup(seed=3)
    mpl.rcParams.update(settings)
    assert torch.initial_seed() == session.seed == 3
    assert session.root == ROOT
    first = session.run.profile.teachers.tasks[0]
    assert session.history("teachers", first)[0]["epoch"] == 0
    assert {"ce", "loss"} <= session.history("students", "both-graphs")[-1].keys()
    assert session.outputs("both-graphs")["features"].dtype == torch.float32
    assert len(session.outputs("labels")["logits"]) == len(session.run.videos().labels)


def test_check_tells_right_from_wrong_from_not_yet(capsys):
    check(..., lambda x: x == 1, "one")
    check(1, lambda x: x == 1, "one")
    assert capsys.readouterr().out.split("\n")[:2] == ["not answered yet", "right"]
    with pytest.raises(AssertionError, match="one"):
        check(2, lambda x: x == 1, "one")


NONSENSE = """
try:
    {check}(float("nan"))
except (AssertionError, TypeError, ValueError):
    pass
else:
    raise AssertionError("{check} takes anything")
"""


def with_solutions(notebook):
    """Return it as a reader leaves it: solutions pasted in and run, checks tried on nonsense."""
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
    environment = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}
    environment |= {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    notebook = with_solutions(read(path))
    where = {"metadata": {"path": str(tmp_path / "notebooks")}}
    start = time.monotonic()
    NotebookClient(notebook, timeout=90, kernel_name="python3", resources=where).execute(
        env=environment
    )
    assert time.monotonic() - start < 120
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    assert not [o.text for o in outputs if o.output_type == "stream" and o.name == "stderr"]
    state = json.dumps(notebook.metadata.get("widgets", {}))
    assert '"output_type": "error"' not in state
    assert "role='alert'" not in state
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 3, "figures must be shown"
    for cell in code:
        if cell.metadata.get("solution"):
            assert "right" in "".join(o.get("text", "") for o in cell.outputs), cell.source

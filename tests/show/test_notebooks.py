"""Notebooks: their form, their links, checks and answers; and, slow, that each runs on any run."""

import csv
import importlib.util
import json
import math
import os
import re
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import nbformat
import pytest
import torch
from conftest import TINY

mpl.use("Agg")

from gdviz.config import METHODS
from gdviz.core.files import UserError, load_json, save_json
from gdviz.data.motion import encode, render
from gdviz.experiment.folder import Run
from gdviz.experiment.steps import execute
from gdviz.show import exercises
from gdviz.show.bundled import Bundled, open_bundled
from gdviz.show.notebook import find_run, reveal, setup

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
    folded = r"<details><summary>Solution</summary>.*?```python\n(.*?)```.*?</details>"
    return re.findall(folded, text, re.DOTALL)


def cost(path):
    """Minutes and gigabytes that the first cell declares."""
    minutes, memory = re.search(
        r"\*\*Cost\.\*\* CPU: at most ([\d.]+) minutes? and ([\d.]+) GB of memory, on one thread",
        prose(path),
    ).groups()
    return float(minutes), float(memory)


def test_there_are_ten_in_order():
    assert [name[:2] for name in NAMES] == [f"{i:02}" for i in range(10)]


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
    assert "GPU" in first.source
    minutes, memory = cost(path)
    assert minutes <= 1.5 and memory <= 2.5
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
def test_every_prediction_is_answered_below_it(path):
    waiting, asked = False, 0
    for cell in read(path).cells:
        code = cell.cell_type == "code"
        if "reveal(" in cell.source if code else "<summary>Answer</summary>" in cell.source:
            assert waiting, f"{cell.id}: answers nothing"
            waiting = False
        if not code and "**Predict.**" in cell.source:
            assert not waiting and cell.source.count("**Predict.**") == 1, cell.id
            waiting, asked = True, asked + 1
    assert asked >= 4 and not waiting


@pytest.mark.parametrize("number", ["02", "03", "04", "05", "09"])
def test_boxes_are_open(number):
    (path,) = (path for path in NOTEBOOKS if path.stem.startswith(number))
    code = "\n".join(cell.source for cell in cells(path, "code"))
    assert code.count("the package's") >= 1, "written out, and asserted equal to the package's own"
    assert "**Formula" in prose(path) and "**Shapes.**" in prose(path)


@each
def test_exercises_have_a_difficulty_minutes_a_hint_and_then_a_folded_solution(path):
    titles = re.findall(
        r"^\*\*\d · .+?\*\* \((easy|medium|hard), \d+ minutes\)", prose(path), re.MULTILINE
    )
    asked = [cell for cell in cells(path, "code") if "answer = ..." in cell.source]
    text = prose(path)
    assert 2 <= len(titles) <= 3
    assert len(asked) == len(titles) == len(solutions(text))
    assert re.findall(r"<summary>(Hint|Solution)", text) == ["Hint", "Solution"] * len(titles)
    for question, solution in zip(asked, solutions(text), strict=True):
        assert question.metadata["tags"] == ["raises-exception"], "run all goes on without it"
        assert call_in(question.source) == call_in(solution)


def call_in(code):
    """The call of a check in an exercise."""
    (call,) = re.findall(r"^exercises\.check_\w+\(answer.*\)$", code, re.MULTILINE)
    return call


# Of each check: an answer that a reader may well give and that is wrong, and one of another kind.
WRONG = {
    "check_effective_number": ("-(w * w.log2()).sum()", "'two'"),
    "check_gap": ("answer / 100", "'5 points'"),
    "check_span": ("lambda length, stride: length * stride", "8"),
    "check_flip": ("{'left', 'right'}", "['left', 'right']"),
    "check_reversal": ("{'left', 'right', 'up', 'down'}", "'all'"),
    "check_folds": ("lambda labels, k: torch.arange(len(labels)) % k", "3"),
    "check_winner": ("3", "0.5"),
    "check_zero_one": ("lambda p, q: (p - q).abs().sum()", "0.5"),
    "check_closed_form": ("lambda c, prior, eta: torch.softmax(prior + c / eta, -1)", "None"),
    "check_half": ("answer * 1.5", "None"),
    "check_size": ("16", "'512'"),
    "check_mmd": ("lambda kxx, kyy, kxy: (kxx + kyy - 2 * kxy).mean()", "0.1"),
    "check_linear": ("answer ** 0.5", "means"),
    "check_ramp": ("4", "'third'"),
    "check_shuffled": (
        "(bank.probs()[known].mean(1).argmax(1) == bank.labels[known]).float().mean()",
        "known",
    ),
    "check_flops": ("answer // 2", "answer + 0.5"),
    "check_longer": ("4.0", "longer"),
    "check_group": ("lambda name: name.split('_')[0]", "'kitchen'"),
    "check_chance": ("0.5", "truth"),
    "check_draws": ("lambda level, m: math.ceil(math.log2(m / level))", "10"),
    "check_holm": ("lambda p: [min(1, len(p) * x) for x in p]", "[0.03]"),
    "check_closed": ("means['graphs'] / means['graphs-truth']", "audit"),
    "check_abroad": ("1 - answer", "routed"),
}
TRIED = """
reasons = "in the place of the dots", "wanted is a", "not right"
for given, why in zip((..., {other}, {wrong}), reasons):
    try:
        {call}
    except exercises.NotYet as told:
        assert why in str(told), (why, str(told))
    else:
        raise SystemError("passed: " + why)
"""


def trial(code):
    """Code to run after a solution: its check is given nothing, another kind, a wrong answer."""
    call = call_in(code)
    wrong, other = WRONG[call.split(".")[1].split("(")[0]]
    return TRIED.format(call=call.replace("(answer", "(given"), wrong=wrong, other=other)


def test_every_check_is_used_once_and_tried_with_wrong_answers():
    used = [call_in(code) for path in NOTEBOOKS for code in solutions(prose(path))]
    names = [call.split(".")[1].split("(")[0] for call in used]
    made = [name for name in vars(exercises) if name.startswith("check_")]
    assert sorted(names) == sorted(made) == sorted(WRONG)


ALONE = [c for path in NOTEBOOKS for c in solutions(prose(path)) if "(answer)\n" in c]
ALONE = [code for code in ALONE if "unseen" not in code]


@pytest.mark.parametrize("code", ALONE, ids=[call_in(code)[10:-8] for code in ALONE])
def test_a_check_takes_the_solution_alone(code, capsys):
    names = {"exercises": exercises, "torch": torch, "math": math}
    exec(code, names)
    assert capsys.readouterr().out == "right\n"
    exec(trial(code), names)
    nan = float("nan")
    with pytest.raises(exercises.NotYet):
        vars(exercises)[call_in(code).split(".")[1].split("(")[0]](nan)


def test_an_answer_that_raises_is_told_in_one_line():
    with pytest.raises(exercises.NotYet, match="the answer raised TypeError") as told:
        exercises.check_span(lambda: 0)
    assert told.value._render_traceback_() == [f"not yet: {told.value}"]


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


def test_the_newest_finished_run_comes_before_the_bundled_one(tmp_path, capsys):
    shutil.copytree(ROOT / "data/example", tmp_path / "data/example")
    assert isinstance(find_run(tmp_path), Bundled)
    config = load_json(ROOT / "data/example/config.json")
    profile = config["profile"]
    fewer = config | {"profile": profile | {"methods": ["labels"]}}
    teachers = profile["teachers"] | {"tasks": ["order"], "strides": [2]}
    alone = config | {"profile": profile | {"teachers": teachers}}
    runs = {"old": config, "new": config, "unfinished": config, "fewer": fewer, "alone": alone}
    runs |= {"several": config, "other": config | {"version": -1}}
    for age, (name, of) in enumerate(runs.items()):
        folder = tmp_path / "runs" / name
        save_json(folder / "config.json", of)
        save_json(folder / "source.json", {"data": None, "cache": "data"})
        if name != "unfinished":
            save_json(folder / "summary.json", {})
            os.utime(folder / "summary.json", (1e9 + age, 1e9 + age))
    for name in runs:
        result = {"accuracy": 0.5} | ({"mAP": 0.5} if name == "several" else {})
        save_json(tmp_path / "runs" / name / "seed0/students/labels/result.json", result)
    assert find_run(tmp_path).folder.name == "new"
    said = capsys.readouterr().out
    assert "runs/other is passed over: was made by another version" in said
    for words in ("runs/fewer is passed over: it has no student of kd", "one teacher", "several l"):
        assert words in said
    shutil.copytree(tmp_path / "runs/new", tmp_path / "runs/demo/main/101")  # of a plan
    (tmp_path / "runs/demo/main/101/summary.json").touch()
    assert find_run(tmp_path).folder == tmp_path / "runs/demo/main/101"


@pytest.mark.parametrize("threads", ["", "4,2", "many", " 2 "])
def test_any_number_of_threads_is_taken(threads, monkeypatch):
    monkeypatch.chdir(ROOT / "notebooks")
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    before, settings = torch.get_num_threads(), dict(mpl.rcParams)
    setup()
    known = {"4,2": 4, " 2 ": 2}
    assert torch.get_num_threads() == known.get(threads, min(4, os.cpu_count() or 1))
    torch.set_num_threads(before)
    mpl.rcParams.update(settings)


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


def test_answers_are_folded(capsys, monkeypatch):
    shown = []
    monkeypatch.setattr("gdviz.show.notebook.display", lambda of: shown.append(of.data))
    reveal("as computed")
    assert shown == ["<details><summary>Answer</summary>\n\nas computed\n\n</details>"]


def load_course():
    spec = importlib.util.spec_from_file_location("course", ROOT / "tools/course.py")
    tool = importlib.util.module_from_spec(spec)
    sys.modules["course"] = tool  # its dataclass looks there
    spec.loader.exec_module(tool)
    return tool


def test_the_course_leaves_solutions_to_the_instructor(tmp_path):
    tool = load_course()
    tool.make_course(tmp_path)
    page = (tmp_path / "instructor.md").read_text()
    for path in NOTEBOOKS:
        copy, own = read(tmp_path / path.name), read(path)
        text = prose(tmp_path / path.name)
        assert "Solution" not in text and not solutions(text)
        assert text.count("<summary>Hint") == len(solutions(prose(path)))
        assert cells(tmp_path / path.name, "code") == cells(path, "code")
        assert len(copy.cells) == len(own.cells)
        assert all(code in page for code in solutions(prose(path)))
    assert page.count("**Pitfall.**") == len(WRONG)
    assert page.count("**Minutes.**") == len(NOTEBOOKS)


def test_an_exercise_that_takes_two_lines_is_whole():
    text = """**1 · Draw** (easy, 3 minutes). How many
fit?

<details><summary>Solution</summary>\n\nthree\n\n*Pitfall:* two.\n</details>"""
    cell = nbformat.v4.new_markdown_cell(text)
    (found,) = load_course().exercises(nbformat.v4.new_notebook(cells=[cell]))
    assert found.question == "How many\nfit?" and found.pitfall == "two."


def with_solutions(notebook):
    """Return it as a reader leaves it: solutions pasted in and run, checks tried on wrong ones."""
    out = []
    for cell in notebook.cells:
        out.append(cell)
        for code in solutions(cell.source) if cell.cell_type == "markdown" else ():
            solution = nbformat.v4.new_code_cell(code, metadata={"solution": True})
            out += [solution, nbformat.v4.new_code_cell(trial(code))]
    peak = "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    notebook.cells = [*out, nbformat.v4.new_code_cell(peak)]
    return notebook


def play(notebook, root):
    """Run it in a project that holds what is bundled; return its code cells and the seconds."""
    from nbclient import NotebookClient

    for name in ("data/example", "docs/results"):
        shutil.copytree(ROOT / name, root / name)
    (root / "notebooks").mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}
    environment |= {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    where, start = {"metadata": {"path": str(root / "notebooks")}}, time.monotonic()
    NotebookClient(notebook, timeout=270, kernel_name="python3", resources=where).execute(
        env=environment
    )
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in code:
        for output in cell.outputs:
            unsolved = "raises-exception" in cell.metadata.get("tags", ())
            assert output.output_type != "error" or (unsolved and output.ename == "NotYet")
            assert output.get("name") != "stderr", output.text
        if cell.metadata.get("solution"):
            assert "right" in "".join(o.get("text", "") for o in cell.outputs), cell.source
    state = json.dumps(notebook.metadata.get("widgets", {}))
    assert '"output_type": "error"' not in state
    assert "role='alert'" not in state
    return code, time.monotonic() - start


@pytest.mark.slow
@each
@pytest.mark.filterwarnings("default")
def test_runs_without_a_run_made_before_at_the_cost_it_declares(path, tmp_path):
    code, seconds = play(with_solutions(read(path)), tmp_path)
    outputs = [output for cell in code for output in cell.outputs]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 3, "figures must be shown"
    minutes, memory = cost(path)
    assert seconds < 3 * 60 * minutes  # machines differ
    peak = float(code[-1].outputs[0].text) / (1e9 if os.uname().sysname == "Darwin" else 1e6)
    assert peak < memory


@pytest.fixture(scope="module")
def other_run(tmp_path_factory) -> Path:
    """A run on other data: two classes, chance 55 %, eleven test clips, two teachers, one seed."""
    root = tmp_path_factory.mktemp("other")
    rows = [("path", "label", "group", "split")]
    for label, name in enumerate(("walk", "run")):
        for split, count in (("train", 4), ("unlabelled", 5), ("test", 6 - label)):
            for i in range(count):
                file = f"{name}-{split}-{i}.mp4"
                encode(render(label, len(rows), size=32, frames=12), root / file)
                rows.append((file, name * (split != "unlabelled"), file, split))
    with open(root / "list.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    run = Run(replace(TINY, methods=METHODS), root / "run", data=root / "list.csv", cache=root)
    execute(run, workers=1)
    return run.folder


LOOKING = [path for path in NOTEBOOKS if "is not looked at" not in read(path).cells[0].source]


@pytest.mark.slow
@pytest.mark.parametrize("path", LOOKING, ids=[path.stem for path in LOOKING])
@pytest.mark.filterwarnings("default")
def test_holds_on_a_run_on_other_data(path, other_run, tmp_path):
    shutil.copytree(other_run, tmp_path / "runs/other")
    code, _ = play(read(path), tmp_path)
    assert "`runs/other`" in json.dumps(code[0].outputs)

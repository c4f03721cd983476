"""The project keeps its own promises: dependencies, rooms, docstrings, types, style."""

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pandas as pd
import pytest
from conftest import REPO

from gdviz.experiment.report import open_results, report, wide
from gdviz.experiment.statistics import compare, summarise
from gdviz.experiment.tables import gains, spread

PACKAGE = REPO / "gdviz"
MODULES = sorted(PACKAGE.rglob("*.py"))
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Names that conda-forge spells in its own way; "-base" leaves out optional graphical parts.
CONDA = {"torch": "pytorch", "matplotlib": "matplotlib-base", "seaborn": "seaborn-base"}
IMPORTED_AS = {
    "scikit-learn": "sklearn",
    "umap-learn": "umap",
    "decord2": "decord",
    "pillow": "PIL",
}
ROOMS = ("config", "core", "graphs", "data", "teachers", "student", "experiment", "show")


def test_a_room_imports_only_rooms_above_it():
    for file in MODULES:
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for name in imports(file) if room in ROOMS else ():
            if name.startswith("gdviz."):
                assert ROOMS.index(name.split(".")[1]) <= ROOMS.index(room), (file, name)


def imports(file: Path) -> set[str]:
    """Modules named in import statements, those within functions, too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found.add(node.module)
    return found


def test_what_the_docs_make_has_a_rule():
    rules = set(re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text(), re.MULTILINE))
    for page in [REPO / "README.md", *(REPO / "docs").glob("*.md"), REPO / "benchmarks/README.md"]:
        named = re.findall(r"(?:`|^)make ([a-z-]+)", page.read_text(), re.MULTILINE)
        assert set(named) <= rules, page
    (phony,) = re.findall(r"^\.PHONY: (.*)", (REPO / "Makefile").read_text(), re.MULTILINE)
    assert set(phony.split()) == rules


def test_graphs_and_losses_are_pure_tensor_code():
    for file in [*(PACKAGE / "graphs").glob("*.py"), PACKAGE / "student/losses.py"]:
        ours = {name for name in imports(file) if name.startswith("gdviz")}
        assert all(name.startswith("gdviz.graphs") for name in ours), file
        assert not imports(file) & {"pathlib", "os", "av", "decord", "PIL", "tqdm"}, file
        assert not re.search(r"\bopen\(|\bprint\(", file.read_text()), file


def test_own_names_are_resolved_in_one_place():
    for file in MODULES:
        assert file.name == "names.py" or not re.search(r'":" (not )?in ', file.read_text()), file


def test_graphs_alone_need_torch_numpy_and_jaxtyping():
    code = "import sys, torch; known = set(sys.modules); import gdviz.graphs, gdviz.student.losses;"
    code += "print(*{m.partition('.')[0] for m in set(sys.modules) - known})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    light = {"gdviz", "jaxtyping", "numpy", "torch", "wadler_lindig", "typing_extensions"}
    assert set(done.stdout.split()) - set(sys.stdlib_module_names) <= light
    names = [re.match(r"[\w-]+", line)[0] for line in PROJECT["dependencies"]]
    assert names == ["torch", "numpy", "jaxtyping"]


def test_help_and_the_package_itself_import_nothing_heavy():
    code = "import sys, gdviz, gdviz.cli; sys.argv = ['gdviz', '--help']; gdviz.cli.main();"
    code += "assert not {'torch', 'numpy', 'tyro'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_both_lists_of_dependencies_are_equal():
    wanted = {*PROJECT["dependencies"], *EXTRAS["video"], *EXTRAS["figures"], *EXTRAS["notebooks"]}
    wanted = {line for line in wanted if not line.startswith("gdviz[")}
    wheels_only = {line for line in wanted if line.startswith("decord")}
    conda = {f"python{PROJECT['requires-python']}"}
    for line in wanted - wheels_only:
        name, bound = re.fullmatch(r"([\w-]+)(>=[\d.]+)", line).groups()
        conda.add(CONDA.get(name, name) + bound)
    text = (REPO / "environment.yml").read_text()
    channels = re.findall(r"^channels:\n((?:  - .+\n)+)", text, re.M)[0]
    assert channels.split() == ["-", "conda-forge", "-", "nodefaults"]
    listed = re.findall(r"^  - ([\w.>=-]+)$", text.partition("\ndependencies:")[2], re.M)
    assert set(listed) - {"pip"} == conda
    by_pip = set(re.findall(r"^      - (.+)$", text, re.M))
    assert by_pip == wheels_only | {"-e ."}


def test_declared_dependencies_are_those_imported():
    extras = ("video", "figures", "notebooks", "cluster", "tensorboard", "export")
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in EXTRAS[extra])]
    names = {re.match(r"[\w-]+", line)[0] for line in lines} - {"gdviz"}
    declared = {IMPORTED_AS.get(name, name) for name in names}
    imported = {name.partition(".")[0] for file in MODULES for name in imports(file)}
    imported -= {*sys.stdlib_module_names, "gdviz"}
    with_others = {"IPython", "traitlets"}  # come with ipykernel
    assert imported - declared <= with_others, "imported, not declared"
    for_notebooks = {"jupyterlab", "ipywidgets", "nbconvert", "ipykernel", "latex2mathml"}
    assert declared - imported <= {*for_notebooks, "tensorboard"}, "declared, not imported"


@pytest.mark.parametrize("file", MODULES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_public_things_have_docstrings(file):
    tree = ast.parse(file.read_text())
    assert not tree.body or ast.get_docstring(tree)
    for node in tree.body:
        public = isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_"
        if public and not file.name.startswith("_"):
            assert ast.get_docstring(node), f"{file.name}: {node.name}"


def test_the_face_of_the_package():
    import gdviz

    assert (PACKAGE / "py.typed").exists()
    assert gdviz.__version__ == PROJECT["version"]
    assert all(getattr(gdviz, name) is not None for name in gdviz.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = gdviz.nothing


@pytest.mark.skipif(importlib.util.find_spec("ruff") is None, reason="needs ruff")
@pytest.mark.parametrize("command", [("check",), ("format", "--check")], ids=" ".join)
def test_ruff_is_content(command):
    paths = ("gdviz", "tests", "tools", "benchmarks")
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, *paths], cwd=REPO, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_numbers_of_the_docs_are_those_of_the_results():
    results = pd.read_csv(REPO / "data/example/results.csv")
    text = (REPO / "docs/results.md").read_text()
    for (kind, name), rows in results.groupby(["kind", "name"]):
        assert f"| {kind}: `{name}` | {spread(rows['accuracy'])} |" in text
    gained = gains(results)
    for name in gained:
        assert f"`{name}` | {spread(results[results['name'] == name]['accuracy'])} | " in text
        assert f" | {spread(gained[name])} |\n" in text


@pytest.mark.parametrize(
    "name", ["baselines", "unnamed", "unnamed_again", "ut_interaction", "family"]
)
def test_other_tables_are_those_of_their_results_files(name, tmp_path):
    shutil.copytree(REPO / "docs/results" / name, tmp_path / "table")
    page = (REPO / "docs/results.md").read_text()
    lines = report(tmp_path / "table").split("## By domain")[0].splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) > 12 and not [line for line in rows if line not in page]


def test_int8_agrees_as_often_as_its_file_says():
    page = (REPO / "docs/results.md").read_text()
    by = pd.read_csv(REPO / "docs/results/family/int8.csv").groupby("student")["agreement"]
    for of in by.agg(["mean", "min", "max", "size"]).itertuples():
        assert of.size == 10
        said = rf"`{of.Index}` [a-z0-9 ]*on {of.mean:.1f} % [a-z ]*\({of.min:.1f} to {of.max:.1f} %"
        assert re.search(said, page), said


def test_what_was_tried_is_what_its_files_say():
    folder, page = REPO / "docs/results/development", (REPO / "docs/tried.md").read_text()
    right = pd.read_csv(folder / "routing.csv").pivot(index="rule", columns="draw", values="right")
    room = right.loc["the truth: who is at home"] - right.loc["uniform"]
    for rule, row in right.iterrows():
        closed = 100 * (row - right.loc["uniform"]) / room
        text = f"| {rule} | {row.mean():.1f} | {closed.mean():.0f} ({closed.min():.0f}) |\n"
        assert text in page
    tried = pd.read_csv(folder / "representation.csv").set_index(["draw", "seed"])
    groups = {name: rows.drop(columns="variant") for name, rows in tried.groupby("variant")}
    base = groups.pop("logits graph")
    for name, rows in groups.items():
        gains = 100 * (rows - base.loc[rows.index])
        draws, cells = gains.index.unique("draw"), [f"{x:+.1f}" for x in gains.mean()]
        assert f"| {name} | {len(gains)} | {len(draws)} | {' | '.join(cells)} |\n" in page


def test_the_headline_table_is_that_of_its_results_file(tmp_path):
    shutil.copytree(REPO / "docs/results/specialists", tmp_path / "table")
    page = (REPO / "docs/results.md").read_text()
    lines = [line for line in report(tmp_path / "table").splitlines() if line.startswith("|")]
    assert len(lines) > 40 and not [line for line in lines if line not in page]
    results, contrasts, _ = open_results(tmp_path / "table")
    students = wide(results, "accuracy")
    ours, readme = summarise(students).loc["both-graphs"], (REPO / "README.md").read_text()
    assert f"right on {ours['mean']:.1f} % of test clips" in readme
    assert f"(95 % interval {ours['low']:.1f} to {ours['high']:.1f})" in readme
    again = wide(pd.read_csv(REPO / "docs/results/unnamed_again/results.csv"), "unnamed probe")
    rows = [compare(students, contrasts[:3]), compare(again, [("both-graphs", "logits-graph")])]
    for row in pd.concat(rows).to_dict("records"):
        interval = f"{row['low']:+.1f} to {row['high']:+.1f}"
        assert f"{row['difference']:+.1f} points ({interval})" in readme

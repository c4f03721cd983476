"""The project keeps its own promises: one set of dependencies, small files, docstrings, data that flows one way."""

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import REPO

PACKAGE = REPO / "gdviz"
MODULES = {
    path.relative_to(REPO).with_suffix("").as_posix().replace("/", "."): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# Names that conda-forge spells in its own way; "-base" leaves out optional graphical parts.
CONDA = {"torch": "pytorch", "matplotlib": "matplotlib-base", "seaborn": "seaborn-base"}
# Low to high: a module imports from its own layer and lower ones only.
LAYERS = (
    ("artefacts",),
    ("parallel",),
    ("config", "ranks"),
    ("graphs", "models", "losses"),
    ("data", "tap"),
    ("pretext", "training", "readout"),
    ("teachers", "evaluate"),
    ("knowledge",),
    ("edges",),
    ("distill",),
    ("checks",),
    ("run",),
    ("plots", "example"),
    ("report", "widgets"),
    ("cli", "notebook"),
)


def test_both_lists_of_dependencies_are_equal():
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    wanted = {
        *project["dependencies"],
        *project["optional-dependencies"]["notebooks"],
        f"python{project['requires-python']}",
    }
    wheels_only = {line for line in wanted if line.startswith("decord")}
    conda = set()
    for line in wanted - wheels_only:
        name, bound = re.fullmatch(r"([\w-]+)(>=[\d.]+)", line).groups()
        conda.add(CONDA.get(name, name) + bound)
    text = (REPO / "environment.yml").read_text()
    assert re.findall(r"^channels:\n((?:  - .+\n)+)", text, re.M)[0].split() == [
        "-",
        "conda-forge",
        "-",
        "nodefaults",
    ]
    assert (
        set(re.findall(r"^  - ([\w.>=-]+)$", text.partition("\ndependencies:")[2], re.M)) - {"pip"}
        == conda
    )
    by_pip = set(re.findall(r"^      - (.+)$", text, re.M))
    assert by_pip - {"-e ."} == wheels_only
    assert "-e ." in by_pip


def test_declared_dependencies_are_those_imported():
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    lines = [
        *project["dependencies"],
        *(
            line
            for extra in ("notebooks", "cluster", "shards")
            for line in project["optional-dependencies"][extra]
        ),
    ]
    names = {"scikit-learn": "sklearn", "umap-learn": "umap", "decord2": "decord", "pillow": "PIL"}
    declared = {names.get(n, n) for n in (re.match(r"[\w-]+", line)[0] for line in lines)}
    imported = (
        {name.partition(".")[0] for path in MODULES.values() for name in imports(path)}
        - set(sys.stdlib_module_names)
        - {"gdviz"}
    )
    assert imported - declared <= {"IPython"}, (
        "imported, not declared"
    )  # IPython comes with ipykernel
    at_hand = {
        "jupyterlab",
        "nbconvert",
        "ipykernel",
        "ipywidgets",
    }  # for those who work in the notebooks
    assert declared - imported <= at_hand, "declared, not imported"


@pytest.mark.parametrize("path", MODULES.values(), ids=MODULES)
def test_files_are_small_and_documented(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 350
    tree = ast.parse(text)
    if text and path.name != "__init__.py":
        assert ast.get_docstring(tree)
    for node in tree.body:
        public = (
            isinstance(node, ast.FunctionDef | ast.ClassDef)
            and not node.name.startswith("_")
            and not path.name.startswith("_")
        )
        if public and not (
            isinstance(node, ast.FunctionDef) and len(node.body) <= 4
        ):  # a few plain lines say it themselves
            assert ast.get_docstring(node), f"{path.name}: {node.name}"


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def layer(module: str) -> int:
    part = module.split(".")[1]
    return next(i for i, names in enumerate(LAYERS) if part in names)


@pytest.mark.parametrize("module", [m for m in MODULES if m != "gdviz.__init__"])
def test_data_flows_one_way(module):
    for name in imports(MODULES[module]):
        if f"{name}" in MODULES or f"{name}.__init__" in MODULES:
            if name == "gdviz":
                continue
            assert layer(name) <= layer(module), f"{module} imports {name}, which is above it"
            same = name.split(".")[1] == module.split(".")[1]
            assert same or layer(name) < layer(module), f"{module} imports its sibling {name}"


def test_graphs_and_losses_are_pure_tensor_code():
    for module, path in MODULES.items():
        if module.startswith("gdviz.graphs") or module == "gdviz.student.losses":
            inside = {
                name for name in imports(path) if name.startswith("gdviz.") and name in MODULES
            }
            assert all(name.startswith("gdviz.graphs") for name in inside), module
            assert not imports(path) & {"pathlib", "os", "av", "decord", "PIL", "tqdm"}, module
            assert not re.search(r"\bopen\(|print\(|cuda", path.read_text()), module


def test_typed_and_importable():
    assert (PACKAGE / "py.typed").exists()
    import gdviz

    assert (
        gdviz.__version__
        == tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["version"]
    )
    assert all(hasattr(gdviz, name) for name in gdviz.__all__)


@pytest.mark.skipif(importlib.util.find_spec("ruff") is None, reason="needs ruff")
@pytest.mark.parametrize("command", [("check",), ("format", "--check")], ids=" ".join)
def test_ruff_is_content(command):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "gdviz", "tests"],
        cwd=REPO,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]

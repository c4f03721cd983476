"""Names of ours, of a user's, and of nothing."""

import sys

import pytest
from hypothesis import given
from hypothesis.strategies import text

from gdviz.core.files import UserError
from gdviz.core.names import folder_name, resolve

KNOWN = {"order": 1, "pace": 2, "registration": 3}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The module ``own_things`` in the working folder."""
    (tmp_path / "own_things.py").write_text("def rotation(): return 4\n")
    (tmp_path / "broken_things.py").write_text("import not_installed\n")
    (tmp_path / "misspelt_things.py").write_text("def f(:\n")
    (tmp_path / "failing_things.py").write_text("raise RuntimeError('first\\nsecond')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("own_things", None)


def test_a_name_is_found_here_or_in_the_working_folder(own):
    assert resolve("pace", KNOWN, "task") == 2
    assert resolve("own_things:rotation", KNOWN, "task")() == 4
    assert resolve("math:pi", KNOWN, "task") == pytest.approx(3.14159, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ordr", r"unknown task 'ordr' \(near: order\); choose from order, .*or MODULE:NAME"),
        ("xyz", r"unknown task 'xyz'; choose from order, pace, registration"),
        ("own_things:rotate", r"own_things has no 'rotate' \(near: rotation\)"),
        ("own_thing:rotation", "task 'own_thing:rotation': .*No module named 'own_thing'"),
        ("broken_things:x", "No module named 'not_installed'"),
        ("misspelt_things:f", "SyntaxError: .*misspelt_things.py, line 1"),
        ("failing_things:f", "task 'failing_things:f': RuntimeError: first$"),
        (":x", "task ':x': "),
        ("math:", "math has no ''"),
        (".math:pi", "task '.math:pi': "),
    ],
)
def test_a_name_of_nothing_is_told_with_near_ones(own, name, message):
    with pytest.raises(UserError, match=message) as caught:
        resolve(name, KNOWN, "task")
    assert "\n" not in str(caught.value)


@given(text())
def test_every_name_is_a_folder_below(name):
    assert not set(folder_name(name)) & set(':/\\*?"<>|\0\n ')
    assert folder_name("my_module:Net2") == "my_module.Net2" and folder_name("kd-best") == "kd-best"

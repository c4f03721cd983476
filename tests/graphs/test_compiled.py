"""Both graphs' losses compile whole: values and gradients are those of eager mode."""

import subprocess
import sys
from pathlib import Path

import pytest

CASES = ("logits", "logits-known", "kernel-mmd", "kernel-cka", "kernel-coral", "sketch-mmd")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_compiles_without_graph_breaks(case):
    """In a process of its own: the checks of shapes in these tests cannot be traced."""
    here = Path(__file__).parent
    command = [sys.executable, here / "compiled.py", case]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]

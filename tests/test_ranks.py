"""Two processes train what one trains; and a run that is stopped, or loses a process, ends as if nothing had been."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import REPO, TINY
from test_run import assert_same_run, start

from gdviz import ranks
from gdviz.run import Run

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# Ratios of means over the batch, not means: each process takes those of its part. Only prediction descends one.
RATIOS = {"registration": ("r2",), "prediction": ("loss", "explained")}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict]:
    """What tests/ranks_job.py found, by number of processes and rank."""
    folder = tmp_path_factory.mktemp("ranks")
    for launch in ((sys.executable,), TORCHRUN):
        command = [*launch, str(REPO / "tests/ranks_job.py"), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=REPO, env=os.environ | {"PYTHONPATH": str(REPO)})
        assert done.returncode == 0, done.stderr[-3000:]
    return {file.stem: torch.load(file) for file in sorted(folder.iterdir())}


def numbers(tree: object, path: str = "") -> dict[str, torch.Tensor]:
    if isinstance(tree, dict | list):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {k: v for name, value in items for k, v in numbers(value, f"{path}/{name}").items()}
    return {path: torch.as_tensor(tree).double()}


def test_graph_losses_of_parts_are_those_of_the_batch(found):
    """Values, gradients of logits and features, and of the adapters."""
    for name, whole in found["1-0"]["losses"].items():
        for part in (found["2-0"], found["2-1"]):
            torch.testing.assert_close(part["losses"][name], whole, rtol=0, atol=1e-10, msg=name)
        assert whole.abs().max() > 1e-3, name


def test_two_processes_train_as_one(found):
    one, two, other = (numbers(found[name]["trainings"]) for name in ("1-0", "2-0", "2-1"))
    assert one.keys() == two.keys() and len(one) > 100
    for name, value in one.items():
        assert torch.equal(two[name], other[name]), name
        _, training, *_, key = name.split("/")
        tolerance = {"loss": 2e-3, "explained": 2e-3, "r2": 1.0}[key] if key in RATIOS.get(training, ()) else 1e-6
        torch.testing.assert_close(two[name], value, rtol=0, atol=tolerance, msg=f"{name}: {two[name]} {value}")


def test_one_process_changes_nothing():
    x, rng = torch.randn(3, 2, requires_grad=True), torch.Generator()
    assert ranks.gather(x) is x and ranks.deal(x).equal(x) and ranks.agreed("a") == "a"
    with ranks.dealt(rng):
        assert torch.equal(torch.rand(2, generator=rng.manual_seed(0)), torch.rand(2, generator=rng.manual_seed(0)))


def files(folder: Path, pattern: str) -> int:
    return len(list(folder.glob(f"seed0/{pattern}")))


@pytest.fixture(scope="module")
def calm(tmp_path_factory) -> dict[int, Run]:
    """Undisturbed runs of one process and of two ranks."""
    root = tmp_path_factory.mktemp("calm")
    runs = {1: Run(TINY, root / "one", cache=root / "data"), 2: Run(TINY, root / "two", cache=root / "data")}
    for count, run in runs.items():
        process = start(run, "--workers", "1", launch=TORCHRUN if count == 2 else (sys.executable,))
        text, _ = process.communicate(timeout=900)
        assert process.returncode == 0, text[-3000:]
    return runs


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
@pytest.mark.parametrize(("signum", "workers"), [(signal.SIGTERM, "1"), (signal.SIGINT, "1"), (signal.SIGTERM, "2")])
def test_a_run_that_is_asked_to_stop_says_so_and_goes_on(calm, tmp_path, signum, workers):
    run = Run(TINY, tmp_path / "run", cache=calm[1].cache)
    phases = {"teachers/*/pretrain.ckpt": 0, "edges-shuffled/result.json": 1}
    for pattern, wanted in phases.items():
        process = start(run, "--workers", workers)
        while files(run.folder, "edges-shuffled/result.json") < wanted or not (run.folder / "environment.json").exists():
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.02)
        time.sleep(2.0)  # in the middle of a training
        asked = time.monotonic()
        os.kill(process.pid, signum)
        text, _ = process.communicate(timeout=60)
        assert process.returncode == 128 + signum, text[-3000:]
        assert time.monotonic() - asked < 15
        assert "gdviz: stopped; the same command goes on from here" in text and "Traceback" not in text
        assert files(run.folder, "*/*/*.ckpt") > 0, pattern
    process = start(run, "--workers", workers)
    text, _ = process.communicate(timeout=900)
    assert process.returncode == 0, text[-3000:]
    assert_same_run(calm[1].folder, run.folder)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
def test_a_rank_that_is_killed_is_started_again(calm, tmp_path):
    run = Run(TINY, tmp_path / "run", cache=calm[1].cache)
    process, killed = start(run, launch=(*TORCHRUN, "--max-restarts", "3")), []
    phases = {"teachers/*/pretrain.ckpt": 1, "edges/result.json": 0}
    for (pattern, number), already in zip(phases.items(), (0, 1), strict=True):
        while not files(run.folder, pattern) or len(killed) < already:
            assert process.poll() is None, process.stdout.read()[-3000:]
            time.sleep(0.02)
        time.sleep(1.0)
        workers = sorted(psutil.Process(process.pid).children(), key=lambda p: int(p.environ()["RANK"]))
        workers[number].kill()
        killed.append(workers[number].pid)
    text, _ = process.communicate(timeout=900)
    assert process.returncode == 0, text[-3000:]
    assert_same_run(calm[2].folder, run.folder)

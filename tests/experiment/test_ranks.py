"""Whole runs by several processes or machines; stopped, or bereft of one, they end alike."""

import math
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import TINY
from runs import assert_same_run, start

from gdviz.core.cluster import Cluster
from gdviz.core.files import load_jsonl
from gdviz.experiment.folder import Run
from gdviz.experiment.steps import execute

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups"),
]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# No wait for edges, and TensorBoard's files tell that a training is under way.
FLAGS = ["--distillation.edges.refreshes", "3", "--methods", "labels", "both-graphs"]
FLAGS.append("--tensorboard")


def under_way(run: Run, kind: str, process: subprocess.Popen) -> None:
    """Wait for some epochs of a training."""
    deadline = time.monotonic() + 900
    while not any(
        file.stat().st_size > 1000 for file in run.folder.glob(f"seed0/{kind}/*/tensorboard/*")
    ):
        assert process.poll() is None, process.stdout.read()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def finish(process: subprocess.Popen) -> None:
    text, _ = process.communicate(timeout=900)
    assert process.returncode == 0, text[-3000:]


@pytest.fixture(scope="module")
def calm(tmp_path_factory) -> dict[int, Run]:
    """Undisturbed runs of one process and of two that train together."""
    root = tmp_path_factory.mktemp("calm")
    one, two = (Run(TINY, root / name, cache=root / "data") for name in ("one", "two"))
    finish(start(one, "--workers", "2", *FLAGS))
    finish(start(two, *FLAGS, launch=TORCHRUN))
    return {1: one, 2: two}


def test_every_training_of_two_processes_learns(calm):
    """As one does, though each process draws views of its own."""
    for file in calm[1].folder.glob("seed0/*/*/history.jsonl"):
        one = load_jsonl(file)
        two = load_jsonl(calm[2].folder / file.relative_to(calm[1].folder))
        assert len(one) == len(two) and one[0].keys() == two[0].keys()
        assert all(math.isfinite(row["loss"]) for row in two), file
        falls = [rows[0]["loss"] - rows[-1]["loss"] for rows in (one, two)]
        half = 0 if "repr" in one[0] else 0.5  # both graphs' teachers are others, so all may differ
        assert falls[0] > 0 and falls[1] > half * falls[0], file


@pytest.mark.parametrize(
    ("signum", "workers", "kind"),
    [
        (signal.SIGINT, 1, "students"),
        (signal.SIGTERM, 2, "teachers"),
        (signal.SIGTERM, "torchrun", "students"),
    ],
)
def test_a_run_that_is_asked_to_stop_saves_says_so_and_goes_on(
    calm, tmp_path, signum, workers, kind
):
    run = Run(TINY, tmp_path / "run", cache=calm[1].cache)
    together = workers == "torchrun"
    how = {"launch": TORCHRUN} if together else {}
    flags = FLAGS if together else [*FLAGS, "--workers", str(workers)]
    process = start(run, *flags, **how)
    under_way(run, kind, process)
    asked = time.monotonic()
    os.kill(process.pid, signum)
    text, _ = process.communicate(timeout=60)
    # torchrun has a code of its own
    assert process.returncode == (1 if together else 128 + signum), text[-3000:]
    assert time.monotonic() - asked < 20
    assert "gdviz: stopped; the same command goes on from here" in text
    assert together or "Traceback" not in text
    assert list(run.folder.glob(f"seed0/{kind}/*/*.ckpt"))
    finish(start(run, *flags, **how))
    assert_same_run(calm[2 if together else 1].folder, run.folder)


def test_a_process_that_is_killed_is_started_again(calm, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # see docs/scale.md
    run = Run(TINY, tmp_path / "run", cache=calm[2].cache)
    process = start(run, *FLAGS, launch=(*TORCHRUN, "--max-restarts", "3"))
    for kind, number in (("teachers", 1), ("students", 0)):
        under_way(run, kind, process)
        children = psutil.Process(process.pid).children()
        next(child for child in children if child.environ()["RANK"] == str(number)).kill()
    finish(process)
    assert_same_run(calm[2].folder, run.folder)


def test_a_run_on_two_machines_is_that_of_one(finished, tmp_path):
    dask, distributed = (pytest.importorskip(name) for name in ("dask", "distributed"))
    run = Run(TINY, tmp_path / "run", cache=tmp_path / "data")
    with (
        dask.config.set({"distributed.worker.daemon": False}),  # as --no-nanny
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None
        ) as machines,
    ):
        results = execute(run, workers=Cluster(machines.scheduler_address))
    assert results.equals(finished.results())
    assert_same_run(finished.folder, run.folder)

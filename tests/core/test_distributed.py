"""Two processes train what one trains; and a run that is stopped, or loses a process, ends as if nothing had been."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from conftest import REPO, TINY
from runs import assert_same_run, start

from gdviz.core import distributed as ranks
from gdviz.experiment.steps import Run

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict]:
    """What tests/ranks_job.py found, by number of processes and rank."""
    folder = tmp_path_factory.mktemp("ranks")
    for launch in ((sys.executable,), TORCHRUN):
        command = [*launch, str(REPO / "tests/ranks_job.py"), str(folder)]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=REPO,
            env=os.environ | {"PYTHONPATH": str(REPO)},
        )
        assert done.returncode == 0, done.stderr[-3000:]
    return {file.stem: torch.load(file) for file in sorted(folder.glob("*.pt"))}


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
        torch.testing.assert_close(
            two[name], value, rtol=0, atol=1e-6, msg=f"{name}: {two[name]} {value}"
        )


def test_one_process_changes_nothing():
    x, rng = torch.randn(3, 2, requires_grad=True), torch.Generator()
    assert ranks.gather(x) is x and ranks.deal(x).equal(x) and ranks.agreed("a") == "a"
    with ranks.dealt(rng):
        assert torch.equal(
            torch.rand(2, generator=rng.manual_seed(0)), torch.rand(2, generator=rng.manual_seed(0))
        )


# No wait for edges, and TensorBoard's files tell that a training is under way.
FLAGS = [
    "--distillation.edges.refreshes",
    "3",
    "--methods",
    "labels",
    "both-graphs",
    "--tensorboard",
]


def under_way(run: Run, kind: str, process: subprocess.Popen) -> None:
    """Waits for some epochs of a training."""
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
    """Undisturbed runs of one process and of two ranks."""
    root = tmp_path_factory.mktemp("calm")
    runs = {
        1: Run(TINY, root / "one", cache=root / "data"),
        2: Run(TINY, root / "two", cache=root / "data"),
    }
    finish(start(runs[1], "--workers", "2", *FLAGS))
    finish(start(runs[2], *FLAGS, launch=TORCHRUN))
    return runs


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
@pytest.mark.parametrize(
    ("signum", "workers", "kind"),
    [
        (signal.SIGINT, 1, "students"),
        (signal.SIGTERM, 2, "teachers"),
        (signal.SIGTERM, "ranks", "students"),
    ],
)
def test_a_run_that_is_asked_to_stop_saves_says_so_and_goes_on(
    calm, tmp_path, signum, workers, kind
):
    of_ranks = workers == "ranks"
    run = Run(TINY, tmp_path / "run", cache=calm[1].cache)
    how = {"launch": TORCHRUN} if of_ranks else {}
    flags = FLAGS if of_ranks else (*FLAGS, "--workers", str(workers))
    process = start(run, *flags, **how)
    under_way(run, kind, process)
    asked = time.monotonic()
    os.kill(process.pid, signum)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == (1 if of_ranks else 128 + signum), text[
        -3000:
    ]  # torchrun has a code of its own
    assert time.monotonic() - asked < 20
    assert "gdviz: stopped; the same command goes on from here" in text
    assert of_ranks or "Traceback" not in text
    assert list(run.folder.glob(f"seed0/{kind}/*/*.ckpt"))
    finish(start(run, *flags, **how))
    assert_same_run(calm[2 if of_ranks else 1].folder, run.folder)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
def test_a_rank_that_is_killed_is_started_again(calm, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # see docs/scale.md
    run = Run(TINY, tmp_path / "run", cache=calm[2].cache)
    process = start(run, *FLAGS, launch=(*TORCHRUN, "--max-restarts", "3"))
    for kind, number in (("teachers", 1), ("students", 0)):
        under_way(run, kind, process)
        next(
            p for p in psutil.Process(process.pid).children() if p.environ()["RANK"] == str(number)
        ).kill()
    finish(process)
    assert_same_run(calm[2].folder, run.folder)

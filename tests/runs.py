"""What tests of whole runs share: starting one as a program, and comparing two."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from gdviz.core.files import load_tensors
from gdviz.experiment.folder import Run


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.rglob("*.safetensors"))
    return {
        f"{file.relative_to(folder)}:{key}": value
        for file in files
        for key, value in load_tensors(file).items()
    }


def assert_same_run(a: Path, b: Path) -> None:
    one, other = ((run / "results.csv").read_text().splitlines() for run in (a, b))
    assert one == other
    left, right = tensors_of(a), tensors_of(b)
    assert left.keys() == right.keys()
    assert [key for key in left if not torch.equal(left[key], right[key])] == []
    for file in a.rglob("history.jsonl"):
        assert file.read_bytes() == (b / file.relative_to(a)).read_bytes()
    assert not [p for folder in (a, b) for p in folder.rglob("*") if p.suffix in (".part", ".ckpt")]


def start(
    run: Run, *more: str, launch: tuple[str, ...] = (sys.executable,), main: tuple[str, ...] = ()
) -> subprocess.Popen:
    """``gdviz run`` with small settings, as a process group of its own."""
    flags = """
        --motion.labelled 4 --motion.unlabelled 3 --motion.test 2 --motion.size 32
        --motion.frames 12 --view.size 16 --view.frames 12 --view.length 4
        --teachers.tasks order prediction --teachers.strides 2 1 --teachers.backbone tiny4
        --teachers.folds 2 --teachers.pretrain.epochs 30 --teachers.pretrain.batch 16
        --teachers.fit.epochs 10 --distillation.student tiny4
        --distillation.schedule.epochs 30 --distillation.schedule.batch 16
        --distillation.edges.refreshes 300 --seeds 0
        --methods labels both-graphs both-shuffled"""
    command = [
        *launch,
        *(main or ("-m", "gdviz.cli")),
        "run",
        *flags.split(),
        "--out",
        str(run.folder),
        "--cache",
        str(run.cache),
        *more,
    ]
    # Few words of progress: while nobody reads its pipe, a process that fills it waits for ever.
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MPLBACKEND": "Agg",
        "TQDM_MININTERVAL": "10",
    }
    return subprocess.Popen(
        command,
        start_new_session=True,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )

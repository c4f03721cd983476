"""What ``gdviz run``, ``evaluate``, ``figures`` and ``data check`` do; flags are dataclasses."""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
import tyro

from gdviz.config import PROFILES, Profile
from gdviz.core import distributed
from gdviz.core.cluster import Cluster
from gdviz.core.files import UserError
from gdviz.core.processes import Stopped, WorkerDied
from gdviz.data.listing import read_folder
from gdviz.data.official import SOURCES, describe, read_official, save_list
from gdviz.data.verified import verified
from gdviz.experiment import steps
from gdviz.experiment.folder import Run, default_folder, open_run
from gdviz.experiment.tables import evaluation, table
from gdviz.show.figures import draw_figures


@dataclass(frozen=True)
class RunArguments:
    """Train teachers, both graphs and students on videos. Started again, it goes on."""

    settings: Annotated[Profile, tyro.conf.arg(name="")] = field(default_factory=Profile)
    data: Path | None = None
    """folder of class sub-folders, or a CSV of path, label, group[, split]; or the embedded data"""
    out: Path | None = None
    """run folder; by default under runs/, named by data and settings"""
    cache: Path = Path("data")
    """where decoded videos (and the embedded data) are kept"""
    workers: int = 0
    """processes; 0: one a core on a CPU, one on a GPU"""
    cluster: str = ""
    """address of a Dask scheduler, whose machines read and train instead (docs/scale.md)"""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto"""
    tensorboard: bool = False
    """log every training for TensorBoard, too: tensorboard --logdir DIR"""


@dataclass(frozen=True)
class FigureArguments:
    """Draw the figures of a finished run."""

    run: tyro.conf.Positional[Path]
    out: Path | None = None
    """folder; by default figures/ in the run's"""


@dataclass(frozen=True)
class EvaluateArguments:
    """Print linear probe, retrieval, calibration and accuracy by class of a finished run."""

    run: tyro.conf.Positional[Path]
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto"""


@dataclass(frozen=True)
class CheckArguments:
    """Tell what is there of UCF101, HMDB51, CCV or a folder of classes, and where the rest is."""

    folder: tyro.conf.Positional[Path]
    lists: Path | None = None
    """folder of the official lists, if they are not in the videos' own"""
    split: int = 1
    """official split: 1, 2 or 3"""
    verify: bool = False
    """decode every file once and list those that are refused; runs use what was found"""
    csv: Path | None = None
    """write the clips that are there, for ``gdviz run --data``"""
    cache: Path = Path("data")
    """where runs keep decoded videos"""
    workers: int = 2
    """decoding processes; with one, a file that kills or hangs its reader ends the check"""
    cluster: str = ""
    """address of a Dask scheduler, whose machines decode instead"""


def _profile(words: list[str]) -> tuple[Profile, list[str]]:
    """Take ``--profile NAME`` out of the words: the other flags override what it names."""
    rest, name, left = [], "smoke", iter(words)
    for word in left:
        if word == "--profile":
            name = next(left, "")
        elif word.startswith("--profile="):
            name = word.partition("=")[2]
        else:
            rest.append(word)
    if name not in PROFILES:
        raise UserError(f"--profile {name}: unknown; choose from {', '.join(PROFILES)}")
    return PROFILES[name], rest


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        float(torch.zeros(1, device=name))
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return name


def _run(words: list[str]) -> None:
    profile, rest = _profile(words)
    default = RunArguments(settings=profile)
    args = tyro.cli(RunArguments, prog="gdviz run", default=default, args=rest)
    if args.tensorboard and find_spec("tensorboard") is None:
        raise UserError("--tensorboard: is not installed; pip install 'gdviz[tensorboard]'")
    if args.workers < 0:
        raise UserError(f"--workers {args.workers}: needs 0 or more")
    distributed.start(cpu=args.device == "cpu" or not torch.cuda.is_available())
    if args.cluster and distributed.world() > 1:
        raise UserError(
            "--cluster: hands out whole trainings, `torchrun` shares one: choose one of them"
        )
    # A machine of a cluster has its own device, and a working directory of its own.
    device = args.device if args.cluster else _device(args.device)
    whole = Path.resolve if args.cluster else Path
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = args.workers or (1 if device != "cpu" else cores)
    folder = args.out or default_folder(args.settings, args.data)
    data, cache = args.data and whole(args.data), whole(args.cache)
    run = Run(args.settings, whole(folder), data, cache, device, args.tensorboard)
    steps.execute(run, workers=Cluster(args.cluster) if args.cluster else workers)
    if not distributed.first():
        return
    print(table(run))
    for path in draw_figures(run, folder / "figures"):
        if path.suffix == ".png":
            print(path)


def _figures(words: list[str]) -> None:
    args = tyro.cli(FigureArguments, prog="gdviz figures", args=words)
    for path in draw_figures(open_run(args.run), args.out or args.run / "figures"):
        print(path)


def _evaluate(words: list[str]) -> None:
    args = tyro.cli(EvaluateArguments, prog="gdviz evaluate", args=words)
    print(evaluation(replace(open_run(args.run), device=_device(args.device))))


def _data(words: list[str]) -> None:
    if words[:1] != ["check"]:
        raise UserError(f"data {' '.join(words[:1])}: unknown; there is `gdviz data check DIR`")
    args = tyro.cli(CheckArguments, prog="gdviz data check", args=words[1:])
    if not args.folder.is_dir():
        raise UserError(f"{args.folder}: no such folder")
    official = read_official(args.folder, lists=args.lists, split=args.split)
    if official is None and args.lists:
        raise UserError(f"--lists {args.lists}: holds the lists of none of {', '.join(SOURCES)}")
    if official:
        print(describe(official))
        gone = set(official.missing)
        clips = [clip for clip in official.clips if clip not in gone]
    else:
        clips = read_folder(args.folder)
        for label, count in sorted(Counter(c.label or "(unlabelled)" for c in clips).items()):
            print(f"{label}: {count} videos")
    refused = 0
    if args.verify:
        workers = Cluster(args.cluster) if args.cluster else args.workers
        index = args.cache / "cache" / "verified.sqlite"
        found = verified([clip.path for clip in clips], index, workers=workers)
        for clip, reason in zip(clips, found, strict=True):
            if isinstance(reason, str):
                print(f"refused {clip.path}: {reason}")
                refused += 1
        print(f"{len(clips) - refused} of {len(clips)} videos can be read")
    if args.csv:
        save_list(clips, args.csv)
    if refused or (official and official.missing):
        sys.exit(1)


def _stop(signum: int, *_: object) -> None:
    raise Stopped(signum)


def execute(command: str, words: list[str]) -> None:
    """Do what a command says; exit with 1 and one line on what the user can mend."""
    commands = {"run": _run, "evaluate": _evaluate, "figures": _figures, "data": _data}
    signal.signal(signal.SIGTERM, _stop)
    try:
        commands[command](words)
    except (UserError, WorkerDied, ValueError, FloatingPointError) as error:
        sys.exit(f"gdviz: {error}")
    except KeyboardInterrupt as stop:
        print("gdviz: stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(128 + getattr(stop, "signum", signal.SIGINT))

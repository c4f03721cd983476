"""The command line: ``gdviz run``, ``evaluate``, ``figures`` and ``data check``. Flags come from the dataclasses in ``gdviz.config``."""

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

from gdviz.config import PROFILES, Profile, View
from gdviz.core import distributed as ranks
from gdviz.core.files import UserError
from gdviz.core.processes import Stopped, WorkerDied
from gdviz.data.listing import read_folder
from gdviz.data.official import SOURCES, describe, read_official, save_list
from gdviz.data.shards import write_shards
from gdviz.data.verified import verified
from gdviz.data.videos import load_folder
from gdviz.experiment import steps as runs
from gdviz.show.report import draw_figures, evaluation, table

USAGE = """usage: gdviz run [--profile smoke|workshop|paper] [--data DIR] [--out DIR] [options]   (gdviz run --help lists them)
       gdviz evaluate RUN                 linear probe, retrieval, calibration and accuracy by class of a finished run
       gdviz figures RUN [--out DIR]      draw the figures of a finished run again
       gdviz data check DIR [options]     what is there of a data set, what is missing, what cannot be read
       gdviz data shards DIR OUT          the videos as .tar shards of JPEG frames, for object stores"""


@dataclass(frozen=True)
class RunArguments:
    """Teachers, both graphs and students, from video files to a table and figures. Started again, it goes on."""

    settings: Annotated[Profile, tyro.conf.arg(name="")] = field(default_factory=Profile)
    data: Path | None = None
    """folder of class sub-folders, or a CSV of path, label, group[, split]; the embedded data without it"""
    out: Path | None = None
    """run folder; by default under runs/, named by data and settings"""
    cache: Path = Path("data")
    """where decoded videos (and the embedded data) are kept"""
    workers: int = 0
    """processes; 0: one a core on a CPU, one on a GPU"""
    cluster: str = ""
    """address of a Dask scheduler, whose machines read videos and train instead; all see the same folders (docs/scale.md)"""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto"""
    tensorboard: bool = False
    """log every training for TensorBoard, too: tensorboard --logdir DIR"""


@dataclass(frozen=True)
class FigureArguments:
    """Draws the figures of a finished run."""

    run: tyro.conf.Positional[Path]
    out: Path | None = None
    """folder; by default figures/ in the run's"""


@dataclass(frozen=True)
class EvaluateArguments:
    """Prints linear probe, retrieval, calibration and accuracy by class of a finished run's teachers and students."""

    run: tyro.conf.Positional[Path]
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto"""


@dataclass(frozen=True)
class CheckArguments:
    """Says what is there of UCF101, HMDB51, CCV or a folder of class sub-folders, what is missing and where to get it."""

    folder: tyro.conf.Positional[Path]
    lists: Path | None = None
    """folder of the official lists, if they are not in the videos' own"""
    split: int = 1
    """official split: 1, 2 or 3"""
    verify: bool = False
    """decode every file once and list those that are refused; what was found is kept for runs"""
    csv: Path | None = None
    """writes the clips that are there, for ``gdviz run --data``"""
    cache: Path = Path("data")
    """where runs keep decoded videos"""
    workers: int = 2
    """decoding processes; with one, a file that kills or hangs its reader ends the check"""
    cluster: str = ""
    """address of a Dask scheduler, whose machines decode instead (``gdviz.core.processes``)"""


@dataclass(frozen=True)
class ShardArguments:
    """Writes a data set as WebDataset shards; ``gdviz.data.shards.stream_clips`` reads them."""

    data: tyro.conf.Positional[Path]
    out: tyro.conf.Positional[Path]
    view: View = field(default_factory=View)
    cache: Path = Path("data")
    """where runs keep decoded videos"""
    workers: int = 2
    """decoding processes"""
    per_shard: int = 256
    """videos of a shard"""


def _profile(arguments: list[str]) -> tuple[Profile, list[str]]:
    """Takes ``--profile NAME`` out of the arguments: the other flags override what it names."""
    rest, name = [], "smoke"
    words = iter(arguments)
    for word in words:
        if word == "--profile":
            name = next(words, "")
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


def _run(arguments: list[str]) -> None:
    profile, rest = _profile(arguments)
    args = tyro.cli(
        RunArguments, prog="gdviz run", default=RunArguments(settings=profile), args=rest
    )
    if args.tensorboard and find_spec("tensorboard") is None:
        raise UserError("--tensorboard: is not installed; pip install 'gdviz[tensorboard]'")
    ranks.start(cpu=args.device == "cpu" or not torch.cuda.is_available())
    # A machine of a cluster has its own device, and a working directory of its own.
    device = args.device if args.cluster else _device(args.device)
    whole = Path.resolve if args.cluster else Path
    if args.cluster and ranks.world() > 1:
        raise UserError(
            "--cluster: hands out whole trainings; `torchrun` shares one among processes: choose one of them"
        )
    if args.workers < 0:
        raise UserError(f"--workers {args.workers}: needs 0 or more")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = args.workers or (1 if device != "cpu" else cores)
    folder = args.out or runs.default_folder(args.settings, args.data)
    run = runs.Run(
        args.settings,
        whole(folder),
        args.data and whole(args.data),
        whole(args.cache),
        device,
        args.tensorboard,
    )
    runs.execute(run, workers=args.cluster or workers)
    if not ranks.first():
        return
    print(table(run))
    for path in draw_figures(run, folder / "figures"):
        if path.suffix == ".png":
            print(path)


def _figures(arguments: list[str]) -> None:
    args = tyro.cli(FigureArguments, prog="gdviz figures", args=arguments)
    for path in draw_figures(runs.open_run(args.run), args.out or args.run / "figures"):
        print(path)


def _evaluate(arguments: list[str]) -> None:
    args = tyro.cli(EvaluateArguments, prog="gdviz evaluate", args=arguments)
    print(evaluation(replace(runs.open_run(args.run), device=_device(args.device))))


def _check(arguments: list[str]) -> None:
    args = tyro.cli(CheckArguments, prog="gdviz data check", args=arguments)
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
        for label, count in sorted(Counter(clip.label or "(unlabelled)" for clip in clips).items()):
            print(f"{label}: {count} videos")
    refused = 0
    if args.verify:
        found = verified(
            [clip.path for clip in clips],
            args.cache / "cache" / "verified.sqlite",
            workers=args.cluster or args.workers,
        )
        for clip, reason in zip(clips, found, strict=True):
            if isinstance(reason, str):
                print(f"refused {clip.path}: {reason}")
                refused += 1
        print(f"{len(clips) - refused} of {len(clips)} videos can be read")
    if args.csv:
        save_list(clips, args.csv)
    if refused or (official and official.missing):
        sys.exit(1)


def _shards(arguments: list[str]) -> None:
    args = tyro.cli(ShardArguments, prog="gdviz data shards", args=arguments)
    for path in write_shards(
        load_folder(args.data, args.view, args.cache / "cache", workers=args.workers),
        args.out,
        per_shard=args.per_shard,
    ):
        print(path)


def _data(arguments: list[str]) -> None:
    commands = {"check": _check, "shards": _shards}
    if not arguments or arguments[0] not in commands:
        raise UserError(
            f"data {' '.join(arguments[:1])}: unknown; there are `gdviz data check DIR` and `gdviz data shards DIR OUT`"
        )
    commands[arguments[0]](arguments[1:])


def _stop(signum: int, *_: object) -> None:
    raise Stopped(signum)


def main() -> None:
    commands = {"run": _run, "evaluate": _evaluate, "figures": _figures, "data": _data}
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        print(USAGE)
        sys.exit(0 if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help") else 2)
    signal.signal(signal.SIGTERM, _stop)
    try:
        commands[sys.argv[1]](sys.argv[2:])
    except (UserError, WorkerDied, ValueError, FloatingPointError) as error:
        sys.exit(f"gdviz: {error}")
    except KeyboardInterrupt as stop:
        print("gdviz: stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(128 + getattr(stop, "signum", signal.SIGINT))


if __name__ == "__main__":
    main()

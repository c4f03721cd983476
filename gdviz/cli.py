"""The command line: ``gdviz run``, ``gdviz figures``. Flags come from the dataclasses in ``gdviz.config``."""

from __future__ import annotations

import os
import sys
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import tyro

from gdviz import run as runs
from gdviz.artefacts import UserError
from gdviz.config import PROFILES, Profile
from gdviz.report import draw_figures, table

USAGE = """usage: gdviz run [--profile smoke|workshop|paper] [--data DIR] [--out DIR] [options]   (gdviz run --help lists them)
       gdviz figures RUN [--out DIR]      draw the figures of a finished run again"""


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
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto"""


@dataclass(frozen=True)
class FigureArguments:
    """Draws the figures of a finished run."""

    run: tyro.conf.Positional[Path]
    out: Path | None = None
    """folder; by default figures/ in the run's"""


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
    args = tyro.cli(RunArguments, prog="gdviz run", default=RunArguments(settings=profile), args=rest)
    device = _device(args.device)
    if args.workers < 0:
        raise UserError(f"--workers {args.workers}: needs 0 or more")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = args.workers or (1 if device != "cpu" else cores)
    folder = args.out or runs.default_folder(args.settings, args.data)
    run = runs.Run(args.settings, folder, args.data, args.cache, device)
    runs.execute(run, workers=workers)
    print(table(run))
    for path in draw_figures(run, folder / "figures"):
        if path.suffix == ".png":
            print(path)


def _figures(arguments: list[str]) -> None:
    args = tyro.cli(FigureArguments, prog="gdviz figures", args=arguments)
    for path in draw_figures(runs.open_run(args.run), args.out or args.run / "figures"):
        print(path)


def main() -> None:
    commands = {"run": _run, "figures": _figures}
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        print(USAGE)
        sys.exit(0 if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help") else 2)
    try:
        commands[sys.argv[1]](sys.argv[2:])
    except (UserError, ValueError, FloatingPointError) as error:
        sys.exit(f"gdviz: {error}")
    except BrokenProcessPool:
        sys.exit("gdviz: a worker process was killed (too little memory?); the same command goes on from here, try fewer --workers")
    except KeyboardInterrupt:
        sys.exit("gdviz: interrupted; the same command goes on from here")


if __name__ == "__main__":
    main()

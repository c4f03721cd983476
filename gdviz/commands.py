"""What ``gdviz run``, ``evaluate``, ``bench`` and all others do; arguments are flags."""

from __future__ import annotations

import os
import re
import signal
import sys
from argparse import ArgumentParser
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
from gdviz.core.files import UserError, load_json, save_json
from gdviz.core.processes import Stopped, WorkerDied
from gdviz.data.listing import read_folder
from gdviz.data.official import SOURCES, describe, read_official, save_list
from gdviz.data.verified import verified
from gdviz.experiment import grid, steps
from gdviz.experiment.bench import YARDSTICKS, bench, bench_table, contenders
from gdviz.experiment.checks import check_ranges
from gdviz.experiment.estimate import estimate
from gdviz.experiment.folder import Run, default_folder, environment, open_run
from gdviz.experiment.model_folder import export
from gdviz.experiment.report import report
from gdviz.experiment.tables import evaluation, table
from gdviz.show.comparisons import draw_comparisons
from gdviz.show.figures import draw_figures
from gdviz.student.family import STUDENTS


@dataclass(frozen=True)
class RunArguments:
    """Train teachers, both graphs and students on videos. Started again, it goes on."""

    settings: Annotated[Profile, tyro.conf.arg(name="")] = field(default_factory=Profile)
    # folder of class sub-folders, or a CSV of path, label, group[, split]; or the embedded data
    data: Path | None = None
    out: Path | None = None  # run folder; by default under runs/, named by data and settings
    cache: Path = Path("data")  # where decoded videos (and the embedded data) are kept
    workers: int = 0  # processes; 0: one a core on a CPU, one on a GPU
    # address of a Dask scheduler, whose machines read and train instead (docs/scale.md)
    cluster: str = ""
    device: str = "auto"  # cpu, cuda, cuda:1, mps, or auto
    # log every training for TensorBoard, too: tensorboard --logdir DIR
    tensorboard: bool = False


def _profile(words: list[str]) -> tuple[Profile, list[str]]:
    """Take ``--profile NAME`` out of the words: the other flags override what it names."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--profile", default="smoke", nargs="?", const="")
    known, rest = parser.parse_known_args(words)
    if known.profile not in PROFILES:
        choice = f"choose from {', '.join(PROFILES)}"
        raise UserError(f"--profile {known.profile}: unknown; {choice}")
    return PROFILES[known.profile], rest


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        float(torch.zeros(1, device=name))
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return name


def _workers(count: int, device: str) -> int:
    if count < 0:
        raise UserError(f"--workers {count}: needs 0 or more")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return count or (1 if device != "cpu" else cores or 1)


def _run(words: list[str]) -> None:
    profile, rest = _profile(words)
    args = tyro.cli(RunArguments, prog="gdviz run", default=RunArguments(profile), args=rest)
    if args.tensorboard and find_spec("tensorboard") is None:
        raise UserError("--tensorboard: is not installed; pip install 'gdviz[tensorboard]'")
    distributed.start(cpu=args.device == "cpu" or not torch.cuda.is_available())
    if args.cluster and distributed.world() > 1:
        raise UserError("--cluster: hands out whole trainings, `torchrun` shares one: choose one")
    # A machine of a cluster has its own device, and a working directory of its own.
    device = args.device if args.cluster else _device(args.device)
    if distributed.world() > 1 and device not in ("cpu", "cuda"):
        raise UserError(f"--device {device}: `torchrun` gives each process a GPU; take cuda")
    whole = Path.resolve if args.cluster else Path
    workers = _workers(args.workers, device)
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


def _experiment(
    plan: tyro.conf.Positional[Path],
    out: Path,
    cache: Path = Path("data"),
    workers: int = 0,
    cluster: str = "",
    device: str = "auto",
    dry: bool = False,
) -> None:
    """Run a plan's settings on every draw of the data; started again, it goes on.

    Args:
        plan: a TOML file (docs/experiments.md)
        out: folder of the experiment
        cache: where decoded videos (and the embedded data) are kept
        workers: processes, each of which does whole runs; 0: one a core on a CPU, one on a GPU
        cluster: address of a Dask scheduler, whose machines do the runs instead (docs/scale.md)
        device: cpu, cuda, cuda:1, mps, or auto
        dry: check the plan, say what it holds and how long it takes here, and stop
    """
    read, where = grid.read_plan(plan), device if cluster else _device(device)
    if dry:
        print(estimate(read, read.runs(out, cache, where), where))
        return
    by = Cluster(cluster) if cluster else _workers(workers, where)
    grid.execute(read, out.resolve(), cache.resolve(), where, by)
    print(report(out))


def _report(folder: tyro.conf.Positional[Path]) -> None:
    """Write and print means, intervals and contrasts of an experiment, and draw them."""
    print(report(folder))
    for path in draw_comparisons(folder):
        if path.suffix == ".png":
            print(path)


def _figures(run: tyro.conf.Positional[Path], out: Path | None = None) -> None:
    """Draw the figures of a finished run.

    Args:
        out: folder; by default figures/ in the run's
    """
    for path in draw_figures(open_run(run), out or run / "figures"):
        print(path)


def _evaluate(run: tyro.conf.Positional[Path], device: str = "auto") -> None:
    """Print linear probe, retrieval, calibration and accuracy by class of a finished run.

    Args:
        device: cpu, cuda, cuda:1, mps, or auto
    """
    print(evaluation(replace(open_run(run), device=_device(device))))


def _export(
    run: tyro.conf.Positional[Path], out: Path, method: str = "", seed: int | None = None
) -> None:
    """Write a finished run's student as ONNX, quantised too, with labels and a model card.

    Args:
        out: folder; one that holds an export is replaced
        method: by default the headline's
        seed: by default the first one
    """
    card = export(open_run(run), out, method, seed)
    print(f"{out}: {card['name']}, right on {card['accuracy']:.1f} % of the test videos")
    print(f"ONNX and PyTorch differ by {card['parity']:.1e} at most")
    whole = f"{card['int8']} of {card['convolutions']} convolutions"
    print(f"int8 ({whole}) answers alike on {card['agreement']:.1f} % of the test videos")
    print(f"next: gdviz predict {out} VIDEO...")


def _bench(
    run: tyro.conf.Positional[Path | None] = None,
    students: tuple[str, ...] = STUDENTS,
    yardsticks: tuple[str, ...] = tuple(YARDSTICKS),
    view: str = "",
    threads: tuple[int, ...] = (1,),
    compiled: bool = True,
    exports: tuple[Path, ...] = (),
    video: Path | None = None,
    out: Path | None = None,
) -> None:
    """Measure size and speed of a run's networks, of students and yardsticks, in turns.

    Args:
        run: finished run; without one, the networks and the view of the profile `paper`
        students: more students, by name
        yardsticks: networks to compare with; MODULE:NAME: of your own, by number of classes
        view: frames x side x side of a clip, as 16x112x112; by default the run's
        threads: numbers of CPU threads
        compiled: by torch.compile, too
        exports: folders of model.onnx and model-int8.onnx, for ONNX Runtime
        video: a file; its decoding is measured along, too
        out: JSON file of all that was measured
    """
    cfg = open_run(run).profile if run else PROFILES["paper"]
    classes = len(load_json(run / "summary.json")["data"]["classes"]) if run else 101
    sides = re.fullmatch(r"(\d+)x(\d+)x\2", view)
    if (view and not sides) or min(threads, default=0) < 1:
        raise UserError("--view is written as 16x112x112, and --threads are 1 or more")
    seen = replace(cfg.view, length=int(sides[1]), size=int(sides[2])) if sides else cfg.view
    check_ranges(seen, "--view.")
    names = (cfg.distillation.student, *students)
    models = contenders(cfg, names, yardsticks, seen, classes)
    rows = bench(models, threads=threads, compiled=compiled, exports=exports, video=video)
    if out:
        save_json(out, {"machine": environment(), "rows": rows})
    print(bench_table(rows))


def _check(
    folder: tyro.conf.Positional[Path],
    lists: Path | None = None,
    split: int = 1,
    verify: bool = False,
    csv: Path | None = None,
    cache: Path = Path("data"),
    workers: int = 2,
    cluster: str = "",
) -> None:
    """Tell what is there of UCF101, HMDB51, CCV or a folder of classes, and where the rest is.

    Args:
        lists: folder of the official lists, if they are not in the videos' own
        split: official split: 1, 2 or 3
        verify: decode every file once and list those that are refused; runs use what was found
        csv: write the clips that are there, for ``gdviz run --data``
        cache: where runs keep decoded videos
        workers: decoding processes; with one, a file that kills or hangs its reader ends the check
        cluster: address of a Dask scheduler, whose machines decode instead
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    official = read_official(folder, lists=lists, split=split)
    if official is None and lists:
        raise UserError(f"--lists {lists}: holds the lists of none of {', '.join(SOURCES)}")
    if official:
        print(describe(official))
        gone = set(official.missing)
        clips = [clip for clip in official.videos if clip not in gone]
    else:
        clips = read_folder(folder)
        for label, count in sorted(Counter(c.label or "(unlabelled)" for c in clips).items()):
            print(f"{label}: {count} videos")
    refused = 0
    if verify:
        index = cache / "cache" / "verified.sqlite"
        by = Cluster(cluster) if cluster else workers
        found = verified([clip.path for clip in clips], index, workers=by)
        for clip, reason in zip(clips, found, strict=True):
            if isinstance(reason, str):
                print(f"refused {clip.path}: {reason}")
                refused += 1
        print(f"{len(clips) - refused} of {len(clips)} videos can be read")
    if csv:
        save_list(clips, csv)
    if refused or (official and official.missing):
        sys.exit(1)


def _stop(signum: int, *_: object) -> None:
    raise Stopped(signum)


def execute(command: str, words: list[str]) -> None:
    """Do what a command says; exit with 1 and one line on what the user can mend."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        if command == "run":
            _run(words)
            return
        if command == "data":
            command, words = " ".join(["data", *words[:1]]), words[1:]
        commands = {
            "experiment": _experiment,
            "report": _report,
            "evaluate": _evaluate,
            "figures": _figures,
            "export": _export,
            "bench": _bench,
            "data check": _check,
        }
        if command not in commands:
            raise UserError(f"{command}: unknown; there is `gdviz data check DIR`")
        tyro.cli(commands[command], prog=f"gdviz {command}", args=words)
    except (UserError, WorkerDied, ValueError, FloatingPointError) as error:
        sys.exit("gdviz: " + " ".join(str(error).splitlines()))  # names may hold line ends
    except KeyboardInterrupt as stop:
        print("gdviz: stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(128 + getattr(stop, "signum", signal.SIGINT))

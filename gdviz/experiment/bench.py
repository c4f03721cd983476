"""Size and speed: networks run in turns, so that a machine that is busy slows all of them alike."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from gdviz.config import Profile, View
from gdviz.core.files import UserError, in_a_line
from gdviz.core.names import resolve
from gdviz.data.clips import to_float
from gdviz.data.reading import DamagedVideo, read_square, verify
from gdviz.student.family import build_student
from gdviz.teachers.bank import device_of
from gdviz.teachers.fit import build_teacher
from gdviz.teachers.own import OwnBackbone

BATCHES = (1, 4, 16, 64)  # one is tried where that before gave 5 % more clips a second
YARDSTICKS = {
    name: partial(build_student, name) for name in ("r3d_18", "r2plus1d_18", "s3d", "shift-small")
}
Models = Mapping[str, tuple[nn.Module, View]]


class Racer(NamedTuple):
    """A network as one engine runs it, and a clip [1, 3, t, h, w] of its view."""

    name: str
    engine: str
    run: Callable[[Tensor], Any]
    clip: Tensor

    def call(self, batch: int) -> Callable[[], Any]:
        """Return what runs the network once and waits for its device."""
        clips = self.clip.repeat(batch, 1, 1, 1, 1)
        if clips.is_cuda:
            return lambda: (self.run(clips), torch.cuda.synchronize(clips.device))
        if clips.is_mps:
            return lambda: (self.run(clips), torch.mps.synchronize())
        return lambda: self.run(clips)


@torch.inference_mode()
def turns(
    calls: Sequence[Callable[[], Any]], rounds: int, *, block: int = 1, threads: int = 1
) -> Float[Tensor, "rounds block calls"]:
    """Return seconds a call took.

    A round makes every call ``block`` times in a row, every other round in reverse: a machine that
    is busy for a while slows all of them, and ratios within a round stay right. Two more rounds
    warm caches up.
    """
    seconds, before = torch.zeros(rounds + 2, block, len(calls)), torch.get_num_threads()
    torch.set_num_threads(threads)
    for turn in range(rounds + 2):
        for k in sorted(range(len(calls)), reverse=turn % 2 == 1):
            for again in range(block):
                start = time.perf_counter()
                calls[k]()
                seconds[turn, again, k] = time.perf_counter() - start
    torch.set_num_threads(before)
    return seconds[2:]


def _racer(name: str, model: nn.Module, view: View) -> Racer:
    shape, device = (1, 3, view.length, view.size, view.size), device_of(model)
    return Racer(name, "eager", model.eval(), torch.rand(shape, device=device))


def _size(racer: Racer) -> dict[str, float]:
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        racer.run(racer.clip)
    assert isinstance(racer.run, nn.Module)
    size = sum(p.numel() for p in racer.run.parameters())
    return {"params": size, "gflops": counter.get_total_flops() / 1e9}


def footprints(
    models: Sequence[tuple[nn.Module, View]], *, repeats: int = 15, batch: int = 8
) -> tuple[list[dict[str, float]], Float[Tensor, "repeats models"]]:
    """Return parameters, GFLOP and median latency of each model, and all latencies by round.

    GFLOP (2 a multiply-add) are of a clip; latencies are ms a clip, of one thread or the model's
    GPU, by :func:`turns`.
    """
    racers = [_racer("", *model) for model in models]
    found = [_size(racer) for racer in racers]
    times = turns([racer.call(batch) for racer in racers], repeats)[:, 0] / batch * 1e3
    for row, latency in zip(found, times.quantile(0.5, 0).tolist(), strict=True):
        row["latency_ms"] = latency
    return found, times


def footprint(model: nn.Module, view: View, **options: int) -> dict[str, float]:
    """Return :func:`footprints` of one model."""
    return footprints([(model, view)], **options)[0][0]


@torch.inference_mode()
def _peak_mb(racer: Racer) -> float:
    """Return the most MB of tensors that are held at once in a call, weights and clip included."""
    assert isinstance(racer.run, nn.Module)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it tells of its start and end
    with profile(profile_memory=True) as seen:
        racer.run(racer.clip)
    results: Any = seen.profiler and seen.profiler.kineto_results
    memory, place = (e for e in results.events() if e.name() == "[memory]"), racer.clip.device.type
    changes = (e.nbytes() for e in memory if e.device_type().name == place.upper())
    held = sum(x.nbytes for x in (*racer.run.state_dict().values(), racer.clip))
    return (held + max(accumulate(changes), default=0)) / 1e6


class Together(nn.ModuleList):
    """Networks that all see the same clips."""

    def forward(self, clips: Tensor) -> list[Any]:
        return [net(clips) for net in self]


def contenders(
    cfg: Profile, students: Sequence[str], yardsticks: Sequence[str], view: View, classes: int
) -> Models:
    """Build, by name and untrained: students, each kind of teacher, all teachers, yardsticks.

    A yardstick is of ``YARDSTICKS``, or MODULE:NAME of what returns a network for a number of
    classes. It sees clips in its own ``view`` if it has one, the others in ``view``.

    Raises:
        UserError: unknown name, or one that builds no network.
    """
    found: dict[str, tuple[nn.Module, View]]
    found = {name: (build_student(name, classes), view) for name in students}
    teachers = [build_teacher(task, cfg.teachers, classes) for task in cfg.teachers.tasks]
    for task, net in zip(cfg.teachers.tasks, teachers, strict=True):
        own = isinstance(getattr(net, "backbone", net), OwnBackbone)
        found.setdefault(task if own else cfg.teachers.backbone, (net, view))
    found["all teachers"] = Together(teachers), view
    for name in yardsticks:
        build = resolve(name, YARDSTICKS, "yardstick")
        try:
            net = build(classes)
        except Exception as error:  # whatever a file of the user's raises
            raise UserError(f"yardstick {name!r}: {in_a_line(error)}") from error
        if not isinstance(net, nn.Module):
            raise UserError(f"yardstick {name!r}: returns no network, but {type(net).__name__}")
        found.setdefault(name, (net, getattr(net, "view", view)))
    return found


def _exported(folder: Path, threads: int) -> list[Racer]:
    """Return what ONNX Runtime makes of model.onnx and model-int8.onnx of a folder."""
    if not (files := sorted(folder.glob("model*.onnx"))):
        raise UserError(f"--exports {folder}: holds no model.onnx")
    try:
        runtime = import_module("onnxruntime")
    except ModuleNotFoundError:
        print(f"{folder.name}, onnx: left out (onnxruntime is not installed)")
        return []
    racers, options = [], runtime.SessionOptions()
    options.intra_op_num_threads = threads
    for file in files:
        session = runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        (entry,) = session.get_inputs()
        run = partial(_by_onnx, session, entry.name)
        clip, engine = torch.rand(1, *entry.shape[1:]), file.stem.replace("model", "onnx")
        racers.append(Racer(folder.name, engine, run, clip))
    return racers


def _by_onnx(session: Any, entry: str, clips: Tensor) -> Any:
    return session.run(None, {entry: clips.numpy()})


def _decoding(video: Path, racers: Sequence[Racer]) -> list[Racer]:
    """Return racers that before each clip read its frames, spread over a file."""
    try:
        info = verify(video)
    except DamagedVideo as error:
        raise UserError(f"--video {video}: {error}") from error

    def run(racer: Racer, clips: Tensor) -> Any:
        frames, size = clips.shape[2:4]
        read = [to_float(read_square(video, frames, size, info)[0]) for _ in clips]
        return racer.run(torch.stack(read).transpose(1, 2).to(clips))

    return [r._replace(engine=f"decode, {r.engine}", run=partial(run, r)) for r in racers]


def _able(racer: Racer, threads: int) -> bool:
    try:
        turns([racer.call(1)], 0, threads=threads)
    except RuntimeError as error:  # of a compiler that is not there, say
        print(f"{racer.name}, {racer.engine}: left out ({str(error).strip().splitlines()[0]})")
        return False
    return True


def _throughput(racers: Sequence[Racer], threads: int) -> list[dict[str, float]]:
    """Return the most clips a second of each racer, and of which batch."""
    best: dict[int, tuple[float, int]] = dict.fromkeys(range(len(racers)), (0.0, 0))
    going = list(best)
    for batch in BATCHES:
        if not going:
            break
        seconds = turns([racers[k].call(batch) for k in going], 3, threads=threads)[:, 0]
        rates = dict(zip(going, (batch / seconds.quantile(0.5, 0)).tolist(), strict=True))
        going = [k for k in going if rates[k] > 1.05 * best[k][0]]
        best |= {k: (rates[k], batch) for k in going}
    return [{"clips_a_second": rate, "batch": batch} for rate, batch in best.values()]


def _race(racers: Sequence[Racer], rounds: int, threads: int) -> list[dict[str, Any]]:
    seconds = turns([racer.call(1) for racer in racers], rounds, block=4, threads=threads)
    ms = 1e3 * seconds[:, 1:]  # the first of a block finds caches as another network left them
    points = ms.flatten(0, 1).quantile(torch.tensor([0.25, 0.5, 0.75, 0.95]), 0).T.tolist()
    by_round, rows = ms.quantile(0.5, 1), []
    for k, (racer, rate) in enumerate(zip(racers, _throughput(racers, threads), strict=True)):
        row = {"name": racer.name, "engine": racer.engine}
        row["clip"] = "x".join(map(str, racer.clip.shape[2:]))
        if racer.engine == "eager":
            row |= _size(racer) | {"peak_mb": _peak_mb(racer)}
        row |= dict(zip(("low_ms", "ms", "high_ms", "p95_ms"), points[k], strict=True)) | rate
        for j, other in enumerate(racers):
            if (other.name, other.engine) == ("all teachers", "eager"):
                row["faster"] = float((by_round[:, j] / by_round[:, k]).quantile(0.5))
        rows.append(row)
    return rows


def bench(
    models: Models,
    *,
    threads: Sequence[int] = (1,),
    compiled: bool = True,
    exports: Sequence[Path] = (),
    video: Path | None = None,
    rounds: int = 10,
) -> list[dict[str, Any]]:
    """Return a row for each network and engine, on the CPU by number of threads, and on a GPU.

    Rows hold ``params``, ``gflops`` (2 a multiply-add) and ``peak_mb`` (tensors alone) of eager
    networks; median ``ms`` of one clip, quartiles, 95th percentile; the most ``clips_a_second`` and
    of which ``batch``; how many times ``faster`` than all teachers, eager: the median over rounds.
    With a ``video`` there are rows that decode it before each clip. What an engine cannot run is
    left out with a line.
    """
    rows = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for count in threads if device == "cpu" else (1,):
            racers = [_racer(name, net.to(device), view) for name, (net, view) in models.items()]
            torch.compiler.reset()  # code is compiled for a number of threads
            others = [r._replace(engine="compiled", run=torch.compile(r.run)) for r in racers]
            if device == "cpu":
                racers += [racer for folder in exports for racer in _exported(folder, count)]
            racers += _decoding(video, racers) if video else []
            racers += others if compiled else []
            where = {"device": device, "threads": count}
            # All networks share few forward functions: by default the ninth would not be compiled.
            with torch._dynamo.config.patch(recompile_limit=1000):
                able = [racer for racer in racers if _able(racer, count)]
                rows += [where | row for row in _race(able, rounds, count)]
    return rows


def bench_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows of :func:`bench` as text: a line each."""
    shown = pd.DataFrame(rows).drop(columns=["low_ms", "high_ms"])
    shown["params"] = shown["params"].div(1e6)
    shown = shown.rename(columns={"params": "M params", "clips_a_second": "clips/s"})
    return shown.to_string(index=False, na_rep="", float_format="{:.2f}".format)

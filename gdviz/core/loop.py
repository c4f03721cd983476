"""The one training loop, in plain PyTorch: for teachers and students, resumable to the bit."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from gdviz.config import Schedule
from gdviz.core import distributed
from gdviz.core.files import UserError, load_checkpoint, save_checkpoint
from gdviz.core.processes import Stopped, stops_noted

# (rows [b], generator, epoch) -> the loss to descend, and numbers to log
Step = Callable[[Tensor, Generator, int], tuple[Tensor, dict[str, Tensor | float]]]
SAVE_EVERY_S = 5.0  # and twenty times what saving takes
DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Bookkeeping:
    """What a training keeps beside its result."""

    checkpoint: Path | None = None  # to resume from; the caller removes it when the result is safe
    progress: str | None = None  # title of the progress bar; None hides it
    board: Path | None = None  # folder for TensorBoard
    watch: Callable[[Any], None] | None = None  # sees the module after every epoch


def learning_rate(schedule: Schedule, done: float) -> float:
    """Return ``lr min(1, done / warmup) (1 + cos(pi done)) / 2`` for ``done`` in [0, 1]."""
    rise = min(1.0, (done + 1e-3) / max(schedule.warmup, 1e-3))
    return schedule.lr * rise * 0.5 * (1 + math.cos(math.pi * done))


class _Training:
    """A training that stands ``done`` steps into the epoch that follows those of ``history``."""

    def __init__(
        self, module: nn.Module, step: Step, rows: Tensor, schedule: Schedule, seed: int
    ) -> None:
        self.module, self.step, self.rows = module, step, rows
        self.schedule, self.seed = schedule, seed
        self.device = next(module.parameters()).device
        self.optimiser = torch.optim.AdamW(
            module.parameters(), lr=schedule.lr, weight_decay=schedule.weight_decay, fused=True
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=schedule.precision == "fp16")
        self.parts: dict[str, Any] = {"module": module, "optimiser": self.optimiser}
        self.parts["scaler"] = self.scaler
        if schedule.ema:
            decay = get_ema_multi_avg_fn(schedule.ema)
            self.parts["average"] = AveragedModel(module, multi_avg_fn=decay, use_buffers=True)
        self.batch = min(schedule.batch, len(rows))
        self.steps = max(schedule.min_steps, len(rows) // schedule.batch)  # of an epoch
        self.history: list[dict[str, float]] = []
        self.logged: dict[str, list[Tensor | float]] = defaultdict(list)
        self.done = 0

    def begin_epoch(self) -> None:
        """Draw the order of the clips; all draws of an epoch follow from (seed, epoch)."""
        self.rng = Generator().manual_seed(self.seed * 100_003 + len(self.history))
        passes = math.ceil(self.steps * self.batch / len(self.rows))
        orders = [torch.randperm(len(self.rows), generator=self.rng) for _ in range(passes)]
        self.order = self.rows[torch.cat(orders)]
        self.module.train()

    def take_step(self) -> None:
        """Descend on the next batch, part by part."""
        if self.done == 0:
            self.begin_epoch()
        schedule, epoch, dtype = self.schedule, len(self.history), DTYPES[self.schedule.precision]
        # For dropout: no state to save, and another mask on every rank.
        torch.manual_seed(hash((self.seed, epoch, self.done, distributed.rank())))
        progress = (epoch * self.steps + self.done) / (self.steps * schedule.epochs)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(schedule, progress)
        self.optimiser.zero_grad(set_to_none=True)
        picked = self.order[self.done * self.batch : (self.done + 1) * self.batch]
        for part in picked.chunk(schedule.accumulate):
            with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
                loss, metrics = self.step(part, self.rng, epoch)
            loss = loss.to(torch.promote_types(loss.dtype, torch.float32))
            self.scaler.scale(loss * (len(part) / len(picked))).backward()
            for name, value in {"loss": loss, **metrics}.items():
                self.logged[name].append(value.detach() if isinstance(value, Tensor) else value)
        distributed.average_gradients(self.module)
        if schedule.clip:
            self.scaler.unscale_(self.optimiser)
            nn.utils.clip_grad_norm_(self.module.parameters(), schedule.clip)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        if schedule.ema:
            self.parts["average"].update_parameters(self.module)
        self.done += 1

    def numbers(self) -> dict[str, list[float]]:
        return {name: [float(value) for value in values] for name, values in self.logged.items()}

    def end_epoch(self) -> dict[str, float]:
        """Return the means of what was logged, added to the history."""
        means = {name: float(torch.tensor(x).mean()) for name, x in self.numbers().items()}
        means, epoch = distributed.mean(means), len(self.history)
        if not math.isfinite(means["loss"]):
            problem = f"the loss is {means['loss']} in epoch {epoch} of a training"
            raise FloatingPointError(f"{problem}; lower the learning rate")
        self.history.append({"epoch": epoch, **means})
        self.logged.clear()
        self.done = 0
        return means

    def save(self, path: Path) -> None:
        """Write a checkpoint, in which every rank has its own numbers to log; for all to call."""
        logged = distributed.collect(self.numbers())
        at = {"history": self.history, "logged": logged, "done": self.done}
        states = {name: part.state_dict() for name, part in self.parts.items()}
        if distributed.first():
            save_checkpoint(path, {**states, "at": at, "rng": self.rng.get_state()})

    def load(self, path: Path) -> None:
        state = load_checkpoint(path)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.history, self.done = state["at"]["history"], state["at"]["done"]
        if self.done:
            self.begin_epoch()
            self.rng.set_state(state["rng"])
            logged = state["at"]["logged"]
            self.logged.update(logged[distributed.rank() % len(logged)])


def _run(training: _Training, keep: Bookkeeping) -> None:
    """Take all steps that are left; save now and then, at the end, and when asked to stop."""
    history, steps, batch, board = training.history, training.steps, training.batch, None
    begun, total = len(history) * steps + training.done, training.schedule.epochs * steps
    if keep.board is not None and distributed.first():
        from torch.utils.tensorboard.writer import SummaryWriter

        board = SummaryWriter(keep.board, purge_step=len(history))
    look = {"desc": keep.progress, "unit": "clip", "unit_scale": True}
    hidden = keep.progress is None or not distributed.first()
    notice, due = distributed.Notice(training.device), monotonic() + SAVE_EVERY_S
    with stops_noted() as asked, tqdm(total=total * batch, disable=hidden, **look) as bar:
        bar.update(begun * batch)
        for step in range(begun, total):
            training.take_step()
            bar.update(batch)
            if training.done == steps:
                means = training.end_epoch()
                bar.set_postfix(loss=f"{means['loss']:.3f}")
                if board:
                    for name, value in means.items():
                        board.add_scalar(name, value, step // steps)
                    board.flush()
                if keep.watch:
                    keep.watch(training.module)
            began = monotonic()
            overdue = distributed.first() and began > due
            if overdue:
                due = math.inf  # asked for once: several ranks hear of it a step later
            told = notice(asked() or int(overdue))  # a signal to stop at, or 1 to save and go on
            if keep.checkpoint is not None and (told or step + 1 == total):
                training.save(keep.checkpoint)
                took = monotonic() - began
                due = began + took + SAVE_EVERY_S * (1 + 4 * took)
            if told > 1:
                # A launcher ends all ranks when one has ended, but the first may be saving still.
                distributed.agreed(None)
                raise Stopped(told)


def train(
    module: nn.Module,
    step: Step,
    rows: Tensor,
    schedule: Schedule,
    *,
    seed: int,
    compiled: Sequence[nn.Module] = (),
    keep: Bookkeeping = Bookkeeping(),
) -> list[dict[str, float]]:
    """Train ``module`` in place by AdamW; return one row an epoch, the means of what was logged.

    All randomness of an epoch is drawn from (seed, epoch), so a training that was killed and goes
    on from its checkpoint ends with the same numbers (on a GPU, but for the order in which its
    kernels add). Every rank gets the whole batch and the same generator, see
    :mod:`gdviz.core.distributed`; batch norm sees all ranks on GPUs only.

    Args:
        module: holds every parameter that is trained, and no other; initialised.
        step: (rows [b], generator, epoch) -> (loss, numbers to log), for a batch or part of it.
        rows: what to draw batches from.
        compiled: modules to compile if ``schedule.compile``.

    Raises:
        UserError: fp16 elsewhere than on an NVIDIA or AMD GPU, or a damaged checkpoint.
        FloatingPointError: the loss is no longer finite.
        Stopped: SIGTERM or Ctrl-C came; the checkpoint holds the last step.
    """
    kind = next(module.parameters()).device.type
    if schedule.precision == "fp16" and kind != "cuda":
        raise UserError("--*.precision fp16: needs an NVIDIA or AMD GPU; bf16 does not")
    if distributed.world() > 1 and kind != "cpu":
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    distributed.synchronise(module)
    for part in compiled if schedule.compile else ():
        part.compile()
    training = _Training(module, step, rows, schedule, seed)
    if keep.checkpoint is not None and keep.checkpoint.exists():
        training.load(keep.checkpoint)
    _run(training, keep)
    if schedule.ema:
        module.load_state_dict(training.parts["average"].module.state_dict())
    distributed.synchronise(module)  # running means of batch norm, which saw one rank on a CPU
    module.eval()
    return training.history

"""The one training loop: resumable to the bit, visible, and the same for teachers and students, one process and many.

Accelerate, because it leaves the loop in sight while one command runs on what `torchrun` or `accelerate launch` gives.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Generator, Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from gdviz.config import Schedule
from gdviz.core import distributed as ranks
from gdviz.core.files import UserError, load_checkpoint, save_checkpoint
from gdviz.core.processes import Stopped, stops_noted
from gdviz.teachers.backbones import Backbone
from gdviz.teachers.own import TappedBackbone

# What a step returns: the loss to descend and numbers to log.
Step = Callable[[Tensor, Generator], tuple[Tensor, dict[str, Tensor | float]]]
SAVE_EVERY_S = 5.0  # more where saving is slow, so that it takes a twentieth of the time at most


class Bookkeeping(TypedDict, total=False):
    """What a caller of a training hands on to :func:`train`."""

    checkpoint: Path | None
    progress: str | None
    board: Path | None


def learning_rate(schedule: Schedule, done: float) -> float:
    """Linear warm-up over the first share ``schedule.warmup``, then a cosine to zero; ``done`` in [0, 1]."""
    return (
        schedule.lr
        * min(1.0, (done + 1e-3) / max(schedule.warmup, 1e-3))
        * 0.5
        * (1 + math.cos(math.pi * done))
    )


class _Whole(nn.Module):
    """What Accelerate wraps: every parameter, and a forward that is the whole step, whichever networks that calls."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, step: Callable[[], Any]) -> Any:
        return step()


class _Keeper:
    """A checkpoint: the state of all ``parts``, and ``at``, where the training stands."""

    def __init__(
        self,
        path: Path | None,
        parts: dict[str, Any],
        asked: Callable[[], int],
        device: torch.device,
    ) -> None:
        self.path, self.parts, self.asked, self.notice = path, parts, asked, ranks.Notice(device)
        self.saved, self.took = time.monotonic(), 0.0
        self.at: dict[str, Any] = {"history": [], "step": 0, "logged": {}, "rng": None}
        if path is not None and path.exists():
            state = load_checkpoint(path)
            for name, part in parts.items():
                part.load_state_dict(state[name])
            self.at = state["at"]

    def keep(
        self,
        history: list[dict[str, float]],
        step: int,
        logged: dict[str, list[Tensor | float]],
        rng: Generator,
        last: bool = False,
    ) -> None:
        """Saves if it is time to, at the end, or if asked to stop, which it then does. For all ranks to call after every step."""
        stop, began = self.notice(self.asked()), time.monotonic()
        if self.path is not None and (
            stop or last or began - self.saved > SAVE_EVERY_S * (1 + 4 * self.took)
        ):
            if ranks.first():
                numbers = {name: [float(v) for v in values] for name, values in logged.items()}
                at = {"history": history, "step": step, "logged": numbers, "rng": rng.get_state()}
                save_checkpoint(
                    self.path,
                    {name: part.state_dict() for name, part in self.parts.items()} | {"at": at},
                )
            self.saved = time.monotonic()
            self.took = self.saved - began
        if stop:
            ranks.agreed(
                None
            )  # a launcher ends all ranks when one has ended, but the first may be saving still
            raise Stopped(stop)


def _accelerator(schedule: Schedule, module: nn.Module, device: torch.device) -> Accelerator:
    if schedule.precision == "fp16" and device.type == "cpu":
        raise UserError("--*.precision fp16: needs a GPU; bf16 does not")
    AcceleratorState._reset_state()  # it remembers the precision of the training before
    # A foreign network is tapped somewhere: what lies behind, or is frozen, has no gradient to wait for.
    tapped = any(isinstance(part, TappedBackbone) for part in module.modules())
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)] if tapped else []
    on_cpu = device.type == "cpu"
    return Accelerator(
        cpu=on_cpu,
        mixed_precision=schedule.precision,
        device_placement=False,
        kwargs_handlers=handlers,
    )


def _board(folder: Path | None, begin: int) -> Callable[[int, dict[str, float]], None]:
    """(epoch, numbers) -> None, for TensorBoard to show."""
    if folder is None or not ranks.first():
        return lambda epoch, row: None
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder, purge_step=begin)

    def show(epoch: int, row: dict[str, float]) -> None:
        for name, value in row.items():
            writer.add_scalar(name, value, epoch)
        writer.flush()

    return show


def train(
    module: nn.Module,
    step: Step,
    rows: Tensor,
    schedule: Schedule,
    *,
    seed: int,
    checkpoint: Path | None = None,
    on_epoch: Callable[[int], dict[str, float]] | None = None,
    progress: str | None = None,
    board: Path | None = None,
) -> list[dict[str, float]]:
    """Trains ``module`` in place.

    All randomness of an epoch is drawn from (seed, epoch), so a run that was killed and started
    again from its last checkpoint ends with the same numbers. Every rank is handed the whole batch
    and the same generator, see :mod:`gdviz.core.distributed`; batch norm sees all ranks on GPUs only.

    Args:
        module: holds every parameter that is trained, and no other.
        step: (rows [b], generator) -> (loss, metrics); called once a batch, or part of it.
        rows: what to draw batches from.
        schedule: epochs, batch size, learning rate, weight decay, and how to compute.
        seed: of batches and views; initialise the module before.
        checkpoint: file to resume from and save to; removed by the caller when the result is safe.
        on_epoch: called with the epoch's number before its first step, and when it is resumed; what it returns is logged.
        progress: title of the progress bar; None hides it.
        board: folder for TensorBoard; None does without.

    Returns:
        One row an epoch: the mean of every logged number.

    Raises:
        FloatingPointError: the loss is no longer finite.
        Stopped: SIGTERM or Ctrl-C; the checkpoint holds the last step.
    """
    device = next(module.parameters()).device
    accelerator = _accelerator(schedule, module, device)
    if ranks.world() > 1 and device.type == "cuda":
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    optimiser = torch.optim.AdamW(
        module.parameters(), lr=schedule.lr, weight_decay=schedule.weight_decay, fused=True
    )
    average = (
        AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(schedule.ema), use_buffers=True)
        if schedule.ema
        else None
    )
    for part in module.modules():
        if schedule.compile and isinstance(part, Backbone):
            part.trunk.compile()
    whole, optimiser = accelerator.prepare(_Whole(module), optimiser)
    parts = {
        "module": module,
        "optimiser": optimiser,
        "average": average,
        "scaler": accelerator.scaler,
    }
    per_epoch = max(schedule.min_steps, len(rows) // schedule.batch)
    batch = min(schedule.batch, len(rows))
    passes = math.ceil(per_epoch * batch / len(rows))
    total = per_epoch * schedule.epochs
    hidden = progress is None or not ranks.first()
    with (
        stops_noted() as asked,
        tqdm(
            total=total * batch, desc=progress, disable=hidden, unit="clip", unit_scale=True
        ) as bar,
    ):
        keeper = _Keeper(
            checkpoint,
            {name: part for name, part in parts.items() if part is not None},
            asked,
            device,
        )
        history, begun = keeper.at["history"], keeper.at["step"]
        bar.update((len(history) * per_epoch + begun) * batch)
        show = _board(board, len(history))
        for epoch in range(len(history), schedule.epochs):
            rng = Generator().manual_seed(seed * 100_003 + epoch)
            logged: dict[str, list[Tensor | float]] = defaultdict(list)
            extra = on_epoch(epoch) if on_epoch else {}
            order = torch.cat(
                [rows[torch.randperm(len(rows), generator=rng)] for _ in range(passes)]
            )
            if begun:
                rng.set_state(keeper.at["rng"])
                logged.update(keeper.at["logged"])
            module.train()
            began = time.monotonic()
            for i in range(begun, per_epoch):
                torch.manual_seed(
                    hash((seed, epoch, i, ranks.rank()))
                )  # dropout: no state to save, another mask on every rank
                for group in optimiser.param_groups:
                    group["lr"] = learning_rate(schedule, (epoch * per_epoch + i) / total)
                optimiser.zero_grad(set_to_none=True)
                picked = order[i * batch : (i + 1) * batch]
                chunks = picked.chunk(schedule.accumulate)
                for number, part in enumerate(chunks, 1):
                    with accelerator.no_sync(whole) if number < len(chunks) else nullcontext():
                        loss, metrics = whole(partial(step, part, rng))
                        accelerator.backward(loss * (len(part) / len(picked)))
                    for key, value in {"loss": loss, **metrics}.items():
                        logged[key].append(value.detach() if isinstance(value, Tensor) else value)
                if schedule.clip:
                    accelerator.clip_grad_norm_(module.parameters(), schedule.clip)
                optimiser.step()
                if average is not None:
                    average.update_parameters(module)
                bar.update(batch)
                if i + 1 < per_epoch:
                    keeper.keep(history, i + 1, logged, rng)
            row = ranks.mean(
                {
                    key: float(torch.as_tensor([float(v) for v in values]).mean())
                    for key, values in logged.items()
                },
                device,
            )
            if not math.isfinite(row["loss"]):
                raise FloatingPointError(
                    f"{progress or 'training'}: the loss is {row['loss']} in epoch {epoch}; lower the learning rate"
                )
            history.append({"epoch": epoch, **row, **extra})
            bar.set_postfix(loss=f"{row['loss']:.3f}")
            show(
                epoch,
                {
                    **row,
                    **extra,
                    "clips a second": (per_epoch - begun) * batch / (time.monotonic() - began),
                },
            )
            begun = 0
            keeper.keep(history, 0, {}, rng, last=len(history) == schedule.epochs)
    if average is not None:
        module.load_state_dict(average.module.state_dict())
    module.eval()
    return history

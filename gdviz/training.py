"""The one training loop: resumable to the bit, visible, and the same for teachers and students."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

import torch
from torch import Generator, Tensor, nn
from tqdm.auto import tqdm

from gdviz.artefacts import load_checkpoint, save_checkpoint
from gdviz.config import Schedule

# What a step returns: the loss to descend and numbers to log.
Step = Callable[[Tensor, Generator], tuple[Tensor, dict[str, Tensor | float]]]
SAVE_EVERY_S = 5.0


class Bookkeeping(TypedDict, total=False):
    """What a caller of a training hands on to :func:`train`."""

    checkpoint: Path | None
    progress: str | None


def learning_rate(schedule: Schedule, done: float) -> float:
    """Linear warm-up over the first tenth, then a cosine to zero; ``done`` in [0, 1]."""
    return schedule.lr * min(1.0, (done + 1e-3) / 0.1) * 0.5 * (1 + math.cos(math.pi * done))


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
) -> list[dict[str, float]]:
    """Trains ``module`` in place.

    All randomness of an epoch is drawn from (seed, epoch), so a run that was killed and started
    again from its last checkpoint ends with the same numbers.

    Args:
        module: holds every parameter that is trained.
        step: (rows [b], generator) -> (loss, metrics); called once a batch.
        rows: what to draw batches from.
        schedule: epochs, batch size, learning rate, weight decay.
        seed: of batches and views; initialise the module before.
        checkpoint: file to resume from and save to; removed by the caller when the result is safe.
        on_epoch: called with the epoch's number before its first step; what it returns is logged.
        progress: title of the progress bar; None hides it.

    Returns:
        One row an epoch: the mean of every logged number.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    optimiser = torch.optim.AdamW(module.parameters(), lr=schedule.lr, weight_decay=schedule.weight_decay, fused=True)
    history: list[dict[str, float]] = []
    if checkpoint is not None and checkpoint.exists():
        state = load_checkpoint(checkpoint)
        module.load_state_dict(state["module"])
        optimiser.load_state_dict(state["optimiser"])
        history = state["history"]
    per_epoch = max(schedule.min_steps, len(rows) // schedule.batch)
    batch = min(schedule.batch, len(rows))
    passes = math.ceil(per_epoch * batch / len(rows))
    total = per_epoch * schedule.epochs
    saved = time.monotonic()
    bar = tqdm(range(schedule.epochs), initial=len(history), desc=progress, disable=progress is None, unit="epoch")
    for epoch in range(len(history), schedule.epochs):
        torch.manual_seed(seed * 100_003 + epoch)
        rng = Generator().manual_seed(seed * 100_003 + epoch)
        logged: dict[str, list[Tensor | float]] = defaultdict(list)
        extra = on_epoch(epoch) if on_epoch else {}
        order = torch.cat([rows[torch.randperm(len(rows), generator=rng)] for _ in range(passes)])
        module.train()
        for i in range(per_epoch):
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(schedule, (epoch * per_epoch + i) / total)
            loss, metrics = step(order[i * batch : (i + 1) * batch], rng)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            for key, value in {"loss": loss, **metrics}.items():
                logged[key].append(value.detach() if isinstance(value, Tensor) else value)
        row = {key: float(torch.as_tensor([float(v) for v in values]).mean()) for key, values in logged.items()}
        if not math.isfinite(row["loss"]):
            raise FloatingPointError(f"{progress or 'training'}: the loss is {row['loss']} in epoch {epoch}; lower the learning rate")
        history.append({"epoch": epoch, **row, **extra})
        bar.update()
        bar.set_postfix(loss=f"{row['loss']:.3f}")
        if checkpoint is not None and time.monotonic() - saved > SAVE_EVERY_S:
            save_checkpoint(checkpoint, {"module": module.state_dict(), "optimiser": optimiser.state_dict(), "history": history})
            saved = time.monotonic()
    bar.close()
    module.eval()
    return history

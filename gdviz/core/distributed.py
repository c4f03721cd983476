"""Ranks: the processes that ``torchrun`` or ``accelerate launch`` starts, which train one network together.

A batch is dealt out like cards: rank r of w takes clips r, r + w, r + 2w, ... What a pretext task does
with the first half of a batch it then does with the first half of every part, and :func:`gather` has
the order of the batch back. With one process every function here changes nothing.
"""

from __future__ import annotations

import atexit
import os
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from jaxtyping import Float
from torch import Generator, Tensor
from torch.overrides import TorchFunctionMode

from gdviz.core.files import UserError

T = TypeVar("T")


def start(*, cpu: bool) -> None:
    """Meets the other ranks, if there are any; on a GPU this process takes the one of its number."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Others wait while the first one reads videos; that a rank has died is for the launcher to see.
        PartialState(cpu=cpu, timeout=timedelta(days=1))
        atexit.register(_part)


def _part() -> None:
    """A process that ends with its group alive may be aborted by gloo's threads: one in two was, on a busy machine."""
    if (
        dist.is_initialized() and dist.get_backend() == "gloo"
    ):  # NCCL's end may wait for ranks that wait for this one
        dist.destroy_process_group()


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def first() -> bool:
    """The rank that writes files and shows progress."""
    return rank() == 0


def agreed(value: T) -> T:
    """What the first rank says; the others wait for it."""
    said = [value]
    if world() > 1:
        dist.broadcast_object_list(said)
    return said[0]


def deal(rows: Tensor) -> Tensor:
    """This rank's part of a batch.

    Raises:
        UserError: the parts would differ in size, and their mean losses would not average to the batch's.
    """
    if len(rows) % world():
        raise UserError(
            f"{len(rows)} clips cannot be dealt out evenly to {world()} processes; choose another batch or number of processes"
        )
    return rows[rank() :: world()]


class _Dealt(TorchFunctionMode):
    """Random draws for this rank's clips (first axis) are this rank's part of the draws for all clips."""

    def __init__(self, rng: Generator) -> None:
        super().__init__()
        self.rng = rng

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if (
            func not in (torch.rand, torch.randn, torch.randint)
            or kwargs.get("generator") is not self.rng
        ):
            return func(*args, **kwargs)
        *bounds, size = args if isinstance(args[-1], tuple) else (args,)
        return func(*bounds, (size[0] * world(), *size[1:]), **kwargs)[rank() :: world()]


def dealt(rng: Generator) -> AbstractContextManager[Any]:
    """Within, views of this rank's clips draw from ``rng`` what one process would have drawn for them in the whole batch."""
    return _Dealt(rng) if world() > 1 else nullcontext()


class _Gather(torch.autograd.Function):
    """``torch.distributed.nn.functional.all_gather``, which newer PyTorch is about to drop, on every backend."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world())]
        dist.all_gather(parts, x.contiguous())
        return torch.stack(parts, 1).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad[rank() :: world()]


def gather(x: Float[Tensor, "part ..."]) -> Float[Tensor, "batch ..."]:
    """All parts of a batch in its order, differentiable: the gradient of a part is the sum of what all ranks say of it.

    A loss of the whole batch that every rank computes is thus counted once a rank; the average over
    ranks that data parallelism takes of gradients afterwards makes it once again.
    """
    return _Gather.apply(x) if world() > 1 else x


def mean(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """Numbers of this rank, averaged over ranks."""
    if world() == 1 or not values:
        return values
    numbers = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(numbers)
    return dict(zip(values, (numbers / world()).tolist(), strict=True))


class Notice:
    """Largest number that a rank has told, known to all one call later: to wait for it would let a GPU run dry."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.pending = device, None

    def __call__(self, told: int) -> int:
        if world() == 1:
            return told
        known, self.pending = self.pending, torch.tensor(told, device=self.device)
        dist.all_reduce(self.pending, dist.ReduceOp.MAX)
        return 0 if known is None else int(known)

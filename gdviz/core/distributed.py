"""The processes that ``torchrun`` starts, which train one network together.

A batch is dealt out like cards: rank r of w takes clips r, r + w, r + 2w, ..., and :func:`gather`
restores the order of the batch. With one process nothing here changes anything.
"""

from __future__ import annotations

import atexit
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Generator, Tensor, nn

from gdviz.core.files import UserError


def start(*, cpu: bool) -> None:
    """Meet the other ranks, if there are any; on GPUs this process takes the one of its number."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    # Imported later, by optimisers, its default arguments would keep the group alive for ever.
    import torch.distributed.nn.functional

    if not cpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Ranks wait while the first one reads videos; the launcher notices when one has died.
    dist.init_process_group("gloo" if cpu else "nccl", timeout=timedelta(days=1))
    if cpu:
        # A process that ends with its group alive may be aborted by gloo's threads: one in two was.
        # The end of NCCL may wait for ranks that wait for this one.
        atexit.register(dist.destroy_process_group)


def world() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this rank, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def first() -> bool:
    """Return whether this is the rank that writes files and shows progress."""
    return rank() == 0


def collect(value: Any) -> list[Any]:
    """Return the values of all ranks, which wait for each other."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


def agreed(value: Any) -> Any:
    """Return the first rank's value."""
    return collect(value)[0]


def synchronise(module: nn.Module) -> None:
    """Give every rank the first one's parameters and buffers."""
    if world() > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), 0)


def deal(rows: Tensor) -> Tensor:
    """Return this rank's part of a batch; raise UserError if it cannot be dealt out evenly."""
    if len(rows) % world():
        problem = f"{len(rows)} clips cannot be dealt out evenly to {world()} processes"
        raise UserError(f"{problem}; choose another batch or number of processes")
    return rows[rank() :: world()]


def own_generator(rng: Generator) -> Generator:
    """Return a generator of this rank; it is seeded by ``rng``, which stays alike on all ranks."""
    if world() == 1:
        return rng
    return Generator().manual_seed(int(torch.randint(2**31, (), generator=rng)) + rank())


class _Gather(torch.autograd.Function):
    """Do as ``torch.distributed.nn.functional.all_gather``, which newer PyTorch deprecates."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(world())]
        dist.all_gather(parts, x)
        return torch.stack(parts, 1).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad[rank() :: world()]


def gather(x: Float[Tensor, "part ..."]) -> Float[Tensor, "batch ..."]:
    """Return the batch in its order; the gradient of a part is the sum of all ranks' gradients.

    The batch's loss, which every rank computes, counts once after :func:`average_gradients`.
    """
    return _Gather.apply(x) if world() > 1 else x


def average_gradients(module: nn.Module) -> None:
    """Replace gradients by their means over ranks; where only some have one, others count as 0."""
    if world() == 1:
        return
    trained = [p for p in module.parameters() if p.requires_grad]
    for dtype in dict.fromkeys(p.dtype for p in trained):
        some = [p for p in trained if p.dtype == dtype]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in some]
        present = grads[0].new_tensor([p.grad is not None for p in some])
        flat = torch.cat([grad.flatten() for grad in (*grads, present)]) / world()
        dist.all_reduce(flat)
        *means, shares = flat.split([p.numel() for p in some] + [len(some)])
        for p, grad, mean, share in zip(some, grads, means, shares, strict=True):
            if p.grad is not None or share > 0:
                # In its own memory format: a fused optimiser looks at the memory only.
                p.grad = grad.copy_(mean.view_as(grad))


def mean(values: dict[str, float]) -> dict[str, float]:
    """Return numbers averaged over ranks."""
    ranks = collect(values)
    return {name: sum(other[name] for other in ranks) / world() for name in values}


class Notice:
    """Tells every rank the largest number that any of them gave, one call later.

    Waiting for the answer would idle a GPU. A single rank hears its own number at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.pending = device, None

    def __call__(self, number: int) -> int:
        if world() == 1:
            return number
        known, self.pending = self.pending, torch.tensor(number, device=self.device)
        dist.all_reduce(self.pending, dist.ReduceOp.MAX)
        return 0 if known is None else int(known)

"""What test_distributed.py has done by one process and by two, in float64."""

import os
import signal
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from gdviz.config import Schedule
from gdviz.core import distributed
from gdviz.core.files import UserError
from gdviz.core.loop import Bookkeeping, Step, train
from gdviz.core.processes import Stopped
from gdviz.graphs import LogitsGraph, RepresentationGraph, zero_one_cost

PLAN = Schedule(epochs=6, batch=8, lr=1e-2)
ROWS = torch.arange(24)


def graph_losses() -> dict[str, Tensor]:
    """Values and gradients, of features and of a module with parameters."""
    rng = torch.Generator().manual_seed(0)
    z, h = torch.randn(8, 5, generator=rng), torch.randn(8, 6, generator=rng)
    probs = torch.randn(8, 3, 5, generator=rng).softmax(-1)
    logits_graph = LogitsGraph("abc", zero_one_cost(5).double(), tol=1e-12)
    torch.manual_seed(1)
    graph = RepresentationGraph("abc", [4, 5, 6], 6)
    features = [torch.randn(8, d, generator=rng) for d in (4, 5, 6)]
    losses = {
        "logits": (z, lambda x: logits_graph.loss(x, probs, torch.ones(8, 3) / 3)),
        "repr": (h, lambda x: graph.loss(x, features, probs[:, 0], torch.ones(3) / 3)),
    }
    found = {}
    for name, (x, loss) in losses.items():
        own = distributed.deal(x).clone().requires_grad_()
        found[name] = loss(distributed.gather(own))
        found[name].backward()
        found[f"{name}, gradient"] = distributed.gather(own.grad) / distributed.world()
    distributed.average_gradients(graph)
    found |= {f"adapter {k}": adapter.weight.grad for k, adapter in enumerate(graph.adapters)}
    return {name: value.detach() for name, value in found.items()}


def gradients() -> dict[str, Tensor | None]:
    """Of parameters that both ranks use, that one uses, that none uses, and of another dtype."""
    names = ("both", "one", "none", "frozen")
    module = nn.ParameterDict({name: nn.Parameter(torch.ones(3)) for name in names})
    module["short"] = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    module["frozen"].requires_grad_(False)
    number = distributed.rank() + 1.0
    loss = (number * module["both"]).sum() + (number * module["short"]).sum()
    if distributed.rank() == 0:
        loss = loss + 4 * module["one"].sum()
    loss.backward()
    distributed.average_gradients(module)
    return {name: parameter.grad for name, parameter in module.items()}


def draws() -> dict[str, Tensor]:
    """Of each rank, and what the shared generator draws afterwards."""
    rng = torch.Generator().manual_seed(3)
    own = torch.rand(4, generator=distributed.own_generator(rng))
    return {"own": own, "shared": torch.rand(4, generator=rng)}


def problem(*, views: bool, norm: bool) -> tuple[nn.Module, Step]:
    """A network that learns to tell the mean of a clip, from its noisy views if asked to."""
    rng = torch.Generator().manual_seed(2)
    clips = torch.randn(24, 3, 4, 6, 6, generator=rng) + torch.randn(24, 1, 1, 1, 1, generator=rng)
    torch.manual_seed(7 + distributed.rank())  # ranks need not begin alike
    layers = [nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4) if norm else nn.Tanh(), nn.Flatten()]
    module = nn.Sequential(*layers, nn.Linear(4 * 2 * 4 * 4, 1))
    module.to(memory_format=torch.channels_last_3d)  # as the backbones' weights are

    def step(rows, rng, epoch):
        own = distributed.deal(rows)
        x, target = clips[own], clips[own].flatten(1).mean(1, keepdim=True)
        if views:
            x = x + 0.3 * torch.randn(x.shape, generator=distributed.own_generator(rng))
        estimate = distributed.gather(module(x))
        return (estimate - distributed.gather(target)).square().mean(), {"x": float(x.mean())}

    return module, step


def trainings(folder: Path) -> dict[str, object]:
    """Histories and states of several kinds of training."""
    everything = replace(PLAN, clip=0.5, ema=0.5, accumulate=2)
    kinds = {
        "plain": (PLAN, {"views": False, "norm": False}),
        "everything": (everything, {"views": False, "norm": False}),
        "views": (everything, {"views": True, "norm": False}),
        "norm": (PLAN, {"views": True, "norm": True}),
    }
    found = {}
    for name, (plan, how) in kinds.items():
        module, step = problem(**how)
        history = train(module, step, ROWS, plan, seed=0)
        found[name] = {"history": history, "state": module.state_dict()}
    found["stopped"] = stopped(folder, everything)
    return found


def stopped(folder: Path, plan: Schedule) -> dict[str, object]:
    """Train "views" again; the last rank alone is asked to stop, and all go on later."""
    keep = Bookkeeping(folder / "x.ckpt")
    module, step = problem(views=True, norm=False)
    calls = []

    def asked(*how):
        calls.append(how)
        if len(calls) == 9 and distributed.rank() == distributed.world() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*how)

    with suppress(Stopped):
        train(module, asked, ROWS, plan, seed=0, keep=keep)
    assert 10 <= len(calls) <= 12  # another step, until all know
    module, step = problem(views=True, norm=False)
    history = train(module, step, ROWS, plan, seed=0, keep=keep)
    return {"history": history, "state": module.state_dict()}


def uneven() -> str:
    try:
        return str(distributed.deal(torch.arange(7)))
    except UserError as error:
        return str(error)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    distributed.start(cpu=True)
    notice = distributed.Notice(torch.device("cpu"))
    found = {
        "losses": graph_losses(),
        "gradients": gradients(),
        "draws": draws(),
        "trainings": trainings(Path(sys.argv[1]) / str(distributed.world())),
        "notices": [notice(number * distributed.rank()) for number in (1, 5, 2)],
        "agreed": distributed.agreed({"rank": distributed.rank()}),
        "mean": distributed.mean({"rank": float(distributed.rank())}),
        "uneven": uneven(),
    }
    torch.save(found, f"{sys.argv[1]}/{distributed.world()}-{distributed.rank()}.pt")

"""What test_ranks.py has done by one process and by two: in float64, with networks without batch norm."""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from conftest import memory_set
from torch import nn

from gdviz.config import Distillation, Edges, Schedule, Teachers, View
from gdviz.core import distributed as ranks
from gdviz.graphs import LogitsGraph, RepresentationGraph, zero_one_cost
from gdviz.student import distill
from gdviz.student.edges import learn_edges
from gdviz.teachers.backbones import Backbone
from gdviz.teachers.bank import build_graphs, gather
from gdviz.teachers.fit import fit as teachers
from gdviz.teachers.own import TappedBackbone
from gdviz.teachers.pretext import TASKS
from gdviz.teachers.readout import open_clips

TASKS_SEEN = ("order", "coherence", "registration", "pace", "prediction")


class Double(nn.Module):
    def forward(self, x):
        return x.double()


def backbone(name: str) -> Backbone:
    return Backbone(
        nn.Sequential(Double(), nn.Conv3d(3, 6, 3, 2, 1), nn.Tanh(), nn.Conv3d(6, 6, 3, 1, 1)), 6
    )


def graph_losses() -> dict[str, torch.Tensor]:
    """Values and gradients, averaged over ranks as data parallelism does."""
    rng = torch.Generator().manual_seed(0)
    z, h = torch.randn(8, 5, generator=rng), torch.randn(8, 6, generator=rng)
    probs = torch.randn(8, 3, 5, generator=rng).softmax(-1)
    logits_graph = LogitsGraph("abc", zero_one_cost(5).double(), tol=1e-12)
    torch.manual_seed(1)
    graph = RepresentationGraph("abc", [4, 5, 6], 6)
    shown = [torch.randn(8, d, generator=rng) for d in (4, 5, 6)]
    losses = {
        "logits": (z, lambda x: logits_graph.loss(x, probs, torch.ones(8, 3) / 3)),
        "repr": (h, lambda x: graph.loss(x, shown, probs[:, 0], torch.ones(3) / 3)),
    }
    found = {}
    for name, (x, loss) in losses.items():
        own = ranks.deal(x).clone().requires_grad_()
        found[name] = loss(ranks.gather(own))
        found[name].backward()
        found[f"{name}, gradient"] = ranks.gather(own.grad) / ranks.world()
    grads = {f"adapter {k}": a.weight.grad for k, a in enumerate(graph.adapters)}
    for grad in grads.values():
        if ranks.world() > 1:
            torch.distributed.all_reduce(grad)
    return {name: value.detach() for name, value in found.items()} | {
        k: g / ranks.world() for k, g in grads.items()
    }


def trainings(folder: Path) -> dict[str, object]:
    """Histories of every kind of training, and what a teacher says in the end."""
    teachers.build_backbone = distill.build_backbone = backbone
    rng = torch.Generator().manual_seed(2)
    pixels = torch.randint(256, (29, 10, 12, 12, 3), dtype=torch.uint8, generator=rng).numpy()
    splits = ["train"] * 12 + ["unlabelled"] * 12 + ["test"] * 5
    videos, view = (
        memory_set(pixels, [i % 3 for i in range(29)], splits),
        View(size=12, frames=10, length=4, stride=2),
    )
    schedule = Schedule(epochs=3, batch=8, clip=0.5, ema=0.5)
    cfg = Teachers(pretrain=schedule, fit=Schedule(epochs=2, batch=4, accumulate=2), folds=2)
    found, outputs = {}, {}
    for task in TASKS_SEEN:
        trunk, _, found[task] = teachers.pretrain(task, cfg, view, videos, seed=0)
        if task in TASKS_SEEN[:2]:
            _, outputs[task] = teachers.outputs_of(
                trunk, videos, cfg, view, seed=0, folder=folder / task
            )
            found[f"{task}, outputs"] = outputs[task].tensors()
    torch.manual_seed(0)
    net = nn.Sequential(Double(), nn.Conv3d(3, 6, 3, 2, 1), nn.Conv3d(6, 6, 1), nn.Conv3d(6, 2, 1))
    own = (TappedBackbone(net, "1", size=8, length=4, frozen=frozen) for frozen in (True, False))
    for name, teacher in zip(("frozen", "tapped"), own, strict=True):
        found[f"{name}, outputs"] = teachers.outputs_of(teacher, videos, cfg, view, seed=0)[
            1
        ].tensors()
    knowledge = gather(
        outputs,
        videos,
        tuple(open_clips(folder / task / "clips", videos, view) for task in outputs),
    )
    knowledge = replace(
        knowledge, features=[f.double() for f in knowledge.features]
    )  # read out in float32
    how = Distillation("", schedule, labelled_batch=4, edges=Edges(refreshes=2, gate_steps=2))
    edges = learn_edges(
        knowledge, *build_graphs(knowledge, 1, videos.training_rows, how), how.edges, seed=0
    )
    for method in ("labels", "both-graphs", "kd-learned", "crd", "rkd", "fitnets"):
        student, found[method] = distill.distill(
            method, knowledge, edges, videos, view, how, seed=0
        )
        found[f"{method}, balance"] = dict(student.balance.named_buffers())
    by_clip = replace(how, target="clip")
    found["both-graphs by clip"] = distill.distill(
        "both-graphs", knowledge, edges, videos, view, by_clip, seed=0
    )[1]
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    ranks.start(cpu=True)
    assert set(TASKS_SEEN) <= set(TASKS)
    found = {
        "losses": graph_losses(),
        "trainings": trainings(Path(f"{sys.argv[1]}/of-{ranks.world()}")),
        "world": ranks.world(),
    }
    torch.save(found, f"{sys.argv[1]}/{ranks.world()}-{ranks.rank()}.pt")

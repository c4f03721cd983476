"""Which rule for the edges survives bad teachers? On a finished run: two of its teachers, a constant one and a lying one.

The best and the second teacher of each seed (out of fold) stay; a constant teacher says the class
frequencies, a lying one is a copy of the best with its classes permuted. Students are trained through
the logits graph under each rule; ``--seeds`` students share the run's teachers in turn.
"""

from __future__ import annotations

import argparse
import csv
import sys
from dataclasses import replace
from functools import partial
from statistics import mean, stdev

import torch
from torch import Generator, Tensor

from gdviz.artefacts import load_tensors
from gdviz.distill import distill
from gdviz.edges import Edges, learn_edges
from gdviz.evaluate import accuracy
from gdviz.graphs import entropic, entropy_based, gated, uniform
from gdviz.knowledge import Knowledge, build_graphs, ground_cost
from gdviz.parallel import over_processes
from gdviz.run import Run, open_run
from gdviz.teachers import predict

RULES = ("uniform", "learned (default)", "entropic", "gated", "entropy-based", "trained on the loss")


def with_bad_teachers(knowledge: Knowledge, seed: int) -> Knowledge:
    known = knowledge.labels >= 0
    right = (knowledge.logits[known].argmax(-1) == knowledge.labels[known, None]).float().mean(0)
    good, fair = right.argsort(descending=True)[:2].tolist()
    best, classes = knowledge.logits[:, good], knowledge.logits.shape[-1]
    lies = torch.randperm(classes, generator=Generator().manual_seed(seed)).roll(1)
    constant = torch.log(knowledge.labels[known].bincount(minlength=classes) / known.sum()).expand_as(best)
    keep = [good, fair, good, good]
    return replace(
        knowledge,
        teachers=("good", "fair", "constant", "lying"),
        logits=torch.stack([best, knowledge.logits[:, fair], constant, best[:, lies]], 1),
        features=[knowledge.features[k] for k in keep],
        held_features=[knowledge.held_features[k] for k in keep],
    )


def trained_on_the_loss(probs: Tensor, features: Tensor, steps: int = 500) -> Tensor:
    """Softmax weights that descend the distillation loss together with a linear student: kept to show why not."""
    scores = torch.zeros(probs.shape[1], requires_grad=True)
    student = torch.nn.Linear(features.shape[1], probs.shape[2])
    optimiser = torch.optim.Adam([scores, *student.parameters()], lr=0.05)
    for _ in range(steps):
        log_q = torch.log_softmax(student(features), 1)[:, None]
        loss = (torch.softmax(scores, 0) * (torch.xlogy(probs, probs) - probs * log_q).sum(-1)).sum(1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return torch.softmax(scores.detach(), 0).expand(len(probs), -1)


def measure(run: Run, seed: int, rule: str) -> tuple[str, list[float], float, float]:
    """Rule, mean weights, accuracy of the mixture and of a student."""
    teachers_of, videos, cfg = run.profile.seeds[seed % len(run.profile.seeds)], run.videos(), run.profile.distillation
    knowledge = with_bad_teachers(run.knowledge(teachers_of, videos), seed)
    probs, labels = knowledge.probs(), knowledge.labels
    graphs = build_graphs(knowledge, 1, videos.training_rows, cfg)
    edges = learn_edges(knowledge, *graphs, cfg.edges, seed=seed)
    if rule != "learned (default)":
        cost = ground_cost(knowledge, cfg.cost_shrink)
        if rule == "trained on the loss":
            torch.manual_seed(seed)
            weights = trained_on_the_loss(
                probs, load_tensors(run.student_folder(teachers_of, "labels") / "outputs.safetensors")["features"].float()
            )
        else:
            policy = {
                "uniform": uniform, "entropy-based": entropy_based,
                "entropic": partial(entropic, cost=cost, eta=cfg.edges.eta), "gated": partial(gated, cost=cost, eta=cfg.edges.eta),
            }[rule]  # fmt: skip
            weights = policy(probs, labels).detach()
        consensus = graphs[0].consensus(knowledge.probs(cfg.temperature), weights)
        edges = Edges(weights[None], consensus[None], edges.pairs[-1:])
    test = videos.rows("test")
    final = edges.teachers[-1]
    student, _ = distill("logits-graph", knowledge, edges, videos, run.profile.view, cfg, seed=seed)
    logits, _ = predict(student.classifier, videos, test, run.profile.view)
    mixture = (final[..., None] * probs).sum(1)[test]
    return rule, final[videos.training_rows].mean(0).tolist(), accuracy(mixture, videos.labels[test]), accuracy(logits, videos.labels[test])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="folder of a finished run, such as runs/smoke")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    run = open_run(given.run)
    jobs = [(seed, rule) for rule in RULES for seed in range(given.seeds)]
    rows = over_processes(partial(measure, run), jobs, given.workers, title="students")
    out = csv.writer(sys.stdout, delimiter="\t")
    out.writerow(["rule", "good", "fair", "constant", "lying", "bad together", "mixture", "student", "± over seeds"])
    for rule in RULES:
        of = [row for row in rows if row[0] == rule]
        weights = [mean(row[1][k] for row in of) for k in range(4)]
        students = [100 * row[3] for row in of]
        out.writerow([
            rule, *(f"{w:.2f}" for w in weights), f"{weights[2] + weights[3]:.2f}", f"{100 * mean(row[2] for row in of):.1f}",
            f"{mean(students):.1f}", f"{stdev(students) if len(students) > 1 else 0:.1f}",
        ])  # fmt: skip


if __name__ == "__main__":
    main()

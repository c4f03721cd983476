"""Which rule for the edges survives bad teachers? On a finished run: two of its teachers, a
constant one and a lying one.

The best and the second teacher of each seed (out of fold) stay; a constant teacher says the class
frequencies, a lying one is a copy of the best that swears every class is another. Students are
trained by plain distillation from the teachers as each rule weighs them; they share the run's
teachers in turn, the liar's permutation and the student's own seed differ. ``learned`` is what a
run does: the edges of the logits graph over a training. Every student is a line of ``--out`` once
it is done; started again, it goes on.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Generator

from gdviz.core.processes import over_processes
from gdviz.data.videos import VideoSet
from gdviz.experiment.folder import Run, open_run
from gdviz.experiment.metrics import accuracy
from gdviz.student.distill import distill
from gdviz.student.edges import Graphs, build_graphs, learn_edges
from gdviz.student.methods import Batch, Setting, find_method
from gdviz.student.weighting import FOLLOW_STUDENT, POLICIES
from gdviz.teachers.bank import Bank, predict

RULES = ("learned", *POLICIES)
TEACHERS = ("good", "fair", "constant", "lying")


def with_bad_teachers(bank: Bank, seed: int) -> Bank:
    """``TEACHERS``; the liar's permutation has no fixed point, or it would tell some truth."""
    known, classes = bank.labels >= 0, bank.logits.shape[-1]
    right = (bank.logits[known].argmax(-1) == bank.labels[known, None]).float().mean(0)
    good, fair = right.argsort(descending=True)[:2].tolist()
    best = bank.logits[:, good]
    cycle = torch.randperm(classes, generator=Generator().manual_seed(seed))
    lies = torch.empty_like(cycle).scatter(0, cycle, cycle.roll(1))
    shares = bank.labels[known].bincount(minlength=classes) / known.sum()
    logits = [best, bank.logits[:, fair], torch.log(shares).expand_as(best), best[:, lies]]
    readouts = tuple(bank.readouts[k] for k in (good, fair, good, good))
    return replace(bank, teachers=TEACHERS, logits=torch.stack(logits, 1), readouts=readouts)


@lru_cache(1)
def setting(run: Run, seed: int) -> tuple[VideoSet, Bank, Graphs]:
    videos, cfg = run.videos(), run.profile.distillation
    seeds = run.profile.seeds
    bank = with_bad_teachers(run.bank(seeds[seed % len(seeds)], videos), seed)
    both = build_graphs(bank, videos.training_rows, cfg)
    return videos, bank, Graphs(*both, learn_edges(bank, *both, cfg.edges, seed=seed))


def measure(run: Run, out: Path | None, seed: int, rule: str) -> list[float | str]:
    """Rule, seed, epochs, mean weights on training clips at the end, test accuracy of the weighted
    mixture and of a student (in %).

    Without epochs no student is trained, and rules that follow one are left out.
    """
    (videos, bank, graphs), cfg = setting(run, seed), run.profile.distillation
    every, test, share = torch.arange(len(videos.splits)), videos.rows("test"), float("nan")
    logits = torch.zeros(len(every), bank.logits.shape[-1])
    if cfg.schedule.epochs:
        args = bank, graphs, videos, run.profile.view, cfg
        trained, _ = distill(f"kd-{rule}", *args, seed=seed)
        logits = predict(trained.classifier, videos, every, run.profile.view)[0].mean(1)
        share = 100 * accuracy(logits[test], videos.labels[test])
    method = find_method(f"kd-{rule}", TEACHERS)(
        Setting(bank, graphs, cfg, videos.training_rows, 1)
    )
    batch = Batch(every, None, logits, torch.zeros(len(every), 1), Generator())
    weights = method.weights(batch, bank, graphs.edges, -1)
    mixture = (weights[..., None] * bank.probs()).sum(1)[test]
    mean_weights = weights[videos.training_rows].mean(0).tolist()
    right = 100 * accuracy(mixture, videos.labels[test])
    row = [rule, seed, cfg.schedule.epochs, *mean_weights, right, share]
    if out:
        with open(out, "a", newline="") as file:
            csv.writer(file).writerow(row)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="folder of a finished run, such as runs/smoke")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument(
        "--epochs",
        type=int,
        help="of a student's training; as in the run by default, 0: weights only",
    )
    parser.add_argument("--rules", nargs="+", default=RULES, choices=RULES)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, help="CSV of single students, to stop and go on")
    given = parser.parse_args()
    run = open_run(given.run)
    cfg = run.profile.distillation
    epochs = cfg.schedule.epochs if given.epochs is None else given.epochs
    run = replace(
        run,
        profile=replace(
            run.profile, distillation=replace(cfg, schedule=replace(cfg.schedule, epochs=epochs))
        ),
    )
    rules = [rule for rule in given.rules if epochs or rule not in FOLLOW_STUDENT]
    wanted = [(seed, rule) for seed in range(given.seeds) for rule in rules]
    lines = csv.reader(
        given.out.read_text().splitlines() if given.out and given.out.exists() else []
    )
    found = {
        (int(seed), rule): list(map(float, rest))
        for rule, seed, of, *rest in lines
        if int(of) == epochs
    }
    left = [job for job in wanted if job not in found]
    for rule, seed, _, *rest in over_processes(
        partial(measure, run, given.out), left, given.workers, title="students"
    ):
        found[seed, rule] = rest
    print(
        "rule",
        *TEACHERS,
        "bad together (most)",
        "mixture",
        "student ± over seeds",
        f"minus {rules[0]} ± standard error",
        sep=" | ",
    )
    for rule in rules:
        *weights, mixtures, students = zip(
            *(found[seed, rule] for seed in range(given.seeds)), strict=True
        )
        bad = [a + b for a, b in zip(*weights[2:], strict=True)]
        cells = [
            rule,
            *(f"{mean(w):.2f}" for w in weights),
            f"{mean(bad):.2f} ({max(bad):.2f})",
            f"{mean(mixtures):.1f}",
        ]
        if epochs:
            spread = stdev if given.seeds > 1 else lambda _: 0.0
            apart = [x - found[seed, rules[0]][-1] for seed, x in enumerate(students)]
            cells += [
                f"{mean(students):.1f} ± {spread(students):.1f}",
                f"{mean(apart):+.1f} ± {spread(apart) / len(apart) ** 0.5:.1f}",
            ]
        print(*cells, sep=" | ")


if __name__ == "__main__":
    main()

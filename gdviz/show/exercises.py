"""Checks of the notebooks' exercises: ``check_*(answer, ...)``, one a question.

A check prints "right" or raises :class:`NotYet`. What is right is computed here, from what the
notebook hands over after the answer; hints stand in the notebooks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from gdviz import graphs
from gdviz.experiment.bench import footprint
from gdviz.experiment.statistics import holm
from gdviz.graphs import kernels
from gdviz.teachers.bank import Bank


class NotYet(AssertionError):
    """An answer that does not pass. Jupyter shows its line in place of a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [f"not yet: {self}"]


def _is_number(x: Any) -> bool:
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu().numpy()
    single = isinstance(x, int | float | np.ndarray | np.number) and np.size(x) == 1
    return single and np.asarray(x).dtype.kind in "iuf"


KINDS: dict[str, Callable[[Any], bool]] = {
    "number": _is_number,
    "whole number": lambda x: _is_number(x) and float(x).is_integer(),
    "function": callable,
    "set of names": lambda x: isinstance(x, set) and all(isinstance(name, str) for name in x),
}


@dataclass(frozen=True)
class Check:
    """A check: the kind of answer, and whether one is right, given what is handed over with it."""

    kind: str  # of KINDS
    right: Callable[..., Any]

    def __call__(self, answer: Any, *given: Any) -> None:
        if answer is ...:
            raise NotYet(f"put a {self.kind} in the place of the dots")
        if not KINDS[self.kind](answer):
            raise NotYet(f"wanted is a {self.kind}, not a {type(answer).__name__}")
        try:
            right = bool(self.right(answer, *given))
        except Exception as error:  # of the reader's own function
            raise NotYet(f"the answer raised {type(error).__name__}: {error}") from None
        if not right:
            raise NotYet("this is not right; there is a hint below")
        print("right")


def _near(x: Any, truth: Any, within: float = 1e-4) -> bool:
    return abs(float(x) - float(truth)) <= within


def _gflops(net: torch.nn.Module, view: Any, length: int) -> float:
    return footprint(net, replace(view, length=length), repeats=1)["gflops"]


def _rightly(bank: Bank) -> torch.Tensor:
    known = bank.labels >= 0
    return (bank.probs()[known].mean(1).argmax(1) == bank.labels[known]).float().mean()


Y = torch.arange(24) % 6  # labels of 24 clips
MIRRORED = {"left", "right", "clockwise", "anticlockwise"}
P, Q, W = (torch.tensor(p) for p in ((0.6, 0.3, 0.1), (0.1, 0.3, 0.6), (0.7, 0.1, 0.1, 0.1)))
C, PRIOR = torch.tensor([[0.2, 0.1, -0.1]]), torch.tensor([0.5, 0.3, 0.2]).log()
WEIGHTS = graphs.closed_form(C, eta=0.3, log_prior=PRIOR, floor=0.0)

check_effective_number = Check("number", lambda x: _near(x, graphs.effective_number(W), 0.01))
check_gap = Check("number", lambda x, ours, control: _near(x, 100 * (ours - control).mean(), 0.05))
check_span = Check("function", lambda f: (f(1, 1), f(8, 1), f(8, 3), f(16, 2)) == (1, 8, 22, 31))
check_flip = Check("set of names", MIRRORED.__eq__)
check_reversal = Check("set of names", (MIRRORED | {"up", "down", "grow", "shrink"}).__eq__)
check_folds = Check("function", lambda f: (torch.bincount(3 * Y + f(Y, 3), minlength=18) > 0).all())
check_winner = Check("whole number", lambda x: x == 0)
check_zero_one = Check("function", lambda f: _near(f(P, Q), 0.5) and _near(f(P, P), 0))
check_closed_form = Check("function", lambda f: torch.allclose(f(C, PRIOR, 0.3), WEIGHTS))
check_half = Check("number", lambda x, number_at, half: _near(number_at(float(x)), half, 0.05))
check_size = Check("whole number", lambda m, error: int(m).bit_count() == 1 and error(m) <= 0.1)
check_mmd = Check("function", lambda f, *k: _near(f(*k), kernels.mmd2(*k), 1e-5))
check_linear = Check("number", lambda x, *grams: _near(x, kernels.mmd2(*grams, biased=True)))
check_ramp = Check("whole number", lambda epoch: epoch == 3)
check_shuffled = Check(
    "number", lambda x, b, rows, seed: _near(x, _rightly(b.shuffled(rows, seed)))
)
check_flops = Check("whole number", lambda n, gflops: _near(n, gflops * 1e9, 0.5))
check_longer = Check(
    "number",
    lambda x, net, v: _near(x, _gflops(net, v, 2 * v.length) / _gflops(net, v, v.length), 0.01),
)
check_group = Check("function", lambda f: f("kitchen_cam2_0007.mp4") == "kitchen_cam2")
check_chance = Check("number", lambda x, y: _near(x, y.bincount().max() / len(y)))
check_draws = Check("function", lambda f: (f(0.05, 1), f(0.05, 14), f(0.01, 1)) == (6, 10, 8))
check_holm = Check(
    "function", lambda f: all(np.allclose(f(p), holm(p)) for p in ([0.04, 0.01, 0.03], [0.2, 0.9]))
)
check_closed = Check(
    "number", lambda x, low, found, high: _near(x, (found - low) / (high - low), 0.005)
)
check_abroad = Check("number", lambda x, w, home: _near(x, (w * (1 - home)).sum(1).mean(), 1e-3))

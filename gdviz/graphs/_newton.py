"""Newton's method for entropic transport, for problems on which Sinkhorn's iteration is slow."""

from collections.abc import Callable

import torch
from torch import Tensor

LONGEST = 10.0  # step, in units of eps
ATTEMPTS = 6  # at a step, each 0.3 times the one before


def newton(
    a: Tensor, b: Tensor, log_kernel: Tensor, log_v: Tensor, tol: float, steps: int
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Ascend the semi-dual in ``log v``, columns ``[C, N]`` (Brauer et al. 2017).

    Peaked marginals split a plan into parts that hardly exchange mass: Sinkhorn's iteration settles
    their potentials in thousands of steps, Newton in a handful, each followed by a plain iteration.
    Returns ``log u``, ``log v``, the errors, the number of steps.
    """
    a, b, v = a.mT, b.mT, log_v.mT  # (N, C)
    log_a, log_b = a.log(), b.log()

    def apply(x: Tensor) -> Tensor:
        return torch.logsumexp(log_kernel + x[:, None, :], dim=-1)

    def dual(v: Tensor) -> Tensor:
        return (b * v).sum(-1) - (a * apply(log_b + v)).sum(-1)

    taken = 0
    while True:
        u = -apply(log_b + v)
        applied = apply(log_a + u)
        excess = (applied + v).clamp(-60, 60)  # log of (column mass / b)
        error = (b * (excess.exp() - 1).abs()).sum(-1)
        if taken == steps or bool((error <= tol).all()):
            return u.mT, -applied.mT, error, taken
        # the plan over the square roots of its marginals; empty classes are empty rows and columns
        left, right = 0.5 * log_a + u, 0.5 * log_b + v - 0.5 * excess
        scaled = (left[:, :, None] + log_kernel + right[:, None, :]).exp()  # (N, C, C)
        value = (a * u).sum(-1) + (b * v).sum(-1)
        v = _ascend(dual, value, v, _direction(scaled, b, excess), otherwise=-applied)
        v = -apply(log_a - apply(log_b + v))
        taken += 1


def _direction(scaled: Tensor, b: Tensor, excess: Tensor) -> Tensor:
    """Solve ``(I - S^T S) x = gradient`` in scaled coordinates, and cap the step.

    The null vector of ``I - S^T S`` is the root of the column masses: potentials are free up to a
    constant. Without the cap parts that exchange less than a rounding make the step endless.
    """
    root = (b * excess.exp()).sqrt()
    eye = torch.eye(b.shape[-1], dtype=b.dtype, device=b.device)
    system = (1 + 1e-13) * eye - scaled.mT @ scaled + root[:, :, None] * root[:, None, :]
    target = b.sqrt() * (-0.5 * excess).exp() * (1 - excess.exp())
    step = torch.linalg.solve(system, target) / root.clamp(min=1e-30)
    step = torch.where(b > 0, step, 0.0)
    return step * (LONGEST / step.abs().amax(-1, keepdim=True).clamp(min=LONGEST))


def _ascend(
    dual: Callable[[Tensor], Tensor], value: Tensor, v: Tensor, step: Tensor, otherwise: Tensor
) -> Tensor:
    """Shorten the step until the dual does not fall; return ``otherwise`` where it still does."""
    size = torch.ones_like(value)
    for _ in range(ATTEMPTS):
        trial = v + size[:, None] * step
        worse = ~(dual(trial) >= value - 1e-14)
        if not bool(worse.any()):
            break
        size = torch.where(worse, 0.3 * size, size)
    return torch.where(worse[:, None], otherwise, trial)

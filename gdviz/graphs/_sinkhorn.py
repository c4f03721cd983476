"""Solvers behind ``transport``: batches of transport problems that share one ground cost.

All problems are the columns of one ``[C, N]`` matrix, so a half-iteration is one product with the
kernel ``exp(-D / eps)``. float32 holds that kernel up to ``max(D) / eps`` of about 40, float64 up to
300; beyond, problems are solved by Newton's method in the log domain, from larger values of eps.
"""

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

CHECK_EVERY = 10  # a test of the marginals costs a plain step and, on a GPU, a synchronisation
NEWTON_AFTER = 8  # times C iterations: about what finishing a column by Newton's method costs
NEWTON_STEPS = 50
KERNEL_RANGE = {torch.float32: 40.0, torch.float64: 300.0}  # of max(D) / eps


class ConvergenceWarning(UserWarning):
    """An iteration stopped at ``max_iter`` with marginals further off than ``tol``."""


class Solved(NamedTuple):
    value: Tensor  # (*batch)
    f: Tensor  # (*batch, C)
    g: Tensor  # (*batch, C)
    error: Tensor  # (*batch)
    iterations: int
    converged: bool
    eps: float  # in the units of the cost


def double(device: torch.device) -> torch.dtype:
    """float64, which Apple's GPUs lack."""
    return torch.float32 if device.type == "mps" else torch.float64


def absolute_eps(cost: Tensor, eps: float) -> tuple[float, float]:
    """eps in the units of the cost, and ``max(D) / eps``; refuses what cannot be solved."""
    classes = cost.shape[-1]
    if cost.shape != (classes, classes):
        raise ValueError(f"cost must be a square [C, C] matrix, got {tuple(cost.shape)}")
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    if classes == 1:
        return eps, 0.0
    cost = cost.detach().to(double(cost.device))
    mean = (cost.sum() - cost.diagonal().sum()) / (classes * (classes - 1))
    mean, largest, gap = torch.stack([mean, cost.abs().max(), (cost - cost.mT).abs().max()]).tolist()
    if not (math.isfinite(largest) and mean > 0 and gap <= 1e-5 * largest):
        raise ValueError("cost must be finite, symmetric and positive off the diagonal; see check_cost")
    return eps * mean, largest / (eps * mean)


def symmetric(cost: Tensor, dtype: torch.dtype) -> Tensor:
    """The cost as a constant, symmetric to the last digit: one kernel then serves both directions."""
    cost = cost.detach().to(dtype)
    return 0.5 * (cost + cost.mT)


def precision(sharpness: float, tol: float, x: Tensor) -> tuple[torch.dtype, float]:
    """The dtype that holds the kernel, and ``tol`` or 8 of its roundings: below, an error is noise."""
    dtype = x.dtype if sharpness <= KERNEL_RANGE[torch.float32] else double(x.device)
    return dtype, max(tol, 8 * torch.finfo(dtype).eps)


def iterate(
    step: Callable[..., tuple], marginals: tuple[Tensor, ...], state: tuple[Tensor, ...], tol: float, max_iter: int
) -> tuple[list[Tensor], Tensor, int]:
    """Run ``step(marginals, state, relax)`` on columns and drop those whose error is below tol.

    The last axis of every tensor counts problems. A step returns the new state and, if not
    ``relax``, the error of each column; that is asked for every ``CHECK_EVERY`` steps.
    """
    result = [torch.empty_like(s) for s in state]
    error = state[0].new_zeros(state[0].shape[-1])
    active = torch.arange(len(error), device=error.device)
    iteration = 0
    while active.numel():
        state, current = step(marginals, state, False)
        iteration += 1
        stopped = (current <= tol) | (iteration >= max_iter)
        if bool(stopped.any()):
            index, going = active[stopped], ~stopped
            error[index] = current[stopped]
            for full, part in zip(result, state, strict=True):
                full[..., index] = part[..., stopped]
            active = active[going]
            marginals, state = tuple(m[..., going] for m in marginals), tuple(s[..., going] for s in state)
        for _ in range(min(CHECK_EVERY - 1, max_iter - 1 - iteration) if active.numel() else 0):
            state, _ = step(marginals, state, True)
            iteration += 1
    return result, error, iteration


def newton(a: Tensor, b: Tensor, log_kernel: Tensor, v: Tensor, tol: float, steps: int) -> tuple:
    """Finish columns by Newton's method on the semi-dual in ``log v`` (Brauer et al. 2017).

    Peaked marginals split a plan into parts that hardly exchange mass; Sinkhorn then needs thousands
    of iterations to settle the potentials of one part against another, Newton a handful. Ascent of
    the concave semi-dual is enforced by shortening the step; a plain iteration follows each step.

    Returns ``log u``, ``log v`` as columns, the L1 errors and the number of steps.
    """
    a, b, v = a.mT, b.mT, v.mT  # (N, C)
    log_a, log_b = a.log(), b.log()
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)

    def apply(x: Tensor) -> Tensor:
        return torch.logsumexp(log_kernel + x[:, None, :], dim=-1)

    def semi_dual(v: Tensor, u: Tensor) -> Tensor:
        return (a * u).sum(-1) + (b * v).sum(-1)

    for taken in range(steps + 1):
        u = -apply(log_b + v)
        applied = apply(log_a + u)
        ratio = (applied + v).clamp(-60, 60)  # log of (column mass / b)
        error = (b * (ratio.exp() - 1).abs()).sum(-1)
        if taken == steps or bool((error <= tol).all()):
            break
        # the plan over the square roots of its marginals; empty classes become empty rows and columns
        scaled = (0.5 * log_a + u)[:, :, None] + log_kernel + (0.5 * log_b + v - 0.5 * ratio)[:, None, :]
        scaled = scaled.exp()  # (N, C, C)
        root = (b * ratio.exp()).sqrt()
        # the null vector of I - S'S is `root`: potentials are free up to a constant
        system = (1 + 1e-13) * eye - scaled.mT @ scaled + root[:, :, None] * root[:, None, :]
        target = b.sqrt() * (-0.5 * ratio).exp() * (1 - ratio.exp())
        direction = torch.where(b > 0, torch.linalg.solve(system, target) / root.clamp(min=1e-30), 0.0)
        # parts that exchange less than a rounding make Newton's step endless: cap it (units of eps)
        direction = direction * (10 / direction.abs().amax(-1, keepdim=True).clamp(min=10))
        value, size = semi_dual(v, u), torch.ones_like(error)
        for _ in range(6):
            trial = v + size[:, None] * direction
            worse = ~(semi_dual(trial, -apply(log_b + trial)) >= value - 1e-14)
            if not bool(worse.any()):
                break
            size = torch.where(worse, 0.3 * size, size)
        v = torch.where(worse[:, None], -applied, trial)
        v = -apply(log_a - apply(log_b + v))
    return u.mT, -applied.mT, error, taken


@torch.no_grad()
def solve(a: Tensor, b: Tensor, cost: Tensor, eps: float, tol: float, max_iter: int, guess: Tensor | None = None) -> Solved:
    """Solve for normalised marginals of one shape and dtype, from a ``guess`` of ``g`` if there is one."""
    eps_abs, sharpness = absolute_eps(cost, eps)
    given, shape = a.dtype, a.shape
    dtype, tol = precision(sharpness, tol, a)
    log_kernel = symmetric(cost, dtype) / -eps_abs

    def columns(x: Tensor) -> Tensor:
        return x.detach().to(dtype).reshape(-1, shape[-1]).mT.contiguous()  # (C, N)

    def rows(x: Tensor) -> Tensor:
        return x.mT.reshape(shape).to(given)

    with torch.autocast(a.device.type, enabled=False):
        p, q = columns(a), columns(b)
        if sharpness <= KERNEL_RANGE[dtype]:
            kernel = log_kernel.exp()

            def step(marginals, state, relax):
                (p, q), (u, v) = marginals, state
                applied = kernel @ (q * v)
                # u (1 / (u applied))^1.5: over-relaxation by 1.5 without a power
                u = torch.rsqrt(u * applied) / applied if relax else 1 / applied
                applied = kernel @ (p * u)
                if relax:
                    return (u, torch.rsqrt(v * applied) / applied), None
                # rows are exact after a plain step, so the columns hold all of the error
                return (u, 1 / applied), (q * (v * applied - 1).abs()).sum(dim=0)

            start = torch.ones_like(q) if guess is None else (columns(guess) / eps_abs).exp()
            patience = min(max_iter, max(150, NEWTON_AFTER * shape[-1]))
            (u, v), error, iterations = iterate(step, (p, q), (torch.ones_like(p), start), tol, patience)
            log_u, log_v = u.log(), v.log()
        else:  # so sharp that a cold start would wander: come from a larger eps
            with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
                log_v = columns(solve(a, b, cost, 3 * eps, 1e-3, max_iter).g) / eps_abs
            log_u, error, iterations = torch.empty_like(log_v), torch.full_like(log_v[0], math.inf), 0
        slow = error > tol
        if max_iter > iterations and bool(slow.any()):
            late = [x[:, slow].to(double(a.device)) for x in (p, q, log_v)]
            steps = min(max_iter - iterations, NEWTON_STEPS)
            *ends, taken = newton(late[0], late[1], log_kernel.to(late[0]), late[2], tol, steps)
            log_u[:, slow], log_v[:, slow], error[slow] = (x.to(dtype) for x in ends)
            iterations += taken
        # the plan's columns are exact, so its mass is 1 and this is the dual value, right to second order
        f_mean, g_mean = eps_abs * (log_u * p).sum(0), eps_abs * (log_v * q).sum(0)
        shift = 0.5 * (g_mean - f_mean)  # potentials are free up to a constant: share the value evenly
        f, g = rows(eps_abs * log_u + shift), rows(eps_abs * log_v - shift)
    value, error = (x.reshape(shape[:-1]).to(given) for x in (f_mean + g_mean, error))
    return Solved(value, f, g, error, iterations, warn_unless("sinkhorn", error, tol, max_iter), eps_abs)


@torch.no_grad()
def solve_self(p: Tensor, cost: Tensor, eps: float, tol: float, max_iter: int) -> tuple[Tensor, Tensor]:
    """Value and potential of W_eps(p, p) by ``u <- sqrt(u / K (p u))`` (Feydy et al. 2019, eq. 25).

    The error halves at every step, whatever the marginal.
    """
    eps_abs, sharpness = absolute_eps(cost, eps)
    dtype, tol = precision(sharpness, tol, p)
    column = p.detach().to(dtype).reshape(-1, p.shape[-1]).mT.contiguous()  # (C, N)
    log_kernel = symmetric(cost, dtype) / -eps_abs
    with torch.autocast(p.device.type, enabled=False):
        kernel = log_kernel.exp() if sharpness <= KERNEL_RANGE[dtype] else None

        def step(marginals, state, relax):
            (p, log_p), (log_u, _) = marginals, state
            if kernel is None:
                applied = torch.logsumexp(log_kernel[:, :, None] + log_p + log_u, dim=1)
            else:
                applied = (kernel @ (p * log_u.exp())).log()
            error = None if relax else (p * (log_u + applied).expm1().abs()).sum(dim=0)
            return (0.5 * (log_u - applied), -applied), error

        zeros = torch.zeros_like(column)
        (mean, answer), error, _ = iterate(step, (column, column.log()), (zeros, zeros), tol, max_iter)
    # value = <old + answer, p>, the dual at two potentials that answer each other; mean = (old + answer) / 2
    value, potential = 2 * eps_abs * (column * mean).sum(0), eps_abs * answer
    warn_unless("sinkhorn (self term)", error, tol, max_iter)
    return value.reshape(p.shape[:-1]).to(p.dtype), potential.mT.reshape(p.shape).to(p.dtype)


def warn_unless(what: str, error: Tensor, tol: float, max_iter: int) -> bool:
    """Whether every error is at most tol; warns, once for the batch, if not."""
    converged = bool((error <= tol).all())
    if not converged:
        warnings.warn(
            f"{what}: marginal error {error.max().item():.1e} > tol {tol:.1e} within {max_iter} iterations; raise eps, tol or max_iter",
            ConvergenceWarning,
            stacklevel=4,
        )
    return converged

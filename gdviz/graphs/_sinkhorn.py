"""Solvers behind ``transport``: batches of transport problems that share one ground cost.

All problems are the columns of one ``[C, N]`` matrix, so a half-iteration is one product with the
kernel ``exp(-D / eps)``. float32 holds that kernel up to ``max(D) / eps`` of about 40, float64 up to
300; beyond, problems are solved by Newton's method in the log domain, from larger values of eps.

The three operators at the end are what the rest calls. A solver's loop depends on its data, so
``torch.compile`` is shown one opaque operator each, with the shapes of its results and, by the
envelope theorem, its gradient: no graph breaks, and nothing is unrolled.
"""

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 2**24  # numbers in the largest temporary of what is done by pieces
RELAX = (1.5, 1.75)  # over-relaxation, at first and once only slow problems are left
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
    iterations: Tensor  # ()
    converged: Tensor  # ()


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
    mean, largest, gap = torch.stack(
        [mean, cost.abs().max(), (cost - cost.mT).abs().max()]
    ).tolist()
    if not (math.isfinite(largest) and mean > 0 and gap <= 1e-5 * largest):
        raise ValueError(
            "cost must be finite, symmetric and positive off the diagonal; see check_cost"
        )
    return eps * mean, largest / (eps * mean)


def symmetric(cost: Tensor, dtype: torch.dtype) -> Tensor:
    """The cost as a constant, symmetric to the last digit: one kernel then serves both directions."""
    cost = cost.detach().to(dtype)
    return 0.5 * (cost + cost.mT)


def precision(sharpness: float, tol: float, x: Tensor) -> tuple[torch.dtype, float]:
    """The dtype that holds the kernel, and ``tol`` or 8 of its roundings: below, an error is noise."""
    dtype = x.dtype if sharpness <= KERNEL_RANGE[torch.float32] else double(x.device)
    return dtype, max(tol, 8 * torch.finfo(dtype).eps)


def columns(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The batch as columns ``[C, N]``; refuses what is not of unit mass, as NaN is not."""
    if not bool(((x >= 0).all(-1) & (x.sum(-1) > 0.5)).all()):
        raise ValueError(
            "marginals and weights must be finite, non-negative and of positive mass over their last axis"
        )
    return x.detach().to(dtype).reshape(-1, x.shape[-1]).mT.contiguous()


def log_product(log_kernel: Tensor, sharpness: float) -> Callable[[Tensor], Tensor]:
    """``x -> log(K e^x)`` over the first axis, by a product where the dtype holds the kernel K."""
    if sharpness <= KERNEL_RANGE[log_kernel.dtype]:
        kernel = log_kernel.exp()
        return lambda x: torch.tensordot(kernel, x.exp(), dims=1).log()

    def by_pieces(x: Tensor) -> Tensor:
        pieces = x.flatten(1).split(max(1, CHUNK // log_kernel.numel()), dim=1)
        return torch.cat(
            [torch.logsumexp(log_kernel[:, :, None] + piece, dim=1) for piece in pieces], dim=1
        ).reshape(x.shape)

    return by_pieces


def iterate(
    step: Callable[..., tuple],
    marginals: tuple[Tensor, ...],
    state: tuple[Tensor, ...],
    tol: float,
    max_iter: int,
) -> tuple[list[Tensor], Tensor, int]:
    """Run ``step(marginals, state, relax)`` on columns and drop those whose error is below tol.

    The last axis of every tensor counts problems. A step returns the new state and, where ``relax``
    is 1, the error of each column; that is asked for every ``CHECK_EVERY`` steps.
    """
    result = [torch.empty_like(s) for s in state]
    error = state[0].new_zeros(state[0].shape[-1])
    active = torch.arange(len(error), device=error.device)
    iteration = 0
    while active.numel():
        state, current = step(marginals, state, 1.0)
        iteration += 1
        stopped = ~(current > tol) | (iteration >= max_iter)  # NaN stops, too
        if bool(stopped.any()):
            index, going = active[stopped], ~stopped
            error[index] = current[stopped]
            for full, part in zip(result, state, strict=True):
                full[..., index] = part[..., stopped]
            active = active[going]
            marginals, state = (
                tuple(m[..., going] for m in marginals),
                tuple(s[..., going] for s in state),
            )
        for _ in range(min(CHECK_EVERY - 1, max_iter - 1 - iteration) if active.numel() else 0):
            state, _ = step(marginals, state, RELAX[iteration > 2 * CHECK_EVERY])
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

    for taken in range(steps + 1):
        u = -apply(log_b + v)
        applied = apply(log_a + u)
        ratio = (applied + v).clamp(-60, 60)  # log of (column mass / b)
        error = (b * (ratio.exp() - 1).abs()).sum(-1)
        if taken == steps or bool((error <= tol).all()):
            break
        # the plan over the square roots of its marginals; empty classes become empty rows and columns
        scaled = (
            (0.5 * log_a + u)[:, :, None] + log_kernel + (0.5 * log_b + v - 0.5 * ratio)[:, None, :]
        )
        scaled = scaled.exp()  # (N, C, C)
        root = (b * ratio.exp()).sqrt()
        # the null vector of I - S'S is `root`: potentials are free up to a constant
        system = (1 + 1e-13) * eye - scaled.mT @ scaled + root[:, :, None] * root[:, None, :]
        target = b.sqrt() * (-0.5 * ratio).exp() * (1 - ratio.exp())
        direction = torch.where(
            b > 0, torch.linalg.solve(system, target) / root.clamp(min=1e-30), 0.0
        )
        # parts that exchange less than a rounding make Newton's step endless: cap it (units of eps)
        direction = direction * (10 / direction.abs().amax(-1, keepdim=True).clamp(min=10))
        value, size = (a * u).sum(-1) + (b * v).sum(-1), torch.ones_like(error)  # the semi-dual
        for _ in range(6):
            trial = v + size[:, None] * direction
            worse = ~((b * trial).sum(-1) - (a * apply(log_b + trial)).sum(-1) >= value - 1e-14)
            if not bool(worse.any()):
                break
            size = torch.where(worse, 0.3 * size, size)
        v = torch.where(worse[:, None], -applied, trial)
        v = -apply(log_a - apply(log_b + v))
    return u.mT, -applied.mT, error, taken


@torch.no_grad()
def solve(
    a: Tensor,
    b: Tensor,
    cost: Tensor,
    eps: float,
    tol: float,
    max_iter: int,
    guess: Tensor | None = None,
) -> Solved:
    """Solve for normalised marginals of one shape and dtype, from a ``guess`` of ``g`` if there is one."""
    eps_abs, sharpness = absolute_eps(cost, eps)
    given, shape = a.dtype, a.shape
    dtype, tol = precision(sharpness, tol, a)
    log_kernel = symmetric(cost, dtype) / -eps_abs

    def rows(x: Tensor) -> Tensor:
        return x.mT.reshape(shape).to(given).contiguous()

    with torch.autocast(a.device.type, enabled=False):
        p, q = columns(a, dtype), columns(b, dtype)
        if sharpness <= KERNEL_RANGE[dtype]:
            kernel = log_kernel.exp()

            def answer(
                old, applied, relax
            ):  # old^(1 - relax) applied^-relax by square roots, for RELAX
                if relax == 1:
                    return 1 / applied
                root = torch.rsqrt(old * applied)
                return (root if relax == 1.5 else root * root.sqrt()) / applied

            def step(marginals, state, relax):
                (p, q), (u, v) = marginals, state
                u = answer(u, kernel @ (q * v), relax)
                applied = kernel @ (p * u)
                # rows are exact after a plain step, so the columns hold all of the error
                error = None if relax > 1 else (q * (v * applied - 1).abs()).sum(dim=0)
                return (u, answer(v, applied, relax)), error

            start = (
                torch.ones_like(q)
                if guess is None
                else (guess.to(dtype).reshape(-1, shape[-1]).mT / eps_abs).exp()
            )
            patience = min(max_iter, max(150, NEWTON_AFTER * shape[-1]))
            (u, v), error, iterations = iterate(
                step, (p, q), (torch.ones_like(p), start), tol, patience
            )
            log_u, log_v = u.log(), v.log()
        else:
            log_u, log_v = torch.empty_like(p), torch.empty_like(p)
            error, iterations = torch.full_like(p[0], math.inf), 0
        # First what is so sharp that a cold start would wander, or overflowed, then what Newton's method has left: from a larger eps.
        for lost in (~(error + log_u.sum(0) + log_v.sum(0)).isfinite(), None):
            lost = (error > tol if lost is None else lost).nonzero().squeeze(1)
            if len(lost) and (iterations < max_iter or not error[lost].isfinite().all()):
                with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
                    start = solve(
                        p[:, lost].mT.to(given),
                        q[:, lost].mT.to(given),
                        cost,
                        3 * eps,
                        1e-3,
                        max_iter,
                    ).g
                log_v[:, lost], error[lost] = start.to(dtype).mT / eps_abs, math.inf
                iterations = min(iterations, max_iter - 1)
            # Newton's method may stall in one potential and not in the other, where classes of one marginal are all but empty.
            for rows_of, columns_of, log_r, log_c in (p, q, log_u, log_v), (q, p, log_v, log_u):
                slow, taken = (error > tol).nonzero().squeeze(1), 0
                for part in (
                    slow.split(max(1, CHUNK // log_kernel.numel()))
                    if iterations < max_iter and len(slow)
                    else ()
                ):
                    late = [x[:, part].to(double(a.device)) for x in (rows_of, columns_of, log_c)]
                    *ends, count = newton(
                        *late[:2],
                        log_kernel.to(late[0]),
                        late[2],
                        tol,
                        min(max_iter - iterations, NEWTON_STEPS),
                    )
                    log_r[:, part], log_c[:, part], error[part] = (x.to(dtype) for x in ends)
                    taken = max(taken, count)
                iterations += taken
        # the plan's columns are exact, so its mass is 1 and this is the dual value, right to second order
        f_mean, g_mean = eps_abs * (log_u * p).sum(0), eps_abs * (log_v * q).sum(0)
        shift = 0.5 * (
            g_mean - f_mean
        )  # potentials are free up to a constant: share the value evenly
        f, g = rows(eps_abs * log_u + shift), rows(eps_abs * log_v - shift)
    value, error = (x.reshape(shape[:-1]).to(given) for x in (f_mean + g_mean, error))
    return Solved(value, f, g, error, *outcome("sinkhorn", error, tol, max_iter, iterations))


def outcome(
    what: str, error: Tensor, tol: float, max_iter: int, iterations: int
) -> tuple[Tensor, Tensor]:
    """``iterations`` and whether every error is at most tol, as tensors; warns, once for the batch, if not."""
    converged = (error <= tol).all()
    if not bool(converged):
        warnings.warn(
            f"{what}: marginal error {error.max().item():.1e} > tol {tol:.1e} within {max_iter} iterations; raise eps, tol or max_iter",
            ConvergenceWarning,
            stacklevel=2,
        )
    return torch.tensor(iterations), converged.cpu()


# --- operators: all tensors returned are fresh and contiguous, as their fake counterparts say


@torch.library.custom_op("gdviz::sinkhorn", mutates_args=())
def sinkhorn(
    a: Tensor,
    b: Tensor,
    cost: Tensor,
    eps: float,
    tol: float,
    max_iter: int,
    guess: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`solve`, differentiable in ``a`` and ``b``."""
    return tuple(solve(a, b, cost, eps, tol, max_iter, guess))


@sinkhorn.register_fake
def _(a, b, cost, eps, tol, max_iter, guess=None):
    counts = torch.empty((), dtype=torch.long), torch.empty((), dtype=torch.bool)
    return *(a.new_empty(a.shape[:-1] if i in (0, 3) else a.shape) for i in range(4)), *counts


@torch.library.custom_op("gdviz::self_sinkhorn", mutates_args=())
def self_sinkhorn(
    p: Tensor, cost: Tensor, eps: float, tol: float, max_iter: int
) -> tuple[Tensor, Tensor]:
    """Value and potential of W_eps(p, p), differentiable in ``p``, by ``u <- sqrt(u / K (p u))`` (Feydy et al. 2019, eq. 25).

    The error halves at every step, whatever the marginal."""
    eps_abs, sharpness = absolute_eps(cost, eps)
    dtype, tol = precision(sharpness, tol, p)

    def step(marginals, state, relax):
        (p, log_p), (log_u, _) = marginals, state
        applied = product(log_p + log_u)
        error = None if relax > 1 else (p * (log_u + applied).expm1().abs()).sum(dim=0)
        return (0.5 * (log_u - applied), -applied), error

    with torch.autocast(p.device.type, enabled=False):
        product = log_product(symmetric(cost, dtype) / -eps_abs, sharpness)
        column = columns(p, dtype)
        zeros = torch.zeros_like(column)
        (mean, answer), error, iterations = iterate(
            step, (column, column.log()), (zeros, zeros), tol, max_iter
        )
    # value = <old + answer, p>, the dual at two potentials that answer each other; mean = (old + answer) / 2
    value, potential = 2 * eps_abs * (column * mean).sum(0), eps_abs * answer
    outcome("sinkhorn (self term)", error, tol, max_iter, iterations)
    return value.reshape(p.shape[:-1]).to(p.dtype), potential.mT.reshape(p.shape).to(
        p.dtype
    ).contiguous()


@self_sinkhorn.register_fake
def _(p, cost, eps, tol, max_iter):
    return p.new_empty(p.shape[:-1]), p.new_empty(p.shape)


def _once() -> None:
    if torch.is_grad_enabled():  # the potentials are constants here: their derivative would read 0
        raise RuntimeError("transport costs are differentiable once only (no create_graph=True)")


def _sinkhorn_gradient(ctx, grad, *_):
    _once()
    f, g = ctx.saved_tensors
    to_a, to_b = ctx.needs_input_grad[:2]
    return grad[..., None] * f if to_a else None, grad[..., None] * g if to_b else None, *[None] * 5


def _self_gradient(ctx, grad, *_):
    _once()
    return 2 * grad[..., None] * ctx.saved_tensors[0], *[None] * 4


sinkhorn.register_autograd(
    _sinkhorn_gradient,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*output[1:3]),
)
self_sinkhorn.register_autograd(
    _self_gradient, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output[1])
)


@torch.library.custom_op("gdviz::barycenter", mutates_args=())
def barycenter(
    p: Tensor, weights: Tensor, cost: Tensor, eps: float, tol: float, max_iter: int, debiased: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Barycenter of normalised ``p [*batch, K, C]``, its errors, the iterations and whether it converged; no gradient.

    Janati et al. 2020, algorithm 1, or with ``debiased=False`` Benamou et al. 2015, section 3.2.
    """
    *batch, teachers, classes = p.shape
    dtype = double(p.device)
    eps_abs, sharpness = absolute_eps(cost, eps)

    def step(marginals, state, relax):
        (p, log_p, w), (log_v, log_bias, _) = marginals, state
        kv = product(log_p + log_v)  # (C, K, B)
        log_b = (w * kv).sum(dim=1) + log_bias  # (C, B)
        b = log_b.exp()
        gap = log_v + product(log_b[:, None] - kv)  # the rows of every plan equal b now
        error = None if relax > 1 else (p * gap.expm1().abs()).sum(dim=0).amax(dim=0)
        if debiased:
            k_bias = product(log_bias)
            error = None if relax > 1 else error + ((log_bias + k_bias).exp() - b).abs().sum(dim=0)
            log_bias = 0.5 * (log_bias + log_b - k_bias)
        return (log_v - relax * gap, log_bias, b), error

    with torch.autocast(p.device.type, enabled=False):
        product = log_product(symmetric(cost, dtype) / -eps_abs, sharpness)
        w = columns(weights, dtype)  # (K, B)
        column = columns(p, dtype).reshape(classes, -1, teachers).mT.contiguous()  # (C, K, B)
        zeros = torch.zeros_like(column)
        (_, _, b), error, iterations = iterate(
            step, (column, column.log(), w), (zeros, zeros[:, 0], zeros[:, 0]), tol, max_iter
        )
    b = (b / b.sum(dim=0)).mT.reshape(*batch, classes).to(p.dtype).contiguous()
    return (
        b,
        error.reshape(batch).to(p.dtype),
        *outcome("barycenter", error, tol, max_iter, iterations),
    )


@barycenter.register_fake
def _(p, weights, cost, eps, tol, max_iter, debiased):
    batch = p.shape[:-2]
    counts = torch.empty((), dtype=torch.long), torch.empty((), dtype=torch.bool)
    return p.new_empty(*batch, p.shape[-1]), p.new_empty(batch), *counts

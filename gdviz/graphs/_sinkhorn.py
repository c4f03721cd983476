"""Solvers behind ``transport``: batches of transport problems that share one ground cost.

All problems are the columns of one ``[C, N]`` matrix, so a half-iteration is one product with the
kernel ``exp(-D / eps)``. float32 holds that kernel up to ``max(D) / eps`` of about 40, float64 up
to 300. Beyond that, problems are solved by Newton's method in the log domain, from larger eps.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gdviz.graphs import _dtypes
from gdviz.graphs._newton import newton

CHUNK = 2**24  # numbers in the largest temporary of what is done by pieces
CHECK_EVERY = 10  # a test of the marginals costs a plain step and, on a GPU, a synchronisation
EARLY, LATE = 1.5, 1.75  # over-relaxation, at first and once only slow problems are left
NEWTON_AFTER = 8  # times C iterations: about what finishing a column by Newton's method costs
NEWTON_STEPS = 50
KERNEL_RANGE = {torch.float32: 40.0, torch.float64: 300.0}  # of max(D) / eps

Tensors = tuple[Tensor, ...]
Step = Callable[[Tensors, Tensors, float], tuple[Tensors, Any]]


class ConvergenceWarning(UserWarning):
    """An iteration stopped at ``max_iter`` with marginals further off than ``tol``."""


def absolute_eps(cost: Tensor, eps: float) -> tuple[float, float]:
    """Return eps in the units of the cost, and ``max(D) / eps``; ValueError if it cannot be."""
    classes = cost.shape[-1]
    if cost.shape != (classes, classes) or not eps > 0:
        raise ValueError(f"need a square cost and eps > 0, got {tuple(cost.shape)} and {eps}")
    if classes == 1:
        return eps, 0.0
    cost = cost.detach().to(_dtypes.double(cost.device))
    mean = (cost.sum() - cost.diagonal().sum()) / (classes * (classes - 1))
    gap = (cost - cost.mT).abs().max()
    mean, largest, gap = torch.stack([mean, cost.abs().max(), gap]).tolist()
    if not (math.isfinite(largest) and mean > 0 and gap <= 1e-5 * largest):
        raise ValueError("cost must be finite, symmetric and positive off the diagonal")
    return eps * mean, largest / (eps * mean)


class Kernel:
    """``K = exp(-D / eps)``, symmetric to the last digit, in ``dtype`` or where needed float64."""

    def __init__(self, cost: Tensor, eps: float, dtype: torch.dtype) -> None:
        self.eps, sharpness = absolute_eps(cost, eps)  # in the units of the cost
        held = sharpness <= KERNEL_RANGE[torch.float32]
        self.dtype = dtype if held else _dtypes.double(cost.device)
        self.fits = sharpness <= KERNEL_RANGE[self.dtype]
        cost = cost.detach().to(self.dtype)
        self.log = 0.5 * (cost + cost.mT) / -self.eps
        self.exp = self.log.exp()
        self.noise = 8 * torch.finfo(self.dtype).eps  # smaller errors of marginals mean nothing
        self.columns_at_once = max(1, CHUNK // cost.numel())

    def log_product(self, x: Tensor) -> Tensor:
        """Compute ``log(K e^x)`` over the first axis, by a matrix product if the dtype holds K."""
        if self.fits:
            return torch.tensordot(self.exp, x.exp(), dims=1).log()
        pieces = x.flatten(1).split(self.columns_at_once, dim=1)
        done = [torch.logsumexp(self.log[:, :, None] + piece, dim=1) for piece in pieces]
        return torch.cat(done, dim=1).reshape(x.shape)


def columns(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return distributions as columns ``[C, N]``; ValueError if one has no unit mass, as NaN."""
    if not bool(((x >= 0).all(-1) & (x.sum(-1) > 0.5)).all()):
        raise ValueError("marginals and weights must be finite, non-negative and of positive mass")
    return x.detach().to(dtype).reshape(-1, x.shape[-1]).mT.contiguous()


def rows(x: Tensor, like: Tensor) -> Tensor:
    """Return columns, or one number each, in the shape and dtype of ``like``."""
    return x.movedim(-1, 0).reshape(like.shape).to(like.dtype).contiguous()


def all_converged(what: str, error: Tensor, tol: float, max_iter: int) -> Tensor:
    """Return whether all errors are at most tol; warn if not."""
    converged = (error <= tol).all()
    if not bool(converged):
        found = f"marginal error {error.max().item():.1e} > tol {tol:.1e}"
        advice = f"within {max_iter} iterations; raise eps, tol or max_iter"
        warnings.warn(f"{what}: {found} {advice}", ConvergenceWarning, stacklevel=2)
    return converged


def iterate(
    step: Step, marginals: Tensors, state: Tensors, tol: float, max_iter: int
) -> tuple[list[Tensor], Tensor, int]:
    """Run ``step(marginals, state, relax)`` on columns and drop those whose error is below tol.

    A step returns the state and, if ``relax`` is 1, the errors. Returns them and the iterations.
    """
    result, iteration = [torch.empty_like(s) for s in state], 0
    error = state[0].new_zeros(state[0].shape[-1])
    active = torch.arange(len(error), device=error.device)
    while len(active):
        state, current = step(marginals, state, 1.0)
        iteration += 1
        going = (current > tol) & (iteration < max_iter)  # NaN stops, too
        if not bool(going.all()):
            stopped = active[~going]
            error[stopped] = current[~going]
            for full, part in zip(result, state, strict=True):
                full[..., stopped] = part[..., ~going]
            active = active[going]
            marginals = tuple(m[..., going] for m in marginals)
            state = tuple(s[..., going] for s in state)
        relax = LATE if iteration > 2 * CHECK_EVERY else EARLY
        for _ in range(min(CHECK_EVERY - 1, max_iter - 1 - iteration) if len(active) else 0):
            state, _ = step(marginals, state, relax)
            iteration += 1
    return result, error, iteration


def relaxed(old: Tensor, applied: Tensor, relax: float) -> Tensor:
    """Return ``old^(1 - relax) applied^-relax`` by square roots (Thibault et al. 2021)."""
    if relax == 1:
        return 1 / applied
    root = torch.rsqrt(old * applied)
    return (root if relax == EARLY else root * root.sqrt()) / applied


class Batch:
    """Problems as columns ``[C, N]``, with plans ``diag(p u) K diag(q v)`` as far as solved."""

    def __init__(
        self, a: Tensor, b: Tensor, cost: Tensor, eps: float, tol: float, max_iter: int
    ) -> None:
        self.a, self.cost, self.max_iter = a, cost, max_iter
        self.relative_eps, self.kernel = eps, Kernel(cost, eps, a.dtype)
        self.p, self.q = columns(a, self.kernel.dtype), columns(b, self.kernel.dtype)
        self.log_u, self.log_v = torch.zeros_like(self.p), torch.zeros_like(self.q)
        self.error = torch.full_like(self.p[0], math.inf)
        self.tol, self.iterations = max(tol, self.kernel.noise), 0

    def iterate_scalings(self, guess: Tensor | None) -> None:
        """Run Sinkhorn's iteration in the product form, from a ``guess`` of g if there is one."""
        kernel = self.kernel.exp

        def step(marginals, state, relax):
            (p, q), (u, v) = marginals, state
            u = relaxed(u, kernel @ (q * v), relax)
            applied = kernel @ (p * u)
            # rows are exact after a plain step, so the columns hold all of the error
            error = None if relax > 1 else (q * (v * applied - 1).abs()).sum(dim=0)
            return (u, relaxed(v, applied, relax)), error

        start = [torch.ones_like(self.p), torch.ones_like(self.q)]
        if guess is not None:
            start[1] = (guess.to(self.q.dtype).reshape(-1, len(self.q)).mT / self.kernel.eps).exp()
        patience = min(self.max_iter, max(150, NEWTON_AFTER * len(self.q)))
        found = iterate(step, (self.p, self.q), tuple(start), self.tol, patience)
        (u, v), self.error, self.iterations = found
        self.log_u, self.log_v = u.log(), v.log()

    def finish(self, restart: Tensor) -> None:
        """Solve all columns that are left by Newton's method, in each of the potentials.

        Those of ``restart`` begin at a rough solution of the same problem at a larger eps.
        """
        index = restart.nonzero().squeeze(1)
        # with all iterations spent, only what is not even begun is started
        spent = self.iterations >= self.max_iter and bool(self.error[index].isfinite().all())
        if len(index) and not spent:
            p, q = (x[:, index].mT.to(self.a.dtype) for x in (self.p, self.q))
            with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
                g = solve(p, q, self.cost, 3 * self.relative_eps, 1e-3, self.max_iter, None)[2]
            self.log_v[:, index] = g.to(self.q.dtype).mT / self.kernel.eps
            self.error[index] = math.inf
            self.iterations = min(self.iterations, self.max_iter - 1)
        # It may stall in one potential and not in the other, where classes are all but empty.
        self.newton(self.p, self.q, self.log_u, self.log_v)
        self.newton(self.q, self.p, self.log_v, self.log_u)

    def newton(self, p: Tensor, q: Tensor, log_u: Tensor, log_v: Tensor) -> None:
        """Solve what is left by Newton's method in ``log_v``."""
        index = (self.error > self.tol).nonzero().squeeze(1)
        steps = min(self.max_iter - self.iterations, NEWTON_STEPS)
        if steps <= 0 or not len(index):
            return
        exact, taken = _dtypes.double(p.device), 0
        for part in index.split(self.kernel.columns_at_once):
            a, b, start = (x[:, part].to(exact) for x in (p, q, log_v))
            *found, count = newton(a, b, self.kernel.log.to(exact), start, self.tol, steps)
            log_u[:, part], log_v[:, part], self.error[part] = (x.to(p.dtype) for x in found)
            taken = max(taken, count)
        self.iterations += taken

    def result(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return value, f, g and error as the marginals were given, and whether all converged."""
        f, g = self.kernel.eps * self.log_u, self.kernel.eps * self.log_v
        # columns of the plan are exact, so its mass is 1: the dual value, right to second order
        f_mean, g_mean = (self.p * f).sum(0), (self.q * g).sum(0)
        shift = 0.5 * (g_mean - f_mean)  # potentials are free up to a constant: share it evenly
        f, g = rows(f + shift, self.a), rows(g - shift, self.a)
        value, error = (rows(x, f[..., 0]) for x in (f_mean + g_mean, self.error))
        return value, f, g, error, all_converged("sinkhorn", error, self.tol, self.max_iter)


@torch.no_grad()
def solve(
    a: Tensor, b: Tensor, cost: Tensor, eps: float, tol: float, max_iter: int, guess: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Solve for normalised marginals ``[*batch, C]`` of one dtype, from a ``guess`` of g."""
    with torch.autocast(a.device.type, enabled=False):
        batch = Batch(a, b, cost, eps, tol, max_iter)
        if batch.kernel.fits:
            batch.iterate_scalings(guess)
        # Broken (NaN or infinite), or not begun, where the kernel does not fit.
        unusable = ~(batch.error + batch.log_u.sum(0) + batch.log_v.sum(0)).isfinite()
        batch.finish(restart=unusable)
        batch.finish(restart=batch.error > batch.tol)
        return batch.result()


@torch.no_grad()
def solve_self(
    p: Tensor, cost: Tensor, eps: float, tol: float, max_iter: int
) -> tuple[Tensor, Tensor]:
    """Solve W_eps(p, p) by ``u <- sqrt(u / K (p u))`` (Feydy et al. 2019, eq. 25).

    The error halves at every step. Returns value and potential.
    """
    kernel = Kernel(cost, eps, p.dtype)

    def step(marginals, state, relax):
        (p, log_p), (log_u, _) = marginals, state
        applied = kernel.log_product(log_p + log_u)
        error = None if relax > 1 else (p * (log_u + applied).expm1().abs()).sum(dim=0)
        return (0.5 * (log_u - applied), -applied), error

    with torch.autocast(p.device.type, enabled=False):
        column, tol = columns(p, kernel.dtype), max(tol, kernel.noise)
        marginals, zeros = (column, column.log()), torch.zeros_like(column)
        (mean, log_u), error, _ = iterate(step, marginals, (zeros, zeros), tol, max_iter)
    all_converged("sinkhorn (self term)", error, tol, max_iter)
    # the dual at the last two potentials, each the best response to the other, of `mean` their mean
    value = 2 * kernel.eps * (column * mean).sum(0)
    return rows(value, p[..., 0]), rows(kernel.eps * log_u, p)


@torch.no_grad()
def solve_barycenter(
    p: Tensor, weights: Tensor, cost: Tensor, eps: float, tol: float, max_iter: int
) -> tuple[Tensor, Tensor]:
    """Solve for the barycenter of normalised ``p [*batch, K, C]`` (Janati et al. 2020, alg. 1)."""
    teachers, classes = p.shape[-2:]
    kernel = Kernel(cost, eps, _dtypes.double(p.device))

    def step(marginals, state, relax):
        (p, log_p, w), (log_v, log_bias, _) = marginals, state
        kv = kernel.log_product(log_p + log_v)  # (C, K, B)
        log_b = (w * kv).sum(dim=1) + log_bias  # (C, B)
        b, k_bias = log_b.exp(), kernel.log_product(log_bias)
        gap = log_v + kernel.log_product(log_b[:, None] - kv)  # the rows of every plan equal b now
        error = None
        if relax == 1:
            error = (p * gap.expm1().abs()).sum(dim=0).amax(dim=0)
            error = error + ((log_bias + k_bias).exp() - b).abs().sum(dim=0)
        return (log_v - relax * gap, 0.5 * (log_bias + log_b - k_bias), b), error

    with torch.autocast(p.device.type, enabled=False):
        column = columns(p, kernel.dtype).reshape(classes, -1, teachers).mT.contiguous()
        marginals = (column, column.log(), columns(weights, kernel.dtype))  # (C, K, B), (K, B)
        zeros = torch.zeros_like(column)
        start = (zeros, zeros[:, 0], zeros[:, 0])
        (_, _, b), error, _ = iterate(step, marginals, start, tol, max_iter)
    return rows(b / b.sum(dim=0), p[..., 0, :]), all_converged("barycenter", error, tol, max_iter)

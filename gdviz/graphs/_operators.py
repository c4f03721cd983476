"""The solvers as operators of torch.

A solver's loop depends on its data, so ``torch.compile`` sees one opaque operator each, with the
shapes of its results and, by the envelope theorem, its gradient: no graph breaks, and nothing is
unrolled. All tensors returned are fresh and contiguous, as their fake counterparts are.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from gdviz.graphs import _sinkhorn

sinkhorn = custom_op("gdviz::sinkhorn", _sinkhorn.solve, mutates_args=())
self_sinkhorn = custom_op("gdviz::self_sinkhorn", _sinkhorn.solve_self, mutates_args=())
barycenter = custom_op("gdviz::barycenter", _sinkhorn.solve_barycenter, mutates_args=())


@sinkhorn.register_fake
def _(a: Tensor, *_: Any) -> tuple[Tensor, ...]:
    value, f, g, error = (a.new_empty(a.shape[: len(a.shape) - i]) for i in (1, 0, 0, 1))
    return value, f, g, error, a.new_empty((), dtype=torch.bool)


@self_sinkhorn.register_fake
def _(p: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return p.new_empty(p.shape[:-1]), p.new_empty(p.shape)


@barycenter.register_fake
def _(p: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return p.new_empty(*p.shape[:-2], p.shape[-1]), p.new_empty((), dtype=torch.bool)


def _potentials_times(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    if torch.is_grad_enabled():  # the potentials are constants here: their derivative would read 0
        raise RuntimeError("transport costs are differentiable once only (no create_graph=True)")
    wanted = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
    return [grad[..., None] * potential if needed else None for potential, needed in wanted]


def _gradient(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return *_potentials_times(ctx, grad), *[None] * 5


def _self_gradient(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return *_potentials_times(ctx, 2 * grad), *[None] * 4


def _save_potentials(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:3])  # f and g, or the one of a self term


sinkhorn.register_autograd(_gradient, setup_context=_save_potentials)
self_sinkhorn.register_autograd(_self_gradient, setup_context=_save_potentials)

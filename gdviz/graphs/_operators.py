"""The solvers as operators of torch, with the shapes of their results and their gradients.

A solver's loop depends on its data, so ``torch.compile`` sees one opaque operator each. Gradients
are potentials (envelope theorem). All tensors returned are fresh and contiguous, as the fake ones.
"""

from functools import partial
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


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:3])  # f and g, or the one of a self term


def _gradient(factor: int, options: int, ctx: Any, grad: Tensor, *_: Any) -> tuple:
    if torch.is_grad_enabled():  # the potentials are constants here: their derivative would read 0
        raise RuntimeError("transport costs are differentiable once only (no create_graph=True)")
    wanted = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
    grads = [factor * grad[..., None] * x if needed else None for x, needed in wanted]
    return *grads, *[None] * options


sinkhorn.register_autograd(partial(_gradient, 1, 5), setup_context=_save)
self_sinkhorn.register_autograd(partial(_gradient, 2, 4), setup_context=_save)

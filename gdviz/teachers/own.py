"""Networks of your own as teachers, each left as it is and asked in its own view (docs/own.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from difflib import get_close_matches
from inspect import signature
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import interpolate

from gdviz.core.files import UserError, in_a_line
from gdviz.core.names import resolve, split_home
from gdviz.teachers.backbones import Backbone, Classifier, Clips, Renormalise
from gdviz.teachers.bank import device_of
from gdviz.teachers.pretext import TASKS


@dataclass(frozen=True)
class OwnView:
    """How a network wants its clips; colours are ``(x - mean) / std`` of values in [0, 1]."""

    size: int  # pixels of a side
    length: int  # frames
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # ImageNet's
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    frames_first: bool = False  # [b, t, 3, h, w], as Hugging Face's models take them


@runtime_checkable
class Teacher(Protocol):
    """A ``torch.nn.Module`` of this shape; :class:`Tapped` makes one of any video network."""

    view: OwnView
    fitted: bool  # its logits are over the data's classes; it must not have seen labelled videos

    def __call__(self, clips: Tensor, /) -> tuple[Tensor | None, Tensor]:
        """Return logits [b, c], or None unless fitted, and features [b, d] of clips in its view."""
        ...


class Tapped(nn.Module):
    """Read features, and logits, of any network by hooks that live no longer than a call.

    Features are the mean over tokens, or over time and space, of what a module returns.

    Args:
        net: takes clips in ``view``.
        features: path of the module to read, as in ``net.named_modules()``; "" is the network.
        logits: path of the module that returns logits over the data's classes; None: it has none.
        channels: axis of the features; by default 1 of maps [b, d, t, h, w], else the last.
        frozen: the network stays in eval mode and keeps no gradient; only a head is fitted on it.

    Raises:
        UserError: no such module, one that the network runs without, or an output without features.
    """

    def __init__(
        self,
        net: nn.Module,
        features: str,
        view: OwnView,
        *,
        logits: str | None = None,
        channels: int | None = None,
        frozen: bool = True,
    ) -> None:
        super().__init__()
        self.net, self.view, self.channels, self.frozen = net, view, channels, frozen
        self.fitted, self.paths = logits is not None, {"features": features}
        if logits is not None:
            self.paths["logits"] = logits
        names = list(dict(net.named_modules()))
        for argument, path in self.paths.items():
            if path not in names:
                near = ", ".join(get_close_matches(path, names, 5, 0.3) or names[1:6])
                where = f"no such module in {type(net).__name__}; near: {near}"
                raise UserError(f"{argument}={path!r}: {where}")

    def extra_repr(self) -> str:
        return f"{self.paths}, channels={self.channels}, frozen={self.frozen}"

    def train(self, mode: bool = True) -> Tapped:
        return super().train(mode and not self.frozen)

    def forward(self, clips: Tensor) -> tuple[Tensor | None, Tensor]:
        outputs: dict[nn.Module, Any] = {}

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            outputs[module] = output

        modules = {name: self.net.get_submodule(path) for name, path in self.paths.items()}
        learns = torch.is_grad_enabled() and not self.frozen
        with ExitStack() as hooks, torch.set_grad_enabled(learns):
            for module in modules.values():
                hooks.enter_context(module.register_forward_hook(keep))
            self.net(clips)
        found = {}
        for name, module in modules.items():
            where = f"{name}={self.paths[name]!r}"
            if module not in outputs:
                raise UserError(f"{where}: the network runs without this module")
            found[name] = _first_tensor(outputs[module], where)
        return found.get("logits"), self._pool(found["features"])

    def _pool(self, maps: Tensor) -> Float[Tensor, "b d"]:
        """Take the mean over all axes but the batch's and the channels'."""
        if maps.ndim == 2:
            return maps
        if maps.ndim not in (3, 5):
            path, wanted = self.paths["features"], "[b, d], [b, n, d] or [b, d, t, h, w]"
            raise UserError(f"features={path!r}: wanted are {wanted}, not {list(maps.shape)}")
        usual = 1 if maps.ndim == 5 else -1
        channels = usual if self.channels is None else self.channels
        return maps.movedim(channels, 1).flatten(2).mean(2)


def _first_tensor(output: Any, where: str) -> Tensor:
    """Return the first tensor of an output that may be a tuple, or a mapping as Hugging Face's."""
    parts = list(output.values()) if isinstance(output, Mapping) else output
    for part in parts if isinstance(parts, list | tuple) else [parts]:
        if isinstance(part, Tensor):
            return part
    raise UserError(f"{where}: returns {type(output).__name__}, in which there is no tensor")


class OwnBackbone(Backbone):
    """A teacher as a backbone: clips as this package scales them are brought into its view.

    Its ``repr`` and its weights tell all that its features depend on.

    Raises:
        UserError: logits or features are not one row a clip, which depends on that clip alone, or
            are not finite: tried with two clips, and the shapes at every call.
    """

    fitted = False  # a head is wanted; see OwnClassifier

    def __init__(self, teacher: Teacher) -> None:
        super().__init__(cast(nn.Module, teacher), 0)
        self.view = view = teacher.view
        device, mode = device_of(self.trunk), self.trunk.training
        self.scale = Renormalise(view.mean, view.std).to(device)
        self.eval()
        shape, rng = (2, 3, view.length, view.size, view.size), torch.Generator().manual_seed(0)
        clips = torch.randn(shape, generator=rng).to(device)
        with torch.no_grad():
            (logits, features), (_, alone) = self.read(clips), self.read(clips[:1])
        self.train(mode)
        if not all(x.isfinite().all() for x in (logits, features) if x is not None):
            raise UserError("returns numbers that are not finite")
        if not torch.allclose(features[:1], alone, rtol=0.05, atol=0.05 * float(features.std())):
            raise UserError("a clip's features are others beside another clip than alone")
        self.dim, self.classes = features.shape[1], None if logits is None else logits.shape[1]

    def extra_repr(self) -> str:
        return repr(self.view)

    def read(self, clips: Clips) -> tuple[Tensor | None, Tensor]:
        """Return the teacher's logits [b, c], or None, and features [b, d]."""
        view, frames = self.view, clips.shape[2]
        size = (frames, view.size, view.size)
        clips = interpolate(self.scale(clips), size, mode="trilinear", align_corners=False)
        clips = clips[:, :, torch.linspace(0, frames - 1, view.length).round().long()]
        floats = (p.dtype for p in self.trunk.parameters() if p.is_floating_point())
        clips = clips.to(next(floats, clips.dtype))
        found = self.trunk(clips.transpose(1, 2) if view.frames_first else clips)
        for name, x in zip(("logits", "features"), found, strict=True):
            if x is not None and (x.ndim != 2 or len(x) != len(clips)):
                wanted = f"one row for each of {len(clips)} clips"
                raise UserError(f"{name}: wanted is {wanted}, not {list(x.shape)}")
        logits, features = found
        return None if logits is None else logits.float(), features.float()

    def maps(self, clips: Clips) -> Float[Tensor, "b d 1 1 1"]:
        """Return features as maps of one cell: the teacher has pooled them."""
        return self.read(clips)[1][:, :, None, None, None]


class OwnClassifier(OwnBackbone):
    """A fitted teacher: it needs no head, and a call returns logits and features."""

    fitted = True

    def forward(self, clips: Tensor) -> tuple[Tensor | None, Tensor]:  # type: ignore[override]
        return self.read(clips)


def build_classifier(backbone: Backbone, classes: int) -> Classifier | OwnClassifier:
    """Return the backbone with a new head, or a fitted teacher as it is.

    Its call gives logits [b, c] and features [b, d] of clips.

    Raises:
        UserError: a fitted teacher has logits over another number of classes.
    """
    if not isinstance(backbone, OwnClassifier):
        return Classifier(backbone, classes)
    if backbone.classes != classes:
        theirs = f"this teacher's logits are over {backbone.classes} classes"
        raise UserError(f"{theirs}, but the data has {classes}; read its features only")
    return backbone


def find_source(name: str) -> Callable[[int, int, int], Any] | OwnBackbone:
    """Return what a teacher is made from: a pretext task's class, or a network of the user's own.

    ``name`` is of ``TASKS``; or MODULE:NAME of a class with the shape of a ``PretextTask``, or of a
    function that returns a :class:`Teacher`; what that draws is the same at every call.

    Raises:
        UserError: there is no such thing, or it is something else.
    """
    found = resolve(split_home(name)[0], TASKS, "task")
    if isinstance(found, type) and hasattr(found, "views"):
        if lacking := [part for part in ("metric", "chance") if not hasattr(found, part)]:
            raise UserError(f"{name}: a pretext task needs {' and '.join(lacking)}, too")
        return found
    wanted = "name a pretext task's class, or a function that returns a Teacher (docs/own.md)"
    try:
        signature(found).bind()
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: {error}; {wanted}") from None
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            teacher = found()
        if not isinstance(teacher, nn.Module) or not isinstance(teacher, Teacher):
            raise UserError(f"returned {type(teacher).__name__}; {wanted}")
        return OwnClassifier(teacher) if teacher.fitted else OwnBackbone(teacher)
    except Exception as error:  # whatever a network of others raises
        raise UserError(f"{name}: {in_a_line(error)}") from error

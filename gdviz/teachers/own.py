"""Teachers of your own: any video network, its features and logits read where they arise.

The network itself stays as it is. Name a function that returns a :class:`Teacher` as MODULE:NAME
wherever a teacher is asked for; a class that is a :class:`~gdviz.teachers.pretext.PretextTask` may
stand there as well (docs/own.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import interpolate

from gdviz.core.files import UserError
from gdviz.core.names import resolve
from gdviz.teachers.backbones import Backbone, Classifier, Renormalise
from gdviz.teachers.pretext import TASKS, PretextTask


@dataclass(frozen=True)
class OwnView:
    """How a network wants its clips: scaled to [0, 1], then ``(x - mean) / std`` of each colour."""

    size: int  # side, in pixels
    length: int  # frames
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # ImageNet's
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    frames_first: bool = False  # [b, t, 3, h, w], as Hugging Face's models take them


@runtime_checkable
class Teacher(Protocol):
    """A video network that a student may learn from.

    Attributes:
        view: how it wants its clips.
        fitted: its logits are over the classes of the data already. It must not have seen the
            labelled videos: what it says of them counts as out of fold.
    """

    view: OwnView
    fitted: bool

    def __call__(self, clips: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return logits [b, c], or None unless fitted, and features [b, d] of clips in its view."""


class Tapped(nn.Module):
    """A :class:`Teacher` made of any network, by hooks: its features are the mean over tokens, or
    over space and time, of what the module at ``features`` returns.

    Args:
        net: takes clips in ``view``.
        features: path of the module to read, as in ``net.named_modules()``; "" is the network's
            own output.
        view: how the network wants its clips.
        logits: path of the module whose output are logits over the data's classes; None: a head
            is fitted on the features.
        channels: axis of the features; by default 1 of maps [b, d, t, h, w] and the last of
            tokens [b, n, d].
        frozen: only a head is ever fitted on it, and no gradient is kept.

    Raises:
        ValueError: on use: no such module (near names are listed), one that is not run, or an
            output without features.
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
        self.net, self.view, self.frozen, self.channels = net, view, frozen, channels
        self.features, self.logits = features, logits

    @property
    def fitted(self) -> bool:
        return self.logits is not None

    def extra_repr(self) -> str:
        return f"{self.features!r}, {self.view}, logits={self.logits!r}, channels={self.channels}"

    def train(self, mode: bool = True) -> Tapped:
        return super().train(mode and not self.frozen)

    def read(self, clips: Tensor, **paths: str) -> list[Tensor]:
        """Run the network; return what the modules at ``paths`` return, by argument name."""
        names, seen = [name for name, _ in self.net.named_modules()], {}
        with ExitStack() as hooks, torch.no_grad() if self.frozen else nullcontext():
            for argument, path in paths.items():
                if path not in names:
                    near = get_close_matches(path, names, 5, 0.3) or names[1:6]
                    kind = type(self.net).__name__
                    raise ValueError(
                        f"{argument}={path!r}: no such module in {kind}; near: {', '.join(near)}"
                    )
                keep = partial(seen.__setitem__, path)
                module = self.net.get_submodule(path)
                hook = module.register_forward_hook(lambda *call, keep=keep: keep(call[-1]))
                hooks.enter_context(hook)
            self.net(clips)
        if idle := [f"{argument}={p!r}" for argument, p in paths.items() if p not in seen]:
            raise ValueError(f"{', '.join(idle)}: the network runs without it; read another module")
        return [_tensor(seen[path], path) for path in paths.values()]

    def pool(self, maps: Tensor) -> Float[Tensor, "b d"]:
        """Return the mean over all axes but the batch's and the channels'."""
        if maps.ndim not in (2, 3, 5):
            raise ValueError(
                f"features={self.features!r}: [b, d], [b, n, d] or [b, d, t, h, w] wanted, "
                f"not {list(maps.shape)}"
            )
        channels = self.channels
        if channels is None:
            channels = 1 if maps.ndim == 5 else -1
        return maps.movedim(channels, 1).flatten(2).mean(2) if maps.ndim > 2 else maps

    def forward(self, clips: Tensor) -> tuple[Tensor | None, Float[Tensor, "b d"]]:
        if self.logits is None:
            return None, self.pool(self.read(clips, features=self.features)[0])
        maps, logits = self.read(clips, features=self.features, logits=self.logits)
        return logits, self.pool(maps)


def _tensor(output: Any, path: str) -> Tensor:
    """The tensor of an output that may be a tuple, or a mapping as Hugging Face's."""
    parts = output.values() if isinstance(output, Mapping) else output
    if isinstance(output, Tensor):
        return output
    for part in parts if isinstance(parts, Iterable) else ():
        if isinstance(part, Tensor):
            return part
    raise ValueError(f"{path!r} returns {type(output).__name__}, in which there is no tensor")


class OwnBackbone(Backbone):
    """A :class:`Teacher` as a backbone: clips as this package scales them are brought into its
    view.

    Frames are resampled to its length and pixels to its size. A fitted one serves as a classifier,
    too: then a call returns (logits, features).
    """

    def __init__(self, teacher: Teacher) -> None:
        net = teacher if isinstance(teacher, nn.Module) else _Called(teacher)
        super().__init__(net, 0)
        self.view, self.fitted = teacher.view, teacher.fitted
        device = next((p.device for p in net.parameters()), torch.device("cpu"))
        self.scale = Renormalise(self.view.mean, self.view.std).to(device)
        mode = net.training
        self.eval()
        with torch.no_grad():
            clip = torch.zeros(1, 3, self.view.length, self.view.size, self.view.size)
            self.dim = self._ask(clip.to(device))[1].shape[1]
        self.train(mode)

    def extra_repr(self) -> str:
        return f"{self.view}, fitted={self.fitted}"

    def _ask(self, clips: Float[Tensor, "b 3 t h w"]) -> tuple[Tensor | None, Tensor]:
        view, frames = self.view, clips.shape[2]
        size = (frames, view.size, view.size)
        clips = interpolate(self.scale(clips), size, mode="trilinear", align_corners=False)
        clips = clips[:, :, torch.linspace(0, frames - 1, view.length).round().long()]
        return self.trunk(clips.transpose(1, 2) if view.frames_first else clips)

    def forward(self, clips: Float[Tensor, "b 3 t h w"]) -> Any:
        logits, features = self._ask(clips)
        return (logits, features) if self.fitted else features


class _Called(nn.Module):
    """A teacher that is no module."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.teacher = teacher

    def extra_repr(self) -> str:
        return repr(self.teacher)

    def forward(self, clips: Tensor) -> tuple[Tensor | None, Tensor]:
        return self.teacher(clips)


def build_classifier(backbone: Backbone, classes: int) -> nn.Module:
    """Return a module of clips -> (logits [b, c], features [b, d]); a fitted teacher is one."""
    if isinstance(backbone, OwnBackbone) and backbone.fitted:
        return backbone
    return Classifier(backbone, classes)


def find_source(name: str) -> type[PretextTask] | OwnBackbone:
    """Return the pretext task of that name, or a network of the user's own, MODULE:NAME.

    A function is called without arguments and with a fixed seed, so that parts it draws are the
    same in every process and when a run goes on.

    Raises:
        UserError: there is no such thing, or it is neither a task nor a teacher.
    """
    found = resolve(name, TASKS, "task")
    if isinstance(found, type) and hasattr(found, "views"):
        return found
    if callable(found):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            found = found()
    if not (isinstance(getattr(found, "view", None), OwnView) and callable(found)):
        raise UserError(
            f"{name}: gives {type(found).__name__}; wanted is a pretext task (a class) or a "
            "function that returns a teacher, such as gdviz.teachers.own.Tapped"
        )
    return OwnBackbone(found)

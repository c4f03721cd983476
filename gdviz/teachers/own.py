"""Bring your own teacher: any video network, its features and logits read where they arise, the network itself left as it is."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, nullcontext
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import interpolate

from gdviz.teachers.backbones import Backbone, Renormalise


def _first(output: Any, path: str) -> Tensor:
    """The tensor of an output that may be a tuple or, as Hugging Face's, a mapping whose first value is what was asked for."""
    parts = (
        output.values()
        if isinstance(output, Mapping)
        else output
        if isinstance(output, Iterable)
        else ()
    )
    found = (
        output
        if isinstance(output, Tensor)
        else next((part for part in parts if isinstance(part, Tensor)), None)
    )
    if found is None:
        raise ValueError(
            f"{path!r} returns {type(output).__name__}, in which there is no tensor; tap another module"
        )
    return found


class TappedBackbone(Backbone):
    """A foreign network as a :class:`~gdviz.teachers.backbones.Backbone`: features are the mean over tokens, or space and time, at ``features``.

    Clips [b, 3, t, h, w] come as this package scales them and are resampled to ``length`` frames and ``size`` pixels.

    Args:
        net: any module that takes clips; it is put into eval mode and stays there if ``frozen``.
        features: path of the module to read, as in ``net.named_modules()``; "" is the network's own output.
        size: side of its input, in pixels.
        length: frames of its input.
        mean, std: what its colours, in [0, 1], are normalised by; the default is ImageNet's.
        frames_first: it takes [b, t, 3, h, w], as Hugging Face's models do.
        channels: axis of the features; by default 1 of maps [b, d, t, h, w] and the last of tokens [b, n, d].
        frozen: only a head is ever fitted on it, and no gradient is kept.

    Raises:
        ValueError: no such module (near names are listed), one that is not run, or an output without features.
    """

    def __init__(
        self, net: nn.Module, features: str, *, size: int, length: int,
        mean: tuple[float, ...] = (0.485, 0.456, 0.406), std: tuple[float, ...] = (0.229, 0.224, 0.225),
        frames_first: bool = False, channels: int | None = None, frozen: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(net, 0)
        self.features, self.size, self.length, self.channels = features, size, length, channels
        self.frames_first, self.frozen = frames_first, frozen
        device = next(net.parameters()).device
        self.scale = Renormalise(mean, std).to(device)
        mode = net.training
        with torch.no_grad():
            self.dim = self.eval()(torch.zeros(1, 3, length, size, size, device=device)).shape[1]
        self.train(mode)

    def extra_repr(self) -> str:
        names = ("features", "size", "length", "channels", "frames_first", "frozen")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def train(self, mode: bool = True) -> TappedBackbone:
        return super().train(mode and not self.frozen)

    def tap(self, clips: Float[Tensor, "b 3 t h w"], **paths: str) -> list[Tensor]:
        """Runs the network; what the modules at ``paths``, by argument name, return. Hooks live no longer than this call."""
        names, seen = [name for name, _ in self.trunk.named_modules()], {}
        clips = interpolate(
            self.scale(clips),
            (clips.shape[2], self.size, self.size),
            mode="trilinear",
            align_corners=False,
        )
        clips = clips[:, :, torch.linspace(0, clips.shape[2] - 1, self.length).round().long()]
        with ExitStack() as hooks, torch.no_grad() if self.frozen else nullcontext():
            for argument, path in paths.items():
                if path not in names:
                    near = get_close_matches(path, names, 5, 0.3) or names[1:6]
                    raise ValueError(
                        f"{argument}={path!r}: no such module in {type(self.trunk).__name__}; near: {', '.join(near)}"
                    )
                keep = partial(seen.__setitem__, path)
                hooks.enter_context(
                    self.trunk.get_submodule(path).register_forward_hook(
                        lambda *call, keep=keep: keep(call[-1])
                    )
                )
            self.trunk(clips.transpose(1, 2) if self.frames_first else clips)
        if idle := [f"{argument}={path!r}" for argument, path in paths.items() if path not in seen]:
            raise ValueError(f"{', '.join(idle)}: the network runs without it; tap another module")
        return [_first(seen[path], path) for path in paths.values()]

    def maps(self, clips: Float[Tensor, "b 3 t h w"]) -> Tensor:
        """What is read, unpooled."""
        return self.tap(clips, features=self.features)[0]

    def pool(self, maps: Tensor) -> Float[Tensor, "b d"]:
        """Mean over all axes but the batch's and the channels'."""
        if maps.ndim not in (2, 3, 5):
            raise ValueError(
                f"features={self.features!r}: [b, d], [b, n, d] or [b, d, t, h, w] wanted, not {list(maps.shape)}"
            )
        channels = self.channels if self.channels is not None else 1 if maps.ndim == 5 else -1
        return maps.movedim(channels, 1).flatten(2).mean(2) if maps.ndim > 2 else maps

    def forward(self, clips: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, "b d"]:
        return self.pool(self.maps(clips))


class TappedClassifier(nn.Module):
    """A foreign network that already answers in the classes of the data, as a :class:`~gdviz.teachers.backbones.Classifier`.

    ``gdviz.teachers.fit.fit`` leaves it as it is. It must not have seen the labelled videos: what it says of them
    counts as out of fold.

    Args:
        backbone: the network and its features.
        logits: path of the module to read; "" is the network's own output.
    """

    def __init__(self, backbone: TappedBackbone, logits: str = "") -> None:
        super().__init__()
        self.backbone, self.logits = backbone, logits

    def extra_repr(self) -> str:
        return repr(self.logits)

    def forward(
        self, clips: Float[Tensor, "b 3 t h w"]
    ) -> tuple[Float[Tensor, "b c"], Float[Tensor, "b d"]]:
        maps, logits = self.backbone.tap(clips, features=self.backbone.features, logits=self.logits)
        return logits, self.backbone.pool(maps)


def own_teacher(name: str) -> TappedBackbone | TappedClassifier:
    """What the function ``MODULE:FUNCTION`` returns, the same at every call; modules are looked for in the working directory, too.

    Raises:
        ValueError: there is no such function, or it returns something else.
    """
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        with torch.random.fork_rng():
            torch.manual_seed(
                0
            )  # parts that are drawn are the same in every process, and when a run goes on
            made = getattr(import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{name}: {error}; name a function without arguments, as MODULE:FUNCTION"
        ) from error
    if not isinstance(made, TappedBackbone | TappedClassifier):
        raise ValueError(
            f"{name}: returned {type(made).__name__}; a gdviz.teachers.own.TappedBackbone or TappedClassifier is wanted"
        )
    return made

"""What a frozen network says of videos: the mean over their clips, or clip by clip, read out once and kept.

    clips/00000.safetensors   of the first 4,096 videos: [videos, clips, ...] in half precision, and a stamp
    clips/index.json          written last: of which videos, seen how

A safetensors file is a memory map: what training asks for is read, and no more. The stamp is of the network's
weights, the videos and the view: a part of anything else is never taken for one of these.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from gdviz.config import View
from gdviz.core import distributed as ranks
from gdviz.core.files import (
    UserError,
    fingerprint,
    load_json,
    load_tensors,
    meta_of,
    save_json,
    save_tensors,
)
from gdviz.data.clips import multi_views
from gdviz.data.videos import VideoSet
from gdviz.teachers.backbones import Classifier
from gdviz.teachers.own import TappedClassifier

PART = 4096  # videos of a file: the unit of resumption
VERSION = 1  # raise when what is kept changes


def device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


@torch.no_grad()
def predict(
    model: Classifier | TappedClassifier,
    videos: VideoSet,
    rows: Tensor,
    view: View,
    batch: int = 128,
    *,
    crops: int = 1,
    each: bool = False,
) -> tuple[Tensor, Tensor]:
    """Logits [n, c] and features [n, d] of ``rows``, means over ``view.clips`` clips a video and ``crops`` of each; ranks share them.

    With ``each``, those of every clip: [n, clips x crops, c] and [n, clips x crops, d].
    """
    model.eval()
    device = device_of(model)

    def see(part: Tensor) -> list[Tensor]:
        frames = videos.batch(part).to(device)
        seen = [
            model(clips)
            for clips in multi_views(frames, view.length, view.stride, view.clips, crops)
        ]
        stacked = [torch.stack(outputs) for outputs in zip(*seen, strict=True)]
        return [x.transpose(0, 1) if each else x.mean(0) for x in stacked]

    even = rows[
        torch.arange(math.ceil(len(rows) / ranks.world()) * ranks.world()) % len(rows)
    ]  # the last ones may be read twice
    seen = zip(*map(see, ranks.deal(even).split(batch)), strict=True)
    logits, features = (ranks.gather(torch.cat(parts).float())[: len(rows)].cpu() for parts in seen)
    return logits, features


@dataclass(frozen=True)
class ClipOutputs:
    """What a teacher says of every clip of every video, by parts of ``PART`` videos; labelled ones have out-of-fold logits."""

    parts: Sequence[dict[str, Tensor]]

    def at(self, name: str, rows: Tensor, clips: Tensor) -> Float[Tensor, "b _"]:
        """``logits`` or ``features`` of clip ``clips[i]`` of video ``rows[i]``."""
        number, place = rows // PART, rows % PART
        out = torch.empty(len(rows), self.parts[0][name].shape[-1], dtype=torch.float32)
        for n in number.unique().tolist():
            here = number == n
            out[here] = self.parts[n][name][place[here], clips[here]].float()
        return out

    def mean(self, name: str) -> Float[Tensor, "n _"]:
        """Over the clips of each video."""
        return torch.cat([part[name].float().mean(1) for part in self.parts])


def stamp_of(models: Sequence[nn.Module], videos: VideoSet, view: View) -> str:
    """Fingerprint of what determines the outputs: networks, how they are tapped (their ``repr``), videos, view."""
    weights = hashlib.sha256()
    for model in models:
        weights.update(repr(model).encode())
        for name, value in model.state_dict().items():
            weights.update(
                name.encode()
                + value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            )
    return fingerprint(weights.hexdigest(), videos.fingerprint, view, VERSION)


def read_out(
    say: Callable[[Tensor], dict[str, Tensor]],
    videos: VideoSet,
    view: View,
    folder: Path | None,
    stamp: str,
    progress: str | None = None,
) -> ClipOutputs:
    """Keeps what ``say`` answers of every video, part by part; goes on where an earlier call stood.

    Args:
        say: rows [m] to tensors [m, clips, ...], or of fewer videos.
        videos: the set; all of it is read.
        view: how, for whoever opens it.
        folder: where parts are kept; None keeps them in memory.
        stamp: see :func:`stamp_of`.
        progress: title of the progress bar; None hides it.

    Raises:
        ValueError: an output that half precision does not hold.
    """
    parts = []
    for n, rows in enumerate(
        tqdm(
            torch.arange(len(videos.splits)).split(PART),
            desc=progress,
            disable=progress is None,
            leave=False,
        )
    ):
        file = folder and folder / f"{n:05d}.safetensors"
        if not ranks.agreed(file is not None and meta_of(file).get("stamp") == stamp):
            said = {name: value.half() for name, value in say(rows).items()}
            if unheld := [name for name, value in said.items() if not value.isfinite().all()]:
                raise ValueError(
                    f"{' and '.join(unheld)} of a teacher are not finite, or larger than the 65504 that half precision holds"
                )
            if file is None:
                parts.append(said)
            elif ranks.first():
                save_tensors(file, said, stamp=stamp)
        if file is not None:
            ranks.agreed(None)  # all read what the first has written
            parts.append(load_tensors(file))
    if folder and ranks.first():
        how = {"version": VERSION, "part": PART, "videos": videos.fingerprint, "view": view}
        save_json(folder / "index.json", how | {"stamp": stamp, "parts": len(parts)})
    return ClipOutputs(parts)


def is_whole(folder: Path) -> bool:
    """Whether nothing is missing of what :func:`read_out` has kept."""
    index = folder / "index.json"
    return index.exists() and all(
        (folder / f"{n:05d}.safetensors").exists() for n in range(load_json(index)["parts"])
    )


def open_clips(folder: Path, videos: VideoSet, view: View) -> ClipOutputs:
    """What :func:`read_out` has kept.

    Raises:
        UserError: it is missing or damaged, or of other videos or another view.
    """
    index = load_json(folder / "index.json")
    wanted = {"version": VERSION, "part": PART, "videos": videos.fingerprint}
    wanted |= {"stride": view.stride, "length": view.length, "clips": view.clips}
    if differing := [
        name for name, value in wanted.items() if value != (index | index["view"])[name]
    ]:
        raise UserError(
            f"{folder}: of another set ({', '.join(differing)} differ); delete it to have that teacher made again"
        )
    files = [folder / f"{n:05d}.safetensors" for n in range(index["parts"])]
    parts = [load_tensors(file) for file in files]
    if other := [file.name for file in files if meta_of(file).get("stamp") != index["stamp"]]:
        raise UserError(
            f"{folder}: {', '.join(other)} of another teacher; delete the folder to have it made again"
        )
    return ClipOutputs(parts)

"""The bank: what frozen teachers say of every clip of every video, read out once and kept.

    TEACHER/bank/00000.safetensors   of the first 4,096 videos, in half precision
    TEACHER/bank/index.json          written last: of which videos, seen how; the temperature

A file holds raw ``logits [videos, clips, c]`` and ``features [videos, clips, d]``, the ``fold``
of labelled videos (else -1), and ``held``, their features out of fold. Logits of labelled videos
are out of fold. Features are all the teacher's own: those of its copies live in other spaces.
A safetensors file is a memory map: what training asks for is read, and no more.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from gdviz.config import View
from gdviz.core import distributed, files
from gdviz.core.files import UserError, meta_of
from gdviz.data.clips import clip_places, to_float
from gdviz.data.videos import VideoSet
from gdviz.graphs import two_class

PART = 4096  # videos of a file: the unit of resumption
VERSION = 2  # raise when what is kept changes


def device_of(module: nn.Module) -> torch.device:
    """Return where a module computes; the CPU if it holds no tensor."""
    held = (*module.parameters(), *module.buffers())
    return next((x.device for x in held), torch.device("cpu"))


@torch.no_grad()
def predict(
    model: nn.Module, videos: VideoSet, rows: Int[Tensor, " n"], view: View
) -> tuple[Float[Tensor, "n v c"], Float[Tensor, "n v d"]]:
    """Return logits and features of each of ``view.clips`` clips of these videos.

    ``model`` returns both of clips, and is put into eval mode. Ranks share the work.
    """
    model.eval()
    device, world, seen = device_of(model), distributed.world(), []
    even = rows[torch.arange(math.ceil(len(rows) / world) * world) % len(rows)]  # some twice
    for part in distributed.deal(even).split(128):
        read = partial(videos.clips, part, view.length, view.stride)
        clips = (to_float(read(place=p).to(device)) for p in clip_places(view.clips))
        clips = (clip.transpose(1, 2) for clip in clips)
        seen.append([torch.stack(of, 1) for of in zip(*map(model, clips), strict=True)])
    whole = (distributed.gather(torch.cat(parts).float()) for parts in zip(*seen, strict=True))
    logits, features = (x[: len(rows)].cpu() for x in whole)
    return logits, features


def calibration_temperature(
    logits: Float[Tensor, "n c"],
    labels: Int[Tensor, " n"],
    weights: Float[Tensor, " n"] | None = None,
) -> float:
    """Return the t on a grid with the least cross-entropy of ``logits / t`` (Guo et al. 2017).

    Rows count by ``weights``, by default alike.
    """
    grid = torch.logspace(-2, 4, 121, base=2.0)
    weights = torch.ones(len(labels)) if weights is None else weights
    each = [cross_entropy(logits / t, labels, reduction="none") for t in grid]
    return float(grid[(torch.stack(each) @ weights).argmin()])


def cases_of(logits: Float[Tensor, "n c"], several: bool) -> Float[Tensor, "m d"]:
    """Return logits as they are, or with ``several`` labels a video a case a class: is it there?"""
    return two_class(logits).flatten(0, 1) if several else logits


def as_cases(
    logits: Float[Tensor, "n c"], labels: Int[Tensor, "n ..."]
) -> tuple[Float[Tensor, "m d"], Int[Tensor, " m"]]:
    """Return the cases of logits, and their labels."""
    return cases_of(logits, labels.ndim > 1), labels.flatten()


@dataclass(frozen=True)
class Readout:
    """One teacher's raw logits and features of every clip of every video, ``PART`` videos a part.

    Attributes:
        parts: ``logits [m, v, c]``, ``features [m, v, d]``, ``fold [m]`` and ``held [h, v, d]``,
            whose row i is the i-th video of the part with a fold.
        temperature: what the logits are divided by to be calibrated.
        home: ``[m, d]`` features of the unlabelled videos that the teacher was trained on, where
            they are not those of the set.
    """

    parts: Sequence[dict[str, Tensor]]
    temperature: float = 1.0
    home: Float[Tensor, "m d"] | None = None

    @property
    def fold(self) -> Int[Tensor, " n"]:
        """Cross-fitting fold of each labelled training video, else -1."""
        return torch.cat([part["fold"] for part in self.parts]).long()

    def at(self, name: str, rows: Tensor, clips: Tensor | None = None) -> Float[Tensor, "b _"]:
        """Return means over clips of ``logits``, ``features`` or ``held`` of these videos.

        With ``clips``, the values of clip ``clips[i]`` of video ``rows[i]``; not so for ``held``:
        features out of fold where a video has a fold, else its plain features, always averaged.
        """
        stored = "features" if name == "held" else name
        out = torch.empty(len(rows), self.parts[0][stored].shape[-1])
        for n in (rows // PART).unique().tolist():
            here, part = (rows // PART == n).nonzero().squeeze(1), self.parts[n]
            place = rows[here] % PART
            if clips is not None and name != "held":
                out[here] = part[name][place, clips[here]].float()
            else:
                out[here] = part[stored][place].float().mean(1)
            if name == "held":  # over what was just written
                known, row = part["fold"][place] >= 0, (part["fold"] >= 0).cumsum(0) - 1
                out[here[known]] = part["held"][row[place[known]]].float().mean(1)
        return out

    @classmethod
    def from_means(
        cls,
        logits: Float[Tensor, "n c"],
        features: Float[Tensor, "n d"],
        fold: Int[Tensor, " n"],
        held: Float[Tensor, "n d"] | None = None,
        temperature: float = 1.0,
    ) -> Readout:
        """Return a readout in memory, of one clip a video (at most ``PART`` videos)."""
        held = (features if held is None else held)[fold >= 0]
        means = {"logits": logits, "features": features, "held": held}
        return cls([{name: x[:, None] for name, x in means.items()} | {"fold": fold}], temperature)


def stamp_of(models: Sequence[nn.Module], videos: VideoSet, view: View) -> str:
    """Return a fingerprint of all that a readout depends on: networks (their ``repr``, too)."""
    weights = hashlib.sha256()
    for model in models:
        weights.update(repr(model).encode())
        for name, value in model.state_dict().items():
            raw = value.cpu().contiguous().view(-1).view(torch.uint8).numpy()
            weights.update(name.encode() + raw.tobytes())
    return files.fingerprint(weights.hexdigest(), videos.fingerprint, view, VERSION)


def _part(
    models: Sequence[nn.Module], fold: Tensor, videos: VideoSet, rows: Tensor, view: View
) -> dict[str, Tensor]:
    """Ask the teacher about ``rows``; about labelled ones, the copy that has not seen them."""
    logits, features = predict(models[0], videos, rows, view)
    held, fold = features.clone(), fold[rows]
    for number, copy in enumerate(models[1:]):
        own = fold == number
        if own.any():
            logits[own], held[own] = predict(copy, videos, rows[own], view)
    part = {"logits": logits.half(), "features": features.half(), "held": held[fold >= 0].half()}
    if lost := [name for name, value in part.items() if not value.isfinite().all()]:
        limit = "larger than the 65504 that half precision holds"
        raise ValueError(f"{' and '.join(lost)} of a teacher are not finite, or {limit}")
    return part | {"fold": fold.short()}


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors"


def read_out(
    models: Sequence[nn.Module],
    fold: Int[Tensor, " n"],
    videos: VideoSet,
    view: View,
    folder: Path | None = None,
) -> Readout:
    """Read a teacher out on every video, part by part; go on where an earlier call stood.

    ``models`` are the teacher, then for each ``fold`` the copy that was fitted without it. Parts
    are kept in ``folder``; None keeps them in memory.

    Raises:
        ValueError: an output that half precision does not hold.
    """
    stamp, parts = stamp_of(models, videos, view), []
    for number, rows in enumerate(torch.arange(len(videos.splits)).split(PART)):
        file = folder and _file(folder, number)
        kept = distributed.agreed(file is not None and meta_of(file).get("stamp") == stamp)
        part = {} if kept else _part(models, fold, videos, rows, view)
        if file:
            if part and distributed.first():
                files.save_tensors(file, part, stamp=stamp)
            distributed.agreed(None)  # all read what the first one has written
            part = files.load_tensors(file)
        parts.append(part)
    train = videos.rows("train")
    logits = Readout(parts).at("logits", train)
    readout = Readout(parts, calibration_temperature(*as_cases(logits, videos.labels[train])))
    if folder and distributed.first():
        save_readout(folder, readout, videos, view, stamp)
    return readout


def save_readout(folder: Path, readout: Readout, videos: VideoSet, view: View, stamp: str) -> None:
    """Write ``index.json``, and the parts that are not there."""
    for number, part in enumerate(readout.parts):
        if meta_of(_file(folder, number)).get("stamp") != stamp:
            files.save_tensors(_file(folder, number), part, stamp=stamp)
    index = {"version": VERSION, "part": PART, "parts": len(readout.parts), "stamp": stamp}
    index |= {"videos": videos.fingerprint, "view": view, "temperature": readout.temperature}
    files.save_json(folder / "index.json", index)


def is_read_out(folder: Path) -> bool:
    """Return whether nothing is missing of what :func:`read_out` has kept."""
    index = folder / "index.json"
    if not index.exists():
        return False
    return all(_file(folder, n).exists() for n in range(files.load_json(index)["parts"]))


def open_readout(folder: Path, videos: VideoSet, view: View) -> Readout:
    """Open what :func:`read_out` has kept.

    Raises:
        UserError: it is missing or damaged, or of other videos or another view.
    """
    index = files.load_json(folder / "index.json")
    wanted = {"version": VERSION, "part": PART, "videos": videos.fingerprint}
    wanted |= {"stride": view.stride, "length": view.length, "clips": view.clips}
    found = index | index.get("view", {})
    again = "delete it to have that teacher made again"
    if differing := [name for name, value in wanted.items() if value != found.get(name)]:
        raise UserError(f"{folder}: is of another set ({', '.join(differing)} differ); {again}")
    names = [_file(folder, number) for number in range(index["parts"])]
    parts = [files.load_tensors(file) for file in names]
    if other := [file.name for file in names if meta_of(file).get("stamp") != index["stamp"]]:
        raise UserError(f"{folder}: {', '.join(other)} of another teacher; {again}")
    home = folder / "home.safetensors"
    known = files.load_tensors(home)["features"] if home.exists() else None
    return Readout(parts, index["temperature"], known)


@dataclass(frozen=True)
class Bank:
    """What K frozen teachers say of every video of a set.

    A case m is a video; where videos have several labels it is a class of a video, "is it there?".
    """

    teachers: tuple[str, ...]
    readouts: tuple[Readout, ...]  # what each said, by clip
    logits: Float[Tensor, "m k c"]  # calibrated means over clips
    labels: Int[Tensor, " m"]  # of the labelled training part, else -1: no other is passed on
    fold: Int[Tensor, " n"]  # cross-fitting fold of a labelled video, else -1
    dealt: Int[Tensor, " n"] | None = None  # where shuffled: whose outputs row i is given

    @property
    def cases_each(self) -> int:
        """Return the number of cases of a video."""
        return len(self.labels) // len(self.fold)

    def cases(self, rows: Int[Tensor, " b"]) -> Int[Tensor, " q"]:
        """Return the cases of these videos, in order."""
        each = self.cases_each
        return (rows[:, None] * each + torch.arange(each, device=rows.device)).flatten()

    def soft_labels(self, probs: Float[Tensor, "q c"]) -> Float[Tensor, "b _"]:
        """Return probabilities of cases as soft labels of their videos."""
        each = self.cases_each
        return probs if each == 1 else probs[:, 1].unflatten(0, (-1, each))

    @property
    def targets(self) -> Int[Tensor, "n ..."]:
        """Return the labels by video, as those of the set."""
        each = self.cases_each
        return self.labels if each == 1 else self.labels.unflatten(0, (-1, each))

    @property
    def dims(self) -> list[int]:
        """Sizes of the teachers' features."""
        return [readout.parts[0]["features"].shape[-1] for readout in self.readouts]

    @property
    def homes(self) -> tuple[Tensor | None, ...]:
        """Features of the videos that each teacher was trained on, where it had its own."""
        return tuple(readout.home for readout in self.readouts)

    def probs(self, temperature: float | Float[Tensor, " k"] = 1.0) -> Float[Tensor, "m k c"]:
        """Return ``softmax(logits / temperature)``; one for all teachers, or one each."""
        each = torch.as_tensor(temperature).expand(len(self.teachers))
        return torch.softmax(self.logits / each[:, None], dim=-1)

    def recalibrated(self, weights: Float[Tensor, "m k"]) -> Float[Tensor, " k"]:
        """Return what divides each teacher's logits so that they are calibrated where it counts.

        ``argmin_t sum_n w_nk CE(z_nk / t, y_n)`` over labelled cases: a specialist, unsure on the
        whole, may be sure at home.
        """
        known = self.labels >= 0
        if not bool(known.any()):
            return torch.ones(len(self.teachers))
        z, y, w = self.logits[known], self.labels[known], weights[known]
        each = range(len(self.teachers))
        return torch.tensor([calibration_temperature(z[:, k], y, w[:, k]) for k in each])

    def logits_at(self, rows: Tensor, clips: Tensor | None = None) -> Float[Tensor, "q k c"]:
        """Return calibrated logits of these videos' cases, or of clip ``clips[i]`` of each."""
        if clips is None:
            return self.logits[self.cases(rows)]
        return _logits(self.readouts, self._told(rows), clips, self.cases_each > 1)

    def features_at(
        self, rows: Tensor, clips: Tensor | None = None, *, held: bool = False
    ) -> list[Float[Tensor, "b _"]]:
        """Return features of these videos, or of one clip of each; with ``held`` out of fold."""
        name, told = "held" if held else "features", self._told(rows)
        return [readout.at(name, told, clips) for readout in self.readouts]

    def _told(self, rows: Tensor) -> Tensor:
        return rows if self.dealt is None else self.dealt[rows]

    def shuffled(self, rows: Tensor, seed: int) -> Bank:
        """Return the control: what is known of the videos in ``rows``, dealt to wrong ones."""
        order = torch.arange(len(self.fold))
        order[rows] = rows[torch.randperm(len(rows), generator=Generator().manual_seed(seed))]
        return replace(self, logits=self.logits[self.cases(order)], dealt=self._told(order))

    def with_impostors(self) -> Bank:
        """Return the bank with a constant teacher and a liar, who shifts the last one's classes."""
        last, outputs = self.readouts[-1], ("logits", "features", "held")
        flat = [part | {n: torch.zeros_like(part[n]) for n in outputs} for part in last.parts]
        lies = [part | {"logits": part["logits"].roll(1, -1)} for part in last.parts]
        more = Readout(flat), replace(last, parts=lies)
        said = _logits(more, torch.arange(len(self.fold)), None, self.cases_each > 1)
        teachers, logits = (*self.teachers, "constant", "liar"), torch.cat([self.logits, said], 1)
        readouts = (*self.readouts, *more)
        return replace(self, teachers=teachers, readouts=readouts, logits=logits)

    def best_teacher(self) -> int:
        """Return which teacher is most often right out of fold: a choice without test labels.

        Of several labels the one with the least cross-entropy: most cases are "not there".
        """
        known = self.labels >= 0
        logits, labels = self.logits[known], self.labels[known]
        if self.cases_each > 1:
            wrong = [cross_entropy(z, labels) for z in logits.unbind(1)]
            return int(torch.stack(wrong).argmin())
        return int((logits.argmax(-1) == labels[:, None]).float().mean(0).argmax())


def _logits(
    readouts: Sequence[Readout], rows: Tensor, clips: Tensor | None, several: bool
) -> Float[Tensor, "m k c"]:
    said = [readout.at("logits", rows, clips) / readout.temperature for readout in readouts]
    return torch.stack([cases_of(z, several) for z in said], 1)


def gather(readouts: dict[str, Readout], videos: VideoSet) -> Bank:
    """Return the bank of these teachers, by name."""
    every, each = torch.arange(len(videos.splits)), tuple(readouts.values())
    labels = torch.full_like(videos.labels, -1)
    labels[videos.rows("train")] = videos.labels[videos.rows("train")]
    logits = _logits(each, every, None, labels.ndim > 1)
    # Those with homes of their own have one fold; the others were dealt the same ones.
    fold = max((readout.fold for readout in each), key=lambda fold: int(fold.max()))
    return Bank(tuple(readouts), each, logits, labels.flatten(), fold)

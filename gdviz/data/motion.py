"""The embedded data set: short videos whose class is the motion and nothing else.

A random textured shape lies on a random drifting background and does one of twelve things. Every
quantity that a motion changes is *cyclic* and starts uniformly distributed: position on a torus,
orientation on a circle, size on a Shepard scale (two nested copies, half an octave apart, fade in
and out). So the law of any single frame is the same for all classes: no frame tells the class,
by construction; ``gdviz.experiment.metrics.shortcut_baselines`` measures it.

Videos may be of several *domains*: looks that say nothing of the class, drawn in turn.
``index.csv`` notes them for audits, and nothing is trained on them.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from gdviz.config import MotionData
from gdviz.core.files import UserError, atomic, file_sha256, fingerprint
from gdviz.core.processes import over_processes
from gdviz.data._encode import encode
from gdviz.data.listing import mark_as_cache

# What moves, and which way: at constant speed, or, without a way, to and fro.
MOTIONS = {
    "left": ("x", -1), "right": ("x", 1), "up": ("y", -1), "down": ("y", 1),
    "clockwise": ("turn", 1), "anticlockwise": ("turn", -1),
    "grow": ("size", 1), "shrink": ("size", -1),
    "swing": ("x", 0), "bob": ("y", 0), "wobble": ("turn", 0), "pulse": ("size", 0),
}  # fmt: skip
CLASSES = tuple(MOTIONS)
DOMAINS = ("plain", "noise", "snow", "pan")
PAN = 0.10  # half pictures a frame
STEP = {"x": 0.075, "y": 0.075, "turn": 0.28, "size": 0.08}  # a frame, at speed 1
VERSION = 3  # raise when the renderer changes: sets made by the old one are then made again


@dataclass(frozen=True)
class _Texture:
    """Random Fourier modes with a colour each: a smooth pattern, periodic on [-1, 1]^2."""

    k: np.ndarray  # (modes, 2) whole wave numbers
    phase: np.ndarray  # (modes,)
    colour: np.ndarray  # (modes, 3)
    base: np.ndarray  # (3,)

    @classmethod
    def draw(
        cls,
        rng: np.random.Generator,
        modes: int,
        top: int,
        contrast: float,
        tone: tuple[float, float],
    ) -> _Texture:
        k = rng.integers(-top, top + 1, size=(modes, 2))
        colour = contrast * rng.normal(size=(modes, 3)) / math.sqrt(modes)
        return cls(k, rng.uniform(0, 2 * math.pi, modes), colour, rng.uniform(*tone, 3))

    def paint(
        self, x: np.ndarray, y: np.ndarray, turn: np.ndarray, scale: np.ndarray
    ) -> np.ndarray:
        """Return colours [T, S, S, 3] at axis coordinates x, y [T, S], turned and scaled by [T].

        A wave over a rotated grid is a product of two, which spares an array [T, S, S, modes].
        """
        rotation = np.stack([np.cos(turn), np.sin(turn), -np.sin(turn), np.cos(turn)], -1)
        rotated = np.einsum("mi,tij->tmj", self.k, rotation.reshape(-1, 2, 2))  # (T, modes, 2)
        k = math.pi * rotated / scale[:, None, None]
        along_x = np.exp(1j * (k[..., :1] * x[:, None] + self.phase[:, None]))  # (T, modes, S)
        along_x = along_x.astype(np.complex64)
        along_y = np.exp(1j * k[..., 1:] * y[:, None]).astype(np.complex64)
        tinted = along_x[..., None] * self.colour[:, None].astype(np.float32)  # (T, modes, S, 3)
        frames, modes, size = along_x.shape
        waves = along_y.transpose(0, 2, 1) @ tinted.reshape(frames, modes, size * 3)
        return waves.real.reshape(frames, size, size, 3) + self.base.astype(np.float32)


def _travel(
    label: int, time: np.ndarray, rng: np.random.Generator, speed: float
) -> dict[str, np.ndarray]:
    """Return how far each quantity has moved, at each time."""
    moving, way = MOTIONS[CLASSES[label]]
    speed *= math.exp(rng.uniform(math.log(0.5), math.log(1.6)))
    period, start = rng.uniform(8, 14), rng.uniform(0, 2 * math.pi)
    # To and fro at the same mean speed: a sine of that period sweeps four amplitudes a period.
    travel = way * time if way else period / 4 * np.sin(2 * math.pi * time / period + start)
    return {name: step * speed * travel * (name == moving) for name, step in STEP.items()}


def render(
    label: int,
    seed: int,
    *,
    size: int = 64,
    frames: int = 24,
    speed: float = 1.0,
    domain: str = "plain",
) -> UInt8[np.ndarray, "{frames} {size} {size} 3"]:
    """Draw a video of class ``CLASSES[label]``; ``seed`` draws everything but the class.

    Args:
        label: the motion.
        seed: of shape, textures, place and speed.
        size, frames: of the video.
        speed: factor on the speed of motions.
        domain: of ``DOMAINS``. ``noise``: normal, of deviation .22, in every pixel and frame;
            ``snow``: 25 bright flakes fall; ``pan``: the camera moves sideways.
    """
    rng = np.random.default_rng([seed, 20180713])
    time = np.arange(frames)
    axis = (np.arange(size) + 0.5) / size * 2 - 1
    shake_x, shake_y = rng.normal(scale=0.02, size=(2, frames))
    drift, drift_speed = rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.03)
    pan = PAN * time * (domain == "pan")
    image = _Texture.draw(rng, 6, 3, contrast=0.10, tone=(0.15, 0.75)).paint(
        axis + (pan + shake_x + drift_speed * math.cos(drift) * time)[:, None],
        axis + (shake_y + drift_speed * math.sin(drift) * time)[:, None],
        np.zeros(frames),
        np.ones(frames),
    )
    path = _travel(label, time, rng, speed)
    px, py = rng.uniform(-1, 1) + path["x"], rng.uniform(-1, 1) + path["y"]
    turn, phase = rng.uniform(0, 2 * math.pi) + path["turn"], rng.uniform() + path["size"]
    lobes = rng.uniform(0.5, 1.5, 3) * (0.10, 0.30, 0.10)
    lobes = lobes * np.exp(1j * rng.uniform(0, 2 * math.pi, 3))
    skin = _Texture.draw(rng, 5, 2, contrast=0.30, tone=(0.25, 0.85))
    # The nearest image of the object on the torus: what leaves on one side enters on the other.
    dx = (axis - (px + shake_x - pan)[:, None] + 1) % 2 - 1  # (T, S)
    dy = (axis - (py + shake_y)[:, None] + 1) % 2 - 1
    levels = np.sort([phase % 1, (phase + 0.5) % 1], axis=0)[::-1]  # the larger copy lies behind
    for level in levels:
        scale = 0.30 * 3.2**level  # half width, as a share of half the picture
        z = (dx[:, None, :] + 1j * dy[:, :, None]).astype(np.complex64)  # (T, S, S)
        z *= (np.exp(-1j * turn) / scale)[:, None, None].astype(np.complex64)
        radius = np.abs(z) + 1e-9
        ray = z / radius
        edge = 1 + (ray * (lobes[0] + ray * (lobes[1] + ray * lobes[2]))).real
        softness = np.clip((edge - radius) * (scale * size / 1.2)[:, None, None], -30, 30)
        alpha = np.sin(math.pi * level)[:, None, None] / (1 + np.exp(-softness))
        image = image + alpha[..., None] * (skin.paint(dx, dy, turn, scale) - image)
    image = image + rng.normal(scale=0.02, size=image.shape)
    look = np.random.default_rng([seed, 77])
    if domain == "noise":
        image = image + look.normal(scale=0.22, size=image.shape)
    if domain == "snow":
        image = image + _snow(frames, size, look) * (1 - image)
    return (image.clip(0, 1) * 255).round().astype(np.uint8)


def _snow(frames: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Return how much white flakes cover of each pixel [T, S, S, 1]; the picture is a torus."""
    start, speed = rng.uniform(0, size, (2, 25)), size / 24 * rng.uniform(1, 2.5, 25)
    grid, covered = np.arange(size) + 0.5, []
    for time in range(frames):
        off_x = (grid - start[0][:, None] + size / 2) % size - size / 2  # (flakes, S)
        off_y = (grid - (start[1] + speed * time)[:, None] + size / 2) % size - size / 2
        width = 2 * (0.8 * size / 24) ** 2
        along = np.exp(-(off_x**2) / width)[:, None, :]
        covered.append((along * np.exp(-(off_y**2) / width)[:, :, None]).max(0))
    return np.stack(covered)[..., None]


def _plan(cfg: MotionData) -> list[dict[str, str]]:
    """Return a row for each video; the motion of an unlabelled one is for audits, and no label."""
    parts = {"train": cfg.labelled, "unlabelled": cfg.unlabelled, "test": cfg.test}
    kinds = list(enumerate(CLASSES))
    wanted = [(split, i, kind) for split, n in parts.items() for i in range(n) for kind in kinds]
    unnamed = np.random.default_rng(cfg.seed).permutation(CLASSES)[: cfg.unnamed]
    rows = []
    for seed, (split, i, (number, motion)) in enumerate(wanted, cfg.seed * 1_000_000):
        label = "" if split == "unlabelled" or motion in unnamed else motion
        if split == "train" and not label:
            continue
        if split == "test" and not label:
            split = "probe"
        folder = f"{split}/{label}".rstrip("/")
        row = {"path": f"{folder}/{seed:08d}.mp4", "label": label, "group": str(seed)}
        domain = cfg.domains[(i + number) % len(cfg.domains)]
        rows.append(row | {"split": split, "motion": motion, "domain": domain, "seed": str(seed)})
    return rows


def _write(row: dict[str, str], root: Path, cfg: MotionData) -> dict[str, str]:
    path, how = root / row["path"], {"speed": cfg.speed, "domain": row["domain"]}
    label = CLASSES.index(row["motion"])
    encode(render(label, int(row["seed"]), size=cfg.size, frames=cfg.frames, **how), path)
    return row | {"sha256": file_sha256(path), "bytes": str(path.stat().st_size)}


def make_motion(root: Path | str, cfg: MotionData, *, workers: Any = 1) -> Path:
    """Return the folder of a set: mp4 files and ``index.csv``, written once under ``root``.

    Raise UserError where the folder was made before, but one of its files is missing.
    """
    home = Path(root) / f"motion-{fingerprint(cfg, VERSION)[:8]}"
    index = home / "index.csv"  # written last
    if index.exists():
        missing = [row["path"] for row in read_index(home) if not (home / row["path"]).exists()]
        if missing:
            problem = f"{home}: {len(missing)} videos are gone, first {missing[0]}"
            raise UserError(f"{problem}; delete the folder to make it again")
        return home
    work = partial(_write, root=home, cfg=cfg)
    jobs = [(row,) for row in _plan(cfg)]
    rows = over_processes(work, jobs, workers, title="drawing videos", unit="video")
    mark_as_cache(home)
    with atomic(index) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return home


def read_index(home: Path) -> list[dict[str, str]]:
    """Return the rows of a set's ``index.csv``: path, label, group, split, motion, domain, ..."""
    with open(home / "index.csv", newline="") as file:
        return list(csv.DictReader(file))

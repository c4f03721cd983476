"""The embedded data set: short videos whose class is the motion and nothing else.

A random textured shape lies on a random drifting background and does one of twelve things. Every
quantity that a motion changes is *cyclic* and starts uniformly distributed: position on a torus,
orientation on a circle, size on a Shepard scale (two nested copies, half an octave apart, fade in
and out). So the law of any single frame is the same for all classes: no frame tells the class,
by construction; ``gdviz.experiment.metrics.frame_baselines`` measures it.
"""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np

from gdviz.config import MotionData
from gdviz.core.files import UserError, atomic, file_sha256, fingerprint, load_json, save_json
from gdviz.core.processes import over_processes

CLASSES = (
    # at constant speed
    "left", "right", "up", "down", "clockwise", "anticlockwise", "grow", "shrink",
    "swing", "bob", "wobble", "pulse",  # to and fro: sideways, up and down, turning, in size
)  # fmt: skip
# What moves, and which way; "to and fro" classes have no way.
MOTIONS = {
    "left": ("x", -1),
    "right": ("x", 1),
    "up": ("y", -1),
    "down": ("y", 1),
    "clockwise": ("turn", 1),
    "anticlockwise": ("turn", -1),
    "grow": ("size", 1),
    "shrink": ("size", -1),
    "swing": ("x", 0),
    "bob": ("y", 0),
    "wobble": ("turn", 0),
    "pulse": ("size", 0),
}
STEP = {"x": 0.075, "y": 0.075, "turn": 0.28, "size": 0.08}  # a frame, at speed 1
FPS = 12
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
        """Colours [T, S, S, 3] at axis coordinates x, y [T, S], rotated by ``turn`` and divided by
        ``scale`` [T].

        A wave over a rotated grid is a product of a wave in x and a wave in y: no [T, S, S, modes]
            array.
        """
        rotation = np.stack([np.cos(turn), np.sin(turn), -np.sin(turn), np.cos(turn)], -1).reshape(
            -1, 2, 2
        )
        k = (
            math.pi * np.einsum("mi,tij->tmj", self.k, rotation) / scale[:, None, None]
        )  # (T, modes, 2)
        along_x = np.exp(1j * (k[..., :1] * x[:, None] + self.phase[:, None])).astype(
            np.complex64
        )  # (T, modes, S)
        along_y = np.exp(1j * k[..., 1:] * y[:, None]).astype(np.complex64)
        tinted = along_x[..., None] * self.colour[:, None].astype(np.float32)  # (T, modes, S, 3)
        frames, modes, size = along_x.shape
        waves = along_y.transpose(0, 2, 1) @ tinted.reshape(frames, modes, size * 3)
        return waves.real.reshape(frames, size, size, 3) + self.base.astype(np.float32)


def render(label: int, seed: int, *, size: int = 64, frames: int = 24) -> np.ndarray:
    """Draws one video.

    Args:
        label: index into ``CLASSES``.
        seed: everything but the class is drawn from it.
        size: side, in pixels.
        frames: length.

    Returns:
        uint8 array [frames, size, size, 3].
    """
    rng = np.random.default_rng([seed, 20180713])
    time = np.arange(frames)
    axis = (np.arange(size) + 0.5) / size * 2 - 1
    still, unit = np.zeros(frames), np.ones(frames)
    shake_x, shake_y = rng.normal(scale=0.02, size=(2, frames))
    drift, drift_speed = rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.03)
    background = _Texture.draw(rng, 6, 3, contrast=0.10, tone=(0.15, 0.75)).paint(
        axis + (shake_x + drift_speed * math.cos(drift) * time)[:, None],
        axis + (shake_y + drift_speed * math.sin(drift) * time)[:, None],
        still,
        unit,
    )
    moving, way = MOTIONS[CLASSES[label]]
    speed = math.exp(rng.uniform(math.log(0.5), math.log(1.6)))
    period, start = rng.uniform(8, 14), rng.uniform(0, 2 * math.pi)
    # To and fro at the same mean speed: a sine of that period sweeps four amplitudes a period.
    travel = way * time if way else period / 4 * np.sin(2 * math.pi * time / period + start)
    path = {name: step * speed * travel * (name == moving) for name, step in STEP.items()}
    px, py = rng.uniform(-1, 1) + path["x"], rng.uniform(-1, 1) + path["y"]
    turn, phase = rng.uniform(0, 2 * math.pi) + path["turn"], rng.uniform() + path["size"]

    lobes = (
        rng.uniform(0.5, 1.5, 3) * (0.10, 0.30, 0.10) * np.exp(1j * rng.uniform(0, 2 * math.pi, 3))
    )
    skin = _Texture.draw(rng, 5, 2, contrast=0.30, tone=(0.25, 0.85))
    # The nearest image of the object on the torus: what leaves on one side enters on the other.
    dx = (axis - (px + shake_x)[:, None] + 1) % 2 - 1  # (T, S)
    dy = (axis - (py + shake_y)[:, None] + 1) % 2 - 1
    levels = np.sort([phase % 1, (phase + 0.5) % 1], axis=0)[::-1]  # the larger copy lies behind
    image = background
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
    return (image.clip(0, 1) * 255).round().astype(np.uint8)


def encode(frames: np.ndarray, path: Path, *, fps: int = FPS, **options: str) -> None:
    """Writes uint8 frames [T, H, W, 3] as an H.264 mp4 file, atomically; ``options`` are
    libx264's."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        # No B-frames: decord's last frame of such files depends on timing. Below 64 pixels x264's
        # fast paths write
        # other bytes from run to run (5 to 20 % of videos of 32 pixels; none in 300 encodings of
        # 64).
        height, width = frames.shape[1:3]
        # Weighted prediction costs a third of the time and saves nothing here.
        x264 = "weightp=0" + ":no-asm=1" * (min(height, width) < 64)
        defaults = {
            "crf": "20",
            "preset": "veryfast",
            "bf": "0",
            "threads": "1",
            "x264-params": x264,
        }
        stream = container.add_stream("libx264", rate=Fraction(fps), options=defaults | options)
        stream.height, stream.width = height, width
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    with atomic(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def _write(row: dict[str, str], root: Path, size: int, frames: int) -> dict[str, str]:
    path = root / row["path"]
    encode(render(CLASSES.index(row["motion"]), int(row["seed"]), size=size, frames=frames), path)
    return row | {"sha256": file_sha256(path), "bytes": str(path.stat().st_size)}


def _plan(cfg: MotionData) -> list[dict[str, str]]:
    """One row a video. The unlabelled part keeps its motion in the index for audits, never as a
    label."""
    rows, seed = [], cfg.seed * 1_000_000
    for split, per_class in (
        ("train", cfg.labelled),
        ("unlabelled", cfg.unlabelled),
        ("test", cfg.test),
    ):
        for _i in range(per_class):
            for motion in CLASSES:
                label = "" if split == "unlabelled" else motion
                path = f"{split}/{seed:08d}.mp4" if not label else f"{split}/{label}/{seed:08d}.mp4"
                rows.append(
                    {
                        "path": path,
                        "label": label,
                        "group": str(seed),
                        "split": split,
                        "motion": motion,
                        "seed": str(seed),
                    }
                )
                seed += 1
    return rows


def make_motion(root: Path | str, cfg: MotionData, *, workers: int | str = 1) -> Path:
    """Writes the set once as mp4 files with an index and checksums; later calls find it there.

    Args:
        root: folder to hold one folder per configuration.
        cfg: sizes and seed.
        workers: processes that draw and encode.

    Returns:
        The folder, which holds ``index.csv`` (path, label, group, split, motion, seed, sha256,
        bytes).

    Raises:
        UserError: the folder exists but one of its files is missing.
    """
    stamp = fingerprint(cfg, VERSION)
    root = Path(root) / f"motion-{stamp[:8]}"
    done = root / "complete.json"
    if done.exists():
        missing = [row["path"] for row in read_index(root) if not (root / row["path"]).exists()]
        if missing:
            raise UserError(
                f"{root}: {len(missing)} videos are gone, first {missing[0]}; delete the folder to "
                "make it again"
            )
        if load_json(done)["index_sha256"] == file_sha256(root / "index.csv"):
            return root
    rows = _plan(cfg)
    work = partial(_write, root=root, size=cfg.size, frames=cfg.frames)
    rows = over_processes(
        work, [(row,) for row in rows], workers, title="drawing videos", unit="video"
    )
    with atomic(root / "index.csv") as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    save_json(
        done,
        {
            "config": cfg,
            "version": VERSION,
            "videos": len(rows),
            "index_sha256": file_sha256(root / "index.csv"),
        },
    )
    return root


def read_index(root: Path) -> list[dict[str, str]]:
    """Return the rows of a set's ``index.csv``."""
    with open(root / "index.csv", newline="") as file:
        return list(csv.DictReader(file))

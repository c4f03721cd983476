"""Label videos with an exported student: numpy, PyAV and ONNX Runtime, and nothing of ours.

An export holds a copy of this file: ``python predict.py . my.mp4`` needs no gdviz and no PyTorch.
Videos are decoded frame by frame; of a stretch only as many small frames are held as tell it apart.
"""

from __future__ import annotations

import argparse
import csv
import glob
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
from av.error import FFmpegError

EXTENSIONS = {
    ".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg",
    ".mts", ".ogv", ".webm", ".wmv",
}  # fmt: skip
HELD = 1024  # frames of a stretch at most; of more every second one is dropped, again and again
CAMERAS = {"linux": ("v4l2", "/dev/video{}"), "darwin": ("avfoundation", "{}")}


class CannotLabel(Exception):
    """A video or a model that cannot be used; the message names it and says why."""


@dataclass(frozen=True)
class Prediction:
    """What a stretch of a video shows: the likeliest classes and their probabilities."""

    path: str
    start: float  # seconds
    end: float
    top: list[tuple[str, float]]
    warning: str = ""


@dataclass
class Stretch:
    """Frames from ``start`` on, evenly thinned out so that at most ``HELD`` are in memory."""

    start: float
    step: int = 1
    seen: int = 0
    frames: list[np.ndarray] = field(default_factory=list)

    def wants(self) -> bool:
        """Return whether the next frame is one to keep."""
        return self.seen % self.step == 0

    def add(self, frame: np.ndarray | None) -> None:
        """Take the next frame, None where it is not wanted."""
        if frame is not None:
            self.frames.append(frame)
        self.seen += 1
        if len(self.frames) > HELD:
            self.frames, self.step = self.frames[::2], 2 * self.step

    def spread(self, count: int, reach: float = 1.0) -> np.ndarray:
        """Return ``count`` frames [count, s, s, 3] spread evenly over the stretch, or over
        ``reach`` times its length: its last frame is then held."""
        last = self.seen - 1
        wanted = np.linspace(0, reach * last, count).clip(max=last).round() / self.step
        return np.stack(self.frames)[wanted.round().astype(int).clip(max=len(self.frames) - 1)]


def shrink(length: int, size: int) -> np.ndarray:
    """Return the matrix [size, length] of bilinear resizing, antialiased as PyTorch does it."""
    scale = length / size
    reach = max(scale, 1.0)
    centres = (np.arange(size) + 0.5) * scale
    distance = np.abs(np.arange(length) + 0.5 - centres[:, None]) / reach
    weights = np.clip(1 - distance, 0, None)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def square(pixels: np.ndarray, size: int) -> np.ndarray:
    """Resize uint8 [height, width, 3] to a square; the aspect ratio is not kept, as in training."""
    height, width, _ = pixels.shape
    rows = np.tensordot(shrink(height, size), pixels.astype(np.float32), 1)  # (s, width, 3)
    small = np.tensordot(rows, shrink(width, size), (1, 1)).transpose(0, 2, 1)
    return small.round().clip(0, 255).astype(np.uint8)


def open_source(source: str | BinaryIO, raw: str = "") -> Any:
    """Open a file, a stream, ``-`` (standard input) or ``camera:N`` by PyAV.

    ``raw`` says that the stream is of bare RGB frames: WIDTHxHEIGHT@FPS.
    """
    options: dict[str, str] = {}
    lenient: Any = {"metadata_errors": "replace"}
    try:
        if raw:
            size, _, fps = raw.partition("@")
            options = {"video_size": size, "framerate": fps or "30", "pixel_format": "rgb24"}
        kind = "rawvideo" if raw else None
        if isinstance(source, str) and (camera := re.fullmatch(r"camera:(\d+)", source)):
            kind, name = CAMERAS.get(sys.platform, ("dshow", "video={}"))
            return av.open(name.format(camera[1]), format=kind, options=options, **lenient)
        if source == "-":
            source = sys.stdin.buffer
        elif isinstance(source, str):
            if not Path(source).exists():
                raise CannotLabel("no such file")
            source = str(Path(source).absolute())  # a relative one with a colon is of a protocol
        return av.open(source, format=kind, options=options, **lenient)
    except (FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CannotLabel(f"cannot be opened as a video ({reason})") from None


class Reel:
    """Frames of an open video with their times; ``warning`` says where they ended too early."""

    def __init__(self, container: Any) -> None:
        if not container.streams.video:
            raise CannotLabel("no video stream")
        stream = container.streams.video[0]
        self.frames, self.count, self.end, self.warning = container.decode(stream), 0, 0.0, ""
        self.rate = float(stream.average_rate or stream.guessed_rate or 25)
        told = stream.duration * stream.time_base if stream.duration else 0
        if not told and len(container.streams) == 1:  # else it may be the sound's
            told = (container.duration or 0) / av.time_base
        self.told = float(told)  # seconds that the file says it lasts; 0: it does not say

    def __iter__(self) -> Iterator[tuple[float, Any]]:
        try:
            for frame in self.frames:
                now = float(frame.time) if frame.time is not None else self.count / self.rate
                span = float(frame.duration * frame.time_base) if frame.duration else 0.0
                self.count, self.end = self.count + 1, now + max(span, 1 / self.rate)
                yield now, frame
            if self.end < 0.9 * self.told - 0.5:
                self.warning = f"breaks off at {self.end:.1f} s of {self.told:.1f} s"
        except FFmpegError as error:
            self.warning = f"is damaged from {self.end:.1f} s on ({error.strerror})"


def cut(
    reel: Reel, size: int, window: float | None, every: float | None
) -> Iterator[tuple[Stretch, float]]:
    """Yield stretches of a reel, each with where it ends, as soon as it does.

    One begins every ``every`` seconds (None: only one) and lasts ``window`` (None: to the end).
    """
    running: list[Stretch] = []
    begun = 0.0
    for now, frame in reel:
        while running and window and now >= running[0].start + window:
            done = running.pop(0)
            yield done, done.start + window
        if reel.count == 1:
            begun, running = now, [Stretch(now)]
        elif every and now >= begun + every:
            # A gap in the time stamps may be longer than a stretch.
            begun += every * max(1, (now - begun) // every)
            running.append(Stretch(begun))
        pixels = None
        if any(stretch.wants() for stretch in running):
            upright = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
            pixels = square(upright, size)
        for stretch in running:
            stretch.add(pixels if stretch.wants() else None)
    yield from ((stretch, reel.end) for stretch in running)


class Student:
    """An exported student."""

    def __init__(self, folder: Path | str, model: str = "model.onnx", threads: int = 0) -> None:
        """Open a folder that ``gdviz export`` wrote; raise CannotLabel if it is none."""
        try:
            import onnxruntime
        except ImportError as error:
            raise CannotLabel(f"{error}; pip install 'gdviz[predict]'") from None
        self.warning = ""  # of the last video: where it ended too early
        folder = Path(folder)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        try:
            self.about = json.loads((folder / "preprocessing.json").read_text())
            self.labels = json.loads((folder / "labels.json").read_text())
            self.session = onnxruntime.InferenceSession(folder / model, options)
        except Exception as error:  # ONNX Runtime raises exceptions of its own
            text = str(error).splitlines()[0]
            raise CannotLabel(f"{folder}: holds no exported student ({text})") from None

    def probabilities(self, frames: np.ndarray) -> np.ndarray:
        """Return calibrated probabilities [classes] of frames [f, s, s, 3], spread over a video.

        Logits are averaged over the clips that training averages over when it tests.
        """
        a, length = self.about, self.about["length"]
        stride = min(a["stride"], (len(frames) - 1) // max(length - 1, 1))
        room = len(frames) - 1 - stride * (length - 1)
        places = np.linspace(0, 1, a["clips"]) if a["clips"] > 1 else [0.5]
        index = [int(np.float32(room * p)) + stride * np.arange(length) for p in places]
        clips = ((frames[index] / np.float32(255) - a["mean"]) / a["std"]).astype(np.float32)
        logits: Any = self.session.run(None, {"clips": clips.transpose(0, 4, 1, 2, 3)})[0]
        z = logits.mean(0) / a["temperature"]
        if a["several"]:
            return 1 / (1 + np.exp(-z))
        likely = np.exp(z - z.max())
        return likely / likely.sum()

    def _prediction(self, path: str, stretch: Stretch, end: float, warning: str) -> Prediction:
        frames, fps = self.about["frames"], self.about["fps"]
        reach = max(1.0, frames / fps / (end - stretch.start)) if fps else 1.0
        p = self.probabilities(stretch.spread(frames, reach))
        best = np.argsort(-p)[:5]
        top = [(self.labels[i], round(float(p[i]), 4)) for i in best]
        return Prediction(path, round(stretch.start, 3), round(end, 3), top, warning)

    def stream(
        self,
        source: str | BinaryIO,
        *,
        window: float | None = None,
        every: float | None = None,
        raw: str = "",
    ) -> Iterator[Prediction]:
        """Yield what each stretch shows, of ``window`` seconds, one begun ``every`` seconds.

        By default the whole video is one stretch, or, where the student was trained on so many
        frames a second, as many seconds as it saw; and stretches do not overlap. A video that ends
        in damage is labelled as far as it goes, with a warning. Raise CannotLabel if there is
        nothing to label.
        """
        name, size = source if isinstance(source, str) else "-", self.about["size"]
        if window is None and self.about["fps"]:
            window = self.about["frames"] / self.about["fps"]
        labelled = 0
        with open_source(source, raw) as container:
            reel = Reel(container)
            for stretch, end in cut(reel, size, window, every or window):
                # What is left at the end is labelled if half of a stretch is there.
                enough = not window or not labelled or end - stretch.start >= window / 2
                if stretch.seen > 1 and enough:
                    yield self._prediction(name, stretch, end, reel.warning)
                    labelled += 1
        self.warning = reel.warning
        if not labelled:
            told = f"; it {reel.warning}" if reel.warning else ""
            frames = f"{reel.count} frame{'s' * (reel.count != 1)} only"
            raise CannotLabel(f"{frames}: nothing moves{told}")

    def predict(self, source: str | BinaryIO, **options: Any) -> list[Prediction]:
        """Return what :meth:`stream` yields: one prediction a video, or one a stretch."""
        return list(self.stream(source, **options))


load_student = Student


def find(words: list[str]) -> Iterator[str]:
    """Yield the videos that words name: files, folders, patterns, ``-`` and cameras."""
    for word in words:
        if Path(word).is_dir():
            files = sorted(p for p in Path(word).rglob("*") if p.suffix.lower() in EXTENSIONS)
            yield from map(str, (p for p in files if not p.name.startswith(".")))
        elif any(sign in word for sign in "*?[") and not Path(word).exists():
            yield from sorted(glob.glob(word, recursive=True)) or [word]
        else:
            yield word


def _show(found: Prediction, form: str, writer: Any) -> None:
    if form == "json":
        print(json.dumps(asdict(found), ensure_ascii=False), flush=True)
    elif form == "csv":
        flat = [cell for pair in found.top for cell in pair]
        writer.writerow([found.path, found.start, found.end, *flat])
        sys.stdout.flush()
    else:
        top = ", ".join(f"{label} {100 * p:.0f} %" for label, p in found.top)
        print(f"{found.path}  {found.start:.1f}-{found.end:.1f} s  {top}", flush=True)


def _seconds(word: str) -> float:
    if not 0 < (value := float(word)) < float("inf"):
        raise argparse.ArgumentTypeError("needs more than 0 seconds")
    return value


def main(words: list[str] | None = None) -> int:
    """Label videos; return 0 if all were, 1 if some could not be, 2 for a wrong command."""
    about = "Label videos with an exported student; one line a video, or a stretch of it."
    parser = argparse.ArgumentParser("gdviz predict", description=about)
    parser.add_argument("model", help="folder that `gdviz export` wrote")
    what = "files, folders, patterns; - is standard input, camera:0 the first camera"
    parser.add_argument("videos", nargs="+", metavar="VIDEO", help=what)
    parser.add_argument("--format", choices=("text", "json", "csv"), default="text")
    parser.add_argument("--window", type=_seconds, help="label stretches of so many seconds")
    parser.add_argument("--every", type=_seconds, help="seconds from one stretch to the next")
    parser.add_argument(
        "--raw", default="", metavar="WxH@FPS", help="the stream is bare RGB frames"
    )
    parser.add_argument("--int8", action="store_true", help="by the quantised model")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as ONNX Runtime likes")
    args = parser.parse_args(words)
    if args.every and not args.window:
        parser.error("--every needs --window")
    try:
        model = "model-int8.onnx" if args.int8 else "model.onnx"
        student = load_student(args.model, model=model, threads=args.threads)
    except CannotLabel as error:
        print(f"gdviz predict: {error}", file=sys.stderr)
        return 2
    videos, failed, writer = list(find(args.videos)), 0, csv.writer(sys.stdout)
    if not videos:
        print(f"gdviz predict: no videos in {' '.join(args.videos)}", file=sys.stderr)
        return 1
    for number, video in enumerate(videos):
        if len(videos) > 1 and sys.stderr.isatty():
            print(f"\r{number + 1} of {len(videos)}", end="\r", file=sys.stderr)
        live = video.startswith("camera:")
        try:
            window = args.window or (5.0 if live else None)
            for found in student.stream(video, window=window, every=args.every, raw=args.raw):
                _show(found, args.format, writer)
            if student.warning:
                print(f"{video}: {student.warning}; labelled so far", file=sys.stderr)
        except CannotLabel as error:
            print(f"{video}: {error}", file=sys.stderr)
            failed += 1
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:  # who reads has seen enough
            sys.stderr.close()
            return 0
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

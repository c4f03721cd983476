"""Frames by the second: the same moments of any file, at any frame rate, in bounded memory."""

import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import REPO
from video_jobs import make

from gdviz.config import View
from gdviz.data._encode import encode
from gdviz.data.cache import Cache
from gdviz.data.listing import Video
from gdviz.data.reading import DamagedVideo, VideoInfo, read_square, verify
from gdviz.data.videos import VideoSet, open_videos

RATES = (12, 25, 30)


def ramp(path: Path, fps: float, seconds: float, size: int = 16) -> Path:
    """A video whose brightness tells the time: black at 0 s, white at 5 s, and round again."""
    level = np.arange(round(seconds * fps)) / fps / 5 % 1 * 219 + 16
    frames = np.broadcast_to(level[:, None, None, None], (len(level), size, size, 3))
    encode(frames.astype(np.uint8), path, fps=fps)
    return path


def seconds_of(pixels: torch.Tensor) -> np.ndarray:
    return (pixels.double().mean((-3, -2, -1)).numpy() - 16) / 219 * 5


@pytest.mark.parametrize("fps", [4.0, 10.0, 12.0])
def test_the_same_motion_gives_the_same_clips_at_any_frame_rate(tmp_path, fps):
    view = View(size=8, frames=12, length=4, stride=2, fps=fps)
    listed = [
        Video(ramp(tmp_path / f"{rate}-{i}.mp4", rate, 4.5), label, f"{rate}{i}{label}", split)
        for rate in RATES
        for i, (label, split) in enumerate([*[("a", "train"), ("b", "train")] * 2, ("a", "test")])
    ]
    listed.append(Video(ramp(tmp_path / "b.mp4", 24, 4.5), "b", "b", "test"))
    found = open_videos(listed, view, tmp_path / "cache", name="ramps")
    places = torch.full((len(listed),), 0.7)
    clips = seconds_of(found.clips(torch.arange(len(listed)), 4, 2, place=places))
    wanted = clips[-1] - clips[-1][0]
    assert np.allclose(np.diff(wanted), 2 / fps, atol=1 / 24 + 0.05)
    for clip, video in zip(clips, listed, strict=True):
        rate = int(video.path.stem.split("-")[0]) if "-" in video.path.stem else 24
        assert np.abs(clip - clips[-1]).max() < 1 / rate + 1 / 24 + 0.05, video.path


def test_windows_are_spread_over_the_video_and_lie_on_the_seconds(tmp_path):
    path = ramp(tmp_path / "v.mp4", 25, 4.8)
    pixels, info = read_square(path, 5, 8, None, 5.0, 3)
    assert pixels.shape == (15, 8, 8, 3)
    assert np.allclose(info.seconds(), np.arange(120) / 25, atol=1e-5)
    starts = [0, 2.0, 3.8]  # of 24 moments, 5 to a window
    true = np.concatenate([start + np.arange(5) / 5 for start in starts])
    assert np.abs(seconds_of(pixels) - true).max() < 1 / 25 + 0.05
    (middle, _), whole = read_square(path, 5, 8, info, 5.0), seconds_of(pixels)
    assert abs(seconds_of(middle).mean() - 2.3) < 0.25 and whole[0] < 0.1


def test_the_last_frame_of_a_short_video_is_held_and_that_is_said(tmp_path, capsys):
    path = ramp(tmp_path / "v.mp4", 10, 1.0)
    pixels, _ = read_square(path, 16, 8, None, 10.0, 2)
    seen = seconds_of(pixels).reshape(2, 16)
    assert np.allclose(seen[0], seen[1]) and np.allclose(seen[0, 9:], seen[0, 9])
    assert (np.diff(seen[0, :10]) > 0.03).all()
    listed = [
        Video(ramp(tmp_path / f"{c}{i}.mp4", 10, 1.0), c, f"{c}{i}") for c in "ab" for i in range(3)
    ]
    open_videos(listed, View(size=8, frames=16, fps=10), tmp_path / "cache", name="short")
    assert "short: the last frame of 6 videos shorter than 1.6 s is held" in capsys.readouterr().out


STAMPS = {
    "slower and slower.mp4": {"step": lambda i: i * i + 3},
    "late start.mkv": {"step": lambda i: 500 + i},
    "dropped.avi": {"codec": "mpeg4", "step": lambda i: i + i // 4},
    "half speed from the middle.mp4": {"step": lambda i: i + max(0, i - 20), "bf": "2"},
}


@pytest.mark.parametrize("name", STAMPS)
def test_variable_frame_rates_are_read_by_time_stamps(tmp_path, name):
    path = make(tmp_path / name, **STAMPS[name])
    stamps = np.array([STAMPS[name]["step"](i) for i in range(40)]) / 25
    info = verify(path)
    assert np.allclose(info.seconds(), stamps - stamps[0], atol=2e-3)
    start = max(0, int(info.seconds()[-1] * 7 + 1e-3) + 1 - 12) // 2
    near = np.abs(stamps - stamps[0] - (start + np.arange(12))[:, None] / 7).argmin(1)
    pixels, _ = read_square(path, 12, 64, info, 7.0)
    whole, _ = read_square(path, 40, 64, info)
    assert torch.equal(pixels, whole[near])


def test_without_time_stamps_the_frame_rate_tells():
    info = VideoInfo(10, 8, 8, 5.0, 1, 0, 0, ())
    assert np.allclose(info.seconds(), np.arange(10) / 5)
    with pytest.raises(DamagedVideo, match="neither time stamps nor a frame rate"):
        VideoInfo(10, 8, 8, 0.0, 1, 0, 0, ()).seconds()


def test_a_batch_is_of_one_window_and_training_sees_all():
    pixels = np.repeat(np.arange(3, dtype=np.uint8), 4)[None, :, None, None, None]
    pixels = np.broadcast_to(pixels, (2, 12, 1, 1, 3))
    found = VideoSet.from_arrays(np.ascontiguousarray(pixels), [0, 1], ["train", "test"])
    object.__setattr__(found, "windows", 3)
    rows = torch.zeros(200, dtype=torch.long)
    assert found.batch(rows).unique().tolist() == [1]
    drawn = found.batch(rows, torch.Generator().manual_seed(0)).flatten(1)
    assert drawn.shape == (200, 12) and (drawn == drawn[:, :1]).all()
    assert drawn.unique().tolist() == [0, 1, 2]


LONG = """
import resource, sys
from pathlib import Path
from gdviz.data.cache import Cache, fill, open_cache
from gdviz.data.reading import verify
path, folder, kind = sys.argv[1:]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
cache = Cache(Path(folder), kind, (1, 4 * 48, 32, 32, 3), fps=12.0, windows=4)
fill(cache, [Path(path)], [verify(path)])
assert not open_cache(cache)[1]
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("kind", ["memmap", "transcode"])
def test_a_two_minute_video_is_read_in_bounded_memory(tmp_path, kind):
    """All of its frames would take 2.1 GB."""
    piece = ramp(tmp_path / "piece.mp4", 30, 5, size=448)
    path = tmp_path / "long.mp4"
    repeat(piece, path, 24)
    command = [sys.executable, "-c", LONG, str(path), str(tmp_path / "cache"), kind]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) / (1e6 if sys.platform == "darwin" else 1e3) < 350  # MB
    cache = Cache(tmp_path / "cache", kind, (1, 4 * 48, 32, 32, 3), fps=12.0, windows=4)
    kept = seconds_of(torch.from_numpy(cache[0, slice(None)].copy())).reshape(4, 48)
    assert sum(f.stat().st_size for f in (tmp_path / "cache").rglob("*") if f.is_file()) < 1e6
    starts = np.linspace(0, 120 * 12 - 48, 4).round() / 12
    true = (starts[:, None] + np.arange(48) / 12) % 5
    near = np.abs(kept - true)
    assert (np.minimum(near, 5 - near) < 0.15).mean() > 0.97


def repeat(piece: Path, path: Path, times: int) -> None:
    """Write a file that shows ``piece`` many times, without encoding it again."""
    with av.open(str(piece)) as source, av.open(str(path), "w") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        packets = [packet for packet in source.demux(stream) if packet.size]
        content = [(bytes(p), p.pts, p.dts, p.is_keyframe) for p in packets]
        length = packets[-1].pts + packets[-1].duration
        for turn in range(times):
            for data, pts, dts, key in content:
                packet = av.Packet(data)
                packet.stream, packet.time_base, packet.is_keyframe = copy, stream.time_base, key
                packet.pts, packet.dts = pts + turn * length, dts + turn * length
                target.mux(packet)

"""Caches of any kind give the frames of the plain one, are made again where they stood, and never
of anything else."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
import video_jobs
from conftest import REPO
from video_jobs import psnr

from gdviz.config import View
from gdviz.core.files import UserError
from gdviz.data import cache as caches
from gdviz.data import reading
from gdviz.data.clips import pick_frames
from gdviz.data.videos import VideoSet, load_videos

KINDS = {"memmap": np.inf, "transcode": 26}  # dB at least, against raw pixels
needs_sigkill = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")


@pytest.fixture
def load(video_folder, tmp_path) -> Callable[..., VideoSet]:
    """``load(kind)``: ten videos of two classes, one damaged, in shards of three."""
    root = video_folder(count=5)
    (root / "a" / "a1.mp4").write_bytes(b"no video")

    def open_it(kind: str, **changes: int) -> VideoSet:
        view = View(**{"size": 31, "frames": 10} | changes)
        return load_videos(root, view, tmp_path / "cache", storage=kind)

    return open_it


@pytest.fixture(autouse=True)
def _shards_of_three(monkeypatch):
    monkeypatch.setattr(caches, "SHARD", 3)


def test_a_set_of_more_shards_than_a_process_may_open_files_is_read(tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(caches, "SHARD", 1)
    cache = caches.Cache(tmp_path, "memmap", (300, 2, 1, 1, 3))
    for n, (folder, _) in enumerate(cache.shards):
        folder.mkdir()
        caches.Memmap.write(folder, [np.full((2, 1, 1, 3), n % 256, np.uint8)], cache.shape[1:])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = os.open(tmp_path, os.O_RDONLY)  # the lowest number that is free
    os.close(taken)
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken + 200, hard))
    try:
        seen = [int(cache[n, slice(0, 1)][0, 0, 0, 0]) for n in range(300)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        caches._shard.cache_clear()
    assert seen == [n % 256 for n in range(300)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_shows_the_same_videos(load, kind):
    plain, found = load("memmap"), load(kind)
    rows = torch.tensor([8, 0, 1, 1])
    raw, seen = plain.batch(rows), found.batch(rows)
    assert seen.shape == (4, 10, 31, 31, 3)
    assert min(map(psnr, raw.flatten(0, 1), seen.flatten(0, 1))) > min(KINDS[kind], 59)
    assert [path[-6:-4] for path, _ in found.skipped] == ["a1"]
    assert torch.equal(found.metadata, plain.metadata) and found.splits == plain.splits
    for length, stride in ((4, 1), (4, 2), (3, torch.tensor([1, 4, 2, 9])), (1, 1), (10, 3)):
        for seed in (None, 0, 1):
            rng = [None if seed is None else torch.Generator().manual_seed(seed) for _ in range(2)]
            clips = found.clips(rows, length, stride, rng[0])
            assert torch.equal(clips, pick_frames(seen, length, stride, rng[1]))


def test_large_sets_have_larger_shards_not_more(load, tmp_path, monkeypatch):
    small = load("memmap").batch(torch.arange(9))
    monkeypatch.setattr(caches, "SHARDS", 2)
    shutil.rmtree(tmp_path / "cache")
    caches._shard.cache_clear()
    assert torch.equal(load("memmap").batch(torch.arange(9)), small)
    assert len(list((tmp_path / "cache").rglob("pixels.u8"))) == 2


def test_clips_touch_only_the_frames_they_need(load, monkeypatch):
    rows, touched = torch.tensor([0, 5]), []
    found = {kind: load(kind, frames=40) for kind in KINDS}
    frames = reading._frames_from
    monkeypatch.setattr(
        reading, "_frames_from", lambda *a: (touched.append(1) or frame for frame in frames(*a))
    )
    found["transcode"].clips(rows.repeat(10), 4, 1, torch.Generator().manual_seed(0))
    assert len(touched) <= 20 * (4 + 8)  # from the key frame before


def test_real_video_loses_little(ut_interaction, tmp_path):
    for number, path in enumerate(sorted(ut_interaction.rglob("*.avi"))[::15]):
        video, folder = reading.read_square(path, 24, 112)[0].numpy(), tmp_path / str(number)
        folder.mkdir()
        caches.Transcode.write(folder, iter([None, video]), video.shape)
        assert psnr(caches.Transcode(folder, video.shape).read(1, slice(None)), video) > 36


def test_a_cache_is_of_its_own_files_view_and_version_only(load, tmp_path, monkeypatch):
    views = ({}, {"size": 30}, {"frames": 9}, {"fps": 5.0}, {"fps": 5.0, "windows": 2})
    stamps = [load(kind, **changes).pixels.folder.name for kind in KINDS for changes in views]
    assert len(set(stamps)) == len(KINDS) * len(views)
    one, other = (tmp_path / "cache" / stamp for stamp in stamps[:2])
    shutil.rmtree(other)
    shutil.copytree(one, other)
    with pytest.raises(UserError, match="holds other videos than its name says"):
        load("memmap", size=30)
    monkeypatch.setattr("gdviz.data.videos.VERSION", 99)
    assert load("memmap").pixels.folder.name not in stamps


@pytest.mark.parametrize(("kind", "file"), [("memmap", "pixels.u8"), ("transcode", "01.mp4")])
def test_a_damaged_shard_is_named(load, tmp_path, kind, file):
    found = load(kind)
    path = tmp_path / "cache" / found.pixels.folder.name / "00001" / file
    path.write_bytes(path.read_bytes()[:-50])
    found.batch(torch.tensor([0]))  # of another shard
    damaged = rf"{found.pixels.folder.name} is damaged \(shard 1: .*delete it"
    with pytest.raises(UserError, match=damaged):
        found.batch(torch.tensor([3]))


def test_a_file_that_changes_while_a_set_is_decoded_is_left_out(load, tmp_path, monkeypatch):
    real = caches.read_square

    def read(path, *rest):
        if path.name == "b0.mp4":
            path.write_bytes(path.read_bytes()[:-20])
        return real(path, *rest)

    monkeypatch.setattr(caches, "read_square", read)
    skipped = {path[-6:-4]: reason for path, reason in load("transcode").skipped}
    assert skipped.keys() == {"a1", "b0"} and "has changed" in skipped["b0"]
    assert load("transcode").batch(torch.arange(8)).shape[0] == 8


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from gdviz.config import View
from gdviz.data import cache as caches
from gdviz.data.videos import load_videos
caches.SHARD, real, calls = 3, caches.read_square, []
def read(*args):
    calls.append(args)
    if len(calls) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
caches.read_square = read
load_videos({root!r}, View(size=31, frames=10), {cache!r}, storage={kind!r})
"""


@needs_sigkill
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_fill_goes_on_with_the_shards_that_are_missing(load, tmp_path, monkeypatch, kind):
    root, cache = tmp_path / "videos", tmp_path / "cache"
    code = KILLED.format(tests=str(REPO / "tests"), root=str(root), cache=str(cache), kind=kind)
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=REPO)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(cache.rglob("found.json"))) == 2  # the third was being written
    calls, real = [], caches.read_square
    monkeypatch.setattr(
        caches, "read_square", lambda path, *rest: calls.append(path.name) or real(path, *rest)
    )
    found = load(kind)
    assert calls == ["b1.mp4", "b2.mp4", "b3.mp4", "b4.mp4"]
    assert not list(cache.rglob(".0*"))
    whole = load_videos(root, View(size=31, frames=10), tmp_path / "calm", storage=kind)
    assert torch.equal(found.batch(torch.arange(9)), whole.batch(torch.arange(9)))


@needs_sigkill
def test_a_file_that_kills_its_reader_costs_that_file_only(video_folder, tmp_path, monkeypatch):
    root = video_folder(count=4)
    monkeypatch.setattr(caches, "_fill_shard", video_jobs.fill_or_die)
    found = load_videos(root, View(size=16, frames=6), tmp_path / "cache", workers=2)
    ((path, reason),) = found.skipped
    assert path.endswith("b1.mp4") and "killed" in reason
    true = reading.read_square(root / "b" / "b2.mp4", 6, 16)[0]
    assert torch.equal(found.batch(torch.tensor([5]))[0], true)

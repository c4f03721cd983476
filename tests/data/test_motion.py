"""The embedded set tells nothing but its motion, and is written once."""

import errno
import os
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import REPO, memory_set
from scipy.stats import kruskal
from video_jobs import psnr

from gdviz.config import MotionData, View
from gdviz.core.files import UserError, file_sha256
from gdviz.data import motion
from gdviz.data._encode import FPS, encode
from gdviz.data.reading import read_square
from gdviz.data.videos import load_motion
from gdviz.experiment.metrics import shortcut_baselines

SMALL = MotionData(labelled=2, unlabelled=1, test=1, size=32, frames=6)


def drawn(per_class: int, first_seed: int = 0, **kwargs) -> tuple[np.ndarray, np.ndarray]:
    labels = np.tile(np.arange(len(motion.CLASSES)), per_class)
    videos = [
        motion.render(label, first_seed + i, **kwargs) for i, label in enumerate(labels.tolist())
    ]
    return np.stack(videos), labels


def test_a_seed_names_the_pixels():
    one, again, seed, label = (
        motion.render(*key, size=32, frames=4) for key in ((3, 7), (3, 7), (3, 8), (2, 7))
    )
    assert np.array_equal(one, again)
    assert not np.array_equal(one, seed)
    assert not np.array_equal(one, label)


def frame_p_value(frames: np.ndarray, labels: np.ndarray) -> float:
    """Bonferroni-corrected Kruskal-Wallis test of brightness (whole, quarters) and contrast against
    the class."""
    n, side = len(frames), frames.shape[1] // 2
    grey = frames.mean(-1)
    quarters = grey.reshape(n, 2, side, 2, side).mean((2, 4)).reshape(n, 4)
    edges = np.abs(np.diff(grey, axis=2)).mean((1, 2))
    numbers = np.c_[quarters, grey.mean((1, 2)), grey.std((1, 2)), edges]
    p = [kruskal(*(column[labels == c] for c in np.unique(labels))).pvalue for column in numbers.T]
    return min(p) * len(p)


def test_no_single_frame_tells_the_class():
    frames, labels = drawn(40, size=24, frames=6)
    for moment in (0, 5):
        assert frame_p_value(frames[:, moment], labels) > 1e-3, moment
    dark = frames[:, 0] * np.where(labels == 0, 0.75, 1.0)[:, None, None, None]
    assert frame_p_value(dark, labels) < 1e-3  # the test does see a class whose frames are darker


def test_shortcuts_stay_near_chance_and_are_found_where_they_exist():
    frames, labels = drawn(24, 10_000, size=24, frames=8)
    splits = ["train"] * (len(labels) // 3) + ["test"] * (len(labels) - len(labels) // 3)
    found = shortcut_baselines(memory_set(frames, labels.tolist(), splits))
    noise = np.sqrt(found["chance"] / splits.count("test"))
    for name in ("single-frame", "mean-frame"):
        assert found[name] < found["chance"] + 4 * noise, name
    marked = frames.copy()
    for row, label in enumerate(labels):
        marked[row, :, 2 * label : 2 * label + 2, :4] = 255
    assert shortcut_baselines(memory_set(marked, labels.tolist(), splits))["single-frame"] > 0.5


def test_the_set_on_disk_is_indexed_checked_and_used_again(tmp_path, monkeypatch):
    home = motion.make_motion(tmp_path, SMALL)
    rows = motion.read_index(home)
    sizes = {"train": 2, "unlabelled": 1, "test": 1}
    counts = Counter(row["split"] for row in rows)
    assert counts == {split: n * len(motion.CLASSES) for split, n in sizes.items()}
    assert len({row["seed"] for row in rows}) == len({row["group"] for row in rows}) == len(rows)
    for row in rows:
        assert file_sha256(home / row["path"]) == row["sha256"]
        assert bool(row["label"]) == (row["split"] != "unlabelled")
        assert row["motion"] not in row["path"] or row["split"] != "unlabelled"
    monkeypatch.setattr(motion, "render", None)
    assert motion.make_motion(tmp_path, SMALL) == home
    (home / rows[3]["path"]).unlink()
    with pytest.raises(UserError, match=f"1 videos are gone, first {rows[3]['path']}"):
        motion.make_motion(tmp_path, SMALL)


def test_a_full_disk_while_drawing_leaves_nothing_half_written(tmp_path, monkeypatch):
    real, calls = os.fsync, Counter()

    def fsync(fd):
        calls["n"] += 1
        if calls["n"] == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError, match=r"cannot write .*mp4.*No space left"):
        motion.make_motion(tmp_path, SMALL)
    assert not list(tmp_path.rglob("*.part"))
    assert not list(tmp_path.rglob("index.csv"))
    assert len(list(motion.make_motion(tmp_path, SMALL).rglob("*.mp4"))) == 4 * len(motion.CLASSES)


@pytest.mark.slow
def test_the_number_of_workers_changes_nothing(tmp_path):
    # x264's vector code, on at 64 pixels, was seen to write other bytes: 5 videos of 2,052, once.
    cfg, view = replace(SMALL, size=64), View(size=16, frames=6)
    one, two = (load_motion(cfg, view, tmp_path / str(n), workers=n) for n in (1, 2))
    rows = torch.arange(len(one.splits))
    assert torch.equal(one.batch(rows), two.batch(rows))
    assert torch.equal(one.labels, two.labels)
    (a, b) = tmp_path.rglob("index.csv")
    assert file_sha256(a) == file_sha256(b)  # checksums of all files included


def test_encoding_and_reading_lose_little(tmp_path):
    frames, path = motion.render(4, 1, size=64, frames=12), tmp_path / "v.mp4"
    encode(frames, path)
    pixels, info = read_square(path, 12, 64)
    assert min(map(psnr, pixels, frames)) > 28
    assert (info.frames, info.width, info.height, info.fps) == (12, 64, 64, FPS)
    assert info.bytes == path.stat().st_size


def test_domains_look_different_and_move_alike(tmp_path):
    plain, *others = (
        motion.render(0, 7, size=24, frames=6, domain=name).astype(float)
        for name in ("plain", "noise", "snow", "pan")
    )
    noise, snow, pan = others
    assert 30 < (noise - plain).std() < 60  # .22 of 255, clipped
    brighter = snow - plain
    assert brighter.min() >= -1 and 0.1 < (brighter > 20).mean() < 0.6
    assert abs(pan[0] - plain[0]).max() <= 1 and abs(pan[5] - plain[5]).mean() > 5


def test_domains_are_dealt_evenly_and_unnamed_motions_are_never_labelled(tmp_path):
    cfg = MotionData(labelled=2, unlabelled=2, test=2, size=24, frames=4, unnamed=4)
    cfg = replace(cfg, domains=("plain", "snow"))
    view = View(size=24, frames=4, length=2)
    videos = load_motion(cfg, view, tmp_path)
    assert len(videos.label_names) == 8
    count = {part: len(videos.rows(part)) for part in ("train", "unlabelled", "test", "probe")}
    assert count == {"train": 16, "unlabelled": 24, "test": 16, "probe": 8}
    unnamed = {videos.audit["motion"][i] for i in videos.rows("probe")}
    assert len(unnamed) == 4 and not unnamed & set(videos.label_names)
    assert unnamed <= {videos.audit["motion"][i] for i in videos.rows("unlabelled")}
    assert all(Counter(videos.audit["domain"])[name] == 32 for name in ("plain", "snow"))
    for i in videos.rows("test"):
        assert videos.label_names[videos.labels[i]] == videos.audit["motion"][i]


def test_the_check_that_the_docs_give_reads_the_column_of_hashes(tmp_path):
    (row, *_) = motion.read_index(motion.make_motion(tmp_path, SMALL))
    column = re.search(r"print \$(\d+)", (REPO / "data/README.md").read_text())[1]
    assert list(row)[int(column) - 1] == "sha256"

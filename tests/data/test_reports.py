"""What users of other video packages reported, here (docs/robustness.md names each report)."""

import os
import re
import sys

import numpy as np
import pytest
import torch
from conftest import REPO
from torch import nn
from torchvision.models import video
from torchvision.models.feature_extraction import create_feature_extractor
from video_jobs import full_decode, make, psnr, reads_right

from gdviz.config import View
from gdviz.core.files import UserError
from gdviz.data.listing import read_list
from gdviz.data.official import read_official
from gdviz.data.reading import DamagedVideo, frames_of, read_square, verify
from gdviz.data.videos import load_videos
from gdviz.teachers.own import OwnBackbone, OwnView, Tapped


@pytest.mark.parametrize(
    ("name", "options"),
    {
        "repeats of the last frame.avi": {"codec": "mpeg4", "frames": 39},  # decord 195
        "vp8.webm": {"codec": "libvpx", "frames": 36},  # decord 91
        "many b-frames.mp4": {"bf": "8", "g": "40"},  # decord 365
        "b-frames.avi": {"codec": "mpeg4", "bf": "2"},  # torchvision 1884
        "milliseconds.mkv": {"bf": "2"},  # PyAV 569
        "late start.mkv": {"step": lambda i: i + 500},  # PyAV 538
    }.items(),
)
def test_single_frames_anywhere_are_those_of_the_whole_decode(tmp_path, name, options):
    path = make(tmp_path / name, **options)
    info, true = verify(path), full_decode(path)
    last = info.frames - 1
    for index in ([0], [last], [last - 1], [info.frames // 2], [0, last, last, last]):
        assert reads_right(path, np.array(index), info, true), index
    many = np.array([*range(0, last, 4), *[last] * 6])
    first = np.stack(list(frames_of(path, many, info)))
    for _ in range(5):
        assert np.array_equal(first, np.stack(list(frames_of(path, many, info))))


def test_a_header_that_counts_frames_that_are_not_there(tmp_path):
    """decord 373: it waits for ever at one of the last two."""
    path = make(tmp_path / "v.avi", codec="mpeg4", step=lambda i: i if i < 30 else 2 * i)
    info, true = verify(path), full_decode(path)
    assert info.frames == len(true) == 40
    index = np.linspace(0, info.frames - 1, 16).round().astype(int)
    assert reads_right(path, index, info, true)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 3 // 4])
    with pytest.raises(DamagedVideo):
        verify(path)


def test_an_xvid_file_is_read_from_its_first_frame(tmp_path):
    """decord 124: error getting frame 0."""
    path = make(tmp_path / "v.avi", codec="mpeg4")
    data = path.read_bytes()
    assert b"FMP4" in data
    path.write_bytes(data.replace(b"FMP4", b"XVID"))
    pixels, info = read_square(path, info_frames := 40, 64)
    assert info.frames == info_frames
    assert psnr(pixels[0], full_decode(path)[0]) > 45


def test_a_file_that_cannot_be_opened_is_named_and_the_others_are_used(video_folder, tmp_path):
    """decord 162, mmaction2 893, 1001: Kinetics files of 0 to 9 kB."""
    root = video_folder(count=5)
    (root / "a" / "a0.mp4").write_bytes(b"\0\0\0\x20ftypisom" + b"\0" * 4000)
    (root / "b" / "b0.mp4").write_bytes(b"")
    found = load_videos(root, View(size=16, frames=6), tmp_path / "cache")
    assert {path[-6:] for path, _ in found.skipped} == {"a0.mp4", "b0.mp4"}
    assert all("cannot be decoded" in reason for _, reason in found.skipped)
    assert len(found.splits) == 8


def test_every_clip_has_as_many_frames_as_were_asked_for(video_folder, tmp_path):
    """torchvision 4112 and 2265: now and then one more, so that a batch cannot be stacked."""
    found = load_videos(video_folder(count=4), View(size=16, frames=11), tmp_path / "cache")
    rows, rng = torch.arange(8), torch.Generator().manual_seed(0)
    for length in range(1, 12):
        for stride in (1, 2, 5, 11):
            assert found.clips(rows, length, stride, rng).shape == (8, length, 16, 16, 3)


LINES = {
    "blanks at ends, mmaction2 128": ("1.mp4  0 \n 2.mp4 1\r\n", [("1.mp4", "0"), ("2.mp4", "1")]),
    "blanks in names, mmaction2 2659": ("a/x (31).mp4 1\n", [("a/x (31).mp4", "1")]),
    "numbers from 1, mmaction2 1238": ("1.mp4 1\n2.mp4 2\n", [("1.mp4", "1"), ("2.mp4", "2")]),
}


@pytest.mark.parametrize(("text", "rows"), LINES.values(), ids=LINES)
def test_lists_as_others_write_them(tmp_path, text, rows):
    for name in ("1.mp4", "2.mp4", "a/x (31).mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "train.txt").write_bytes(text.encode())
    found = read_list(tmp_path / "train.txt")
    assert [(str(v.path.relative_to(tmp_path)), v.label) for v in found] == rows


def test_numbers_that_begin_at_1_are_classes_like_any_other(video_folder, tmp_path):
    """mmaction2 2159, 1469: a label as large as the number of classes ends in CUDA's assert."""
    root = video_folder(count=4)
    rows = [f"{p} {1 + (p.parent.name == 'b')}" for p in sorted(root.rglob("*.mp4"))]
    (tmp_path / "list.txt").write_text("\n".join(rows))
    found = load_videos(tmp_path / "list.txt", View(size=16, frames=6), tmp_path / "cache")
    assert found.label_names == ("1", "2") and set(found.labels.tolist()) == {0, 1}


def test_a_weird_line_in_a_list_is_shown(tmp_path):
    """mmaction2 847: 1,400 lines of 27,000 had no label."""
    (tmp_path / "1.mp4").write_text("")
    (tmp_path / "train.txt").write_text("1.mp4 0\n1.mp4 306 1\n")
    with pytest.raises(UserError, match=r"train\.txt: .*no path and label in '1\.mp4 306 1'"):
        read_list(tmp_path / "train.txt")


def test_official_lists_without_the_class_file_do_not_become_a_random_split(tmp_path):
    """mmaction2 2064: no classInd.txt. torchvision 4270: where do the lists lie?"""
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "trainlist01.txt").write_text("A/v_A_g08_c01.avi 1\n")
    (lists / "testlist01.txt").write_text("A/v_A_g01_c01.avi\n")
    with pytest.raises(UserError, match=r"classInd\.txt: cannot be read as one of the official"):
        read_official(tmp_path)
    (lists / "classInd.txt").write_text("1 A\n")
    assert [v.split for v in read_official(tmp_path).videos] == ["train", "test"]


# --- networks

SMALL = OwnView(16, 4)


def test_a_module_that_is_never_called_is_named():
    """torchdistill 481, 139 (a ModuleList has no call), torchvision 5193 (hooks lost by FX)."""

    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Conv3d(3, 4, 1)])

        def forward(self, x):
            return self.blocks[0](x)

    with pytest.raises(UserError, match="features='blocks': the network runs without this module"):
        OwnBackbone(Tapped(Blocks(), "blocks", SMALL))
    assert OwnBackbone(Tapped(Blocks(), "blocks.0", SMALL)).dim == 4
    traced = create_feature_extractor(video.r3d_18().eval(), {"layer2": "out"})
    assert OwnBackbone(Tapped(traced, "", SMALL)).dim == 128
    with pytest.raises(UserError, match="runs without this module"):
        OwnBackbone(Tapped(traced, "layer2", SMALL))


def test_half_precision_heads_take_float_clips():
    """transformers 27295 and mmaction2 1315: expected scalar type Half but found Float."""
    for dtype in (torch.bfloat16, torch.float16):
        net = nn.Sequential(nn.Conv3d(3, 3, 4, 4), nn.Flatten(), nn.Linear(48, 5)).to(dtype)
        features = OwnBackbone(Tapped(net, "", SMALL))(torch.randn(2, 3, 4, 16, 16))
        assert features.dtype == torch.float32 and features.shape == (2, 5)


def test_frames_and_colours_in_the_wrong_order_are_found_before_training():
    """transformers 19913, 20580: [b, t, 3, h, w] where [b, 3, t, h, w] is expected."""
    net = nn.Conv3d(3, 4, 1)
    with pytest.raises((UserError, RuntimeError), match="expected input"):
        OwnBackbone(Tapped(net, "", OwnView(16, 4, frames_first=True)))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_reading_many_files_leaves_no_file_or_thread_open(tmp_path):
    """decord 1 and 208: resources run out, memory grows while nobody reads."""
    path, open_now = make(tmp_path / "v.mp4", bf="0"), []
    info = verify(path)
    for turn in range(60):
        list(frames_of(path, np.array([0, info.frames - 2]), info))
        next(frames_of(path, np.array([3, 9]), info))
        if turn in (2, 59):
            open_now.append([len(os.listdir(f"/proc/self/{what}")) for what in ("fd", "task")])
    (files, threads), after = open_now
    assert after[0] <= files + 2 and after[1] <= threads + 2


def test_every_report_is_cited_and_has_a_test():
    page = (REPO / "docs" / "robustness.md").read_text()
    rows = re.findall(r"^\| \[([\w/-]+)#(\d+)\]\((https://\S+)\).*`(test_\w+)`", page, re.M)
    assert len(rows) >= 20
    assert {row[0] for row in rows} >= {"open-mmlab/mmaction2", "dmlc/decord", "PyAV-Org/PyAV"}
    tests = "".join(file.read_text() for file in (REPO / "tests").rglob("test_*.py"))
    for repository, number, link, test in rows:
        assert f"def {test}(" in tests and link.startswith(f"https://github.com/{repository}/")
        assert link.endswith(f"/{number}")

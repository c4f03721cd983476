"""Shards for object stores: every video comes back once, with its label, and only the frames of the clip are decoded."""

import gc
import sys
import tarfile

import pytest
import torch
from jobs import psnr

from gdviz import cli
from gdviz.config import View
from gdviz.data import shards
from gdviz.data.videos import load_folder

pytest.importorskip("webdataset")


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning"
)  # WebDataset leaves files to the garbage collector
def test_a_set_goes_into_shards_and_comes_back_as_a_stream(
    video_folder, tmp_path, monkeypatch, capsys
):
    root, out = video_folder(count=5), tmp_path / "shards"
    flags = (
        "--view.size",
        "32",
        "--view.frames",
        "8",
        "--per-shard",
        "3",
        "--cache",
        str(tmp_path),
        "--workers",
        "1",
    )
    monkeypatch.setattr(sys, "argv", ["gdviz", "data", "shards", str(root), str(out), *flags])
    cli.main()
    videos = load_folder(root, View(size=32, frames=8), tmp_path / "cache")
    said, sizes = capsys.readouterr().out, []
    for path in out.glob("*.tar"):
        assert str(path) in said
        with tarfile.open(path) as tar:
            sizes.append(len(tar.getnames()) // 9)  # the frames of a video, and what it is
    assert (max(sizes), sum(sizes)) == (3, 10)
    calls, real = [], shards.from_jpeg
    monkeypatch.setattr(shards, "from_jpeg", lambda data: calls.append(1) or real(data))
    for shuffle in (0, 4):
        rows = []
        for split in ("train", "test"):
            for clip, about in shards.stream_clips(
                out / "index.json", split, 3, 2, shuffle=shuffle
            ):
                row = about["row"]
                rows.append(row)
                assert (about["label"], about["group"]) == (
                    videos.label_names[videos.labels[row]],
                    videos.groups[row],
                )
                assert about["split"] == videos.splits[row] == split
                assert psnr(clip.numpy(), videos.clips(torch.tensor([row]), 3, 2)[0].numpy()) > 34
        assert sorted(rows) == list(range(10))
    assert len(calls) == 2 * 10 * 3
    gc.collect()

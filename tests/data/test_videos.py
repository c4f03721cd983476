"""Sets of videos: rows stay with their files, whatever is damaged; memory is a set, too."""

import csv
import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from gdviz.config import MotionData, View
from gdviz.core.files import UserError
from gdviz.data import cache as caches
from gdviz.data.clips import pick_frames
from gdviz.data.listing import Video, read_list
from gdviz.data.reading import DamagedVideo, read_square
from gdviz.data.videos import VideoSet, load_motion, load_videos, open_videos, some_of

VIEW = View(size=16, frames=6)


def everything(found: VideoSet) -> torch.Tensor:
    return found.batch(torch.arange(len(found.splits)))


# --- in memory

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 4, 8, 8, 3), dtype=np.uint8)
ARRAYS = (PIXELS, [0, 1, 1, -1, 0], ["train", "train", "test", "unlabelled", "unlabelled"])


def test_arrays_become_a_set():
    found = VideoSet.from_arrays(*ARRAYS, groups=list("aabbc"), label_names=["walk", "run"])
    assert found.labels.tolist() == [0, 1, 1, -1, -1]  # labels of unlabelled videos are hidden
    assert found.training_rows.tolist() == [0, 1, 3, 4]
    assert (found.label_names, found.groups) == (("walk", "run"), tuple("aabbc"))
    rows = torch.tensor([4, 0])
    assert np.array_equal(found.batch(rows), PIXELS[[4, 0]])
    assert torch.equal(found.clips(rows, 2, 1), pick_frames(found.batch(rows), 2, 1))
    arrays = (PIXELS, np.array(ARRAYS[1]), np.array(ARRAYS[2]))
    assert VideoSet.from_arrays(*arrays).splits == found.splits
    same, other = VideoSet.from_arrays(*ARRAYS), VideoSet.from_arrays(PIXELS[::-1], *ARRAYS[1:])
    assert same.fingerprint == VideoSet.from_arrays(*ARRAYS).fingerprint != other.fingerprint


BAD_ARRAYS = {
    "float": ("pixels: needs uint8 .* got float64", {"pixels": PIXELS / 255}),
    "grey": (r"pixels: needs uint8 .* got uint8 \[5, 4, 8, 8\]", {"pixels": PIXELS[..., 0]}),
    "short": ("labels: 4 for 5 videos", {"labels": [0, 1, 0, 1]}),
    "named": ("labels: needs whole numbers", {"labels": np.full(5, 0.5)}),
    "unknown": ("labels: a video to train or test on has none", {"labels": [-1] * 5}),
    "split": ("splits: 'val' is none of train", {"splits": ["val"] * 5}),
    "groups": ("groups: 1 for 5 videos", {"groups": ["a"]}),
    "names": ("label_names: 1 for 2 classes", {"label_names": ["a"]}),
}


@pytest.mark.parametrize(("message", "change"), BAD_ARRAYS.values(), ids=BAD_ARRAYS)
def test_arrays_that_do_not_fit_are_refused(message, change):
    names = ("pixels", "labels", "splits")
    with pytest.raises(UserError, match=message):
        VideoSet.from_arrays(**dict(zip(names, ARRAYS, strict=True)) | change)


# --- of files


def damage(path, how: str) -> None:
    whole = path.read_bytes()
    where = whole.index(b"mdat") + len(whole) // 4
    flipped = bytes(byte ^ 0x5A for byte in whole[where : where + 400])
    damaged = {
        "empty": b"",
        "text": b"no video\n" * 50,
        "truncated": whole[: len(whole) * 2 // 3],
        "flipped": whole[:where] + flipped + whole[where + 400 :],
    }
    path.unlink() if how == "gone" else path.write_bytes(damaged[how])


@pytest.mark.parametrize("how", ["empty", "text", "truncated", "flipped", "gone"])
def test_damaged_videos_are_skipped_with_a_reason(video_folder, tmp_path, how):
    root = video_folder(count=5)
    files = sorted(root.rglob("*.mp4"))
    with open(tmp_path / "list.csv", "w", newline="") as file:
        rows = [("path", "label"), *((str(path), path.parent.name) for path in files)]
        csv.writer(file).writerows(rows)
    damage(root / "a" / "a1.mp4", how)
    with pytest.raises(DamagedVideo, match=r"\w"):
        read_square(root / "a" / "a1.mp4", 6, 16)
    found = load_videos(tmp_path / "list.csv", VIEW, tmp_path / "cache")
    ((path, reason),) = found.skipped
    assert path.endswith("a1.mp4")
    assert reason
    assert len(found.splits) == len(found.labels) == len(found.metadata) == 9
    for row, file in enumerate(f for f in files if f.name != "a1.mp4"):  # rows are their videos'
        assert torch.equal(found.batch(torch.tensor([row]))[0], read_square(file, 6, 16)[0])
        assert found.label_names[found.labels[row]] == file.parent.name


def test_a_set_is_decoded_once_and_again_when_its_files_change(video_folder, tmp_path, monkeypatch):
    root, cache = video_folder(count=4), tmp_path / "cache"
    first = load_videos(root, VIEW, cache)
    shutil.copy(root / "b" / "b0.mp4", root / "a" / "a0.mp4")
    changed = load_videos(root, VIEW, cache)
    assert changed.fingerprint != first.fingerprint
    assert not torch.equal(everything(changed)[0], everything(first)[0])
    assert load_videos(root, View(size=8, frames=6), cache).pixels.shape[2] == 8
    monkeypatch.setattr(caches, "read_square", None)
    assert torch.equal(everything(load_videos(root, VIEW, cache)), everything(changed))


def test_a_full_disk_while_decoding_leaves_nothing_half_written(
    video_folder, tmp_path, monkeypatch
):
    root, cache = video_folder(), tmp_path / "cache"

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"cannot write .*No space left"):
            load_videos(root, VIEW, cache)
    left = {path.name for path in cache.rglob("*") if not path.is_dir() and path.suffix != ".at"}
    assert left <= {"CACHEDIR.TAG", "verified.sqlite"}
    assert len(load_videos(root, VIEW, cache).splits) == 6


def test_a_damaged_cache_is_named(video_folder, tmp_path):
    root, cache = video_folder(), tmp_path / "cache"
    stamp = load_videos(root, VIEW, cache).pixels.folder.name
    (cache / stamp / "metadata.npy").write_bytes(b"short")
    with pytest.raises(UserError, match=f"{stamp} is damaged"):
        load_videos(root, VIEW, cache)
    (cache / stamp / "index.json").write_text("{")
    with pytest.raises(UserError, match=rf"{stamp}.index\.json is not JSON"):
        load_videos(root, VIEW, cache)
    (cache / stamp / "index.json").unlink()
    assert len(load_videos(root, VIEW, cache).splits) == 6


# --- folders of others


def junk(root: Path) -> None:
    """An unreadable twin beside each video, as copying from a Mac may leave it, but not hidden."""
    for path in sorted(root.rglob("*.mp4")):
        path.with_name(f"copy of {path.name}").write_bytes(b"resource fork")


def test_what_is_damaged_does_not_spoil_a_split(video_folder, tmp_path):
    root, cache = video_folder(count=4, classes=("a", "b", "c")), tmp_path / "cache"
    clean = load_videos(root, VIEW, cache)
    junk(root)
    found = load_videos(root, VIEW, cache)
    assert (found.splits, found.groups) == (clean.splits, clean.groups)
    assert len(found.skipped) == 12
    assert torch.equal(everything(found), everything(clean))
    drawn = [load_videos(root, VIEW, cache, seed=seed) for seed in range(30)]
    assert all(again.splits.count("test") == 3 for again in drawn)
    assert len({again.fingerprint for again in drawn}) == len({again.splits for again in drawn}) > 9
    assert len(list(cache.glob("*/index.json"))) == 2  # a split is not part of a cache


def test_too_much_damage_is_refused_before_anything_is_decoded(video_folder, tmp_path, capsys):
    root, cache = video_folder(count=3, classes=("a", "b", "c")), tmp_path / "cache"
    for path in sorted((root / "c").iterdir()):
        path.write_bytes(b"")
    found = load_videos(root, VIEW, cache)
    assert found.label_names == ("a", "b")
    assert "no video can be read of c" in capsys.readouterr().out
    (root / "b" / "b1.mp4").write_bytes(b"")
    before = set(cache.iterdir())
    with pytest.raises(UserError, match="class 'b' has 2 usable clips"):
        load_videos(root, VIEW, cache)
    assert set(cache.iterdir()) == before


def test_unlabelled_videos_of_recordings_that_are_tested_on_are_left_out_by_name(
    video_folder, tmp_path
):
    root = video_folder(count=3)
    rows = [f"{path},{path.parent.name},{path.stem}" for path in sorted(root.rglob("*.mp4"))]
    copies = [shutil.copy(path, tmp_path / path.name) for path in sorted(root.rglob("*.mp4"))]
    rows += [f"{copy},,{copy.stem}" for copy in copies]
    (tmp_path / "list.csv").write_text("path,label,group\n" + "\n".join(rows))
    found = load_videos(tmp_path / "list.csv", VIEW, tmp_path / "cache")
    tested = {
        group for group, part in zip(found.groups, found.splits, strict=True) if part == "test"
    }
    assert {os.path.basename(path)[:-4] for path, _ in found.skipped} == tested
    assert found.splits.count("unlabelled") == 6 - len(tested)
    assert all("a recording that is tested on" in reason for _, reason in found.skipped)


def test_a_cache_in_the_folder_of_videos_itself_is_no_data_and_makes_it_no_cache(video_folder):
    root = video_folder(where=video_folder() / "more")  # a/..., b/..., more/a/..., more/b/...
    for _ in range(2):
        found = load_videos(root, VIEW, root, storage="transcode")
        assert found.label_names == ("a", "b") and len(found.splits) == 6
    assert len(read_list(root.parent)) == 12


@pytest.mark.parametrize("storage", ["memmap", "transcode"])
def test_a_cache_inside_the_folder_of_videos_is_no_data(video_folder, storage):
    root = video_folder()
    for _ in range(2):
        found = load_videos(root, VIEW, root / "data" / "cache", storage=storage)
        assert found.label_names == ("a", "b") and not found.skipped
    motion = MotionData(labelled=2, unlabelled=0, test=1, size=16, frames=6)
    load_motion(motion, VIEW, root / "data")
    assert load_videos(root, VIEW, root / "data" / "cache").label_names == ("a", "b")


def test_a_list_of_files_that_are_not_there_leaves_nothing_behind(tmp_path):
    (tmp_path / "list.csv").write_text("path,label\n" + "".join(f"{i}.mp4,a\n" for i in range(9)))
    with pytest.raises(UserError, match="none of its 9 files"):
        load_videos(tmp_path / "list.csv", VIEW, tmp_path / "cache")
    (tmp_path / "0.mp4").write_bytes(b"")
    with pytest.raises(UserError, match="1 class found"):
        load_videos(tmp_path / "list.csv", VIEW, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_made_is_one_line(video_folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot use .*verified\.sqlite: unable to open"):
        load_videos(video_folder(), VIEW, tmp_path / "file" / "cache")


def test_some_of_many_rows_are_of_all_classes_and_always_the_same():
    """Of twelve classes that take turns every third video is of four."""
    rows = torch.arange(100, 1300)
    some = some_of(rows, 500)
    assert len(set(some.tolist())) == 500 and set(some.tolist()) <= set(rows.tolist())
    counts = torch.bincount(some % 12, minlength=12)
    assert counts.min() > 25 and counts.max() < 60
    assert torch.equal(some, some_of(rows, 500))
    assert some_of(rows, 1200) is rows


def test_a_corrected_label_of_several_makes_another_set(video_folder, tmp_path):
    files = sorted(video_folder(count=4).rglob("*.mp4"))
    splits = ["train", "train", "train", "test"] * 2

    def stamp(first: tuple[str, ...]) -> str:
        named = [first, *[("a", "b")] * 7]
        rows = zip(files, splits, named, strict=True)
        videos = [Video(file, "", file.name, split, labels) for file, split, labels in rows]
        view = View(size=8, frames=4, length=2)
        return open_videos(videos, view, tmp_path / "cache", name="several").fingerprint

    assert stamp(("a", "b")) == stamp(("a", "b"))
    assert len({stamp(("a", "b")), stamp(("a",)), stamp(("b",))}) == 3


def test_a_corrected_label_or_group_of_a_list_makes_another_set(video_folder, tmp_path):
    files = sorted(video_folder(count=4).rglob("*.mp4"))
    splits = ["train", "train", "train", "test"] * 2

    def stamp(label: str, group: str) -> str:
        rows = zip(files, [label, *"aaabbbb"], [group, *"1234567"], splits, strict=True)
        videos, view = [Video(*row) for row in rows], View(size=8, frames=4, length=2)
        return open_videos(videos, view, tmp_path / "cache", name="list").fingerprint

    assert len({stamp("a", "0"), stamp("b", "0"), stamp("a", "9")}) == 3

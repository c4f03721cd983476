"""Official lists become the clips that their authors meant."""

from collections import Counter

import pytest

from gdviz.config import View
from gdviz.core.files import UserError
from gdviz.data.listing import read_clips, split_by_group
from gdviz.data.official import SOURCES, describe, find_lists, multi_hot, read_official, save_list
from gdviz.data.videos import load_videos

# (train, test), as the papers give them
SIZES = {
    "ucf101": {1: (9537, 3783), 2: (9586, 3734), 3: (9624, 3696)},
    "hmdb51": dict.fromkeys((1, 2, 3), (3570, 1530)),
}


@pytest.mark.parametrize("split", [1, 2, 3])
@pytest.mark.parametrize("name", SIZES)
def test_the_official_lists_have_their_sizes_and_leak_no_group(official, name, split):
    found = read_official(official / "ucf101_layout", lists=official / "splits" / name, split=split)
    parts = Counter(clip.split for clip in found.clips)
    assert (parts["train"], parts["test"]) == SIZES[name][split]
    assert len(found.classes) == {"ucf101": 101, "hmdb51": 51}[name]
    assert {clip.label for clip in found.clips} == set(found.classes)
    assert split_by_group(found.clips) == found.clips  # raises where a group is on both sides
    there = [clip for clip in found.clips if clip.path.exists()]
    assert len(there) == len(found.clips) - len(found.missing) == (15 if name == "ucf101" else 0)
    assert all(clip.path.parent.name == clip.label and clip.group == "g01" for clip in there)
    assert f"{len(there)} of {len(found.clips)} videos" in describe(found)


def test_ccv_has_videos_of_several_classes_and_of_none(official, tmp_path):
    found = read_official(tmp_path, lists=official / "splits" / "ccv")
    assert Counter(clip.split for clip in found.clips) == {
        "train": 3650,
        "unlabelled": 1009,
        "test": 4658,
    }
    assert Counter(len(clip.labels) for clip in found.clips) == {0: 1996, 1: 6773, 2: 538, 3: 10}
    assert found.clips[0].labels == ("Basketball",)
    assert multi_hot(found.clips, found.classes).sum() == 6773 + 2 * 538 + 3 * 10
    with pytest.raises(UserError, match="--split 2: CCV has one"):
        read_official(tmp_path, lists=official / "splits" / "ccv", split=2)


def write(folder, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, newline="")


def test_small_layouts_are_found_and_read(tmp_path):
    videos = {
        f"hmdb51/wave/{n}_wave_f_cm_np1_ba_med_{i}.avi": ""
        for n in ("A#1 (x)", "B", "C")
        for i in (0, 1)
    }
    codes = zip(videos, (1, 1, 2, 2, 0, 0), strict=True)
    lists = {
        "splits/wave_test_split1.txt": "".join(
            f"{v.rpartition('/')[2]} {code} \r\n" for v, code in codes
        )
    }
    write(tmp_path, videos | lists)
    assert find_lists(tmp_path) == ("HMDB51", tmp_path / "splits")
    found = read_official(tmp_path)
    assert [(c.path.name[0], c.label, c.group, c.split) for c in found.clips] == [
        ("A", "wave", "A#1 (x)_wave", "train"), ("A", "wave", "A#1 (x)_wave", "train"),
        ("B", "wave", "B_wave", "test"), ("B", "wave", "B_wave", "test"),
    ]  # fmt: skip
    assert found.missing == []
    with pytest.raises(UserError, match="no lists of HMDB51's split 2"):
        read_official(tmp_path, split=2)
    (tmp_path / "splits/wave_test_split1.txt").write_text("x.avi 3\n")
    with pytest.raises(UserError, match="is none of 0, 1, 2"):
        read_official(tmp_path)


def test_an_official_layout_is_data_for_a_run_and_ccv_is_refused(video_folder, tmp_path):
    root = video_folder(count=3)
    write(root, {"lists/classInd.txt": "1 a\r\n2 b\r\n"})
    write(
        root,
        {
            f"lists/{p}list01.txt": "".join(f"{c}/{c}{i}.mp4\r\n" for c in "ab" for i in n)
            for p, n in (("train", (0, 2)), ("test", (1,)))
        },
    )
    found = load_videos(root, View(size=16, frames=6), tmp_path / "cache")
    assert Counter(found.splits) == {"train": 4, "test": 2}
    save_list(read_official(root).clips, tmp_path / "list.csv")
    assert [(c.path.name, c.split) for c in read_clips(tmp_path / "list.csv")] == [
        (c.path.name, c.split) for c in read_official(root).clips
    ]
    ccv = {
        "categoryName.txt": "Cat\nDog",
        "trainVidID.txt": "-a1\nb2\n",
        "trainLabel.txt": "1 1 \n0 0 \n",
        "testVidID.txt": "c3\n",
    }
    write(tmp_path / "ccv", ccv | {"testLabel.txt": "0 1 \n", "videos/-a1.mp4": ""})
    clips = read_official(tmp_path / "ccv").clips
    assert [(c.path.name, c.labels, c.split) for c in clips] == [
        ("-a1.mp4", ("Cat", "Dog"), "train"), ("b2", (), "unlabelled"), ("c3", ("Dog",), "test"),
    ]  # fmt: skip
    with pytest.raises(UserError, match="one class each"):
        load_videos(tmp_path / "ccv", View(), tmp_path / "cache")
    (tmp_path / "ccv" / "testLabel.txt").write_text("0 1 1\n")
    with pytest.raises(UserError, match="needs 1 lines of 2"):
        read_official(tmp_path / "ccv")


def test_every_source_names_its_page_and_terms():
    for source in SOURCES.values():
        assert source.page.startswith("https://")
        assert "cite" in source.terms

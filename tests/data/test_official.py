"""Official lists become the videos that their authors meant."""

from collections import Counter

import pytest

from gdviz.config import View
from gdviz.core.files import UserError
from gdviz.data.listing import read_list
from gdviz.data.official import SOURCES, describe, find_lists, read_official, save_list
from gdviz.data.splits import split_by_group
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
    parts = Counter(video.split for video in found.videos)
    assert (parts["train"], parts["test"]) == SIZES[name][split]
    assert len(found.classes) == {"ucf101": 101, "hmdb51": 51}[name]
    assert {video.label for video in found.videos} == set(found.classes)
    given = [video.split for video in found.videos]
    assert split_by_group(found.videos, name) == given  # raises where a group is on both sides
    there = [video for video in found.videos if video.path.exists()]
    missing = len(found.videos) - len(found.missing)
    assert len(there) == missing == (15 if name == "ucf101" else 0)
    assert all(v.path.parent.name == v.label and v.group == "g01" for v in there)
    assert f"{len(there)} of {len(found.videos)} videos" in describe(found)


def test_ccv_has_videos_of_several_classes_and_of_none(official, tmp_path):
    found = read_official(tmp_path, lists=official / "splits" / "ccv")
    parts = Counter(video.split for video in found.videos)
    assert parts == {"train": 3650, "unlabelled": 1009, "test": 4658}
    several = Counter(len(video.labels) for video in found.videos)
    assert several == {0: 1996, 1: 6773, 2: 538, 3: 10}
    assert found.videos[0].labels == ("Basketball",)
    with pytest.raises(UserError, match=r"--csv .*list\.csv: a list has one class a video"):
        save_list(found.videos, tmp_path / "list.csv")
    with pytest.raises(UserError, match="--split 2: CCV has one"):
        read_official(tmp_path, lists=official / "splits" / "ccv", split=2)


def write(folder, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, newline="")


def test_hmdb51_s_codes_and_odd_names(tmp_path):
    names = [f"{n}_wave_f_cm_np1_ba_med_{i}.avi" for n in ("A#1 (x)", "B", "C") for i in (0, 1)]
    lines = [f"{name} {code} \r\n" for name, code in zip(names, (1, 1, 2, 2, 0, 0), strict=True)]
    write(tmp_path, {f"hmdb51/wave/{name}": "" for name in names})
    write(tmp_path, {"splits/wave_test_split1.txt": "".join(lines)})
    assert find_lists(tmp_path) == ("HMDB51", tmp_path / "splits")
    found = read_official(tmp_path)
    assert [(v.path.name[0], v.label, v.group, v.split) for v in found.videos] == [
        ("A", "wave", "A#1 (x)_wave", "train"), ("A", "wave", "A#1 (x)_wave", "train"),
        ("B", "wave", "B_wave", "test"), ("B", "wave", "B_wave", "test"),
    ]  # fmt: skip
    assert found.missing == []
    with pytest.raises(UserError, match="no lists of HMDB51's split 2"):
        read_official(tmp_path, split=2)
    write(tmp_path, {"splits/wave_test_split1.txt": "x.avi 3\n"})
    with pytest.raises(UserError, match="is none of 0, 1, 2"):
        read_official(tmp_path)


def test_videos_turned_into_another_container_are_found(tmp_path):
    lists = {"classInd.txt": "1 A\n2 B\n", "trainlist01.txt": "A/v_A_g08_c01.avi 1\n"}
    write(tmp_path, lists | {"testlist01.txt": "B/v_B_g01_c01.avi\nB/v_B_g02_c01.avi\n"})
    write(
        tmp_path, {"videos/v_A_g08_c01.mp4": "", "B/v_B_g01_c01.avi": "", "B/._v_B_g02_c01.avi": ""}
    )
    found = read_official(tmp_path)
    names = [str(video.path.relative_to(tmp_path)) for video in found.videos]
    assert names == ["videos/v_A_g08_c01.mp4", "B/v_B_g01_c01.avi", "B/v_B_g02_c01.avi"]
    assert [video.path.name for video in found.missing] == ["v_B_g02_c01.avi"]
    write(tmp_path, {"B/v_B_g01_c01.mp4": ""})  # beside the one that is listed
    assert read_official(tmp_path).videos == found.videos
    write(tmp_path, {"more/v_A_g08_c01.mkv": ""})
    with pytest.raises(UserError, match=r"v_A_g08_c01\.avi may be .*\.mkv or .*\.mp4"):
        read_official(tmp_path)


def test_an_official_layout_is_data_for_a_run(video_folder, tmp_path):
    root, parts = video_folder(count=3), (("train", (0, 2)), ("test", (1,)))
    write(root, {"lists/classInd.txt": "1 a\r\n2 b\r\n"})
    for part, numbers in parts:
        lines = "".join(f"{c}/{c}{i}.mp4\r\n" for c in "ab" for i in numbers)
        write(root, {f"lists/{part}list01.txt": lines})
    found = load_videos(root, View(size=16, frames=6), tmp_path / "cache")
    assert Counter(found.splits) == {"train": 4, "test": 2}
    videos = read_official(root).videos
    save_list(videos, tmp_path / "list.csv")
    listed = [(v.path, v.label, v.split) for v in read_list(tmp_path / "list.csv")]
    assert listed == [(v.path.resolve(), v.label, v.split) for v in videos]


def test_ccv_s_layout_is_listed_and_refused_where_it_is_damaged(tmp_path):
    write(
        tmp_path,
        {
            "categoryName.txt": "Cat\nDog",
            "trainVidID.txt": "-a1\nb2\n",
            "trainLabel.txt": "1 1 \n0 0 \n",
            "testVidID.txt": "c3\n",
            "testLabel.txt": "0 1 \n",
            "videos/-a1.mp4": "",
        },
    )
    assert [(v.path.name, v.labels, v.split) for v in read_official(tmp_path).videos] == [
        ("-a1.mp4", ("Cat", "Dog"), "train"), ("b2", (), "unlabelled"), ("c3", ("Dog",), "test"),
    ]  # fmt: skip
    write(tmp_path, {"testLabel.txt": "0 1 1\n"})
    with pytest.raises(UserError, match="needs 1 lines of 2"):
        read_official(tmp_path)


def test_every_source_names_its_page_and_terms():
    assert all(source.page.startswith("https://") and source.terms for source in SOURCES.values())

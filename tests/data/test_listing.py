"""Folders and lists become videos with labels and groups; splits never leak a group."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdviz.core.files import UserError
from gdviz.data.listing import Video, read_folder, read_list, split_by_group


def video(label: str, group: str, split: str = "") -> Video:
    return Video(Path(f"{label}{group}.mp4"), label, group, split)


def test_folders_and_csv_files_are_read(video_folder, tmp_path):
    root = video_folder()
    (root / "loose.mp4").write_bytes(b"")
    (root / "a" / "notes.txt").write_text("")
    videos = read_list(root)
    assert [(v.path.name, v.label) for v in videos[:2]] == [("a0.mp4", "a"), ("a1.mp4", "a")]
    assert [v.label for v in videos] == ["a"] * 3 + ["b"] * 3 + [""]
    rows = "".join(f"videos/{n}/{n}{i}.mp4,{n},g{i}\n" for n in "ab" for i in range(3))
    text = "\ufeffpath,label,group\n" + rows + "videos/loose.mp4,,g9\n"
    (tmp_path / "list.csv").write_text(text, encoding="utf-8")
    listed = read_list(tmp_path / "list.csv")
    assert [(v.path, v.label) for v in listed] == [(v.path, v.label) for v in videos]
    assert [v.group for v in listed] == ["g0", "g1", "g2"] * 2 + ["g9"]


HEAD = "path,label,split\n"
BAD_CSV = {
    "no path": "file,label\nx.mp4,a\n",
    "empty": "",
    "unknown split": HEAD + "x.mp4,a,train\ny.mp4,a,validation\n",
    "one class": "path,label\nx.mp4,a\ny.mp4,a\nz.mp4,a\n",
    "two clips of b": "path,label\n" + "x.mp4,a\n" * 3 + "y.mp4,b\n" * 2,
    "class without test": HEAD + "x.mp4,a,train\n" * 3 + "x.mp4,a,test\n" + "y.mp4,b,train\n" * 4,
    "one to train on": HEAD
    + "x.mp4,a,train\n" * 3
    + "x.mp4,a,test\n"
    + "y.mp4,b,train\n"
    + "y.mp4,b,test\n" * 4,
    "binary": b"\x00\xff\xfe" * 100,
}


@pytest.mark.parametrize("text", BAD_CSV.values(), ids=BAD_CSV)
def test_bad_lists_name_the_file(tmp_path, text):
    (tmp_path / "list.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=r"--data .*list\.csv") as caught:
        read_list(tmp_path / "list.csv")
    assert "\n" not in str(caught.value)


LABELS = st.sampled_from(["a", "b", "c", ""])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(LABELS, st.integers(0, 9)), min_size=6, max_size=60), st.integers(0, 5))
def test_a_group_never_leaks(pairs, seed):
    videos = [video(label, str(group)) for label, group in pairs]
    try:
        out = split_by_group(videos, seed=seed)
    except UserError:
        return
    sides = {s: {v.group for v in out if v.split == s} for s in ("train", "unlabelled", "test")}
    assert not sides["test"] & (sides["train"] | sides["unlabelled"])
    assert Counter(v.label for v in out if v.label) == Counter(v.label for v in videos if v.label)
    assert all((v.split == "unlabelled") == (not v.label) for v in out)
    for label in {v.label for v in videos} - {""}:
        parts = Counter(v.split for v in out if v.label == label)
        assert parts["train"] >= 2
        assert parts["test"] >= 1
    assert split_by_group(videos, seed=seed) == out


def test_given_splits_are_kept_checked_and_hide_labels():
    kept = [
        video("a", "1", "train"),
        video("b", "2", "test"),
        video("b", "3", "unlabelled"),
        video("", "4"),
    ]
    out = split_by_group(kept)
    expected = [("a", "train"), ("b", "test"), ("", "unlabelled"), ("", "unlabelled")]
    assert [(v.label, v.split) for v in out] == expected
    for leaking in (video("a", "2", "train"), video("", "2", "unlabelled"), video("", "2")):
        with pytest.raises(UserError, match="'2' is on both sides"):
            split_by_group([*kept, leaking])
    for homeless in (video("a", "9"), video("", "9", "train")):
        with pytest.raises(UserError, match=r"9\.mp4"):
            split_by_group([*kept, homeless])


def test_file_names_tell_the_group(tmp_path, ut_interaction):
    for name in ("v_Diving_g03_c01.avi", "v_Diving_g03_c02.avi", "v_Diving_g04_c01.avi"):
        (tmp_path / name).touch()
    assert [v.group for v in read_folder(tmp_path)] == ["g03", "g03", "g04"]
    videos = split_by_group(read_list(ut_interaction))
    assert len(videos) == 60
    assert {v.group for v in videos} == {str(i) for i in range(1, 11)}
    assert all(v.group == v.path.stem.split("_")[2] for v in videos)

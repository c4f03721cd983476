"""Folders and lists as people keep them: read right, or refused by name."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gdviz.core.files import UserError
from gdviz.data.listing import Video, mark_as_cache, read_folder, read_list, video_files


def touch(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(str(number))
    return root


def labels_of(root: Path, videos: list[Video]) -> dict[str, tuple[str, str]]:
    """Label and split of each file."""
    return {os.path.relpath(v.path, root): (v.label, v.split) for v in videos}


# --- folders


def test_a_class_is_a_folder_and_what_lies_beside_is_unlabelled(tmp_path):
    touch(
        tmp_path, "a/1.mp4", "a/2.MKV", "a/notes.txt", "b c/1.webm", "loose.mp4", "unlabelled/x.mp4"
    )
    found = read_list(tmp_path)
    assert [(str(v.path.relative_to(tmp_path)), v.label) for v in found] == [
        ("a/1.mp4", "a"), ("a/2.MKV", "a"), ("b c/1.webm", "b c"), ("loose.mp4", ""),
        ("unlabelled/x.mp4", ""),
    ]  # fmt: skip
    assert len({v.group for v in found}) == 5


def test_a_recording_is_the_same_however_its_list_is_called(tmp_path, monkeypatch):
    touch(tmp_path, "in/a/1.mp4", "in/b/1.mp4")
    (tmp_path / "in" / "list.csv").write_text("path,label\na/1.mp4,a\nb/1.mp4,b\n")
    monkeypatch.chdir(tmp_path)
    near, far = read_list("in/list.csv"), read_list(tmp_path / "in/list.csv")
    assert [v.group for v in near] == [v.group for v in far]
    assert len({v.group for v in near}) == 2


def test_links_are_followed_and_loops_are_not(tmp_path):
    touch(tmp_path, "elsewhere/c/1.mp4", "root/a/1.mp4", "root/b/1.mp4")
    root = tmp_path / "root"
    (root / "c").symlink_to(tmp_path / "elsewhere" / "c")
    (root / "b" / "up").symlink_to(root)
    (root / "a" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "a").symlink_to(root / "a")
    (root / "a" / "self").symlink_to(root / "a" / "self")
    (root / "a" / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    names = [str(path.relative_to(root)) for path in video_files(root)]
    assert names == ["a/1.mp4", "a/b/c/1.mp4", "a/gone.mp4", "b/1.mp4", "c/1.mp4"]


def test_hidden_files_and_made_ones_are_no_data(tmp_path, capsys):
    junk = ("a/._1.mp4", ".ipynb_checkpoints/1.mp4", "__MACOSX/a/._1.mp4", "a/.Trash/1.mp4")
    made = ("data/cache/0123/00000/00.mp4", "data/motion-1/train/left/1.mp4")
    touch(tmp_path, "a/1.mp4", *junk, *made, "splits/list.txt", "a/Thumbs.db", "a/.DS_Store")
    mark_as_cache(tmp_path / "data" / "cache")
    mark_as_cache(tmp_path / "data" / "motion-1")
    assert [v.path.name for v in read_folder(tmp_path)] == ["1.mp4"]
    assert "no videos in data, splits" in capsys.readouterr().out
    assert len(read_folder(tmp_path / "data" / "motion-1")) == 1  # itself is what was asked for


LAYOUTS = {
    "flat": ("wave/1.mp4", "wave", "", "wave/1.mp4"),
    "UCF11": ("golf/v_golf_03/v_golf_03_02.avi", "golf", "", "golf/v_golf_03"),
    "UCF Sports": ("Diving-Side/001/2538-5_70133.avi", "Diving-Side", "", "Diving-Side/001"),
    "deep": ("golf/day/camera/1.mp4", "golf", "", "golf/day"),
    "split above": ("train/wave/0000.mp4", "wave", "train", "train/wave/0000.mp4"),
    "split below": ("wave/Testing/0000.mp4", "wave", "test", "wave/Testing/0000.mp4"),
    "all three": ("validation/golf/v_golf_03/1.avi", "golf", "val", "golf/v_golf_03"),
    "UCF101": ("Diving/v_Diving_g03_c01.avi", "Diving", "", "g03"),
    "HMDB51": ("ride_bike/Alpha_Dog_ride_bike_f_cm_np1_ba_med_0.avi", "ride_bike", "", "Alpha_Dog"),
}


@pytest.mark.parametrize(("name", "label", "split", "group"), LAYOUTS.values(), ids=LAYOUTS)
def test_folders_say_class_group_and_split(tmp_path, name, label, split, group):
    (video,) = read_folder(touch(tmp_path, name))
    assert (video.label, video.split, video.group) == (label, split, group)


def test_real_names_tell_the_group(ut_interaction):
    videos = read_list(ut_interaction)
    assert len(videos) == 60
    assert {v.group for v in videos} == {str(i) for i in range(1, 11)}
    assert all(v.group == v.path.stem.split("_")[2] for v in videos)


@pytest.mark.parametrize(
    ("others", "kept"), [(("test",), {"train", "test"}), ((), {"train", "test"})]
)
def test_a_validation_part_is_tested_on_where_nothing_else_is(tmp_path, capsys, others, kept):
    parts = ("train", "val", *others)
    found = read_list(touch(tmp_path, *(f"{part}/a/{part}.mp4" for part in parts)))
    assert {v.split for v in found} == kept
    assert len(found) == 2
    said = "left out" if others else "tested on"
    assert f"1 videos of the validation part are {said}" in capsys.readouterr().out


def test_one_file_under_two_names_is_named(tmp_path):
    touch(tmp_path, "a/1.mp4", "b/2.mp4")
    (tmp_path / "b" / "1.mp4").symlink_to(tmp_path / "a" / "1.mp4")
    with pytest.raises(UserError, match=r"b.1\.mp4 is listed twice, as .*a.1\.mp4, too"):
        read_list(tmp_path)
    (tmp_path / "list.csv").write_text("path,label\na/1.mp4,a\nb/2.mp4,b\n./a/1.mp4,a\n")
    with pytest.raises(UserError, match=r"a.1\.mp4 is listed twice"):
        read_list(tmp_path / "list.csv")


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_names_that_are_not_utf_8_are_named(tmp_path):
    touch(tmp_path, "a/1.mp4")
    Path(os.fsdecode(bytes(tmp_path) + b"/a/\xff.mp4")).write_bytes(b"")
    with pytest.raises(UserError, match=r"a/\\udcff\.mp4' is a name not in UTF-8: rename it"):
        read_list(tmp_path)


# --- lists

ROWS = [("a/1.mp4", "a"), ("a/2.mp4", "a"), ("b/1.mp4", "b")]
PLAIN = "".join(f"{path},{label}\n" for path, label in ROWS)
LISTS = {
    "comma": "path,label\n" + PLAIN,
    "semicolon": "path;label\n" + PLAIN.replace(",", ";"),
    "tab": "path\tlabel\n" + PLAIN.replace(",", "\t"),
    "blanks": " Path , Label , split\n" + PLAIN.replace(",", " , "),
    "carriage returns": ("label,path\n" + "".join(f"{b},{a}\n" for a, b in ROWS)).replace(
        "\n", "\r\n"
    ),
    "quotes": 'path,label,note\n"a/1.mp4",a,"x, y"\na/2.mp4,"a"\nb/1.mp4,b\n',
    "no header": PLAIN,
    "no header, blanks": PLAIN.replace(",", " "),
    "no header, tab": "\n" + PLAIN.replace(",", "\t") + "\n",
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("text", LISTS.values(), ids=LISTS)
def test_lists_are_read_where_they_are_plain(tmp_path, text, encoding):
    touch(tmp_path, *(path for path, _ in ROWS))
    (tmp_path / "list.txt").write_bytes(text.encode(encoding))
    found = read_list(tmp_path / "list.txt")
    assert [(v.path, v.label) for v in found] == [(tmp_path / path, label) for path, label in ROWS]


def test_groups_and_splits_of_lists(tmp_path):
    touch(tmp_path, "x.mp4", "v_Diving_g03_c01.mp4", "y.mp4", "z.mp4")
    rows = "x.mp4,a,Train,r1\nv_Diving_g03_c01.mp4,a,TEST,\ny.mp4,,unlabeled,\nz.mp4,,,\n"
    (tmp_path / "list.csv").write_text("path,label,split,group\n" + rows)
    assert [(v.split, v.group) for v in read_list(tmp_path / "list.csv")] == [
        ("train", "r1"), ("test", "g03"), ("unlabelled", "y.mp4"), ("", "z.mp4"),
    ]  # fmt: skip


def test_paths_lead_from_the_list_or_from_the_working_folder(tmp_path, monkeypatch):
    touch(tmp_path, "here/a.mp4", "lists/a.mp4", "here/b.mp4")
    (tmp_path / "lists" / "list.csv").write_text("path,label\na.mp4,a\nb.mp4,b\ngone.mp4,b\n")
    monkeypatch.chdir(tmp_path / "here")
    found = [v.path for v in read_list("../lists/list.csv")]
    assert found == [Path("../lists/a.mp4"), Path("b.mp4"), Path("../lists/gone.mp4")]


CLASS_FILES = {
    "label_map.txt": "wave\nride bike\n",
    "classInd.txt": "1 wave\r\n2 ride bike\r\n",
    "classes.txt": "0 wave\n1 ride bike\n",
}


@pytest.mark.parametrize("name", CLASS_FILES)
def test_numbers_of_classes_have_names_in_a_class_file(tmp_path, name):
    touch(tmp_path, "1.mp4", "2.mp4")
    first = 1 if name == "classInd.txt" else 0
    (tmp_path / "train.txt").write_text(f"1.mp4 {first}\n2.mp4 {first + 1}\n")
    assert [v.label for v in read_list(tmp_path / "train.txt")] == [str(first), str(first + 1)]
    (tmp_path / name).write_text(CLASS_FILES[name])
    assert [v.label for v in read_list(tmp_path / "train.txt")] == ["wave", "ride bike"]
    (tmp_path / "train.txt").write_text("1.mp4 7\n")
    with pytest.raises(UserError, match=f"class 7 is not in {name}"):
        read_list(tmp_path / "train.txt")


BAD_LISTS = {
    "no path": ("file,label\n1.mp4,a\n", "needs a header line .* it begins with 'file,label'"),
    "frames, as mmaction2 lists them": ("clips/1 30 4\n", "it begins with 'clips/1 30 4'"),
    "several labels": ("1.mp4 3 4\n", "it begins with '1.mp4 3 4'"),
    "empty": ("\n \n", "it is empty"),
    "header only": ("path,label\n", "it begins with 'path,label'"),
    "comma in a name": ("path,label\na, b.mp4,a\n", "3 fields in 'a,b.mp4,a'"),
    "blank path": ("path,label\n1.mp4,a\n,a\n", "has a line without a path"),
    "unknown split": ("path,label,split\n1.mp4,a,dev\n", "split 'dev' of 1.mp4 is none of train"),
    "binary": (b"\x00\xff\xfe" * 100, "cannot be read as a list in UTF-8 or UTF-16"),
    "zeros": (b"1.mp4 \x00\n", r"cannot be read as a list .*no text"),
    "nothing there": (
        "path,label\nx.mp4,a\ny.mp4,a\nz.mp4,b\nw.mp4,b\n",
        r"none of its 4 files is beside .*x\.mp4, .*y\.mp4, .*z\.mp4$",
    ),
}


@pytest.mark.parametrize(("text", "message"), BAD_LISTS.values(), ids=BAD_LISTS)
def test_bad_lists_are_refused_in_one_line(tmp_path, text, message):
    touch(tmp_path, "1.mp4")
    (tmp_path / "list.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=rf"--data .*list\.csv: .*{message}") as caught:
        read_list(tmp_path / "list.csv")
    assert "\n" not in str(caught.value)


def read(source: Path) -> list[Video] | str:
    try:
        return read_list(source)
    except UserError as error:
        return str(error)


FIELDS = st.sampled_from(["path", "label", "split", "1.mp4", "b/2.avi", "7", "train", "", " ", '"'])
LINES = st.lists(FIELDS | st.text(max_size=5), max_size=5)
TEXTS = st.tuples(st.sampled_from([",", ";", "\t", " "]), st.lists(LINES, max_size=6)).map(
    lambda drawn: "\n".join(map(drawn[0].join, drawn[1]))
)
ANY_FOLDER = settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])


@ANY_FOLDER
@given(st.binary(max_size=60) | TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_list_is_read_or_refused_in_one_line(tmp_path, content):
    touch(tmp_path, "1.mp4", "b/2.avi")
    (tmp_path / "list.csv").write_bytes(content)
    found = read(tmp_path / "list.csv")
    if isinstance(found, str):
        assert found.startswith("--data") and "\n" not in found
    else:
        assert len({video.path for video in found}) == len(found) > 0


NAMES = st.sampled_from(["a", "b", "train", "Test", "val", "unlabelled", ".x", "1", "__MACOSX"])
FILES = st.sampled_from(["1.mp4", "2.avi", "v_a_g01_c01.avi", "x.txt", "._1.mp4"])


@ANY_FOLDER
@given(st.lists(st.tuples(st.lists(NAMES, max_size=3), FILES), min_size=1, max_size=6))
def test_any_folder_is_read_or_refused(tmp_path_factory, places):
    root = tmp_path_factory.mktemp("any")
    inner = {(*folders, file) for folders, file in places}
    touch(root, *map("/".join, inner))
    seen = {
        parts
        for parts in inner
        if parts[-1] != "x.txt" and not any(part.startswith((".", "__")) for part in parts)
    }
    found = read(root)
    if isinstance(found, str):
        assert "no videos in it" in found and not seen
        return
    assert {video.path.relative_to(root).parts for video in found} <= seen
    assert all(video.label in ("", *video.path.parts) for video in found)
    assert all(video.split in ("", "train", "test") for video in found)

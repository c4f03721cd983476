"""Splits never leak a group, exist wherever one can, and are drawn at once."""

import time
from collections import Counter
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdviz.core.files import UserError
from gdviz.data.listing import Video, read_list
from gdviz.data.official import read_official
from gdviz.data.splits import split_by_group


def video(label: str, group: str, split: str = "") -> Video:
    return Video(Path(f"{label}{group}.mp4"), label, group, split)


def split(videos: list[Video], seed: int = 0) -> list[str]:
    return split_by_group(videos, "here", seed=seed)


def exists(videos: list[Video]) -> bool:
    """Whether any choice of groups to test on will do, by trying all."""
    groups = sorted({v.group for v in videos if v.label})
    total = Counter(v.label for v in videos if v.label)
    for bits in product((0, 1), repeat=len(groups)):
        chosen = {group for group, bit in zip(groups, bits, strict=True) if bit}
        tested = Counter(v.label for v in videos if v.label and v.group in chosen)
        if all(tested[label] >= 1 and count - tested[label] >= 2 for label, count in total.items()):
            return True
    return False


LABELS = st.sampled_from(["a", "b", "c", ""])
PAIRS = st.lists(st.tuples(LABELS, st.integers(0, 5)), min_size=6, max_size=20)


@settings(max_examples=300, deadline=None)
@given(PAIRS, st.integers(0, 5))
def test_a_group_never_leaks_and_a_split_is_found_where_there_is_one(pairs, seed):
    videos = [video(label, str(group)) for label, group in pairs]
    labels = Counter(v.label for v in videos if v.label)
    if len(labels) < 2 or min(labels.values()) < 3:
        return
    if not exists(videos):
        with pytest.raises(UserError, match="no split by group exists"):
            split(videos, seed)
        return
    parts = split(videos, seed)
    assert parts == split(videos, seed)
    of = {
        part: {v.group for v, p in zip(videos, parts, strict=True) if p == part} for part in parts
    }
    assert not of["test"] & (of["train"] | of.get("unlabelled", set()))
    counts = Counter((v.label, part) for v, part in zip(videos, parts, strict=True))
    assert all(counts[label, "train"] >= 2 and counts[label, "test"] >= 1 for label in labels)
    assert {part for v, part in zip(videos, parts, strict=True) if not v.label} <= {
        "unlabelled",
        "",
    }


@pytest.mark.parametrize(("classes", "each"), [(10, 3), (51, 5), (101, 5), (400, 10), (400, 50)])
def test_many_classes_are_split_at_once(classes, each):
    videos = [video(str(c), f"{c}/{i}") for c in range(classes) for i in range(each)]
    start = time.process_time()
    parts = split(videos)
    assert time.process_time() - start < 5
    tested = Counter(v.label for v, part in zip(videos, parts, strict=True) if part == "test")
    assert set(tested.values()) == {max(1, round(0.3 * each))}
    assert parts != split(videos, seed=1)


def test_hmdb51_is_split_by_film(official):
    found = read_official(official, lists=official / "splits" / "hmdb51").videos
    videos = [Video(v.path, v.label, v.group.removesuffix(f"_{v.label}")) for v in found]
    parts = split(videos)
    assert len({v.group for v in videos}) > 1000
    assert 0.25 < parts.count("test") / len(parts) < 0.4


def test_real_videos_are_split_by_recording(ut_interaction):
    videos = read_list(ut_interaction)
    tested = {v.group for v, part in zip(videos, split(videos), strict=True) if part == "test"}
    assert len(tested) == 3


@pytest.mark.parametrize(
    ("videos", "message"),
    [
        (
            [video("UCF-101", str(i)) for i in range(5)],
            r"1 class found \(UCF-101\); .* if they lie in one more folder, give that",
        ),
        (
            [video("a", "1"), video("b", "2")] * 2 + [video("a", "3")],
            "class 'b' has 2 usable clips",
        ),
        ([video("a", "1"), video("b", "2"), video("b", "3")] * 2, r"'a' has 2 usable clips; each"),
        (
            [video("a", "1")] * 3 + [video("b", str(i)) for i in range(3)],
            "no split by group exists .*class 'a' has 3 videos of 1 recordings; give a list",
        ),
        (
            [video("a", "1", "train")] * 3 + [video("b", str(i), "train") for i in range(4)],
            r"class 'a' has 3 usable clips \(3 to train on, 0 to test on\)",
        ),
    ],
)
def test_too_little_is_refused_by_name(videos, message):
    with pytest.raises(UserError, match=f"--data here: .*{message}"):
        split(videos)


@pytest.mark.parametrize("how", ["folder", "list"])
def test_the_same_names_in_train_and_test_are_no_leak(tmp_path, how):
    names = [f"{part}/{c}/000{i}.mp4" for part in ("train", "test") for c in "ab" for i in range(2)]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    rows = "".join(f"{n},{n.split('/')[1]},{n.split('/')[0]}\n" for n in names)
    (tmp_path / "list.csv").write_text("path,label,split\n" + rows)
    videos = read_list(tmp_path / "list.csv" if how == "list" else tmp_path)
    assert split(videos) == [v.path.parent.parent.name for v in videos]
    recordings = [f"{part}/a/v_a_g01_c0{i}.mp4" for part in ("train", "test") for i in range(2)]
    for name in recordings:  # of one recording
        (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=r"train/a/v_a_g01.* and .*test/a/v_a_g01.* recording"):
        split(read_list(tmp_path))


def test_given_splits_are_kept_checked_and_hide_labels():
    each = [("train", "1"), ("train", "2"), ("test", "3")]
    kept = [video(label, label + group, part) for label in "ab" for part, group in each]
    kept += [video("b", "9", "unlabelled"), video("", "10")]
    assert split(kept) == ["train", "train", "test"] * 2 + ["unlabelled"] * 2
    for leaking in (video("b", "a3", "train"), video("", "a3", "unlabelled"), video("", "a3")):
        with pytest.raises(UserError, match=r"a3\.mp4 and aa3\.mp4, .* are of one recording"):
            split([*kept, leaking])
    for homeless in (video("a", "9"), video("", "9", "train")):
        with pytest.raises(UserError, match=r"9\.mp4 (has a label but no split|is to train but)"):
            split([*kept, homeless])

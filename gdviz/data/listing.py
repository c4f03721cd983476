"""Which videos there are: a folder of class sub-folders, or a CSV, as one list split by group."""

from __future__ import annotations

import csv
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gdviz.core.files import UserError
from gdviz.data.reading import EXTENSIONS

SPLITS = ("train", "unlabelled", "test")

# Videos cut from one recording must not fall on both sides of a split. File names that say which:
GROUP_PATTERNS = (
    re.compile(r"^(.+)_[fhlu]_(?:cm|nm)_np\d+_\w{2}_(?:goo|med|bad)_\d+$"),  # HMDB51: film_class
    re.compile(r"^v_.+_(g\d+)_c\d+$"),  # UCF101
    re.compile(r"^set\d+_\d+_(\d+)_\d+$"),  # UT-Interaction
)


@dataclass(frozen=True)
class Video:
    """One file and where it belongs."""

    path: Path
    label: str  # empty: unlabelled
    group: str
    split: str = ""  # train, unlabelled or test; empty: not given
    labels: tuple[str, ...] | None = None  # instead of ``label``: several classes, or none


def group_of(path: Path) -> str:
    """Return the recording that a video was cut from, by its name; by default itself."""
    found = (pattern.match(path.stem) for pattern in GROUP_PATTERNS)
    return next((match.group(1) for match in found if match), path.stem)


def read_folder(root: Path) -> list[Video]:
    """List the videos below a folder, labelled by the folder they lie in; in none, unlabelled.

    Raises:
        UserError: there are none.
    """
    paths = [path for path in sorted(root.rglob("*")) if path.suffix.lower() in EXTENSIONS]
    if not paths:
        expected = f"one sub-folder a class, holding {' '.join(sorted(EXTENSIONS))} files"
        raise UserError(f"--data {root}: no videos in it; expected {expected}")
    labels = ["" if path.parent == root else path.parent.name for path in paths]
    return [Video(path, label, group_of(path)) for path, label in zip(paths, labels, strict=True)]


def _read_csv(file: Path) -> list[Video]:
    try:
        with open(file, newline="", encoding="utf-8-sig") as handle:
            rows = list(csv.DictReader(handle))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--data {file}: is neither a folder nor a CSV file ({error})") from None
    if not rows or "path" not in rows[0]:
        columns = "at least the column 'path' (then: label, group, split)"
        raise UserError(f"--data {file}: needs a header line with {columns}")
    videos = []
    for row in rows:
        path, split = file.parent / (row["path"] or ""), row.get("split") or ""
        if split not in ("", *SPLITS):
            choice = f"none of {', '.join(SPLITS)}"
            raise UserError(f"--data {file}: split {split!r} of {row['path']} is {choice}")
        group = row.get("group") or group_of(path)
        videos.append(Video(path, row.get("label") or "", group, split))
    return videos


def read_list(source: Path | str) -> list[Video]:
    """List the videos of a folder or a CSV.

    Raises:
        UserError: nothing there, or too little; see `check_classes`.
    """
    source = Path(source)
    if not source.exists():
        raise UserError(f"--data {source}: no such folder or CSV file")
    videos = read_folder(source) if source.is_dir() else _read_csv(source)
    check_classes(videos, str(source))
    return videos


def check_classes(videos: list[Video], name: str) -> None:
    """Raise UserError unless two classes or more have enough videos to train and test on."""
    labels = Counter(video.label for video in videos if video.label and video.split != "unlabelled")
    if len(labels) < 2:
        found = f"{len(labels)} class found ({', '.join(labels) or 'none'})"
        raise UserError(f"--data {name}: {found}; a classifier needs two or more")
    parts = Counter((video.label, video.split) for video in videos)
    for label, count in sorted(labels.items()):
        given, train, test = (parts[label, split] for split in ("", "train", "test"))
        if count < 3 or (not given and (train < 2 or test < 1)):
            where = "" if given else f" ({train} to train on, {test} to test on)"
            clips = f"{count} usable clip{'s' * (count > 1)}{where}"
            needs = "each class needs two to train on, for cross-fitting, and one to test on"
            raise UserError(f"--data {name}: class {label!r} has {clips}; {needs}")


def _check_splits(videos: list[Video]) -> None:
    """Raise UserError where given splits leak a group or leave out a labelled video."""
    for video in videos:
        if video.label and not video.split:
            missing = "has a label but no split, as others have: say train or test"
            raise UserError(f"{video.path} {missing}")
        if not video.label and video.split in ("train", "test"):
            raise UserError(f"{video.path} is to {video.split} but has no label")
    test = {video.group for video in videos if video.split == "test"}
    leaks = sorted({video.group for video in videos if video.split != "test"} & test)
    if leaks:
        leak = f"group {leaks[0]!r} is on both sides of the given split"
        raise UserError(f"{leak}: its clips would leak into the test part")


def _draw_test_groups(labelled: list[Video], share: float, seed: int) -> set[str]:
    """Return groups to test on: every class has one video there or more, and two elsewhere."""
    rng, classes = np.random.default_rng(seed), {video.label for video in labelled}
    sizes = Counter(video.group for video in labelled)
    for _ in range(200):
        held, chosen = 0, set()
        for group in rng.permutation(sorted(sizes)):
            if held >= share * len(labelled):
                break
            chosen.add(str(group))
            held += sizes[str(group)]
        trained = Counter(video.label for video in labelled if video.group not in chosen)
        tested = {video.label for video in labelled if video.group in chosen}
        if tested == classes and all(trained[label] >= 2 for label in classes):
            return chosen
    needs = "no split by group leaves every class two clips to train on and one to test on"
    raise UserError(f"{needs}: give a CSV with a 'split' column ({', '.join(SPLITS)})")


def split_by_group(videos: list[Video], *, test: float = 0.3, seed: int = 0) -> list[Video]:
    """Put whole groups into the training or the test part, unless the videos say where they belong.

    Groups are drawn at random until the test part holds about ``test`` of the labelled videos. Of
    groups to test on, unlabelled videos are left out.

    Raises:
        UserError: given splits leak a group or leave out a labelled video, or no split by group
            gives every class two videos to train on and one to test on.
    """
    if any(video.split for video in videos):
        _check_splits(videos)
        hidden = {"label": "", "split": "unlabelled"}
        return [v if v.split in ("train", "test") else replace(v, **hidden) for v in videos]
    tested = _draw_test_groups([video for video in videos if video.label], test, seed)
    out = []
    for video in videos:
        if video.group not in tested:
            out.append(replace(video, split="train" if video.label else "unlabelled"))
        elif video.label:
            out.append(replace(video, split="test"))
    return out

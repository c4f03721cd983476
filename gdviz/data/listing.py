"""Which videos there are: a folder of class sub-folders, or a CSV, as one list of clips split by
group."""

from __future__ import annotations

import csv
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gdviz.core.files import UserError
from gdviz.data.reading import EXTENSIONS

# Clips cut from one recording must not fall on both sides of a split. File names that say which:
GROUP_PATTERNS = {
    "HMDB51": re.compile(
        r"^(.+)_[fhlu]_(?:cm|nm)_np\d+_\w{2}_(?:goo|med|bad)_\d+$"
    ),  # the film, and the class
    "UCF101": re.compile(r"^v_.+_(g\d+)_c\d+$"),
    "UT-Interaction": re.compile(r"^set\d+_\d+_(\d+)_\d+$"),
}


SPLITS = ("train", "unlabelled", "test")


@dataclass(frozen=True)
class Clip:
    """One video file and where it belongs."""

    path: Path
    label: str  # empty: unlabelled
    group: str
    split: str = ""  # train, unlabelled or test
    labels: tuple[str, ...] | None = (
        None  # instead of ``label``, where a video may show several classes or none
    )


def group_of(path: Path) -> str:
    """Return the recording that a video was cut from, by its name; by default itself."""
    for pattern in GROUP_PATTERNS.values():
        if match := pattern.match(path.stem):
            return match.group(1)
    return path.stem


def read_folder(root: Path) -> list[Clip]:
    """The videos below a folder, labelled by the folder they lie in; those beside the sub-folders
    are unlabelled."""
    clips = []
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in EXTENSIONS and path.is_file():
            clips.append(
                Clip(path, path.parent.name if path.parent != root else "", group_of(path))
            )
    if not clips:
        raise UserError(
            f"--data {root}: no videos in it; expected one sub-folder a class, holding "
            f"{' '.join(sorted(EXTENSIONS))} files"
        )
    return clips


def _read_csv(file: Path) -> list[Clip]:
    try:
        with open(file, newline="", encoding="utf-8-sig") as handle:
            rows = list(csv.DictReader(handle))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--data {file}: is neither a folder nor a CSV file ({error})") from None
    if not rows or "path" not in rows[0]:
        raise UserError(
            f"--data {file}: needs a header line with at least the column 'path' (then: label, "
            "group, split)"
        )
    clips = []
    for row in rows:
        path = file.parent / (row["path"] or "")
        label, split = row.get("label") or "", row.get("split") or ""
        if split not in ("", *SPLITS):
            raise UserError(
                f"--data {file}: split {split!r} of {row['path']} is none of {', '.join(SPLITS)}"
            )
        clips.append(Clip(path, label, row.get("group") or group_of(path), split))
    return clips


def read_clips(source: Path | str) -> list[Clip]:
    """Lists the videos of a folder (class sub-folders; files beside them are unlabelled) or a CSV.

    Raises:
        UserError: nothing there, one class only, or a class with fewer than three clips.
    """
    source = Path(source)
    if not source.exists():
        raise UserError(f"--data {source}: no such folder or CSV file")
    clips = read_folder(source) if source.is_dir() else _read_csv(source)
    check_classes(clips, source)
    return clips


def check_classes(clips: list[Clip], source: Path) -> None:
    """Raises UserError unless there are two classes or more with three clips or more each, enough
    of them in each part."""
    counts = Counter(clip.label for clip in clips if clip.label and clip.split != "unlabelled")
    if len(counts) < 2:
        raise UserError(
            f"--data {source}: {len(counts)} class found ({', '.join(counts) or 'none'}); a "
            "classifier needs two or more"
        )
    for label, count in sorted(counts.items()):
        parts = Counter(clip.split for clip in clips if clip.label == label)
        if count < 3 or (not parts[""] and (parts["train"] < 2 or parts["test"] < 1)):
            where = (
                "" if parts[""] else f" ({parts['train']} to train on, {parts['test']} to test on)"
            )
            raise UserError(
                f"--data {source}: class {label!r} has {count} usable "
                f"clip{'s' * (count > 1)}{where}; "
                "each class needs two to train on, for cross-fitting, and one to test on"
            )


def split_by_group(clips: list[Clip], *, test: float = 0.3, seed: int = 0) -> list[Clip]:
    """Puts whole groups into the training or the test part, unless the clips say where they belong.

    Groups are drawn at random until the test part holds about ``test`` of the labelled clips and
    every class has two clips or more to train on and one or more to test on.

    Raises:
        UserError: the given splits put one group on both sides or leave a labelled clip out, or no
            split by group gives every class its clips.
    """
    if any(clip.split for clip in clips):
        if homeless := [c for c in clips if c.label and not c.split]:
            raise UserError(
                f"{homeless[0].path} has a label but no split, as others have: say train or test"
            )
        if lost := [c for c in clips if not c.label and c.split in ("train", "test")]:
            raise UserError(f"{lost[0].path} is to {lost[0].split} but has no label")
        sides = {
            split: {c.group for c in clips if (c.split or "unlabelled") == split}
            for split in SPLITS
        }
        leaks = sorted(sides["test"] & (sides["train"] | sides["unlabelled"]))
        if leaks:
            raise UserError(
                f"group {leaks[0]!r} is on both sides of the given split: its clips would leak "
                "into the test part"
            )
        return [
            c if c.label and c.split != "unlabelled" else replace(c, label="", split="unlabelled")
            for c in clips
        ]
    labelled = [clip for clip in clips if clip.label]
    rng = np.random.default_rng(seed)
    classes = {clip.label for clip in labelled}
    groups = sorted({clip.group for clip in labelled})
    for _ in range(200):
        held, chosen = 0, set()
        for group in rng.permutation(groups):
            if held >= test * len(labelled):
                break
            chosen.add(str(group))
            held += sum(clip.group == group for clip in labelled)
        trained = Counter(c.label for c in labelled if c.group not in chosen)
        tested = {c.label for c in labelled if c.group in chosen}
        if tested == classes and all(trained[label] >= 2 for label in classes):
            break
    else:
        raise UserError(
            "no split by group leaves every class two clips to train on and one to test on: "
            f"give a CSV with a 'split' column ({', '.join(SPLITS)})"
        )
    out = []
    for clip in clips:
        # An unlabelled clip of a test group may still be seen by nobody: its group mates are
        # tested.
        if clip.group in chosen:
            if clip.label:
                out.append(replace(clip, split="test"))
        else:
            out.append(replace(clip, split="train" if clip.label else "unlabelled"))
    return out

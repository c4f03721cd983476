"""Which videos there are: folders and lists as people keep them.

What is plain is read, and the rest is refused by name: a wrong guess would change results without
a word.
"""

from __future__ import annotations

import codecs
import csv
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

from tqdm.auto import tqdm

from gdviz.core.files import UserError, atomic
from gdviz.data.reading import EXTENSIONS

SPLITS = ("train", "unlabelled", "test")
SPLIT_NAMES = {  # of folders and in lists
    "train": "train", "training": "train", "test": "test", "testing": "test",
    "val": "val", "valid": "val", "validation": "val",
    "unlabelled": "unlabelled", "unlabeled": "unlabelled",
    "probe": "probe",  # neither trained nor tested on: features are probed there
}  # fmt: skip
HIDDEN = {"__macosx", "@eadir", "$recycle.bin", "lost+found"}  # and what begins with a dot
CACHE_TAG = "CACHEDIR.TAG"  # marks folders of made files (bford.info/cachedir)
CLASS_FILES = ("classInd.txt", "label_map.txt", "classes.txt")  # names of numbered classes

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
    split: str = ""  # train, unlabelled, test or val; empty: not given
    labels: tuple[str, ...] | None = None  # instead of ``label``: several classes, or none

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the classes that it is known to show."""
        return self.labels or ((self.label,) if self.label else ())


def group_of(path: Path, label: str = "") -> str:
    """Return the recording that a video was cut from, by its name; by default itself.

    A film of HMDB51 has scenes of several classes: with a label, it is the film alone.
    """
    found = (pattern.match(path.stem) for pattern in GROUP_PATTERNS)
    group = next((match.group(1) for match in found if match), str(path))
    return group.removesuffix(f"_{label}") if label else group


def mark_as_cache(folder: Path) -> None:
    """Keep a folder of made files out of the folders of videos that it may lie in."""
    if not (folder / CACHE_TAG).exists():
        with atomic(folder / CACHE_TAG) as temporary:
            temporary.write_text("Signature: 8a477f597d28d172789f06886806bc55\n# made by gdviz\n")


def video_files(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yield the video files below a folder, in order, through links; not what is hidden or made.

    Raise UserError where a folder cannot be listed.
    """
    here = os.path.realpath(folder)
    if here in above:  # a link to a folder that it lies in
        return
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(f"{folder} cannot be listed ({error.strerror})") from None
    for path in (folder / name for name in names if not _is_hidden(name)):
        if path.is_dir():
            if not (path / CACHE_TAG).exists():
                yield from video_files(path, (*above, here))
        elif path.suffix.lower() in EXTENSIONS and (path.is_file() or path.is_symlink()):
            yield path


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in HIDDEN


def _placed(root: Path, path: Path) -> Video:
    """Return what the folders of a video say: CLASS, or CLASS/GROUP, and a split above or below."""
    inner = path.relative_to(root)
    named = [SPLIT_NAMES.get(folder.lower()) for folder in inner.parts[:-1][:2]]
    split = next(filter(None, named), "")
    folders = [f for f, name in zip_longest(inner.parts[:-1], named) if not name]
    label = folders[0] if folders else ""
    group = "/".join(folders[:2]) if len(folders) > 1 else group_of(inner, label)
    if split == "unlabelled":
        label = split = ""
    return Video(path, label, group, split)


def read_folder(root: Path) -> list[Video]:
    """List the videos below a folder: of CLASS or CLASS/GROUP, in ``train`` and ``test`` or not.

    Those in no folder, or in ``unlabelled``, have no label. Raise UserError where there are none.
    """
    videos = [_placed(root, path) for path in video_files(root)]
    if not videos:
        expected = f"one sub-folder a class, holding {' '.join(sorted(EXTENSIONS))} files"
        raise UserError(f"--data {root}: no videos in it; expected {expected}")
    used = {video.path.relative_to(root).parts[0] for video in videos}
    names = sorted(path.name for path in root.iterdir() if path.is_dir())
    if empty := [name for name in names if name not in used and not _is_hidden(name)]:
        tqdm.write(f"{root}: no videos in {', '.join(empty)}")
    return videos


def _text(file: Path) -> str:
    data = file.read_bytes()
    utf16 = data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    text = data.decode("utf-16" if utf16 else "utf-8-sig")
    if "\0" in text:
        raise ValueError("no text")
    return text


def _with_header(lines: list[str]) -> list[dict[str, str]]:
    """Return the rows of a list whose first line names its columns; [] for any other."""
    for delimiter in ",;\t":
        rows = [*csv.reader(lines, delimiter=delimiter, skipinitialspace=True)]
        rows = [[field.strip() for field in row] for row in rows]
        columns = [name.lower() for name in rows.pop(0)]
        if {"path", "label"} <= set(columns):
            if long := next((row for row in rows if len(row) > len(columns)), None):
                raise ValueError(f"{len(long)} fields in {delimiter.join(long)!r}")
            return [dict(zip_longest(columns, row, fillvalue="")) for row in rows]
    return []


def _without_header(lines: list[str]) -> list[dict[str, str]]:
    """Return the rows of a list of a path and a label a line, as peers write them; [] else."""
    rows = []
    for line in lines:
        fields = re.split("[,;\t]", line) if re.search("[,;\t]", line) else line.rsplit(None, 1)
        if len(fields) != 2 or Path(fields[0].strip()).suffix.lower() not in EXTENSIONS:
            if rows:
                raise ValueError(f"no path and label in {line[:80]!r}")
            return []
        rows.append({"path": fields[0].strip(), "label": fields[1].strip()})
    return rows


def _named(rows: list[dict[str, str]], folder: Path) -> list[dict[str, str]]:
    """Replace numbers of classes by names, where a class file lies in ``folder``."""
    file = next(filter(Path.is_file, (folder / name for name in CLASS_FILES)), None)
    labels = {row["label"] for row in rows} - {""}
    if file is None or not all(map(str.isdecimal, labels)):
        return rows
    lines = [line.strip() for line in _text(file).splitlines() if line.strip()]
    if all(re.fullmatch(r"\d+\s+\S.*", line) for line in lines):
        names = {int(number): name for number, name in (line.split(None, 1) for line in lines)}
    else:
        names = dict(enumerate(lines))
    if unknown := {label for label in labels if int(label) not in names}:
        raise ValueError(f"class {min(unknown)} is not in {file.name}")
    return [row | {"label": names[int(row["label"])] if row["label"] else ""} for row in rows]


def _read_rows(file: Path) -> list[dict[str, str]]:
    """Return rows with a path, a label, and what else the list has."""
    try:
        lines = [line for line in _text(file).splitlines() if line.strip()]
        rows = _named(_with_header(lines) or _without_header(lines), file.parent) if lines else []
    except (OSError, ValueError, csv.Error) as error:
        problem = f"cannot be read as a list in UTF-8 or UTF-16 ({error})"
        raise UserError(f"--data {file}: {problem}") from None
    if rows and all(row["path"] for row in rows):
        return rows
    seen = f"begins with {lines[0][:80]!r}" if lines else "is empty"
    seen = "has a line without a path" if rows else seen
    needs = "needs a header line with at least the column 'path' and 'label' (then: group, split)"
    raise UserError(f"--data {file}: {needs}, or lines of a path and a label; it {seen}")


def _read_list(file: Path) -> list[Video]:
    videos = []
    for row in _read_rows(file):
        path, split = file.parent / row["path"], row.get("split", "").lower()
        if os.path.exists(row["path"]) and not os.path.exists(path):
            path = Path(row["path"])  # from the working folder
        if split and split not in SPLIT_NAMES:
            choice = f"none of {', '.join(SPLIT_NAMES)}"
            raise UserError(f"--data {file}: split {split!r} of {row['path']} is {choice}")
        group = row.get("group") or group_of(Path(row["path"]), row["label"])
        videos.append(Video(path, row["label"], group, SPLIT_NAMES.get(split, "")))
    if not any(os.path.exists(video.path) for video in videos):
        where = "beside the list or in the working folder"
        first = ", ".join(str(video.path) for video in videos[:3])
        raise UserError(f"--data {file}: none of its {len(videos)} files is {where}: {first}")
    return videos


def _check_files(videos: list[Video], source: Path) -> None:
    """Raise UserError where a file is listed twice, or has a name that no result can hold."""
    seen: dict[tuple[int, int] | Path, Path] = {}
    for path in (video.path for video in videos):
        if any("\udc80" <= letter <= "\udcff" for letter in str(path)):
            raise UserError(f"--data {source}: {str(path)!a} is a name not in UTF-8: rename it")
        found = os.stat(path) if os.path.exists(path) else None
        other = seen.setdefault((found.st_dev, found.st_ino) if found else path, path)
        if other is not path:
            raise UserError(f"--data {source}: {path} is listed twice, as {other}, too")


def read_list(source: Path | str) -> list[Video]:
    """List the videos of a folder or of a list in a file.

    A validation part is tested on where there is no test part, and left out else. Raise UserError
    where nothing is there, or what is there is not plain.
    """
    source = Path(source)
    if not os.path.exists(source):
        raise UserError(f"--data {source}: no such folder or CSV file")
    videos = read_folder(source) if source.is_dir() else _read_list(source)
    _check_files(videos, source)
    held = sum(video.split == "val" for video in videos)
    tested = any(video.split == "test" for video in videos)
    if held:
        use = "left out" if tested else "tested on"
        tqdm.write(f"{source}: {held} videos of the validation part are {use}")
    if tested:
        return [video for video in videos if video.split != "val"]
    return [replace(video, split="test") if video.split == "val" else video for video in videos]

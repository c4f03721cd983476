"""UCF101, HMDB51 and CCV as their authors lay them out: official lists become lists of videos."""

from __future__ import annotations

import csv
import os
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from gdviz.core.files import UserError, atomic
from gdviz.data.listing import SPLITS, Video, group_of, video_files

Row = tuple[str, str, str, tuple[str, ...] | None]  # name, label, split, labels


class Source(NamedTuple):
    """Where a data set comes from. Nothing is downloaded: that is for who agrees to its terms."""

    lists: str  # a file that tells its lists
    page: str
    terms: str


HMDB51_PAGE = "https://serre-lab.clps.brown.edu/resource/hmdb-a-large-human-motion-database/"
CCV_PAGE = "https://www.ee.columbia.edu/ln/dvmm/CCV/"
SOURCES = {
    "UCF101": Source("trainlist0?.txt", "https://www.crcv.ucf.edu/data/UCF101.php", "none stated"),
    "HMDB51": Source("*_test_split1.txt", HMDB51_PAGE, "CC BY 4.0, says its page"),
    "CCV": Source("trainVidID.txt", CCV_PAGE, "for research, after a form; it has no videos"),
}


@dataclass(frozen=True)
class Official:
    """A data set by its official lists; videos whose file is not there are ``missing``."""

    name: str
    classes: tuple[str, ...]
    videos: list[Video]
    missing: list[Video]


def _lines(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as one of the official lists ({error})") from None
    return [line.strip() for line in lines if line.strip()]


def _ucf101(lists: Path, split: int) -> list[Row]:
    known, rows = {line.split()[-1] for line in _lines(lists / "classInd.txt")}, []
    for part in ("train", "test"):
        file = lists / f"{part}list{split:02d}.txt"
        for name in (line.split()[0] for line in _lines(file)):
            label = name.partition("/")[0]
            if label not in known:
                raise UserError(f"{file}: {name} is of no class of classInd.txt")
            rows.append((name, label, part, None))
    return rows


def _hmdb51(lists: Path, split: int) -> list[Row]:
    """Codes: 1 trains, 2 tests; 0 is in neither part, and shares films with the test part."""
    rows, end, parts = [], f"_test_split{split}.txt", {"0": "", "1": "train", "2": "test"}
    for file in sorted(lists.glob(f"*{end}")):
        label = file.name.removesuffix(end)
        for line in _lines(file):
            name, _, code = line.rpartition(" ")
            if code not in parts:
                raise UserError(f"{file}: the code of {line!r} is none of {', '.join(parts)}")
            if parts[code]:
                rows.append((f"{label}/{name.strip()}", label, parts[code], None))
    if not rows:
        raise UserError(f"{lists}: no lists of HMDB51's split {split}")
    return rows


def _ccv(lists: Path, split: int) -> list[Row]:
    """Without a label, videos to train on are unlabelled, and ones to test on of no class."""
    if split != 1:
        raise UserError(f"--split {split}: CCV has one split only")
    names, rows = _lines(lists / "categoryName.txt"), []
    for part in ("train", "test"):
        videos, file = _lines(lists / f"{part}VidID.txt"), lists / f"{part}Label.txt"
        bits = ["".join(line.split()) for line in _lines(file)]
        wrong = any(len(b) != len(names) or set(b) - set("01") for b in bits)
        if wrong or len(bits) != len(videos):
            raise UserError(f"{file}: needs {len(videos)} lines of {len(names)} zeros and ones")
        for video, row in zip(videos, bits, strict=True):
            labels = tuple(name for name, bit in zip(names, row, strict=True) if bit == "1")
            rows.append((video, "", part if labels or part == "test" else "unlabelled", labels))
    return rows


READERS = {"UCF101": _ucf101, "HMDB51": _hmdb51, "CCV": _ccv}


def find_lists(root: Path) -> tuple[str, Path] | None:
    """Return whose official lists lie in ``root`` or in a folder of it, and where."""
    for name, source in SOURCES.items():
        for pattern in (source.lists, f"*/{source.lists}"):
            if file := next(root.glob(pattern), None):
                return name, file.parent
    return None


def read_official(
    root: Path | str, *, lists: Path | str | None = None, split: int = 1
) -> Official | None:
    """List the videos of an official layout, in its order; None where there are no such lists.

    Videos lie in any sub-folders of ``root``, and the lists there, too, or in ``lists``. Splits
    are 1 to 3; CCV has one. Raise UserError where there is no such split, or where a list is not
    what its authors wrote.
    """
    root = Path(root)
    if (found := find_lists(Path(lists or root))) is None:
        return None
    if split not in (1, 2, 3):
        raise UserError(f"--split {split}: choose 1, 2 or 3")
    name, folder = found
    exact, stems = {}, defaultdict(list)
    for path in video_files(root):
        exact[f"{path.parent.name}/{path.name}"] = path
        stems[path.stem].append(path)
    videos, missing = [], []
    for key, label, part, labels in READERS[name](folder, split):
        # Whatever the folder, and the container that it was turned into.
        files = [exact[key]] if key in exact else stems[PurePosixPath(key).stem]
        if len(files) > 1:
            raise UserError(f"{key} may be {files[0]} or {files[1]}: keep one of them")
        path = files[0] if files else root / key
        group = path.name if labels is not None else group_of(path.relative_to(root))
        videos.append(Video(path, label, group, part, labels))
        if not files:
            missing.append(videos[-1])
    classes = {label for video in videos for label in (video.labels or (video.label,))}
    return Official(name, tuple(sorted(classes - {""})), videos, missing)


def save_list(videos: list[Video], file: Path) -> None:
    """Write a CSV for ``gdviz run --data``; raise UserError where videos have several classes."""
    if any(video.labels is not None for video in videos):
        raise UserError(f"--csv {file}: a list has one class a video; give the folder to gdviz run")
    rows = ((os.path.realpath(v.path), v.label, v.group, v.split) for v in videos)
    with atomic(file) as temporary, open(temporary, "w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows([("path", "label", "group", "split"), *rows])


def describe(official: Official) -> str:
    """Return what is there and what is missing, part by part, and where to get it."""
    source, gone, total = SOURCES[official.name], set(official.missing), len(official.videos)
    there = f"{total - len(official.missing)} of {total} videos"
    lines = [f"{official.name}: {there}, {len(official.classes)} classes"]
    for part in SPLITS:
        wanted = [video for video in official.videos if video.split == part]
        absent = [video.path.name for video in wanted if video in gone]
        first = f"; missing {absent[0]}, ..." if absent else ""
        if wanted:
            lines.append(f"  {part}: {len(wanted) - len(absent)} of {len(wanted)}{first}")
    several = Counter(len(v.labels) for v in official.videos if v.labels is not None)
    if several:
        counts = ", ".join(f"{count} with {n}" for n, count in sorted(several.items()))
        lines.append(f"  videos by number of labels: {counts}")
    if gone:
        lines.append(f"  get what is missing from {source.page} (terms: {source.terms})")
    return "\n".join(lines)

"""UCF101, HMDB51 and CCV as their authors lay them out: official lists become the clips that a
folder or a CSV gives."""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gdviz.core.files import UserError, atomic
from gdviz.data.listing import SPLITS, Clip, group_of
from gdviz.data.reading import EXTENSIONS


@dataclass(frozen=True)
class Source:
    """Where a data set comes from. Nothing is downloaded: that is for who agrees to its terms."""

    page: str
    terms: str
    lists: str  # a file that tells the data set's lists


SOURCES = {
    "UCF101": Source(
        "https://www.crcv.ucf.edu/data/UCF101.php",
        "no licence stated; cut from YouTube videos, whose rights stay with their owners; cite "
        "Soomro, Zamir and Shah 2012",
        "classInd.txt",
    ),
    "HMDB51": Source(
        "https://serre-lab.clps.brown.edu/resource/hmdb-a-large-human-motion-database/",
        "Creative Commons Attribution 4.0, says its page, of a collection cut from films and web "
        "videos; cite Kuehne et al. 2011",
        "*_test_split1.txt",
    ),
    "CCV": Source(
        "https://www.ee.columbia.edu/ln/dvmm/CCV/",
        "for research; the page gives YouTube identifiers, labels and features after a form, and "
        "no videos; cite Jiang et al. 2011",
        "trainVidID.txt",
    ),
}


@dataclass(frozen=True)
class Official:
    """A data set by its official lists; clips whose file is not there are ``missing``."""

    name: str
    classes: tuple[str, ...]
    clips: list[Clip]
    missing: list[Clip]


def _lines(file: Path) -> list[str]:
    try:
        return [
            line.strip()
            for line in file.read_text(encoding="utf-8-sig").splitlines()
            if line.strip()
        ]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as one of the official lists ({error})") from None


def _ucf101(lists: Path, split: int) -> list[tuple[str, str, str, None]]:
    known, rows = {line.split()[1] for line in _lines(lists / "classInd.txt")}, []
    for part in ("train", "test"):
        for line in _lines(lists / f"{part}list{split:02d}.txt"):
            name = line.split()[0]
            label = name.partition("/")[0]
            if label not in known:
                raise UserError(
                    f"{lists / f'{part}list{split:02d}.txt'}: {name} is of no class of classInd.txt"
                )
            rows.append((name, label, part, None))
    return rows


def _hmdb51(lists: Path, split: int) -> list[tuple[str, str, str, None]]:
    """Codes: 1 to train on, 2 to test on; 0 is in neither part, and shares films with the test
    part: left out."""
    rows, end = [], f"_test_split{split}.txt"
    for file in sorted(lists.glob(f"*{end}")):
        label = file.name.removesuffix(end)
        for line in _lines(file):
            name, _, code = line.rpartition(" ")
            if code not in ("0", "1", "2"):
                raise UserError(f"{file}: the code of {line!r} is none of 0, 1, 2")
            if code != "0":
                rows.append(
                    (f"{label}/{name.strip()}", label, "train" if code == "1" else "test", None)
                )
    if not rows:
        raise UserError(f"{lists}: no lists of HMDB51's split {split}")
    return rows


def _ccv(lists: Path, split: int) -> list[tuple[str, str, str, tuple[str, ...]]]:
    """Videos without a label are unlabelled in training, and negatives of every class in
    testing."""
    names, rows = _lines(lists / "categoryName.txt"), []
    if split != 1:
        raise UserError(f"--split {split}: CCV has one split only")
    for part in ("train", "test"):
        videos, labels = (
            _lines(lists / f"{part}VidID.txt"),
            [line.split() for line in _lines(lists / f"{part}Label.txt")],
        )
        if len(videos) != len(labels) or any(
            len(row) != len(names) or set(row) - {"0", "1"} for row in labels
        ):
            raise UserError(
                f"{lists / f'{part}Label.txt'}: needs {len(videos)} lines of {len(names)} zeros "
                "and ones"
            )
        for video, row in zip(videos, labels, strict=True):
            several = tuple(name for name, bit in zip(names, row, strict=True) if bit == "1")
            rows.append((video, "", part if several or part == "test" else "unlabelled", several))
    return rows


READERS = {"UCF101": _ucf101, "HMDB51": _hmdb51, "CCV": _ccv}


def find_lists(root: Path) -> tuple[str, Path] | None:
    """Which data set's official lists lie in ``root`` or in a folder of it, and where."""
    for name, source in SOURCES.items():
        for pattern in (source.lists, f"*/{source.lists}"):
            if file := next(root.glob(pattern), None):
                return name, file.parent
    return None


def read_official(
    root: Path | str, *, lists: Path | str | None = None, split: int = 1
) -> Official | None:
    """Clips of an official layout, in the order of its lists; None where there are no such lists.

    Args:
        root: holds the videos, in any sub-folders.
        lists: folder of the official lists, if it is not in ``root``.
        split: 1 to 3; CCV has one.

    Raises:
        UserError: there is no such split, or a list is not what its authors wrote.
    """
    root = Path(root)
    if (found := find_lists(Path(lists or root))) is None:
        return None
    if split not in (1, 2, 3):
        raise UserError(f"--split {split}: choose 1, 2 or 3")
    name, folder = found
    files = {}
    for path in root.rglob("*"):
        if path.suffix.lower() in EXTENSIONS:
            files[path.stem if name == "CCV" else f"{path.parent.name}/{path.name}"] = path
    clips = []
    for key, label, part, labels in READERS[name](folder, split):
        path = files.get(key, root / key)
        clips.append(
            Clip(path, label, path.name if name == "CCV" else group_of(path), part, labels)
        )
    there = set(files.values())
    classes = sorted({label for c in clips for label in (c.labels or (c.label,)) if label})
    return Official(name, tuple(classes), clips, [c for c in clips if c.path not in there])


def multi_hot(clips: list[Clip], classes: tuple[str, ...]) -> Tensor:
    """Labels as zeros and ones, [clips, classes]."""
    return torch.tensor(
        [[name in (clip.labels or (clip.label,)) for name in classes] for clip in clips],
        dtype=torch.long,
    )


def save_list(clips: list[Clip], file: Path) -> None:
    """A CSV for ``gdviz run --data``, of clips of one class each."""
    with atomic(file) as temporary, open(temporary, "w", newline="") as handle:
        rows = ((c.path.resolve(), c.label, c.group, c.split) for c in clips)
        csv.writer(handle).writerows([("path", "label", "group", "split"), *rows])


def describe(official: Official) -> str:
    """What is there and what is missing, part by part, and where to get it."""
    source, gone = SOURCES[official.name], set(official.missing)
    lines = [
        f"{official.name}: {len(official.clips) - len(gone)} of {len(official.clips)} videos, "
        f"{len(official.classes)} classes"
    ]
    for part in SPLITS:
        if wanted := [c for c in official.clips if c.split == part]:
            absent = [c.path.name for c in wanted if c in gone]
            lines.append(
                f"  {part}: {len(wanted) - len(absent)} of {len(wanted)}"
                + (f"; missing {absent[0]}, ..." if absent else "")
            )
    if several := Counter(len(c.labels) for c in official.clips if c.labels is not None):
        lines.append(
            "  videos by number of labels: "
            + ", ".join(f"{count} with {n}" for n, count in sorted(several.items()))
        )
    return "\n".join(
        [
            *lines,
            *(
                [f"  get what is missing from {source.page}", f"  terms: {source.terms}"]
                if gone
                else []
            ),
        ]
    )

"""What `verify` found, kept: a file is decoded whole once, not once a run.

SQLite rather than Parquet: it comes with Python, a killed pass goes on where it stood, and an
index of a million files is looked into, not loaded.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gdviz.core.files import UserError
from gdviz.core.processes import Lost, over_processes
from gdviz.data.reading import VERSION, DamagedVideo, VideoInfo, verify

Verdict = VideoInfo | str  # what was found, or why the file is refused

TABLE = """CREATE TABLE IF NOT EXISTS verdicts
    (path, size, mtime_ns, version, verdict, PRIMARY KEY (path)) WITHOUT ROWID"""
INSERT = "INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?, ?, ?)"
SELECT = """SELECT verdict FROM verdicts
    WHERE path = ? AND size = ? AND mtime_ns = ? AND version = ?"""


def stat(path: Path) -> tuple[int, int]:
    """Return size and time of change; -1 for a file that is gone."""
    try:
        found = path.stat()
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


def patience(jobs: Iterable[Sequence[Path]], rate: float = 1e6) -> float:
    """Return seconds after which a reader hangs: no decoder is slower than a megabyte a second."""
    return 60 + max((sum(max(0, stat(path)[0]) for path in job) for job in jobs), default=0) / rate


def from_json(text: str) -> Any:
    """Return a verdict that ``json.dumps(verdict, default=asdict)`` wrote."""
    known = json.loads(text)
    if isinstance(known, str):
        return known
    return VideoInfo(**known | {"keys": tuple(map(tuple, known["keys"]))})


def _known_by(path: Path, stats: tuple[int, int]) -> tuple[Any, ...]:
    name = os.fsencode(os.path.abspath(path)).decode("utf-8", "backslashreplace")
    return name, *stats, VERSION


def look_up(db: sqlite3.Connection, path: Path, stats: tuple[int, int]) -> Verdict | None:
    """Return what is known of a file; None when it is new or has changed."""
    if stats[0] < 0:
        return "is not there"
    row = db.execute(SELECT, _known_by(path, stats)).fetchone()
    return from_json(row[0]) if row else None


def _verdict(path: Path) -> Verdict:
    try:
        return verify(path)
    except DamagedVideo as error:
        return str(error)
    except MemoryError:
        return "too little memory"


def verified(paths: Sequence[Path], index: Path, *, workers: Any = 1) -> list[Verdict]:
    """Return what `verify` says of each file, or why it is refused.

    ``index`` is an SQLite file, made if need be; files that it knows unchanged are not decoded
    again. With two ``workers`` or more (processes, or a cluster) a file whose reader dies or hangs
    is refused for that reason, this time: the index does not keep it. Raise UserError where the
    index is damaged or cannot be written.
    """
    found: dict[int, Verdict] = {}
    try:
        with suppress(OSError):  # SQLite then says that it cannot open the file
            index.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(index, timeout=60, isolation_level=None)) as db:
            db.execute("PRAGMA synchronous = OFF")  # a power cut may cost the index, a kill not
            db.execute(TABLE)
            stats = [stat(path) for path in paths]
            for i, path in enumerate(paths):
                if (verdict := look_up(db, path, stats[i])) is not None:
                    found[i] = verdict
            left = [i for i in range(len(paths)) if i not in found]

            def keep(number: int, verdict: Verdict) -> None:
                i = left[number]
                text = json.dumps(verdict, default=asdict)
                db.execute(INSERT, (*_known_by(paths[i], stats[i]), text))

            jobs = [(paths[i],) for i in left]
            about = {"title": "verifying videos", "unit": "video", "timeout": patience(jobs)}
            results = over_processes(_verdict, jobs, workers, each=keep, **about) if jobs else []
            for i, result in zip(left, results, strict=True):
                found[i] = result.reason if isinstance(result, Lost) else result
    except sqlite3.DatabaseError as error:
        advice = "delete it to have it made again, or free some space"
        raise UserError(f"cannot use {index}: {error}; {advice}") from None
    return [found[i] for i in range(len(paths))]

"""What the verifying pass found, kept: a file is decoded whole once, not once a run.

SQLite rather than Parquet: it comes with Python, a killed pass goes on where it stood, and an
index of a million files is looked into, not loaded.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gdviz.core.files import UserError
from gdviz.core.processes import over_processes
from gdviz.data.reading import VERSION, DamagedVideo, VideoInfo, verify

TABLE = """CREATE TABLE IF NOT EXISTS verdicts
    (path, size, mtime_ns, version, verdict, PRIMARY KEY (path)) WITHOUT ROWID"""
INSERT = "INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?, ?, ?)"
SELECT = """SELECT verdict FROM verdicts
    WHERE path = ? AND size = ? AND mtime_ns = ? AND version = ?"""
AT_ONCE = 64  # verdicts written in one transaction


def stat(path: Path) -> tuple[int, int]:
    """Return size and time of change; -1 for a file that is gone."""
    try:
        found = path.stat()
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


def patience(paths: Sequence[Path]) -> float:
    """Return seconds after which a reader hangs: no decoder is slower than a megabyte a second."""
    return 60 + max((stat(path)[0] for path in paths), default=0) / 1e6


def row_of(path: Path, stats: tuple[int, int], verdict: VideoInfo | str) -> tuple[Any, ...]:
    """Return a row of the index: the verdict is a reason, or numbers, in JSON."""
    key = os.fsencode(os.path.abspath(path)).decode("utf-8", "backslashreplace")
    known = verdict if isinstance(verdict, str) else asdict(verdict)
    return key, *stats, VERSION, json.dumps(known)


def look_up(db: sqlite3.Connection, path: Path, stats: tuple[int, int]) -> VideoInfo | str | None:
    """Return what is known of a file; None when it is new or has changed."""
    if stats[0] < 0:
        return "is not there"
    row = db.execute(SELECT, row_of(path, stats, "")[:4]).fetchone()
    known = json.loads(row[0]) if row else None
    if isinstance(known, dict):
        return VideoInfo(**known | {"keys": tuple(map(tuple, known["keys"]))})
    return known


def _verdict(path: str) -> VideoInfo | str:
    try:
        return verify(path)
    except DamagedVideo as error:
        return str(error)
    except MemoryError:
        return "too little memory"


def verified(paths: Sequence[Path], index: Path, *, workers: Any = 1) -> list[VideoInfo | str]:
    """Return what `verify` says of each file, or why it is refused.

    Files that the index knows unchanged are not decoded again.

    Args:
        paths: video files.
        index: SQLite file, made if need be.
        workers: decoding processes, or a cluster. With two or more, a file whose reader dies or
            hangs is refused for that reason, this time: the index does not keep it. One is this
            process, which would die or hang.

    Raises:
        UserError: the index is damaged or cannot be written.
    """
    stats, fresh = [stat(path) for path in paths], []
    try:
        index.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(index, timeout=60)) as db:
            db.execute(TABLE)
            found = [look_up(db, path, s) for path, s in zip(paths, stats, strict=True)]
            left = [i for i, known in enumerate(found) if known is None]

            def flush() -> None:
                with db:
                    db.executemany(INSERT, fresh)
                fresh.clear()

            def keep(number: int, verdict: VideoInfo | str) -> None:
                i = left[number]
                fresh.append(row_of(paths[i], stats[i], verdict))
                if len(fresh) >= AT_ONCE:
                    flush()

            try:
                results = _verify([paths[i] for i in left], workers, keep)
            finally:
                flush()
            for i, result in zip(left, results, strict=True):
                found[i] = result if isinstance(result, VideoInfo | str) else result.reason
    except sqlite3.DatabaseError as error:
        raise UserError(
            f"cannot use {index}: {error}; delete it to have it made again, or free some space"
        ) from None
    return found


def _verify(paths: list[Path], workers: Any, keep: Any) -> list[Any]:
    if not paths:
        return []
    jobs, timeout, title = [(str(path),) for path in paths], patience(paths), "verifying videos"
    return over_processes(
        _verdict, jobs, workers, title=title, unit="video", timeout=timeout, each=keep
    )

"""What the verifying pass found, kept: a file is decoded whole once, not once a run.

SQLite rather than Parquet: it comes with Python, a killed pass goes on where it stood, and an index of
a million files is looked into, not loaded.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from gdviz.core.files import UserError
from gdviz.core.processes import over_processes
from gdviz.data.reading import VERSION, DamagedVideo, VideoInfo, verify

COLUMNS = (
    "path",
    "size",
    "mtime_ns",
    "version",
    "reason",
    "frames",
    "width",
    "height",
    "fps",
    "turns",
    "by_decord",
    "keys",
)
TABLE = (
    f"CREATE TABLE IF NOT EXISTS videos ({', '.join(COLUMNS)}, PRIMARY KEY (path)) WITHOUT ROWID"
)
INSERT = f"INSERT OR REPLACE INTO videos VALUES ({', '.join('?' * len(COLUMNS))})"
SELECT = f"SELECT {', '.join(COLUMNS[4:])} FROM videos WHERE path = ? AND size = ? AND mtime_ns = ? AND version = {VERSION}"


def stat(path: Path) -> tuple[int, int]:
    """Size and time of change; -1 for a file that is gone."""
    try:
        found = path.stat()
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


def patience(paths: Sequence[Path]) -> float:
    """Seconds after which a reader hangs: no decoder is slower than a megabyte a second."""
    return 60 + max((stat(path)[0] for path in paths), default=0) / 1e6


def _key(path: Path) -> str:
    return os.fsencode(os.path.abspath(path)).decode("utf-8", "backslashreplace")


def _verdict(path: str) -> VideoInfo | str:
    try:
        return verify(path)
    except DamagedVideo as error:
        return str(error)
    except MemoryError:
        return "too little memory"


def look_up(db: sqlite3.Connection, path: Path, size: int, mtime_ns: int) -> VideoInfo | str | None:
    """What is known of a file; None when it is new or has changed."""
    row = db.execute(SELECT, (_key(path), size, mtime_ns)).fetchone()
    if row is None or row[0]:
        return row and row[0]
    _, frames, width, height, fps, turns, by_decord, keys = row
    return VideoInfo(
        frames, width, height, fps, size, turns, by_decord, tuple(map(tuple, json.loads(keys)))
    )


def verified(
    paths: Sequence[Path], index: Path, *, workers: int | str = 1
) -> list[VideoInfo | str]:
    """What `verify` says of each file, or why it is refused; files that the index knows unchanged are not decoded again.

    Args:
        paths: video files.
        index: SQLite file, made if need be.
        workers: decoding processes. With two or more, a file whose reader dies or hangs is refused for that
            reason, this time: the index does not keep it. One is this process, which would die or hang.

    Raises:
        UserError: the index is damaged or cannot be written.
    """
    stats, fresh = [stat(path) for path in paths], []
    try:
        index.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(index, timeout=60)) as db:
            db.execute(TABLE)
            found = [
                look_up(db, path, *s) if s[0] >= 0 else "is not there"
                for path, s in zip(paths, stats, strict=True)
            ]
            left = [i for i, known in enumerate(found) if known is None]

            def flush() -> None:
                with db:
                    db.executemany(INSERT, fresh)
                fresh.clear()

            def keep(number: int, verdict: VideoInfo | str) -> None:
                i = left[number]
                bad = isinstance(verdict, str)
                rest = (
                    (verdict, *[None] * 7)
                    if bad
                    else (
                        "",
                        *(getattr(verdict, n) for n in COLUMNS[5:-1]),
                        json.dumps(verdict.keys),
                    )
                )
                fresh.append((_key(paths[i]), *stats[i], VERSION, *rest))
                if len(fresh) >= 64:
                    flush()

            try:
                if left:
                    timeout = patience([paths[i] for i in left])
                    jobs = [(str(paths[i]),) for i in left]
                    results = over_processes(
                        _verdict,
                        jobs,
                        workers,
                        title="verifying videos",
                        unit="video",
                        timeout=timeout,
                        each=keep,
                    )
                    for i, result in zip(left, results, strict=True):
                        found[i] = result if isinstance(result, VideoInfo | str) else result.reason
            finally:
                flush()
    except sqlite3.DatabaseError as error:
        raise UserError(
            f"cannot use {index}: {error}; delete it to have it made again, or free some space"
        ) from None
    return found

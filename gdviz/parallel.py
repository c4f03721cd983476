"""Jobs over processes of one thread each, with progress: the one way this package uses several cores."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from threading import Thread
from typing import Any

import torch
from tqdm.auto import tqdm

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


def _die_with_parent() -> None:
    wait([parent_process().sentinel])
    os._exit(1)


def _start() -> None:
    # A killed parent cannot cancel what it has queued; its children would work on, beside its successor's.
    Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    # Transport potentials of unlikely classes are denormal numbers, a hundred times slower than others.
    torch.set_flush_denormal(True)


def over_processes(work: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], workers: int, *, title: str, unit: str = "job") -> list[Any]:
    """``[work(*job) for job in jobs]``, over spawned processes when ``workers`` > 1.

    Small networks and small matrices gain nothing from a second thread and lose ten times to threads
    that wait for each other, so each process gets one. The first error cancels what has not begun.
    """
    if workers == 1:
        return [work(*job) for job in tqdm(jobs, desc=title, unit=unit)]
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))  # read by libraries when a child imports them
    try:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start) as pool:
            pending = [pool.submit(work, *job) for job in jobs]
            try:
                for done in tqdm(as_completed(pending), total=len(pending), desc=title, unit=unit):
                    done.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            return [done.result() for done in pending]
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

"""Jobs over processes of one thread each, with progress: the one way this package uses several cores, or machines."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from math import inf
from multiprocessing import get_all_start_methods, get_context, parent_process
from multiprocessing.connection import Connection, wait
from threading import Thread, current_thread, main_thread
from time import monotonic
from typing import Any

import torch
from tqdm.auto import tqdm

from gdviz.core.files import UserError

PATIENCE_S = 20.0
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


@dataclass(frozen=True)
class Lost:
    """Stands where the result of a job would: its worker died or was stopped."""

    reason: str
    died: bool = False


class WorkerDied(Exception):
    """A worker process was killed; the message says what to do."""


class Stopped(KeyboardInterrupt):
    """The user (Ctrl-C) or the cluster (SIGTERM) wants an end; what was done is saved."""

    def __init__(self, signum: int, *_: Any) -> None:
        self.signum = signum


@contextmanager
def stops_noted() -> Iterator[Callable[[], int]]:
    """Within, SIGTERM and Ctrl-C are noted only, for the caller to ask for and to stop where it can go on; a second one acts at once."""
    noted, before = 0, {}

    def note(signum: int, *_: Any) -> None:
        nonlocal noted
        noted = signum
        signal.signal(signum, before.pop(signum))

    if current_thread() is main_thread():
        before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
        before = {
            s: handler for s, handler in before.items() if handler not in (signal.SIG_IGN, None)
        }
        for signum in before:
            signal.signal(signum, note)
    try:
        yield lambda: noted
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    if noted:  # after the last time that it was asked for
        signal.raise_signal(noted)


def _die_with_parent() -> None:
    wait([parent_process().sentinel])
    os._exit(1)


def _serve(pipe: Connection, work: Callable[..., Any]) -> None:
    """Answers jobs with (error, result) until the other end closes; the first answer says that it is ready."""
    # A killed parent cannot stop its children; they would work on, beside its successor's.
    Thread(target=_die_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's concern, which stops its children
    torch.set_num_threads(1)
    # Transport potentials of unlikely classes are denormal numbers, a hundred times slower than others.
    torch.set_flush_denormal(True)
    answer = None, None
    with suppress(EOFError, ConnectionError, Stopped):
        while True:
            pipe.send(answer)
            job = pipe.recv()
            try:
                answer = None, work(*job)
            except Exception as error:
                error.add_note(traceback.format_exc())  # tracebacks themselves cannot be sent
                answer = error, None


def _context() -> Any:
    """A server that has imported what this process uses forks workers in milliseconds: one that was killed is soon replaced."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", *(name for name in sys.modules if name.startswith("gdviz."))]
    )
    return context


# Not pebble's ProcessPool: what it knows of a job that was begun comes through a queue that its workers share. Of 150 jobs that
# killed their worker at once, 9 were never reported (so that a training would wait for ever), and 3 of 100 took the pool with them.
class _Worker:
    """A process with a pipe of its own and one job at most: nothing is shared, so its death blocks nobody."""

    def __init__(self, work: Callable[..., Any]) -> None:
        context = _context()
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, work))
        self.process.start()
        theirs.close()
        self.number, self.deadline = -1, inf  # no job: not ready yet

    def give(self, number: int, job: tuple[Any, ...], timeout: float | None) -> None:
        self.number, self.deadline = number, monotonic() + (timeout or inf)
        with suppress(ConnectionError):  # it has died, as its pipe will tell
            self.pipe.send(job)

    def end(self, patience: float = 0) -> int:
        """The exit code; killed if it does not end by itself in time."""
        self.pipe.close()
        self.process.join(patience)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        return self.process.exitcode


def _results(
    work: Callable[..., Any],
    jobs: Sequence[tuple[Any, ...]],
    numbers: Sequence[int],
    workers: int,
    timeout: float | None,
) -> Iterator[tuple[int, Any]]:
    """Numbers and results as jobs end. After an error no job is begun; it is raised when those that run have ended."""
    left, crew, failed = deque(numbers), [], None
    try:
        while left or crew:
            starting = sum(worker.number < 0 for worker in crew)
            crew += [_Worker(work) for _ in range(min(workers - len(crew), len(left) - starting))]
            soonest = min(worker.deadline for worker in crew) - monotonic()
            ready = wait(
                [worker.pipe for worker in crew], None if soonest == inf else max(0, soonest)
            )
            for worker in crew.copy():
                number, lost, result = worker.number, None, None
                if worker.pipe in ready:
                    try:
                        error, result = worker.pipe.recv()
                    except (EOFError, OSError):
                        code = worker.end(10)
                        lost = Lost(
                            f"its process was killed (exit code {code}): too little memory, or it breaks the decoder",
                            died=True,
                        )
                        if timeout is None or number < 0:
                            raise WorkerDied(
                                "a worker process was killed (too little memory?); the same command goes on from here, try fewer --workers"
                            ) from None
                    else:
                        if failed := failed or error:
                            left.clear()
                elif monotonic() > worker.deadline:
                    worker.end()
                    lost = Lost(f"took longer than {timeout:.0f} s")
                else:
                    continue
                if lost:
                    crew.remove(worker)
                elif left:
                    next_one = left.popleft()
                    worker.give(next_one, jobs[next_one], timeout)
                else:
                    crew.remove(worker)
                    worker.end(10)
                if number >= 0 and not failed:
                    yield number, lost or result
        if failed:
            raise failed
    except KeyboardInterrupt:
        for worker in crew:
            worker.process.terminate()
        for worker in crew:
            worker.end(PATIENCE_S)  # a training saves first
        raise
    finally:
        for worker in crew:
            worker.end()


def over_processes(
    work: Callable[..., Any],
    jobs: Sequence[tuple[Any, ...]],
    workers: int | str,
    *,
    title: str | None,
    unit: str = "job",
    timeout: float | None = None,
    each: Callable[[int, Any], None] = lambda number, result: None,
) -> list[Any]:
    """``[work(*job) for job in jobs]``, over processes when ``workers`` > 1, over machines when it is an address.

    Small networks and small matrices gain nothing from a second thread and lose ten times to threads
    that wait for each other, so each process gets one. The first error cancels what has not begun.

    Args:
        work: picklable.
        jobs: arguments of each call.
        workers: processes; or the address of a Dask scheduler, ``tcp://HOST:8786``, whose machines have this
            package and see the same files. Dask rather than Ray: pure Python, and a tenth of its size.
        title: of the progress bar; None hides it.
        unit: of the progress bar.
        timeout: seconds that a job may take. With it, and ``workers`` > 1, a worker that dies or takes
            longer costs its own job only: `Lost` stands for the result. One that died is tried once
            more, alone, so that no job is blamed for the memory that another one took.
        each: told the number and the result of each job as it ends, but not of a lost one.

    Raises:
        WorkerDied: without ``timeout``, a worker was killed.
    """
    if isinstance(workers, str):
        return _over_machines(work, jobs, workers, title, unit, timeout, each)
    if workers == 1:
        results = []
        for number, job in enumerate(tqdm(jobs, desc=title, unit=unit, disable=title is None)):
            results.append(work(*job))
            each(number, results[-1])
        return results
    return _in_children(work, jobs, workers, title, unit, timeout, each)


def _in_children(
    work: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], workers: int, title: str | None, unit: str, timeout: float | None,
    each: Callable[[int, Any], None] = lambda number, result: None,
) -> list[Any]:  # fmt: skip
    results: dict[int, Any] = {}
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))  # read by libraries when a child imports them

    def collect(numbers: Sequence[int], workers: int, title: str) -> None:
        with closing(_results(work, jobs, numbers, workers, timeout)) as ended:
            for number, result in tqdm(ended, total=len(numbers), desc=title, unit=unit):
                results[number] = result
                if not isinstance(result, Lost):
                    each(number, result)

    try:
        collect(range(len(jobs)), workers, title)
        if died := sorted(
            i for i, result in results.items() if isinstance(result, Lost) and result.died
        ):
            collect(died, 1, f"{title}, again")
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
    return [results[i] for i in range(len(jobs))]


def _over_machines(
    work: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], address: str, title: str, unit: str, timeout: float | None,
    each: Callable[[int, Any], None],
) -> list[Any]:  # fmt: skip
    """Dask hands out chunks; each of its threads does them in a child of its own, so that death and time-outs are what they are here.

    Its workers need ``dask worker ADDRESS --no-nanny --nthreads CORES``: children of a nanny may have no children.
    """
    try:
        from dask.distributed import Client, KilledWorker, as_completed
    except ImportError:
        raise UserError(f"--cluster {address}: needs Dask; pip install 'gdviz[cluster]'") from None
    results: dict[int, Any] = {}
    try:
        client = Client(address, timeout=30)
    except (OSError, ValueError) as error:
        raise UserError(f"--cluster {address}: no scheduler answers ({error})") from None
    with client, tqdm(total=len(jobs), desc=title, unit=unit) as bar:
        size = 1 + len(jobs) // (8 * max(1, sum(client.nthreads().values())))
        chunks = [range(start, min(start + size, len(jobs))) for start in range(0, len(jobs), size)]
        done = {
            client.submit(
                _in_children, work, [jobs[i] for i in c], 1, title, unit, timeout, pure=False
            ): c
            for c in chunks
        }
        try:
            for future in as_completed(done):
                for number, result in zip(done[future], future.result(), strict=True):
                    results[number] = result
                    bar.update()
                    if not isinstance(result, Lost):
                        each(number, result)
        except KilledWorker as error:
            raise WorkerDied(f"Dask gave up: {error}") from None
        finally:
            client.cancel(list(done))
    return [results[i] for i in range(len(jobs))]

"""Jobs over processes of one thread each, with a progress bar: the one way to use several cores."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_all_start_methods, get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.pool import ThreadPool
from threading import Lock, Thread, current_thread, main_thread
from time import monotonic
from typing import Any

import torch
from tqdm.auto import tqdm

PATIENCE_S = 20.0  # for children that were asked to end: a training saves first
_STARTING = Lock()  # multiprocessing keeps one list of children for all threads

Work = Callable[..., Any]
Job = tuple[Any, ...]


@dataclass(frozen=True)
class Lost:
    """Stands where the result of a job would, whose process died or was stopped."""

    reason: str
    died: bool = False


class WorkerDied(Exception):
    """A worker process was killed; the message says what to do."""


class Stopped(KeyboardInterrupt):
    """The user (Ctrl-C) or the cluster (SIGTERM) wants an end; what was done is saved."""

    def __init__(self, signum: int) -> None:
        self.signum = signum


@contextmanager
def stops_noted() -> Iterator[Callable[[], int]]:
    """Note SIGTERM and Ctrl-C instead of obeying; yield a function that returns the signal, or 0.

    The caller asks it wherever it could stop and go on later. A second signal acts at once.
    """
    noted = 0

    def note(signum: int, *_: Any) -> None:
        nonlocal noted
        noted = signum
        signal.signal(signum, before[signum])

    signals = (signal.SIGTERM, signal.SIGINT) if current_thread() is main_thread() else ()
    before = {signum: signal.getsignal(signum) for signum in signals}
    before = {s: handler for s, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for signum in before:
        signal.signal(signum, note)
    try:
        yield lambda: noted
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    if noted:  # after the caller asked for the last time
        signal.raise_signal(noted)


def _die_with_parent() -> None:
    wait([parent_process().sentinel])
    os._exit(1)


def _serve(pipe: Connection, work: Work) -> None:
    """Answer jobs with (error, result) until the other end closes; the first answer is "ready"."""
    # A killed parent cannot stop its children; they would work on, beside its successor's.
    Thread(target=_die_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent obeys it, and stops its children
    torch.set_num_threads(1)
    # Transport potentials of unlikely classes are denormal numbers, a hundred times slower.
    torch.set_flush_denormal(True)
    answer = None, "ready"
    with suppress(EOFError, ConnectionError, Stopped):
        while True:
            pipe.send(answer)
            job = pipe.recv()
            try:
                answer = None, work(*job)
            except Exception as error:
                error.add_note(traceback.format_exc())  # a traceback itself cannot be sent
                answer = error, None


class _Child:
    """A process that does one job at a time; it shares nothing, so its death blocks nobody."""

    def __init__(self, work: Work) -> None:
        context = get_context("spawn")
        if "forkserver" in get_all_start_methods():
            context = get_context("forkserver")  # has imported what we use: forks in milliseconds
            ours = [name for name in sys.modules if name.startswith("gdviz.")]
            context.set_forkserver_preload(["torch", *ours])
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, work))
        self.process.start()
        theirs.close()
        self.ready = False

    def ask(self, job: Job, timeout: float | None) -> Any:
        """Return what the job returns, or `Lost`; raise what it raises, or WorkerDied."""
        try:
            self.ready = self.ready or self.pipe.recv() == (None, "ready")
            self.pipe.send(job)
            if not self.pipe.poll(timeout):
                self.end()
                return Lost(f"took longer than {timeout:.0f} s")
            error, result = self.pipe.recv()
        except (EOFError, OSError):
            death = f"process was killed (exit code {self.end(patience=10.0)}): too little memory"
            if timeout is None or not self.ready:
                advice = "the same command goes on from here, try fewer --workers"
                raise WorkerDied(f"a worker {death}? {advice}") from None
            return Lost(f"its {death}, or it breaks the decoder", died=True)
        if error is not None:
            raise error
        return result

    def end(self, patience: float = 0.0) -> int:
        """Return the exit code; kill the process if it does not end by itself in time."""
        if not wait([self.process.sentinel], patience):
            self.process.kill()
        with _STARTING:
            self.process.join()
        return self.process.exitcode


# Not pebble's ProcessPool: its workers share a queue. Of 150 jobs that killed their worker at once,
# 9 were never reported (a training would wait for ever), and 3 of 100 took the pool with them.
class _Crew:
    """Threads that do jobs, each by a child that has no other job."""

    def __init__(self, work: Work, jobs: Sequence[Job], timeout: float | None) -> None:
        self.work, self.jobs, self.timeout = work, jobs, timeout
        self.children: set[_Child] = set()
        self.idle: list[_Child] = []
        self.over, self.failed = False, None

    def results(self, numbers: Sequence[int], size: int) -> Iterator[tuple[int, Any]]:
        """Yield numbers and results as jobs end; then raise the first error."""
        try:
            with ThreadPool(max(1, min(size, len(numbers)))) as threads:
                ended = threads.imap_unordered(self._do, numbers)
                yield from (result for result in ended if result is not None)
            if self.failed is not None:
                raise self.failed
        finally:
            self._end()

    def _do(self, number: int) -> tuple[int, Any] | None:
        """Return number and result; None if the job failed, or did not begin since another did."""
        try:
            child = self._free_child()
            if child is None:
                return None
            result = child.ask(self.jobs[number], self.timeout)
        except Exception as error:
            self.over, self.failed = True, self.failed or error
            return None
        if isinstance(result, Lost):
            self.children.discard(child)
        else:
            self.idle.append(child)
        return number, result

    def _free_child(self) -> _Child | None:
        with _STARTING:
            if self.over:
                return None
            if not self.idle:
                self.idle.append(_Child(self.work))
                self.children.add(self.idle[-1])
            return self.idle.pop()

    def _end(self) -> None:
        """Let idle children end, ask busy ones to, and kill those that do not."""
        self.over, deadline = True, monotonic() + PATIENCE_S
        try:
            with _STARTING:  # wait for one that is being started
                children, idle = set(self.children), set(self.idle)
            for child in idle:
                child.pipe.close()
            for child in children - idle:
                child.process.terminate()
            for child in children:
                wait([child.process.sentinel], max(0, deadline - monotonic()))
        finally:
            for child in tuple(self.children):
                child.end()


def in_children(
    work: Work, jobs: Sequence[Job], size: int, timeout: float | None
) -> Iterator[tuple[int, Any]]:
    """Yield number and result of each job as it ends, done by ``size`` child processes."""
    died = []
    with closing(_Crew(work, jobs, timeout).results(range(len(jobs)), size)) as ended:
        for number, result in ended:
            if isinstance(result, Lost) and result.died:
                died.append(number)
            else:
                yield number, result
    yield from _Crew(work, jobs, timeout).results(died, 1)


def over_processes(
    work: Work,
    jobs: Sequence[Job],
    workers: int | Any,
    *,
    title: str | None,
    unit: str = "job",
    timeout: float | None = None,
    each: Callable[[int, Any], None] = lambda number, result: None,
) -> list[Any]:
    """Return ``[work(*job) for job in jobs]``, computed by several processes or machines.

    Small networks and small matrices gain nothing from a second thread and lose ten times to
    threads that wait for each other, so each process gets one. The first error cancels what has
    not begun and is raised when what runs has ended.

    Args:
        work: picklable.
        jobs: arguments of each call.
        workers: number of processes, 1 being this one; or a `gdviz.core.cluster.Cluster`.
        title, unit: of the progress bar; no title hides it.
        timeout: seconds that a job may take. With it, a worker process that dies or takes longer
            costs its own job only: `Lost` stands for the result. A job whose worker died is tried
            once more, alone, so that none is blamed for the memory that another one took.
        each: called here with number and result of each job as it ends, but not of a lost one.

    Raises:
        WorkerDied: without ``timeout``, a worker process was killed.
    """
    if not isinstance(workers, int):
        ended = workers.run(work, jobs, timeout)
    elif workers > 1:
        ended = in_children(work, jobs, workers, timeout)
    else:
        ended = ((number, work(*job)) for number, job in enumerate(jobs))
    results: dict[int, Any] = {}
    bar = tqdm(total=len(jobs), desc=title, unit=unit, disable=title is None)
    with closing(ended), bar:
        for number, result in ended:
            results[number] = result
            bar.update()
            if not isinstance(result, Lost):
                each(number, result)
    return [results[number] for number in range(len(jobs))]

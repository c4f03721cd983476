"""Jobs over processes of one thread each, with a progress bar: the one way to use several cores."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from math import inf
from multiprocessing import get_all_start_methods, get_context, parent_process
from multiprocessing.connection import Connection, wait
from threading import Lock, Thread, current_thread, main_thread
from time import monotonic
from typing import Any

import torch
from tqdm.auto import tqdm

from gdviz.core.files import in_a_line

PATIENCE_S = 20.0  # for children that were asked to end: a training saves first
_STARTING = Lock()  # multiprocessing keeps one list of children for all threads

Work = Callable[..., Any]
Job = tuple[Any, ...]
Results = Generator[tuple[int, Any], None, None]  # number and result of each job as it ends


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

    before: dict[int, Any] = {}
    for signum in (signal.SIGTERM, signal.SIGINT) if current_thread() is main_thread() else ():
        if signal.getsignal(signum) not in (signal.SIG_IGN, None):
            before[signum] = signal.signal(signum, note)
    try:
        yield lambda: noted
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    if noted:  # after the caller asked for the last time
        signal.raise_signal(noted)


def _die_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _sendable(error: Exception) -> Exception:
    """Return an error that survives a pipe, with its traceback as a note."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # one that takes other arguments than it holds
        error = RuntimeError(in_a_line(error))
    error.add_note(traceback.format_exc())  # a traceback itself cannot be sent
    return error


def _serve(pipe: Connection, work: Work) -> None:
    """Send (error, result) of each job until the other end closes; at first, that it is ready."""
    # A killed parent cannot stop its children; they would work on, beside its successor's.
    Thread(target=_die_with, args=(parent_process(),), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent obeys it, and stops its children
    torch.set_num_threads(1)
    # Transport potentials of unlikely classes are denormal numbers, a hundred times slower.
    torch.set_flush_denormal(True)
    answer = None, None
    with suppress(EOFError, ConnectionError, Stopped):
        while True:
            pipe.send(answer)
            job = pipe.recv()
            try:
                answer = None, work(*job)
            except Exception as error:
                answer = _sendable(error), None


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
        with _STARTING:
            self.process.start()
        theirs.close()
        self.number: int | None = None  # of its job; it has none until it is ready
        self.deadline = inf

    def begin(self, number: int, job: Job, timeout: float | None) -> None:
        self.number, self.deadline = number, monotonic() + (timeout or inf)
        with suppress(ConnectionError):  # it has died: asking for its answer will show
            self.pipe.send(job)

    def answer(self, timeout: float | None) -> tuple[Exception | None, Any]:
        """Return error and result of a job that has ended or run out of time."""
        try:
            if self.pipe.poll():
                return self.pipe.recv()
            self.end(0)
            return None, Lost(f"took longer than {timeout:.0f} s")
        except (EOFError, OSError):
            code = self.end(10)
            death = f"process was killed (exit code {code}): too little memory"
            if self.number is None and code == 1:
                guard = "a script keeps what it does under `if __name__ == '__main__':`"
                return WorkerDied(f"a worker could not start; {guard}"), None
        if timeout is None or self.number is None:
            advice = "the same command goes on from here, try fewer --workers"
            return WorkerDied(f"a worker {death}? {advice}"), None
        return None, Lost(f"its {death}, or it breaks the decoder", died=True)

    def end(self, patience: float) -> int | None:
        """Return the exit code; kill the process if it does not end by itself in time."""
        self.pipe.close()
        if not wait([self.process.sentinel], patience):
            self.process.kill()
        with _STARTING:
            self.process.join()
        return self.process.exitcode


# Not pebble's ProcessPool: its workers share a queue. Of 150 jobs that killed their worker at once,
# 9 were never reported (a training would wait for ever), and 3 of 100 took the pool with them.
def in_children(work: Work, jobs: Sequence[Job], size: int, timeout: float | None) -> Results:
    """Do jobs in ``size`` child processes; see :func:`over_processes`."""
    left, died, failed = deque(range(len(jobs))), deque(), None
    children: list[_Child] = []
    again = False
    try:
        while left or children or died:
            if not (left or children):
                left, died, size, again = died, deque(), 1, True
            while len(children) < size and len(left) > sum(c.number is None for c in children):
                children.append(_Child(work))
            soonest = min(child.deadline for child in children) - monotonic()
            answered = wait([child.pipe for child in children], min(soonest, 60.0))
            for child in tuple(children):
                if child.pipe not in answered and monotonic() < child.deadline:
                    continue
                number, (error, result) = child.number, child.answer(timeout)
                lost = isinstance(result, Lost)
                if error is not None:
                    failed = failed or error
                    left.clear()
                if left and not lost:
                    child.begin(left[0], jobs[left.popleft()], timeout)
                else:
                    children.remove(child)
                    child.end(PATIENCE_S)
                if lost and result.died and not again:
                    died.append(number)
                elif number is not None and error is None:
                    yield number, result
            if failed and not children:
                raise failed
    finally:
        over = monotonic() + PATIENCE_S
        try:
            for child in children:
                child.process.terminate()
            for child in children:
                wait([child.process.sentinel], max(0, over - monotonic()))
        finally:
            for child in children:
                child.end(0)


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

    The first error cancels what has not begun and is raised when what runs has ended. Each process
    has one thread: small networks lose ten times to threads that wait for each other.

    Args:
        work: picklable.
        jobs: arguments of each call.
        workers: number of processes, 1 being this one; or a `gdviz.core.cluster.Cluster`.
        title, unit: of the progress bar; no title hides it.
        timeout: seconds that a job may take. If it takes longer or its process dies, `Lost` stands
            for its result; without ``timeout``, a death raises WorkerDied. A job whose process died
            is tried once more, alone: another one may have taken the memory.
        each: called here with number and result of each job as it ends, but not of a lost one.
    """
    ended: Results = ((number, work(*job)) for number, job in enumerate(jobs))
    if not isinstance(workers, int):
        ended = workers.run(work, jobs, timeout)
    elif workers > 1:
        ended = in_children(work, jobs, workers, timeout)
    results: dict[int, Any] = {}
    bar = tqdm(total=len(jobs), desc=title, unit=unit, disable=title is None)
    with closing(ended), bar:
        for number, result in ended:
            results[number] = result
            bar.update()
            if not isinstance(result, Lost):
                each(number, result)
    return [results[number] for number in range(len(jobs))]

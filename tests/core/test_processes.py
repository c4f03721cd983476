"""Jobs over processes: each ends or is named, whoever dies, hangs, fails or wants an end."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
from small_jobs import Deadly, note, odd, refuse, state, work

from gdviz.core.files import UserError
from gdviz.core.processes import Lost, WorkerDied, over_processes, stops_noted

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")


def assert_nothing_is_left() -> None:
    assert multiprocessing.active_children() == []


def test_lost_workers_cost_their_own_job_only(tmp_path):
    told, jobs = [], [(i, str(tmp_path)) for i in range(8)]
    out = over_processes(work, jobs, 2, title="", timeout=2, each=lambda i, x: told.append((i, x)))
    assert [x for x in out if not isinstance(x, Lost)] == [0, 1, 9, 25, 36, 49]
    assert "killed (exit code -9)" in out[2].reason and out[4] == Lost("took longer than 2 s")
    assert sorted(told) == [(i, i * i) for i in (0, 1, 3, 5, 6, 7)]
    with pytest.raises(WorkerDied, match="the same command goes on"):
        over_processes(work, [(1,), (2,)], 2, title="")
    assert_nothing_is_left()


@pytest.mark.parametrize("timeout", [None, 30])
def test_the_first_error_is_raised_when_what_runs_has_ended(tmp_path, timeout):
    jobs = [(str(tmp_path), i) for i in range(50)]
    with pytest.raises(UserError, match="job 0") as caught:
        over_processes(note, jobs, 2, title=None, timeout=timeout)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["began-0", "began-1", "ended-1"]
    assert "small_jobs.py" in caught.value.__notes__[0]
    assert_nothing_is_left()


def test_an_error_that_no_pipe_can_carry_is_told_in_its_words():
    with pytest.raises(RuntimeError, match=r"Odd: a bug in a file of the user's") as caught:
        over_processes(odd, [(1,), (2,)], 2, title=None)
    assert "small_jobs.py" in caught.value.__notes__[0]


def test_one_worker_is_this_process(tmp_path):
    told = []
    jobs = [(2,), (4,)]
    out = over_processes(partial(divmod, 7), jobs, 1, title=None, each=lambda *x: told.append(x))
    assert out == [(3, 1), (1, 3)] and told == [(0, (3, 1)), (1, (1, 3))]
    assert over_processes(os.getpid, [()], 1, title=None) == [os.getpid()]
    with pytest.raises(UserError, match="job 1"):
        over_processes(refuse, [(1,)], 1, title=None)


def test_workers_have_one_thread_and_no_denormal_numbers():
    found = over_processes(state, [()] * 20, 2, title=None)
    assert len({pid for pid, _, _ in found} - {os.getpid()}) == 2
    assert {(threads, tiny) for _, threads, tiny in found} == {(1, 0.0)}


def test_thousands_of_jobs_keep_their_order_and_are_told_here():
    threads = set()
    out = over_processes(
        divmod, [(i, 7) for i in range(5000)], 3, title=None,
        each=lambda *_: threads.add(threading.current_thread()),
    )  # fmt: skip
    assert out == [divmod(i, 7) for i in range(5000)]
    assert threads == {threading.current_thread()}
    assert over_processes(divmod, [], 3, title=None) == []


def test_workers_that_all_die_are_all_told_of():
    out = over_processes(work, [(2,)] * 30, 3, title=None, timeout=9)
    assert len(out) == 30 and all(lost.died for lost in out)
    assert_nothing_is_left()


def test_a_worker_that_never_gets_ready_is_no_job_s_fault():
    for timeout in (None, 9):
        with pytest.raises(WorkerDied, match="exit code 3"):
            over_processes(Deadly(), [()] * 5, 2, title=None, timeout=timeout)


def test_an_error_where_results_are_told_ends_the_workers():
    def full(*_: object) -> None:
        raise OSError("disk is full")

    over_processes(os.getpid, [()] * 2, 2, title=None)  # processes are made faster from now on
    began = time.monotonic()
    with pytest.raises(OSError, match="full"):
        over_processes(work, [(1,), (4,)], 2, title=None, each=full)
    assert time.monotonic() - began < 50  # the second job sleeps a minute
    assert_nothing_is_left()


def start(folder: Path) -> subprocess.Popen:
    """Start a program that trains in two processes, and wait until both do."""
    program = [sys.executable, str(Path(__file__).with_name("small_jobs.py")), str(folder)]
    process = subprocess.Popen(program, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(folder.iterdir())) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    return process


def gone(folder: Path) -> bool:
    pids = [int(file.name.split("-")[1]) for file in folder.iterdir()]
    psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=10)
    return not any(psutil.pid_exists(pid) for pid in pids)


@pytest.mark.parametrize(
    "signum", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM]
)
def test_who_wants_an_end_waits_for_trainings_to_save(tmp_path, signum):
    process = start(tmp_path)
    # A terminal sends Ctrl-C to all of a group.
    (os.killpg if signum == signal.SIGINT else os.kill)(process.pid, signum)
    assert process.wait(15) == 100 + signum
    assert [file.read_text() for file in tmp_path.iterdir()] == ["saved", "saved"]
    assert gone(tmp_path)


@pytest.mark.slow
def test_who_wants_an_end_twice_does_not_wait(tmp_path):
    process = start(tmp_path)
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(15) != 0 and gone(tmp_path)
    assert "trains" in [file.read_text() for file in tmp_path.iterdir()]


@pytest.mark.slow
def test_children_of_a_killed_program_work_on_for_nobody(tmp_path):
    process = start(tmp_path)
    process.kill()
    process.wait()
    assert gone(tmp_path)
    assert {file.read_text() for file in tmp_path.iterdir()} == {"trains"}


class Second(Exception):
    pass


def test_stops_are_noted_once_and_then_act():
    def act(*_: object) -> None:
        raise Second

    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        signal.signal(signal.SIGTERM, act)
        with stops_noted() as asked:
            assert asked() == 0
            signal.raise_signal(signal.SIGTERM)
            assert asked() == signal.SIGTERM
            with pytest.raises(Second):
                signal.raise_signal(signal.SIGTERM)
            raise RuntimeError
    except RuntimeError:
        assert signal.getsignal(signal.SIGTERM) is act
        with pytest.raises(Second), stops_noted():  # nobody asked: it acts at the end
            os.kill(os.getpid(), signal.SIGTERM)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with stops_noted() as asked:  # workers ignore Ctrl-C, and go on to
            os.kill(os.getpid(), signal.SIGINT)
            assert asked() == 0
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def test_stops_are_for_the_main_thread():
    found = []

    def elsewhere() -> None:
        with stops_noted() as asked:
            found.append(asked())

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [0]

"""What tests run in worker processes; light, since every worker imports it."""

import os
import signal
import threading
import time
from pathlib import Path

import torch

from gdviz.core.files import UserError
from gdviz.core.processes import Stopped, over_processes, stops_noted


def work(i: int, folder: str = "") -> int:
    """Return i squared; 2 dies, 4 hangs, 5 dies once only, as if another took the memory."""
    marker = Path(folder) / "died"
    if i == 2 or (i == 5 and not marker.exists()):
        if i == 5:
            marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if i == 4:
        time.sleep(60)
    return i * i


def refuse(i: int) -> None:
    raise UserError(f"job {i}")


def note(folder: str, i: int) -> None:
    """Say that a job began; the first one fails late, the second takes longer."""
    (Path(folder) / f"began-{i}").touch()
    if i == 0:
        while not (Path(folder) / "began-1").exists():
            time.sleep(0.01)
        raise UserError("job 0")
    time.sleep(0.5 if i == 1 else 0)
    (Path(folder) / f"ended-{i}").touch()


def state() -> tuple[int, int, float]:
    """Process, threads, and whether denormal numbers are kept."""
    time.sleep(0.05)
    return os.getpid(), torch.get_num_threads(), float(torch.tensor(1e-310).double() * 1)


class Deadly:
    """Cannot be sent: it kills its receiver."""

    def __reduce__(self):
        return os._exit, (3,)

    def __call__(self) -> None: ...


def train(folder: str, i: int) -> None:
    """Like a training: save when asked to stop."""
    file = Path(folder) / f"{i}-{os.getpid()}"
    with stops_noted() as asked:
        file.write_text("trains")
        while not asked():
            time.sleep(0.01)
        time.sleep(0.3)
        file.write_text("saved")
        raise Stopped(asked())


if __name__ == "__main__":  # a program that is stopped while it trains
    import sys

    def stop(signum: int, *_: object) -> None:
        raise Stopped(signum)

    signal.signal(signal.SIGTERM, stop)
    try:
        over_processes(train, [(sys.argv[1], i) for i in range(9)], 2, title=None)
    except KeyboardInterrupt as error:
        assert threading.active_count() < 10
        sys.exit(100 + getattr(error, "signum", signal.SIGINT))


class Odd(Exception):
    """Takes other arguments than it holds, so that no pipe can carry it."""

    def __init__(self, what: str, where: str) -> None:
        super().__init__(f"{what} in {where}")


def odd(i: int) -> None:
    raise Odd("a bug", "a file of the user's")

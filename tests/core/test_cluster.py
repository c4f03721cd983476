"""Jobs over a Dask cluster: the same results, and files that kill their reader are named, as on one machine."""

import os
import signal
from dataclasses import replace

import pytest
import torch
from jobs import refuse, work
from runs import assert_same_run

from gdviz.config import View
from gdviz.core.files import UserError
from gdviz.core.processes import Lost, over_processes
from gdviz.data.videos import load_folder
from gdviz.experiment.steps import execute

distributed = pytest.importorskip("distributed")
dask = pytest.importorskip("dask")


@pytest.fixture(scope="module")
def address():
    with (
        dask.config.set({"distributed.worker.daemon": False}),  # as --no-nanny
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None
        ) as cluster,
    ):
        yield cluster.scheduler_address


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_two_workers_do_what_two_processes_do(address, tmp_path, video_folder):
    told, pids = [], over_processes(os.getppid, [()] * 20, address, title="")
    assert len(set(pids)) == 2 and os.getpid() not in pids
    jobs = [(i, str(tmp_path)) for i in range(8)]
    out = over_processes(
        work, jobs, address, title="", timeout=4, each=lambda i, result: told.append(i)
    )
    assert [x for x in out if not isinstance(x, Lost)] == [0, 1, 9, 25, 36, 49]
    assert "killed" in out[2].reason and out[4] == Lost("took longer than 4 s")
    assert sorted(told) == [0, 1, 3, 5, 6, 7]
    with pytest.raises(UserError, match="job 1"):
        over_processes(refuse, [(1,)] * 3, address, title="")
    root, view = video_folder(count=20), View(size=16, frames=6, cache="jpeg")
    one, two = (
        load_folder(root, view, tmp_path / str(workers)[:3], workers=workers)
        for workers in (1, address)
    )
    assert torch.equal(one.batch(torch.arange(40)), two.batch(torch.arange(40)))


@pytest.mark.slow
def test_a_run_on_two_machines_is_that_of_one(address, finished, tmp_path):
    run = replace(finished, folder=tmp_path / "run", cache=tmp_path / "data")
    assert execute(run, workers=address) == finished.metrics()
    assert_same_run(finished.folder, run.folder)


@pytest.mark.slow
def test_a_scheduler_that_is_not_there_is_named(monkeypatch):
    real = distributed.Client
    monkeypatch.setattr(
        "dask.distributed.Client", lambda address, timeout: real(address, timeout=1)
    )
    with pytest.raises(UserError, match=r"--cluster tcp://127\.0\.0\.1:1: no scheduler answers"):
        over_processes(refuse, [(1,)], "tcp://127.0.0.1:1", title="")

"""Jobs over a Dask cluster end as they do on one machine."""

import os
import pickle

import pytest
from small_jobs import refuse, work

from gdviz.core.cluster import Cluster
from gdviz.core.files import UserError
from gdviz.core.processes import Lost, WorkerDied, over_processes

pytestmark = pytest.mark.slow
dask = pytest.importorskip("dask")
distributed = pytest.importorskip("distributed")


@pytest.fixture(scope="module")
def cluster():
    with (
        dask.config.set({"distributed.worker.daemon": False}),  # as --no-nanny
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None
        ) as machines,
    ):
        yield Cluster(machines.scheduler_address)


def test_two_machines_do_what_two_processes_do(cluster, tmp_path):
    pids = over_processes(os.getppid, [()] * 20, cluster, title=None)
    assert len(set(pids)) == 2 and os.getpid() not in pids
    assert over_processes(
        divmod, [(i, 7) for i in range(99)], pickle.loads(pickle.dumps(cluster)), title=None
    ) == [divmod(i, 7) for i in range(99)]
    assert over_processes(divmod, [], cluster, title=None) == []
    told, jobs = [], [(i, str(tmp_path)) for i in range(8)]
    out = over_processes(work, jobs, cluster, title="", timeout=4, each=lambda *x: told.append(x))
    assert [x for x in out if not isinstance(x, Lost)] == [0, 1, 9, 25, 36, 49]
    assert "killed" in out[2].reason and out[4] == Lost("took longer than 4 s")
    assert sorted(told) == [(i, i * i) for i in (0, 1, 3, 5, 6, 7)]


def test_errors_come_back(cluster):
    with pytest.raises(UserError, match="job 1"):
        over_processes(refuse, [(1,)] * 3, cluster, title=None)
    with pytest.raises(WorkerDied, match="the same command goes on"):
        over_processes(work, [(1,), (2,)], cluster, title=None)


def test_a_scheduler_that_is_not_there_is_named(monkeypatch):
    real = distributed.Client
    monkeypatch.setattr(
        "dask.distributed.Client", lambda address, timeout: real(address, timeout=1)
    )
    with pytest.raises(UserError, match=r"--cluster tcp://127\.0\.0\.1:1: no scheduler answers"):
        over_processes(refuse, [(1,)], Cluster("tcp://127.0.0.1:1"), title=None)

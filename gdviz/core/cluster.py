"""Jobs over the machines of a Dask cluster. Dask, not Ray: pure Python, and a tenth of its size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gdviz.core.files import UserError
from gdviz.core.processes import Job, Results, Work, WorkerDied, in_children


def _in_a_child(work: Work, jobs: Sequence[Job], timeout: float | None) -> list[tuple[int, Any]]:
    return list(in_children(work, jobs, 1, timeout))


@dataclass(frozen=True)
class Cluster:
    """The machines of the Dask scheduler at ``tcp://HOST:8786``, which see the same files.

    Each of their threads does jobs in a child process of its own, so that deaths and time-outs are
    what they are on one machine. Their workers need ``dask worker ADDRESS --no-nanny --nthreads
    CORES``: children of a nanny may have no children.
    """

    address: str

    def run(self, work: Work, jobs: Sequence[Job], timeout: float | None) -> Results:
        """Yield number and result of each job as its chunk ends.

        Raises UserError if Dask is not installed or no scheduler answers, WorkerDied if a worker
        was killed.
        """
        try:
            from dask.distributed import Client, KilledWorker, as_completed

            client: Any = Client(self.address, timeout=30)
        except ImportError:
            needs = "needs Dask; pip install 'gdviz[cluster]'"
            raise UserError(f"--cluster {self.address}: {needs}") from None
        except (OSError, ValueError) as error:
            raise UserError(f"--cluster {self.address}: no scheduler answers ({error})") from None
        with client:
            size = 1 + len(jobs) // (8 * max(1, sum(client.nthreads().values())))
            begins = {
                client.submit(_in_a_child, work, jobs[i : i + size], timeout, pure=False): i
                for i in range(0, len(jobs), size)
            }
            try:
                for chunk in as_completed(begins):
                    for number, result in chunk.result():
                        yield begins[chunk] + number, result
            except KilledWorker as error:
                raise WorkerDied(f"Dask gave up: {error}") from None
            finally:
                client.cancel(list(begins))

"""The module that the forkserver imports before it forks the first worker, to load NumPy and every kernel.

The names of the modules come by the environment. A failure is kept here for each worker to report.
"""

import gc
import os

from unlatch.compute.ipc.frames import PRELOAD_VARIABLE, THREADS_VARIABLE
from unlatch.compute.worker.catalogue import LoadedKernels, LoadError, load

catalogue = LoadedKernels()
failure = ""

try:
    catalogue = load(filter(None, os.environ.get(PRELOAD_VARIABLE, "").split(",")))
except LoadError as error:
    failure = str(error)


def grant_openmp() -> None:
    """Let OpenMP use the worker's share of threads. While modules were loaded, it had one thread."""
    threads = os.environ[THREADS_VARIABLE]
    if threads != "1":
        from threadpoolctl import threadpool_limits

        # For libraries that a kernel loads later.
        os.environ["OMP_NUM_THREADS"] = threads
        threadpool_limits(int(threads), user_api="openmp")


# Objects loaded so far live as long as the workers do. No garbage collection need visit them, and touching them would
# only unshare their pages.
gc.collect()
gc.freeze()

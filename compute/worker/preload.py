"""The module that the forkserver imports before it forks the first worker, to load NumPy and every kernel.

multiprocessing's forkserver ignores the ImportError of a preloaded module and, up to Python 3.13, the parent's
sys.path. So a failure is kept here for the worker to report, and the module names come by the environment, which is
all that the forkserver passes on.
"""

import gc
import multiprocessing
import os
import sys
from pathlib import Path

from unlatch.compute.ipc.frames import PRELOAD_VARIABLE, THREADS_VARIABLE
from unlatch.compute.worker.catalogue import LoadedKernels, LoadError, load

catalogue = LoadedKernels()
failure = ""

try:
    catalogue = load(filter(None, os.environ.get(PRELOAD_VARIABLE, "").split(",")))
except LoadError as error:
    failure = str(error)

_path, _argv, _directory, _main = sys.path[:], sys.argv[:], Path.cwd(), sys.modules["__main__"]
_start_method = multiprocessing.get_start_method(allow_none=True)


def restore() -> None:
    """Undo what multiprocessing does to its children, so that kernels run in the surroundings of their import."""
    sys.path[:], sys.argv[:], sys.modules["__main__"] = _path, _argv, _main
    os.chdir(_directory)
    # None is the system's default.
    multiprocessing.set_start_method(_start_method, force=True)


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

"""The module that the forkserver imports before it forks the first worker, to load NumPy and every kernel.

multiprocessing's forkserver ignores the ImportError of a preloaded module and, up to Python 3.13, the parent's
sys.path. So a failure is kept here for the worker to report, and the module names come by the environment, which is
all that the forkserver passes on.
"""

import gc
import os

from unlatch.compute.ipc.frames import PRELOAD_VARIABLE
from unlatch.compute.worker.catalogue import LoadedKernels, LoadError, load

catalogue = LoadedKernels()
failure = ""

try:
    catalogue = load(filter(None, os.environ.get(PRELOAD_VARIABLE, "").split(",")))
except LoadError as error:
    failure = str(error)

# Objects loaded so far live as long as the workers do. No garbage collection need visit them, and touching them would
# only unshare their pages.
gc.collect()
gc.freeze()

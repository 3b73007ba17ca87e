"""What the forkserver imports before it forks the first worker: NumPy and every kernel.

multiprocessing's forkserver swallows the ImportError of a preloaded module and, up to Python 3.13, ignores the parent's
sys.path, so failures are kept here for the worker to report. The forkserver hands a preloaded module nothing but the
environment.
"""

import gc
import os

from unlatch.compute.ipc.frames import PRELOAD_VARIABLE
from unlatch.compute.worker.catalogue import Catalogue, LoadError, load

catalogue = Catalogue()
failure = ""

try:
    catalogue = load(filter(None, os.environ.get(PRELOAD_VARIABLE, "").split(",")))
except LoadError as error:
    failure = str(error)

# What is loaded now lives as long as the workers do: no collection of theirs need visit it, and touching it would
# only unshare its pages.
gc.collect()
gc.freeze()

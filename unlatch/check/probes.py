"""Kernels that are added to a worker under check, to inspect it from inside."""

import ctypes
import gc
import sys
import threading

import numpy as np
import threadpoolctl
from jaxtyping import Int64

from unlatch import kernel

SETTLE = "unlatch_check_settle"


@kernel(name=SETTLE)
def settle() -> Int64[np.ndarray, "2"]:
    """Collect garbage and flush output; return the number of Python threads, and the largest BLAS thread pool."""
    gc.collect()
    sys.stdout.flush()
    sys.stderr.flush()
    ctypes.CDLL(None).fflush(None)
    pools = [pool["num_threads"] for pool in threadpoolctl.threadpool_info()]
    return np.array([threading.active_count(), max(pools, default=1)])

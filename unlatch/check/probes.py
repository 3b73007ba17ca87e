"""Kernels that a worker under check has besides the user's, to look at it from inside."""

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
    """Let go of what nobody holds and write out what is printed; Python's threads, and the most that a BLAS may use."""
    gc.collect()
    sys.stdout.flush()
    sys.stderr.flush()
    ctypes.CDLL(None).fflush(None)
    pools = [pool["num_threads"] for pool in threadpoolctl.threadpool_info()]
    return np.array([threading.active_count(), max(pools, default=1)])

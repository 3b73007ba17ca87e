"""Kernels that do more harm to their worker than any kind of fault names."""

import os
import sys
import threading
import time
from functools import partial

import numpy as np
from jaxtyping import Float64

from unlatch import kernel

Vector = Float64[np.ndarray, "n"]


@kernel(pure=True)
def dies_soon_after(x: Vector) -> Vector:
    threading.Timer(0.001, partial(os._exit, 7)).start()
    return x * 2


@kernel(pure=True)
def closes_every_file(x: Vector) -> Vector:
    sys.stdout = None
    os.closerange(3, 50)
    return x * 2


@kernel(pure=True)
def leaves_children(x: Vector) -> Vector:
    if os.fork() == 0:
        time.sleep(60)
        os._exit(0)
    return x * 2

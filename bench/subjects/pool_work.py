"""What the baselines' processes and threads run: kernels on raw bytes. No grpc here, as workers load it."""

from collections.abc import Callable
from typing import Any

import numpy as np

from bench.subjects import work

KERNELS: dict[str, Callable[[Any], np.ndarray[Any, Any]]] = {
    "identity": lambda x: x,
    "spin10": work.spin10,
    "elementwise": work.elementwise,
    "python_loop": work.python_loop,
    "wait10": work.wait10,
}
DTYPES = {"FP64": np.dtype("<f8"), "INT64": np.dtype("<i8")}
DATATYPES = {dtype: datatype for datatype, dtype in DTYPES.items()}

Tensor = tuple[str, tuple[int, ...], bytes]


def run(kernel: str, tensors: list[Tensor]) -> Tensor:
    """One kernel on raw tensors: no copy in, one copy out. Runs in the pool, where only bytes are pickled."""
    arrays = [np.frombuffer(raw, DTYPES[datatype]).reshape(shape) for datatype, shape, raw in tensors]
    out = KERNELS[kernel](*arrays)
    return DATATYPES[out.dtype], out.shape, out.tobytes()

"""The work of the baselines' processes and threads: kernels on raw bytes. No grpc here, since workers load it."""

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
    """Run one kernel on raw tensors, with no copy in and one copy out. In the pool only bytes are pickled."""
    arrays = [np.frombuffer(raw, DTYPES[datatype]).reshape(shape) for datatype, shape, raw in tensors]
    out = KERNELS[kernel](*arrays)
    return DATATYPES[out.dtype], out.shape, out.tobytes()

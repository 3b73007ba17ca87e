"""The work on a body that is one vector's bytes, for servers of plain HTTP: the path names the kernel."""

from bench.subjects.pool_work import run

WORKERS = 2
KERNELS = ("identity", "spin10")


def answer(kernel: str, body: bytes) -> bytes:
    """Run a kernel and return its result's bytes."""
    values = len(body) // 8
    return run(kernel, [("INT64" if kernel == "spin10" else "FP64", (values,), body)])[2]

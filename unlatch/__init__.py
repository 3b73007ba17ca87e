"""Unlatch: NumPy functions served over gRPC on every core.

    from unlatch import Client, kernel

Names are loaded on first use (PEP 562), so a worker that only declares kernels never imports gRPC.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unlatch.annotations import Bytes
    from unlatch.blocking import BlockingClient
    from unlatch.cancellation import cancelled
    from unlatch.client import Client
    from unlatch.common.errors import CertificateError, KernelError, UnlatchError
    from unlatch.declaration import kernel
    from unlatch.hooks import setup, teardown
    from unlatch.randomness import rng
    from unlatch.security import TLS

__all__ = [
    "TLS",
    "BlockingClient",
    "Bytes",
    "CertificateError",
    "Client",
    "KernelError",
    "UnlatchError",
    "cancelled",
    "kernel",
    "rng",
    "setup",
    "teardown",
]

_HOMES = {
    "TLS": "unlatch.security",
    "BlockingClient": "unlatch.blocking",
    "Bytes": "unlatch.annotations",
    "CertificateError": "unlatch.common.errors",
    "Client": "unlatch.client",
    "KernelError": "unlatch.common.errors",
    "UnlatchError": "unlatch.common.errors",
    "cancelled": "unlatch.cancellation",
    "kernel": "unlatch.declaration",
    "rng": "unlatch.randomness",
    "setup": "unlatch.hooks",
    "teardown": "unlatch.hooks",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from unlatch.common.service.version import VERSION

        return VERSION
    if name not in _HOMES:
        raise AttributeError(f"module 'unlatch' has no attribute {name!r}")
    if name.endswith("Client"):
        # gRPC reads this when it is imported. Its handlers of a fork crash some of the processes that a client forks.
        os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__, "__version__"]

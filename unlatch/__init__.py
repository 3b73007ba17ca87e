"""Unlatch: NumPy functions served over gRPC on every core.

    from unlatch import Client, kernel

Names are loaded on first use (PEP 562), so a worker that only declares kernels never imports gRPC.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unlatch.blocking import BlockingClient
    from unlatch.cancellation import cancelled
    from unlatch.client import Client
    from unlatch.common.errors import CertificateError, KernelError, UnlatchError
    from unlatch.declaration import kernel
    from unlatch.security import TLS

__all__ = ["TLS", "BlockingClient", "CertificateError", "Client", "KernelError", "UnlatchError", "cancelled", "kernel"]

_HOMES = {
    "TLS": "unlatch.security",
    "BlockingClient": "unlatch.blocking",
    "CertificateError": "unlatch.common.errors",
    "Client": "unlatch.client",
    "KernelError": "unlatch.common.errors",
    "UnlatchError": "unlatch.common.errors",
    "cancelled": "unlatch.cancellation",
    "kernel": "unlatch.declaration",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'unlatch' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value

"""The division of a container's memory, such that no worker can take the whole container over its limit.

granted = input arena + replies of one moment + the services themselves + a limit for each worker
"""

from dataclasses import dataclass

import structlog

from unlatch.common.net.settings import MiB
from unlatch.compute.errors import StartError
from unlatch.compute.settings import ComputeSettings

log = structlog.get_logger()

# The input arena's default: this without a limit on the container; with one, at most this part of it.
_ARENA_BYTES = 2048 * MiB
_ARENAS_PART = 4
# Dispatcher, forkserver and gateway, and those shared pages that workers write to: together some 200 MB.
_SERVICES_BYTES = 256 * MiB
# With less, a worker cannot even load the buffers of a BLAS.
_LEAST_WORKER_BYTES = 16 * MiB


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """The limits of the input arena and of each worker; 0 where no limit is known."""

    arena_bytes: int
    worker_bytes: int


def memory_budget(settings: ComputeSettings, granted_bytes: int, async_workers: int = 0) -> MemoryBudget:
    """Divide the memory that the container grants (0 if no limit is known). Raises StartError if it is too little."""
    workers = settings.worker_count + async_workers
    by_default = min(_ARENA_BYTES, granted_bytes // _ARENAS_PART) if granted_bytes else _ARENA_BYTES
    arena = settings.input_arena_bytes or by_default
    if settings.worker_memory_bytes:
        limit, whose = settings.worker_memory_bytes, f"{settings.worker_memory_bytes} bytes are"
        if granted_bytes and limit * workers > granted_bytes:
            log.warning("workers may exceed container memory", granted_bytes=granted_bytes)
    elif not granted_bytes:
        return MemoryBudget(arena, 0)
    else:
        replies = min(settings.max_reply_bytes, arena)
        limit = max(0, granted_bytes - arena - replies - _SERVICES_BYTES) // workers
        whose = (
            f"the container grants {granted_bytes} bytes; input_arena_bytes={arena}, {replies} for replies and"
            f" {_SERVICES_BYTES} for the services themselves leave {limit} for each of {workers} workers,"
            " which is"
        )
    if limit < _LEAST_WORKER_BYTES:
        raise StartError(f"worker_memory_bytes: {whose} too little: a worker needs at least {_LEAST_WORKER_BYTES}")
    return MemoryBudget(arena, limit)

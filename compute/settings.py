"""The compute service's settings."""

import socket
from typing import Annotated

from pydantic import Field, field_validator
from pydantic_settings import NoDecode

from common.cores import granted_cores
from common.settings import MiB, Settings, separated


class ComputeSettings(Settings):
    """`unlatch compute`: one replica."""

    listen: str = Field("127.0.0.1:8011", description="Where lanes are opened: host:port or unix:/path")
    metrics_listen: str = Field("127.0.0.1:8012", description="Where Prometheus scrapes /metrics")
    health_listen: str = Field("127.0.0.1:8013", description="Where grpc.health.v1 answers, in plaintext")
    kernels: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Kernel modules besides the built-in ones: pkg.module,path/to/file.py"
    )
    workers: int = Field(0, ge=0, le=1024, description="Worker processes; 0 means one for each core granted")
    blas_threads: int = Field(0, ge=0, description="Threads of a worker's BLAS; 0 shares the cores out")
    name: str = Field(default_factory=socket.gethostname, description="What logs and replies call this replica")

    # One call's tensors. It must fit the arena, and it bounds what a reply may hold too.
    max_call_bytes: int = Field(512 * MiB, gt=0, description="Most bytes of one call's tensors together")
    max_reply_bytes: int = Field(512 * MiB, gt=0, description="Most bytes of one reply's tensors together")
    # All live calls' tensors: what waits, what lands and what runs.
    input_arena_bytes: int = Field(2048 * MiB, gt=0, description="Most bytes of all calls' tensors together")
    # Waiting is bounded by count, so that a full queue is noticed by a refusal and not by everyone's deadlines.
    max_queued_calls: int = Field(10_000, gt=0, description="Most calls that may wait for a worker")
    # What one lane may have unanswered; what exceeds it waits at the gateway, which can still send it elsewhere.
    window_calls: int = Field(1024, gt=0, description="Most unanswered calls of one lane")
    window_bytes: int = Field(1024 * MiB, gt=0, description="Most bytes of one lane's unanswered calls")

    @field_validator("kernels", mode="before")
    @classmethod
    def _separated(cls, value: object) -> object:
        return separated(value)

    @property
    def worker_count(self) -> int:
        """Workers, at least one."""
        return self.workers or granted_cores()

    @property
    def worker_blas_threads(self) -> int:
        """BLAS threads a worker: threads x workers never exceed the cores granted."""
        return self.blas_threads or max(1, granted_cores() // self.worker_count)

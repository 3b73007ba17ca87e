"""The compute service's settings."""

import socket
from typing import Annotated

from pydantic import Field, field_validator
from pydantic_settings import NoDecode

from unlatch.common.machine.cores import granted_cores
from unlatch.common.net.settings import MiB, ServiceSettings, TenantWeights, separated

# With fewer workers one that is kept free is too much of the whole.
_FEWEST_TO_RESERVE = 4


class ComputeSettings(ServiceSettings):
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

    # A kernel that asks unlatch.cancelled() stops by itself within this time; any other loses its worker after it.
    kill_grace_seconds: float = Field(
        0.25, ge=0, description="How long a run that nobody waits for may go on before its worker is replaced"
    )
    # A stopped worker (SIGSTOP) can neither answer nor end. Whoever stops one to look at it wants this off.
    stopped_worker_seconds: float = Field(
        2.0, ge=0, description="How long a worker may stand stopped before it is replaced; 0 waits for it"
    )
    # A kernel module's import is part of a start where the forkserver is new.
    worker_start_seconds: float = Field(
        60.0, gt=0, description="How long a worker may take until it is ready before its start has failed"
    )
    # Long enough that a caller who retries gives up; an end, since a kernel's state may have been at fault.
    poison_seconds: float = Field(
        600.0, ge=0, description="How long a call that two workers have died of is refused; 0 remembers none"
    )
    # One call's tensors. It must fit the arena, and it bounds what a reply may hold too.
    max_call_bytes: int = Field(512 * MiB, gt=0, description="Most bytes of one call's tensors together")
    max_reply_bytes: int = Field(512 * MiB, gt=0, description="Most bytes of one reply's tensors together")
    # All live calls' tensors: what waits, what lands and what runs.
    input_arena_bytes: int = Field(
        0,
        ge=0,
        description="Most bytes of all calls' tensors; 0 means 2 GiB, or a quarter of what the container grants",
    )
    # What a worker takes beyond what it starts with. By default the workers share what the container grants, less the
    # input arena, room for the replies of one moment (max_reply_bytes) and 256 MiB for front, forkserver and gateway.
    worker_memory_bytes: int = Field(
        0, ge=0, description="Most memory of a worker's own; 0 shares out what the container grants, if it has a limit"
    )
    # Both are for kernels that leak, or that leave the heap in pieces. One worker at a time is replaced, between calls.
    recycle_calls: int = Field(0, ge=0, description="After about so many calls a worker is replaced; 0 means never")
    recycle_growth_bytes: int = Field(
        0, ge=0, description="A worker that keeps so much more than it started with is replaced; 0 means never"
    )
    # Waiting is bounded by count, so that a full queue is noticed by a refusal and not by everyone's deadlines.
    max_queued_calls: int = Field(10_000, gt=0, description="Most calls that may wait for a worker")
    # A call is long by what its kernel has taken so far for inputs of that size. No call is staged behind a long one.
    long_call_seconds: float = Field(0.1, gt=0, description="From how long a run on a call counts as long")
    # They cost long calls their throughput, and only while others come: 10 s after the last one they are free to all.
    reserved_workers: int | None = Field(
        None,
        ge=0,
        description="Workers that long calls leave to others; 1 unless given, 0 with fewer than four workers",
    )
    tenant_weights: TenantWeights = Field(
        {}, description="Shares of the processor between tenants who wait: name=2,other=0.5; 1 for who is not named"
    )
    # Several reports' silence is what a gateway takes for a frozen replica: 1.5 s at most.
    report_seconds: float = Field(
        0.25, ge=0.01, le=60, description="How often, at least, gateways are told how much there is to do"
    )
    # What waits here waits for these workers alone. The time is what passes between a reply and the next call's
    # arrival, on a busy machine; what runs for longer is bounded by what workers have in hand.
    ahead_seconds: float = Field(
        0.02, gt=0, description="Work that gateways may send ahead, in seconds for each worker, all lanes together"
    )
    # What one lane may have unanswered; what exceeds it waits at the gateway, which can still send it elsewhere.
    window_calls: int = Field(1024, gt=0, description="Most unanswered calls of one lane")
    window_bytes: int = Field(1024 * MiB, gt=0, description="Most bytes of one lane's unanswered calls")

    @field_validator("kernels", mode="before")
    @classmethod
    def _separated(cls, value: object) -> object:
        return separated(value)

    @property
    def workers_reserved(self) -> int:
        """Workers that long calls leave to others: never all of them."""
        if self.reserved_workers is not None:
            return min(self.reserved_workers, self.worker_count - 1)
        return 1 if self.worker_count >= _FEWEST_TO_RESERVE else 0

    @property
    def worker_count(self) -> int:
        """Workers, at least one."""
        return self.workers or granted_cores()

    @property
    def worker_blas_threads(self) -> int:
        """BLAS threads a worker: threads x workers never exceed the cores granted."""
        return self.blas_threads or max(1, granted_cores() // self.worker_count)

"""The compute service's settings."""

import socket
from collections.abc import Iterable

from pydantic import Field

from unlatch.common.kernel.spec import KernelSpec
from unlatch.common.machine.cgroups import granted_cores
from unlatch.common.net.settings import Address, MiB, ServiceSettings, Several, TcpAddress, TenantWeights

# With fewer workers, keeping one of them free costs too large a part of the whole.
_FEWEST_TO_RESERVE = 4


class ComputeSettings(ServiceSettings):
    """`unlatch compute`: one replica."""

    listen: Address = Field("127.0.0.1:8011", description="Address for lanes: host:port or unix:/path")
    metrics_listen: TcpAddress = Field("127.0.0.1:8012", description="Address of /metrics, for Prometheus")
    health_listen: Address = Field("127.0.0.1:8013", description="Address of grpc.health.v1, in plaintext")
    kernels: Several = Field((), description="Kernel modules besides the built-in ones: pkg.module,path/to/file.py")
    workers: int = Field(0, ge=0, le=1024, description="Worker processes; 0 is one for each granted core")
    # An environment with NumPy, SciPy and a Python of its own. It needs this version of Unlatch, too.
    worker_python: str = Field("", description="Python interpreter of the workers; by default the service's own")
    async_workers: int | None = Field(
        None, ge=0, le=64, description="Processes that run `async def` kernels; by default 1 if there is such a kernel"
    )
    blas_threads: int = Field(0, ge=0, description="BLAS threads of each worker; 0 divides the granted cores")
    name: str = Field(default_factory=socket.gethostname, description="Name of this replica in logs and replies")

    # A kernel that asks unlatch.cancelled() can stop by itself within this time. Any other loses its worker after it.
    kill_grace_seconds: float = Field(
        0.25, ge=0, description="Seconds that a cancelled run may continue before its worker is replaced"
    )
    # A stopped worker (SIGSTOP) can neither answer nor end. Set 0 to stop workers on purpose, as a debugger does.
    stopped_worker_seconds: float = Field(
        2.0, ge=0, description="Seconds that a worker may be stopped before it is replaced; 0 never replaces it"
    )
    # A start includes the import of the kernel modules if the forkserver is new.
    worker_start_seconds: float = Field(
        60.0, gt=0, description="Maximum seconds from the start of a worker until it is ready"
    )
    # Of a worker that ends in order: the service stops, or the worker is recycled.
    teardown_seconds: float = Field(
        5.0, ge=0, description="Maximum seconds of a worker's teardowns, before it is killed"
    )
    # Long enough for a caller that retries to give up. Not for ever, since a kernel's state may have been at fault.
    poison_seconds: float = Field(
        600.0, ge=0, description="Seconds for which a call that killed two workers is refused; 0 refuses none"
    )
    # One call's tensors must fit in the input arena.
    max_call_bytes: int = Field(512 * MiB, gt=0, description="Maximum bytes of one call's tensors together")
    max_reply_bytes: int = Field(512 * MiB, gt=0, description="Maximum bytes of one reply's tensors together")
    # The tensors of all live calls: those that arrive, wait and run.
    input_arena_bytes: int = Field(
        0,
        ge=0,
        description="Maximum bytes of all calls' tensors; 0 is 2 GiB, at most a quarter of the container's limit",
    )
    # Memory that a worker allocates beyond what it starts with. By default the workers share the container's limit,
    # less the input arena, max_reply_bytes for replies, and 256 MiB for dispatcher, forkserver and gateway.
    worker_memory_bytes: int = Field(
        0, ge=0, description="Maximum bytes of a worker's own memory; 0 divides the container's limit, if it has one"
    )
    # For kernels that leak memory or fragment the heap. Workers are replaced one at a time, between calls.
    recycle_calls: int = Field(
        0, ge=0, description="Approximate number of calls after which a worker is replaced; 0 is never"
    )
    recycle_growth_bytes: int = Field(
        0, ge=0, description="Bytes of growth in memory after which a worker is replaced; 0 is never"
    )
    # With this bound a full queue shows as refusals at once, and not later as deadlines that all callers miss.
    max_queued_calls: int = Field(10_000, gt=0, description="Maximum calls waiting for a worker")
    # Predicted from earlier runs of the kernel on inputs of that size. No call is staged behind a long one.
    long_call_seconds: float = Field(0.1, gt=0, description="Predicted run seconds from which a call counts as long")
    # Reserved workers reduce the throughput of long calls, but only until 10 s after the last short call.
    reserved_workers: int | None = Field(
        None,
        ge=0,
        description="Workers that long calls leave free; by default 1, or 0 with fewer than four workers",
    )
    tenant_weights: TenantWeights = Field(
        {}, description="Weights of tenants whose calls wait: name=2,other=0.5; 1 for tenants not named"
    )
    # A gateway takes a replica for frozen after several missing reports, and after 1.5 s at most.
    report_seconds: float = Field(0.25, ge=0.01, le=60, description="Maximum seconds between load reports to gateways")
    # Calls that wait here can run on this replica's workers only. The default is the time between a reply and the next
    # call's arrival on a busy machine. For longer calls, the calls in flight on the workers are the bound.
    ahead_seconds: float = Field(
        0.02, gt=0, description="Seconds of work for each worker that gateways may send ahead, all lanes together"
    )
    # The window of one lane. Calls that exceed it wait in the gateway, which can still send them to another replica.
    window_calls: int = Field(1024, gt=0, description="Maximum unanswered calls of one lane")
    window_bytes: int = Field(1024 * MiB, gt=0, description="Maximum bytes of one lane's unanswered calls")

    @property
    def workers_reserved(self) -> int:
        """The number of workers that long calls leave free: never all of them."""
        if self.reserved_workers is not None:
            return min(self.reserved_workers, self.worker_count - 1)
        return 1 if self.worker_count >= _FEWEST_TO_RESERVE else 0

    @property
    def worker_count(self) -> int:
        """The number of workers, at least one."""
        return self.workers or granted_cores()

    @property
    def worker_blas_threads(self) -> int:
        """BLAS threads of each worker: threads x workers never exceed the granted cores."""
        return self.blas_threads or max(1, granted_cores() // self.worker_count)

    def async_worker_count(self, kernels: Iterable[KernelSpec]) -> int:
        """The number of async workers when these kernels are served."""
        if all(spec.concurrency is None for spec in kernels):
            return 0
        return 1 if self.async_workers is None else self.async_workers

    def async_calls(self, kernels: Iterable[KernelSpec]) -> int:
        """The number of calls that the async workers may run at once."""
        return self.async_worker_count(kernels) * sum(spec.concurrency or 0 for spec in kernels)

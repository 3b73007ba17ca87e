"""Metrics of the dispatcher: names, labels and help texts. The code on the path of a call reports events to them."""

from collections.abc import Callable, Iterator
from time import monotonic

from prometheus_client.metrics_core import CounterMetricFamily, Metric

from unlatch.common.telemetry.components import CALL_SECONDS, QUEUE_DEPTH
from unlatch.common.telemetry.processes import ProcessWatch
from unlatch.common.telemetry.recorder import Recorder

FORKSERVER = "forkserver"
# Seconds: a fork and a hello take milliseconds; what takes longer is a backoff, or kernels that no longer load.
_REPLACEMENT_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class ComputeMetrics:
    """The metrics of the dispatcher. `queue_depth` is read at each scrape."""

    def __init__(self, recorder: Recorder, processes: ProcessWatch, queue_depth: Callable[[], int]) -> None:
        self.processes = processes
        self._forkserver = 0
        self._calls = recorder.counter(
            "unlatch_calls_total", "Calls that ended, by the status their caller got.", ("kernel", "code")
        )
        self._stages = recorder.histogram("unlatch_call_seconds", CALL_SECONDS, ("kernel", "stage"))
        self.queue_wait = recorder.histogram(
            "unlatch_queue_wait_seconds", "How long calls waited between their bytes' arrival and their run."
        ).labels()
        self.batches = recorder.histogram(
            "unlatch_batch_calls", "How many calls ran as one, of kernels that take batches.", ("kernel",), _BATCHES
        )
        recorder.gauge("unlatch_queue_depth", QUEUE_DEPTH, read=lambda: float(queue_depth()))
        self.worker_calls = recorder.counter(
            "unlatch_worker_calls_total", "Calls that a worker ended.", ("worker", "kernel", "outcome")
        )
        self.restarts = recorder.counter(
            "unlatch_worker_restarts_total", "Workers that ended and were replaced.", ("worker", "reason")
        )
        self.replacements = recorder.histogram(
            "unlatch_worker_replacement_seconds",
            "From the end of a worker until its replacement takes calls.",
            buckets=_REPLACEMENT_BUCKETS,
        ).labels()
        self.wasted = recorder.counter(
            "unlatch_wasted_cpu_seconds_total",
            "Processor time of runs for which no caller waited in the end.",
            ("worker",),
        )
        self.blocked = recorder.counter(
            "unlatch_worker_loop_blocked_total",
            "How often a coroutine blocked the event loop of its async worker for more than 100 ms.",
            ("worker", "kernel"),
        )
        self._workers: dict[str, WorkerMetrics] = {}
        recorder.gauge(
            "unlatch_worker_calls_in_flight",
            "Calls that an async worker runs at this moment.",
            ("worker",),
            lambda: {
                (slot,): float(worker.calls)
                for slot, worker in list(self._workers.items())
                if isinstance(worker, AsyncWorkerMetrics)
            },
        )
        recorder.gauge(
            "unlatch_worker_up",
            "Whether a worker process fills this slot and takes calls.",
            ("worker",),
            lambda: {(slot,): float(worker.up) for slot, worker in list(self._workers.items())},
        )
        recorder.gauge(
            "unlatch_worker_running_seconds",
            "How long a worker has run its present kernel; absent while it runs none.",
            ("worker", "kernel"),
            self._running,
        )
        recorder.gauge(
            "unlatch_worker_memory_bytes",
            "Memory of its own that a worker has in RAM beyond what it started with, shared arenas left out.",
            ("worker",),
            lambda: {(slot,): float(worker.memory_bytes) for slot, worker in list(self._workers.items())},
        )
        self._memory_limit = recorder.gauge(
            "unlatch_worker_memory_limit_bytes", "What that may be; 0 is no limit."
        ).labels()

    def limited(self, memory_bytes: int) -> None:
        """Set the memory limit of a worker."""
        self._memory_limit.set(memory_bytes)

    def collect(self) -> Iterator[Metric]:
        """Busy seconds as they stand now, a run that is under way included: a prometheus_client collector."""
        busy = CounterMetricFamily(
            "unlatch_worker_busy_seconds_total",
            "How long a worker has run kernels, by the clock; of an async worker: the processor time of its calls.",
            labels=("worker",),
        )
        for slot, worker in list(self._workers.items()):
            busy.add_metric((slot,), worker.busy_seconds())
        yield busy

    def call_ended(self, kernel: str, code: str) -> None:
        """Count a call that has its answer, or needs none any more."""
        self._calls.add(1, kernel, code)

    def stages(self, kernel: str, transfer: float, queue: float, run: float, reply: float) -> None:
        """Tell where an answered call's time went, in seconds."""
        self._stages.observe(transfer, kernel, "transfer")
        self._stages.observe(queue, kernel, "queue")
        self._stages.observe(run, kernel, "run")
        self._stages.observe(reply, kernel, "reply")

    def forkserver_runs(self, pid: int) -> None:
        """Watch the forkserver of the next worker, which may have replaced another one."""
        if pid != self._forkserver:
            self._forkserver = pid
            self.processes.watch(FORKSERVER, pid)

    def worker(self, slot: int) -> "WorkerMetrics":
        """Make the metrics of a slot, whose workers follow one another."""
        worker = self._workers[str(slot)] = WorkerMetrics(self, str(slot))
        return worker

    def async_worker(self, slot: int) -> "AsyncWorkerMetrics":
        """Make the metrics of a slot for async workers."""
        worker = self._workers[str(slot)] = AsyncWorkerMetrics(self, str(slot))
        return worker

    def _running(self) -> dict[tuple[str, ...], float]:
        now = {slot: worker.running() for slot, worker in list(self._workers.items())}
        return {(slot, run[0]): run[1] for slot, run in now.items() if run is not None}


class WorkerMetrics:
    """The metrics of a slot."""

    def __init__(self, metrics: ComputeMetrics, slot: str) -> None:
        self._metrics = metrics
        self._slot = slot
        # One reference, replaced whole, since a scrape reads it from its own thread: seconds before the present run,
        # since when that run goes on, and of which kernel.
        self._busy: tuple[float, float | None, str] = (0.0, None, "")
        self.up = False
        # Since when nothing that takes calls fills the slot, once something has.
        self._lost_at: float | None = None
        self.memory_bytes = 0

    def busy_seconds(self) -> float:
        """How long this slot's workers have run kernels."""
        before, since, _ = self._busy
        return before if since is None else before + max(0.0, monotonic() - since)

    def running(self) -> tuple[str, float] | None:
        """The kernel that its worker runs now, and for how many seconds already; None while it runs none."""
        _, since, kernel = self._busy
        return None if since is None else (kernel, max(0.0, monotonic() - since))

    def started(self, pid: int, forkserver: int) -> None:
        """Watch a process that fills the slot from now on, and the forkserver that forked it."""
        self._metrics.forkserver_runs(forkserver)
        self._metrics.processes.watch(f"worker-{self._slot}", pid)

    def ready(self) -> None:
        """Record that the worker takes calls."""
        self.up = True
        if self._lost_at is not None:
            self._metrics.replacements.observe(monotonic() - self._lost_at)
            self._lost_at = None

    def begins(self, kernel: str, now: float, calls: int, *, batch: bool) -> None:
        """Record the start of a run of `calls` calls. `batch` tells whether calls of this kernel may run together."""
        self._busy = (self.busy_seconds(), now, kernel)
        if batch:
            self._metrics.batches.observe(calls, kernel)

    def waited(self, seconds: float) -> None:
        """Record the start of a call, and how long the call has waited."""
        self._metrics.queue_wait.observe(seconds)

    def ran(self, kernel: str, outcome: str) -> None:
        """Count a call that the worker has ended."""
        self._metrics.worker_calls.add(1, self._slot, kernel, outcome)

    def rests(self) -> None:
        """Record the end of a run."""
        self._busy = (self.busy_seconds(), None, "")

    def ended(self, reason: str) -> None:
        """Count the exit of the worker. The reason is empty if the worker is not to be replaced."""
        if self.up:
            self._lost_at = monotonic()
        self.up = False
        self.memory_bytes = 0
        self.rests()
        self._metrics.processes.settle()
        if reason:
            self._metrics.restarts.add(1, self._slot, reason)


class AsyncWorkerMetrics(WorkerMetrics):
    """The metrics of a slot for async workers."""

    def __init__(self, metrics: ComputeMetrics, slot: str) -> None:
        super().__init__(metrics, slot)
        self.calls = 0
        self._cpu_seconds = 0.0

    def busy_seconds(self) -> float:
        """The processor time of the calls that this slot's workers have ended."""
        return self._cpu_seconds

    def running(self) -> tuple[str, float] | None:
        """None: an async worker has no present kernel, but many calls."""
        return None

    def began_run(self) -> None:
        """Count a run that begins."""
        self.calls += 1

    def ended_run(self, cpu_seconds: float) -> None:
        """Count a run that has ended."""
        self.calls -= 1
        self._cpu_seconds += cpu_seconds

    def blocked(self, kernel: str) -> None:
        """Count a coroutine that blocks the event loop."""
        self._metrics.blocked.add(1, self._slot, kernel)

    def ended(self, reason: str) -> None:
        """Count the exit of the worker, with all its runs. The reason is empty if it is not to be replaced."""
        super().ended(reason)
        self.calls = 0

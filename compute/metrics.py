"""Metrics of the dispatcher: names, labels and help texts. The code on the path of a call reports events to them."""

from collections.abc import Callable, Iterator
from time import monotonic

from prometheus_client.metrics_core import CounterMetricFamily, Metric

from unlatch.common.telemetry.processes import ProcessWatch
from unlatch.common.telemetry.recorder import Recorder

FORKSERVER = "forkserver"
# Seconds: a fork and a hello take milliseconds; what takes longer is a backoff, or kernels that no longer load.
_REPLACEMENT_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class ComputeMetrics:
    """The metrics of the dispatcher. `queue_depth` is read at each scrape."""

    def __init__(self, recorder: Recorder, processes: ProcessWatch, queue_depth: Callable[[], int]) -> None:
        self._processes = processes
        self._forkserver = 0
        self._calls = recorder.counter(
            "unlatch_calls_total", "Calls that ended, by the status their caller got.", ("kernel", "code")
        )
        self._stages = recorder.histogram(
            "unlatch_call_seconds", "Where a call's time went: transfer, queue, run, reply.", ("kernel", "stage")
        )
        self._queue_wait = recorder.histogram(
            "unlatch_queue_wait_seconds", "How long calls waited between their bytes' arrival and their run."
        ).labels()
        self._batches = recorder.histogram(
            "unlatch_batch_calls", "How many calls ran as one, of kernels that take batches.", ("kernel",), _BATCHES
        )
        recorder.gauge("unlatch_queue_depth", "Calls that wait for a worker.", read=lambda: float(queue_depth()))
        self._worker_calls = recorder.counter(
            "unlatch_worker_calls_total", "Calls that a worker ended.", ("worker", "kernel", "outcome")
        )
        self._restarts = recorder.counter(
            "unlatch_worker_restarts_total", "Workers that ended and were replaced.", ("worker", "reason")
        )
        self._replacements = recorder.histogram(
            "unlatch_worker_replacement_seconds",
            "From the end of a worker until its replacement takes calls.",
            buckets=_REPLACEMENT_BUCKETS,
        ).labels()
        self._wasted = recorder.counter(
            "unlatch_wasted_cpu_seconds_total",
            "Processor time of runs for which no caller waited in the end.",
            ("worker",),
        )
        self._workers: dict[str, WorkerMetrics] = {}
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
            "unlatch_worker_busy_seconds_total", "How long a worker has run kernels, by the clock.", labels=("worker",)
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

    def waited(self, seconds: float) -> None:
        """Tell how long a call has waited that a worker begins."""
        self._queue_wait.observe(seconds)

    def batched(self, kernel: str, calls: int) -> None:
        """Count a batch: calls of a kernel that run as one."""
        self._batches.observe(calls, kernel)

    def forkserver_runs(self, pid: int) -> None:
        """Watch the forkserver of the next worker: multiprocessing replaces a dead one without a word."""
        if pid != self._forkserver:
            self._forkserver = pid
            self._processes.watch(FORKSERVER, pid)

    def worker(self, slot: int) -> "WorkerMetrics":
        """Make the metrics of a slot, whose workers follow one another."""
        worker = self._workers[str(slot)] = WorkerMetrics(self, str(slot))
        return worker

    def _running(self) -> dict[tuple[str, ...], float]:
        now = {slot: worker.running() for slot, worker in list(self._workers.items())}
        return {(slot, run[0]): run[1] for slot, run in now.items() if run is not None}

    def worker_ran(self, slot: str, kernel: str, outcome: str) -> None:
        """Count a call that a worker has ended."""
        self._worker_calls.add(1, slot, kernel, outcome)

    def worker_wasted(self, slot: str, seconds: float) -> None:
        """Count the processor time of a run for which no caller waited in the end."""
        self._wasted.add(seconds, slot)

    def worker_started(self, slot: str, pid: int) -> None:
        """Watch the new process that fills a slot."""
        self._processes.watch(f"worker-{slot}", pid)

    def worker_replaced(self, seconds: float) -> None:
        """Tell how long a slot whose worker had ended took no calls."""
        self._replacements.observe(seconds)

    def worker_ended(self, slot: str, reason: str) -> None:
        """Count the exit of a slot's process; the reason is empty where it is not to be replaced."""
        self._processes.settle()
        if reason:
            self._restarts.add(1, slot, reason)


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
        """A process was started, by that forkserver."""
        self._metrics.forkserver_runs(forkserver)
        self._metrics.worker_started(self._slot, pid)

    def ready(self) -> None:
        """Record that the worker takes calls."""
        self.up = True
        if self._lost_at is not None:
            self._metrics.worker_replaced(monotonic() - self._lost_at)
            self._lost_at = None

    def begins(self, kernel: str, now: float, calls: int, *, batch: bool) -> None:
        """Record the start of a run of `calls` calls. `batch` tells whether calls of this kernel may run together."""
        self._busy = (self.busy_seconds(), now, kernel)
        if batch:
            self._metrics.batched(kernel, calls)

    def waited(self, seconds: float) -> None:
        """Record the start of a call, and how long the call has waited."""
        self._metrics.waited(seconds)

    def ran(self, kernel: str, outcome: str) -> None:
        """Count a call that the worker has ended."""
        self._metrics.worker_ran(self._slot, kernel, outcome)

    def rests(self) -> None:
        """Record the end of a run."""
        self._busy = (self.busy_seconds(), None, "")

    def wasted(self, cpu_seconds: float) -> None:
        """Count processor seconds of a run whose callers had all left."""
        self._metrics.worker_wasted(self._slot, cpu_seconds)

    def ended(self, reason: str) -> None:
        """Record the exit of the worker."""
        if self.up:
            self._lost_at = monotonic()
        self.up = False
        self.memory_bytes = 0
        self._busy = (self.busy_seconds(), None, "")
        self._metrics.worker_ended(self._slot, reason)

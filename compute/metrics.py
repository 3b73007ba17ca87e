"""What the front reports. Its files tell what happened; this says under which names it is seen."""

from collections.abc import Callable, Iterator
from time import monotonic

from prometheus_client.metrics_core import CounterMetricFamily, Metric

from common.processes import ProcessWatch
from common.recorder import Recorder

FORKSERVER = "forkserver"


class ComputeMetrics:
    """The front's metrics. `queue_depth` is asked at each scrape."""

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
        recorder.gauge("unlatch_queue_depth", "Calls that wait for a worker.", read=lambda: float(queue_depth()))
        self._worker_calls = recorder.counter(
            "unlatch_worker_calls_total", "Calls that a worker ended.", ("worker", "kernel", "outcome")
        )
        self._restarts = recorder.counter(
            "unlatch_worker_restarts_total", "Workers that ended and were replaced.", ("worker", "reason")
        )
        self._workers: dict[str, WorkerMetrics] = {}
        recorder.gauge(
            "unlatch_worker_up",
            "Whether a worker process fills this slot and takes calls.",
            ("worker",),
            lambda: {(slot,): float(worker.up) for slot, worker in list(self._workers.items())},
        )

    def collect(self) -> Iterator[Metric]:
        """Busy seconds as they stand now, a run that is under way included: a prometheus_client collector."""
        busy = CounterMetricFamily(
            "unlatch_worker_busy_seconds_total", "How long a worker has run kernels, by the clock.", labels=("worker",)
        )
        for slot, worker in list(self._workers.items()):
            busy.add_metric((slot,), worker.busy_seconds())
        yield busy

    def call_ended(self, kernel: str, code: str) -> None:
        """A call has its answer, or needs none any more."""
        self._calls.add(1, kernel, code)

    def stages(self, kernel: str, transfer: float, queue: float, run: float, reply: float) -> None:
        """Where an answered call's time went, in seconds."""
        self._stages.observe(transfer, kernel, "transfer")
        self._stages.observe(queue, kernel, "queue")
        self._stages.observe(run, kernel, "run")
        self._stages.observe(reply, kernel, "reply")

    def waited(self, seconds: float) -> None:
        """A worker begins a call that has waited so long."""
        self._queue_wait.observe(seconds)

    def forkserver_runs(self, pid: int) -> None:
        """Whose child the next worker is. multiprocessing replaces a dead forkserver without a word."""
        if pid != self._forkserver:
            self._forkserver = pid
            self._processes.watch(FORKSERVER, pid)

    def worker(self, slot: int) -> "WorkerMetrics":
        """What a slot reports to."""
        worker = self._workers[str(slot)] = WorkerMetrics(self, str(slot))
        return worker

    def worker_ran(self, slot: str, kernel: str, outcome: str) -> None:
        """A worker has ended a call."""
        self._worker_calls.add(1, slot, kernel, outcome)

    def worker_started(self, slot: str, pid: int) -> None:
        """A new process fills a slot."""
        self._processes.watch(f"worker-{slot}", pid)

    def worker_ended(self, slot: str, reason: str) -> None:
        """The process in a slot is gone; a reason is given where it is to be replaced."""
        self._processes.settle()
        if reason:
            self._restarts.add(1, slot, reason)


class WorkerMetrics:
    """One slot's."""

    def __init__(self, metrics: ComputeMetrics, slot: str) -> None:
        self._metrics = metrics
        self._slot = slot
        # One reference, replaced whole, since a scrape reads it from its own thread: seconds before the present run,
        # and since when that run goes on.
        self._busy: tuple[float, float | None] = (0.0, None)
        self.up = False

    def busy_seconds(self) -> float:
        """How long this slot's workers have run kernels."""
        before, since = self._busy
        return before if since is None else before + max(0.0, monotonic() - since)

    def started(self, pid: int, forkserver: int) -> None:
        """A process was started, by that forkserver."""
        self._metrics.forkserver_runs(forkserver)
        self._metrics.worker_started(self._slot, pid)

    def ready(self) -> None:
        """It takes calls."""
        self.up = True

    def begins(self, now: float, waited: float) -> None:
        """It begins a call that has waited so long."""
        self._busy = (self.busy_seconds(), now)
        self._metrics.waited(waited)

    def ran(self, kernel: str, outcome: str) -> None:
        """It has ended the call that it ran."""
        self._busy = (self.busy_seconds(), None)
        self._metrics.worker_ran(self._slot, kernel, outcome)

    def ended(self, reason: str) -> None:
        """It is gone."""
        self.up = False
        self._busy = (self.busy_seconds(), None)
        self._metrics.worker_ended(self._slot, reason)

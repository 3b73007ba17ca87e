"""The gateway's metrics: other modules tell what happened, this one gives it names and labels."""

from collections.abc import Callable, Mapping
from functools import partial
from time import time

from unlatch.common.telemetry.components import CALL_SECONDS, QUEUE_DEPTH
from unlatch.common.telemetry.internal_errors import InternalErrors
from unlatch.common.telemetry.recorder import GaugeReader, Recorder
from unlatch.gateway.fleet.fleets import Fleets
from unlatch.gateway.fleet.replica import Replica
from unlatch.protos.unlatch_pb2 import Timings

# Prometheus' rate() does not see the first value of a series. So where it matters series exist before they count: for
# a kernel's calls, the codes that are not the caller's fault exist from its first call on.
_FAULTS = ("DEADLINE_EXCEEDED", "INTERNAL", "UNAVAILABLE")
_RETRIED = ("not_begun", "lost", "failed")
_NOT_RETRIED = ("not_pure", "attempts", "budget")

_OF_REPLICAS: tuple[tuple[str, str, Callable[[Replica], float]], ...] = (
    ("unlatch_replica_up", "Whether a replica takes calls.", lambda one: one.takes_calls),
    ("unlatch_replica_calls_in_flight", "This gateway's calls on a replica.", lambda one: one.window.calls),
    (
        "unlatch_replica_wait_seconds",
        "How long a new call would wait on a replica.",
        lambda one: one.window.wait_seconds(),
    ),
    (
        "unlatch_replica_utilization_ratio",
        "Share of a replica's workers busy recently.",
        lambda one: one.window.utilization,
    ),
    ("unlatch_replica_ejected", "Whether a replica gets no calls since it failed.", lambda one: one.ejection.ejected),
    ("unlatch_replica_heartbeat_age_seconds", "Seconds since a replica's last report.", lambda one: one.silent_seconds),
)


class GatewayMetrics:
    """Counters, histograms and gauges of the gateway. Calls in flight, fleet and tenants are read at each scrape."""

    def __init__(
        self,
        recorder: Recorder,
        errors: InternalErrors,
        live: Callable[[], int],
        fleets: Fleets,
        tenants_live: GaugeReader,
    ) -> None:
        self.errors = errors
        self._calls = recorder.counter(
            "unlatch_calls_total", "Calls that ended, by the status their caller got.", ("kernel", "code")
        )
        self._stages = recorder.histogram(
            "unlatch_call_seconds",
            CALL_SECONDS,
            ("kernel", "stage"),
        )
        # Calls and their seconds of run, by kernel and by how many calls shared a run.
        self._ran: dict[str, dict[int, tuple[int, float]]] = {}
        self._last = recorder.gauge(
            "unlatch_last_call_timestamp_seconds", "When a call of a kernel last ended, since the epoch.", ("kernel",)
        )
        recorder.gauge("unlatch_queue_depth", QUEUE_DEPTH, read=lambda: float(fleets.held))
        recorder.gauge("unlatch_calls_in_flight", "Calls that have not ended.", read=lambda: float(live()))
        self.retries = recorder.counter(
            "unlatch_retries_total",
            "Runs that were sent again: not begun by any worker, which is free; lost or failed, within the budget.",
            ("reason",),
        )
        self.retries_refused = recorder.counter(
            "unlatch_retries_refused_total",
            "Runs lost and not sent again: their kernel is not pure, the budget is spent, or there were many attempts.",
            ("reason",),
        )
        for why in _RETRIED:
            self.retries.labels(why)
        for why in _NOT_RETRIED:
            self.retries_refused.labels(why)
        self.coalesced_calls = recorder.counter(
            "unlatch_coalesced_calls_total", "Calls that shared the run of an identical one.", ("kernel",)
        )
        self._recorder = recorder
        for name, text, read in _OF_REPLICAS:
            # The series of a replica that has left the fleet goes with it.
            recorder.gauge(name, text, ("replica",), partial(_by_replica, fleets, read))
        self.tenant_calls = recorder.counter(
            "unlatch_tenant_calls_total", "A tenant's calls that ended, by their status.", ("tenant", "code")
        )
        self.tenant_run_seconds = recorder.counter(
            "unlatch_tenant_run_seconds_total", "Seconds that runs for a tenant have taken.", ("tenant",)
        )
        recorder.gauge(
            "unlatch_tenant_calls_in_flight", "A tenant's calls that have not ended.", ("tenant",), read=tenants_live
        )
        self.unauthenticated = recorder.counter(
            "unlatch_unauthenticated_total",
            "Callers that were refused because they could not be identified.",
            ("reason",),
        )
        self.lanes_refused = recorder.counter(
            "unlatch_lanes_refused_total", "Lanes of clients that were refused as they were opened.", ("code",)
        )
        # Exists before the first refusal, so that an alert sees that one too.
        self.lanes_refused.labels("RESOURCE_EXHAUSTED")
        rpc = ("grpc_type", "grpc_service", "grpc_method")
        self.rpcs_started = recorder.counter("grpc_server_started_total", "RPCs that began.", rpc)
        self.rpcs_handled = recorder.counter(
            "grpc_server_handled_total", "RPCs that ended, by status.", (*rpc, "grpc_code")
        )
        self.rpc_seconds = recorder.histogram("grpc_server_handling_seconds", "How long RPCs took.", rpc)

    def lanes(self, opened: Callable[[], float]) -> None:
        """Export how many lanes clients have open, as `opened` returns it at each scrape."""
        self._recorder.gauge("unlatch_lanes", "Lanes that clients have open.", read=opened)

    def retry_budget(self, left: Callable[[], float]) -> None:
        """Export how many retries there may be, as `left` returns it at each scrape."""
        self._recorder.gauge("unlatch_retry_budget", "Runs that had begun and may be sent again now.", read=left)

    def call_ended(self, kernel: str, code: str, seconds: float, timings: Timings | None) -> None:
        """Count a call that has its answer, or needs none any more."""
        if self._calls.seen(kernel, code) is None:
            for fault in _FAULTS:
                self._calls.labels(kernel, fault)
        self._calls.add(1, kernel, code)
        self._last.set(time(), kernel)
        self._stages.observe(seconds, kernel, "total" if code == "OK" else "failed")
        if timings is not None and code == "OK":
            queue, run = timings.queue / 1e6, timings.run / 1e6
            self._stages.observe(queue, kernel, "queue")
            self._stages.observe(run, kernel, "run")
            self._stages.observe(max(0.0, seconds - queue - run), kernel, "transfer")

    def ran(self, kernel: str, timings: Timings) -> None:
        """Count a call that a replica has run, alone or with others."""
        calls, total = self._ran.setdefault(kernel, {}).get(timings.batch, (0, 0.0))
        self._ran[kernel][timings.batch] = calls + 1, total + timings.run / 1e6

    def stage(self, kernel: str, stage: str) -> tuple[int, float]:
        """Return how many of a kernel's calls have been through a stage, and the seconds that they spent in it."""
        series = self._stages.seen(kernel, stage)
        return (sum(series.counts), series.sum) if series is not None else (0, 0.0)

    def runs(self, kernel: str) -> dict[int, tuple[int, float]]:
        """Return a kernel's runs and their seconds, by the number of calls that shared a run."""
        ran = self._ran.get(kernel, {})
        return {shared: (round(calls / shared), total / shared) for shared, (calls, total) in ran.items() if shared}

    def last_call_seconds(self, kernel: str) -> float:
        """Return when a call of a kernel last ended, in seconds since the epoch; 0 where none has."""
        series = self._last.seen(kernel)
        return series.value if series is not None else 0.0


def _by_replica(fleets: Fleets, read: Callable[[Replica], float]) -> Mapping[tuple[str, ...], float]:
    return {(one.target,): float(read(one)) for one in fleets.replicas()}

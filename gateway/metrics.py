"""What the gateway reports. Its files tell what happened; this says under which names it is seen."""

from collections.abc import Callable
from time import perf_counter
from typing import Any

import structlog

from common.errors import NAMES, UnlatchError, opaque
from common.recorder import Recorder
from common.rpc import Unary, abort
from protos.unlatch_pb2 import Timings

log = structlog.get_logger()


class GatewayMetrics:
    """The gateway's metrics. `held` and `live` are asked at each scrape."""

    def __init__(self, recorder: Recorder, held: Callable[[], int], live: Callable[[], int]) -> None:
        self._calls = recorder.counter(
            "unlatch_calls_total", "Calls that ended, by the status their caller got.", ("kernel", "code")
        )
        self._stages = recorder.histogram(
            "unlatch_call_seconds",
            "Where a call's time went: queue and run in the replica, transfer for all else, and the total.",
            ("kernel", "stage"),
        )
        recorder.gauge("unlatch_queue_depth", "Calls that fit no replica's window yet.", read=lambda: float(held()))
        recorder.gauge("unlatch_calls_in_flight", "Calls that have not ended.", read=lambda: float(live()))
        self._replica_up = recorder.gauge("unlatch_replica_up", "Whether a replica's lane is open.", ("replica",))
        rpc = ("grpc_type", "grpc_service", "grpc_method")
        self._started = recorder.counter("grpc_server_started_total", "RPCs that began.", rpc)
        self._handled = recorder.counter(
            "grpc_server_handled_total", "RPCs that ended, by status.", (*rpc, "grpc_code")
        )
        self._handling = recorder.histogram("grpc_server_handling_seconds", "How long RPCs took.", rpc)

    def call_ended(self, kernel: str, code: str, seconds: float, timings: Timings | None) -> None:
        """A call has its answer, or needs none any more."""
        self._calls.add(1, kernel, code)
        self._stages.observe(seconds, kernel, "total")
        if timings is not None:
            queue, run = timings.queue / 1e6, timings.run / 1e6
            self._stages.observe(queue, kernel, "queue")
            self._stages.observe(run, kernel, "run")
            self._stages.observe(max(0.0, seconds - queue - run), kernel, "transfer")

    def replica(self, target: str, *, up: bool) -> None:
        """A replica's lane is open, or is not."""
        self._replica_up.set(float(up), target)

    def measured(self, service: str, name: str, method: Unary) -> Unary:
        """A unary method that counts, and whose errors become statuses: only our own errors' text reaches a caller."""
        labels = ("unary", service, name)
        started, handling = self._started.labels(*labels), self._handling.labels(*labels)

        async def handle(request: bytes, context: Any) -> bytes:
            began = perf_counter()
            started.add()
            code = "CANCELLED"
            try:
                response = await method(request, context)
                code = "OK"
            except UnlatchError as error:
                code = NAMES.get(error.code, "UNKNOWN")
                await abort(context, error)
            except Exception as unexpected:
                told, identity = opaque(f"{name} failed")
                log.exception("unexpected error", method=name, id=identity, exc_info=unexpected)
                code = "INTERNAL"
                await abort(context, told)
            finally:
                self._handled.add(1, *labels, code)
                handling.observe(perf_counter() - began)
            return response

        return handle

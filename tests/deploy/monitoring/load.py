"""A mixed load for a gateway that authenticates callers: every way in which a call can end happens to some calls.

Each caller is a thread that repeats its round until the load ends, and pauses after each so that two cores are enough.
"""

import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np

from tests.deploy.monitoring import load_kernels
from tests.support.doors import request, vector
from tests.support.issuer import Issuer, bearer
from unlatch import TLS, BlockingClient
from unlatch.common.errors import Aborted, Unavailable
from unlatch.protos.inference_pb2 import ModelInferRequest

KERNELS = load_kernels.__file__
TENANTS = """
[tenants.research]

[tenants.planning]

[tenants.modest]
calls_per_second = 5
burst_calls = 1
"""
_PATIENT_SECONDS = 20.0
_METHOD = "/inference.GRPCInferenceService/ModelInfer"


@dataclass(frozen=True, kw_only=True)
class Door:
    """The gateway's address, and the credentials for it."""

    target: str
    authority: bytes
    tls: TLS
    issuer: Issuer


class Load:
    """A load that goes on inside a `with` block. At its end, no caller may have seen an unexpected outcome."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._ends = threading.Event()
        self._unexpected: list[BaseException] = []
        self._callers: tuple[tuple[float, Callable[[], None]], ...] = (
            (0.01, self._quick),
            (0.01, self._steady),
            (0.01, self._steady),
            (0.05, self._large),
            (0.05, self._alike),
            (0.05, self._together),
            (0.05, self._mapped),
            (0.1, self._wrong),
            (0.2, self._too_many),
            (0.2, self._late),
            (0.5, self._left),
        )
        self._threads = [
            threading.Thread(target=self._go, args=(number, pause, rounds), name=rounds.__name__, daemon=True)
            for number, (pause, rounds) in enumerate(self._callers)
        ]
        self.rounds: Counter[int] = Counter()

    @property
    def fewest_rounds(self) -> int:
        """The smallest number of rounds that any caller has done."""
        assert not self._unexpected, self._unexpected
        return min(self.rounds[number] for number in range(len(self._callers)))

    def __enter__(self) -> Self:
        credentials = grpc.ssl_channel_credentials(self._door.authority)
        self._channel = grpc.secure_channel(self._door.target, credentials)
        self._client = BlockingClient(
            self._door.target, tls=self._door.tls, token=lambda: self._door.issuer.token("planning")
        )
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ends.set()
        for thread in self._threads:
            thread.join(2 * _PATIENT_SECONDS)
        self._client.close()
        self._channel.close()
        if error is None:
            assert not self._unexpected, self._unexpected

    def _go(self, number: int, pause_seconds: float, go_round: Callable[[], None]) -> None:
        while not self._ends.wait(pause_seconds):
            try:
                go_round()
            except BaseException as unexpected:  # noqa: BLE001 (whatever it is, the test is to say it)
                self._unexpected.append(unexpected)
                return
            self.rounds[number] += 1

    # Rounds of the callers. ABORTED and UNAVAILABLE are always allowed, since workers and replicas are killed.

    def _quick(self) -> None:
        self._end({"OK"}, "research", vector("identity", *range(64)))

    def _steady(self) -> None:
        self._end({"OK"}, "research", _any_vector("simulate", seconds=0.02))

    def _large(self) -> None:
        image = np.random.default_rng().random((512, 512))
        self._end({"OK"}, "research", request("gaussian_blur", {"image": image}, sigma=2.0))

    def _alike(self) -> None:
        """Some identical calls at the same time."""
        self._end({"OK"}, "research", *[_any_vector("simulate", seconds=0.05)] * 4)

    def _together(self) -> None:
        """Some calls that may run as one."""
        rows = np.random.default_rng().random((8, 1, 16))
        self._end({"OK"}, "planning", *(request("score", {"x": row}) for row in rows))

    def _mapped(self) -> None:
        """Calls by `map`, on a lane."""
        with suppress(Aborted, Unavailable):
            for _ in self._client.map("simulate", np.random.default_rng().random((4, 8)), seconds=0.005):
                pass

    def _wrong(self) -> None:
        """Calls that end with an error of their caller or of their kernel."""
        self._end({"INVALID_ARGUMENT"}, "planning", request("identity", {"y": np.ones(2)}))
        self._end({"INVALID_ARGUMENT"}, "planning", vector("refuse", 1.0))
        self._end({"INTERNAL"}, "planning", vector("fail", 1.0))
        self._end({"NOT_FOUND"}, "planning", vector("no_such_kernel", 1.0))
        self._end({"UNAUTHENTICATED"}, "", vector("identity", 1.0))

    def _too_many(self) -> None:
        """More calls than the tenant may make."""
        self._end({"OK", "RESOURCE_EXHAUSTED"}, "modest", *[vector("identity", 1.0)] * 4)

    def _late(self) -> None:
        """A call that takes longer than its caller waits, and whose kernel does not react within its grace."""
        rpc = self._send("planning", _any_vector("record", seconds=1.0), 0.1)
        assert rpc.code().name in {"DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "ABORTED", "UNAVAILABLE"}

    def _left(self) -> None:
        """A call whose caller leaves, most likely while it runs."""
        rpc = self._send("planning", _any_vector("record", seconds=0.4), _PATIENT_SECONDS)
        self._ends.wait(0.2)
        rpc.cancel()

    def _end(self, codes: set[str], tenant: str, *messages: ModelInferRequest) -> None:
        """Make all calls at once; each ends with one of these codes."""
        for rpc in [self._send(tenant, message, _PATIENT_SECONDS) for message in messages]:
            assert rpc.code().name in codes | {"ABORTED", "UNAVAILABLE"}, rpc

    def _send(self, tenant: str, message: ModelInferRequest, timeout: float) -> Any:
        metadata = bearer(self._door.issuer.token(tenant)) if tenant else ()
        method: Any = self._channel.unary_unary(_METHOD)
        return method.future(message.SerializeToString(), timeout=timeout, metadata=metadata)


def _any_vector(kernel: str, **scalars: float) -> ModelInferRequest:
    """Make a vector that no other call has."""
    return vector(kernel, *np.random.default_rng().random(8), **scalars)

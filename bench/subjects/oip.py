"""The request bytes that all subjects get, and the expected content of replies."""

import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.processes import OUT
from bench.subjects import work
from unlatch.protos import inference_pb2 as pb

METHOD = "/inference.GRPCInferenceService/ModelInfer"
DATATYPES = {"float64": "FP64", "int64": "INT64"}
TARGET_SECONDS = 0.010


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A kernel with one input: the request's bytes, and the expected array."""

    name: str
    kernel: str
    argument: str
    array: np.ndarray[Any, Any] = field(repr=False)
    expected: np.ndarray[Any, Any] = field(repr=False)
    request_id: str = ""

    def request(self) -> bytes:
        tensor = pb.ModelInferRequest.InferInputTensor(
            name=self.argument, datatype=DATATYPES[self.array.dtype.name], shape=self.array.shape
        )
        message = pb.ModelInferRequest(
            model_name=self.kernel, id=self.request_id, inputs=[tensor], raw_input_contents=[self.array.tobytes()]
        )
        return message.SerializeToString()

    def body(self) -> Path:
        """A file with the request as one gRPC message: a flag byte, the length, the bytes."""
        request = self.request()
        path = OUT / "bodies" / f"{self.name}.grpc"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(struct.pack(">BI", 0, len(request)) + request)
        return path

    def wrong(self, reply: bytes) -> str | None:
        """The fault of a reply; None if it is right."""
        message = pb.ModelInferResponse.FromString(reply)
        if len(message.outputs) != 1 or len(message.raw_output_contents) != 1:
            return f"{self.name}: wanted one raw output, got {len(message.raw_output_contents)}"
        output = message.outputs[0]
        got = (output.datatype, tuple(output.shape), message.raw_output_contents[0])
        wanted = (DATATYPES[self.expected.dtype.name], self.expected.shape, self.expected.tobytes())
        return None if got == wanted else f"{self.name}: the reply's contents differ ({got[:2]} against {wanted[:2]})"


def works() -> dict[str, Work]:
    """Make all works, calibrated on this machine now. Inputs are small, so that transfers are not measured."""
    random = np.random.default_rng(7)
    spin_rounds = _calibrate(work.spin10, 300)
    loop_rounds = _calibrate(work.python_loop, 100_000)
    made = [
        _work("identity_1k", "identity", "x", lambda x: x, random.random(1024 // 8)),
        _work("identity_1m", "identity", "x", lambda x: x, random.random((1 << 20) // 8)),
        _work("spin10", "spin10", "rounds", work.spin10, np.array([spin_rounds])),
        _work("elementwise", "elementwise", "seed", work.elementwise, np.array([0.3])),
        _work("python_loop", "python_loop", "rounds", work.python_loop, np.array([loop_rounds])),
        _work("wait10", "wait10", "milliseconds", work.wait10, np.array([TARGET_SECONDS * 1e3])),
        _work("wait10_async", "wait10_async", "milliseconds", work.wait10, np.array([TARGET_SECONDS * 1e3])),
    ]
    return {item.name: item for item in made}


def _work(
    name: str, kernel: str, argument: str, function: Callable[[Any], np.ndarray[Any, Any]], array: np.ndarray[Any, Any]
) -> Work:
    return Work(name=name, kernel=kernel, argument=argument, array=array, expected=function(array))


def _calibrate(function: Callable[[Any], object], rounds: int) -> int:
    """The number of rounds that take TARGET_SECONDS of this thread's CPU time, by the best of several runs."""
    best = float("inf")
    for _ in range(12):
        start = time.thread_time()
        function(np.array([rounds]))
        best = min(best, time.thread_time() - start)
    return max(1, round(rounds * TARGET_SECONDS / best))

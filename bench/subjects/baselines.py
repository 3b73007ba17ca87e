"""The servers with which Unlatch is compared. They import nothing from Unlatch.

- `echo`: a bare grpc.aio server on uvloop that answers each request with its own bytes: the limit of grpcio here.
- `recipe`: the usual recipe at its best: generated stubs, tensors as bytes, a warm process pool, one service.
- `inline`, `threads`: the usual shortcuts: the kernel runs on the event loop or in a thread pool.

All of them serve grpc.health.v1 beside the calls, on the same loop.
"""

import argparse
import asyncio
import signal
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from typing import Any

import grpc.aio
import numpy as np
import uvloop
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from bench.subjects.pool_work import Tensor, run
from unlatch.protos import inference_pb2 as pb
from unlatch.protos import inference_pb2_grpc as pb_grpc

WORKERS = 2
THREADS = 32
Context = grpc.aio.ServicerContext[Any, Any]


def tensors_of(request: pb.ModelInferRequest) -> list[Tensor]:
    pairs = zip(request.inputs, request.raw_input_contents, strict=True)
    return [(tensor.datatype, tuple(tensor.shape), raw) for tensor, raw in pairs]


def reply_of(request: pb.ModelInferRequest, out: Tensor) -> pb.ModelInferResponse:
    datatype, shape, raw = out
    tensor = pb.ModelInferResponse.InferOutputTensor(name="output0", datatype=datatype, shape=shape)
    return pb.ModelInferResponse(model_name=request.model_name, outputs=[tensor], raw_output_contents=[raw])


class Recipe(pb_grpc.GRPCInferenceServiceServicer):
    """ModelInfer through an executor: a process pool (`recipe`) or a thread pool (`threads`)."""

    def __init__(self, executor: ProcessPoolExecutor | ThreadPoolExecutor) -> None:
        self._executor = executor
        self._loop = asyncio.get_running_loop()

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Context) -> pb.ModelInferResponse:
        out = await self._loop.run_in_executor(self._executor, run, request.model_name, tensors_of(request))
        return reply_of(request, out)


class Inline(pb_grpc.GRPCInferenceServiceServicer):
    """ModelInfer on the event loop itself. `awaited_wait` waits in the way of an async library."""

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Context) -> pb.ModelInferResponse:
        if request.model_name == "wait10" and request.id == "awaited":
            await asyncio.sleep(float(np.frombuffer(request.raw_input_contents[0], "<f8")[0]) / 1e3)
            return reply_of(request, ("FP64", (1,), request.raw_input_contents[0]))
        return reply_of(request, run(request.model_name, tensors_of(request)))


def add_echo(server: grpc.aio.Server) -> None:
    async def echo(request: bytes, context: Context) -> bytes:
        return request

    methods: dict[str, Any] = {"ModelInfer": grpc.unary_unary_rpc_method_handler(echo)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("inference.GRPCInferenceService", methods)])


def warm_pool() -> ProcessPoolExecutor:
    """Two processes, forked from a server that has NumPy and the kernels loaded, both up before the first call."""
    forkserver = get_context("forkserver")
    forkserver.set_forkserver_preload(["bench.subjects.pool_work"])
    pool = ProcessPoolExecutor(WORKERS, mp_context=forkserver)
    nap: Tensor = ("FP64", (1,), np.array([200.0]).tobytes())
    for warm in [pool.submit(run, "wait10", [nap]) for _ in range(WORKERS)]:
        warm.result()
    return pool


async def serve(kind: str, port: int) -> None:
    # The pool's forkserver starts before any gRPC object exists.
    executor = warm_pool() if kind == "recipe" else ThreadPoolExecutor(THREADS)
    server = grpc.aio.server(
        options=[
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
        ]
    )
    if kind == "echo":
        add_echo(server)
    else:
        # The stubs declare every RPC abstract; the load uses ModelInfer only.
        servicer = Inline() if kind == "inline" else Recipe(executor)  # type: ignore[abstract]
        pb_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    checks = health.aio.HealthServicer()
    await checks.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()
    await server.stop(0.2)
    executor.shutdown(wait=False, cancel_futures=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.subjects.baselines", description=__doc__)
    parser.add_argument("kind", choices=["echo", "recipe", "inline", "threads"])
    parser.add_argument("--port", type=int, required=True)
    args = parser.parse_args()
    uvloop.run(serve(args.kind, args.port))


if __name__ == "__main__":
    main()

"""The callers for the figures of the fleet, in a process of their own. JSON lines tell targets, number and duration.

They use the Open Inference Protocol, so that gRPC's own balancer can choose among several servers.
"""

import asyncio
import json
import sys
import time
from typing import Any

import grpc.aio
import numpy as np
import uvloop

from bench.subjects.oip import METHOD
from unlatch.protos import inference_pb2 as pb

VALUES = np.arange(16.0)
_ROUND_ROBIN = json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})


async def load(targets: list[str], callers: int, seconds: float) -> dict[str, Any]:
    """Measure calls a second and their p95 in milliseconds; each caller calls again when its last call is answered."""
    options = [("grpc.service_config", _ROUND_ROBIN), ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(f"ipv4:{','.join(targets)}", options=options) as channel:
        infer: Any = channel.unary_unary(METHOD)
        begin = time.monotonic() + seconds / 4
        end, taken = begin + seconds, list[float]()

        async def caller() -> None:
            while time.monotonic() < end:
                sent = time.monotonic()
                reply = pb.ModelInferResponse.FromString(await infer(REQUEST, timeout=30.0))
                if reply.raw_output_contents[0] != VALUES.tobytes():
                    raise AssertionError("a wrong answer")
                if begin <= (now := time.monotonic()) < end:
                    taken.append(now - sent)

        await asyncio.gather(*(caller() for _ in range(callers)))
    return {"per_second": len(taken) / seconds, "p95_ms": float(np.percentile(taken, 95)) * 1e3}


def _request() -> bytes:
    message = pb.ModelInferRequest(model_name="nap")
    message.inputs.add(name="x", datatype="FP64", shape=VALUES.shape)
    message.raw_input_contents.append(VALUES.tobytes())
    return message.SerializeToString()


REQUEST = _request()


async def answer() -> None:
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps(await load(**json.loads(line))), flush=True)


if __name__ == "__main__":
    uvloop.run(answer())

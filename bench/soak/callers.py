"""A process of the soak's callers. A JSON line tells how long to call; the answer tells how every call ended.

They use all interfaces at once: a Client's lane, a lane whose answers are counted, unary RPCs of the Open Inference
Protocol, and a counted lane directly to the dispatcher.
"""

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any, cast

import grpc.aio
import numpy as np
import uvloop

from bench.load.counted import Answers, CountedChannel
from bench.soak.calls import KINDS, LEFT, LULL_EVERY_SECONDS, LULL_SECONDS, OK, Array, Kind
from unlatch import Client
from unlatch.common.errors import NAMES, UnlatchError
from unlatch.link import Link
from unlatch.protos import inference_pb2 as pb
from unlatch.protos import inference_pb2_grpc as pb_grpc

CALLERS_A_DOOR = 8
# A call that takes this much longer than its own limit counts as never ended.
LATE_SECONDS = 3.0
NOISE_DOUBLES = 2 << 20
MAX_TOLD = 20
UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
DATATYPES = {"float64": "FP64", "int64": "INT64"}

# Calls a kernel with one array, within a number of seconds.
Door = Callable[[str, Array, float], Awaitable[Array]]


class Tally:
    """Counts of begun calls, by kind, and of how they ended."""

    def __init__(self) -> None:
        self.begun: Counter[str] = Counter()
        self.ended: Counter[tuple[str, str]] = Counter()
        self.wrong: list[str] = []

    def note(self, kind: Kind, x: Array, code: str, said: str | Array) -> None:
        """Count the end of a call."""
        self.ended[kind.name, code] += 1
        if (wrong := kind.wrong(x, code, said)) is not None:
            self.tell(wrong)

    def tell(self, wrong: str) -> None:
        if len(self.wrong) < MAX_TOLD:
            self.wrong.append(wrong)


async def caller(
    door: Door, random: np.random.Generator, noise: Array, tally: Tally, began: float, until: float
) -> None:
    """Make one call after another, of random kinds, except during lulls."""
    shares = np.array([kind.share for kind in KINDS])
    while (now := time.monotonic()) < until:
        left = LULL_EVERY_SECONDS - (now - began) % LULL_EVERY_SECONDS
        if left < LULL_SECONDS:
            await asyncio.sleep(left)
            continue
        kind = KINDS[random.choice(len(KINDS), p=shares / shares.sum())]
        x = kind.arguments(random, noise)
        patience = kind.seconds + LATE_SECONDS
        leaves = random.uniform(0.0, kind.leaves) if kind.leaves else patience
        tally.begun[kind.name] += 1
        tally.note(kind, x, *await ended(door, kind, x, leaves))


async def ended(door: Door, kind: Kind, x: Array, leaves: float) -> tuple[str, str | Array]:
    """The end of a call: its content, a failure's status and message, or its caller that left."""
    call = asyncio.ensure_future(door(kind.kernel, x, kind.seconds))
    await asyncio.wait((call,), timeout=leaves)
    if not call.done():
        call.cancel()
        if not kind.leaves:
            return "LOST", f"it has not ended {LATE_SECONDS:.0f} s after its limit"
    try:
        return OK, await call
    except asyncio.CancelledError:
        return LEFT, ""
    except UnlatchError as error:
        return NAMES[error.code], error.message
    except grpc.aio.AioRpcError as error:
        return error.code().name, error.details() or ""


async def client(target: str, stack: AsyncExitStack) -> Door:
    """Call on a Client's lane."""
    mesh = await stack.enter_async_context(Client(target))

    async def call(kernel: str, x: Array, seconds: float) -> Array:
        return cast("Array", await mesh.call(kernel, x, timeout=seconds))

    return call


@asynccontextmanager
async def linked(target: str) -> AsyncIterator[tuple[Link, list[Answers]]]:
    """Open a lane whose answers are counted."""
    async with grpc.aio.insecure_channel(target, options=UNLIMITED) as channel:
        counted = CountedChannel(channel)
        link = Link(cast("grpc.aio.Channel", counted), target)
        await link.ready(10.0)
        yield link, counted.answers
        await link.close()


def lane(link: Link) -> Door:
    """Make calls on such a lane, as a Client does."""

    async def call(kernel: str, x: Array, seconds: float) -> Array:
        await link.room()
        pending = link.begin(link.request(kernel, {}), (x,), seconds)
        try:
            return cast("Array", await pending.result)
        finally:
            pending.abandon()

    return call


async def unary(target: str, arguments: dict[str, str], stack: AsyncExitStack) -> Door:
    """Call by ModelInfer."""
    channel = await stack.enter_async_context(grpc.aio.insecure_channel(target, options=UNLIMITED))
    stub: Any = pb_grpc.GRPCInferenceServiceStub(channel)

    async def call(kernel: str, x: Array, seconds: float) -> Array:
        tensor = pb.ModelInferRequest.InferInputTensor(
            name=arguments[kernel], datatype=DATATYPES[x.dtype.name], shape=x.shape
        )
        request = pb.ModelInferRequest(model_name=kernel, inputs=[tensor], raw_input_contents=[x.tobytes()])
        reply = await stub.ModelInfer(request, timeout=seconds)
        (output,), (raw,) = reply.outputs, reply.raw_output_contents
        return np.frombuffer(raw, x.dtype).reshape(tuple(output.shape))

    return call


async def soak(gateway: str, dispatcher: str, began: float, seconds: float, seed: int) -> dict[str, Any]:
    """Call by every interface until the time is up and the last call has ended; lulls are timed from `began`."""
    async with AsyncExitStack() as stack:
        to_gateway, gateway_answers = await stack.enter_async_context(linked(gateway))
        to_dispatcher, dispatcher_answers = await stack.enter_async_context(linked(dispatcher))
        arguments = {name: spec.inputs[0].name for name, spec in to_gateway.kernels.items() if spec.inputs}
        doors = {
            "client": await client(gateway, stack),
            "lane": lane(to_gateway),
            "unary": await unary(gateway, arguments, stack),
            "dispatcher": lane(to_dispatcher),
        }
        tallies = {name: Tally() for name in doors}
        noise = np.random.default_rng(seed).random(NOISE_DOUBLES)
        await asyncio.gather(
            *(
                caller(door, np.random.default_rng((seed, number, at)), noise, tallies[name], began, began + seconds)
                for at, (name, door) in enumerate(doors.items())
                for number in range(CALLERS_A_DOOR)
            )
        )
        for name, answers in (("lane", gateway_answers), ("dispatcher", dispatcher_answers)):
            tally = tallies[name]
            tally.wrong += [wrong for counted in answers for wrong in counted.wrong]
            _count(tally, answers)
    return {
        name: {
            "begun": tally.begun,
            "ended": [[*key, count] for key, count in tally.ended.items()],
            "wrong": tally.wrong,
        }
        for name, tally in tallies.items()
    }


def _count(tally: Tally, answers: list[Answers]) -> None:
    """Compare the answers that came on a lane with the calls that ended with an answer."""
    # A caller's own limit ends its call, whether or not an answer comes in time.
    unsure = sum(count for (_, code), count in tally.ended.items() if code in (LEFT, "DEADLINE_EXCEEDED"))
    came, answered = sum(map(len, answers)), sum(tally.ended.values()) - unsure
    if not answered <= came <= answered + unsure:
        tally.tell(f"{came} calls were answered on a lane, but {answered} to {answered + unsure} ended with an answer")


async def _asked(gateway: str, dispatcher: str) -> None:
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps(await soak(gateway, dispatcher, **json.loads(line))), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.soak.callers", description=__doc__)
    parser.add_argument("--gateway", required=True)
    parser.add_argument("--dispatcher", required=True)
    args = parser.parse_args()
    with suppress(KeyboardInterrupt):
        uvloop.run(_asked(args.gateway, args.dispatcher))


if __name__ == "__main__":
    main()

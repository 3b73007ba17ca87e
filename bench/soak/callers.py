"""A process of the soak's callers. A JSON line tells how long to call; the answer tells how every call ended.

They use all interfaces at once: a Client's lane, a lane whose answers are counted, unary RPCs of the Open Inference
Protocol, and a counted lane directly to the dispatcher, if there is one. While units are killed, some open a connection
for each call.
"""

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import grpc.aio
import numpy as np
import uvloop

from bench.load.counted import Answers, CountedChannel
from bench.soak.calls import KINDS, LEFT, LULL_EVERY_SECONDS, LULL_SECONDS, OK, Array, Kind
from unlatch import Client
from unlatch.common.errors import NAMES, Unavailable, UnlatchError
from unlatch.link import Link
from unlatch.protos import inference_pb2 as pb
from unlatch.protos import inference_pb2_grpc as pb_grpc

CALLERS_A_DOOR = 8
# A call that takes this much longer than its own limit counts as never ended.
LATE_SECONDS = 1.0
NOISE_DOUBLES = 2 << 20
MAX_TOLD = 20
# A caller that opens a connection for each call takes more of the machine than others.
NEWCOMERS = 2
# Seconds that a caller waits after an UNAVAILABLE.
PAUSE_SECONDS = 0.05
# Else gRPC gives channels of one process to one address the same connection, and so the same unit.
OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]
UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1), *OWN_CONNECTION]
# As docs/clients.md tells callers: a large call is kept, and sent again if its connection ends by its age meanwhile.
KEEPS = [("grpc.per_rpc_retry_buffer_size", 64 << 20)]

# In the error of such a call where gRPC has not sent it again: the connection was reset before gRPC knew that it may.
AGED = "max_age"

# Calls a kernel with one array, within a number of seconds.
Door = Callable[[str, Array, float], Awaitable[Array]]


def datatype(x: Array) -> str:
    """The protocol's name of an array's dtype: FP64 for float64."""
    return str(x.dtype.name).upper().replace("FLOAT", "FP")


class Tally:
    """Counts of begun calls, by kind, and of how they ended. `units_die` says what may be their end."""

    def __init__(self, *, units_die: bool = False) -> None:
        self.units_die = units_die
        self.begun: Counter[str] = Counter()
        self.ended: Counter[tuple[str, str]] = Counter()
        self.wrong: list[str] = []

    def note(self, kind: Kind, x: Array, code: str, said: str | Array) -> None:
        """Count the end of a call."""
        self.ended[kind.name, code] += 1
        if (wrong := kind.wrong(x, code, said, units_die=self.units_die)) is not None:
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
        code, said = await ended(door, kind, x, leaves)
        tally.note(kind, x, code, said)
        if code == "UNAVAILABLE":
            await asyncio.sleep(PAUSE_SECONDS)


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
    mesh._options.extend(OWN_CONNECTION)  # noqa: SLF001 (a Client's user has no reason to want this)

    async def call(kernel: str, x: Array, seconds: float) -> Array:
        return cast("Array", await mesh.call(kernel, x, timeout=seconds))

    return call


class CountedLane:
    """A lane whose answers are counted, and another one when it has broken."""

    def __init__(self, target: str, stack: AsyncExitStack, *, units_die: bool) -> None:
        self.answers: list[Answers] = []
        self._target = target
        self._stack = stack
        self._units_die = units_die
        self._link: Link | None = None
        self._opening = asyncio.Lock()

    async def link(self) -> Link:
        """Return the lane, which is opened if there is none. Raises Unavailable."""
        async with self._opening:
            if self._link is None or self._link.broken:
                channel = await self._stack.enter_async_context(
                    grpc.aio.insecure_channel(self._target, options=UNLIMITED)
                )
                counted = CountedChannel(channel, self.answers, replicas_die=self._units_die)
                self._link = Link(cast("grpc.aio.Channel", counted), self._target)
                self._stack.push_async_callback(self._link.close)
                await self._link.ready(10.0)
            return self._link

    async def call(self, kernel: str, x: Array, seconds: float) -> Array:
        """Call as a Client does."""
        link = await self.link()
        pending = link.begin(link.request(kernel, {}, np.copy), (x,), seconds)
        try:
            return cast("Array", await pending.result)
        finally:
            pending.abandon()


def unary(channel: grpc.aio.Channel, arguments: dict[str, str]) -> Door:
    """Call by ModelInfer."""
    stub: Any = pb_grpc.GRPCInferenceServiceStub(channel)

    async def call(kernel: str, x: Array, seconds: float) -> Array:
        tensor = pb.ModelInferRequest.InferInputTensor(name=arguments[kernel], datatype=datatype(x), shape=x.shape)
        request = pb.ModelInferRequest(model_name=kernel, inputs=[tensor], raw_input_contents=[x.tobytes()])
        try:
            reply = await stub.ModelInfer(request, timeout=seconds)
        except grpc.aio.AioRpcError as error:
            # The connection ended by its age, and the call had not reached the gateway (docs/limits.md).
            if AGED not in (error.details() or ""):
                raise
            reply = await stub.ModelInfer(request, timeout=seconds)
        (output,), (raw,) = reply.outputs, reply.raw_output_contents
        return np.frombuffer(raw, x.dtype).reshape(tuple(output.shape))

    return call


def unary_channel(target: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(target, options=[*UNLIMITED, *KEEPS])


def newcomer(target: str, arguments: dict[str, str]) -> Door:
    """Call by ModelInfer, each time on a new connection."""

    async def call(kernel: str, x: Array, seconds: float) -> Array:
        async with unary_channel(target) as channel:
            return await unary(channel, arguments)(kernel, x, seconds)

    return call


@dataclass(frozen=True, slots=True, kw_only=True)
class Called:
    """The mesh that is called: its addresses, connections of each interface, and whether its units are killed."""

    gateway: str
    # Empty where none is to be called.
    dispatcher: str
    connections: int
    units_die: bool


async def soak(called: Called, began: float, seconds: float, seed: int) -> dict[str, Any]:
    """Call by every interface until the time is up and the last call has ended; lulls are timed from `began`."""
    async with AsyncExitStack() as stack:
        counted = partial(CountedLane, stack=stack, units_die=called.units_die)
        lanes = {"lane": [counted(called.gateway) for _ in range(called.connections)]}
        if called.dispatcher:
            lanes["dispatcher"] = [counted(called.dispatcher)]
        doors = await _doors(called, lanes, stack)
        tallies = {name: Tally(units_die=called.units_die) for name in doors}
        noise = np.random.default_rng(seed).random(NOISE_DOUBLES)
        await asyncio.gather(
            *(
                caller(
                    of_name[number % len(of_name)],
                    np.random.default_rng((seed, number, at)),
                    noise,
                    tallies[name],
                    began,
                    began + seconds,
                )
                for at, (name, of_name) in enumerate(doors.items())
                for number in range(NEWCOMERS if name == "newcomer" else CALLERS_A_DOOR)
            )
        )
        for name, of_name in lanes.items():
            answers = [one for lane in of_name for one in lane.answers]
            tallies[name].wrong += [wrong for one in answers for wrong in one.wrong]
            _count(tallies[name], answers)
    return {
        name: {
            "begun": tally.begun,
            "ended": [[*key, count] for key, count in tally.ended.items()],
            "wrong": tally.wrong,
        }
        for name, tally in tallies.items()
    }


async def _doors(called: Called, lanes: dict[str, list[CountedLane]], stack: AsyncExitStack) -> dict[str, list[Door]]:
    """The interfaces, by name: for each connection a way to call."""
    links = [await _opened(lane, called) for of_name in lanes.values() for lane in of_name]
    arguments = {name: spec.inputs[0].name for name, spec in links[0].kernels.items() if spec.inputs}
    channels = [await stack.enter_async_context(unary_channel(called.gateway)) for _ in range(called.connections)]
    doors = {
        "client": [await client(called.gateway, stack) for _ in range(called.connections)],
        "unary": [unary(channel, arguments) for channel in channels],
    }
    if called.units_die:
        doors["newcomer"] = [newcomer(called.gateway, arguments)]
    return doors | {name: [lane.call for lane in of_name] for name, of_name in lanes.items()}


async def _opened(lane: CountedLane, called: Called) -> Link:
    """Open a lane, again and again while units are killed: the system may give its connection to one that dies."""
    while True:
        try:
            return await lane.link()
        except Unavailable:
            if not called.units_die:
                raise
            await asyncio.sleep(PAUSE_SECONDS)


def _count(tally: Tally, answers: list[Answers]) -> None:
    """Compare the answers that came on a lane with the calls that ended with an answer."""
    # A caller's own limit ends its call, whether or not an answer comes in time; and so does a lane that breaks.
    by_itself = {LEFT, "DEADLINE_EXCEEDED"} | ({"UNAVAILABLE", "ABORTED"} if tally.units_die else set())
    unsure = sum(count for (_, code), count in tally.ended.items() if code in by_itself)
    came, answered = sum(map(len, answers)), sum(tally.ended.values()) - unsure
    if not answered <= came <= answered + unsure:
        tally.tell(f"{came} calls were answered on a lane, but {answered} to {answered + unsure} ended with an answer")


async def _asked(called: Called) -> None:
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps(await soak(called, **json.loads(line))), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.soak.callers", description=__doc__)
    parser.add_argument("--gateway", required=True)
    parser.add_argument("--dispatcher", default="")
    parser.add_argument("--connections", type=int, default=1, help="of each interface")
    parser.add_argument("--units-die", action="store_true")
    with suppress(KeyboardInterrupt):
        uvloop.run(_asked(Called(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()

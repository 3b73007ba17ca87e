"""The Python client against a real mesh: the arrays that come back, a map's calls in flight, and faults."""

import asyncio
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.mesh.faults.conftest import dispatcher_at, gateway_to
from tests.support.mesh import ROOT, Mesh, running_mesh
from tests.support.serve import START_SECONDS
from tests.support.watching import Gate, Scrape, until
from unlatch import BlockingClient, Client
from unlatch.common.errors import DeadlineExceeded, InvalidArgument, NotFound, UnlatchError

pytestmark = pytest.mark.asyncio(loop_scope="session")

X = np.arange(3.0)
KIBIBYTE = np.arange(128.0)
MEBIBYTE = np.arange(1 << 17, dtype="f8")
# This is far longer than any test: the tests are about ends that come before.
EVER = 600.0


def in_flight(mesh: Mesh) -> float:
    return Scrape(mesh.gateway_metrics).sum("unlatch_calls_in_flight")


def ended(mesh: Mesh, kernel: str, code: str) -> float:
    return Scrape(mesh.gateway_metrics).sum("unlatch_calls_total", kernel=kernel, code=code)


ARRAYS: dict[str, Any] = {
    "every second": np.arange(20.0)[::2],
    "backwards": np.arange(20.0)[::-1],
    "transposed": np.arange(20.0).reshape(4, 5).T,
    "broadcast": np.broadcast_to(np.arange(4.0), (3, 4)),
    "Fortran order": np.asfortranarray(np.arange(60.0).reshape(3, 4, 5)),
    "read-only": np.frombuffer(b"12345678"),
    "big-endian": np.arange(5, dtype=">f8"),
    "big-endian large": np.arange(100_000, dtype=">i4")[::3],
    "no axes": np.array(2.5),
    "NumPy scalar": np.float32(1.5),
    "empty": np.zeros(0),
    "empty axis": np.zeros((3, 0, 2), "i2"),
    "many axes": np.arange(16.0).reshape((2,) * 4 + (1,) * 28),
    "bool": np.array([True, False]),
    "half": np.arange(3, dtype="f2"),
    "unsigned": np.array([2**64 - 1], "u8"),
    "not a number": np.array([np.nan, -0.0, np.inf]),
    "complex": np.array([1 + 2j, 3 - 4j]),
    "complex64": np.array([[1 + 2j], [3 - 4j]], "c8"),
    "complex without axes": np.array(1j),
    "big-endian complex": np.array([1 + 2j], ">c16"),
    "datetime": np.array(["2026-01-01", "NaT"], "M8[ms]"),
    "datetime of nanoseconds": np.array("2026-01-01T00:00:00.000000001", "M8[ns]"),
    "timedelta": np.array([1, -1], "m8[s]"),
    "no datetimes": np.zeros((0, 2), "M8[D]"),
    "beside its frame": np.zeros(64 * 1024, "u1"),
    "in pieces": np.arange(64 * 1024 + 1, dtype="u1"),
    "several pieces": np.arange(3 << 17, dtype="f8"),
}
STRINGS: dict[str, Any] = {
    "str": np.array(["a", "größe", ""]),
    "bytes": np.array([b"a", b"bc"]),
    "objects": np.array([["x", b"y\x00"], ["z" * 1000, ""]], dtype=object),
    "no strings": np.zeros((0, 3), "U5"),
    "one string": np.array("one"),
    "many strings": np.array([str(number) for number in range(50_000)]),
}


@pytest.mark.parametrize("name", ARRAYS)
async def test_array_comes_back(client: Client, name: str) -> None:
    """Any array comes back with its shape and elements, its dtype in the machine's byte order, and writable."""
    x = np.asarray(ARRAYS[name])
    y = await client.echo(ARRAYS[name])
    assert y.dtype == x.dtype.newbyteorder("=")
    assert y.shape == x.shape
    assert y.tobytes() == x.astype(x.dtype.newbyteorder("=")).tobytes()
    assert y.flags.writeable
    assert y.flags.aligned


@pytest.mark.parametrize("name", STRINGS)
async def test_strings_come_back(client: Client, name: str) -> None:
    """Strings come back as the bytes of their UTF-8, in an array of objects."""
    x = STRINGS[name]
    y = await client.echo(x)
    expected = [text.encode() if isinstance(text, str) else bytes(text) for text in x.reshape(-1).tolist()]
    assert y.dtype == object
    assert y.shape == x.shape
    assert y.reshape(-1).tolist() == expected


async def test_lists_and_numbers_become_arrays(client: Client) -> None:
    """A list or a number gets the kernel's dtype."""
    np.testing.assert_array_equal(await client.dawdles([1, 2], seconds=0), np.array([1.0, 2.0]))
    assert await client.echo(3) == 3


async def test_outputs_have_names(client: Client) -> None:
    """Several outputs are a named tuple, by position and by name."""
    both = await client.twins(X)
    double, length = both
    np.testing.assert_array_equal(double, X * 2)
    assert type(both).__name__ == "twins"
    assert both._fields == ("double", "length")
    assert both.length == length == 3


async def test_large_array_among_small_ones(client: Client) -> None:
    """64 MiB go both ways while calls of 1 KiB pass on the same lane, and all results are right."""
    large = np.arange(8 << 20, dtype="f8")
    await client.echo(KIBIBYTE)
    call = asyncio.ensure_future(client.echo(large))
    waits = []
    for factor in itertools.count():
        began = time.monotonic()
        np.testing.assert_array_equal(await client.echo(KIBIBYTE * factor), KIBIBYTE * factor)
        waits.append(time.monotonic() - began)
        if call.done():
            break
    np.testing.assert_array_equal(await call, large)
    print(f"{len(waits)} small calls beside the large one, the slowest {max(waits) * 1e3:.1f} ms")
    assert len(waits) > 10


async def test_large_arrays_interleave(client: Client) -> None:
    """Many bodies in pieces at a time, of different kernels, come back unchanged."""
    calls = [client.echo(MEBIBYTE[: 1000 * number] + number) for number in range(1, 100)]
    for number, y in enumerate(await asyncio.gather(*calls), 1):
        np.testing.assert_array_equal(y, MEBIBYTE[: 1000 * number] + number)


async def test_two_clients_are_apart(faulty: Mesh, gate: Callable[[str], Gate]) -> None:
    """Two lanes use the same call numbers, and bodies, replies and cancels still reach their own calls."""
    async with Client(faulty.gateway, timeout=10.0) as one, Client(faulty.gateway, timeout=10.0) as other:
        await asyncio.gather(*(one.echo(X) for _ in range(5)))

        async def exchange(client: Client, sign: int) -> None:
            for size in (10, 10_000, 1 << 17):
                x = np.full(size, sign * size, "f8")
                np.testing.assert_array_equal(await client.echo(x), x)

        await asyncio.gather(*(exchange(client, sign) for client, sign in ((one, 1), (other, -1)) for _ in range(8)))
        for number in range(5):
            here = gate(str(number))
            left = asyncio.ensure_future(one.lingers(MEBIBYTE, seconds=EVER))
            kept = asyncio.ensure_future(other.waits(MEBIBYTE, gate=str(here)))
            await until(lambda: in_flight(faulty) == 2 and here.reached, "both are in flight")  # noqa: B023 (awaited)
            left.cancel()
            here.open()
            np.testing.assert_array_equal(await kept, MEBIBYTE)
        await until(lambda: in_flight(faulty) == 0, "nothing is in flight")


@pytest.mark.parametrize("size", [16, 100_000])
@pytest.mark.parametrize("order", ["in order", "as ready"])
async def test_map_gives_every_result(client: Client, order: str, size: int) -> None:
    """A map gives each item's result once, in the items' order or as they are ready."""
    items = [np.full(size, float(number)) for number in range(60)]
    seen = [y[0] async for y in client.map("echo", items, in_flight=16, ordered=order == "in order")]
    assert sorted(seen) == list(range(60))
    assert order == "as ready" or seen == sorted(seen)


async def test_unordered_map_does_not_wait_for_the_slowest(
    faulty: Mesh, client: Client, gate: Callable[[str], Gate]
) -> None:
    """As they are ready, only what its worker has staged waits for the slowest. In order, all wait for it."""
    items = [np.array([float(number)]) for number in range(10)]
    here = gate("as ready")
    as_ready = []
    async for y in client.map("waits_at_zero", items, ordered=False, gate=str(here)):
        as_ready.append(int(y[0]))
        if len(as_ready) == 8:
            assert 0 not in as_ready
            await until(lambda: here.reached, "the slowest has begun")
            here.open()
    assert sorted(as_ready) == list(range(10))
    here = gate("in order")
    results = aiter(client.map("waits_at_zero", items, gate=str(here)))
    first = asyncio.ensure_future(anext(results))
    await until(lambda: here.reached, "the slowest has begun")
    await until(lambda: in_flight(faulty) <= 2, "all are done but it and what is staged behind it")
    assert not first.done()
    here.open()
    assert [int(y[0]) for y in [await first, *[y async for y in results]]] == list(range(10))


@pytest.mark.parametrize("order", ["in order", "as ready"])
async def test_map_bounds_what_is_in_flight(
    faulty: Mesh, client: Client, gate: Callable[[str], Gate], order: str
) -> None:
    """At most `in_flight` calls run, so no more items are taken than that beyond the results given."""
    taken = given = 0

    def items() -> Iterator[np.ndarray[Any, Any]]:
        nonlocal taken
        for _ in range(30):
            taken += 1
            # The current item waits for its turn.
            assert taken - given <= 5 + 1
            yield X

    gates = [gate("one"), gate("two")]
    held = [asyncio.ensure_future(client.waits(X, gate=str(each))) for each in gates]
    await until(lambda: all(each.reached for each in gates), "both workers are held")
    results = aiter(client.map("dawdles", items(), in_flight=5, ordered=order == "in order", seconds=0.03))
    first = asyncio.ensure_future(anext(results))
    await until(lambda: in_flight(faulty) == len(held) + 5, "the map's calls wait")
    most = in_flight(faulty) - len(held)
    for each in gates:
        each.open()
    await asyncio.gather(first, *held)
    given += 1
    async for _ in results:
        given += 1
        most = max(most, in_flight(faulty))
    assert given == 30
    assert 1 <= most <= 5
    for wrong in (0, "5", None, 2.5):
        with pytest.raises(InvalidArgument, match="in_flight: wanted a whole number of at least 1") as refused:
            await anext(client.map("echo", [X], in_flight=wrong))  # type: ignore[arg-type]
        assert refused.value.field == "in_flight"


async def test_leaving_a_map_cancels_what_is_in_flight(faulty: Mesh, client: Client) -> None:
    """Leaving the loop over a map early leaves no call in flight, and the lane goes on."""
    before = ended(faulty, "lingers_as_told", "CANCELLED")
    items = [np.array([0.0]), *[np.array([EVER])] * 99]
    async for _ in client.map("lingers_as_told", items, in_flight=20):
        break
    await until(lambda: in_flight(faulty) == 0, "nothing is in flight")
    assert ended(faulty, "lingers_as_told", "CANCELLED") - before >= 10
    np.testing.assert_array_equal(await client.echo(MEBIBYTE), MEBIBYTE)


async def test_failure_ends_a_map(faulty: Mesh, client: Client) -> None:
    """The first call that fails ends the map with its error, after the results before it."""
    seen = []
    with pytest.raises(InvalidArgument, match="x: wanted"):  # noqa: PT012 (the loop is what raises)
        async for y in client.map("dawdles", [X, X, X.astype("c16"), X, X], in_flight=2, seconds=0.0):
            seen.append(y)  # noqa: PERF401 (a comprehension would lose what came before the failure)
    assert len(seen) == 2
    with pytest.raises(NotFound, match="did you mean echo"):
        async for _ in client.map("ecko", [X]):
            pass
    await until(lambda: in_flight(faulty) == 0, "nothing is in flight")


@pytest.mark.parametrize("x", [X, MEBIBYTE], ids=["small", "large"])
async def test_cancelled_call_leaves_the_lane_usable(faulty: Mesh, client: Client, x: Any) -> None:
    """A call that is cancelled at any moment is freed everywhere, and the next one is answered."""
    before = ended(faulty, "lingers", "CANCELLED")
    for _ in range(3):
        call = asyncio.ensure_future(client.lingers(x, seconds=EVER))
        await until(lambda: in_flight(faulty) == 1, "it is in flight")
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await until(lambda: in_flight(faulty) == 0, "it is not any more")
    assert ended(faulty, "lingers", "CANCELLED") - before == 3
    # At once: the call may not have been sent yet, or its body may be on its way.
    for turns in range(20):
        call = asyncio.ensure_future(client.echo(x))
        for _ in range(turns):
            await asyncio.sleep(0)
        call.cancel()
    np.testing.assert_array_equal(await client.echo(x), x)
    await until(lambda: in_flight(faulty) == 0, "nothing is in flight")


async def test_deadline_passes(faulty: Mesh, client: Client) -> None:
    """A call that takes longer than its time fails DEADLINE_EXCEEDED at that time, and the lane goes on."""
    began = time.monotonic()
    # Longer than runs take here: a call whose deadline is too near for its kernel's runs would be refused at once.
    with pytest.raises(DeadlineExceeded, match=r"dawdles did not answer within 1 s"):
        await client.dawdles(X, seconds=EVER, timeout=1.0)
    assert time.monotonic() - began > 0.99
    with pytest.raises(DeadlineExceeded):
        async for _ in client.map("dawdles", [X] * 4, seconds=EVER, timeout=1.0):
            pass
    np.testing.assert_array_equal(await client.echo(X), X)
    await until(lambda: in_flight(faulty) == 0, "nothing is in flight")


async def test_garbled_reply_fails_its_call_alone(client: Client) -> None:
    """A reply that only its reader can see to be wrong fails its own call, and not the client's lane."""
    other = asyncio.ensure_future(client.dawdles(X, seconds=0.2))
    with pytest.raises(UnlatchError):
        await client.garbles(X, timeout=2.0)
    np.testing.assert_array_equal(await other, X)


async def test_blocking_client_serves_many_threads(faulty: Mesh) -> None:
    """A single blocking client, called from many threads at a time, gives each its own result."""

    def work(mesh: BlockingClient, thread: int) -> None:
        for number in range(20):
            x = np.full(10 ** (number % 5), float(thread * 100 + number))
            np.testing.assert_array_equal(mesh.echo(x), x)
        seen = [int(y[0]) for y in mesh.map("echo", (np.full(4, float(item)) for item in range(150)), in_flight=8)]
        assert seen == list(range(150))
        for _ in mesh.map("dawdles", [X] * 50, seconds=0.01, in_flight=4):
            break

    def run() -> None:
        with BlockingClient(faulty.gateway, timeout=20.0) as mesh, ThreadPoolExecutor(8) as threads:
            list(threads.map(work, itertools.repeat(mesh), range(8)))
            with pytest.raises(NotFound):
                mesh.no_such_kernel(X)
            with pytest.raises(DeadlineExceeded):
                mesh.dawdles(X, seconds=EVER, timeout=1.0)
            assert "echo" in {kernel.name for kernel in mesh.kernels()}

    await asyncio.to_thread(run)
    await until(lambda: not any(thread.name == "unlatch-client" for thread in threading.enumerate()), "its thread ends")
    await until(lambda: in_flight(faulty) == 0, "nothing is in flight")


SCRIPTS = {
    "asyncio": """
        import asyncio, sys, numpy as np
        from unlatch import Client
        async def main():
            async with Client(sys.argv[1]) as mesh:
                await mesh.dawdles(np.ones(3), seconds=600.0)
        asyncio.run(main())
        """,
    "blocking": """
        import sys, numpy as np
        from unlatch import BlockingClient
        with BlockingClient(sys.argv[1]) as mesh:
            mesh.dawdles(np.ones(3), seconds=600.0)
        """,
    "blocking map": """
        import sys, numpy as np
        from unlatch import BlockingClient
        with BlockingClient(sys.argv[1]) as mesh:
            for _ in mesh.map("dawdles", [np.ones(3)] * 2, seconds=600.0):
                pass
        """,
}


@pytest.mark.timeout(150)
@pytest.mark.parametrize("how", [*SCRIPTS, "command line"])
async def test_interrupted_caller_leaves_nothing(faulty: Mesh, tmp_path: Path, how: str) -> None:
    """Ctrl-C ends a caller at once, and its call is cancelled at the gateway."""
    if how == "command line":
        command = ["-m", "unlatch", "call", "dawdles", "x=[1.0]", "seconds=600", "--server", faulty.gateway]
    else:
        script = tmp_path / "script.py"
        lines = SCRIPTS[how].split("\n")
        script.write_text("\n".join(line[8:] for line in lines))
        command = [str(script), faulty.gateway]
    caller = subprocess.Popen(  # noqa: ASYNC220 (it starts in a millisecond, and ends with this thread's test)
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        await until(lambda: in_flight(faulty) >= 1, "its call is in flight", START_SECONDS)
        caller.send_signal(signal.SIGINT)
        _, said = await asyncio.to_thread(caller.communicate, timeout=20)
        assert caller.returncode in (130, -signal.SIGINT), said
        assert b"never retrieved" not in said, said
        assert b"was destroyed" not in said, said
        await until(lambda: in_flight(faulty) == 0, "nothing is in flight")
    finally:
        caller.kill()
        caller.wait()


async def test_map_keeps_its_time_when_the_gateway_does_not(tmp_path: Path) -> None:
    """A map on a stopped gateway ends as a call does: after the given time, by the client's own clock."""
    with running_mesh(tmp_path) as mesh:
        async with Client(mesh.gateway) as stopped:
            await stopped.identity(X)
            os.kill(mesh.gateway_service.pid, signal.SIGSTOP)
            try:
                results = stopped.map("identity", itertools.repeat(X), timeout=0.3)
                with pytest.raises(DeadlineExceeded, match=r"0\.3 s"):
                    await asyncio.wait_for(anext(results), 5)
            finally:
                os.kill(mesh.gateway_service.pid, signal.SIGCONT)
            np.testing.assert_array_equal(await stopped.identity(X), X)


async def test_caller_who_tries_again_at_once_gets_through(tmp_path: Path) -> None:
    """A loop of failing calls sees the replica come back: each refusal lets the client notice it."""
    socket = tmp_path / "dispatcher.sock"
    with gateway_to(socket) as gateway, dispatcher_at(socket) as dispatcher:
        gateway.wait_for("replica is ready")
        async with Client(gateway.wait_for("serving")["listen"]) as impatient:
            await impatient.echo(X)
            dispatcher.kill()
            with dispatcher_at(socket):

                async def insist() -> Any:
                    while True:
                        with suppress(UnlatchError):
                            return await impatient.echo(X)

                np.testing.assert_array_equal(await asyncio.wait_for(insist(), 10), X)


async def test_client_of_nobody(client: Client) -> None:
    """A client without a gateway fails within its time, and works once there is one."""
    async with Client("127.0.0.1:1", timeout=0.5) as nobody:
        with pytest.raises(UnlatchError, match=r"127.0.0.1:1|did not answer"):
            await nobody.echo(X)
    np.testing.assert_array_equal(await client.echo(X), X)

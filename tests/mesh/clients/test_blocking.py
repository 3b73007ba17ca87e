"""The blocking client from any thread, process and generator: it works, or says at once why not and what to do."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from tests.support.mesh import ROOT, Mesh
from unlatch import BlockingClient, Client
from unlatch.common.errors import FailedPrecondition, InvalidArgument

X = np.arange(3.0)
# An answer that does not come at once would be a wait without a bound.
AT_ONCE_SECONDS = 5.0


@pytest.fixture
def client(mesh: Mesh) -> Iterator[BlockingClient]:
    """A blocking client of the shared mesh."""
    with BlockingClient(mesh.gateway, timeout=30) as opened:
        yield opened


def test_maps_may_be_nested(client: BlockingClient) -> None:
    """A map's items may be another map's results, of the same client."""
    items = (np.full(3, float(number)) for number in range(200))
    doubled = client.map("identity", client.map("identity", client.map("identity", items), in_flight=3), in_flight=100)
    assert [y[0] for y in doubled] == list(range(200))


@pytest.mark.parametrize("in_flight", [1, 64])
def test_items_may_call_kernels(client: BlockingClient, in_flight: int) -> None:
    """A generator of items may call the client itself; so may the loop over the results."""

    def items() -> Iterator[Any]:
        for number in range(50):
            yield client.identity(X + number)

    for number, y in enumerate(client.map("identity", items(), in_flight=in_flight)):
        np.testing.assert_array_equal(client.identity(y), X + number)


def test_items_are_taken_in_the_callers_thread(client: BlockingClient) -> None:
    """An item that is slow to come holds up no other call of the client."""
    release = threading.Event()

    def items() -> Iterator[Any]:
        yield X
        assert release.wait(20), "another call waited for this item"
        yield X + 1

    with ThreadPoolExecutor(1) as other:
        mapped = other.submit(list, client.map("identity", items()))
        np.testing.assert_array_equal(client.identity(X), X)
        release.set()
        assert [y[0] for y in mapped.result(20)] == [0, 1]


def test_an_error_of_the_items_ends_the_map(client: BlockingClient) -> None:
    """The caller gets the very error that the generator raised, and the client goes on."""

    def items() -> Iterator[Any]:
        yield X
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        list(client.map("identity", items()))
    np.testing.assert_array_equal(client.identity(X), X)


def test_a_closed_client_says_so(mesh: Mesh) -> None:
    """Whatever is called after `close` raises at once; closing twice is no error."""
    client = BlockingClient(mesh.gateway)
    results = client.map("identity", [X] * 100, in_flight=2)
    next(results)
    method = client.identity
    client.close()
    client.close()
    uses: list[Callable[[], object]] = [
        lambda: method(X),
        client.kernels,
        lambda: next(client.map("identity", [X])),
        lambda: list(results),
    ]
    for use in uses:
        began = time.monotonic()
        with pytest.raises(FailedPrecondition, match="closed; make another"):
            use()
        assert time.monotonic() - began < AT_ONCE_SECONDS
    assert "closed" in repr(client)
    BlockingClient(mesh.gateway).close()


async def test_a_closed_async_client_says_so(mesh: Mesh) -> None:
    """The async client does the same."""
    async with Client(mesh.gateway) as client:
        await client.identity(X)
    with pytest.raises(FailedPrecondition, match="closed; make another"):
        await client.identity(X)


def test_a_token_function_may_not_call_its_own_client(mesh: Mesh) -> None:
    """The client's own thread gets tokens: a call from there would wait for itself for ever."""
    refusals: list[str] = []

    def token() -> str:
        try:
            authenticated.identity(X)
        except FailedPrecondition as error:
            refusals.append(error.message)
        return "token"

    with BlockingClient(mesh.gateway, token=token, timeout=10) as authenticated:
        authenticated.identity(X)
    assert "own thread" in refusals[0]


FORKS = """
import os, sys
import numpy as np
from unlatch import BlockingClient

def in_child(what, work):
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            told = repr(work())
        except BaseException as error:
            told = f"{type(error).__name__}: {error}"
        os.write(writer, told.encode())
        os._exit(0)
    os.close(writer)
    print(what, os.read(reader, 10_000).decode(), sep=": ", flush=True)

x = np.arange(3.0)
early, client = BlockingClient(sys.argv[1], timeout=10), BlockingClient(sys.argv[1], timeout=10)
in_child("made before", lambda: early.identity(x).tolist())
client.identity(x)
results = client.map("identity", [x] * 100)
next(results)
in_child("call", lambda: client.identity(x))
in_child("kernels", client.kernels)
in_child("map", lambda: list(results))
in_child("other client", lambda: BlockingClient(sys.argv[1], timeout=10).identity(x))
in_child("made before, too", lambda: early.identity(x))
in_child("close", client.close)
print("parent:", len(list(results)))
"""


def test_a_forked_process_works_or_says_what_to_do(mesh: Mesh) -> None:
    """A client that no process has used works in a forked one. Once gRPC is used, a forked process is told at once."""
    began = time.monotonic()
    told = subprocess.run(
        [sys.executable, "-c", FORKS, mesh.gateway],
        env={**os.environ, "PYTHONPATH": str(ROOT), "GRPC_VERBOSITY": "NONE"},
        capture_output=True,
        text=True,
        timeout=40,
        check=True,
    )
    lines = dict(line.split(": ", 1) for line in told.stdout.splitlines())
    assert time.monotonic() - began < 20
    assert lines.pop("made before") == "[0.0, 1.0, 2.0]"
    assert lines.pop("parent") == "99"
    assert lines.pop("close") == "None"
    assert lines.keys() == {"call", "kernels", "map", "other client", "made before, too"}
    for line in lines.values():
        assert line.startswith("FailedPrecondition: gRPC was used before this process was forked"), line
        assert "make the first call after the fork" in line


def test_a_failed_item_has_its_number(client: BlockingClient) -> None:
    """The error of a map has the number of its item, and comes after the results before it."""
    for wrong in (np.arange(3) + 1j, np.zeros((2, 2)), [None], "a"):
        results = client.map("summarise", [X, X, wrong, X])
        assert [next(results).mean, next(results).mean] == [1, 1]
        with pytest.raises(InvalidArgument) as failed:
            next(results)
        assert failed.value.item == 2
        assert "item 2 of the map" in failed.value.__notes__

"""Looking around in a client shows kernels with docstring and signature, the state of the client, and versions."""

import asyncio
import inspect
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

import unlatch
from tests.support.mesh import ROOT, Mesh
from unlatch import BlockingClient, Client
from unlatch.common.errors import InvalidArgument, NotFound, Unauthenticated, UnlatchError

X = np.arange(3.0)


def test_a_blocking_client_shows_its_kernels(mesh: Mesh) -> None:
    """`dir`, `help` and a notebook's question mark know kernels without a call before."""
    with BlockingClient(mesh.gateway) as client:
        assert "not connected" in repr(client)
        assert {"gaussian_blur", "summarise", "map", "call"} <= set(dir(client))
        assert repr(client).startswith(f"<BlockingClient of {mesh.gateway}: connected, ")
        assert client.summarise.__doc__ == "Return two named outputs."
        assert client.summarise.__name__ == "summarise"
        signature = inspect.signature(client.matmul)
        assert list(signature.parameters) == ["a", "b", "timeout", "priority"]
        scalars = inspect.signature(client.default_scalars)
        assert scalars.parameters["count"].default == -3
        assert scalars.parameters["count"].kind is inspect.Parameter.KEYWORD_ONLY
        assert "float64[n]" in str(inspect.signature(client.summarise))
        assert client.no_such_kernel.__doc__ is None


def test_looking_around_does_not_wait_for_a_gateway() -> None:
    """Without a gateway the client's own methods are shown."""
    with BlockingClient("127.0.0.1:1") as client:
        assert "map" in dir(client)
        assert client.echo.__doc__ is None


async def test_an_async_client_shows_the_kernels_that_it_has_heard_of(mesh: Mesh) -> None:
    """Kernels are shown once it is connected, since it cannot wait in `dir`."""
    async with Client(mesh.gateway) as client:
        assert "summarise" not in dir(client)
        await client.identity(X)
        assert "summarise" in dir(client)
        assert client.summarise.__doc__ == "Return two named outputs."
        assert "connected" in repr(client)
    assert "closed" in repr(client)


def test_versions() -> None:
    """The package and the command tell the same version, and the package says that it is typed."""
    told = subprocess.run([sys.executable, "-m", "unlatch", "--version"], cwd=ROOT, capture_output=True, check=True)
    assert told.stdout.decode() == f"unlatch {unlatch.__version__}\n"
    assert "BlockingClient" in dir(unlatch)
    assert (ROOT / "unlatch" / "py.typed").is_file()


async def test_errors_of_the_client_itself_name_the_argument(mesh: Mesh) -> None:
    """Whatever is wrong with an argument is an UnlatchError, which names it, and the next call is served."""
    async with Client(mesh.gateway, timeout=30) as client:
        wrong: dict[str, list[Callable[[], Awaitable[Any]]]] = {
            "timeout": [
                lambda: client.identity(X, timeout=float("inf")),
                lambda: client.identity(X, timeout=float("nan")),
                lambda: client.identity(X, timeout="soon"),
                lambda: client.identity(X, timeout=-float("inf")),
                lambda: client.identity(X, timeout=10**5000),
                lambda: client.identity(X, timeout=-(10**400)),
                lambda: client.map("identity", [X], timeout=1e300).__anext__(),
            ],
            "x": [
                lambda: client.tripled([300]),
                lambda: client.identity(np.array(["a", None], dtype=object)),
                lambda: client.identity(np.array(["\ud800"])),
                lambda: client.identity(["a", "\ud800"]),
                lambda: client.identity(x=None),
            ],
            "label": [lambda: client.required_scalars(flag=True, count=1, ratio=1.0, label="\ud800")],
            "count": [
                lambda: client.required_scalars(flag=True, count=2**64, ratio=1.0, label=""),
                lambda: client.required_scalars(flag=True, count=[1], ratio=1.0, label=""),
                lambda: client.required_scalars(flag=True, count=10**5000, ratio=1.0, label=""),
            ],
            "in_flight": [lambda: client.map("identity", [X], in_flight=-(10**5000)).__anext__()],
            "\ud800": [lambda: client.required_scalars(**{"\ud800": 1})],
        }
        wrong["items"] = [lambda: client.map("identity", 5).__anext__()]  # type: ignore[arg-type]
        for field, calls in wrong.items():
            for call in calls:
                with pytest.raises(InvalidArgument) as refused:
                    await call()
                assert refused.value.field in (field, "?")
                # The name is known, so a similar name is no advice.
                assert "did you mean" not in refused.value.message
        for name in ("\ud800", 5, None, b"identity", ["identity"]):
            with pytest.raises(NotFound, match="there is no kernel"):
                await client.call(name)  # type: ignore[arg-type]
        np.testing.assert_array_equal(await client.identity(X), X)


@pytest.mark.parametrize(
    "target",
    [
        *(5, None, "127.0.0.1:8001\ud800", b"127.0.0.1:8001", ""),
        # gRPC would connect to port 1, or to 65535.
        *("127.0.0.1:65537", "localhost:-1", "[::1]:65537", "dns:///localhost:65537", "dns:localhost:65537"),
        *("ipv4:127.0.0.1:65537", "localhost:0"),
        # gRPC would look up a name that begins with the scheme.
        *("http://127.0.0.1:8001", "HTTPS://gateway.example", "grpc://localhost:8001"),
    ],
)
def test_targets_that_are_no_addresses(target: Any) -> None:
    """Both clients refuse them where they are made."""
    for kind in (Client, BlockingClient):
        with pytest.raises(InvalidArgument, match="target: wanted an address") as refused:
            kind(target)
        assert refused.value.field == "target"


async def test_a_scalar_may_have_the_name_of_a_parameter(mesh: Mesh) -> None:
    """The kernel's name and the items are given by position, so `name` and `items` are free."""
    async with Client(mesh.gateway) as client:
        with pytest.raises(UnlatchError, match="name: kernel identity has no such"):
            await client.identity(X, name="x")
        with pytest.raises(UnlatchError, match="items: kernel identity has no such"):
            async for _ in client.map("identity", [X], items=1):
                pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tls": "ca.crt"}, "tls: wanted a TLS, True or False, got 'ca.crt'"),
        ({"proxy": "http://proxy:3128"}, "proxy: wanted True, False or None, got 'http://proxy:3128'"),
        ({"token": b"secret"}, "token: wanted a text, or a function that returns one, got <class 'bytes'>"),
    ],
)
def test_options_of_a_wrong_type(options: Any, message: str) -> None:
    """Both clients refuse them where they are made, and name the option. A token is not shown."""
    for kind in (Client, BlockingClient):
        with pytest.raises(InvalidArgument) as refused:
            kind(**options)
        assert refused.value.message == message


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("secret\n", "the token has a line break, or another character that is not printable ASCII"),
        (lambda: "s\u00e9cret", "the token has a line break"),
        (lambda: asyncio.sleep(0, None), "no token: the function that returns it returned a NoneType"),
        (lambda: asyncio.sleep(0, b"secret"), "no token: the function that returns it returned a bytes"),
    ],
)
async def test_tokens_that_fit_no_header(token: Any, message: str) -> None:
    """A token from a file may have a line break. The error says so, and does not quote it."""
    async with Client("127.0.0.1:1", token=token) as client:
        with pytest.raises(Unauthenticated, match=message) as refused:
            await client.identity(X)
        assert "cret" not in str(refused.value)

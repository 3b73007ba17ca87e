"""The peers: how each is installed, started, asked once, and put under load."""

import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from subprocess import CalledProcessError, run

from bench.load.load import Load, load, load_http
from bench.processes import OUT, ROOT, BenchError, Process, free_port
from bench.subjects.oip import Work
from bench.subjects.subjects import Subject, await_ready, check

_UV = str(Path(sys.executable).with_name("uv"))
_START_SECONDS = 120.0
# What the work itself needs (bench/subjects/work.py).
_NEEDED = ("numpy", "jaxtyping")


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Another project's server: its packages, and whether it speaks plain HTTP or the protocol that Unlatch speaks."""

    name: str
    packages: tuple[str, ...]
    module: str
    http: bool
    flags: tuple[str, ...] = ()
    # The Python to use, in order of preference. The first one that exists is taken.
    pythons: tuple[str, ...] = (sys.executable,)


PEERS = (
    Peer(name="mosec", packages=("mosec==0.9.8",), module="mosec_server", http=True, flags=("--address", "127.0.0.1")),
    Peer(name="LitServe", packages=("litserve==0.2.19",), module="litserve_server", http=True),
    Peer(name="Ray Serve", packages=("ray[serve]==2.60.0",), module="ray_server", http=True),
    # Its workers ask for an event loop where none runs, which newer uvloops refuse.
    Peer(name="MLServer", packages=("mlserver==1.7.1", "uvloop<0.22"), module="mlserver_server", http=False),
    # Triton has a Python of its own inside, which is older than some standard libraries of 3.11: Debian's fits.
    Peer(
        name="PyTriton",
        packages=("nvidia-pytriton==0.7.0",),
        module="pytriton_server",
        http=False,
        pythons=("/usr/bin/python3.11", sys.executable),
    ),
)


def install(peer: Peer) -> Path:
    """Make the peer's environment, if it is not there yet; returns its interpreter. Raises BenchError."""
    environment = ROOT / ".peers" / peer.module.removesuffix("_server")
    python = environment / "bin" / "python"
    ready = environment / ".ready"
    wanted = "\n".join([*peer.packages, *_NEEDED])
    if ready.exists() and ready.read_text() == wanted:
        return python
    base = next(candidate for candidate in peer.pythons if Path(candidate).exists())
    for command in (
        ["venv", "--quiet", "--clear", "--python", base, str(environment)],
        ["pip", "install", "--quiet", "--python", str(python), *peer.packages, *_NEEDED],
    ):
        try:
            run([_UV, *command], check=True, capture_output=True, text=True)
        except CalledProcessError as error:
            raise BenchError(f"{peer.name} cannot be installed: {error.stderr.strip()[-400:]}") from None
    ready.write_text(wanted)
    return python


def start(stack: ExitStack, peer: Peer, works: Iterable[Work]) -> Subject:
    """Start the peer and wait until each work is answered. Raises BenchError with the end of its log."""
    python = install(peer)
    port = free_port()
    argv = [str(python), "-m", f"bench.peers.servers.{peer.module}", "--port", str(port), *peer.flags]
    # Some of them start helpers by name, from their environment.
    path = f"{python.parent}:/usr/local/bin:/usr/bin:/bin"
    process = stack.enter_context(Process(peer.module, argv, variables={"PATH": path, "VIRTUAL_ENV": ""}))
    subject = Subject(name=peer.name, process=process, port=port, health_port=port, metrics={})
    for work in works:
        await_ready(subject, work, check_http if peer.http else check, within_seconds=_START_SECONDS)
    return subject


def check_http(subject: Subject, work: Work) -> int:
    """Send one request over HTTP/1.1, check the reply, and return its length."""
    connection = HTTPConnection("127.0.0.1", subject.port, timeout=15.0)
    try:
        connection.request(
            "POST", f"/{work.kernel}", work.array.tobytes(), {"content-type": "application/octet-stream"}
        )
        reply = connection.getresponse()
        body = reply.read()
    except OSError as error:
        raise BenchError(str(error)) from None
    finally:
        connection.close()
    if (reply.status, body) != (200, work.expected.tobytes()):
        raise BenchError(f"{subject.name}: {work.name}: status {reply.status}, {body[:80]!r}")
    return len(body)


def loader(subject: Subject, work: Work, *, http: bool) -> Callable[[int, int], Load]:
    """Return a function that puts the subject under load: of a number of calls, so many in flight at a time."""
    if not http:
        size = check(subject, work)
        return lambda calls, in_flight: load(
            subject.port, work.body(), calls=calls, in_flight=in_flight, reply_bytes=size
        )
    size = check_http(subject, work)
    body = OUT / "bodies" / f"{work.name}.raw"
    body.parent.mkdir(parents=True, exist_ok=True)
    body.write_bytes(work.array.tobytes())
    path = f"/{work.kernel}"
    return lambda calls, in_flight: load_http(
        subject.port, path, body, calls=calls, in_flight=in_flight, reply_bytes=size
    )

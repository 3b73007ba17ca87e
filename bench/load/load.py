"""The load generator for all subjects: h2load, pinned to one core, with a fixed number of calls.

h2load counts only HTTP statuses, and a failed gRPC call is HTTP 200 too. But a failure carries no message. So the DATA
bytes received must be exactly those of as many good replies, and any difference counts as failed calls. This needs a
fixed number of calls (-n): with a duration, replies would be cut off at the end.
"""

import math
import re
import resource
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.processes import BenchError, environment, load_core
from bench.subjects.oip import METHOD

TIMEOUT_SECONDS = 90
MAX_CALLS = 400_000
# A flag and a length before each message of gRPC.
_FRAMING_BYTES = 5
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Results of one measured stretch."""

    calls: int
    failed_calls: int
    calls_per_second: float
    mean_ms: float
    max_ms: float
    generator_cpu_us_per_call: float


def require_h2load() -> None:
    missing = [tool for tool in ("h2load", "taskset", "setpriv") if shutil.which(tool) is None]
    if missing:
        raise BenchError(
            f"{', '.join(missing)} not found. The bench needs h2load (Debian and Ubuntu: apt install nghttp2-client) "
            "and util-linux's taskset and setpriv."
        )


def connections(in_flight: int) -> tuple[int, int]:
    """(connections, streams on each) for a number of calls in flight: up to 8 a connection, as with several clients."""
    clients = math.ceil(in_flight / 8)
    return clients, math.ceil(in_flight / clients)


def calls_for(seconds: float, rate: float, in_flight: int) -> int:
    """A number of calls, a multiple of `in_flight`, that takes about `seconds`."""
    return min(MAX_CALLS, max(2, round(seconds * rate / in_flight)) * in_flight)


def load(
    port: int,
    body: Path,
    *,
    calls: int,
    in_flight: int,
    reply_bytes: int,
    tls: bool = False,
    clients: int | None = None,
) -> Load:
    """Send `body` `calls` times, `in_flight` at a time; `reply_bytes` is the size of one good reply's message.

    `clients` is the number of connections, by default that of `connections`.
    """
    clients, streams = connections(in_flight) if clients is None else (clients, in_flight // clients)
    scheme = "https" if tls else "http"
    argv = ["-c", str(clients), "-m", str(streams), "-w", "24", "-W", "26"]
    argv += ["-H", "content-type: application/grpc", "-H", "te: trailers", f"{scheme}://127.0.0.1:{port}{METHOD}"]
    return _run(argv, body, calls=calls, reply_bytes=reply_bytes + _FRAMING_BYTES)


def load_http(port: int, path: str, body: Path, *, calls: int, in_flight: int, reply_bytes: int) -> Load:
    """Post `body` over HTTP/1.1, with a connection for each call in flight."""
    argv = ["--h1", "-c", str(in_flight), "-H", "content-type: application/octet-stream"]
    return _run([*argv, f"http://127.0.0.1:{port}{path}"], body, calls=calls, reply_bytes=reply_bytes)


def _run(arguments: Sequence[str], body: Path, *, calls: int, reply_bytes: int) -> Load:
    argv = ["taskset", "--cpu-list", str(load_core()), "h2load", "-t", "1", "-n", str(calls), "-d", str(body)]
    argv += arguments
    before = _children_cpu_seconds()
    try:
        ended = subprocess.run(
            argv, check=False, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, env=environment()
        )
    except subprocess.TimeoutExpired:
        raise BenchError(f"h2load did not finish {calls} calls of {body.name} in {TIMEOUT_SECONDS} s") from None
    if ended.returncode != 0:
        raise BenchError(f"h2load failed ({ended.returncode}): {ended.stderr or ended.stdout}")
    cpu = _children_cpu_seconds() - before
    return parse(ended.stdout, calls=calls, reply_bytes=reply_bytes, cpu_seconds=cpu)


def parse(output: str, *, calls: int, reply_bytes: int, cpu_seconds: float = 0.0) -> Load:
    """Parse h2load's report; `reply_bytes` includes the message's five bytes of framing."""
    rate = _find(r"finished in [^,]+, ([\d.]+) req/s", output)
    succeeded = int(_find(r"(\d+) succeeded", output))
    received = int(_find(r"\), [^\s]+ \((\d+)\) data", output))
    whole = min(succeeded, received // reply_bytes)
    times = re.search(r"time for request:\s+\S+\s+(\S+)\s+(\S+)", output)
    if times is None:
        raise BenchError(f"h2load's report has no request times:\n{output}")
    excess = received > calls * reply_bytes
    return Load(
        calls=calls,
        failed_calls=calls if excess else calls - whole,
        calls_per_second=rate,
        mean_ms=_milliseconds(times[2]),
        max_ms=_milliseconds(times[1]),
        generator_cpu_us_per_call=cpu_seconds / calls * 1e6,
    )


def _find(pattern: str, text: str) -> float:
    match = re.search(pattern, text)
    if match is None:
        raise BenchError(f"h2load's report has no {pattern!r}:\n{text}")
    return float(match[1])


def _milliseconds(duration: str) -> float:
    match = re.fullmatch(r"([\d.]+)(us|ms|s|m)", duration)
    if match is None:
        raise BenchError(f"h2load's duration {duration!r} is not understood")
    return float(match[1]) * _SECONDS[match[2]] * 1e3


def _children_cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime

"""The subjects: servers with a port for calls, a port for health checks, and a process tree to measure."""

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import grpc

from bench.processes import PYTHON, ROOT, BenchError, Child, Process, cores, free_port, label, labelled_cpu, tree
from bench.subjects.oip import METHOD, Work

UNLATCH = ROOT / ".venv" / "bin" / "unlatch"
START_SECONDS = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A running server. `metrics` has the ports of gateway and dispatcher, or of the unit, if there are any.

    `ca` is the authority of its certificate, if it speaks TLS.
    """

    name: str
    process: Process
    port: int
    health_port: int
    metrics: dict[str, int]
    ca: bytes = b""
    # Connections that the calls in flight are spread over, where it is not the usual number of them.
    connections: int | None = None

    def cpu(self) -> dict[str, float]:
        return labelled_cpu(self.process.pid)

    def pid(self, name: str) -> int:
        """The pid of the gateway, the dispatcher or the unit."""
        return self.pids(name)[0]

    def pids(self, name: str) -> list[int]:
        """The pids of the processes of one kind, such as all units."""
        return [pid for pid, found in label(tree(self.process.pid)).items() if found == name]

    def dispatcher_target(self) -> str:
        """The address of the dispatcher's lanes, from its command line. A unit has none."""
        command = next(seen.command for seen in tree(self.process.pid) if seen.pid == self.pid("dispatcher"))
        return command.partition("--listen=")[2].split()[0]


def start(
    stack: ExitStack,
    name: str,
    *,
    cpus: Iterable[int] | None = None,
    workers: int = 2,
    log: str = "",
    settings: Mapping[str, str] | None = None,
    connections: int | None = None,
) -> Subject:
    """Start `name`, with its whole tree bound to `cpus` if given; `stack` ends it.

    `unlatch` is a unit, `apart` is its two services in processes of their own. `settings` are Unlatch's, by the names
    of their variables.
    """
    bound = None if cpus is None else list(cpus)
    log = log or (name if bound is None else f"{name}-{len(bound)}-cores")
    port = free_port()
    if name not in ("unlatch", "apart"):
        argv = [PYTHON, "-m", "bench.subjects.baselines", name, "--port", str(port)]
        process = stack.enter_context(Process(log, argv, cpus=bound))
        return Subject(name=name, process=process, port=port, health_port=port, metrics={})
    if not UNLATCH.exists():
        raise BenchError(f"{UNLATCH} does not exist; `make setup` installs it")
    health = free_port()
    flags = ["--workers", str(workers), "--kernels", "bench/subjects/kernels.py"]
    ports = {part: free_port() for part in (("unit",) if name == "unlatch" else ("gateway", "dispatcher"))}
    if name == "unlatch":
        argv = [str(UNLATCH), "serve", "--listen", f"127.0.0.1:{port}", "--health-listen", f"127.0.0.1:{health}"]
        argv += ["--metrics-listen", f"127.0.0.1:{ports['unit']}", *flags]
    else:
        argv = [PYTHON, "-m", "bench.subjects.apart", "--port", str(port), "--health", str(health)]
        argv += ["--metrics", *map(str, ports.values()), "--", *flags]
    # The cost of calls is measured with identical calls, so these must not share runs.
    variables = {"UNLATCH_COALESCING": "false", **(settings or {})}
    process = stack.enter_context(Process(log, argv, cpus=bound, variables=variables))
    return Subject(name=name, process=process, port=port, health_port=health, metrics=ports, connections=connections)


def await_ready(
    subject: Subject,
    work: Work,
    ask: Callable[[Subject, Work], int] | None = None,
    *,
    within_seconds: float = START_SECONDS,
) -> None:
    """Wait until a first call, by `ask` or else by `check`, is answered. An error shows the end of the server's log."""
    deadline = time.monotonic() + within_seconds
    while True:
        try:
            (ask or check)(subject, work)
            return
        except (grpc.RpcError, BenchError) as error:
            ended = subject.process.child.poll()
            if ended is not None or time.monotonic() > deadline:
                state = f"ended with {ended}" if ended is not None else f"is not ready after {within_seconds:.0f} s"
                raise BenchError(f"{subject.name} {state}: {error}\n{subject.process.tail()}") from None
            time.sleep(0.1)


def check(subject: Subject, work: Work) -> int:
    """Send one request of the load generator, check the reply, and return the length of a good reply."""
    sent = work.request()
    options = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    with _channel(subject, options) as channel:
        infer: Any = channel.unary_unary(METHOD)
        replies = [bytes(infer(sent, timeout=15.0)) for _ in range(4)]
    for reply in replies:
        if subject.name == "echo":
            wrong = None if reply == sent else f"{work.name}: the echo differs from the request"
        else:
            wrong = work.wrong(reply)
        if wrong is not None:
            raise BenchError(f"{subject.name}: {wrong}")
    lengths = {len(reply) for reply in replies}
    if len(lengths) != 1:
        raise BenchError(f"{subject.name}: {work.name}: good replies differ in length, so failures can't be counted")
    return lengths.pop()


def _channel(subject: Subject, options: list[tuple[str, int]]) -> grpc.Channel:
    address = f"127.0.0.1:{subject.port}"
    if subject.ca:
        return grpc.secure_channel(address, grpc.ssl_channel_credentials(subject.ca), options=options)
    return grpc.insecure_channel(address, options=options)


class Bare:
    """Two processes without RPC, each calling the kernel's function in a loop: the limit of the cores."""

    def __init__(self, stack: ExitStack, count: int = 2) -> None:
        self._children = [
            stack.enter_context(Child(f"bare-{slot}", "bench.subjects.bare"))
            for slot in range(min(count, len(cores())))
        ]

    def run(self, work: Work, seconds: float) -> tuple[float, float]:
        """(calls a second of both together, CPU microseconds of a call)."""
        question = {"kernel": work.kernel, "input": work.array.tolist(), "seconds": seconds}
        for child in self._children:
            child.tell(**question)
        answers = [child.answer() for child in self._children]
        for answer in answers:
            if answer["output"] != work.expected.tolist():
                raise BenchError(f"bare: {work.name}: the result differs")
        rate = sum(answer["calls"] / answer["wall_seconds"] for answer in answers)
        cpu = sum(answer["cpu_seconds"] for answer in answers) / sum(answer["calls"] for answer in answers)
        return rate, cpu * 1e6

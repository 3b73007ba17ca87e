"""Ten thousand calls in flight at once: by either interface behind busy workers, and in one async worker."""

from collections.abc import Callable
from contextlib import ExitStack

from bench.bounds import Bound
from bench.processes import Child, load_core
from bench.responsive import lag_buckets, p99_seconds
from bench.subjects.oip import Work
from bench.subjects.subjects import Subject, await_ready, start

WORKERS = 2
# What is measured: the subject and its settings.
SERVERS: dict[str, tuple[str, dict[str, str]]] = {
    "unit": ("unlatch", {}),
    "units": ("unlatch", {"UNLATCH_UNITS": "2"}),
    "apart": ("apart", {}),
}
DOORS = ("protocol", "lane")
CASES = tuple(f"waiting_{server}_{door}" for server in SERVERS for door in DOORS)

ASYNC = "waiting_async"
# Long enough for all calls to arrive before the first one ends.
_WAIT_SECONDS = 15.0

BOUNDS = (
    *(
        Bound(name=f"{case}_{name}", at_most=at_most)
        for case in CASES
        for name, at_most in (
            ("kib_a_call", 40.0),
            ("loop_lag_p99_ms", 20.0),
            ("health_worst_ms", 50.0),
            ("failed", 0.0),
        )
    ),
    Bound(name=f"{ASYNC}_loop_lag_p99_ms", at_most=20.0),
    Bound(name=f"{ASYNC}_failed", at_most=0.0),
)

Figures = dict[str, float]


def measure(work: Work, *, calls: int, on_step: Callable[[str], None]) -> Figures:
    """For each server and interface: memory of a waiting call, loop lag, and the worst health check, each anew."""
    found: Figures = {}
    for server, (name, settings) in SERVERS.items():
        for door in DOORS:
            with ExitStack() as stack:
                on_step(f"waiting · {server} · {calls} calls by the {door}")
                log = f"waiting-{server}-{door}"
                subject = start(stack, name, workers=WORKERS, log=log, settings=settings)
                await_ready(subject, work)
                figures = _once(stack, subject, door, calls)
            found |= {f"waiting_{server}_{door}_{figure}": value for figure, value in figures.items()}
    on_step(f"waiting · {calls} coroutines in one async worker")
    with ExitStack() as stack:
        subject = start(stack, "unlatch", workers=WORKERS, log="waiting-async")
        await_ready(subject, work)
        found |= {f"{ASYNC}_{figure}": value for figure, value in _coroutines(stack, subject, calls).items()}
    return found


def _coroutines(stack: ExitStack, subject: Subject, calls: int) -> Figures:
    callers = stack.enter_context(Child("callers-waiting-async", "bench.waiting.coroutines", cpus=[load_core()]))
    gateway, metrics = f"127.0.0.1:{subject.port}", subject.metrics["unit"]
    found = callers.ask(gateway=gateway, metrics=metrics, calls=calls, seconds=_WAIT_SECONDS)
    return {
        "kib_a_call": found["bytes_a_call"] / 1024,
        "loop_lag_p99_ms": found["lag_p99_seconds"] * 1e3,
        "failed": float(found["failed"]),
        "most_in_flight": found["most_in_flight"],
    }


def _once(stack: ExitStack, subject: Subject, door: str, calls: int) -> Figures:
    serving = "gateway" if "gateway" in subject.metrics else "unit"
    metrics = subject.metrics[serving]
    probe = stack.enter_context(
        Child(f"probe-waiting-{door}", "bench.load.probe", "--health", f"127.0.0.1:{subject.health_port}")
    )
    callers = stack.enter_context(Child(f"callers-waiting-{door}", "bench.waiting.callers", cpus=[load_core()]))
    probe.ask(do="start")
    before = lag_buckets(metrics, serving)
    asked = {"door": door, "gateway": f"127.0.0.1:{subject.port}", "metrics": metrics, "calls": calls}
    found = callers.ask(**asked, pids=subject.pids(serving))
    lag = p99_seconds(before, lag_buckets(metrics, serving))
    health = probe.ask(do="stop")["health"]
    return {
        "kib_a_call": found["bytes_a_call"] / 1024,
        "loop_lag_p99_ms": (lag or 0.0) * 1e3,
        "health_worst_ms": health["max_ms"],
        # How late the checks themselves were sent, for which the gateway is not to blame.
        "probe_late_p99_ms": health["late_p99_ms"],
        "failed": float(found["failed"] + health["failed"]),
        "most_in_flight": found["most_in_flight"],
    }

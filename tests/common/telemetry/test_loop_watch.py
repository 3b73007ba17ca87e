"""Loop lag, stalls seen from outside, and lock contention, on real loops of both kinds and over real scrapes."""

import asyncio
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Coroutine
from pathlib import Path

import pytest
import uvloop
from prometheus_client.parser import text_string_to_metric_families

from unlatch.common.service.metrics_server import serve_metrics
from unlatch.common.telemetry.loop_watch import LoopWatch
from unlatch.common.telemetry.recorder import Recorder

pytestmark = pytest.mark.alone

Run = Callable[[Coroutine[None, None, None]], None]
LAG, STALLED = "unlatch_event_loop_lag_seconds", "unlatch_event_loop_stalled_seconds"
CONTENTION = "unlatch_gil_contention_ratio"


def fetched(address: str) -> dict[str, float]:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    assert all(sample.labels["process"] == "dispatcher" for sample in samples)
    return {sample.name + sample.labels.get("le", ""): sample.value for sample in samples}


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_lag_and_stall_are_seen(run: Run) -> None:
    """A loop held for 0.4 s shows as stalled to a scrape at that time, and later as one late tick in the histogram."""
    recorder = Recorder()
    address, close = serve_metrics("127.0.0.1:0", [recorder])
    during: list[float] = []

    def look() -> None:
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline and not during:
            stalled = fetched(address)[STALLED]
            if stalled > 0.1:
                during.append(stalled)

    async def main() -> None:
        with LoopWatch(recorder, "dispatcher"):
            await until(lambda: fetched(address)[LAG + "_count"] >= 3)
            begun = time.monotonic()
            before = fetched(address)
            looker = threading.Thread(target=look)
            looker.start()
            time.sleep(0.4)  # noqa: ASYNC251 (the stall itself)
            stalled = time.monotonic() - begun
            await until(lambda: fetched(address)[LAG + "_count"] > before[LAG + "_count"])
            looker.join()
            after = fetched(address)
        assert during
        assert 0.1 < during[0] < stalled
        late = after[LAG + "_bucket+Inf"] - after[LAG + "_bucket0.2"]
        assert late == before[LAG + "_bucket+Inf"] - before[LAG + "_bucket0.2"] + 1
        assert fetched(address)[STALLED] == 0  # From here on nothing is watched.

    try:
        run(main())
    finally:
        close()


def waited_seconds() -> float:
    """Read how long this thread has waited for a core. A system that does not tell has no waits."""
    file = Path("/proc/thread-self/schedstat")
    return int(file.read_text().split()[1]) / 1e9 if file.exists() else 0.0


def test_idle_loop_is_on_time() -> None:
    """The timer of an idle loop is as punctual as a sleeping thread, but for its waits for a core."""
    recorder = Recorder()
    overshoots: list[float] = []

    def sleep_beside() -> None:
        while len(overshoots) < 12:
            begun = time.monotonic()
            time.sleep(0.05)
            overshoots.append(time.monotonic() - begun - 0.05)

    async def main() -> None:
        with LoopWatch(recorder, "dispatcher"):
            await asyncio.to_thread(sleep_beside)

    waited = waited_seconds()
    uvloop.run(main())
    waited = waited_seconds() - waited
    (lag,) = (family for family in recorder.collect() if family.name == LAG)
    values = {sample.name: sample.value for sample in lag.samples}
    assert values[LAG + "_count"] >= 8
    mean = (values[LAG + "_sum"] - waited) / values[LAG + "_count"]
    assert mean < sum(overshoots) / len(overshoots) + 0.005


def test_lock_contention_is_seen() -> None:
    """Threads that compete for the interpreter lock raise the ratio well above that of a loop by itself."""
    recorder = Recorder()

    async def main() -> None:
        with LoopWatch(recorder, "dispatcher") as watch:
            await until(lambda: watch.gil_contention() > 0)
            alone = watch.gil_contention()
            stop = threading.Event()
            threads = [threading.Thread(target=spin, args=(stop,)) for _ in range(2)]
            for thread in threads:
                thread.start()
            try:
                await until(lambda: watch.gil_contention() > 0.2)
            finally:
                stop.set()
                for thread in threads:
                    thread.join()
            assert alone < 0.2

    def spin(stop: threading.Event) -> None:
        while not stop.is_set():
            sum(range(500))

    uvloop.run(main())


LEAVES_WITHOUT_CLOSING = """
import asyncio, sys
from unlatch.common.telemetry.loop_watch import LoopWatch
from unlatch.common.telemetry.recorder import Recorder

async def main():
    LoopWatch(Recorder(), "dispatcher").start()
    await asyncio.sleep(float(sys.argv[1]))
    raise SystemExit(7)

asyncio.run(main())
"""


@pytest.mark.parametrize("after", ["0", "0.16", "0.305"])
def test_process_that_does_not_close_still_exits(after: str) -> None:
    """A process that ends while gilknocker knocks exits with its own status; gilknocker by itself would abort it."""
    ended = subprocess.run(
        [sys.executable, "-c", LEAVES_WITHOUT_CLOSING, after], timeout=20, capture_output=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (7, b"")

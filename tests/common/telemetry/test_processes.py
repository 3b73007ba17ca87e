"""Processor time and memory of processes, held against the system's accounts: real processes, killed while working."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from unlatch.common.service.metrics_server import serve_metrics
from unlatch.common.telemetry.processes import ProcessWatch

pytestmark = pytest.mark.alone

CPU, RATIO = "unlatch_process_cpu_seconds_total", "unlatch_process_utilization_ratio"
CORE_WAIT = "unlatch_process_core_wait_seconds_total"
RESIDENT, FAULTS = "unlatch_process_resident_memory_bytes", "unlatch_process_page_faults_total"
TELLS_WAITS = Path("/proc/self/schedstat").exists()
needs_waits = pytest.mark.skipif(not TELLS_WAITS, reason="this system has no /proc/<pid>/schedstat")
SPINS = "while True: pass"
HALF_SPINS = """
import time
while True:
    end = time.monotonic() + 0.05
    while time.monotonic() < end: pass
    time.sleep(0.05)
"""
SLEEPS = "import time; time.sleep(60)"


def values(watch: ProcessWatch, name: str, process: str) -> dict[str, float]:
    """Return a process's values of one metric, by its other label ("" for none)."""
    found: dict[str, float] = {}
    for family in watch.collect():
        for sample in family.samples:
            if sample.name == name and sample.labels["process"] == process:
                found[next((v for k, v in sample.labels.items() if k != "process"), "")] = sample.value
    return found


def cpu(watch: ProcessWatch, process: str) -> float:
    """Return a process's user and system time, rounded as sums of fractions in binary are not exact."""
    return round(sum(values(watch, CPU, process).values()), 9)


def ratio(watch: ProcessWatch, process: str) -> float:
    return values(watch, RATIO, process)[""]


def system_seconds(pid: int) -> float:
    """Read a process's user and system time from /proc."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def state(pid: int) -> str:
    """Read whether a process runs (R), sleeps (S) or is stopped (T)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def waited_seconds(pid: int) -> float:
    """Read how long a process's first thread has waited for a core."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9


def idle_seconds() -> float:
    """Read the processor time that was idle since boot, all cores together."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()
    return (int(fields[4]) + int(fields[5])) / os.sysconf("SC_CLK_TCK")


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def elapse(seconds: float) -> None:
    """Let a measured window pass: here the time itself is what the test is about."""
    end = time.monotonic() + seconds
    until(lambda: time.monotonic() >= end, seconds + 1)


class Children:
    """Started interpreters, each killed and waited for by its own pid in the end."""

    def __init__(self) -> None:
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, code: str) -> subprocess.Popen[bytes]:
        self._started.append(subprocess.Popen([sys.executable, "-S", "-c", code]))
        return self._started[-1]

    def end(self) -> None:
        for child in self._started:
            child.kill()
            child.wait()


@pytest.fixture
def children() -> Iterator[Children]:
    started = Children()
    yield started
    started.end()


def test_utilization_agrees_with_the_system(children: Children) -> None:
    """The ratios of a busy, a half-busy and an idle process agree within 0.05 with /proc over the same time.

    If the machine had half a core to spare meanwhile, the busy process reads 0.95 to 1.0, less its waits for a core.
    """
    started = {"busy": children.start(SPINS), "half": children.start(HALF_SPINS), "idle": children.start(SLEEPS)}
    until(lambda: system_seconds(started["busy"].pid) > 0.1)
    with ProcessWatch() as watch:
        before = {}
        idle, waited = idle_seconds(), waited_seconds(started["busy"].pid)
        for name, child in started.items():
            watch.watch(name, child.pid)
            before[name] = (time.monotonic(), system_seconds(child.pid))
        elapse(3)
        measured = {name: ratio(watch, name) for name in started}
        for name, (wall, used) in before.items():
            expected = (system_seconds(started[name].pid) - used) / (time.monotonic() - wall)
            assert measured[name] == pytest.approx(expected, abs=0.05), name
        # What the busy and the half-busy process leave of all cores, less a tenth of a core for this test itself.
        if idle_seconds() - idle > 3 * ((os.cpu_count() or 1) - 1.5 - 0.1):
            waited = waited_seconds(started["busy"].pid) - waited
            assert 0.95 - waited / 3 <= measured["busy"] <= 1.005
        assert measured["idle"] < 0.05


def test_window_forgets_what_is_older(children: Children) -> None:
    """A process that was busy and is stopped reads 0 once the window has passed. Its memory and faults stay."""
    child = children.start(SPINS)
    with ProcessWatch(sample_seconds=0.1, window_seconds=0.6) as watch:
        watch.watch("gateway", child.pid)
        until(lambda: ratio(watch, "gateway") > 0.05)
        os.kill(child.pid, signal.SIGSTOP)
        until(lambda: ratio(watch, "gateway") == 0)
        assert values(watch, RESIDENT, "gateway")[""] > 2**20
        assert values(watch, FAULTS, "gateway")["minor"] > 100


@needs_waits
def test_what_does_not_run_waits_for_a_core(children: Children) -> None:
    """Two processes that want one core all the time each run or wait, and each waits at least a quarter of the time.

    On a machine that gives both the same share each waits half of the time. Running and waiting add up to the whole
    time, within a tenth.
    """
    core = min(os.sched_getaffinity(0))
    pair = [children.start(f"import os; os.sched_setaffinity(0, [{core}])\n{SPINS}") for _ in range(2)]
    for child in pair:
        until(lambda pid=child.pid: system_seconds(pid) > 0.1)  # type: ignore[misc]  # mypy cannot infer it
    with ProcessWatch() as watch:
        for number, child in enumerate(pair):
            watch.watch(f"worker-{number}", child.pid)

        def so_far(name: str) -> tuple[float, float, float]:
            return time.monotonic(), cpu(watch, name), values(watch, CORE_WAIT, name)[""]

        before = [so_far("worker-0"), so_far("worker-1")]
        elapse(3)
        for (wall, ran, waited), name in zip(before, ("worker-0", "worker-1"), strict=True):
            wall_now, ran_now, waited_now = so_far(name)
            assert ran_now - ran + waited_now - waited == pytest.approx(wall_now - wall, rel=0.1)
            assert waited_now - waited > (wall_now - wall) / 4


def test_replacement_goes_on_counting(children: Children) -> None:
    """When another process gets the name, no counter falls and no ratio leaves 0 to 1, however often they are read."""
    with ProcessWatch(sample_seconds=0.05) as watch:
        last = last_wait = 0.0
        for _ in range(4):
            child = children.start(SPINS)
            watch.watch("dispatcher", child.pid)
            until(lambda pid=child.pid: system_seconds(pid) > 0.15)  # type: ignore[misc]  # mypy cannot infer it
            for looked in range(40):
                if looked == 20:
                    child.kill()
                    child.wait()
                now, wait = cpu(watch, "dispatcher"), values(watch, CORE_WAIT, "dispatcher").get("", 0.0)
                assert now >= last
                assert wait >= last_wait
                last, last_wait = now, wait
                assert 0 <= ratio(watch, "dispatcher") <= 1.05
        assert last >= 4 * 0.15
        assert ratio(watch, "dispatcher") == 0
        assert values(watch, RESIDENT, "dispatcher")[""] == 0


def test_metrics_are_scraped_over_http() -> None:
    """A scrape has all metrics of this process, under its name, with help, and never a pid."""
    watch = ProcessWatch()
    watch.watch("gateway", os.getpid())
    address, close = serve_metrics("127.0.0.1:0", [watch])
    try:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
    finally:
        close()
    assert all(family.documentation for family in families)
    samples = {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}
    assert {name for name, *_ in samples} == {CPU, RATIO, RESIDENT, FAULTS} | ({CORE_WAIT} if TELLS_WAITS else set())
    used = sum(value for (name, *_), value in samples.items() if name == CPU)
    assert used == pytest.approx(time.process_time(), abs=0.1)
    assert not any(str(os.getpid()) in label for _, *labels in samples for label in labels)


# Workers of a real forkserver.


def burn_and_die(said: Connection, seconds: float) -> None:
    """Burn processor time by this process's own clock, report how much it was, and exit without another word."""
    while time.process_time() < seconds:
        sum(range(1000))
    said.send(time.process_time())
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for_ever() -> None:
    signal.pause()


def spin() -> None:
    while True:
        sum(range(1000))


def run_and_die(said: Connection, seconds: float) -> None:
    """Let a child burn the time, wait for it, and exit."""
    subprocess.run(
        [sys.executable, "-S", "-c", f"import time\nwhile time.process_time() < {seconds}: pass"], check=True
    )
    said.send(seconds + time.process_time())
    os.kill(os.getpid(), signal.SIGKILL)


def running_forkserver() -> int:
    """Return the forkserver's pid, and start it if there is none."""
    forkserver.ensure_running()
    pid: int = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]  # no public way
    return pid


class Pool:
    """Watched workers of the forkserver context. Each worker's own report of what it burned is kept."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.watch = ProcessWatch(reaper="forkserver", window_seconds=0.5)
        self.forkserver_pid = running_forkserver()
        self.watch.watch("forkserver", self.forkserver_pid)
        self.started: list[ForkServerProcess] = []

    def start(self, name: str, target: Callable[..., None], *args: float) -> Connection:
        listens, says = self.context.Pipe(duplex=False)
        worker = self.context.Process(target=target, args=(says, *args) if args else ())
        worker.start()
        says.close()
        assert worker.pid is not None
        self.watch.watch(name, worker.pid)
        self.started.append(worker)
        return listens

    def end(self) -> None:
        for worker in self.started:
            worker.kill()
            worker.join()


@pytest.fixture
def pool() -> Iterator[Pool]:
    made = Pool()
    yield made
    made.end()
    # A later test's forkserver must have that test's environment.
    forkserver._forkserver._stop()  # type: ignore[attr-defined]  # no public way


def test_killed_worker_is_counted_to_its_end(pool: Pool) -> None:
    """Workers of one name that burn seconds and are killed before anything reads them count for all they burned.

    Nothing samples between a worker's start and its end here, so all of it comes from the forkserver's own accounts.
    """
    said = 0.0
    for seconds in (0.3, 0.7, 0.5):
        listens = pool.start("worker-0", burn_and_die, seconds)
        said += listens.recv()
        pool.started[-1].join()
        assert cpu(pool.watch, "worker-0") == pytest.approx(said, abs=0.03)
    assert cpu(pool.watch, "forkserver") <= system_seconds(pool.forkserver_pid)


def test_sampled_worker_is_counted_to_its_end(pool: Pool) -> None:
    """The same holds with the sampling thread running, and no counter falls meanwhile."""
    with pool.watch:
        listens = pool.start("worker-0", burn_and_die, 1.3)
        last = 0.0
        while pool.started[-1].is_alive():
            now = cpu(pool.watch, "worker-0")
            assert now >= last
            last = now
        assert last > 0.5
        assert cpu(pool.watch, "worker-0") == pytest.approx(listens.recv(), abs=0.03)


def test_workers_that_die_together_share_what_is_known(pool: Pool) -> None:
    """Of two workers that die between readings the sum is right, and the busy one is given most of it."""
    pool.start("worker-0", spin)
    pool.start("worker-1", wait_for_ever)
    # Their cost of starting is older than the window: by their last readings one is busy and the other is not.
    until(lambda: ratio(pool.watch, "worker-0") > 0.1 and ratio(pool.watch, "worker-1") < 0.05, 30)
    before = cpu(pool.watch, "worker-0"), cpu(pool.watch, "worker-1")
    pids = [worker.pid or 0 for worker in pool.started]
    until(lambda: system_seconds(pids[0]) > before[0] + 0.4)
    # Stopped, because it would use more between this reading and its end.
    os.kill(pids[0], signal.SIGSTOP)
    until(lambda: state(pids[0]) == "T")
    used = sum(map(system_seconds, pids))
    pool.end()
    after = cpu(pool.watch, "worker-0"), cpu(pool.watch, "worker-1")
    assert sum(after) == pytest.approx(used, abs=0.06)
    assert 0 <= after[1] - before[1] < (after[0] - before[0]) / 2


def test_worker_counts_the_children_it_waited_for(pool: Pool) -> None:
    """A program that a kernel runs counts for its worker, both before and after the program's end."""
    listens = pool.start("worker-0", run_and_die, 0.4)
    said = listens.recv()
    pool.started[-1].join()
    assert cpu(pool.watch, "worker-0") == pytest.approx(said, abs=0.06)


def test_strays_are_nobodys(pool: Pool) -> None:
    """Time that other children of the forkserver burned is given to no worker."""
    listens, says = pool.context.Pipe(duplex=False)
    stray = pool.context.Process(target=burn_and_die, args=(says, 0.5))
    stray.start()
    pool.started.append(stray)
    listens.recv()
    stray.join()
    assert cpu(pool.watch, "forkserver") >= 0  # Read the accounts between the other child's end and the next worker's.
    listens = pool.start("worker-0", burn_and_die, 0.2)
    said = listens.recv()
    pool.started[-1].join()
    assert cpu(pool.watch, "worker-0") == pytest.approx(said, abs=0.03)


def test_replaced_forkserver_loses_nothing_already_read(pool: Pool) -> None:
    """When the forkserver itself dies, its workers keep their last reading, and the next one's workers are exact."""
    pool.start("worker-0", spin)
    until(lambda: cpu(pool.watch, "worker-0") > 0.3)
    read = cpu(pool.watch, "worker-0")
    orphan = pool.started.pop()
    assert orphan.pid is not None
    os.kill(pool.forkserver_pid, signal.SIGKILL)
    os.kill(orphan.pid, signal.SIGKILL)
    orphan.join()
    until(lambda: running_forkserver() != pool.forkserver_pid)
    pool.watch.watch("forkserver", running_forkserver())
    until(lambda: ratio(pool.watch, "worker-0") == 0)
    kept = cpu(pool.watch, "worker-0")
    assert read <= kept < read + 1
    said = pool.start("worker-0", burn_and_die, 0.4).recv()
    pool.started[-1].join()
    assert cpu(pool.watch, "worker-0") - kept == pytest.approx(said, abs=0.03)


def test_watch_that_is_dropped_leaves_no_descriptor() -> None:
    """A watch has files of each process open until the process has ended."""

    def opened() -> int:
        paths = (Path("/proc/self/fd", number) for number in os.listdir("/proc/self/fd"))
        return sum(os.path.lexists(path) and os.readlink(path).endswith("stat") for path in paths)

    gc.collect()
    before = opened()
    watch = ProcessWatch()
    for _ in range(3):
        watch.watch("this", os.getpid())
    assert opened() >= before + 3
    del watch
    # Its thread is a part of a cycle.
    gc.collect()
    assert opened() == before

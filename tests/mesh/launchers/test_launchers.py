"""The launchers of examples/launchers on real clusters of nodes on this machine: nodes join, are killed, and end."""

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest

from tests.mesh.launchers.launched import HERE, LAUNCHERS, WITHIN, addresses, all_ready, dispatchers, gateway_of, let_go
from tests.support.mesh import Service
from tests.support.watching import Gate, until, wait_until
from unlatch import Client
from unlatch.common.errors import Aborted

# The nodes of a cluster take seconds to start, and many more on a busy machine.
pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(280)]
DASK = Path(sys.executable).with_name("dask")
FIRST, SECOND = "127.0.0.2", "127.0.0.3"


class Cluster(Protocol):
    """A cluster whose first node runs. Each node grants two cores."""

    @property
    def launcher(self) -> Sequence[str]:
        """The launcher's script, and its flag for this cluster."""

    def add(self, host: str) -> None:
        """Start a node."""

    def kill(self, host: str) -> None:
        """Kill a node by SIGKILL, but not the processes that it has started."""

    def close(self) -> None:
        """End the cluster."""


class RayCluster:
    """A Ray cluster."""

    def __init__(self, directory: Path) -> None:
        environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": str(directory)}
        command = [sys.executable, str(HERE / "ray_nodes.py")]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.launcher = [str(LAUNCHERS / "on_ray.py"), "--cluster", self._line()]

    def add(self, host: str) -> None:
        self._tell(f"add {host}")

    def kill(self, host: str) -> None:
        self._tell(f"kill {host}")

    def close(self) -> None:
        assert self._process.stdin is not None
        with self._process:
            self._process.stdin.close()

    def _tell(self, command: str) -> None:
        assert self._process.stdin is not None
        print(command, file=self._process.stdin, flush=True)
        assert self._line() == "done"

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        assert line, "the cluster has ended"
        return line


class DaskCluster:
    """A Dask cluster. Each worker is a node."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._scheduler_file = str(directory / "scheduler.json")
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._start("scheduler", "scheduler", "--host", FIRST, "--port", "0")
        self.add(FIRST)
        self.launcher = [str(LAUNCHERS / "on_dask.py"), "--scheduler-file", self._scheduler_file]

    def add(self, host: str) -> None:
        # A nanny would start its worker again.
        log = self._start(host, "worker", "--host", host, "--nthreads", "2", "--memory-limit", "1GiB", "--no-nanny")
        wait_until(lambda: "established connection" in log.read_text(), f"{host} joins", within=WITHIN)

    def kill(self, host: str) -> None:
        self._processes[host].kill()
        self._processes[host].wait()

    def close(self) -> None:
        for host in self._processes:
            self.kill(host)

    def _start(self, name: str, *command: str) -> Path:
        """Start a process, and return the file with its log."""
        flags = ("--no-dashboard", "--scheduler-file", self._scheduler_file)
        log = self._directory / f"{name}.log"
        with log.open("wb") as written:
            self._processes[name] = subprocess.Popen([str(DASK), *command, *flags], stdout=written, stderr=written)
        return log


@pytest.mark.parametrize("engine", [RayCluster, DaskCluster])
async def test_nodes_join_and_are_killed(engine: Callable[[Path], Cluster], tmp_path: Path) -> None:
    """A node that joins takes calls. A killed one costs what a lost replica does. The launcher ends its replicas."""
    file, name = tmp_path / "replicas", str(tmp_path)
    gates = {kind: Gate(tmp_path / kind) for kind in ("first", "too", "pure", "once")}
    # Ray's sockets need a short path.
    with (
        tempfile.TemporaryDirectory(prefix="nodes", ignore_cleanup_errors=True) as directory,
        gateway_of(file) as door,
        closing(engine(Path(directory))) as cluster,
    ):
        script, *flags = cluster.launcher
        # On a busy machine a replica may be silent for seconds. Here no silence ends a lane, but its node's death.
        replicas = ("--kernels", str(HERE / "held_kernels.py"), "--drain-seconds", "1", "--report-seconds", "20")
        launcher = Service(script, str(file), *flags, *replicas, "--name", name, runner=(sys.executable,))
        with launcher:
            await all_ready(door, file, 1)
            address = door.wait_for("serving")["listen"]
            async with Client(address, timeout=2 * WITHIN) as client:

                async def held(kind: str, *, pure: bool) -> "asyncio.Future[np.ndarray]":
                    kernel = client.holds_pure if pure else client.holds_once
                    call = asyncio.ensure_future(kernel(gate=str(gates[kind])))
                    await until(lambda: gates[kind].reached, f"the call {kind} runs", within=WITHIN)
                    return call

                # Both workers of the first node are busy, so that what runs next runs on the second.
                calls = [await held("first", pure=True), await held("too", pure=True)]
                await asyncio.to_thread(cluster.add, SECOND)
                began = time.monotonic()
                await all_ready(door, file, 2)
                pure = await held("pure", pure=True)
                print(f"the node took a call {time.monotonic() - began:.1f} s after it had joined")
                once = await held("once", pure=False)
                assert len(dispatchers(name)) == 2

                await asyncio.to_thread(cluster.kill, SECOND)
                began = time.monotonic()
                with pytest.raises(Aborted, match="may have had an effect"):
                    await once
                await until(lambda: len(dispatchers(name)) == 1, "the killed node's replica is gone", within=WITHIN)
                left = {await let_go(call, gates[kind]) for kind, call in zip(gates, (*calls, pure), strict=False)}
                assert len(left) == 1
                await until(lambda: len(addresses(file)) == 1, "the file has one address", within=WITHIN)
                print(f"its address left the file {time.monotonic() - began:.1f} s after it was killed")
            launcher.stop()
        await until(lambda: not dispatchers(name), "no replica is left", within=WITHIN)
        door.stop()

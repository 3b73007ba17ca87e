"""Code that the launchers for Ray and Dask share: one replica, kept running on a node of an engine."""

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

_ARENA_BYTES = 2 << 30
_MAX_LINE_BYTES = 1 << 20


class Replica:
    """`unlatch compute` on this node, with the cores and the memory that the engine grants; started again if it ends.

    An engine counts what it grants, but enforces nothing. So the replica is told.
    """

    def __init__(self, host: str, cores: int, memory_bytes: int, flags: Sequence[str]) -> None:
        own = {"listen": f"[{host}]:0" if ":" in host else f"{host}:0", "workers": cores, "blas-threads": 1}
        own |= {"metrics-listen": "127.0.0.1:0", "health-listen": "127.0.0.1:0"}
        if memory_bytes:
            # A quarter is for replies, and for the service itself.
            own["input-arena-bytes"] = min(_ARENA_BYTES, memory_bytes // 4)
            own["worker-memory-bytes"] = memory_bytes // 2 // cores
        self._flags = [*(f"--{name}={value}" for name, value in own.items()), *flags]
        self._process: Process | None = None
        # The address of the replica while it serves.
        self.address = ""

    async def run(self) -> None:
        """Keep the replica running until this task is cancelled. Its log goes to this process's stderr."""
        # The system kills the replica when this process ends, however that happens.
        environment = {**os.environ, "UNLATCH_SUPERVISOR": str(os.getpid())}
        command = (sys.executable, "-m", "unlatch", "compute", *self._flags)
        while True:
            self._process = process = await asyncio.create_subprocess_exec(
                *command, stderr=PIPE, env=environment, limit=_MAX_LINE_BYTES
            )
            assert process.stderr is not None
            async for line in process.stderr:
                print(line.decode(errors="replace"), end="", file=sys.stderr, flush=True)
                with suppress(ValueError, KeyError, TypeError):
                    entry = json.loads(line)
                    self.address = entry["listen"] if entry["event"] == "serving" else self.address
            self.address = ""
            await asyncio.sleep(1.0)

    async def stop(self) -> None:
        """Let the replica answer its calls and end."""
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()
            await self._process.wait()


def write(file: Path, addresses: Iterable[str]) -> None:
    """Make these addresses the content of the file that `unlatch gateway --replicas file:…` watches."""
    content = "".join(f"{address}\n" for address in sorted(addresses))
    if not file.exists() or file.read_text() != content:
        new = file.with_name(f"{file.name}.new")
        new.write_text(content)
        new.replace(file)

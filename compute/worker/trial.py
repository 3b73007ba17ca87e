"""Kernel modules, loaded for a trial as a worker's forkserver loads them, in a process with no other purpose.

    python -m unlatch.compute.worker.trial PARENT-PID my_kernels.py other.module   ──> a Trial in msgpack on stdout

A process that is about to serve modules learns what they contain, or why they cannot be served, without any risk to
itself. It calls `tried`, with the interpreter that its workers run.
"""

import asyncio
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

import msgspec

from unlatch.common.kernel.spec import KernelSpec
from unlatch.common.service.early import die_with_parent
from unlatch.compute.worker.catalogue import LoadedKernels, LoadError, imported, is_installed, kernels_in, load
from unlatch.compute.worker.interpreter import ask, not_run
from unlatch.declaration import place_of


class TriedKernel(msgspec.Struct, frozen=True):
    """A kernel and the place where it is defined."""

    spec: KernelSpec
    place: str


class TriedModule(msgspec.Struct, frozen=True):
    """The trial of one module. `failure` names file and line, and is empty for a module that can be loaded."""

    name: str
    kernels: list[TriedKernel]
    import_seconds: float
    threads: list[str]
    failure: str = ""

    @property
    def unservable(self) -> str:
        """Why a service with this module would not start; empty if it would."""
        return self.failure or ("" if self.kernels else f"{self.name}: declares no kernel")


class Trial(msgspec.Struct, frozen=True):
    """The trial of several modules, in order, and the files that were imported for them, but for installed ones."""

    modules: list[TriedModule]
    files: list[str]

    @property
    def failure(self) -> str:
        """Why the modules cannot be served; empty if they can."""
        return next(filter(None, (module.unservable for module in self.modules)), "")


async def tried(names: Sequence[str], *, within_seconds: float, memory_bytes: int, python: str = "") -> Trial:
    """Load modules in a process with limited time and memory. If it dies, that is the first module's failure.

    `python` is the interpreter of that process, or "" for this one. One that cannot run workers is a failure, too.
    """
    try:
        child = await asyncio.create_subprocess_exec(
            *(python or sys.executable, "-m", "unlatch.compute.worker.trial", str(os.getpid()), *names),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            # A session of its own, so that processes which a module starts can be killed with it.
            start_new_session=True,
        )
    except OSError as error:
        if not python:
            raise
        return _failed(names, not_run(python, error))
    try:
        with suppress(ProcessLookupError):
            resource.prlimit(child.pid, resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
        async with asyncio.timeout(within_seconds):
            answer, _ = await child.communicate()
        return msgspec.msgpack.decode(answer, type=Trial)
    except TimeoutError:
        failure = f"the import did not end within {within_seconds:g} s"
    except msgspec.DecodeError:
        why = await ask(python) if python else ""
        failure = why or f"the import ended the process, with code {child.returncode}"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        await child.wait()
    return _failed(names, failure)


def _failed(names: Sequence[str], why: str) -> Trial:
    return Trial([TriedModule(names[0], [], 0.0, [], f"{', '.join(names)}: {why}")], [])


def attempt(names: Sequence[str]) -> Trial:
    """Load modules beside Unlatch's own kernels. A module that fails does not keep the next from being tried."""
    catalogue = load(())  # imports NumPy too, so that its time is not added to a module's
    known = set(sys.modules)
    modules = [_attempt(catalogue, name) for name in names]
    files = (getattr(sys.modules[name], "__file__", None) for name in sys.modules.keys() - known)
    return Trial(modules, sorted(os.path.realpath(file) for file in files if file and not is_installed(file)))


def _attempt(catalogue: LoadedKernels, name: str) -> TriedModule:
    began = time.perf_counter()
    threads = set(threading.enumerate())
    try:
        module = imported(name)
        seconds = time.perf_counter() - began
        catalogue.add(module)
    except LoadError as error:
        return TriedModule(name, [], time.perf_counter() - began, [], str(error))
    started = [thread.name for thread in threading.enumerate() if thread not in threads]
    found = {spec.name: TriedKernel(spec, place_of(function)) for function, spec in kernels_in(module)}
    return TriedModule(name, list(found.values()), seconds, started)


def main(parent: str, *names: str) -> None:
    """Try modules for a parent process. Only the answer is written to stdout."""
    die_with_parent(int(parent))
    answer = os.dup(1)
    # Output of a module's import goes to stderr, as under the service.
    os.dup2(2, 1)
    with open(answer, "wb") as stdout:  # noqa: PTH123 (a descriptor has no path)
        stdout.write(msgspec.msgpack.encode(attempt(names)))
    sys.stdout.flush()
    # _exit, which also ends threads that a module has left running.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])

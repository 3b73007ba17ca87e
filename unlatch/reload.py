"""`unlatch serve --reload`: when a kernel's file changes, replace the replica by one that has the change.

    a file changes ──> compute.worker.trial, in a process of its own
                         does not load ──> file and line in the log; the running replica stays
                         loads         ──> the replica drains, ends, and another one starts; the gateway stays

The gateway tells its clients what is served now. Between the old replica and the new one, for a second or so, calls
wait in the gateway. Calls that still run when the drain time is over fail: this is for development.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import structlog

from unlatch.common.net.settings import MiB
from unlatch.common.security.files import FileState, file_state
from unlatch.compute.worker.trial import Trial, tried

log = structlog.get_logger()

_IMPORT_SECONDS = 60.0
_IMPORT_BYTES = 8192 * MiB
# The state of some fifty files is read in less than a millisecond. An editor writes a file in several steps: changes
# count as one until a look finds no other.
_LOOK_SECONDS = 0.2


class Reload:
    """Replaces the replica when files of the modules change. `replace` starts a new replica in the old one's place.

    `python` is the interpreter of the workers, or "" for this one.
    """

    def __init__(self, modules: Sequence[str], replace: Callable[[], Awaitable[object]], *, python: str = "") -> None:
        self._python = python
        self._replace = replace
        self._files = {os.path.realpath(module) for module in modules if module.endswith(".py")}
        self._modules = modules
        self._states: dict[str, FileState | None] = {}
        # Until a trial succeeds, any file may concern the modules.
        self._failed = True

    def look(self) -> set[str]:
        """The files that have changed since the last look. Look before the replica starts, so that none is missed."""
        states = {path: file_state(path) for path in self._watched()}
        changed = {path for path, state in states.items() if state != self._states.get(path)}
        self._states |= states
        return changed

    async def run(self) -> None:
        """Watch for ever, whatever happens to the files meanwhile."""
        self._learn(await self._tried())
        told: set[str] = set()
        while True:
            if self._folders() != told:
                told = self._folders()
                log.info("watching kernels", directories=sorted(told))
            changed = await self._next_changes()
            trial = await self._tried()
            self._learn(trial)
            if trial.failure:
                log.error("kernels do not load, replica stays", message=trial.failure)
                continue
            log.info("kernels changed", files=sorted(changed))
            await self._replace()
            log.info("kernels reloaded")

    async def _next_changes(self) -> set[str]:
        """Wait for changes, and for their end."""
        changed: set[str] = set()
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            more = self.look()
            if changed and not more:
                return changed
            changed |= more

    def _watched(self) -> set[str]:
        if not self._failed:
            return self._files
        # The missing part may be in a file that has never been loaded.
        return self._files.union(str(path) for folder in self._folders() for path in Path(folder).glob("*.py"))

    def _folders(self) -> set[str]:
        return {str(Path(path).parent) for path in self._files}

    async def _tried(self) -> Trial:
        return await tried(
            self._modules, within_seconds=_IMPORT_SECONDS, memory_bytes=_IMPORT_BYTES, python=self._python
        )

    def _learn(self, trial: Trial) -> None:
        self._failed = bool(trial.failure)
        self._files |= set(trial.files)
        # The trial has read these. A change of another file since the last look is still to be seen.
        self._states |= {path: file_state(path) for path in self._watched() - self._states.keys()}

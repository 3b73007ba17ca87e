"""`unlatch serve --reload`: when a kernel's file changes, replace the replica by one that has the change.

    a file changes ──> compute.worker.trial, in a process of its own
                         does not load ──> file and line in the log; the running replica stays
                         loads         ──> the replica drains, ends, and is started again; the gateway stays

The gateway opens its lane again and tells its clients what is served now. Between the old replica and the new one, for
a second or so, calls are answered UNAVAILABLE: this is for development.
"""

import asyncio
import os
import sysconfig
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from pathlib import Path

import structlog
from watchfiles import Change, awatch

from unlatch.common.net.settings import MiB
from unlatch.compute.worker.trial import Trial, tried

log = structlog.get_logger()

_IMPORT_SECONDS = 60.0
_IMPORT_BYTES = 8192 * MiB
# An editor writes a file in several steps: changes within this time count as one.
_STEP_MILLISECONDS, _MAX_MILLISECONDS = 50, 500
# Interval of checks that the directories are still the ones that are watched.
_LOOK_MILLISECONDS = 1000
_AGAIN_SECONDS = 1.0

Changes = set[tuple[Change, str]]


class Reload:
    """Replaces the replica when files of the modules change. `replace` starts a new replica in the old one's place."""

    def __init__(self, modules: Sequence[str], replace: Callable[[], Awaitable[object]]) -> None:
        self._modules = modules
        self._replace = replace
        self._files: set[str] = set()
        # Until a trial succeeds, any file may concern the modules.
        self._failed = True

    async def run(self) -> None:
        """Watch for ever, whatever happens to the files meanwhile."""
        self._learn(await self._tried())
        while True:
            try:
                await self._watch()
            except (OSError, RuntimeError) as error:
                log.warning("cannot watch kernels", message=str(error), again_after_seconds=_AGAIN_SECONDS)
                await asyncio.sleep(_AGAIN_SECONDS)
                await self._changed(set())

    async def _watch(self) -> None:
        """Watch until the directories to watch have changed."""
        directories = self._directories()
        changes = self._changes(directories)
        upcoming = await _begun(changes)
        found = _identities(directories)
        log.info("watching kernels", directories=sorted(directories))
        try:
            while self._directories() <= directories:
                if seen := await upcoming:
                    await self._changed(seen)
                elif _identities(directories) != found:
                    # A branch was switched, or a directory was replaced: the watched one is not at its path any more.
                    await self._changed(seen)
                    return
                upcoming = await _begun(changes)
        finally:
            upcoming.cancel()

    async def _changed(self, changes: Changes) -> None:
        trial = await self._tried()
        self._learn(trial)
        if trial.failure:
            log.error("kernels do not load, replica stays", message=trial.failure)
            return
        log.info("kernels changed", files=sorted({path for _, path in changes}))
        await self._replace()
        log.info("kernels reloaded")

    async def _tried(self) -> Trial:
        return await tried(self._modules, within_seconds=_IMPORT_SECONDS, memory_bytes=_IMPORT_BYTES)

    def _learn(self, trial: Trial) -> None:
        self._failed = bool(trial.failure)
        self._files.update(_not_installed(trial.files))

    def _directories(self) -> set[str]:
        paths = (os.path.realpath(module) for module in self._modules if module.endswith(".py"))
        return {str(Path(path).parent) for path in (*paths, *self._files)}

    def _changes(self, directories: Iterable[str]) -> AsyncGenerator[Changes, None]:
        return awatch(
            *directories,
            watch_filter=self._concerns,
            recursive=False,
            step=_STEP_MILLISECONDS,
            debounce=_MAX_MILLISECONDS,
            rust_timeout=_LOOK_MILLISECONDS,
            yield_on_timeout=True,
        )

    def _concerns(self, _: Change, path: str) -> bool:
        # While a module does not load, the missing part may be in a file that has never been loaded.
        return path.endswith(".py") and (self._failed or os.path.realpath(path) in self._files)


async def _begun(changes: AsyncGenerator[Changes, None]) -> "asyncio.Future[Changes]":
    """Start waiting for the next changes. None is missed from now on, since a watch begins when it is waited for."""
    upcoming = asyncio.ensure_future(anext(changes))
    await asyncio.sleep(0)
    return upcoming


def _identities(directories: Iterable[str]) -> list[tuple[int, int]]:
    """Device and inode of each directory. Raises OSError for a missing one."""
    return [(found.st_dev, found.st_ino) for found in map(os.stat, sorted(directories))]


def _not_installed(files: Iterable[str]) -> list[str]:
    """Files that a developer works on: neither Python's own, nor those that pip has installed."""
    paths = sysconfig.get_paths()
    installed = tuple(os.path.realpath(paths[kind]) + os.sep for kind in ("stdlib", "platstdlib", "purelib", "platlib"))
    return [file for file in files if not file.startswith(installed)]

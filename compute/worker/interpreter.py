"""Whether an interpreter can run workers. It may be another one than the service's (`--worker-python`)."""

import asyncio
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from unlatch.common.service.version import VERSION
from unlatch.compute.worker import versions

_OLDEST = (3, 11)
# The start of an interpreter, on a busy machine.
_WITHIN_SECONDS = 20.0


def why_unfit(python: str, found: Mapping[str, str]) -> str:
    """Say what these versions (`versions.found`) lack for a worker, and what to do. Returns "" if they lack nothing."""
    known = f"--worker-python {python} (Python {found['python']})"
    if tuple(map(int, re.findall(r"\d+", found["python"])[:2])) < _OLDEST:
        return f"{known}: wanted Python {_OLDEST[0]}.{_OLDEST[1]} or newer"
    wanted = {name: f"unlatch=={VERSION}" if name == "unlatch" else name for name in versions.NEEDED}
    missing = [wanted[name] for name in versions.NEEDED if not found[name]]
    differs = found["unlatch"] not in ("", VERSION)
    says = [f"it lacks {', '.join(missing)}"] if missing else []
    says += [f"it has Unlatch {found['unlatch']}, and this service is Unlatch {VERSION}"] if differs else []
    if not says:
        return ""
    install = " ".join([*([wanted["unlatch"]] if differs else []), *missing])
    return f"{known}: {'; '.join(says)}; install them there: {python} -m pip install {install}"


async def ask(python: str) -> str:
    """Run an interpreter, and say what it lacks for a worker, as `why_unfit` does."""
    program = Path(versions.__file__).read_text()  # noqa: ASYNC240 (a file of 1 KiB)
    try:
        child = await asyncio.create_subprocess_exec(
            *(python, "-c", program),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
    except OSError as error:
        return not_run(python, error)
    try:
        async with asyncio.timeout(_WITHIN_SECONDS):
            answer, _ = await child.communicate()
        return why_unfit(python, json.loads(answer))
    except (TimeoutError, ValueError):
        return f"--worker-python {python}: it does not run Python programs; wanted an interpreter of Python 3"
    finally:
        with suppress(ProcessLookupError):
            child.kill()
        await child.wait()


def not_run(python: str, error: OSError) -> str:
    """Say that the system does not run an interpreter, and why."""
    return f"--worker-python {python}: cannot be run: {error.strerror or error}"

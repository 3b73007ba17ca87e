"""The interpreter lock of a Python that was built without it, where an import turns the lock on again.

Python does so for a native module that does not declare that it can do without. The lock then stays on, for all
modules, and Python says so in a warning only.
"""

import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Python/import.c of CPython 3.13.
_TURNED_ON = re.compile(r"The global interpreter lock \(GIL\) has been enabled to load module '([^']*)'")
UNKNOWN = "an unknown module"


@contextmanager
def locked_by() -> Iterator[list[str]]:
    """Note the modules that turn the lock on inside the `with` block. There are none in a Python that has the lock."""
    if not sysconfig.get_config_var("Py_GIL_DISABLED") or _is_on():
        yield []
        return
    with modules_told_of() as modules:
        yield modules
    if not modules and _is_on():
        modules.append(UNKNOWN)


@contextmanager
def modules_told_of() -> Iterator[list[str]]:
    """Note the modules of which Python warns inside the `with` block that they have turned the lock on.

    All warnings are shown as ever. `warnings.catch_warnings` would undo the filters that a module sets at its import.
    """
    modules: list[str] = []
    show = warnings.showwarning

    def note(message: Warning | str, *rest: Any, **named: Any) -> None:
        if found := _TURNED_ON.match(str(message)):
            modules.append(found[1])
        show(message, *rest, **named)

    warnings.showwarning = note
    try:
        yield modules
    finally:
        # A module may have put a function of its own there.
        if warnings.showwarning is note:
            warnings.showwarning = show


def _is_on() -> bool:
    is_on: bool = sys._is_gil_enabled()  # type: ignore[attr-defined]  # noqa: SLF001 (CPython 3.13 has no other name)
    return is_on

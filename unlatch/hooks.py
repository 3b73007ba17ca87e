"""`@setup` and `@teardown`: functions of a kernel module that run once in each worker that runs its kernels.

    a worker starts ──> setups, in their order ──> calls ──> teardowns, from the last to the first ──> it ends

What a setup makes (a connection pool, a loaded model) belongs to one worker: processes cannot share it after a fork. An
`async def` hook runs on the event loop of async workers, and only there.
"""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from unlatch.declaration import place_of
from unlatch.signature import DeclarationError

Hook = TypeVar("Hook", bound=Callable[[], Any])

# The attributes of a module that list its hooks, in order.
SETUPS, TEARDOWNS = "__unlatch_setups__", "__unlatch_teardowns__"


def setup(function: Hook) -> Hook:
    """Run a function of this module once in each worker that runs a kernel of the module, before its first call.

    If it raises, the worker does not start, and the error is told as the error of a module that cannot be imported.
    Raises DeclarationError for what cannot be called without arguments.
    """
    return _listed(function, SETUPS)


def teardown(function: Hook) -> Hook:
    """Run a function of this module once in each worker that runs a kernel of the module, as the worker ends.

    A worker that is killed (it crashed, or a cancelled call went on) runs none. Raises DeclarationError for what cannot
    be called without arguments.
    """
    return _listed(function, TEARDOWNS)


def hooks_of(module: dict[str, Any], which: str) -> list[Callable[[], Any]]:
    """Return the hooks in a module's namespace: its SETUPS or its TEARDOWNS."""
    found: list[Callable[[], Any]] = module.get(which, [])
    return found


def _listed(function: Hook, which: str) -> Hook:
    plain = inspect.unwrap(function)
    name = getattr(function, "__name__", type(function).__name__)
    if not inspect.isfunction(plain):
        raise DeclarationError(f"{place_of(function)}: {name}: a setup or teardown is a function of a module")
    if inspect.isgeneratorfunction(plain) or inspect.isasyncgenfunction(plain):
        raise DeclarationError(f"{place_of(function)}: {name}: a generator is no hook; write a setup and a teardown")
    try:
        inspect.signature(function).bind()
    except TypeError:
        raise DeclarationError(f"{place_of(function)}: {name}: a hook is called without arguments") from None
    plain.__globals__.setdefault(which, []).append(function)
    return function

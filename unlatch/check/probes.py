"""Kernels that are added to a worker under check, to inspect it from inside."""

import ctypes
import gc
import pickle
import random
import sys
import threading
from typing import Any, NamedTuple

import numpy as np
import threadpoolctl
from jaxtyping import Int64

from unlatch import Bytes, kernel

SETTLE = "unlatch_check_settle"


class Inspection(NamedTuple):
    """The number of Python threads and the largest thread pool of a library; generators that have been drawn from."""

    threads: Int64[np.ndarray, "2"]
    drawn: Bytes[np.ndarray, "..."]


@kernel(name=SETTLE)
def settle() -> Inspection:
    """Collect garbage and flush output. Report threads, and the generators that were drawn from since the last time."""
    gc.collect()
    sys.stdout.flush()
    sys.stderr.flush()
    ctypes.CDLL(None).fflush(None)
    pools = [pool["num_threads"] for pool in threadpoolctl.threadpool_info()]
    drawn = [name for name, generator in _GENERATORS.items() if _STATES[name] != _state(generator)]
    _STATES.update((name, _state(_GENERATORS[name])) for name in drawn)
    return Inspection(np.array([threading.active_count(), max(pools, default=1)]), np.array(drawn, dtype=object))


def _generators() -> dict[str, Any]:
    """Find the generators that the kernels' modules have made, by name. This module is loaded after them."""
    kinds = [np.random.Generator, np.random.RandomState, random.Random]
    # The global states are seeded in each worker, and SystemRandom has no state.
    known = [np.random.mtrand._rand, random._inst]  # noqa: SLF001 (no other name leads to them)
    if torch := sys.modules.get("torch"):
        kinds.append(torch.Generator)
        known.append(torch.default_generator)
    variables = [
        (value, f"{module}.{name}")
        for module, found in list(sys.modules.items())
        for name, value in vars(found).items()
    ]
    # Those that no variable of a module holds: attributes, items of lists, defaults of arguments.
    others = [(value, f"a {type(value).__name__}") for value in gc.get_objects()]
    names: dict[int, tuple[str, Any]] = {}
    for value, name in (*variables, *others):
        # The type is asked, since isinstance asks a proxy for the object behind it, which may be gone.
        if issubclass(type(value), tuple(kinds)) and not issubclass(type(value), random.SystemRandom):
            names.setdefault(id(value), (name, value))
    return {name: value for name, value in names.values() if not any(value is one for one in known)}


def _state(generator: Any) -> bytes:
    if isinstance(generator, random.Random):
        state: object = generator.getstate()
    elif isinstance(generator, np.random.Generator):
        state = generator.bit_generator.state
    else:
        state = generator.get_state()
    return pickle.dumps(state)


_GENERATORS = _generators()
_STATES = {name: _state(generator) for name, generator in _GENERATORS.items()}

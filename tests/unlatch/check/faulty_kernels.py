"""Kernels with one fault or note each, of every kind that `unlatch check` looks for, and named after it."""

import ctypes
import os
import random
import threading
import time
from functools import partial

import numpy as np
import threadpoolctl
from jaxtyping import Float, Float32, Float64, Shaped

from unlatch import KernelError, kernel

Vector = Float64[np.ndarray, "n"]
Matrix = Float64[np.ndarray, "rows cols"]

calls = 0
last: list[np.ndarray] = []
seen: list[int] = []
generator = np.random.default_rng(0)
dice = random.Random(0)
cache: dict[tuple[int, ...], np.ndarray] = {}


class Sampler:
    """A generator that no variable of the module holds."""

    states = (np.random.RandomState(0),)


@kernel
def writes_to_input(x: Vector) -> Vector:
    x[:1] = 0.0  # here it writes
    return x


@kernel
def wrong_result__dtype(x: Vector) -> Vector:
    return x.astype(np.float32)


@kernel
def wrong_result__shape(x: Vector) -> Vector:
    return x[:-1]


@kernel
def wrong_result__count(x: Vector) -> tuple[Vector, Vector]:
    return x, x, x  # type: ignore[return-value]


@kernel
def wrong_result__type(x: Vector) -> Vector:
    return x.tolist()  # type: ignore[no-any-return]


@kernel
def wrong_result__one_dtype(x: Float64[np.ndarray, "n"], y: Float32[np.ndarray, "n"]) -> Float32[np.ndarray, "n"]:
    return np.asarray(x + y)


@kernel
def wrong_result__elements(x: Vector) -> Shaped[np.ndarray, "n"]:
    return np.array([None] * max(1, len(x)), dtype=object)[: len(x)]


@kernel
def raises__zero_length(x: Vector) -> Float64[np.ndarray, ""]:
    return np.asarray(x.max())  # here it raises


@kernel
def raises_unless_finite(x: Matrix) -> Float64[np.ndarray, "k"]:
    return np.linalg.svd(x, compute_uv=False)


@kernel(pure=True)
def not_deterministic__random(x: Vector) -> Vector:
    return x + np.random.default_rng().standard_normal(len(x))


@kernel(pure=True)
def not_deterministic__process(x: Vector) -> Vector:
    return x + os.getpid()


@kernel(pure=True)
def keeps_state__count(x: Vector) -> Vector:
    global calls
    calls += 1
    return x + calls


@kernel(pure=True)
def keeps_state__generator(x: Vector) -> Vector:
    """Every worker begins with the same generator."""
    return x + generator.standard_normal(len(x))


@kernel
def draws_the_same__generator(x: Vector) -> Vector:
    return x + generator.standard_normal(len(x))


@kernel
def draws_the_same__attribute(x: Vector) -> Vector:
    return x + Sampler.states[0].standard_normal(len(x))


@kernel
def draws_the_same__python(x: Vector) -> Vector:
    return x + dice.random()


@kernel(pure=True)
def keeps_state__wrong_cache(x: Vector) -> Vector:
    """The second call with a shape gets the first one's result."""
    return cache.setdefault(x.shape, x * 2)


@kernel(pure=True)
def keeps_input(x: Vector) -> Vector:
    last[:] = [x]
    return x * 2


@kernel(batch=True)
def batch_differs(x: Matrix) -> Matrix:
    return x - x.mean(axis=0) if len(x) else x


@kernel(batch=True)
def batch_differs__shape(x: Matrix) -> Float64[np.ndarray, "rows k"]:
    return np.ones((len(x), int(np.count_nonzero(x[:1] > 0))))


@kernel
def refuses(x: Vector) -> Vector:
    if len(x) == 1:
        raise KernelError("x: wanted more than one")
    return x


@kernel
def refuses_everything(x: Vector, *, order: int) -> Vector:
    if order < 10:
        raise KernelError(f"order: wanted at least 10, got {order}")
    return x


@kernel
def prints(x: Vector) -> Vector:
    print("looking at", len(x))
    return x


@kernel
def does_not_end(x: Vector) -> Vector:
    while len(x) > 5:
        time.sleep(0.1)
    return x


@kernel
def needs_memory(x: Vector) -> Vector:
    return np.ones((len(x), 1 << 40))[:, 0]


@kernel
def ends_its_worker(x: Vector) -> Vector:
    return x if len(x) < 5 else np.asarray(ctypes.string_at(0))


@kernel
def ends_its_worker__exits(x: Vector) -> Vector:
    return x if len(x) < 5 else os._exit(3)


@kernel(pure=True)
def ends_its_worker__and_keeps_state(x: Vector) -> Vector:
    seen.append(len(x))
    return x if seen.count(24) < 2 else os._exit(4)


@kernel
def warns(x: Vector) -> Vector:
    return np.asarray(x - x.mean())


@kernel
def leaves_threads(x: Vector) -> Vector:
    threading.Thread(target=partial(time.sleep, 60), daemon=True).start()
    return x


@kernel
def many_threads(x: Vector) -> Vector:
    threadpoolctl.threadpool_limits(2)
    return x


@kernel
def wrong_result__mixed_dtypes(x: Float[np.ndarray, "n"], y: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    return x if x.dtype == y.dtype else np.asarray(x > y)

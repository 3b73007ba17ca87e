"""Kernels for the tests: each reports something that a worker sees, or misbehaves in one way."""

import enum
import itertools
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Complex128, Float, Float64, Int64, Shaped, UInt8

from unlatch import KernelError, Str, kernel

Vector = Float64[np.ndarray, "n"]


# What a worker sees, and what it is.


@kernel
def alignments(x: Shaped[np.ndarray, "..."], y: Shaped[np.ndarray, "..."]) -> Int64[np.ndarray, "2"]:
    """Return each input's address modulo 64."""
    return np.array([x.ctypes.data % 64, y.ctypes.data % 64])


@kernel
def module_names() -> Shaped[np.ndarray, "names"]:
    """Return the names of all modules that the worker has imported."""
    return np.array(sorted(sys.modules))


@kernel
def numpy_loaded_in() -> Int64[np.ndarray, "2"]:
    """Return the pid that loaded this module, and with it NumPy, and the pid that runs the kernel."""
    return np.array([LOADED_IN, os.getpid()])


@kernel
def process_id() -> Int64[np.ndarray, ""]:
    """Return the worker's pid."""
    return np.array(os.getpid())


LOADED_IN = os.getpid()


# Time.


@kernel
def sleeps(*, seconds: float) -> Float64[np.ndarray, ""]:
    """Hold a worker without using its core."""
    time.sleep(seconds)
    return np.array(seconds)


@kernel
def burns(*, seconds: float) -> Float64[np.ndarray, ""]:
    """Use this much processor time in Python, and return how much it was."""
    began = time.process_time()
    while time.process_time() - began < seconds:
        pass
    return np.array(time.process_time() - began)


# Signatures.


@kernel
def shared_axes(
    a: Float64[np.ndarray, "rows cols"], b: Float64[np.ndarray, "cols k"], c: Float64[np.ndarray, "rows"]
) -> Float64[np.ndarray, "rows k"]:
    """Compute `a @ b + c`: three inputs that share axes."""
    return np.asarray(a @ b + c[:, None])


@kernel
def fixed_axes(pixels: UInt8[np.ndarray, "height width 3"]) -> UInt8[np.ndarray, "height width"]:
    """Return the largest of a fixed number of channels."""
    return np.asarray(pixels.max(axis=2))


@kernel
def batches(a: Float64[np.ndarray, "*batch n"], b: Float64[np.ndarray, "*batch m"]) -> Float64[np.ndarray, "*batch"]:
    """Sum over the last axes. The axes before them must be the same in both inputs."""
    return np.asarray(a.sum(axis=-1) + b.sum(axis=-1))


@kernel
def first_two(x: Float64[np.ndarray, "_"]) -> Float64[np.ndarray, "_"]:
    """Turn an axis of any length into another axis of any length."""
    return x[:2]


@kernel
def required_scalars(*, flag: bool, count: int, ratio: float, label: str) -> Shaped[np.ndarray, "4"]:
    """Take a scalar of each type, all required, and return them as Python prints them."""
    return np.array([repr(flag), repr(count), repr(ratio), repr(label)])


@kernel
def default_scalars(
    *, flag: bool = True, count: int = -3, ratio: float = 0.5, label: str = "größe"
) -> Shaped[np.ndarray, "4"]:
    """Take the same scalars with defaults."""
    return required_scalars(flag=flag, count=count, ratio=ratio, label=label)


@kernel(pure=True)
def optional_arrays(
    x: Vector, y: Vector | None = None, z: Float64[np.ndarray, "m"] | None = None
) -> Shaped[np.ndarray, "3"]:
    """Return what came for each array, as Python prints it."""
    return np.array([repr(array if array is None else array.tolist()) for array in (x, y, z)])


@kernel(pure=True, batch=True, max_batch_size=32)
def shifted(
    x: Float64[np.ndarray, "rows n"], by: Float64[np.ndarray, "rows"] | None = None
) -> Float64[np.ndarray, "rows n"]:
    """Shift each row by a number of its own, or by a thousand. Calls of this kernel may run as one."""
    return x + (1000.0 if by is None else by[:, None])


@kernel(pure=True)
def lists(
    *,
    weights: list[float],
    counts: tuple[int, ...] = (1, 2),
    names: Sequence[str] = (),
    flags: list[bool] = [True],  # noqa: B006 (a kernel may be written so)
) -> Shaped[np.ndarray, "4"]:
    """Take a list of each type, and return them as Python prints them."""
    return np.array([repr(weights), repr(counts), repr(names), repr(flags)])


class Mode(enum.Enum):
    """Choices whose names are not their values."""

    MEAN = "by mean"
    LARGEST = "by maximum"


class Level(enum.IntEnum):
    """Choices that are numbers."""

    LOW = 1
    HIGH = 5


@kernel(pure=True)
def choices(
    *,
    kind: Literal["linear", "cubic"],
    degree: Literal[1, 2] = 1,
    mode: Mode = Mode.MEAN,
    level: Level = Level.LOW,
    modes: list[Mode] = [],  # noqa: B006 (a kernel may be written so)
) -> Shaped[np.ndarray, "5"]:
    """Take choices of each form, and return them as Python prints them."""
    return np.array([repr(kind), repr(degree), repr(mode), repr(level), repr(modes)])


@kernel(pure=True)
def upper_case(x: Str[np.ndarray, "*any"]) -> Str[np.ndarray, "*any"]:
    """Turn texts into upper case: the elements are `str`."""
    texts = np.empty(x.shape, dtype=object)
    texts.reshape(-1)[:] = [text.upper() for text in x.reshape(-1)]
    return texts


@kernel(pure=True)
def lower_case(x: Str[np.ndarray, "*any"]) -> Str[np.ndarray, "*any"]:
    """Turn texts into lower case by NumPy's own functions, in its own dtype of strings."""
    return np.asarray(np.strings.lower(x.astype(np.dtypes.StringDType())))


@kernel
def returns_bytes_as_texts(x: Vector) -> Str[np.ndarray, "1"]:
    """Return bytes where texts are declared."""
    return np.array([b"a"], dtype=object)


class Summary(NamedTuple):
    """Two outputs by name."""

    mean: Float64[np.ndarray, ""]
    ranks: Int64[np.ndarray, "n"]


@kernel
def summarise(x: Vector) -> Summary:
    """Return two named outputs."""
    return Summary(mean=np.asarray(x.mean()), ranks=np.argsort(np.argsort(x)))


@kernel
def conjugate(z: Complex128[np.ndarray, "n"]) -> Complex128[np.ndarray, "n"]:
    """Conjugate complex numbers."""
    return np.asarray(z.conj())


@kernel
def halve(x: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Halve an array of any float dtype, and keep the dtype."""
    return np.asarray(x / x.dtype.type(2))


@kernel(pure=True)
def tripled(x: UInt8[np.ndarray, "n"]) -> UInt8[np.ndarray, "n"]:
    """Triple an array of exactly one dtype. Overflow wraps."""
    return np.asarray(x * np.uint8(3))


@kernel(pure=True, batch=True, max_batch_size=32)
def turned(
    x: Float64[np.ndarray, "rows 3"], z: Complex128[np.ndarray, "rows n"], *, turns: int = 1
) -> tuple[Float64[np.ndarray, "rows 3"], Complex128[np.ndarray, "rows n"]]:
    """Turn by a quarter about the first axis, complex numbers too. Calls of this kernel may run as one."""
    for _ in range(turns % 4):
        x, z = np.stack((x[:, 0], -x[:, 2], x[:, 1]), axis=1), z * 1j
    return x, z


# Misbehaviour.


@kernel
def raises_value_error(x: Vector) -> Vector:
    """Raise an exception whose text the caller must not see."""
    raise ValueError("a secret of the server")


@kernel
def raises_kernel_error(*, message: str, times: int = 1) -> Vector:
    """Raise an exception whose text the caller is meant to see."""
    raise KernelError(message * times)


@kernel
def raises_kernel_error_of(*, kind: str) -> Vector:
    """Raise a KernelError whose text is not plain text."""
    raise KernelError({"surrogate": "\ud800", "exception": ValueError("inner")}[kind])  # type: ignore[arg-type]


@kernel
def raises_system_exit(x: Vector) -> Vector:
    """Raise SystemExit, which would end a process."""
    sys.exit(3)


@kernel
def raises_keyboard_interrupt(x: Vector) -> Vector:
    """Raise KeyboardInterrupt, as Ctrl-C would."""
    raise KeyboardInterrupt


@kernel
def raises_memory_error(x: Vector) -> Vector:
    """Ask for more memory than any machine has."""
    return np.empty(2**45)


@kernel
def returns_list(x: Vector) -> Vector:
    """Return a list instead of an array."""
    return x.tolist()  # type: ignore[no-any-return]


@kernel
def returns_none(x: Vector) -> Vector:
    """Return nothing."""
    return None  # type: ignore[return-value]


@kernel
def returns_wrong_dtype(x: Vector) -> Vector:
    """Return the right shape with the wrong dtype."""
    return x.astype(np.float32)


@kernel
def returns_wrong_rank(x: Vector) -> Vector:
    """Return one axis too many."""
    return x[None]


@kernel
def returns_wrong_length(x: Vector) -> Vector:
    """Return an axis that is named like the input's, but is longer."""
    return np.append(x, 0.0)


@kernel
def returns_wrong_batch(x: Float64[np.ndarray, "*batch"]) -> Float64[np.ndarray, "*batch"]:
    """Return axes that are named like the input's, but have other lengths."""
    return np.stack((x, x))


@kernel
def returns_wrong_count(x: Vector) -> tuple[Vector, Vector]:
    """Return three outputs where two are declared."""
    return x, x, x  # type: ignore[return-value]


@kernel
def returns_unserved_dtype(x: Vector, *, dtype: str) -> Shaped[np.ndarray, "..."]:
    """Return a dtype that no datatype carries, where any dtype is declared."""
    return np.zeros(2, np.dtype(eval(dtype)))


@kernel
def returns_masked(x: Vector, *, value: float) -> Vector:
    """Return the input with each element masked that has this value."""
    return np.ma.masked_equal(x, value)


@kernel
def returns_masked_scalar(x: Vector) -> Float64[np.ndarray, ""]:
    """Return NumPy's constant for an element that is missing."""
    return np.ma.masked


class Metres(np.ndarray[Any, Any]):
    """Lengths: an array whose class says what its elements mean."""


@kernel
def returns_metres(x: Vector) -> Vector:
    """Return an array of a class that the wire does not carry."""
    return x.view(Metres)


@kernel
def returns_matrix(x: Float64[np.ndarray, "rows cols"]) -> Float64[np.ndarray, "rows cols"]:
    """Return NumPy's matrix, whose elements mean what an array's do."""
    return np.matrix(x)


@kernel
def returns_integers_as_objects(x: Vector) -> Shaped[np.ndarray, "..."]:
    """Return objects that are not strings."""
    return np.array([1, None], dtype=object)


@kernel
def returns_big_endian(x: Vector) -> Vector:
    """Return the declared dtype in a byte order that the wire does not have."""
    return x.astype(">f8")


@kernel
def returns_strided(x: Float64[np.ndarray, "rows cols"]) -> Float64[np.ndarray, "cols rows"]:
    """Return an array that is not contiguous."""
    return x.T


@kernel
def prints(x: Vector) -> Vector:
    """Print a megabyte on each of stdout and stderr."""
    for stream in (sys.stdout, sys.stderr):
        for _ in range(1024):
            print("x" * 1023, file=stream)
    return x


@kernel
def writes_to_input(x: Vector) -> Vector:
    """Write to the input, whose memory others read too."""
    x += 1
    return x


@kernel
def unlocks_input(x: Vector) -> Vector:
    """Try to make the input writable, and then write to it."""
    x.flags.writeable = True
    x += 1
    return x


# Order.

_turns = itertools.count(1)


@kernel
def turn(*, seconds: float = 0.0) -> Int64[np.ndarray, ""]:
    """Return the number of runs that this worker has had, this one included, and use that much processor time."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
    return np.array(next(_turns))


@kernel
def swells(x: Vector, *, count: int) -> UInt8[np.ndarray, "_"]:
    """Return `count` zeros, whatever `x` is: a large answer to a small request."""
    return np.zeros(count, np.uint8)


@kernel
def waits_for(*, path: str) -> Float64[np.ndarray, ""]:
    """Hold a worker until a test opens the named pipe for writing and closes it."""
    with open(path, "rb") as opened:
        opened.read()
    return np.array(0.0)


@kernel
def waits_too(*, path: str) -> Float64[np.ndarray, ""]:
    """Do the same under another name: what is known of one kernel is not known of another."""
    return waits_for(path=path)

"""`@kernel` takes what can be served, and refuses the rest at the user's line, saying what to write instead."""

# mypy: disable-error-code="empty-body"
# ruff: noqa: ANN001, ANN201 (some of these functions lack annotations on purpose)

import asyncio
import enum
import functools
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numba
import numpy as np
import pytest
from jaxtyping import Float, Float32, Float64
from numpy.typing import NDArray

from unlatch import BlockingClient, Bytes, Client, kernel, setup, teardown
from unlatch.common.kernel.messages import from_message, to_message
from unlatch.common.kernel.spec import KernelSpec
from unlatch.declaration import TAKEN, DeclarationError, spec_of

Vector = Float64[np.ndarray, "n"]


def declared(function: Callable[..., Any], **options: Any) -> KernelSpec:
    """Return the spec of a function that `kernel` takes. It must survive the wire."""
    spec = spec_of(kernel(**options)(function))
    assert spec is not None
    assert from_message(to_message(spec)) == spec
    return spec


def refusal(function: Any, **options: Any) -> str:
    """Return the text with which `kernel` refuses an object. It must name this file."""
    with pytest.raises(DeclarationError) as refused:
        kernel(**options)(function)
    place, _, why = str(refused.value).partition(": kernel ")
    assert re.fullmatch(re.escape(__file__) + r":\d+", place)
    return why


class Level(enum.IntEnum):
    """A default that is an int by another name."""

    LOW = 3


class Pair(NamedTuple):
    """A result whose second field is not an array."""

    whole: Vector
    part: float


# Functions that cannot be kernels, and what their authors are told.


def scalar_among_arrays(x: Vector, sigma: float = 1.0) -> Vector: ...
def required_scalar_among_arrays(x: Vector, name: str) -> Vector: ...
def array_among_scalars(*, x: Vector) -> Vector: ...
def no_annotation(x) -> Vector: ...  # type: ignore[no-untyped-def]
def numpy_array(x: np.ndarray) -> Vector: ...
def numpy_typing(x: NDArray[np.float32]) -> Vector: ...
def numpy_bytes(x: NDArray[np.uint8]) -> Vector: ...
def list_of_str(x: list[str]) -> Vector: ...
def sequence_of_float(x: Sequence[float]) -> Vector: ...
def bytes_in(x: bytes) -> Vector: ...
def dict_in(x: dict[str, float]) -> Vector: ...
def optional_array(x: Vector | None) -> Vector: ...
def optional_float_in(x: float | None) -> Vector: ...
def optional_scalar(x: Vector, *, size: int | None = None) -> Vector: ...
def numpy_scalar(x: Vector, *, eps: np.float64) -> Vector: ...
def method(self, x: Vector) -> Vector: ...  # type: ignore[no-untyped-def]
def any_arrays(*arrays: Vector) -> Vector: ...
def any_scalars(x: Vector, **options: float) -> Vector: ...
def float_out(x: Vector) -> float: ...
def int_out(x: Vector) -> int: ...
def dict_out(x: Vector) -> dict[str, float]: ...
def bytes_out(x: Vector) -> bytes: ...
def str_out(x: Vector) -> str: ...
def list_out(x: Vector) -> list[float]: ...
def none_out(x: Vector) -> None: ...
def nothing_out(x: Vector): ...  # type: ignore[no-untyped-def]
def optional_out(x: Vector) -> Vector | None: ...
def many_out(x: Vector) -> tuple[Vector, ...]: ...
def field_out(x: Vector) -> Pair: ...
def not_defined(x: "Vectr") -> Vector: ...  # type: ignore[name-defined]
def other_array(x: Float64[list[float], "n"]) -> Vector: ...
def broadcast(x: Float64[np.ndarray, "#n"]) -> Vector: ...
def in_flight(x: Vector, *, in_flight: int) -> Vector: ...
def ordered(ordered: Vector) -> Vector: ...


def generator(x: Vector) -> Vector:  # type: ignore[misc]
    yield x


async def items(x: Vector) -> Vector:  # type: ignore[misc]
    yield x


INSTEAD: dict[Callable[..., Any], str] = {
    scalar_among_arrays: "'sigma' is a scalar, and scalars come after `*`: (…, *, sigma: float = 1.0)",
    required_scalar_among_arrays: "'name' is a scalar, and scalars come after `*`: (…, *, name: str)",
    array_among_scalars: "'x' is an array, and arrays come before `*`",
    no_annotation: "'x' needs a jaxtyping annotation such as Float64[np.ndarray, 'rows cols']",
    numpy_array: "'x' needs a jaxtyping annotation such as Float64[np.ndarray, 'rows cols']",
    numpy_typing: "'x' needs a jaxtyping annotation such as Float32[np.ndarray, 'rows cols']",
    numpy_bytes: "'x' needs a jaxtyping annotation such as UInt8[np.ndarray, 'rows cols']",
    list_of_str: "'x' needs a jaxtyping annotation such as unlatch.Bytes[np.ndarray, 'n']",
    sequence_of_float: "'x' needs a jaxtyping annotation such as Float64[np.ndarray, 'n']",
    bytes_in: "'x' needs a jaxtyping annotation such as UInt8[np.ndarray, 'n'], which np.frombuffer makes of bytes",
    dict_in: "'x' needs a jaxtyping annotation such as Float64[np.ndarray, 'n'] for each entry",
    optional_array: "'x' needs a jaxtyping annotation such as Float64[ndarray, 'n'], without None: arrays are always",
    optional_float_in: "'x' needs a jaxtyping annotation such as Float64[np.ndarray, ''], without None",
    optional_scalar: "'size' must be a bool, int, float or str, not int | None; None is not sent: give it a default",
    numpy_scalar: "'eps' must be a bool, int, float or str, not float64",
    method: "'self' belongs to a method; a kernel is a function of a module, or a @staticmethod",
    any_arrays: "'*arrays' stands for any number of arrays; take one array with one axis more, such as arrays: ",
    any_scalars: "'**options' stands for any scalars; name each of them after `*`",
    float_out: "'output0' needs a jaxtyping annotation such as Float64[np.ndarray, '']; 'output0' is the name of the "
    "result",
    int_out: "'output0' needs a jaxtyping annotation such as Int64[np.ndarray, '']",
    dict_out: "'output0' needs a jaxtyping annotation such as Float64[np.ndarray, 'n'] for each entry: a result of "
    "several arrays is a NamedTuple",
    bytes_out: "'output0' needs a jaxtyping annotation such as UInt8[np.ndarray, 'n']",
    str_out: "'output0' needs a jaxtyping annotation such as unlatch.Bytes[np.ndarray, '']",
    list_out: "'output0' needs a jaxtyping annotation such as Float64[np.ndarray, 'n']",
    none_out: "the result must be a fixed number of arrays",
    nothing_out: "the result needs a jaxtyping annotation, or a NamedTuple of them",
    optional_out: "'output0' needs a jaxtyping annotation such as Float64[ndarray, 'n'], without None",
    many_out: "the result must be a fixed number of arrays",
    field_out: "'part' needs a jaxtyping annotation such as Float64[np.ndarray, '']",
    not_defined: "an annotation is not defined: name 'Vectr' is not defined",
    other_array: "'x' is served as np.ndarray, not as list",
    broadcast: "axis '#n' of 'x' is neither a length, a name",
    generator: "a generator is not served; return one array that has all items",
    items: "a generator is not served",
    in_flight: "the parameter name 'in_flight' is reserved for calls",
    ordered: "the parameter name 'ordered' is reserved for calls",
}


@pytest.mark.parametrize("function", INSTEAD, ids=lambda function: function.__name__)
def test_refused_signature_says_what_to_write_instead(function: Callable[..., Any]) -> None:
    """The error names the function's own line, the parameter, and an annotation or a place that would do."""
    with pytest.raises(DeclarationError) as refused:
        kernel(function)
    line = inspect.getsourcelines(function)[1]
    assert str(refused.value).startswith(f"{__file__}:{line}: kernel {function.__name__}: {INSTEAD[function]}")


def plain(x: Vector, *, bias: float = 0.0) -> Vector:
    """Add a bias."""
    return x + bias


def timed(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator as users write it."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


class Model:
    """Things that can be called and are not functions."""

    def predict(self, x: Vector) -> Vector:
        return x

    def __call__(self, x: Vector) -> Vector:
        return x


@pytest.mark.parametrize(
    "wrapped", [numba.njit(plain), timed(plain), timed(timed(plain)), numba.njit(cache=False)(plain)]
)
def test_wrapped_function_is_a_kernel_with_the_signature_of_the_inner_one(wrapped: Callable[..., Any]) -> None:
    """Numba's dispatchers and decorators that use functools.wraps are served as they are."""
    spec = declared(wrapped)
    assert spec == declared(plain)
    assert (spec.name, spec.doc, [scalar.name for scalar in spec.scalars]) == ("plain", "Add a bias.", ["bias"])


@pytest.mark.parametrize(
    ("candidate", "says"),
    [
        (functools.partial(plain, bias=1.0), "partial: a partial is not a function"),
        (Model().predict, "predict: a method is not a function"),
        (Model(), "Model: a Model is not a function"),
        (Model, "Model: a type is not a function"),
        (np.add, "add: a ufunc is not a function"),
        (len, "len: a builtin_function_or_method is not a function"),
        ("plain", "str: a str is not a function"),
    ],
)
def test_what_is_not_a_function_is_refused_at_the_line_that_decorates_it(candidate: Any, says: str) -> None:
    """The error names the caller's line, since there is no line of a definition, and says what to do."""
    with pytest.raises(DeclarationError) as refused:
        kernel(candidate)
    here = inspect.getsource(test_what_is_not_a_function_is_refused_at_the_line_that_decorates_it).splitlines()
    line = inspect.getsourcelines(test_what_is_not_a_function_is_refused_at_the_line_that_decorates_it)[1]
    line += next(index for index, text in enumerate(here) if "kernel(candidate)" in text)
    assert str(refused.value) == f"{__file__}:{line}: kernel {says}; write a function with `def` that calls it"


def with_default(kind: type, default: object) -> Callable[..., Any]:
    """Return a function with one scalar that has this default."""

    def function(x: Vector, *, value: Any = default) -> Vector:
        return x

    function.__annotations__["value"] = kind
    return function


@pytest.mark.parametrize(
    ("kind", "default", "sent"),
    [
        (float, np.finfo(np.float64).eps, 2.220446049250313e-16),
        (float, np.float32(0.5), 0.5),
        (float, np.int8(3), 3.0),
        (float, 1, 1.0),
        (float, float("-inf"), float("-inf")),
        (int, np.int64(-7), -7),
        (int, np.uint64(2**64 - 1), 2**64 - 1),
        (int, -(2**63), -(2**63)),
        (int, Level.LOW, 3),
        (bool, np.bool_(True), True),
        (str, np.str_("größe"), "größe"),
    ],
)
def test_default_of_another_type_is_taken_for_its_value(kind: type, default: object, sent: object) -> None:
    """NumPy's scalars and enums travel as Python's own numbers and strings, which msgspec and protobuf know."""
    (scalar,) = declared(with_default(kind, default)).scalars
    assert (type(scalar.default), scalar.default) == (kind, sent)


@pytest.mark.parametrize(
    ("kind", "default", "says"),
    [
        (int, 10**20, "the default of 'value' does not fit in 64 bits: 100000000000000000000"),
        (int, -(10**20), "the default of 'value' does not fit in 64 bits"),
        (float, 10**400, "the default of 'value' cannot be sent"),
        (float, 2**53 + 1, "the default of 'value' is an int that no float holds exactly: 9007199254740993"),
        (float, np.int64(-(2**53) - 1), "the default of 'value' is an int that no float holds exactly"),
        (str, "\ud800", "the default of 'value' cannot be sent"),
        (int, True, "the default of 'value' is not of type int: True"),
        (float, True, "the default of 'value' is not of type float"),
        (int, 1.5, "the default of 'value' is not of type int: 1.5"),
        (float, np.ones(1), "the default of 'value' is not of type float"),
        (float, np.array(1.0), "the default of 'value' is not of type float"),
        (str, None, "the default of 'value' is not of type str: None"),
        (int, np.complex128(1), "the default of 'value' is not of type int"),
    ],
)
def test_default_that_cannot_be_sent_is_refused(kind: type, default: object, says: str) -> None:
    """The service would not start with it, so the declaration names the line."""
    assert says in refusal(with_default(kind, default))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"name": ""}, "name='' is not an identifier"),
        ({"name": "größe"}, "name='größe' is not an identifier"),
        ({"name": 3}, "name=3 is not an identifier"),
        ({"name": "yield"}, "the name 'yield' is a keyword of Python; set another: name=…"),
        ({"name": "map"}, "the name 'map' is a method of the client; set another: name=…"),
        ({"name": "close"}, "the name 'close' is a method of the client"),
        ({"name": "kernels"}, "the name 'kernels' is a method of the client"),
        ({"version": 2}, "version=2 is not a str"),
        ({"version": "\ud800"}, "the docstring or the version cannot be encoded"),
        ({"version": "1" * 50_000}, "docstring and version have 50011 bytes, more than 49152"),
        ({"pure": "yes"}, "pure='yes' is not a bool"),
        ({"batch": 1}, "batch=1 is not a bool"),
        ({"nonempty": "rows"}, "nonempty='rows' is not a bool"),
        ({"timeout": True}, "timeout=True is not a number of seconds"),
        ({"timeout": "5"}, "timeout='5' is not a number of seconds"),
        ({"timeout": float("nan")}, "timeout=nan is not a number of seconds"),
        ({"timeout": 10**400}, "timeout=1000000000"),
        ({"memory": 2**64}, "memory=18446744073709551616 is not a whole number of bytes"),
        ({"max_batch_size": 2**32}, "max_batch_size=4294967296 is not a whole number"),
        ({"max_batch_size": 2.0}, "max_batch_size=2.0 is not a whole number"),
    ],
)
def test_option_that_cannot_be_sent_is_refused(options: dict[str, Any], says: str) -> None:
    """Names that no call by attribute would reach, and values that the messages cannot carry."""
    assert says in refusal(plain, **options)


@pytest.mark.parametrize("digits", [4300, 4301, 50_000])
def test_int_that_python_does_not_print_is_refused_too(digits: int) -> None:
    """`repr` raises ValueError for an int of over 4,300 digits. The error names the default or the option even so."""
    for number in (10**digits, -(10**digits)):
        for kind in (int, float, str):
            assert "the default of 'value' " in refusal(with_default(kind, number))
        assert "the default of 'value' is not of type str" in refusal(with_default(str, [number]))
        for option in ("timeout", "memory", "max_batch_size", "name", "version", "pure"):
            assert f"{option}=a value of type int is not a" in refusal(plain, **{option: number})


def test_numpy_scalars_are_options_too() -> None:
    """Limits are often computed."""
    spec = declared(plain, memory=np.int64(4096), timeout=np.float32(0.5), max_batch_size=np.uint8(3))
    assert (spec.memory_bytes, spec.timeout_seconds, spec.max_batch_size) == (4096, 0.5, 3)


def test_taken_names_are_those_of_the_client() -> None:
    """Each public attribute of a client is a name that no kernel can have, and there is no other such name."""
    assert {name for kind in (Client, BlockingClient) for name in dir(kind) if not name.startswith("_")} == TAKEN


def test_axes_in_jaxtypings_other_forms() -> None:
    """In jaxtyping's grammar, names that begin with "_" bind no length, and lengths may have names."""

    def function(
        x: Float64[np.ndarray, "_rows _ cols=4"], y: Float[np.ndarray, "*_batch n"], z: Float[np.ndarray, "_*more n"]
    ) -> Vector: ...

    spec = declared(function)
    assert [array.dims for array in spec.inputs] == [("_", "_", "4"), ("...", "n"), ("...", "n")]


def test_bytes_are_arrays_of_objects() -> None:
    """`Bytes` is the dtype of byte strings alone, also for jaxtyping's own check."""

    def function(x: Bytes[np.ndarray, "n"], y: Float32[np.ndarray, "n"]) -> Bytes[np.ndarray, "n"]: ...

    spec = declared(function)
    assert [array.dtypes for array in (*spec.inputs, *spec.outputs)] == [("object",), ("float32",), ("object",)]
    assert isinstance(np.array([b"a"], dtype=object), Bytes[np.ndarray, "n"])  # type: ignore[arg-type]
    assert not isinstance(np.ones(1), Bytes[np.ndarray, "n"])  # type: ignore[arg-type]


def test_positional_only_arrays_are_taken() -> None:
    """A worker passes arrays by position."""

    def function(x: Vector, /, y: Vector, *, bias: float) -> Vector: ...

    assert [array.name for array in declared(function).inputs] == ["x", "y"]


async def waits(x: Vector) -> Vector:
    """Wait."""
    return x


@pytest.mark.parametrize(
    ("function", "options", "says"),
    [
        (plain, {"concurrency": 4}, "concurrency= is for `async def` kernels"),
        (waits, {"concurrency": 0}, "concurrency=0 is not a whole number from 1 to 1048575"),
        (waits, {"concurrency": True}, "concurrency=True is not a whole number"),
        (waits, {"concurrency": 1.5}, "concurrency=1.5 is not a whole number"),
        (waits, {"batch": True}, "batch=True joins calls in one run"),
        (waits, {"memory": 1 << 30}, "memory= limits a process that runs one call"),
    ],
)
def test_options_that_do_not_fit_an_async_kernel(
    function: Callable[..., Any], options: dict[str, Any], says: str
) -> None:
    """The error says what the option is for."""
    with pytest.raises(DeclarationError, match=re.escape(says)):
        kernel(**options)(function)


def test_async_function_is_a_kernel_of_many_calls_at_once() -> None:
    """The number is 1000 unless it is given. A plain function has none, nor has one that runs a coroutine itself."""

    @functools.wraps(waits)
    def runs(x: Vector) -> Vector:
        return asyncio.run(waits(x))

    assert declared(waits).concurrency == 1000
    assert declared(timed(waits)).concurrency is None
    assert declared(plain).concurrency is None
    assert declared(runs).concurrency is None
    function = kernel(concurrency=7)(waits)
    assert (spec := spec_of(function)) is not None
    assert spec.concurrency == 7


@pytest.mark.parametrize(
    ("hook", "says"),
    [
        (lambda: None, None),
        (lambda *_: None, None),
        (lambda _: None, "a hook is called without arguments"),
        (generator, "a generator is no hook"),
        (items, "a generator is no hook"),
        (len, "a setup or teardown is a function of a module"),
        (Model(), "a setup or teardown is a function of a module"),
    ],
)
@pytest.mark.parametrize("which", [setup, teardown])
def test_hooks_are_functions_without_arguments(which: Callable[..., Any], hook: Any, says: str | None) -> None:
    """A hook is returned as it is; what cannot be one is refused."""
    if says is None:
        assert which(hook) is hook
    else:
        with pytest.raises(DeclarationError, match=says):
            which(hook)

"""Conversion of arguments: what a kernel's dtypes hold exactly is taken, and all else is refused by name."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from jaxtyping import Float64

from tests.support.meaning import Annotated, Dimensional, Nullable, Sparse
from unlatch.arrays import RequestBuilder
from unlatch.common.errors import InvalidArgument
from unlatch.common.kernel.spec import ArraySpec
from unlatch.conversion import to_array
from unlatch.declaration import kernel, spec_of

RECORDS = np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")])
LARGE = 2**53 + 1

TAKEN: list[tuple[str, Any, str, Any]] = [
    # Arrays: their own dtype, or one that holds all its values.
    ("float64", np.arange(3), "float64", [0, 1, 2]),
    ("float64", np.array([1, 2], "u1"), "float64", [1, 2]),
    ("float64", np.array([1.5], "f4"), "float64", [1.5]),
    ("float64", np.array([True]), "float64", [1]),
    ("float64", np.array([2**53]), "float64", [2**53]),
    ("float64", np.array([2**63], "u8"), "float64", [2**63]),
    ("complex128", np.array([2.5]), "complex128", [2.5]),
    ("int64", np.array([7], "u4"), "int64", [7]),
    ("float32 float64", np.array([1], "i2"), "float32", [1]),
    ("float32 float64", np.array([1], "i4"), "float64", [1]),
    ("float64", np.float32(0.5), "float64", 0.5),
    ("float64", np.array([[1.0, 2.0]]).view(np.matrix), "float64", [[1, 2]]),
    ("float64", np.ma.array([1.0, 2.0], mask=False), "float64", [1, 2]),
    ("float64", np.array([1.0, 2.0]).view(np.recarray), "float64", [1, 2]),
    ("object", np.array(["a"]), "<U1", ["a"]),
    ("", np.array([1], "i2"), "int16", [1]),
    # Lists and numbers: the first dtype that holds them.
    ("float64", [0, 1, 2], "float64", [0, 1, 2]),
    ("float64", 1, "float64", 1),
    ("float32", [0.1, float("inf")], "float32", [np.float32(0.1), np.inf]),
    ("float32", [2**24], "float32", [2**24]),
    ("int64", [1.0, 2], "int64", [1, 2]),
    ("int64", [LARGE, 1000.0], "int64", [LARGE, 1000]),
    ("uint64", [2**64 - 1], "uint64", [2**64 - 1]),
    ("uint8", [], "uint8", []),
    ("uint8 int64", [255, 256], "int64", [255, 256]),
    ("float64", [2**60], "float64", [2**60]),
    ("complex128", ["1+2j", 3], "complex128", [1 + 2j, 3]),
    ("float64", ["NaN", "-Infinity"], "float64", [np.nan, -np.inf]),
    ("float64", np.array([1, 2.5], dtype=object), "float64", [1, 2.5]),
    ("float64", range(3), "float64", [0, 1, 2]),
    ("float64", Annotated.of(mask=False), "float64", [0, 1]),
    ("float64", [np.array([1.0]), np.array([2.0])], "float64", [[1], [2]]),
    ("", [1, 2], "int64", [1, 2]),
    ("", [1, 2.5], "float64", [1, 2.5]),
    ("", [True], "bool", [True]),
    ("", [LARGE, -1], "int64", [LARGE, -1]),
    ("", [b"a\x00", "b"], "object", [b"a\x00", "b"]),
    # Texts alone are numbers only for a kernel that takes no strings.
    ("", ["1", "2.5"], "object", ["1", "2.5"]),
    ("", "NaN", "object", "NaN"),
    ("float64 object", ["1"], "object", ["1"]),
    ("", [1, "NaN"], "float64", [1, np.nan]),
    ("", [], "float64", []),
    ("", [np.datetime64("2026-01-01")], "datetime64[D]", [np.datetime64("2026-01-01")]),
]

REFUSED: list[tuple[str, Any, str]] = [
    ("int64", [1.9, 2.9], "wanted int64, which cannot hold 1.9, 2.9"),
    ("float64", None, "wanted an array of numbers or strings, but got a NoneType"),
    ("float64", [1.0, None], "element 1 is None"),
    ("uint8", [300], "wanted uint8, which cannot hold 300"),
    ("uint8", [-1], "cannot hold -1"),
    ("float32", [2**24 + 1], "wanted float32, which cannot hold 16777217"),
    ("float64", [LARGE], "cannot hold 9007199254740993"),
    ("float64", [LARGE, 1.5], "cannot hold 9007199254740993, 1.5"),
    ("float64", [str(LARGE)], "cannot hold '9007199254740993'"),
    ("int64", [float(LARGE)], "cannot hold 9007199254740992.0"),
    ("int64", [float("nan")], "cannot hold nan"),
    ("float32", [1e300], r"cannot hold 1e\+300"),
    ("float64", [1j], "cannot hold 1j"),
    ("int64", ["5"], "cannot hold '5'"),
    ("float64", ["1_000"], "cannot hold '1_000'"),
    ("float64", ["1e400"], "cannot hold '1e400'"),
    ("complex128", ["1+1e400j"], r"cannot hold '1\+1e400j'"),
    ("", [10**20 + 1], "cannot hold 100000000000000000001"),
    ("", [1, "a"], "cannot hold 1, 'a'"),
    ("float64", ["1" * 5000], f"cannot hold '{'1' * 63}$"),
    ("float64", [[1.0], [2.0, 3.0]], "x: wanted lists of equal length: .* inhomogeneous"),
    ("float64", {"a": 1}, "got a dict"),
    ("float64", np.ma.masked_equal([1.0, -999.0], -999.0), r"masked elements .* filled\(value\)"),
    ("float64", [1.0, np.ma.masked], "masked elements"),
    ("float64", [[np.ma.masked_equal([1.0, 2.0], 2.0)]], "masked elements"),
    ("float64", Dimensional(2.0), "a unit cannot be sent; send plain numbers"),
    ("float64", [Dimensional(2.0)], "a unit cannot be sent"),
    ("float64", Annotated.of(units="km"), "a unit cannot be sent"),
    ("float64", Annotated.of(mask=np.array([False, True])), "masked elements"),
    ("float64", Nullable(), r"missing values cannot be sent; send its fillna\(value\)"),
    ("float64", Sparse(), r"got a Sparse; send its toarray\(\)"),
    ("", RECORDS, "named fields cannot be sent; send each as an array: a, b"),
    ("", RECORDS.view(np.recarray), "named fields"),
    ("object", np.array(["a", None], dtype=object), "element 1 is None"),
]


def of(dtypes: str) -> ArraySpec:
    """Declare an array that takes these dtypes, or any."""
    return ArraySpec(name="x", dtypes=tuple(dtypes.split()), dims=("...",))


@pytest.mark.parametrize(("dtypes", "value", "dtype", "expected"), TAKEN, ids=repr)
def test_what_the_kernel_can_hold_is_taken(dtypes: str, value: Any, dtype: str, expected: Any) -> None:
    """The array has a dtype that the kernel takes, and every number is what was given."""
    array = to_array(of(dtypes), value)
    assert type(array) is np.ndarray
    assert array.dtype == np.dtype(dtype)
    assert array.flags.c_contiguous
    np.testing.assert_array_equal(array, np.array(expected, dtype=array.dtype))


@pytest.mark.parametrize(("dtypes", "value", "message"), REFUSED, ids=repr)
def test_what_the_kernel_cannot_hold_is_refused(dtypes: str, value: Any, message: str) -> None:
    """The error names the argument, and says what it cannot hold or what to send."""
    with pytest.raises(InvalidArgument, match=message) as refused:
        to_array(of(dtypes), value)
    assert refused.value.field == "x"


@pytest.mark.parametrize("dtypes", ["", "float64", "int64", "uint8 bool"])
def test_int_that_python_does_not_print_is_refused_by_name(dtypes: str) -> None:
    """`repr` raises ValueError for an int of over 4,300 digits. The error names the argument even so."""
    for number in (10**5000, -(10**4300)):
        for value in (number, [number], [[1], [number]], np.array([number], dtype=object)):
            with pytest.raises(InvalidArgument, match=r"x: wanted .*, which cannot hold .*a value of type int"):
                to_array(of(dtypes), value)
        with pytest.raises(InvalidArgument, match=r"x: .* element 0 is a value of type set"):
            to_array(of(dtypes), np.array([{number}], dtype=object))


@pytest.mark.parametrize("value", [np.array([1.5]), np.array([2**53 + 1]), np.array([1j]), np.array(["1"])])
def test_an_array_that_does_not_fit_is_left_to_the_server(value: Any) -> None:
    """The replica names the dtypes and the shape that it wanted, so the client does not change the array."""
    dtypes = "float64" if value.dtype.kind != "f" else "float32"
    assert to_array(of(dtypes), value) is value


def own(x: Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
    """A kernel without scalars."""
    return x


def scaled(x: Float64[np.ndarray, "n"], *, by: float = 2.0, shift: float = 0.0) -> Float64[np.ndarray, "n"]:
    """A kernel with scalars, which some give by position."""
    return x * by + shift


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (own, "kernel own takes 1 array, but got 2"),
        (scaled, "kernel scaled takes 1 array, but got 2; give scalars by name: by=…, shift=…"),
    ],
)
def test_an_argument_too_many_may_be_a_scalar(function: Callable[..., Any], message: str) -> None:
    """The error says how scalars are given, since Python's own functions take them by position, too."""
    spec = spec_of(kernel(function))
    assert spec is not None
    with pytest.raises(InvalidArgument, match=f"^{re.escape(message)}$"):
        RequestBuilder(spec, {}).request((np.ones(3), 0.5))

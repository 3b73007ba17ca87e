"""Arguments against a signature: the errors that the dispatcher finds before a call waits for anything."""

from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unlatch.common.errors import InvalidArgument
from unlatch.common.kernel.datatypes import DATATYPES, carrier, is_served, seen_by_numpy
from unlatch.common.kernel.lists import to_json
from unlatch.common.kernel.spec import ArraySpec, KernelSpec, ScalarSpec
from unlatch.compute.call import _batch
from unlatch.compute.intake.arguments import check
from unlatch.compute.ipc.frames import MAX_STRING_BYTES, RunFrame, encode, value_bytes
from unlatch.protos.unlatch_pb2 import Descriptor


def kernel(*dims: str, dtypes: tuple[str, ...] = ("float64",), scalars: tuple[ScalarSpec, ...] = ()) -> KernelSpec:
    """Make a kernel of arrays a, b, c … with these axes."""
    inputs = tuple(ArraySpec(name="abcd"[i], dtypes=dtypes, dims=tuple(d.split())) for i, d in enumerate(dims))
    return KernelSpec(
        name="k",
        version="1",
        doc="",
        inputs=inputs,
        scalars=scalars,
        outputs=(),
        pure=False,
        batch=False,
        max_batch_size=1,
        timeout_seconds=None,
        memory_bytes=None,
    )


def call(**arrays: tuple[int, ...]) -> Descriptor:
    """Make a call with float64 arrays of these shapes."""
    descriptor = Descriptor(call=1)
    for name, shape in arrays.items():
        descriptor.request.tensors.add(name=name, datatype="FP64", shape=shape)
        descriptor.lengths.append(8 * int(np.prod(shape)))
    return descriptor


@pytest.mark.parametrize(
    ("dims", "shapes"),
    [
        (("",), [()]),
        (("n",), [(0,)]),
        (("3 _",), [(3, 9)]),
        (("_ _",), [(3, 9)]),
        (("...",), [(1, 2, 3)]),
        (("... n", "n"), [(4,), (4,)]),
        (("n ... m", "m n"), [(2, 9, 9, 3), (3, 2)]),
        (("n ... m",), [(2, 3)]),
        (("*batch n", "*batch m"), [(2, 3, 4), (2, 3, 5)]),
        (("*batch", "*batch"), [(), ()]),
        (("n n",), [(3, 3)]),
        (("rows cols", "cols k", "rows k"), [(2, 3), (3, 4), (2, 4)]),
    ],
)
def test_shapes_that_fit(dims: tuple[str, ...], shapes: list[tuple[int, ...]]) -> None:
    """Lengths, names, `_`, `...` and `*name` fit, each where it may stand."""
    given = dict(zip("abcd", shapes, strict=False))
    assert check(kernel(*dims), call(**given)).shapes == shapes


@pytest.mark.parametrize(("shapes", "field"), [([(0, 3), (1,)], "a"), ([(2, 0), (1,)], "a"), ([(2, 3), (0,)], "b")])
def test_empty_arrays_of_a_nonempty_kernel_are_refused(shapes: list[tuple[int, ...]], field: str) -> None:
    """An axis of length zero leaves no element, whichever axis it is. Without axes there is one element."""
    spec = replace(kernel("rows cols", "n"), nonempty=True)
    with pytest.raises(InvalidArgument, match=rf"^{field}: wanted at least one element, got shape \[") as refused:
        check(spec, call(**dict(zip("ab", shapes, strict=True))))
    assert refused.value.field == field
    assert check(replace(kernel(""), nonempty=True), call(a=())).shapes == [()]


@pytest.mark.parametrize(
    ("dims", "shapes", "field", "says"),
    [
        (("",), [(1,)], "a", r"wanted float64 of shape \(\), got float64 of shape \(1\)"),
        (("n",), [()], "a", r"of shape \(n\), got float64 of shape \(\)"),
        (("3",), [(4,)], "a", r"of shape \(3\), got float64 of shape \(4\)"),
        (("n n",), [(3, 4)], "a", "axis 'n' has length 4, but in a it has 3"),
        (("n", "n"), [(3,), (4,)], "b", "axis 'n' has length 4, but in a it has 3"),
        (("... n", "n"), [(2, 3), (2,)], "b", "axis 'n' has length 2, but in a it has 3"),
        (("n ... m",), [(2,)], "a", "got float64 of shape"),
        (("... 3",), [(3, 2)], "a", "got float64 of shape"),
        (("*b n", "*b n"), [(2, 3), (3,)], "b", r"axes '\*b' are \[\], but they differ in a"),
        (("*b n", "*b n"), [(2, 3), (5, 3)], "b", r"axes '\*b' are \[5\]"),
    ],
)
def test_shapes_that_do_not(dims: tuple[str, ...], shapes: list[tuple[int, ...]], field: str, says: str) -> None:
    """The message names the argument, the expected shape and the given one."""
    with pytest.raises(InvalidArgument, match=says) as refused:
        check(kernel(*dims), call(**dict(zip("abcd", shapes, strict=False))))
    assert refused.value.field == field
    assert refused.value.message.startswith(f"{field}: ")


def test_order_is_the_kernels() -> None:
    """Tensors may come in any order; `order` maps the kernel's arrays to them."""
    arguments = check(kernel("n", "m", "k"), call(c=(3,), a=(1,), b=(2,)))
    assert arguments.order == [1, 2, 0]
    assert [arguments.shapes[i] for i in arguments.order] == [(1,), (2,), (3,)]


SCALARS = tuple(
    ScalarSpec(name=f"a_{kind}", type=kind, required=False, default=None) for kind in ("bool", "int", "float", "str")
)


def with_scalar(name: str, **value: Any) -> Descriptor:
    descriptor = Descriptor(call=1)
    for choice, chosen in value.items():
        setattr(descriptor.request.parameters[name], choice, chosen)
    return descriptor


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("a_bool", {"bool_param": False}, False),
        ("a_int", {"int64_param": -(2**63)}, -(2**63)),
        ("a_int", {"uint64_param": 2**64 - 1}, 2**64 - 1),
        ("a_float", {"double_param": 0.1}, 0.1),
        ("a_float", {"double_param": float("inf")}, float("inf")),
        ("a_float", {"int64_param": 3}, 3.0),
        ("a_str", {"string_param": ""}, ""),
        ("a_str", {"string_param": "größe\0"}, "größe\0"),
    ],
)
def test_scalars_keep_type_and_value(name: str, value: dict[str, Any], expected: object) -> None:
    """An int may be given for a float. No other type may be given for another."""
    (got,) = check(kernel(scalars=SCALARS), with_scalar(name, **value)).parameters.values()
    assert (got, type(got)) == (expected, type(expected))


def test_arrays_that_are_left_out_are_named_by_their_places() -> None:
    """`order` has the given arrays only, and the axes of the others bind nothing."""
    spec = kernel("n", "m", "m")
    spec = replace(spec, inputs=(spec.inputs[0], *(replace(array, optional=True) for array in spec.inputs[1:])))
    for shapes, left_out in (
        ({"c": (3,), "a": (1,)}, (1,)),
        ({"a": (1,), "b": (2,)}, (2,)),
        ({"a": (1,)}, (1, 2)),
        ({"b": (2,), "c": (2,), "a": (1,)}, ()),
    ):
        arguments = check(spec, call(**shapes))
        assert arguments.left_out == left_out
        given = [place for place in range(3) if place not in left_out]
        assert [arguments.shapes[i] for i in arguments.order] == [shapes["abc"[place]] for place in given]


def test_calls_that_leave_out_different_arrays_have_no_batch_in_common() -> None:
    """Equal dtypes and shapes do not make calls equal: it matters which arrays they are of."""
    spec = replace(kernel("n", "n", "n"), batch=True)
    spec = replace(spec, inputs=(spec.inputs[0], *(replace(array, optional=True) for array in spec.inputs[1:])))
    batches = {_batch(spec, check(spec, call(a=(2,), **{name: (2,)}))) for name in "bc"}
    assert len(batches) == 2
    assert _batch(spec, check(spec, call(a=(2,), b=(2,)))) in batches


LISTS = tuple(replace(scalar, many=True) for scalar in SCALARS)
plain = {
    "a_bool": st.booleans(),
    "a_int": st.integers(-(2**63), 2**64 - 1),
    "a_float": st.floats(),
    "a_str": st.text(max_size=20),
}
lists = st.sampled_from(LISTS).flatmap(lambda spec: st.tuples(st.just(spec), st.lists(plain[spec.name], max_size=50)))


@given(lists)
def test_any_list_arrives_as_it_is(case: tuple[ScalarSpec, list[Any]]) -> None:
    """Lists of each type keep their values and types, NaN and the sign of zero too, and fit the frame as counted."""
    spec, values = case
    got = check(kernel(scalars=LISTS), with_scalar(spec.name, string_param=to_json(values))).parameters[spec.name]
    assert isinstance(got, list)
    assert list(map(repr, got)) == list(map(repr, values))
    assert len(msgspec.msgpack.encode(got)) <= 5 + sum(map(value_bytes, values))


@pytest.mark.parametrize(
    ("name", "element"), [("a_float", 0.1), ("a_int", 2**64 - 1), ("a_str", ""), ("a_str", "ß"), ("a_bool", True)]
)
def test_longest_list_fits_a_frame(name: str, element: Any) -> None:
    """The longest list that is let through does not make a frame larger than a datagram."""
    most = MAX_STRING_BYTES // value_bytes(element)
    spec = kernel(scalars=LISTS)
    parameters = check(spec, with_scalar(name, string_param=to_json([element] * most))).parameters
    assert len(encode(RunFrame("k", parameters, 0, ()))) <= MAX_STRING_BYTES + 64
    with pytest.raises(InvalidArgument, match=f"{name}: .*; send an array"):
        check(spec, with_scalar(name, string_param=to_json([element] * (most + 2))))


shapes = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5)
words = st.one_of(st.sampled_from([*DATATYPES, ""]), st.text(max_size=5))
np_dtypes = st.one_of(st.just(""), st.sampled_from(["complex64", "complex128", "datetime64[ns]"]), st.text(max_size=12))


@given(words, shapes, np_dtypes, st.integers(0, 2**63))
def test_any_description_is_refused_or_is_an_array(datatype: str, shape: list[int], np_dtype: str, length: int) -> None:
    """Any description of an array is refused, or is a dtype and shape that NumPy makes of that many bytes."""
    fields = []
    try:
        dtype, seen = seen_by_numpy("x", datatype, shape, np_dtype, length)
    except InvalidArgument as refused:
        fields.append(refused.field)
    if fields:
        assert fields == ["x"]
        return
    assert is_served(dtype)
    assert carrier(dtype) == datatype
    if dtype != "object":
        assert int(np.prod(seen, dtype=object)) * np.dtype(dtype).itemsize == length
        if not length:
            assert np.ndarray(seen, dtype, b"").shape == seen


@given(st.sampled_from(["datetime64", "timedelta64"]), st.text("[]nsDYMW7 ", max_size=6))
def test_time_that_is_let_through_is_numpys(kind: str, unit: str) -> None:
    """An accepted `np_dtype` of a time is a dtype that NumPy knows by the same name."""
    np_dtype = kind + unit
    if is_served(np_dtype):
        assert np.dtype(np_dtype).name == np_dtype

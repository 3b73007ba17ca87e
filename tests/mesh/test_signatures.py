"""Signatures of every form through both doors: optional arrays, lists, choices, texts. What comes is what was sent."""

import asyncio
import json
from typing import Any

import numpy as np
import pytest

from tests.support.doors import Oip, Refusal, request
from tests.support.kernels import Level, Mode
from tests.support.mesh import Mesh
from unlatch import BlockingClient, Client
from unlatch.common.errors import InvalidArgument
from unlatch.protos.inference_pb2 import (
    ModelConfigRequest,
    ModelConfigResponse,
    ModelInferRequest,
    ModelMetadataRequest,
    ModelMetadataResponse,
)

X, Y = np.array([1.0, 2.0]), np.array([3.0, 4.0])
NAN = float("nan")


def texts(array: np.ndarray[Any, Any]) -> list[str]:
    """Read the texts of a kernel that returns them as bytes."""
    return [element.decode() for element in array]


def packed(*elements: bytes) -> bytes:
    return b"".join(len(element).to_bytes(4, "little") + element for element in elements)


def words(*elements: bytes) -> ModelInferRequest:
    """Make a request for `upper_case`."""
    message = ModelInferRequest(model_name="upper_case", raw_input_contents=[packed(*elements)])
    message.inputs.add(name="x", datatype="BYTES", shape=[len(elements)])
    return message


def told(oip: Oip, message: ModelInferRequest) -> list[str]:
    """Make a call, and return the texts of its output."""
    (raw,) = oip.infer(message).raw_output_contents
    found = []
    while raw:
        size = 4 + int.from_bytes(raw[:4], "little")
        found.append(raw[4:size].decode())
        raw = raw[size:]
    return found


@pytest.mark.parametrize(
    ("arrays", "named", "seen"),
    [
        ((X,), {}, ["[1.0, 2.0]", "None", "None"]),
        ((X, None), {}, ["[1.0, 2.0]", "None", "None"]),
        ((X, Y), {}, ["[1.0, 2.0]", "[3.0, 4.0]", "None"]),
        ((X, None, Y), {}, ["[1.0, 2.0]", "None", "[3.0, 4.0]"]),
        ((X,), {"z": Y}, ["[1.0, 2.0]", "None", "[3.0, 4.0]"]),
        ((X,), {"y": None, "z": []}, ["[1.0, 2.0]", "None", "[]"]),
        ((), {"z": Y, "x": X}, ["[1.0, 2.0]", "None", "[3.0, 4.0]"]),
        ((X, Y, Y), {}, ["[1.0, 2.0]", "[3.0, 4.0]", "[3.0, 4.0]"]),
    ],
)
def test_left_out_array_is_none(arrays: tuple[Any, ...], named: dict[str, Any], seen: list[str], mesh: Mesh) -> None:
    """An array that is None, or is not given at all, is None in the kernel. An empty array is an array."""
    with BlockingClient(mesh.gateway) as client:
        assert texts(client.optional_arrays(*arrays, **named)) == seen


async def test_one_map_leaves_out_different_arrays(mesh: Mesh) -> None:
    """A builder of calls that is used again does not mix up arrays of the same shape."""
    items = [(X, Y), (X, None, Y), X, (X, Y, None), (X, None, X)]
    async with Client(mesh.gateway) as client:
        seen = [texts(result)[1:] async for result in client.map("optional_arrays", items)]
    x, y = "[1.0, 2.0]", "[3.0, 4.0]"
    assert seen == [[y, "None"], ["None", y], ["None", "None"], [y, "None"], ["None", x]]


async def test_calls_that_leave_out_different_arrays_do_not_run_together(mesh: Mesh) -> None:
    """Calls of a batched kernel run as one only with calls that give the same arrays."""
    async with Client(mesh.gateway) as client:
        calls = [client.shifted([[float(n)]], *([[float(n)]] if n % 2 else [])) for n in range(64)]
        results = await asyncio.gather(*calls)
    assert [result.item() for result in results] == [2.0 * n if n % 2 else n + 1000.0 for n in range(64)]


@pytest.mark.parametrize(
    ("arrays", "says", "field"),
    [
        ({"y": X}, "x: kernel optional_arrays requires this array", "x"),
        ({"x": X, "y": np.zeros(3)}, "y: axis 'n' has length 3, but in x it has 2", "y"),
        ({"x": X, "z": np.zeros(3, "i8")}, "z: wanted float64", "z"),
        ({"x": X, "w": X}, "w: kernel optional_arrays has no such array; known names: x, y, z", "w"),
    ],
)
def test_arrays_that_are_given_are_checked(
    arrays: dict[str, np.ndarray[Any, Any]], says: str, field: str, oip: Oip
) -> None:
    """Required arrays stay required, and named axes agree among the arrays that are given."""
    refusal = oip.refusal(request("optional_arrays", arrays))
    assert (refusal.code, refusal.fields) == ("INVALID_ARGUMENT", (field,))
    assert refusal.message.startswith(says)


def test_input_that_is_absent_is_left_out(oip: Oip) -> None:
    """Callers of the Open Inference Protocol leave an input out of the request."""
    assert told(oip, request("optional_arrays", {"z": Y, "x": X})) == ["[1.0, 2.0]", "None", "[3.0, 4.0]"]


@pytest.mark.parametrize(
    ("scalars", "seen"),
    [
        ({"weights": []}, ["[]", "(1, 2)", "()", "[True]"]),
        ({"weights": (0.5, 2)}, ["[0.5, 2.0]", "(1, 2)", "()", "[True]"]),
        ({"weights": np.array([0.1, NAN]), "names": ["ß", "a\0,]"]}, ["[0.1, nan]", "(1, 2)", "('ß', 'a\\x00,]')"]),
        ({"weights": [np.float32(0.5), float("-inf")], "counts": [2**64 - 1, -(2**63)]}, ["[0.5, -inf]"]),
        ({"weights": range(2), "flags": [False, np.True_]}, ["[0.0, 1.0]", "(1, 2)", "()", "[False, True]"]),
        ({"weights": [-0.0, 5e-324, 1.7976931348623157e308]}, ["[-0.0, 5e-324, 1.7976931348623157e+308]"]),
    ],
)
def test_lists_keep_their_types_and_values(scalars: dict[str, Any], seen: list[str], mesh: Mesh) -> None:
    """A kernel gets a list, or a tuple where it declares a tuple or a Sequence; floats stay exact."""
    with BlockingClient(mesh.gateway) as client:
        assert texts(client.lists(**scalars))[: len(seen)] == seen


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("[]", "[]"),
        ("[1, 2.5e0]", "[1.0, 2.5]"),
        ('["NaN", "-Infinity"]', "[nan, -inf]"),
        (" [NaN,\n-Infinity] ", "[nan, -inf]"),
    ],
)
def test_list_is_a_string_of_json_in_the_protocol(text: str, seen: str, oip: Oip) -> None:
    """NaN and infinities are strings as in protobuf's JSON, or bare words as Python writes them."""
    assert told(oip, request("lists", None, weights=text))[0] == seen


@pytest.mark.parametrize(
    ("scalars", "says", "field"),
    [
        ({}, "weights: kernel lists requires this list[float] parameter", "weights"),
        ({"weights": 1.0}, "weights: wanted a string with a JSON list of float, got the float 1.0", "weights"),
        ({"weights": "1"}, "weights: wanted a JSON list of float: got '1'", "weights"),
        ({"weights": "[1"}, "weights: wanted a JSON list of float: got '[1'", "weights"),
        ({"weights": '{"0": 1}'}, "weights: wanted a JSON list of float: got", "weights"),
        ({"weights": "[" * 30_000}, "weights: wanted a JSON list of float: got", "weights"),
        ({"weights": "[1, null]"}, "weights: element 1: wanted a value of type float, got None", "weights"),
        ({"weights": "[[1]]"}, "weights: element 0: wanted a value of type float, got [1]", "weights"),
        ({"weights": '["1"]'}, "weights: element 0: wanted a value of type float, got '1'", "weights"),
        ({"weights": "[true]"}, "weights: element 0: wanted a value of type float, got True", "weights"),
        ({"weights": "[1e400]"}, "weights: wanted a JSON list of float: float64 cannot hold '1e400'", "weights"),
        ({"weights": f"[{2**53 + 1}]"}, "weights: element 0: a float cannot hold 9007199254740993", "weights"),
        ({"weights": f"[{10**400}]"}, "weights: element 0: a float cannot hold 1000", "weights"),
        ({"weights": f"[{'1' * 5000}]"}, "weights: wanted a JSON list of float: got '[1111", "weights"),
        ({"weights": "[]", "counts": "[1.0]"}, "counts: element 0: wanted a value of type int, got 1.0", "counts"),
        ({"weights": "[]", "counts": "[1, true]"}, "counts: element 1: wanted a value of type int, got T", "counts"),
        ({"weights": "[]", "counts": f"[{2**64}]"}, "counts: element 0: 18446744073709551616 does not fit", "counts"),
        ({"weights": "[]", "names": "[1]"}, "names: element 0: wanted a value of type str, got 1", "names"),
        ({"weights": "[]", "names": '["\\ud800"]'}, "names: wanted a JSON list of str: element 0 cannot", "names"),
        ({"weights": "[]", "flags": "[0]"}, "flags: element 0: wanted a value of type bool, got 0", "flags"),
        ({"weights": f"[{'1,' * 4000}1]"}, "weights: wanted a list of at most 3640 elements, got 4001; ", "weights"),
        ({"weights": f"[{'0,' * 60_000}0]"}, "weights: wanted a list of at most 3640 elements, got 60001", "weights"),
        ({"weights": f"[{'0,' * 90_000}0]"}, "weights: what a call says besides its tensors' bytes", "weights"),
        (
            {"weights": "[]", "names": json.dumps(["x" * 30_000] * 2)},
            "names: lists and str parameters have 60010 bytes, the maximum is 32768; send an array",
            "names",
        ),
    ],
)
def test_wrong_list_is_refused(scalars: dict[str, Any], says: str, field: str, oip: Oip) -> None:
    """The error names the field, and the element that is at fault; and the next call is served."""
    refusal = oip.refusal(request("lists", None, **scalars))
    assert (refusal.code, refusal.fields) == ("INVALID_ARGUMENT", (field,)), refusal
    assert refusal.message.startswith(says)
    assert oip.serves()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("[1]", "weights: wanted a list, got the str '[1]'"),
        ({1.0}, "weights: wanted a list, got the set {1.0}"),
        (None, "weights: wanted a list, got the NoneType None"),
        ([None], "weights: wanted a list of bool, int, float or str, got the type NoneType in it"),
        (np.zeros((2, 2)), "weights: wanted a list of bool, int, float or str, got the type ndarray in it"),
        ([Mode.MEAN], "weights: wanted a list of bool, int, float or str, got the type Mode in it"),
        ([b"a"], "weights: wanted a list of bool, int, float or str, got the type bytes in it"),
        ([10**5000], "weights: "),
        ("\ud800", "weights: "),
        (["\ud800"], "weights: "),
    ],
)
async def test_python_client_refuses_what_is_no_list(given: Any, says: str, mesh: Mesh) -> None:
    """A text is not taken for the list of its letters, nor for JSON."""
    async with Client(mesh.gateway) as client:
        with pytest.raises(InvalidArgument) as refused:
            await client.lists(weights=given)
        assert refused.value.message.startswith(says)
        assert refused.value.field == "weights"


@pytest.mark.parametrize(
    ("scalars", "seen"),
    [
        ({}, ["'linear'", "1", "<Mode.MEAN: 'by mean'>", "<Level.LOW: 1>", "[]"]),
        ({"degree": 2, "mode": Mode.LARGEST}, ["'linear'", "2", "<Mode.LARGEST: 'by maximum'>"]),
        ({"mode": "by maximum", "level": Level.HIGH}, ["'linear'", "1", "<Mode.LARGEST: 'by maximum'>", "<Level.HIG"]),
        (
            {"modes": [Mode.MEAN, "by maximum"]},
            ["'linear'", "1", "<Mode.MEAN: 'by mean'>", "<Level.LOW: 1>", "[<Mode."],
        ),
    ],
)
def test_choices_reach_the_kernel_as_declared(scalars: dict[str, Any], seen: list[str], mesh: Mesh) -> None:
    """A kernel gets members of its Enum, in lists too. Callers give values, or members in Python."""
    with BlockingClient(mesh.gateway) as client:
        got = texts(client.choices(kind="linear", **scalars))
    assert all(one.startswith(wanted) for one, wanted in zip(got, seen, strict=False)), got


@pytest.mark.parametrize(
    ("scalars", "says", "field"),
    [
        ({"kind": "Linear"}, "kind: wanted one of 'linear', 'cubic', got 'Linear'", "kind"),
        ({"kind": 1}, "kind: wanted a parameter of type str, got the int 1", "kind"),
        ({}, "kind: kernel choices requires this 'linear'|'cubic' parameter", "kind"),
        ({"kind": "cubic", "degree": 3}, "degree: wanted one of 1, 2, got 3", "degree"),
        ({"kind": "cubic", "degree": True}, "degree: wanted a parameter of type int, got the bool True", "degree"),
        ({"kind": "cubic", "mode": "MEAN"}, "mode: wanted one of 'by mean', 'by maximum', got 'MEAN'", "mode"),
        ({"kind": "cubic", "level": 2}, "level: wanted one of 1, 5, got 2", "level"),
        ({"kind": "cubic", "modes": '["by mean", "by mode"]'}, "modes: element 1: wanted one of 'by mean', ", "modes"),
    ],
)
def test_value_that_is_no_choice_is_refused(scalars: dict[str, Any], says: str, field: str, oip: Oip) -> None:
    """The error names the field, and lists the choices."""
    refusal = oip.refusal(request("choices", None, **scalars))
    assert (refusal.code, refusal.fields) == ("INVALID_ARGUMENT", (field,)), refusal
    assert refusal.message.startswith(says)


@pytest.mark.parametrize(
    "given",
    [
        ["straße", "", "a\0b"],
        np.array(["straße", "", "a\0b"]),
        np.array(["straße", "", "a\0b"], dtype=np.dtypes.StringDType()),
        np.array(["straße", "", "a\0b"], dtype=object),
        [b"stra\xc3\x9fe", b"", b"a\0b"],
    ],
    ids=["list", "str", "StringDType", "object", "bytes"],
)
def test_texts_are_str_on_both_sides(given: Any, mesh: Mesh) -> None:
    """The kernel gets `str` and returns `str`, and so do the Python clients. All of NumPy's strings are taken."""
    with BlockingClient(mesh.gateway) as client:
        assert client.upper_case(given).tolist() == ["STRASSE", "", "A\0B"]
        assert client.upper_case(np.empty((0, 2), dtype=object)).shape == (0, 2)


def test_texts_may_be_numpys_own_strings(mesh: Mesh) -> None:
    """A kernel may return StringDType; its caller gets `str` objects all the same."""
    with BlockingClient(mesh.gateway) as client:
        assert client.lower_case([["GRÖẞE", ""], ["A\0", "😀"]]).tolist() == [["größe", ""], ["a\0", "😀"]]


def test_large_texts_arrive_in_pieces(mesh: Mesh) -> None:
    """A reply that does not come whole is read as texts too."""
    given = ["ä" * 1000] * 500
    with BlockingClient(mesh.gateway) as client:
        assert client.upper_case(given).tolist() == ["Ä" * 1000] * 500


def test_text_that_is_not_utf8_is_refused(mesh: Mesh, oip: Oip) -> None:
    """The error names the array and the element; the worker goes on."""
    workers = mesh.workers
    refusal = oip.refusal(words(b"a", b"\xff"))
    says = "x: element 1 is not UTF-8: invalid start byte at byte 0"
    assert refusal == Refusal("INVALID_ARGUMENT", says, ("x",))
    assert told(oip, words("größe".encode())) == ["GRÖSSE"]
    assert mesh.workers == workers


def test_numbers_are_no_texts(mesh: Mesh) -> None:
    """The client refuses them, and says what was wanted."""
    with BlockingClient(mesh.gateway) as client, pytest.raises(InvalidArgument, match="x: wanted str, which cannot"):
        client.upper_case([1, 2])


def test_kernel_that_returns_bytes_as_texts_fails_its_call(oip: Oip) -> None:
    """The declaration is the contract."""
    refusal = oip.refusal(request("returns_bytes_as_texts", {"x": X}))
    assert refusal.code == "INTERNAL"
    assert "returned an element of type bytes for output0, but declares str" in refusal.message


def test_metadata_describe_every_form(oip: Oip) -> None:
    """Callers in any language see what may be left out, what a list is, and the choices."""

    def parameters(kernel: str) -> dict[str, str]:
        answer = oip.send(ModelMetadataRequest(name=kernel).SerializeToString(), "ModelMetadata")
        found = ModelMetadataResponse.FromString(answer)
        texts = {name: value.string_param for name, value in found.parameters.items()}
        for tensor in found.inputs:
            texts |= {f"{tensor.name}.{name}": value.string_param for name, value in tensor.parameters.items()}
        return texts

    arrays = parameters("optional_arrays")
    assert {name for name in arrays if name.endswith(".optional")} == {"y.optional", "z.optional"}
    assert parameters("upper_case")["x.dtypes"] == "str"
    lists, choices = parameters("lists"), parameters("choices")
    assert lists["scalar.weights"] == "list[float], required"
    assert lists["scalar.counts"] == "list[int] = [1,2]"
    assert choices["scalar.kind"] == "str, required, one of 'linear', 'cubic'"
    assert choices["scalar.degree"] == "int = 1, one of 1, 2"
    assert choices["scalar.mode"] == "str = 'by mean', one of 'by mean', 'by maximum'"
    assert choices["scalar.modes"] == "list[str] = [], each one of 'by mean', 'by maximum'"
    config = ModelConfigResponse.FromString(
        oip.send(ModelConfigRequest(name="optional_arrays").SerializeToString(), "ModelConfig")
    )
    assert [tensor.optional for tensor in config.config.input] == [False, True, True]


async def test_methods_show_every_form(mesh: Mesh) -> None:
    """`help` and tab completion show what may be left out, and the choices."""
    async with Client(mesh.gateway) as client:
        await client.kernels()
        names = ("optional_arrays", "lists", "choices", "upper_case")
        shown = {name: str(getattr(client, name).__signature__) for name in names}
        assert shown["optional_arrays"].startswith("(x: 'float64[n]', y: 'float64[n] | None' = None, z: 'flo")
        assert "counts: 'list[int]' = (1, 2)" in shown["lists"]
        assert "degree: '1|2' = 1" in shown["choices"]
        assert shown["upper_case"].startswith("(x: 'str[*any]'")

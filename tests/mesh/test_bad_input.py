"""Bad input through either door: the exact status, a message that names the field, and the next call is served."""

import random
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import StartMesh
from tests.support.doors import LARGE, LaneEnd, Oip, Refusal, arrays_of, descriptor, pieces, request, vector
from tests.support.mesh import Mesh, running_dispatcher
from tests.support.watching import Scrape, wait_until
from unlatch.protos.inference_pb2 import (
    ModelInferRequest,
    ModelMetadataRequest,
    ModelMetadataResponse,
    ModelReadyRequest,
    ModelReadyResponse,
)
from unlatch.protos.unlatch_pb2 import Frames, LaneMessage, Reply

INVALID, INTERNAL = "INVALID_ARGUMENT", "INTERNAL"
KIBIBYTE = 1024


@dataclass(frozen=True, slots=True)
class Case:
    """A wrong request, and its refusal. `says` is a pattern that the message contains."""

    name: str
    message: ModelInferRequest
    code: str
    says: str
    field: str = ""

    def check(self, refusal: Refusal) -> None:
        assert refusal.code == self.code, refusal
        assert re.search(self.says, refusal.message), refusal
        assert refusal.fields == ((self.field,) if self.field else ()), refusal


def spoilt(message: ModelInferRequest, spoil: Callable[[ModelInferRequest], object]) -> ModelInferRequest:
    spoil(message)
    return message


def one_input(datatype: str, shape: list[int], raw: bytes, np_dtype: str = "") -> ModelInferRequest:
    """Make a request for `identity` with one tensor as described."""
    message = ModelInferRequest(model_name="identity", raw_input_contents=[raw])
    tensor = message.inputs.add(name="x", datatype=datatype, shape=shape)
    if np_dtype:
        tensor.parameters["np_dtype"].string_param = np_dtype
    return message


def prefixed(*elements: bytes) -> bytes:
    return b"".join(len(element).to_bytes(4, "little") + element for element in elements)


def products(a: tuple[int, ...], b: tuple[int, ...], c: tuple[int, ...]) -> ModelInferRequest:
    return request("shared_axes", {"a": np.zeros(a), "b": np.zeros(b), "c": np.zeros(c)})


def cases() -> Iterator[Case]:
    yield from about_kernels()
    yield from about_arrays()
    yield from about_bytes()
    yield from about_scalars()


def about_kernels() -> Iterator[Case]:
    yield Case("unknown kernel", vector("identiti", 1), "NOT_FOUND", "'identiti'.*did you mean identity", "model_name")
    yield Case(
        "no kernel", ModelInferRequest(), "NOT_FOUND", "the call names no kernel: model_name is empty", "model_name"
    )
    yield Case("endless kernel", vector("k" * 100_000, 1), "NOT_FOUND", "there is no kernel 'k{64}'", "model_name")
    yield Case(
        "more than a descriptor may be", vector("k" * 1_000_000, 1), INVALID, "model_name: .*131072", "model_name"
    )
    crowd = ModelInferRequest(model_name="identity", raw_input_contents=[b""] * 257)
    yield Case("more tensors than a call may bring", crowd, INVALID, "256")
    versioned = spoilt(vector("identity", 1), lambda m: setattr(m, "model_version", "7"))
    yield Case("unknown version", versioned, "NOT_FOUND", "has version 1, not '7'", "model_version")


def about_arrays() -> Iterator[Case]:
    x = np.zeros(3)
    wrong_dtype = request("conjugate", {"z": x})
    yield Case("dtype", wrong_dtype, INVALID, r"z: wanted complex128 of shape \(n\), got float64", "z")
    yield Case(
        "dtype of several", request("halve", {"x": np.zeros(3, "i8")}), INVALID, "x: wanted .*float16.*int64", "x"
    )
    square = request("summarise", {"x": np.zeros((2, 2))})
    yield Case("rank", square, INVALID, r"x: wanted float64 of shape \(n\), got float64 of shape \(2, 2\)", "x")
    yield Case("rank of a scalar", request("summarise", {"x": np.zeros(())}), INVALID, r"x: wanted .* shape \(\)$", "x")
    fourth = request("fixed_axes", {"pixels": np.zeros((2, 2, 4), "u1")})
    yield Case(
        "shape", fourth, INVALID, r"pixels: wanted uint8 of shape \(height, width, 3\), got .*\(2, 2, 4\)", "pixels"
    )
    disagree = r"axis 'cols' has length 4, but in a it has 3"
    yield Case("axes of two", products((2, 3), (4, 5), (2,)), INVALID, disagree, "b")
    yield Case("axes of three", products((2, 3), (3, 5), (4,)), INVALID, "axis 'rows' has length 4, but in a", "c")
    batch = request("batches", {"a": np.zeros((2, 3, 4)), "b": np.zeros((2, 4, 4))})
    yield Case("axes of any number", batch, INVALID, r"b: axes '\*batch' are \[2, 4\].* in a", "b")
    too_few = request("batches", {"a": np.zeros(()), "b": np.zeros(1)})
    yield Case("too few axes", too_few, INVALID, r"a: wanted .*\*batch, n.*got float64 of shape \(\)", "a")

    yield Case("missing", request("matmul", {"a": np.eye(2)}), INVALID, "b: kernel matmul requires this array", "b")
    yield Case("all missing", request("matmul"), INVALID, "a: kernel matmul requires this array", "a")
    third = request("identity", {"x": x, "y": x})
    yield Case("unknown", third, INVALID, "y: kernel identity has no such array; .*x", "y")
    twice = spoilt(vector("identity", 1), lambda m: m.MergeFrom(vector("identity", 2)))
    yield Case("repeated", twice, INVALID, "x: .*twice", "x")
    nameless = spoilt(vector("identity", 1), lambda m: setattr(m.inputs[0], "name", ""))
    yield Case("nameless", nameless, INVALID, "^an empty name: kernel identity has no such array; known names: x")
    endless = spoilt(vector("identity", 1), lambda m: setattr(m.inputs[0], "name", "y" * 100_000))
    yield Case("endless name", endless, INVALID, "y{64}: kernel identity has no such array", "y" * 64)
    worse = one_input("FP65", [1], bytes(8))
    worse.inputs[0].name = "y" * 100_000
    yield Case("endless name of a wrong tensor", worse, INVALID, "^y{10,}", "y" * 64)
    as_scalar = request("summarise", x=1.0)
    yield Case(
        "array as scalar",
        as_scalar,
        INVALID,
        "x: kernel summarise requires this array, which was given as a param",
        "x",
    )
    as_array = request("sleeps", {"seconds": x})
    yield Case(
        "scalar as array", as_array, INVALID, "seconds: kernel sleeps takes it as parameter, not as array", "seconds"
    )
    both = vector("identity", 1, x=1.0)
    yield Case("array as both", both, INVALID, "x: kernel identity takes it as array, not as parameter", "x")


def about_bytes() -> Iterator[Case]:
    yield Case(
        "too short", one_input("FP64", [3], bytes(23)), INVALID, r"x: shape \[3\] of FP64 is 24 bytes, but got 23", "x"
    )
    yield Case("too long", one_input("FP64", [3], bytes(25)), INVALID, "x: .* is 24 bytes, but got 25", "x")
    yield Case("bytes of nothing", one_input("FP64", [0], bytes(8)), INVALID, "x: .* is 0 bytes, but got 8", "x")
    yield Case("no bytes of a scalar", one_input("FP64", [], b""), INVALID, "x: .* is 8 bytes, but got 0", "x")
    contents = "raw_input_contents"
    fewer = spoilt(request("matmul", {"a": np.eye(2), "b": np.eye(2)}), lambda m: m.raw_input_contents.pop())
    yield Case("fewer contents", fewer, INVALID, f"{contents}: wanted 2 entries, one for each input, got 1", contents)
    more = spoilt(vector("identity", 1), lambda m: m.raw_input_contents.append(b""))
    yield Case("more contents", more, INVALID, f"{contents}: wanted 1 entries, one for each input, got 2", contents)
    none = spoilt(vector("identity", 1), lambda m: m.raw_input_contents.pop())
    yield Case("no contents", none, INVALID, f"{contents}: wanted 1 entries, one for each input, got 0", contents)
    yield Case("negative", one_input("FP64", [-1], bytes(8)), INVALID, r"x: shape \[-1\] has a negative length", "x")
    yield Case("twice negative", one_input("FP64", [-1, -1], bytes(8)), INVALID, "x: .* negative length", "x")
    for shape in ([2**62, 2**62], [2**32, 2**32], [2**63 - 1, 2**63 - 1, 0], [0, 2**62], [2**61], [2**16] * 64):
        says = r"x: shape \[.*\] (is more than memory can hold|of FP64 is \d+ bytes, but got 0)"
        yield Case(f"overflowing {shape[:3]}", one_input("FP64", shape, b""), INVALID, says, "x")
    yield Case("overflowing BYTES", one_input("BYTES", [2**32, 2**32], b""), INVALID, "x: .* more than memory", "x")
    yield Case(
        "many axes", one_input("FP64", [1] * 65, bytes(8)), INVALID, "x: 65 axes, but an array has at most 64", "x"
    )
    yield Case("very many axes", one_input("FP64", [1] * 9999, bytes(8)), INVALID, "x: 9999 axes, but an array", "x")
    yield Case("datatype", one_input("FP65", [1], bytes(8)), INVALID, "x: datatype 'FP65' is not served; .* BOOL", "x")
    yield Case("no datatype", one_input("", [1], bytes(8)), INVALID, "x: datatype '' is not served", "x")
    yield Case("endless datatype", one_input("F" * 99_999, [1], bytes(8)), INVALID, "x: datatype 'F{32}'", "x")

    for np_dtype, datatype in (
        ("complex64", "FP64"),
        ("complex128", "INT64"),
        ("datetime64[ns]", "FP64"),
        ("datetime64", "INT64"),
        ("datetime64[ns", "INT64"),
        ("datetime64[ns]]", "INT64"),
        ("timedelta64[lightyear]", "INT64"),
        ("float64", "FP64"),
        ("O", "INT64"),
        ("x" * 100_000, "INT64"),
    ):
        wrong = one_input(datatype, [1, 2], bytes(16), np_dtype)
        says = rf"x: {datatype} cannot carry np_dtype '{re.escape(np_dtype[:32])}"
        yield Case(f"np_dtype {np_dtype[:32]} in {datatype}", wrong, INVALID, says, "x")
    last_axis = one_input("FP64", [2, 1], bytes(16), "complex128")
    yield Case("complex of one part", last_axis, INVALID, "x: complex128 .* last axis of 2", "x")
    no_axis = one_input("FP64", [], bytes(8), "complex128")
    yield Case("complex of no axis", no_axis, INVALID, "x: complex128 .* last axis of 2", "x")

    ab = prefixed(b"a", b"b")
    yield Case("BYTES too few", one_input("BYTES", [3], ab), INVALID, r"x: got 2 elements for shape \[3\]", "x")
    yield Case("BYTES too many", one_input("BYTES", [1], ab), INVALID, r"x: got 2 elements for shape \[1\]", "x")
    yield Case("BYTES without any", one_input("BYTES", [2], b""), INVALID, r"x: got 0 elements for shape \[2\]", "x")
    yield Case("BYTES by far too few", one_input("BYTES", [2**40], ab), INVALID, "x: got 2 elements for", "x")
    yield Case(
        "BYTES cut", one_input("BYTES", [2], ab[:-1]), INVALID, "x: element 1 has length 1, but 0 bytes are left", "x"
    )
    cut_prefix = one_input("BYTES", [2], ab + b"\1\0")
    yield Case("BYTES prefix cut", cut_prefix, INVALID, "x: 2 bytes are left, too few for the length of element 2", "x")
    huge = one_input("BYTES", [1], b"\xff\xff\xff\xffa")
    yield Case("BYTES prefix huge", huge, INVALID, "x: element 0 has length 4294967295, but 1 bytes are left", "x")


def about_scalars() -> Iterator[Case]:
    right: dict[str, bool | int | float | str] = {"flag": True, "count": 1, "ratio": 0.5, "label": "a"}
    types = {"flag": "bool", "count": "int", "ratio": "float", "label": "str"}
    for name, kind in types.items():
        rest = {key: value for key, value in right.items() if key != name}
        missing = request("required_scalars", None, **rest)
        says = f"{name}: kernel required_scalars requires this {kind} parameter"
        yield Case(f"missing {kind}", missing, INVALID, says, name)
        empty = spoilt(request("default_scalars", None, **rest), lambda m, name=name: m.parameters[name])  # type: ignore[misc]
        yield Case(f"empty {kind}", empty, INVALID, f"{name}: wanted a parameter of type {kind}, got nothing", name)
        for other, value in right.items():
            if other != name and (name, other) != ("ratio", "count"):
                wrong = request("default_scalars", None, **{name: value})
                says = f"{name}: wanted a parameter of type {kind}, got the {types[other]} {value!r}"
                yield Case(f"{types[other]} for {kind}", wrong, INVALID, says, name)
    for number in (2**53 + 1, -(2**53) - 1, 2**64 - 1):
        rounded = request("default_scalars", None, ratio=number)
        says = f"ratio: wanted a parameter of type float, which cannot hold {number}"
        yield Case(f"{number} for float", rounded, INVALID, says, "ratio")
    unknown = request("default_scalars", None, ratios=0.5)
    yield Case("unknown scalar", unknown, INVALID, "ratios: .* no such parameter; did you mean ratio", "ratios")
    endless = request("default_scalars", None, **{"r" * 99_999: 0.5})
    yield Case("endless scalar", endless, INVALID, "r{64}: .* no such parameter", "r" * 64)
    long = request("default_scalars", None, count="x" * 100_000)
    yield Case("endless wrong value", long, INVALID, "count: wanted a parameter of type int, got the str", "count")
    for kibibytes in (100, 300, 3000):
        too_long = request("default_scalars", None, label="x" * kibibytes * KIBIBYTE)
        yield Case(f"scalar of {kibibytes} KiB", too_long, INVALID, "label: .*bytes", "label")


CASES = list(cases())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_wrong_call_is_refused_by_the_protocols_door(case: Case, oip: Oip) -> None:
    """ModelInfer ends with the status, the message and BadRequest's field; then a right call is served."""
    case.check(oip.refusal(case.message))
    assert oip.serves()


def test_wrong_calls_are_refused_one_by_one_on_a_lane(lane: LaneEnd) -> None:
    """Each wrong call has its own failure, right calls among them have their results, and the lane goes on."""
    on_lane = [case for case in CASES if not case.message.inputs or not case.message.inputs[0].HasField("contents")]
    for number, case in enumerate(on_lane):
        lane.call(number, case.message)
        case.check(lane.refusal(number))
        assert lane.serves(len(on_lane) + number), case.name


@pytest.mark.parametrize(
    ("kernel", "code", "says"),
    [
        ("raises_value_error", INTERNAL, "^kernel raises_value_error failed; .* under [0-9a-f]{12}$"),
        ("raises_system_exit", INTERNAL, "^kernel raises_system_exit failed; .* under [0-9a-f]{12}$"),
        ("raises_keyboard_interrupt", INTERNAL, "^kernel raises_keyboard_interrupt failed; .* under [0-9a-f]{12}$"),
        ("raises_memory_error", "RESOURCE_EXHAUSTED", "raises_memory_error needed more memory"),
        ("returns_list", INTERNAL, "returns_list returned a list for output0, not an array"),
        ("returns_none", INTERNAL, "returns_none returned a NoneType for output0"),
        ("returns_wrong_dtype", INTERNAL, "returned float32 for output0, but declares float64"),
        ("returns_wrong_rank", INTERNAL, r"returned shape \(1, 3\) for output0, but declares \(n\)"),
        ("returns_wrong_length", INTERNAL, r"returned shape \(4,\) for output0, but declares \(n\)"),
        ("returns_wrong_batch", INTERNAL, r"returned shape \(2, 3\) for output0, but declares \(\*batch\)"),
        ("returns_wrong_count", INTERNAL, "returned 3 results, but declares 2"),
        ("returns_integers_as_objects", INTERNAL, "returns_integers_as_objects"),
        ("returns_masked_scalar", INTERNAL, "returned a MaskedConstant for output0 with masked elements, .* filled"),
        ("returns_metres", INTERNAL, "returned a Metres for output0, not a plain array; return np.asarray"),
        ("writes_to_input", INTERNAL, "writes_to_input writes to its input"),
        ("unlocks_input", INTERNAL, "unlocks_input"),
        ("prints", "OK", ""),
    ],
)
def test_kernel_that_misbehaves_fails_its_own_call(kernel: str, code: str, says: str, mesh: Mesh, oip: Oip) -> None:
    """The caller sees what it may see. The worker that ran the call runs the next one too."""
    workers = mesh.workers
    refusal = oip.refusal(vector(kernel, 1, 2, 3))
    assert refusal.code == code, refusal
    assert re.search(says, refusal.message), refusal
    assert "secret" not in refusal.message
    assert oip.serves()
    assert mesh.workers == workers


def test_masked_array_is_sent_if_nothing_is_masked(mesh: Mesh, oip: Oip) -> None:
    """Masked elements would reach the caller as the numbers below the mask."""
    refusal = oip.refusal(vector("returns_masked", 1, 2, -999, value=-999.0))
    assert refusal.code == INTERNAL
    assert "returned a MaskedArray for output0 with masked elements, which cannot be sent; return filled" in str(
        refusal
    )
    assert arrays_of(oip.infer(vector("returns_masked", 1, 2, value=-999.0)))[0].tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    "dtype", ["'longdouble'", "'clongdouble'", "'datetime64[7D]'", "'timedelta64'", "'V4'", "[('a', 'f8')]"]
)
def test_kernel_that_returns_what_no_datatype_carries_fails_its_own_call(dtype: str, mesh: Mesh, oip: Oip) -> None:
    """Where any dtype is declared, one that cannot travel is INTERNAL with its name, and no worker ends."""
    workers = mesh.workers
    refusal = oip.refusal(vector("returns_unserved_dtype", 1, dtype=dtype))
    assert refusal.code == INTERNAL, refusal
    assert "for output0" in refusal.message
    assert oip.serves()
    assert mesh.workers == workers


@pytest.mark.parametrize("message", ["", "x is no prime", "größe: 0 < x\nand x < 1 %41", "x" * 1000])
def test_kernel_error_reaches_its_caller_as_it_stands(message: str, oip: Oip) -> None:
    """Any text arrives unchanged with INVALID_ARGUMENT."""
    assert oip.refusal(request("raises_kernel_error", None, message=message)) == Refusal(INVALID, message)


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        ("message: wanted another", ("message",)),
        ("times:", ("times",)),
        ("message wanted", ()),
        ("text: wanted another", ()),
        (": wanted another", ()),
    ],
)
def test_kernel_error_blames_the_argument_that_it_begins_with(message: str, fields: tuple[str, ...], oip: Oip) -> None:
    """The name of an argument of the kernel, before a colon, is the field of the BadRequest."""
    refusal = oip.refusal(request("raises_kernel_error", None, message=message))
    assert (refusal.code, refusal.message, refusal.fields) == (INVALID, message, fields)


@pytest.mark.parametrize("character", ["x", "ö", "\U0001f40d", "\n"])
@pytest.mark.parametrize("length", [1000, 5000, 1_000_000])
def test_kernel_error_that_fits_no_trailer_is_cut(character: str, length: int, mesh: Mesh, oip: Oip) -> None:
    """A long text is cut, since trailers of more than some KiB are lost and the status with them. The status stays."""
    workers = mesh.workers
    refusal = oip.refusal(request("raises_kernel_error", None, message=character, times=length))
    assert refusal.code == INVALID, refusal
    assert refusal.message.startswith(character * 100)
    assert oip.serves()
    assert mesh.workers == workers


@pytest.mark.parametrize("kind", ["surrogate", "exception"])
def test_kernel_error_that_is_no_text_fails_its_own_call(kind: str, mesh: Mesh, oip: Oip) -> None:
    """A KernelError that UTF-8 or a frame cannot hold is still INVALID_ARGUMENT, and no worker ends."""
    workers = mesh.workers
    assert oip.refusal(request("raises_kernel_error_of", None, kind=kind)).code == INVALID
    assert oip.serves()
    assert mesh.workers == workers


def test_kernels_exception_is_logged_whole(mesh: Mesh, oip: Oip) -> None:
    """The id that the caller got leads to the traceback in the dispatcher's log."""
    identity = oip.refusal(vector("raises_value_error", 1)).message.split()[-1]

    def told() -> list[str]:
        stories = [entry.get("exception", "") for entry in mesh.dispatcher_service.entries]
        return [story for story in stories if story.startswith(identity)]

    # The log line may come after the answer, and other calls of this kernel have failed before.
    wait_until(told, "it is logged")
    assert "a secret of the server" in told()[0]


@pytest.mark.parametrize("microseconds", [1, 1000, 100_000])
def test_expired_deadline_is_told(microseconds: int, mesh: Mesh, oip: Oip, lane: LaneEnd) -> None:
    """A call without time left ends DEADLINE_EXCEEDED through either door, and other calls go on."""
    slow = request("sleeps", None, seconds=0.3)

    def idle() -> bool:
        return not Scrape(mesh.dispatcher_metrics).labels("unlatch_worker_running_seconds")

    # Behind a run it would be refused on arrival.
    wait_until(idle, "the workers are idle")
    lane.call(1, slow, remaining_microseconds=microseconds)
    refusal = lane.refusal(1)
    assert (refusal.code, refusal.fields) == ("DEADLINE_EXCEEDED", ())
    assert "sleeps did not answer within" in refusal.message
    wait_until(idle, "the workers are idle")
    assert oip.refusal(slow, timeout=microseconds / 1e6).code == "DEADLINE_EXCEEDED"
    assert lane.serves(2)
    assert oip.serves()


@pytest.mark.parametrize("microseconds", [2**63, 2**64 - 1])
def test_endless_deadline_is_the_longest_there_is(microseconds: int, lane: LaneEnd) -> None:
    """A deadline beyond what clocks can count is no error."""
    lane.call(1, vector("identity", 1), remaining_microseconds=microseconds)
    assert lane.refusal(1).code == "OK"


def test_oversized_messages_are_refused_with_the_bound(start_mesh: StartMesh) -> None:
    """Messages over max_message_bytes are RESOURCE_EXHAUSTED.

    Up to a certain size the message says what to do instead.
    """
    mesh = start_mesh(gateway=["--max-message-bytes", str(256 * KIBIBYTE)])
    with grpc.insecure_channel(mesh.gateway, options=LARGE) as channel:
        oip = Oip(channel)
        fitting = request("identity", {"x": np.zeros(255 * KIBIBYTE, "u1")})
        assert oip.refusal(fitting).code == "OK"
        for size in (257 * KIBIBYTE, 4096 * KIBIBYTE, 16384 * KIBIBYTE):
            refusal = oip.refusal(request("identity", {"x": np.zeros(size, "u1")}))
            assert refusal.code == "RESOURCE_EXHAUSTED", (size, refusal)
            # Larger messages are refused by gRPC, in its own words.
            assert ("lane carries larger ones" if size < 8192 * KIBIBYTE else "larger than max") in refusal.message
            assert oip.serves()
        a, b = np.zeros((200, 1)), np.zeros((1, 200))
        refusal = oip.refusal(request("matmul", {"a": a, "b": b}))
        assert refusal.code == "RESOURCE_EXHAUSTED"
        assert "max_message_bytes=262144" in refusal.message
        with LaneEnd(channel) as lane:
            lane.call(1, request("matmul", {"a": a, "b": b}))
            assert len(lane.reply(1)[1]) == 200 * 200 * 8


@pytest.mark.parametrize(
    ("dispatcher", "gateway", "says"),
    [
        (["--max-call-bytes", "65536"], [], "max_call_bytes=65536"),
        (["--input-arena-bytes", "65536"], [], "input_arena_bytes=65536"),
        (["--max-reply-bytes", "65536"], [], "max_reply_bytes=65536"),
        ([], ["--max-live-bytes", "65536"], "max_live_bytes=65536"),
    ],
    ids=["call", "arena", "reply", "gateway"],
)
def test_calls_over_a_bound_are_refused_with_it(
    dispatcher: list[str], gateway: list[str], says: str, start_mesh: StartMesh
) -> None:
    """Each bound on bytes is RESOURCE_EXHAUSTED with its name and value. A call below it is served."""
    mesh = start_mesh(dispatcher=dispatcher, gateway=gateway)
    with grpc.insecure_channel(mesh.gateway, options=LARGE) as channel:
        oip = Oip(channel)
        refusal = oip.refusal(request("identity", {"x": np.zeros(100_000, "u1")}))
        assert (refusal.code, says in refusal.message) == ("RESOURCE_EXHAUSTED", True), refusal
        assert oip.serves()


def test_unknown_model_is_not_found_by_its_metadata_either(oip: Oip) -> None:
    """ModelMetadata ends NOT_FOUND with similar names, and ModelReady is false. A known model has both."""
    unknown = ModelMetadataRequest(name="identiti").SerializeToString()
    refusal = oip.refusal(unknown, "ModelMetadata")
    assert (refusal.code, refusal.fields) == ("NOT_FOUND", ("model_name",))
    assert "did you mean identity" in refusal.message
    for name, ready in (("identity", True), ("identiti", False)):
        answer = oip.send(ModelReadyRequest(name=name).SerializeToString(), "ModelReady")
        assert ModelReadyResponse.FromString(answer).ready is ready
    answer = oip.send(ModelMetadataRequest(name="summarise").SerializeToString(), "ModelMetadata")
    assert [tensor.name for tensor in ModelMetadataResponse.FromString(answer).outputs] == ["mean", "ranks"]


# Bytes that are not messages, or not the intended ones.

fuzzed = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
RIGHT = request("shared_axes", {"a": np.ones((2, 3)), "b": np.ones((3, 4)), "c": np.ones(2)}).SerializeToString()
# Statuses that a caller's own fault, or luck, can lead to.
CALLERS_FAULT = {INVALID, "NOT_FOUND", "OK"}


@st.composite
def mutated(draw: st.DrawFn, message: bytes) -> bytes:
    """Return a message with some bytes changed, cut out, doubled or inserted."""
    spoiling = bytearray(message)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(spoiling)))
        until = min(len(spoiling), at + draw(st.integers(0, 12)))
        put = draw(st.one_of(st.binary(max_size=12), st.just(bytes(spoiling[at:until]) * 2)))
        spoiling[at:until] = put
    return bytes(spoiling)


@fuzzed
@given(message=st.one_of(st.binary(max_size=200), mutated(RIGHT)))
def test_any_bytes_are_answered_as_the_callers_fault(message: bytes, oip: Oip) -> None:
    """Random and mutated requests end with a status that says what is wrong, and never with an internal error."""
    assert oip.refusal(message).code in CALLERS_FAULT


def test_truncated_request_is_refused_at_every_length(oip: Oip) -> None:
    """A request that was cut at any byte is refused. After all of them a right one is served."""
    for length in range(len(RIGHT)):
        refusal = oip.refusal(RIGHT[:length])
        assert refusal.code in {INVALID, "NOT_FOUND"}, length
    assert oip.refusal(RIGHT).code == "OK"


@pytest.mark.parametrize("method", ["ServerLive", "ServerReady", "ServerMetadata", "ModelReady", "ModelMetadata"])
def test_other_methods_take_any_bytes(method: str, oip: Oip) -> None:
    """The small methods refuse bytes that are no message, or do not need to read them."""
    chosen = random.Random(0)
    for length in range(1, 40):
        assert oip.refusal(b"\x0a\xff" + chosen.randbytes(length), method).code in CALLERS_FAULT


WHOLE_CALL = LaneMessage(
    frames=Frames(calls=[descriptor(7, request("identity", {"x": np.ones(3)}))]), payload=[np.ones(3).tobytes()]
).SerializeToString()


@fuzzed
@given(message=st.one_of(st.binary(min_size=1, max_size=200), mutated(WHOLE_CALL)))
def test_any_bytes_on_a_lane_harm_that_lane_alone(message: bytes, channel: grpc.Channel) -> None:
    """The lane gives an answer or ends INVALID_ARGUMENT. A running call of another lane is not affected."""
    with LaneEnd(channel) as untouched, LaneEnd(channel) as spoilt_lane:
        untouched.call(1, request("sleeps", None, seconds=0.0))
        spoilt_lane.send_bytes(message)
        end = spoilt_lane.close()
        assert end.code in {INVALID, "OK"}, end
        assert untouched.refusal(1).code == "OK"


def ended_by(channel: grpc.Channel, frames: Frames, *payload: bytes) -> Refusal:
    """Return how a lane ends that has a slow call in flight when this message comes."""
    slow = Frames(calls=[descriptor(1, request("sleeps", None, seconds=0.05))])
    slow.MergeFrom(frames)
    with LaneEnd(channel) as lane:
        lane.send(slow, *payload)
        return lane.end()


def piece(number: int) -> Frames:
    frames = Frames()
    frames.pieces.add(call=number)
    return frames


LONG = request("identity", {"x": np.arange(100_000.0)})
LONG_BODY = LONG.raw_input_contents[0]


@pytest.mark.parametrize(
    ("frames", "payload", "says"),
    [
        (Frames(calls=[descriptor(1, vector("identity", 1))]), [bytes(8)], "call 1 is already under way"),
        (Frames(calls=[descriptor(2, vector("identity", 1))]), [bytes(9)], "does not have the lengths"),
        (Frames(calls=[descriptor(2, vector("identity", 1))]), [], "does not have the lengths"),
        (Frames(calls=[descriptor(2, vector("identity", 1))]), [bytes(8), b""], "0 pieces are declared, but 1"),
        (piece(1), [], "1 pieces are declared, but 0"),
        (Frames(), [b"x"], "0 pieces are declared, but 1"),
        (Frames(replies=[Reply(call=1, lengths=[1], whole=True)]), [b"x"], "0 pieces are declared, but 1"),
    ],
    ids=["repeated", "too long", "absent", "entry too many", "piece without bytes", "bytes without piece", "reply"],
)
def test_what_no_caller_may_send_ends_its_lane(
    frames: Frames, payload: list[bytes], says: str, channel: grpc.Channel, lane: LaneEnd
) -> None:
    """The lane ends INVALID_ARGUMENT with the reason. Other lanes are not affected."""
    end = ended_by(channel, frames, *payload)
    assert (end.code, says in end.message) == (INVALID, True), end
    assert lane.serves(1)


@pytest.mark.parametrize("extra", [1, 100_000])
def test_piece_that_overruns_its_tensor_ends_its_lane(extra: int, channel: grpc.Channel, lane: LaneEnd) -> None:
    """A body that is longer than its descriptor says ends the lane. Other lanes are not affected."""
    with LaneEnd(channel) as spoilt_lane:
        spoilt_lane.send(Frames(calls=[descriptor(1, LONG, whole=False)]))
        spoilt_lane.send(piece(1), LONG_BODY + bytes(extra))
        end = spoilt_lane.end()
    assert (end.code, "crosses the end of its tensor" in end.message) == (INVALID, True), end
    assert lane.serves(1)


def test_empty_piece_ends_its_lane(channel: grpc.Channel) -> None:
    """A piece of no bytes has no meaning, and is not allowed."""
    with LaneEnd(channel) as spoilt_lane:
        spoilt_lane.send(Frames(calls=[descriptor(1, LONG, whole=False)]))
        spoilt_lane.send(piece(1), b"")
        assert spoilt_lane.end().code == INVALID


def test_frames_about_unknown_calls_are_ignored(lane: LaneEnd) -> None:
    """A piece for a call that does not exist, or not any more, is ignored, and so is a cancel."""
    lane.send(piece(99), b"bytes")
    lane.send(Frames(cancels=[99, 2**64 - 1]))
    assert lane.serves(1)
    lane.send(piece(1), b"late")
    lane.send(Frames(cancels=[1]))
    assert lane.serves(1)


def test_refused_call_may_still_send_its_pieces(lane: LaneEnd) -> None:
    """A call that is refused by its descriptor is answered at once, and the rest of its body is ignored."""
    wrong = request("summarise", {"x": np.zeros((300, 300))})
    lane.send(Frames(calls=[descriptor(1, wrong, whole=False)]))
    assert lane.refusal(1).code == INVALID
    for frames, payload in pieces(1, list(wrong.raw_input_contents), 65536):
        lane.send(frames, payload)
    assert lane.serves(2)


def test_body_may_come_in_any_pieces(lane: LaneEnd) -> None:
    """Pieces of any size, of several calls by turns, make up the bodies that were sent."""
    for number, size in ((1, 1000), (2, 77_777), (3, 800_000)):
        lane.send(Frames(calls=[descriptor(number, LONG, whole=False)]))
        for frames, payload in pieces(number, [LONG_BODY], size):
            lane.send(frames, payload)
    for number in (3, 1, 2):
        reply, body = lane.reply(number)
        assert reply.HasField("response")
        assert body == LONG_BODY


@pytest.mark.parametrize("size", [2, 20_000])
def test_numbers_of_one_lane_mean_nothing_on_another(size: int, channel: grpc.Channel) -> None:
    """Callers choose their own call numbers. Each gets its own answer, whatever numbers others use."""
    with LaneEnd(channel) as one, LaneEnd(channel) as other:
        bodies = {
            (lane, number): np.full(size, number + 0.25 * (lane is one))
            for lane in (one, other)
            for number in range(1, 41)
        }
        for number in range(1, 41):
            for lane, chosen in ((one, number), (other, 41 - number)):
                lane.call(chosen, request("identity", {"x": bodies[lane, chosen]}))
        for (lane, number), sent in bodies.items():
            assert lane.reply(number)[1] == sent.tobytes()
        one.send(Frames(cancels=range(1, 200)))
        assert other.serves(41)
        assert one.serves(41)


def test_answer_to_one_lane_takes_nothing_from_another(start_mesh: StartMesh) -> None:
    """A call's answer leaves another lane's call alone that has the same number at the gateway."""
    mesh = start_mesh()
    with grpc.insecure_channel(mesh.gateway) as channel, LaneEnd(channel) as one, LaneEnd(channel) as other:
        # This gateway's first call has number 1 on the replica's lane.
        one.call(5, request("sleeps", None, seconds=0.2))
        assert one.serves(6)
        assert other.serves(1)
        assert one.refusal(5).code == "OK"


@pytest.mark.parametrize("how", ["closed", "broken", "cancelled", "expired"])
def test_call_left_in_the_middle_of_its_body_gives_its_memory_back(how: str, start_mesh: StartMesh) -> None:
    """Calls that end without their whole body free their memory. Far more of them than fit do not exhaust the arena."""
    mesh = start_mesh(dispatcher=["--input-arena-bytes", str(3 * len(LONG_BODY))])
    with grpc.insecure_channel(mesh.gateway) as channel:
        for _ in range(8):
            with LaneEnd(channel) as lane:
                left = descriptor(1, LONG, whole=False, remaining_microseconds=100_000 if how == "expired" else 0)
                lane.send(Frames(calls=[left]))
                lane.send(piece(1), LONG_BODY[:1000])
                # This answer comes behind the descriptor, so the dispatcher has seen the descriptor.
                assert lane.serves(2)
                if how == "broken":
                    lane.send(piece(1), LONG_BODY)
                    assert lane.end().code == INVALID
                elif how == "cancelled":
                    lane.send(Frames(cancels=[1]))
                elif how == "expired":
                    assert lane.refusal(1).code == "DEADLINE_EXCEEDED"
                lane.close()
        (x,) = arrays_of(Oip(channel).infer(LONG))
        assert x.tobytes() == LONG_BODY


def test_caller_that_leaves_during_a_drain_does_not_hold_it_up(tmp_path: Path) -> None:
    """Abandoned calls are not drained: the service ends before its drain_seconds are over."""
    with running_dispatcher(tmp_path / "dispatcher.sock") as dispatcher:
        with grpc.insecure_channel(dispatcher.wait_for("serving")["listen"]) as channel, LaneEnd(channel) as lane:
            lane.call(1, request("sleeps", None, seconds=0.2))
            assert lane.serves(2)
            dispatcher.signal(signal.SIGTERM)
            dispatcher.wait_for("draining")
        dispatcher.wait()
        assert not [entry for entry in dispatcher.entries if entry["event"] == "drain timed out"], dispatcher

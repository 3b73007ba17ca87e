"""The Open Inference Protocol as its own tools use it: tritonclient in a process of its own, and fields by hand."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from tests.support.doors import LARGE, Oip, arrays_of, request, vector
from tests.support.mesh import KERNELS, ROOT, Mesh
from unlatch.protos.inference_pb2 import ModelInferRequest, ModelInferResponse

# A client of the protocol, in a process without our code: it prints what it saw as JSON.
_TRITON = """
import importlib.metadata, json, sys
import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

client = triton.InferenceServerClient(sys.argv[1])
seen = {"version": importlib.metadata.version("tritonclient")}
seen["live"], seen["ready"] = client.is_server_live(), client.is_server_ready()
seen["models"] = [client.is_model_ready("identity"), client.is_model_ready("identity", "1"),
                  client.is_model_ready("identity", "2"), client.is_model_ready("identities")]
seen["server"] = client.get_server_metadata(as_json=True)
seen["metadata"] = client.get_model_metadata("summarise", as_json=True)

def echoed(array, datatype=None):
    tensor = triton.InferInput("x", array.shape, datatype or np_to_triton_dtype(array.dtype))
    tensor.set_data_from_numpy(array)
    outputs = [triton.InferRequestedOutput("output0")]
    result = client.infer("identity", [tensor], outputs=outputs, request_id="größe-1", client_timeout=20)
    back = result.as_numpy("output0")
    response = result.get_response()
    assert (response.id, response.model_name, response.model_version) == ("größe-1", "identity", "1"), response
    assert list(back.shape) == list(array.shape), (back.shape, array.shape)
    return back

wrong = []
dtypes = ["?", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8", "O"]
shapes = [(), (1,), (3, 4), (0,), (2, 0, 3), (1, 2, 3, 4, 5)]
for dtype in dtypes:
    for shape in shapes:
        array = np.arange(int(np.prod(shape))).reshape(shape).astype(dtype)
        if dtype == "O":
            array = np.array([b"\\x00\\xff" * i for i in range(array.size)], dtype=object).reshape(shape)
        back = echoed(array)
        if back.dtype != array.dtype or back.tolist() != array.tolist():
            wrong.append([dtype, shape, back.dtype.str, back.tolist()])
big = np.random.default_rng(0).random((1024, 2048))
if echoed(big).tobytes() != big.tobytes():
    wrong.append("16 MiB")
strings = np.array(["größe", "", "a" * 70000], dtype=object)
if [s.decode() for s in echoed(strings)] != strings.tolist():
    wrong.append("strings")
seen["wrong"] = wrong

scalars = client.infer("default_scalars", [], parameters={"flag": False, "count": 7, "label": "x"})
seen["scalars"] = [element.decode() for element in scalars.as_numpy("output0")]
x = triton.InferInput("x", [2], "FP32")
x.set_data_from_numpy(np.zeros(2, "f4"))
try:
    client.infer("summarise", [x])
except InferenceServerException as error:
    seen["refusal"] = [error.status(), error.message()]
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def seen(mesh: Mesh) -> dict[str, Any]:
    """The output of tritonclient's process."""
    isolated = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "UNLATCH"))}
    ran = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", _TRITON, mesh.gateway],
        check=False,
        capture_output=True,
        text=True,
        env=isolated,
        cwd="/",
        timeout=50,
    )
    assert ran.returncode == 0, f"{ran.stderr}\n{mesh}"
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


def test_triton_sees_a_live_server(seen: dict[str, Any]) -> None:
    """The server is live and ready, has a name, and each model is ready in its only version."""
    assert seen["version"].startswith("2.73")
    assert (seen["live"], seen["ready"]) == (True, True)
    assert seen["models"] == [True, True, False, False]
    assert seen["server"]["name"] == "unlatch"


def test_triton_reads_a_kernels_metadata(seen: dict[str, Any]) -> None:
    """Names, datatypes and shapes of inputs and outputs."""
    metadata = seen["metadata"]
    assert (metadata["name"], metadata["versions"]) == ("summarise", ["1"])
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP64", "shape": ["-1"]}]
    assert [(tensor["name"], tensor["datatype"]) for tensor in metadata["outputs"]] == [
        ("mean", "FP64"),
        ("ranks", "INT64"),
    ]


def test_triton_gets_every_datatype_back(seen: dict[str, Any]) -> None:
    """Every datatype, BYTES and FP16 among them, in every shape from 0-d to empty to 16 MiB."""
    assert seen["wrong"] == []


def test_triton_sends_scalars_as_parameters(seen: dict[str, Any]) -> None:
    """Given scalars, and the defaults of the others, arrive with their types."""
    assert seen["scalars"] == ["False", "7", "0.5", "'x'"]


def test_triton_raises_our_refusals(seen: dict[str, Any]) -> None:
    """A wrong dtype is an InferenceServerException with status and text."""
    status, message = seen["refusal"]
    assert status == "StatusCode.INVALID_ARGUMENT"
    assert "x: wanted float64" in message


@pytest.mark.parametrize("order", ["unlatch, tritonclient.grpc", "tritonclient.grpc, unlatch"])
def test_unlatch_and_tritonclient_import_in_one_process(order: str) -> None:
    """A process that imports both has both sides' messages, in either order of imports."""
    code = f"import {order}; unlatch.Client, unlatch.BlockingClient, unlatch.kernel, tritonclient.grpc.InferInput"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True, text=True, timeout=30
    )
    assert ran.returncode == 0, ran.stderr


def fields_of(message: ModelInferRequest) -> dict[str, bytes]:
    """Serialise each field of a request alone."""
    found = {}
    for field, _ in message.ListFields():
        alone = ModelInferRequest()
        alone.CopyFrom(message)
        for other, _ in message.ListFields():
            if other.name != field.name:
                alone.ClearField(other.name)  # type: ignore[arg-type]
        found[field.name] = alone.SerializeToString()
    return found


def orders() -> Iterator[list[str]]:
    yield ["raw_input_contents", "inputs", "id", "model_name", "parameters"]
    yield ["inputs", "raw_input_contents", "parameters", "model_name", "id"]
    yield ["id", "raw_input_contents", "model_name", "inputs", "parameters"]


@pytest.mark.parametrize("order", list(orders()), ids=lambda order: order[0])
def test_fields_may_come_in_any_order(order: list[str], oip: Oip) -> None:
    """Protobuf guarantees no order of fields, nor that there are no unknown ones."""
    message = vector("summarise", 3, 1, 2)
    message.id = "42"
    alone = fields_of(message)
    unknown = b"\xfa\x3e\x03abc" + b"\xf8\x3e\x01" + b"\xf9\x3e" + bytes(8) + b"\xfd\x3e" + bytes(4)
    mixed = unknown.join(alone[name] for name in order if name in alone) + unknown
    response = ModelInferResponse.FromString(oip.send(mixed))
    mean, ranks = arrays_of(response)
    assert (response.id, float(mean), ranks.tolist()) == ("42", 2.0, [2, 0, 1])


def test_raw_contents_may_lie_between_inputs(oip: Oip) -> None:
    """Contents and inputs may alternate, contents first: each repeated field counts by itself."""
    a, b = np.arange(6.0).reshape(2, 3), np.arange(12.0).reshape(3, 4)
    parts = [ModelInferRequest(model_name="matmul")]
    for name, array in (("a", a), ("b", b)):
        whole = request("", {name: array})
        parts += ModelInferRequest(raw_input_contents=whole.raw_input_contents), ModelInferRequest(inputs=whole.inputs)
    response = ModelInferResponse.FromString(oip.send(b"".join(part.SerializeToString() for part in parts)))
    assert arrays_of(response)[0].tolist() == (a @ b).tolist()


def test_inputs_may_come_in_any_order(oip: Oip) -> None:
    """Tensors are matched with arguments by name, not by position."""
    a, b, c = np.ones((2, 3)), np.arange(12.0).reshape(3, 4), np.array([10.0, 20.0])
    expected = (a @ b + c[:, None]).tolist()
    for arrays in ({"a": a, "b": b, "c": c}, {"c": c, "b": b, "a": a}, {"b": b, "c": c, "a": a}):
        assert arrays_of(oip.infer(request("shared_axes", arrays)))[0].tolist() == expected


def test_named_outputs_come_in_their_order(oip: Oip) -> None:
    """A NamedTuple's fields name the outputs."""
    response = oip.infer(vector("summarise", 3, 1, 2))
    assert [(tensor.name, tensor.datatype, list(tensor.shape)) for tensor in response.outputs] == [
        ("mean", "FP64", []),
        ("ranks", "INT64", [3]),
    ]


def test_complex_travels_as_pairs(oip: Oip) -> None:
    """A complex128 array goes in and comes back as FP64 with a last axis of 2, and a parameter says so."""
    z = np.array([1 + 2j, -3j])
    message = request("conjugate", {"z": z.view("f8").reshape(2, 2)})
    message.inputs[0].parameters["np_dtype"].string_param = "complex128"
    response = oip.infer(message)
    (tensor,) = response.outputs
    assert (tensor.datatype, list(tensor.shape)) == ("FP64", [2, 2])
    assert tensor.parameters["np_dtype"].string_param == "complex128"
    assert np.frombuffer(response.raw_output_contents[0], "c16").tolist() == z.conj().tolist()


@pytest.mark.parametrize("dtype", ["datetime64[ns]", "datetime64[D]", "timedelta64[us]"])
def test_times_travel_as_integers(dtype: str, oip: Oip) -> None:
    """Datetimes go in and come back as INT64 with their unit, NaT included."""
    message = request("identity", {"x": np.array([0, 1, -(2**63)])})
    message.inputs[0].parameters["np_dtype"].string_param = dtype
    response = oip.infer(message)
    assert response.outputs[0].parameters["np_dtype"].string_param == dtype
    assert response.raw_output_contents[0] == message.raw_input_contents[0]


def test_axis_of_any_length_binds_nothing(oip: Oip) -> None:
    """The axis `_` in a result has any length, whatever `_` was in an argument."""
    assert arrays_of(oip.infer(vector("first_two", 1, 2, 3)))[0].tolist() == [1, 2]


def test_results_are_little_endian_and_row_major(oip: Oip) -> None:
    """A kernel's array may have any byte order and strides: the caller gets the protocol's."""
    assert arrays_of(oip.infer(vector("returns_big_endian", 1, 2, 3)))[0].tolist() == [1, 2, 3]
    x = np.arange(6.0).reshape(2, 3)
    assert arrays_of(oip.infer(request("returns_strided", {"x": x})))[0].tolist() == x.T.tolist()


def test_kernel_of_any_float_keeps_the_callers(oip: Oip) -> None:
    """A kernel that takes several dtypes answers in the one that it was given."""
    for dtype in ("f2", "f4", "f8"):
        (half,) = arrays_of(oip.infer(request("halve", {"x": np.array([1, 3], dtype)})))
        assert (half.dtype.str[1:], half.tolist()) == (dtype, [0.5, 1.5])


@pytest.mark.parametrize("sizes", [(1, 1), (3, 5), (1, 4095), (4097, 7), (65, 70_001), (1_000_001, 3), (0, 1)])
def test_tensors_are_aligned_in_the_worker(sizes: tuple[int, int], oip: Oip) -> None:
    """Every tensor begins on a 64-byte boundary, whatever the lengths before it."""
    arrays = {name: np.zeros(size, "u1") for name, size in zip("xy", sizes, strict=True)}
    assert arrays_of(oip.infer(request("alignments", arrays)))[0].tolist() == [0, 0]


def test_aligned_on_a_busy_arena(mesh: Mesh) -> None:
    """This holds also where many calls of odd lengths lie side by side in the arena."""
    with grpc.insecure_channel(mesh.gateway, options=LARGE) as channel:
        rpc: Any = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        waiting = []
        for size in range(1, 20_000, 307):
            arrays = {"x": np.zeros(size, "u1"), "y": np.zeros(size * 3 + 1, "u1")}
            waiting.append(rpc.future(request("alignments", arrays).SerializeToString(), timeout=10))
        for answer in waiting:
            assert arrays_of(ModelInferResponse.FromString(answer.result()))[0].tolist() == [0, 0]


def strings_of(response: ModelInferResponse) -> set[str]:
    raw, at, found = response.raw_output_contents[0], 0, set()
    while at < len(raw):
        size = int.from_bytes(raw[at : at + 4], "little")
        found.add(raw[at + 4 : at + 4 + size].decode())
        at += 4 + size
    return found


def test_workers_load_nothing_of_the_servers(oip: Oip) -> None:
    """A worker has no gRPC, uvloop or prometheus_client, and nothing that only the dispatcher needs."""
    modules = strings_of(oip.infer(request("module_names")))
    assert {"numpy", "unlatch.compute.worker.loop", "unlatch.compute.kernels.basics"} <= modules
    tops = {name.partition(".")[0] for name in modules}
    assert tops.isdisjoint({"grpc", "uvloop", "prometheus_client", "gateway", "structlog", "pydantic", "google"})


def test_numpy_and_kernels_come_preloaded(mesh: Mesh, oip: Oip) -> None:
    """The kernels' modules, and so NumPy, were loaded in the forkserver before any worker was forked."""
    (pids,) = arrays_of(oip.infer(request("numpy_loaded_in")))
    loaded_in, worker = pids.tolist()
    assert loaded_in == mesh.pids["forkserver"]
    assert worker in mesh.workers
    assert KERNELS.is_file()

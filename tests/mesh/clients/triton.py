"""NVIDIA's client in a process without our code: `triton.py ADDRESS SCENARIO` prints what it saw.

Tests do not import this module: protobuf has one pool of names, and both sides define the package `inference`.
"""

import json
import queue
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import grpc
import numpy as np
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

WITHIN_SECONDS = 20
Answer = tuple[Any, InferenceServerException | None]


def tensor(name: str, array: np.ndarray, np_dtype: str = "") -> Any:
    """Make an input; with `np_dtype`, one whose datatype only carries that dtype."""
    given = triton.InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
    given.set_data_from_numpy(array)
    if np_dtype:
        given._get_tensor().parameters["np_dtype"].string_param = np_dtype
    return given


def kept(answers: "queue.SimpleQueue[Answer]") -> Callable[..., None]:
    """Keep each answer. The client calls this from a thread of its own."""
    return lambda result, error: answers.put((result, error))


def refused(call: Callable[[], Any]) -> list[Any]:
    """Return a refusal's status and text."""
    try:
        call()
    except InferenceServerException as error:
        return [error.status(), error.message()]
    except grpc.RpcError as error:
        return [str(error.code()), error.details()]
    return ["OK", ""]


def metadata(client: Any) -> Any:
    """Ask for the metadata of the server and of three kernels."""
    return {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "models": [client.is_model_ready(*model) for model in (("halve",), ("halve", "1"), ("halve", "2"), ("no",))],
        "server": client.get_server_metadata(as_json=True),
        "summarise": client.get_model_metadata("summarise", as_json=True),
        "conjugate": client.get_model_metadata("conjugate", as_json=True),
        "halve": client.get_model_metadata("halve", as_json=True),
        "unknown": refused(lambda: client.get_model_metadata("halves")),
    }


def config(client: Any) -> Any:
    """Ask for the configuration, as load generators do first."""
    return {
        "summarise": client.get_model_config("summarise", as_json=True),
        "fixed_axes": client.get_model_config("fixed_axes", as_json=True),
        "turned": client.get_model_config("turned", as_json=True),
        "unknown": refused(lambda: client.get_model_config("halves")),
    }


def batches(client: Any) -> Any:
    """Return a kernel's counts before and after 60 calls, one of them refused, that come while the workers are busy."""

    def counts() -> Any:
        (model,) = client.get_inference_statistics("turned", as_json=True)["model_stats"]
        return model

    before, answers = counts(), queue.SimpleQueue[Answer]()
    for _ in range(4):
        client.async_infer("burns", [], kept(queue.SimpleQueue()), parameters={"seconds": 0.1})
    for number in range(60):
        x, z = np.full((number % 3 + 1, 3), float(number)), np.ones((number % 3 + 1, 1, 2))
        given = [tensor("x", x), tensor("z", z, "complex128")]
        client.async_infer("turned", given, kept(answers), parameters={"turns": 2 if number else "two"})
    failed = sum(answers.get(timeout=WITHIN_SECONDS)[1] is not None for _ in range(60))
    return {"before": before, "after": counts(), "failed": failed}


def index(client: Any) -> Any:
    """List every kernel."""
    return client.get_model_repository_index(as_json=True)


def statistics(client: Any) -> Any:
    """Return a kernel's counts before and after 7 successes and 3 refusals, and the number of kernels."""

    def counts() -> Any:
        (model,) = client.get_inference_statistics("raises_kernel_error_of", as_json=True)["model_stats"]
        return model

    def of_sleeps() -> Any:
        (model,) = client.get_inference_statistics("sleeps", "1", as_json=True)["model_stats"]
        return model

    seen = {"before": of_sleeps(), "refusing_before": counts()}
    for _ in range(7):
        client.infer("sleeps", [], parameters={"seconds": 0.01})
    for _ in range(3):
        refused(lambda: client.infer("raises_kernel_error_of", [], parameters={"kind": "exception"}))
    every = client.get_inference_statistics(as_json=True)["model_stats"]
    return seen | {
        "after": of_sleeps(),
        "refusing_after": counts(),
        "every": [model["name"] for model in every],
        "unknown": refused(lambda: client.get_inference_statistics("halves")),
    }


def async_infer(client: Any) -> Any:
    """Make 200 calls at a time, each with its own numbers and id; return the wrong answers, and how many came."""
    answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
    for number in range(200):
        given = [tensor("x", np.arange(number % 7 + 1, dtype="f8") * number)]
        client.async_infer("halve", given, kept(answers), request_id=f"call-{number}")
    wrong, seen = [], set()
    for _ in range(200):
        result, error = answers.get(timeout=WITHIN_SECONDS)
        if error is not None:
            wrong.append(str(error))
            continue
        number = int(result.get_response().id.removeprefix("call-"))
        seen.add(number)
        if result.as_numpy("output0").tolist() != (np.arange(number % 7 + 1) * number / 2).tolist():
            wrong.append(f"{number}: {result.get_response()}")
    return {"wrong": wrong, "answered": len(seen)}


@contextmanager
def streaming(client: Any) -> Iterator[queue.SimpleQueue[Answer]]:
    """Return a stream's answers in order of arrival."""
    answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
    client.start_stream(kept(answers))
    try:
        yield answers
    finally:
        client.stop_stream()


def stream(client: Any) -> Any:
    """Send 50 requests on one stream, one of them with a wrong dtype, and then one more."""
    right, errors, wrong = [], [], []
    with streaming(client) as answers:
        for number in range(50):
            x = np.full(3, number, "f4" if number == 25 else "f8")
            client.async_stream_infer("summarise", [tensor("x", x)], request_id=f"{number}")
        for _ in range(50):
            result, error = answers.get(timeout=WITHIN_SECONDS)
            if error is not None:
                errors.append(error.message())
                continue
            number = int(result.get_response().id)
            right.append(number)
            if float(result.as_numpy("mean")) != number:
                wrong.append(number)
        client.async_stream_infer("summarise", [tensor("x", np.ones(2))], request_id="after")
        result, error = answers.get(timeout=WITHIN_SECONDS)
        after = None if error else result.get_response().id
    return {"right": right, "wrong": wrong, "errors": errors, "after": after, "more": not answers.empty()}


def two_streams(client: Any) -> Any:
    """Close a stream and open another with the same client; return the answers of each."""
    seen = []
    for name in ("first", "second"):
        with streaming(client) as answers:
            client.async_stream_infer("halve", [tensor("x", np.ones(1))], request_id=name)
            result, error = answers.get(timeout=WITHIN_SECONDS)
            seen.append(str(error) if error else result.get_response().id)
    return seen


def stream_failures(_: Any) -> Any:
    """Return what a stream says of requests that fail in different ways: the text, and the request's id."""
    requests = [
        service_pb2.ModelInferRequest(id="no such kernel", model_name="halves"),
        service_pb2.ModelInferRequest(id="no array", model_name="halve"),
        service_pb2.ModelInferRequest(id="kernel's", model_name="raises_kernel_error"),
    ]
    requests[2].parameters["message"].string_param = "so it is"
    stub = service_pb2_grpc.GRPCInferenceServiceStub(grpc.insecure_channel(sys.argv[1]))
    answers = stub.ModelStreamInfer(iter(requests), timeout=WITHIN_SECONDS)
    return [[answer.infer_response.id, answer.error_message] for answer in answers]


def cancel_stream(client: Any) -> Any:
    """Close a stream while its calls run; return what arrives afterwards, and whether the server goes on."""
    answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
    client.start_stream(kept(answers))
    for _ in range(3):
        client.async_stream_infer("sleeps", [], parameters={"seconds": 0.3})
    client.stop_stream(cancel_requests=True)
    _, error = answers.get(timeout=WITHIN_SECONDS)
    back = client.infer("halve", [tensor("x", np.ones(1))]).as_numpy("output0").tolist()
    return {"status": error.status() if error else "OK", "more": not answers.empty(), "back": back}


def cancel(client: Any) -> Any:
    """Cancel a call; return what the caller sees, and whether the server goes on."""
    answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
    call = client.async_infer("sleeps", [], kept(answers), parameters={"seconds": 0.5})
    call.cancel()
    result, error = answers.get(timeout=WITHIN_SECONDS)
    back = client.infer("halve", [tensor("x", np.ones(1))]).as_numpy("output0").tolist()
    return {"result": result is not None, "status": error.status() if error else "OK", "back": back}


def timeout(client: Any) -> Any:
    """Let a call's time run out, alone and asynchronously."""
    answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
    slow = {"parameters": {"seconds": 0.5}, "client_timeout": 0.05}
    client.async_infer("sleeps", [], kept(answers), **slow)
    _, error = answers.get(timeout=WITHIN_SECONDS)
    return {
        "blocking": refused(lambda: client.infer("sleeps", [], **slow)),
        "asynchronous": error.status() if error else "OK",
        "back": client.infer("halve", [tensor("x", np.ones(1))]).as_numpy("output0").tolist(),
    }


def parameters(client: Any) -> Any:
    """Send Triton's own request parameters, as the client names and encodes them."""
    x = [tensor("x", np.ones(1))]
    slow = {"parameters": {"seconds": 0.5}}
    answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
    client.start_stream(kept(answers))
    client.async_stream_infer("halve", x, enable_empty_final_response=True)
    _, error = answers.get(timeout=WITHIN_SECONDS)
    client.stop_stream()
    return {
        "priority": [
            client.infer("halve", x, priority=level).as_numpy("output0").tolist() for level in (0, 1, 2, 3, 9)
        ],
        "in time": client.infer("halve", x, timeout=5_000_000).as_numpy("output0").tolist(),
        "too late": refused(lambda: client.infer("sleeps", [], timeout=50_000, **slow)),
        "sequence": refused(lambda: client.infer("halve", x, sequence_id=3, sequence_start=True)),
        "named sequence": refused(lambda: client.infer("halve", x, sequence_id="three")),
        "empty final response": error.message() if error else "OK",
    }


NUMERIC = ["?", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8"]
SHAPES = [(), (1,), (0,), (3, 4), (2, 0, 3), (0, 0), (1, 1, 1), (2, 1, 2, 1, 2, 1, 2, 1), (5, 0, 1, 1, 1, 1, 1, 2)]


def values(dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray:
    """Return numbers of a dtype with its extremes among them."""
    some: list[Any]
    if dtype.kind == "b":
        some = [True, False]
    elif dtype.kind == "f":
        limits = np.finfo(dtype)
        some = [0.0, -0.0, 1.5, -np.inf, np.inf, np.nan, limits.max, limits.smallest_subnormal]
    else:
        some = [0, 1, np.iinfo(dtype).min, np.iinfo(dtype).max]
    return np.resize(np.array(some, dtype), shape)


def datatypes(client: Any) -> Any:
    """Send every datatype in odd shapes through `identity`; return what did not come back byte for byte."""
    wrong = []
    for code, shape in product(NUMERIC, SHAPES):
        sent = values(np.dtype(code), shape)
        back = client.infer("identity", [tensor("x", sent)]).as_numpy("output0")
        if (back.dtype, back.shape, back.tobytes()) != (sent.dtype, sent.shape, sent.tobytes()):
            wrong.append([code, shape, back.dtype.str, back.tolist()])
    for shape in SHAPES:
        some = [b"", b"plain", "größe 𝛑 \u200d".encode(), b"\x00\xff" * 300, b"\x04\x00\x00\x00"]
        sent = np.array((some * 4)[: int(np.prod(shape))], dtype=object).reshape(shape)
        back = client.infer("identity", [tensor("x", sent)]).as_numpy("output0")
        if (back.shape, back.tolist()) != (sent.shape, sent.tolist()):
            wrong.append(["BYTES", shape, back.tolist()])
    return wrong


def carried(client: Any) -> Any:
    """Send complex numbers and times; return what did not come back unchanged, with the dtype that it came with."""
    wrong = []
    for name, parts in (("complex64", "f4"), ("complex128", "f8")):
        for shape in ((), (0,), (3,), (2, 2)):
            sent = np.resize(np.array([1 + 2j, -3j, complex(np.nan, np.inf)], name), shape)
            pairs = np.ascontiguousarray(sent)[..., None].view(parts).reshape(*shape, 2)
            wrong += differing(client, sent, pairs, name)
    for name in ("datetime64[ns]", "datetime64[D]", "timedelta64[us]"):
        for shape in ((), (0,), (4,)):
            sent = np.resize(np.array([0, 1, -(2**63), 2**62]).astype(name), shape)
            wrong += differing(client, sent, sent.astype("i8"), name)
    return wrong


def differing(client: Any, sent: np.ndarray, travelling: np.ndarray, name: str) -> list[Any]:
    """Return the differences; empty where everything came back unchanged."""
    result = client.infer("identity", [tensor("x", travelling, name)])
    output = result.get_output("output0")
    back, said = result.as_numpy("output0"), output.parameters["np_dtype"].string_param
    if (said, list(output.shape), back.tobytes()) == (name, list(travelling.shape), sent.tobytes()):
        return []
    return [[name, list(sent.shape), said, list(output.shape), back.tolist()]]


def outputs(client: Any) -> Any:
    """Ask for some of a kernel's outputs, in some order, and for one that does not exist."""

    def asked(*names: str) -> Any:
        wanted = [triton.InferRequestedOutput(name) for name in names] or None
        result = client.infer("summarise", [tensor("x", np.array([3.0, 1.0, 2.0]))], outputs=wanted)
        given = [output.name for output in result.get_response().outputs]
        return {name: result.as_numpy(name).tolist() for name in given}

    return {
        "none named": asked(),
        "both": asked("mean", "ranks"),
        "first": asked("mean"),
        "second": asked("ranks"),
        "unknown": refused(lambda: asked("mean", "median")),
    }


def typed_contents(client: Any) -> Any:
    """Send every datatype of typed contents; return what differed from its bytes, and what was refused."""
    stub = service_pb2_grpc.GRPCInferenceServiceStub(grpc.insecure_channel(sys.argv[1]))

    def sent(datatype: str, field: str, given: list[Any], shape: list[int], *raw: bytes) -> bytes:
        request = service_pb2.ModelInferRequest(model_name="identity", raw_input_contents=raw)
        x = request.inputs.add(name="x", datatype=datatype, shape=shape)
        getattr(x.contents, field).extend(given)
        response = stub.ModelInfer(request, timeout=WITHIN_SECONDS)
        assert response.outputs[0].datatype == datatype
        assert list(response.outputs[0].shape) == shape
        return bytes(response.raw_output_contents[0])

    fields = {
        "bool_contents": {"BOOL": "?"},
        "int_contents": {"INT8": "i1", "INT16": "i2", "INT32": "i4"},
        "int64_contents": {"INT64": "i8"},
        "uint_contents": {"UINT8": "u1", "UINT16": "u2", "UINT32": "u4"},
        "uint64_contents": {"UINT64": "u8"},
        "fp32_contents": {"FP32": "f4"},
        "fp64_contents": {"FP64": "f8"},
    }
    wrong = []
    for field, known in fields.items():
        for datatype, code in known.items():
            array = values(np.dtype(code), (2, 3))
            if sent(datatype, field, array.ravel().tolist(), [2, 3]) != array.tobytes():
                wrong.append(datatype)
    strings = [b"", "größe".encode(), b"\x00"]
    packed = b"".join(len(element).to_bytes(4, "little") + element for element in strings)
    if sent("BYTES", "bytes_contents", strings, [3]) != packed:
        wrong.append("BYTES")
    return {
        "wrong": wrong,
        "too few": refused(lambda: sent("FP64", "fp64_contents", [1.0], [2])),
        "other field": refused(lambda: sent("FP64", "fp32_contents", [1.0, 2.0], [2])),
        "out of range": refused(lambda: sent("INT8", "int_contents", [128], [1])),
        "both ways": refused(lambda: sent("FP64", "fp64_contents", [1.0], [1], bytes(8))),
        "BF16": refused(lambda: sent("BF16", "fp32_contents", [1.0], [1])),
        "BF16 as bytes": refused(lambda: sent("BF16", "bytes_contents", [], [1], b"\x80\x3f")),
    }


def ids(client: Any) -> Any:
    """Return ids as they were sent and as they came back."""
    sent = ["", "1", "größe 𝛑", "x" * 1000]
    back = [client.infer("halve", [tensor("x", np.ones(1))], request_id=given).get_response().id for given in sent]
    return {"sent": sent, "back": back}


def keepalive(_: Any) -> Any:
    """Ping every second during a call of 7 s, and between calls: with the client's defaults, and without its limits."""
    pings = {"keepalive_time_ms": 1000, "keepalive_timeout_ms": 5000}
    always = {"keepalive_permit_without_calls": True, "http2_max_pings_without_data": 0}
    clients = [
        triton.InferenceServerClient(sys.argv[1], keepalive_options=triton.KeepAliveOptions(**pings, **more))
        for more in ({}, always)
    ]
    answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
    for each in clients:
        each.async_infer("sleeps", [], kept(answers), parameters={"seconds": 7.0})
    errors = [str(answers.get(timeout=WITHIN_SECONDS)[1]) for _ in clients]
    time.sleep(4.0)
    back = [each.infer("halve", [tensor("x", np.ones(1))]).as_numpy("output0").tolist() for each in clients]
    for each in clients:
        each.close()
    return {"errors": errors, "back": back}


def shared_memory(client: Any) -> Any:
    """Ask for shared memory's status, which is empty, leave it, and try to register a region."""
    return {
        "system": client.get_system_shared_memory_status(as_json=True),
        "cuda": client.get_cuda_shared_memory_status(as_json=True),
        "unregister": refused(client.unregister_system_shared_memory),
        "register": refused(lambda: client.register_system_shared_memory("a", "/a", 1)),
    }


def forms(client: Any) -> Any:
    """Leave an input out, send lists, a choice and texts, and ask which inputs may be left out."""

    def texts(kernel: str, inputs: list[Any], **parameters: Any) -> list[str]:
        found = client.infer(kernel, inputs, parameters=parameters).as_numpy("output0")
        return [element.decode() for element in found]

    words = triton.InferInput("x", [2], "BYTES")
    words.set_data_from_numpy(np.array(["größe", ""], dtype=object))
    config = client.get_model_config("optional_arrays", as_json=True)["config"]
    return {
        "left out": texts("optional_arrays", [tensor("x", np.ones(1)), tensor("z", np.ones(1))]),
        "lists": texts("lists", [], weights=json.dumps([1, 0.5]), names=json.dumps(["ß"])),
        "choices": texts("choices", [], kind="cubic", degree=2),
        "wrong": refused(lambda: texts("choices", [], kind="square")),
        "texts": texts("upper_case", [words]),
        "optional": [tensor.get("optional", False) for tensor in config["input"]],
    }


if __name__ == "__main__":
    with triton.InferenceServerClient(sys.argv[1]) as opened:
        print(json.dumps(globals()[sys.argv[2]](opened)))

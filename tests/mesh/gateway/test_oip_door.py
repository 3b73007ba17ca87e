"""The protocol's door beyond one raw call: typed contents, chosen outputs, streams, and descriptions of kernels."""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from tests.conftest import StartMesh
from tests.support.doors import Oip, arrays_of, request, vector
from tests.support.watching import Gate, Scrape, wait_until
from unlatch.protos import inference_pb2 as pb

METHOD = "/inference.GRPCInferenceService/"


def typed(datatype: str, shape: list[int], **contents: Any) -> pb.ModelInferRequest:
    """Make a request for `identity` of one tensor with typed contents."""
    message = pb.ModelInferRequest(model_name="identity")
    message.inputs.add(name="x", datatype=datatype, shape=shape, contents=pb.InferTensorContents(**contents))
    return message


TYPED: dict[str, tuple[dict[str, Any], bytes]] = {
    "BOOL": ({"bool_contents": [True, False]}, np.array([True, False]).tobytes()),
    "INT8": ({"int_contents": [-128, 127]}, np.array([-128, 127], "i1").tobytes()),
    "INT16": ({"int_contents": [-32768, 1]}, np.array([-32768, 1], "<i2").tobytes()),
    "INT32": ({"int_contents": [-(2**31), 1]}, np.array([-(2**31), 1], "<i4").tobytes()),
    "INT64": ({"int64_contents": [-(2**63), 1]}, np.array([-(2**63), 1], "<i8").tobytes()),
    "UINT8": ({"uint_contents": [255, 0]}, np.array([255, 0], "u1").tobytes()),
    "UINT16": ({"uint_contents": [65535, 0]}, np.array([65535, 0], "<u2").tobytes()),
    "UINT32": ({"uint_contents": [2**32 - 1, 0]}, np.array([2**32 - 1, 0], "<u4").tobytes()),
    "UINT64": ({"uint64_contents": [2**64 - 1, 0]}, np.array([2**64 - 1, 0], "<u8").tobytes()),
    "FP32": ({"fp32_contents": [1.5, -0.0]}, np.array([1.5, -0.0], "<f4").tobytes()),
    "FP64": ({"fp64_contents": [1e300, np.nan]}, np.array([1e300, np.nan], "<f8").tobytes()),
    "BYTES": ({"bytes_contents": [b"", b"g\xc3\xb6"]}, b"\x00\x00\x00\x00\x03\x00\x00\x00g\xc3\xb6"),
}


@pytest.mark.parametrize("datatype", TYPED)
def test_typed_contents_are_what_raw_bytes_would_be(datatype: str, oip: Oip) -> None:
    """Every datatype that has typed contents can be given in them. The answer is raw."""
    contents, raw = TYPED[datatype]
    answer = oip.infer(typed(datatype, [2], **contents))
    assert answer.outputs[0].datatype == datatype
    assert list(answer.raw_output_contents) == [raw]


def test_large_typed_floats_are_taken(oip: Oip) -> None:
    """Floats are packed in the message: a megabyte of them is no more work than raw bytes."""
    x = np.random.default_rng(1).normal(size=(300, 500)).astype("f4")
    answer = oip.infer(typed("FP32", [300, 500], fp32_contents=x.reshape(-1)))
    assert answer.raw_output_contents[0] == x.tobytes()


def test_empty_array_may_come_without_contents(oip: Oip) -> None:
    """Of two inputs with typed contents one may have no elements at all."""
    message = pb.ModelInferRequest(model_name="matmul")
    message.inputs.add(name="a", datatype="FP64", shape=[0, 2])
    message.inputs.add(name="b", datatype="FP64", shape=[2, 1], contents=pb.InferTensorContents(fp64_contents=[1, 2]))
    assert list(oip.infer(message).outputs[0].shape) == [0, 1]


BOTH = typed("FP64", [1], fp64_contents=[1.0])
BOTH.raw_input_contents.append(bytes(8))
WRONG: dict[str, tuple[pb.ModelInferRequest, str, str]] = {
    "raw too": (BOTH, "contents", "raw_input_contents came too"),
    "another field": (typed("FP32", [1], int_contents=[1]), "x", "FP32 is given in fp32_contents, not in int_contents"),
    "two fields": (typed("INT8", [1], int_contents=[1], bool_contents=[True]), "x", "not in bool_contents"),
    "too large an element": (typed("INT8", [1], int_contents=[128]), "x", "not every element is INT8"),
    "too few": (typed("FP64", [2], fp64_contents=[1.0]), "x", "is 16 bytes, but got 8"),
    "half precision": (typed("FP16", [1], fp32_contents=[1.0]), "x", "'FP16' has no typed contents"),
    "BF16": (typed("BF16", [1], fp32_contents=[1.0]), "x", "'BF16' has no typed contents"),
    "too many integers": (
        typed("INT64", [200_000], int64_contents=range(200_000)),
        "x",
        "past 131072 send the bytes in raw_input_contents",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_typed_contents_are_refused(name: str, oip: Oip) -> None:
    """Each refusal names the tensor and what was wanted."""
    message, field, says = WRONG[name]
    refusal = oip.refusal(message)
    assert (refusal.code, refusal.fields, says in refusal.message) == ("INVALID_ARGUMENT", (field,), True), refusal
    assert oip.serves()


def test_raw_bf16_is_refused_with_what_is_served(oip: Oip) -> None:
    """BF16 has no NumPy dtype: the refusal lists the datatypes that are served."""
    message = pb.ModelInferRequest(model_name="identity", raw_input_contents=[bytes(2)])
    message.inputs.add(name="x", datatype="BF16", shape=[1])
    refusal = oip.refusal(message)
    assert refusal.code == "INVALID_ARGUMENT"
    assert "'BF16' is not served; wanted one of BOOL" in refusal.message


def histogram(*outputs: str) -> pb.ModelInferRequest:
    message = request("histogram", {"x": np.arange(10.0)}, bins=2)
    for name in outputs:
        message.outputs.add(name=name)
    return message


def test_only_the_outputs_asked_for_come_back(oip: Oip) -> None:
    """Outputs come in the order of the request, and all of them if none is named."""
    assert [tensor.name for tensor in oip.infer(histogram()).outputs] == ["counts", "edges"]
    answer = oip.infer(histogram("edges"))
    assert [tensor.name for tensor in answer.outputs] == ["edges"]
    np.testing.assert_array_equal(arrays_of(answer)[0], [0.0, 4.5, 9.0])
    assert [tensor.name for tensor in oip.infer(histogram("edges", "counts")).outputs] == ["edges", "counts"]


def test_outputs_that_cannot_be_given_are_refused(oip: Oip) -> None:
    """An unknown output, one asked for twice, and one as classes are refused."""
    assert "did you mean counts" in oip.refusal(histogram("count")).message
    assert "twice" in oip.refusal(histogram("edges", "edges")).message
    classes = histogram("edges")
    classes.outputs[0].parameters["classification"].int64_param = 3
    assert "'classification' is not served" in oip.refusal(classes).message


def test_parameters_of_a_tensor_are_held_against_what_they_mean(oip: Oip) -> None:
    """`np_dtype` must be a string, and a region of shared memory does not exist."""
    message = vector("identity", 1.0)
    message.inputs[0].parameters["np_dtype"].int64_param = 5
    assert "np_dtype must be a string" in oip.refusal(message).message
    message = vector("identity", 1.0)
    message.inputs[0].parameters["shared_memory_region"].string_param = "mine"
    assert "shared memory is not served" in oip.refusal(message).message


def streamed(channel: grpc.Channel, messages: Iterator[bytes]) -> Iterator[pb.ModelStreamInferResponse]:
    rpc: Any = channel.stream_stream(METHOD + "ModelStreamInfer")
    for answer in rpc(messages, timeout=20):
        yield pb.ModelStreamInferResponse.FromString(answer)


def numbered(number: int, message: pb.ModelInferRequest) -> bytes:
    message.id = str(number)
    return message.SerializeToString()


def test_stream_answers_in_order_and_outlives_a_bad_request(channel: grpc.Channel) -> None:
    """Of 300 requests some fail, each with an error_message that names the request.

    The others get their own results.
    """
    wrong = {7: vector("nobody", 1), 50: vector("raises_value_error", 1), 51: request("matmul", {"a": np.eye(2)})}
    messages = (numbered(i, wrong.get(i, vector("identity", float(i)))) for i in range(300))
    answers = list(streamed(channel, messages))
    assert [answer.infer_response.id for answer in answers] == [str(i) for i in range(300)]
    for number, answer in enumerate(answers):
        if number in wrong:
            assert answer.error_message.startswith(("NOT_FOUND", "INVALID_ARGUMENT", "INTERNAL")), answer
        else:
            assert not answer.error_message
            assert arrays_of(answer.infer_response)[0].tolist() == [float(number)]


def test_stream_takes_any_bytes(channel: grpc.Channel) -> None:
    """Bytes that are no request are answered like a request that failed."""
    first, second = streamed(channel, iter([b"\xff", numbered(1, vector("identity", 1.0))]))
    assert first.error_message.startswith("INVALID_ARGUMENT: the message is no ModelInferRequest")
    assert second.infer_response.id == "1"


def test_stream_runs_its_calls_side_by_side(start_mesh: StartMesh, tmp_path: Path) -> None:
    """A slow call does not keep later ones from running, though their answers wait for its answer."""
    mesh = start_mesh()
    gates = [Gate(tmp_path / name) for name in ("one", "other")]
    slow = (request("waits_for", path=str(gate)).SerializeToString() for gate in gates)
    with grpc.insecure_channel(mesh.gateway) as channel, ThreadPoolExecutor(1) as reader:
        answers = reader.submit(list, streamed(channel, slow))
        wait_until(lambda: all(gate.reached for gate in gates), "both run")
        assert Scrape(mesh.gateway_metrics).sum("unlatch_calls_in_flight") == 2
        for gate in gates:
            gate.open()
        assert [answer.error_message for answer in answers.result()] == ["", ""]


def test_left_stream_takes_its_calls_back(start_mesh: StartMesh) -> None:
    """Calls of a stream that is cancelled are cancelled."""
    mesh = start_mesh()
    with grpc.insecure_channel(mesh.gateway) as channel:
        rpc: Any = channel.stream_stream(METHOD + "ModelStreamInfer")
        # Longer than this test waits: the naps end because they are taken back.
        nap = request("sleeps", None, seconds=600.0).SerializeToString()
        stream = rpc(itertools.chain([vector("identity", 1.0).SerializeToString()], itertools.repeat(nap, 20)))
        next(stream)
        stream.cancel()
        assert Oip(channel).serves()
    # The server may hear of the cancel after the next call.
    wait_until(lambda: Scrape(mesh.gateway_metrics).sum("unlatch_calls_in_flight") == 0, "nothing is in flight")
    metrics = Scrape(mesh.gateway_metrics)
    assert metrics.sum("grpc_server_handled_total", grpc_method="ModelStreamInfer", grpc_code="CANCELLED") == 1


def asked(oip: Oip, method: str, message: Any, answer: type[Any]) -> Any:
    return answer.FromString(oip.send(message.SerializeToString(), method))


def test_statistics_count_what_happened(start_mesh: StartMesh) -> None:
    """Successes, failures and their times are those of the metrics."""
    mesh = start_mesh()
    with grpc.insecure_channel(mesh.gateway) as channel:
        oip = Oip(channel)
        for _ in range(3):
            oip.infer(request("sleeps", None, seconds=0.05))
        assert oip.refusal(request("sleeps")).code == "INVALID_ARGUMENT"
        answer = asked(oip, "ModelStatistics", pb.ModelStatisticsRequest(name="sleeps"), pb.ModelStatisticsResponse)
        everything = asked(oip, "ModelStatistics", pb.ModelStatisticsRequest(), pb.ModelStatisticsResponse)
    (one,) = answer.model_stats
    stats = one.inference_stats
    assert (one.name, one.version, one.inference_count, one.execution_count) == ("sleeps", "1", 3, 3)
    assert (stats.success.count, stats.fail.count, stats.compute_infer.count, stats.queue.count) == (3, 1, 3, 3)
    assert stats.compute_infer.ns >= 3 * 0.05e9
    assert stats.success.ns >= stats.compute_infer.ns + stats.queue.ns
    scraped = Scrape(mesh.gateway_metrics)
    seconds = scraped.sum("unlatch_call_seconds_sum", kernel="sleeps", stage="total")
    assert stats.success.ns == pytest.approx(seconds * 1e9, rel=1e-6)
    assert abs(one.last_inference / 1e3 - scraped.sum("unlatch_last_call_timestamp_seconds", kernel="sleeps")) < 0.001
    assert {"sleeps", "identity"} <= {stat.name for stat in everything.model_stats}
    assert all(stat.inference_stats.success.count == 0 for stat in everything.model_stats if stat.name != "sleeps")


def test_config_says_what_a_kernel_is(oip: Oip) -> None:
    """The configuration has datatypes and dims as in Triton, and options as parameters."""
    answer = asked(oip, "ModelConfig", pb.ModelConfigRequest(name="matmul"), pb.ModelConfigResponse)
    config = answer.config
    assert (config.name, config.max_batch_size, config.model_transaction_policy.decoupled) == ("matmul", 0, False)
    assert [(one.name, list(one.dims)) for one in config.input] == [("a", [-1, -1]), ("b", [-1, -1])]
    assert {one.data_type for one in config.input} <= {pb.TYPE_FP64, pb.TYPE_FP32}
    assert config.parameters["pure"].string_value == "true"


def test_metadata_says_what_the_protocol_has_no_room_for(oip: Oip) -> None:
    """Parameters have what the protocol has no field for: dtypes, axes, scalars with defaults, and the description."""
    answer = asked(oip, "ModelMetadata", pb.ModelMetadataRequest(name="gaussian_blur"), pb.ModelMetadataResponse)
    (image,) = answer.inputs
    assert set(image.parameters["dtypes"].string_param.split(",")) >= {"float32", "float64", "uint8"}
    assert image.parameters["axes"].string_param
    assert answer.parameters["scalar.sigma"].string_param.startswith("float")
    assert answer.parameters["doc"].string_param
    complexes = asked(oip, "ModelMetadata", pb.ModelMetadataRequest(name="conjugate"), pb.ModelMetadataResponse)
    assert (complexes.inputs[0].datatype, list(complexes.inputs[0].shape)) == ("FP64", [-1, 2])
    assert complexes.inputs[0].parameters["np_dtype"].string_param == "complex128"


def test_index_lists_every_kernel(oip: Oip) -> None:
    """Each kernel is listed with its version, and ready."""
    index = asked(oip, "RepositoryIndex", pb.RepositoryIndexRequest(ready=True), pb.RepositoryIndexResponse)
    listed = {model.name: (model.version, model.state) for model in index.models}
    assert listed["identity"] == listed["sleeps"] == ("1", "READY")


@pytest.mark.parametrize("kind", ["SystemSharedMemory", "CudaSharedMemory"])
def test_no_memory_is_shared(kind: str, oip: Oip) -> None:
    """There are no regions: leaving one does nothing, and registering one is not offered."""
    assert oip.send(b"", f"{kind}Status") == b""
    assert oip.send(b"", f"{kind}Unregister") == b""
    assert oip.refusal(b"", f"{kind}Register").code == "UNIMPLEMENTED"

"""The protocol's questions about server and kernels, answered from what the fleet serves and the metrics count."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message

from unlatch.common.errors import Unimplemented, UnlatchError
from unlatch.common.kernel.datatypes import BYTES, NP_DTYPE, carrier, is_carried
from unlatch.common.kernel.lists import to_json
from unlatch.common.kernel.messages import scalar_spec
from unlatch.common.service.version import VERSION
from unlatch.gateway.doors.fields import undecodable
from unlatch.gateway.doors.rpc_guard import Answer
from unlatch.gateway.fleet.fleet import Fleet
from unlatch.gateway.fleet.fleets import Fleets
from unlatch.gateway.metrics import GatewayMetrics
from unlatch.gateway.tenants.quotas import Tenant
from unlatch.protos import inference_pb2 as pb
from unlatch.protos.unlatch_pb2 import Array, Kernel, Scalar

PLATFORM = "unlatch_numpy"
_EXTENSIONS = ("model_configuration", "statistics", "parameters")
_ANY_LENGTH = -1

Request = TypeVar("Request", bound=Message)


class OipMetadata:
    """The service's methods besides calls, each from bytes to bytes."""

    def __init__(self, fleets: Fleets, metrics: GatewayMetrics) -> None:
        self._fleets = fleets
        self._metrics = metrics

    def methods(self) -> dict[str, Answer]:
        """Return the methods by name, as the gRPC server wants them."""
        return {
            "ServerLive": self._answers(pb.ServerLiveRequest, self._server_live),
            "ServerReady": self._answers(pb.ServerReadyRequest, self._server_ready),
            "ServerMetadata": self._answers(pb.ServerMetadataRequest, self._server_metadata),
            "ModelReady": self._answers(pb.ModelReadyRequest, self._model_ready),
            "ModelMetadata": self._answers(pb.ModelMetadataRequest, self._model_metadata),
            "ModelConfig": self._answers(pb.ModelConfigRequest, self._model_config),
            "ModelStatistics": self._answers(pb.ModelStatisticsRequest, self._model_statistics),
            "RepositoryIndex": self._answers(pb.RepositoryIndexRequest, self._repository_index),
            **self._shared_memory(),
        }

    def _answers(self, kind: type[Request], answer: Callable[[Request, Fleet], Message]) -> Answer:
        """Return a method from bytes to bytes that a function of a message and the caller's fleet answers."""

        async def handle(message: bytes, _: Any, tenant: Tenant) -> bytes:
            try:
                request = kind.FromString(message)
            except DecodeError:
                raise undecodable(message, kind) from None
            return answer(request, self._fleets.of(tenant.name)).SerializeToString()

        return handle

    def _shared_memory(self) -> dict[str, Answer]:
        """Return the methods of shared memory, which a gateway does not offer: there are no regions."""
        methods: dict[str, Answer] = {}
        for kind in ("SystemSharedMemory", "CudaSharedMemory"):
            for name in (f"{kind}Status", f"{kind}Unregister"):
                nothing: Message = getattr(pb, f"{name}Response")()
                methods[name] = self._answers(getattr(pb, f"{name}Request"), partial(_say, nothing))
            methods[f"{kind}Register"] = self._answers(getattr(pb, f"{kind}RegisterRequest"), _refuse_sharing)
        return methods

    def _server_live(self, _: pb.ServerLiveRequest, __: Fleet) -> Message:
        return pb.ServerLiveResponse(live=True)

    def _server_ready(self, _: pb.ServerReadyRequest, fleet: Fleet) -> Message:
        return pb.ServerReadyResponse(ready=fleet.members.take_calls)

    def _server_metadata(self, _: pb.ServerMetadataRequest, __: Fleet) -> Message:
        return pb.ServerMetadataResponse(name="unlatch", version=VERSION, extensions=_EXTENSIONS)

    def _model_ready(self, request: pb.ModelReadyRequest, fleet: Fleet) -> Message:
        try:
            fleet.kernel(request.name, request.version)
        except UnlatchError:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=True)

    def _model_metadata(self, request: pb.ModelMetadataRequest, fleet: Fleet) -> Message:
        kernel = fleet.kernel(request.name, request.version)
        return pb.ModelMetadataResponse(
            name=kernel.name,
            versions=fleet.members.catalogue.versions(kernel.name),
            platform=PLATFORM,
            inputs=map(_metadata, kernel.inputs),
            outputs=map(_metadata, kernel.outputs),
            parameters=_texts({"doc": kernel.doc} | {f"scalar.{one.name}": _scalar(one) for one in kernel.scalars}),
        )

    def _model_config(self, request: pb.ModelConfigRequest, fleet: Fleet) -> Message:
        kernel = fleet.kernel(request.name, request.version)

        def dims(array: Array) -> list[int]:
            return _shape(array)[1:] if kernel.batch else _shape(array)

        config = pb.ModelConfig(
            name=kernel.name,
            platform=PLATFORM,
            backend="unlatch",
            max_batch_size=kernel.max_batch_size if kernel.batch else 0,
            input=(
                pb.ModelInput(name=one.name, data_type=_data_type(one), dims=dims(one), optional=one.optional)
                for one in kernel.inputs
            ),
            output=(pb.ModelOutput(name=one.name, data_type=_data_type(one), dims=dims(one)) for one in kernel.outputs),
            dynamic_batching=pb.ModelDynamicBatching() if kernel.batch else None,
            parameters={name: pb.ModelParameter(string_value=text) for name, text in _options(kernel).items()},
            model_transaction_policy=pb.ModelTransactionPolicy(decoupled=False),
        )
        return pb.ModelConfigResponse(config=config)

    def _model_statistics(self, request: pb.ModelStatisticsRequest, fleet: Fleet) -> Message:
        kernels = [fleet.kernel(request.name, request.version)] if request.name else fleet.members.catalogue.kernels()
        return pb.ModelStatisticsResponse(model_stats=map(self._statistics, kernels))

    def _repository_index(self, _: pb.RepositoryIndexRequest, fleet: Fleet) -> Message:
        index = pb.RepositoryIndexResponse()
        state = "READY" if fleet.members.take_calls else "UNAVAILABLE"
        for kernel in fleet.members.catalogue.every_version():
            index.models.add(name=kernel.name, version=kernel.version, state=state)
        return index

    def _statistics(self, kernel: Kernel) -> pb.ModelStatistics:
        seen = self._metrics
        succeeded = _duration(seen.stage(kernel.name, "total"))
        runs = {calls: _duration(ran) for calls, ran in sorted(seen.runs(kernel.name).items())}
        return pb.ModelStatistics(
            name=kernel.name,
            version=kernel.version,
            last_inference=round(seen.last_call_seconds(kernel.name) * 1e3),
            inference_count=succeeded.count,
            execution_count=sum(ran.count for ran in runs.values()),
            inference_stats=pb.InferStatistics(
                success=succeeded,
                fail=_duration(seen.stage(kernel.name, "failed")),
                queue=_duration(seen.stage(kernel.name, "queue")),
                compute_input=_duration(seen.stage(kernel.name, "transfer")),
                compute_infer=_duration(seen.stage(kernel.name, "run")),
            ),
            batch_stats=(pb.InferBatchStatistics(batch_size=calls, compute_infer=ran) for calls, ran in runs.items()),
        )


def _say(answer: Message, *_: object) -> Message:
    return answer


def _refuse_sharing(*_: object) -> Message:
    raise Unimplemented("a gateway shares no memory with its callers; send the bytes in raw_input_contents")


def _metadata(array: Array) -> pb.ModelMetadataResponse.TensorMetadata:
    dtype = _dtype(array)
    texts = {"dtypes": "str" if array.text else ",".join(array.dtypes) or "any", "axes": " ".join(array.dims)}
    if array.optional:
        texts["optional"] = "true"
    if is_carried(dtype):
        texts[NP_DTYPE] = dtype
    return pb.ModelMetadataResponse.TensorMetadata(
        name=array.name, datatype=carrier(dtype), shape=_shape(array), parameters=_texts(texts)
    )


def _dtype(array: Array) -> str:
    """Return the one dtype that the protocol has room for."""
    return array.dtypes[0] if array.dtypes else "float64"


def _shape(array: Array) -> list[int]:
    shape = [int(dim) if dim.isdecimal() else _ANY_LENGTH for dim in array.dims]
    return [*shape, 2] if _dtype(array).startswith("complex") else shape


def _data_type(array: Array) -> pb.DataType.ValueType:
    datatype = carrier(_dtype(array))
    return pb.DataType.Value("TYPE_STRING" if datatype == BYTES else f"TYPE_{datatype}")


def _scalar(one: Scalar) -> str:
    """Describe a scalar for people: its type, its default, its choices. A list's default is JSON, as in a call."""
    spec = scalar_spec(one)
    kind = f"list[{spec.type}]" if spec.many else spec.type
    default = to_json(spec.default) if isinstance(spec.default, tuple) else repr(spec.default)
    choices = f", one of {', '.join(map(repr, spec.choices))}" if spec.choices else ""
    if spec.many and choices:
        choices = f", each{choices.removeprefix(',')}"
    return (f"{kind}, required" if spec.required else f"{kind} = {default}") + choices


def _options(kernel: Kernel) -> dict[str, str]:
    options = {"pure": str(kernel.pure).lower(), "batch": str(kernel.batch).lower()}
    if kernel.timeout_seconds:
        options["timeout_seconds"] = f"{kernel.timeout_seconds:g}"
    if kernel.memory_bytes:
        options["memory_bytes"] = str(kernel.memory_bytes)
    return options


def _texts(texts: Mapping[str, str]) -> dict[str, pb.InferParameter]:
    return {name: pb.InferParameter(string_param=text) for name, text in texts.items()}


def _duration(spent: tuple[int, float]) -> pb.StatisticDuration:
    count, seconds = spent
    return pb.StatisticDuration(count=count, ns=round(seconds * 1e9))

"""MLServer: its models, and the start of the server that has them."""

import argparse
import asyncio

from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse

from bench.peers.servers.plain import WORKERS
from bench.subjects.pool_work import KERNELS as FUNCTIONS


class Kernel(MLModel):  # type: ignore[misc] # (MLServer is not installed where types are checked)
    """The kernel that the model is named after."""

    async def load(self) -> bool:
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        result = FUNCTIONS[self.name](NumpyCodec.decode_input(payload.inputs[0]))
        output = NumpyCodec.encode_output("output0", result)
        # Where it was a vector, the codec has made a column of it.
        output.shape = list(result.shape)
        return InferenceResponse(model_name=self.name, outputs=[output])


async def serve(port: int) -> None:
    settings = Settings(
        host="127.0.0.1",
        grpc_port=port,
        http_port=port + 1,
        metrics_port=port + 2,
        parallel_workers=WORKERS,
        debug=False,
        grpc_max_message_length=1 << 30,
    )
    server = MLServer(settings)
    models = [ModelSettings(name=name, implementation=Kernel) for name in ("identity", "spin10")]
    await server.start(models)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    asyncio.run(serve(parser.parse_args().port))

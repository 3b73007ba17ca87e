"""LitServe, one API for each kernel."""

import argparse
from typing import Annotated

from fastapi import Body, Response
from litserve import LitAPI, LitServer

from bench.peers.servers.plain import KERNELS, WORKERS, answer


class Kernel(LitAPI):  # type: ignore[misc] # (LitServe is not installed where types are checked)
    """The kernel that its path names."""

    def setup(self, device: str) -> None:  # noqa: ARG002 (LitServe passes it)
        self.kernel = self.api_path.removeprefix("/")

    def decode_request(self, request: Annotated[bytes, Body()]) -> bytes:
        return request

    def predict(self, body: bytes) -> bytes:
        return answer(self.kernel, body)

    def encode_response(self, output: bytes) -> Response:
        return Response(output, media_type="application/octet-stream")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    apis = [Kernel(api_path=f"/{kernel}") for kernel in KERNELS]
    server = LitServer(apis, accelerator="cpu", workers_per_device=WORKERS)
    server.run(host="127.0.0.1", port=parser.parse_args().port, log_level="warning", generate_client_file=False)

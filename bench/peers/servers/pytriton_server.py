"""PyTriton: NVIDIA's Triton, with two instances of each kernel's function."""

import argparse
from typing import Any

import numpy as np
from pytriton.model_config import ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

from bench.peers.servers.plain import WORKERS
from bench.subjects.pool_work import KERNELS as FUNCTIONS

INPUTS = {"identity": ("x", np.float64), "spin10": ("rounds", np.int64)}


def instance(kernel: str) -> Any:
    """Return a function that Triton calls with a list of requests."""
    name, _ = INPUTS[kernel]

    def infer(requests: list[Any]) -> list[dict[str, Any]]:
        return [{"output0": FUNCTIONS[kernel](request.data[name])} for request in requests]

    return infer


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    port = parser.parse_args().port
    config = TritonConfig(grpc_address="127.0.0.1", grpc_port=port, http_port=port + 1, metrics_port=port + 2)
    with Triton(config=config) as triton:
        for kernel, (name, dtype) in INPUTS.items():
            triton.bind(
                model_name=kernel,
                infer_func=[instance(kernel) for _ in range(WORKERS)],
                inputs=[Tensor(name=name, dtype=dtype, shape=(-1,))],
                outputs=[Tensor(name="output0", dtype=np.float64, shape=(-1,))],
                config=ModelConfig(batching=False),
            )
        triton.serve()

"""Ray Serve, one application for each kernel, with a replica a core."""

import argparse
import signal

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from bench.peers.servers.plain import KERNELS, WORKERS, answer


class Kernel:
    """The kernel that its path names."""

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel

    async def __call__(self, request: Request) -> Response:
        return Response(answer(self.kernel, await request.body()), media_type="application/octet-stream")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    ray.init(num_cpus=WORKERS, include_dashboard=False, object_store_memory=256 << 20, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": parser.parse_args().port, "access_log": False})
    deployment = serve.deployment(num_replicas=WORKERS, ray_actor_options={"num_cpus": 0.5})(Kernel)
    for kernel in KERNELS:
        serve.run(deployment.bind(kernel), name=kernel, route_prefix=f"/{kernel}")
    signal.sigwait({signal.SIGTERM})
    serve.shutdown()
    ray.shutdown()

"""Proxies of the environment: a lane to this machine, or in a private network, uses none unless it is asked to."""

import os
import socket
import subprocess
import sys

import pytest

from tests.support.mesh import ROOT, Mesh

CALL = """
import sys
import numpy as np
from unlatch import BlockingClient, UnlatchError
with BlockingClient(sys.argv[1], timeout=5, proxy=eval(sys.argv[2])) as mesh:
    try:
        print(mesh.identity(np.arange(2)).tolist())
    except UnlatchError as error:
        print(error.status)
"""


@pytest.mark.parametrize(("proxy", "said"), [("None", "[0, 1]"), ("False", "[0, 1]"), ("True", "UNAVAILABLE")])
def test_lane_on_this_machine_uses_no_proxy(mesh: Mesh, proxy: str, said: str) -> None:
    """A proxy that answers nothing does not matter, unless the client asks for it."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        variables = dict.fromkeys(
            ("http_proxy", "https_proxy", "grpc_proxy"), f"http://127.0.0.1:{silent.getsockname()[1]}"
        )
        ran = subprocess.run(
            [sys.executable, "-c", CALL, mesh.gateway, proxy],
            env={**os.environ, **variables, "no_proxy": "", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=40,
            check=True,
        )
    assert ran.stdout.strip() == said

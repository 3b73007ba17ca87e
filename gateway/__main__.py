"""`python -m gateway` (and `unlatch gateway`): the door to a fleet of replicas."""

import os
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """Run a gateway with settings from flags and the environment; 2 when it cannot start."""
    from common.main import run
    from gateway.server import serve
    from gateway.settings import GatewaySettings

    return run("unlatch gateway", "gateway", GatewaySettings, serve, arguments, os.environ)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

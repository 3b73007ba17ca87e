"""`python -m gateway` (and `unlatch gateway`): the door to a fleet of replicas."""

import os
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """Run a gateway with settings from flags and the environment; 2 when it cannot start."""
    import uvloop

    from common.life import die_with_parent
    from common.log import configure
    from common.rpc import BindError
    from common.settings import parse
    from gateway.server import serve
    from gateway.settings import GatewaySettings

    if parent := os.environ.pop("UNLATCH_SUPERVISOR", ""):
        die_with_parent(int(parent))
    settings = parse(GatewaySettings, "unlatch gateway", arguments)
    configure("gateway", settings.log_level)
    try:
        uvloop.run(serve(settings, os.environ.pop("NOTIFY_SOCKET", "")))
    except BindError as error:
        print(f"unlatch gateway: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

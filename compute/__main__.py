"""`python -m compute` (and `unlatch compute`): one replica."""

import os
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """Run a replica with settings from flags and the environment; 2 when it cannot start."""
    # Imported here: multiprocessing's children import this module again under another name.
    import uvloop

    from common.life import die_with_parent
    from common.log import configure
    from common.rpc import BindError
    from common.settings import parse
    from compute.server import serve
    from compute.settings import ComputeSettings
    from compute.slot import StartError

    if parent := os.environ.pop("UNLATCH_SUPERVISOR", ""):
        die_with_parent(int(parent))
    settings = parse(ComputeSettings, "unlatch compute", arguments)
    configure("front", settings.log_level)
    try:
        uvloop.run(serve(settings, os.environ.pop("NOTIFY_SOCKET", "")))
    except (StartError, BindError) as error:
        print(f"unlatch compute: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""A gateway and a replica as two services on this machine, which `unlatch serve` runs as one process.

`python -m bench.subjects.apart --port 1 --health 2 --metrics 3 4 -- compute's flags` runs until SIGTERM.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = "127.0.0.1"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", required=True)
    parser.add_argument("--health", required=True)
    parser.add_argument("--metrics", required=True, nargs=2, metavar=("GATEWAY", "REPLICA"))
    parser.add_argument("flags", nargs="*")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with tempfile.TemporaryDirectory(prefix="bench-apart-") as directory:
        lane = f"unix:{Path(directory) / 'dispatcher.sock'}"
        gateway, replica = (f"{HERE}:{port}" for port in asked.metrics)
        services = [
            _start(
                *("compute", f"--listen={lane}", "--metrics-listen", replica, "--health-listen", f"{HERE}:0"),
                *asked.flags,
            ),
            _start(
                *("gateway", "--listen", f"{HERE}:{asked.port}", "--replicas", lane),
                *("--metrics-listen", gateway, "--health-listen", f"{HERE}:{asked.health}"),
            ),
        ]
        try:
            services[0].wait()
        finally:
            for service in reversed(services):
                service.terminate()
                service.wait()


def _start(service: str, *flags: str) -> "subprocess.Popen[bytes]":
    # The service ends with this process.
    environment = {**os.environ, "UNLATCH_SUPERVISOR": str(os.getpid())}
    argv = [sys.executable, "-m", f"unlatch.{service}", "--drain-seconds", "0.5", *flags]
    return subprocess.Popen(argv, env=environment)


if __name__ == "__main__":
    main()

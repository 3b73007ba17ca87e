"""`python -m unlatch.unit`: the process that `unlatch serve` starts."""

import os
import sys
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING

from unlatch.common.machine.leave import leave
from unlatch.common.service.early import take_over

if TYPE_CHECKING:
    from unlatch.common.service.life import Life
    from unlatch.unit.settings import ServeSettings


def main(arguments: Sequence[str]) -> int:
    """Run a unit with the settings of `unlatch serve`; 2 when it cannot start."""
    # Read by gRPC at its import. gRPC writes to stderr, past our log: a line for each failed TLS handshake.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    # Imported here: a signal is heard before these are loaded, which may take a second.
    from unlatch.common.service.main import run
    from unlatch.compute.errors import KilledAtStartError, StartError
    from unlatch.unit.place import Place
    from unlatch.unit.server import serve
    from unlatch.unit.settings import PROGRAM, ServeSettings, services

    place = Place.take(os.environ)
    name = "unit" if place is None else f"unit-{place.number}"

    def serve_unit(settings: "ServeSettings", life: "Life") -> Coroutine[None, None, None]:
        return serve(*services(settings, os.environ, place), life, place, reload=settings.reload)

    refusals, passing = (StartError,), (KilledAtStartError,)
    held = place is not None
    return run(PROGRAM, name, ServeSettings, serve_unit, arguments, os.environ, refusals, passing, ports_held=held)


if __name__ == "__main__":
    take_over()
    leave(main(sys.argv[1:]))

"""Python imports this module as a process of the soak's mesh starts: each part tells how much memory it uses.

From outside only the memory that a process has can be seen, with all that malloc keeps for later. Twice a second a
thread of each service, and of the supervisor, writes the bytes that are in use to the file `<pid>` in the directory
that SOAK_USED names.
"""

import os
import sys
import threading
import time
from pathlib import Path

# A word of each part's command line, and of no other process's.
_PARTS = {"unlatch.unit", "unlatch.gateway", "unlatch.compute", "serve"}
_SECONDS = 0.5
# Python's own allocator has blocks of 8 to 512 bytes; most objects are smaller than this.
_BLOCK_BYTES = 128


def _tell(directory: Path) -> None:
    # Here, since no process but these parts is to load it.
    from unlatch.common.machine.memory import used_bytes

    told, written = directory / str(os.getpid()), directory / f"{os.getpid()}.new"
    while directory.exists():
        written.write_text(str(used_bytes() + sys.getallocatedblocks() * _BLOCK_BYTES))
        written.replace(told)
        time.sleep(_SECONDS)


if _PARTS.intersection(sys.orig_argv):
    threading.Thread(target=_tell, args=(Path(os.environ["SOAK_USED"]),), name="soak-used", daemon=True).start()

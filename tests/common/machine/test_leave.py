"""The end of a process: what waits for it runs, what was printed is written, and the interpreter does not end."""

import subprocess
import sys

PROGRAM = """
import atexit, sys
from unlatch.common.machine.leave import leave

class Kept:
    def __del__(self):
        print("the interpreter has ended", file=sys.__stderr__)

kept = Kept()
atexit.register(print, "one", end=" ")
atexit.register(print, "two", end=" ")
print("printed", end=" ")
leave(3)
"""


def test_process_leaves_with_what_it_had_to_say() -> None:
    """Functions run in their order, the last first; stdout is a pipe here, and so it is buffered."""
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, "printed two one ", "")


def test_closed_streams_do_not_matter() -> None:
    """A service may have been started without any."""
    program = (
        "import sys; from unlatch.common.machine.leave import leave; sys.stdout = None; sys.stderr.close(); leave(0)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0

"""The states of real processes, as another process on the same machine sees them."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.support.watching import until
from unlatch.common.machine.process_states import is_stopped, on_this_machine, this_process
from unlatch.protos.unlatch_pb2 import Process


@pytest.fixture
def child() -> Iterator[int]:
    """A process that sleeps until the test ends."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        yield process.pid
        process.kill()


async def test_stopped_process_is_seen_and_one_that_runs_on_is_not(child: int) -> None:
    """SIGSTOP is seen from outside, and its end too."""
    named = this_process()
    named.pid = child
    assert on_this_machine(named)
    assert not is_stopped(named)
    os.kill(child, signal.SIGSTOP)
    await until(lambda: is_stopped(named), "it is seen as stopped")
    os.kill(child, signal.SIGCONT)
    await until(lambda: not is_stopped(named), "it is seen to run")


def test_process_elsewhere_is_not_seen() -> None:
    """Its number is another process's here: on another machine, in another container, or where it is not told."""
    here = this_process()
    assert here.pid == os.getpid()
    assert not on_this_machine(Process(boot_id="another", pid_namespace=here.pid_namespace, pid=here.pid))
    in_a_container = Process(boot_id=here.boot_id, pid_namespace=here.pid_namespace + 1, pid=here.pid)
    assert on_this_machine(in_a_container)
    assert not is_stopped(in_a_container)
    assert not on_this_machine(Process())
    gone = Process(boot_id=here.boot_id, pid_namespace=here.pid_namespace, pid=2**22 + 1)
    assert not is_stopped(gone)

"""The launcher for Slurm, on a real Slurm of two nodes on this machine: a controller, two node daemons, and munge."""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.mesh.launchers.launched import HERE, LAUNCHERS, WITHIN, addresses, all_ready, dispatchers, gateway_of, let_go
from tests.support.watching import Gate, until, wait_until
from unlatch import Client

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(280)]

# `unlatch` for the job, and where Debian has the daemons.
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"])

CONFIGURATION = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket
CredType=cred/munge
SlurmctldPort={port}
SlurmctldPidFile={directory}/controller.pid
SlurmdPidFile={directory}/%n.pid
SlurmdSpoolDir={directory}/%n
StateSaveLocation={directory}/state
SlurmctldLogFile={directory}/controller.log
SlurmdLogFile={directory}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
MpiDefault=none
SwitchType=switch/none
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.2 Port={first} CPUs=2 RealMemory=1000
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.3 Port={second} CPUs=2 RealMemory=1000
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        opened = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in opened]


@contextmanager
def running(*argv: str, environment: dict[str, str]) -> Iterator[None]:
    """Run a daemon in the foreground until the end of the `with` block."""
    with subprocess.Popen(
        argv, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            yield
        finally:
            process.terminate()


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment for commands of a Slurm of two nodes, with two cores each, at 127.0.0.2 and 127.0.0.3."""
    if os.getuid() != 0:
        pytest.skip("Slurm's daemons need root")
    for tool in ("munged", "slurmctld", "slurmd", "sbatch"):
        if shutil.which(tool, path=PATH) is None:
            pytest.skip(f"{tool} is missing")
    for name in ("state", "n1", "n2"):
        (tmp_path / name).mkdir()
    key = tmp_path / "key"
    key.touch(0o400)
    key.write_bytes(os.urandom(128))
    port, first, second = free_ports(3)
    configuration = tmp_path / "slurm.conf"
    configuration.write_text(CONFIGURATION.format(directory=tmp_path, port=port, first=first, second=second))
    (tmp_path / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(configuration)}
    munge = [f"--{name}={tmp_path}/munge.{name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
    with ExitStack() as stack:
        for argv in (
            ["munged", "--foreground", "--force", f"--key-file={key}", *munge],
            ["slurmctld", "-D", "-i"],
            ["slurmd", "-D", "-N", "n1"],
            ["slurmd", "-D", "-N", "n2"],
        ):
            stack.enter_context(running(*argv, environment=environment))
        idle = "sinfo", "--noheader", "--format", "%D %t"
        wait_until(lambda: told(*idle, environment=environment) == "2 idle\n", "both nodes are idle", within=WITHIN)
        yield environment
        # The daemons' end would leave a job that a failed test has left.
        told("scancel", "--user=root", environment=environment)
        wait_until(lambda: told("squeue", "--noheader", environment=environment) == "", "no job is left", within=WITHIN)


def told(*argv: str, environment: dict[str, str]) -> str:
    """Run a command, and return what it prints; nothing if it fails."""
    return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=WITHIN, check=False).stdout


async def test_job_runs_replicas_and_ends_them(slurm: dict[str, str], tmp_path: Path) -> None:
    """Each node of a job has a replica, which is started again if it is killed. The job's end is theirs."""
    file, name, gate = tmp_path / "replicas", str(tmp_path), Gate(tmp_path / "gate")
    launcher = (str(LAUNCHERS / "slurm.sh"), str(file), "--kernels", str(HERE / "held_kernels.py"))
    flags = ("--drain-seconds", "1", "--report-seconds", "20", "--name", name)
    job = ("sbatch", "--parsable", "--nodes", "2", "--cpus-per-task", "2", "--mem", "900M", "--no-kill")
    log = ("--output", str(tmp_path / "job.log"))
    with gateway_of(file) as door:
        number = told(*job, *log, *launcher, *flags, environment=slurm).strip()
        await all_ready(door, file, 2)
        first = addresses(file)
        assert {address.partition(":")[0] for address in first} == {"127.0.0.2", "127.0.0.3"}
        async with Client(door.wait_for("serving")["listen"], timeout=2 * WITHIN) as client:
            call = asyncio.ensure_future(client.holds_pure(gate=str(gate)))
            await until(lambda: gate.reached, "a replica runs the call", within=WITHIN)
            # If it was this replica's call, it runs again.
            os.kill(dispatchers(name)[0], signal.SIGKILL)
            assert await let_go(call, gate) > 0
        await until(
            lambda: len(addresses(file)) == 2 and set(addresses(file)) != set(first), "it is back", within=WITHIN
        )
        await all_ready(door, file, 2)
        told("scancel", number, environment=slurm)
        await until(lambda: not dispatchers(name), "no replica is left", within=WITHIN)
        door.stop()

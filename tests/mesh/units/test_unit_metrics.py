"""`/metrics` of `unlatch serve --units 2`: the figures of both units, whatever happens to one of them."""

import asyncio
import json
import os
import signal
import socket
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tests.mesh.units.test_units import clients, served_at, two_units
from tests.support.mesh import ROOT, Service
from tests.support.serve import START_SECONDS, units
from tests.support.watching import Scrape, children, status_bytes, until
from tests.unlatch.cli.conftest import COMMAND

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(150)]

OK = {"component": "gateway", "kernel": "process_id", "code": "OK"}
# A process's memory may grow between two readings.
WITHIN_BYTES = 8 * 1024 * 1024


def number_of(pid: int) -> str:
    """The number that the supervisor has given to a unit."""
    variables = dict(entry.split("=", 1) for entry in Path(f"/proc/{pid}/environ").read_text().split("\0") if entry)
    return str(json.loads(variables["UNLATCH_UNIT"])["number"])


async def test_metrics_are_of_all_units() -> None:
    """Each unit's processes and calls are there, under its number. A unit that stands still is down, and then anew."""
    with two_units() as serve:
        address = served_at(serve)
        seen: list[Scrape] = [Scrape(address)]

        def scraped() -> Scrape:
            seen.append(Scrape(address))
            return seen[-1]

        def are_up(*up: float) -> bool:
            found = scraped()
            return all(found.samples["unlatch_unit_up", frozenset({("unit", str(n))})] == up[n] for n in range(2))

        async with clients(serve) as made:
            ran = Counter(map(int, await asyncio.gather(*(client.process_id() for client in made for _ in range(4)))))
            calls = ran.total()
            await until(lambda: scraped().sum("unlatch_calls_total", **OK) == calls, "all calls are counted", 60.0)
            now = seen[-1]
            assert all(now.sum("unlatch_calls_total", **OK, unit=unit) > 0 for unit in ("0", "1"))
            # Each replica has the same label, whichever gateway tells of it.
            known = [dict(has) for name, has in now.samples if name == "unlatch_replica_up"]
            replicas = {(has["unit"], Path(has["replica"]).name) for has in known}
            assert replicas == {(unit, f"lanes-{number}") for unit in ("0", "1") for number in range(2)}
            pids = {number_of(pid): pid for pid in units(serve)}
            assert set(pids) == {"0", "1"}
            for unit, pid in pids.items():
                (forkserver,) = [child for child in children(pid) if children(child)]
                of_unit = {"unit": pid, "forkserver": forkserver, "worker-0": children(forkserver)[0]}
                for name, process in of_unit.items():
                    resident = now.sum("unlatch_process_resident_memory_bytes", unit=unit, process=name)
                    assert resident == pytest.approx(status_bytes(process, "VmRSS"), abs=WITHIN_BYTES), (unit, name)
                counted = now.sum("unlatch_worker_calls_total", kernel="process_id", unit=unit)
                assert counted == ran[of_unit["worker-0"]]
            assert now.sum("unlatch_process_resident_memory_bytes", process="supervisor") > 0
            os.kill(pids["1"], signal.SIGSTOP)
            await until(lambda: are_up(1.0, 0.0), "the unit that is stopped is down", 60.0)
            down = seen[-1]
        assert not any(("unit", "1") in labels for name, labels in down.samples if name != "unlatch_unit_up")
        assert down.sum("unlatch_calls_total", **OK) == now.sum("unlatch_calls_total", **OK, unit="0")
        os.kill(pids["1"], signal.SIGKILL)
        await until(lambda: are_up(1.0, 1.0), "the unit is started again", START_SECONDS)
        assert seen[-1].sum("unlatch_calls_total", **OK, unit="1") == 0
        assert seen[-1].sum("unlatch_process_resident_memory_bytes", unit="1", process="unit") > 0
        command = [*COMMAND, "top", "--once", "--json", "--metrics", address]
        top = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=subprocess.PIPE)
        told, _ = await top.communicate()
        assert [(process["unit"], process["name"]) for process in json.loads(told)["processes"]] == [
            ("", "supervisor"),
            *((unit, name) for unit in ("0", "1") for name in ("unit", "forkserver", "worker-0")),
        ]


async def test_taken_port_of_metrics_is_refused() -> None:
    """A port that another process listens on ends the start with code 2, before any unit starts."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        taken = f"127.0.0.1:{holder.getsockname()[1]}"
        ports = ("--listen", "127.0.0.1:0", "--health-listen", "127.0.0.1:0", "--metrics-listen", taken)
        with Service("unlatch", "serve", "--units", "2", "--workers", "2", *ports) as serve:
            assert serve.wait(START_SECONDS) == 2
    assert f"--metrics-listen {taken}: Address already in use" in "\n".join(serve.lines)

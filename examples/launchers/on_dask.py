"""Run a replica of Unlatch in each worker of a Dask cluster: a worker plugin, also for workers that join later.

    python on_dask.py replicas.txt --scheduler tcp://10.0.0.1:8786 --kernels my_kernels.py --insecure
    unlatch gateway --replicas file:replicas.txt

The gateway runs beside this script, which keeps the file. Flags that the script does not know go to `unlatch compute`.
Every worker has Unlatch and the kernels installed. SIGTERM ends the script, and the replicas with it.
"""

import asyncio
import signal
import sys
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

import cloudpickle
import replica
from distributed import Client, Worker, WorkerPlugin

# Workers get the code of replica.py with the plugin, and need no copy of the file.
cloudpickle.register_pickle_by_value(replica)

NAME = "unlatch-replica"
LOOK_SECONDS = 0.5


class ReplicaPlugin(WorkerPlugin):
    """The replica of a worker, with as many cores as the worker has threads, and within the worker's memory.

    The worker tells the scheduler the replica's address with its metrics, at each heartbeat.
    """

    name = NAME

    def __init__(self, flags: Sequence[str]) -> None:
        self._flags = flags

    def setup(self, worker: Worker) -> None:
        """Start the replica, and keep it running."""
        memory_bytes = worker.memory_manager.memory_limit or 0
        self._replica = replica.Replica(worker.ip, worker.state.nthreads, memory_bytes, self._flags)
        self._running = asyncio.create_task(self._replica.run())
        worker.metrics[NAME] = lambda _: self._replica.address

    async def teardown(self, worker: Worker) -> None:
        """End the replica."""
        worker.metrics.pop(NAME)
        self._running.cancel()
        await self._replica.stop()


def main() -> None:
    """Give each worker the plugin, and write the addresses of all replicas, twice a second."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="file to keep, for unlatch gateway --replicas file:…")
    cluster = parser.add_mutually_exclusive_group(required=True)
    cluster.add_argument("--scheduler", help="address of the Dask scheduler")
    cluster.add_argument("--scheduler-file", help="file in which the Dask scheduler has written its address")
    options, flags = parser.parse_known_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with Client(options.scheduler, scheduler_file=options.scheduler_file) as client:
        client.register_plugin(ReplicaPlugin(flags))
        try:
            while True:
                workers = client.scheduler_info(n_workers=-1)["workers"].values()
                replica.write(options.file, filter(None, (worker["metrics"].get(NAME) for worker in workers)))
                time.sleep(LOOK_SECONDS)
        finally:
            client.unregister_worker_plugin(NAME)


if __name__ == "__main__":
    main()

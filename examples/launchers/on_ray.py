"""Run a replica of Unlatch on each node of a Ray cluster: an actor on each node, also on those that join later.

    python on_ray.py replicas.txt --cores 16 --kernels my_kernels.py --insecure
    unlatch gateway --replicas file:replicas.txt

The gateway runs beside this script, which keeps the file. Flags that the script does not know go to `unlatch compute`.
Every node has Unlatch and the kernels installed. SIGTERM ends the script, and the replicas with it.
"""

import signal
import sys
import time
from argparse import ArgumentParser
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import ray
import replica
from ray import cloudpickle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

# Nodes get the code of replica.py with the actor, and need no copy of the file.
cloudpickle.register_pickle_by_value(replica)

LOOK_SECONDS = 0.5


class NodeReplica:
    """The replica of a node, with the cores and the memory that Ray grants this actor."""

    def __init__(self, flags: Sequence[str]) -> None:
        granted = ray.get_runtime_context().get_assigned_resources()
        host = ray.util.get_node_ip_address()
        self._replica = replica.Replica(host, int(granted["CPU"]), int(granted.get("memory", 0)), flags)

    async def run(self) -> None:
        """Keep the replica running."""
        await self._replica.run()

    async def address(self) -> str:
        """The replica's address, or nothing while it does not serve."""
        return str(self._replica.address)

    async def stop(self) -> None:
        """End the replica."""
        await self._replica.stop()


class Node:
    """A node of the cluster as this script sees it: its actor, and the address that the actor told last."""

    def __init__(self, node: dict[str, Any], cores: int, memory_bytes: int, flags: Sequence[str]) -> None:
        here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        options = {"num_cpus": cores or node["Resources"]["CPU"], "memory": memory_bytes, "scheduling_strategy": here}
        self.actor = ray.remote(NodeReplica).options(**options).remote(flags)
        self.actor.run.remote()
        self.asked = self.actor.address.remote()
        self.address = ""

    def look(self, answered: Container[ray.ObjectRef]) -> bool:
        """Take the actor's answer if it is there, and ask again. Returns whether the actor is still there."""
        if self.asked in answered:
            try:
                self.address = ray.get(self.asked)
            except ray.exceptions.RayActorError as error:
                print(f"replica at {self.address} is lost: {error}", file=sys.stderr)
                return False
            self.asked = self.actor.address.remote()
        return True


def main() -> None:
    """Start a replica on each node that has none, and write the addresses of all, twice a second."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="file to keep, for unlatch gateway --replicas file:…")
    parser.add_argument("--cluster", default="auto", help="address of the Ray cluster")
    parser.add_argument("--cores", type=int, default=0, help="cores of each replica; 0 is all that its node has")
    parser.add_argument("--memory-bytes", type=int, default=0, help="memory of each replica; 0 sets no limit")
    options, flags = parser.parse_known_args()
    nodes: dict[str, Node] = {}
    with ray.init(options.cluster):
        # Not before: Ray sets a handler of its own, which aborts.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())
        try:
            while True:
                for node in ray.nodes():
                    if node["Alive"] and node["Resources"].get("CPU") and node["NodeID"] not in nodes:
                        nodes[node["NodeID"]] = Node(node, options.cores, options.memory_bytes, flags)
                asked = [node.asked for node in nodes.values()]
                answered = ray.wait(asked, num_returns=len(asked), timeout=LOOK_SECONDS)[0] if asked else []
                nodes = {name: node for name, node in nodes.items() if node.look(answered)}
                replica.write(options.file, filter(None, (node.address for node in nodes.values())))
                time.sleep(LOOK_SECONDS)
        finally:
            if stopped := [node.actor.stop.remote() for node in nodes.values()]:
                ray.wait(stopped, num_returns=len(stopped), timeout=30.0)


if __name__ == "__main__":
    main()

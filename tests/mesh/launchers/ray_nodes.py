"""A Ray cluster of nodes on this machine, each with a loopback address of its own. Tests steer it line by line.

The first line that it prints is the cluster's address. `add 127.0.0.3` starts a node, and `kill 127.0.0.3` kills the
processes of one. Each prints `done`. The cluster ends when stdin is closed. Its files are in RAY_TMPDIR.
"""

import sys

from ray.cluster_utils import Cluster

_NODE = {"num_cpus": 2, "memory": 1 << 30, "object_store_memory": 80 << 20}


def main() -> None:
    """Start the first node, and serve commands until stdin is closed."""
    cluster = Cluster()
    # Ray would take 127.0.0.1 for the machine's own address.
    spared = {"include_dashboard": False, "include_log_monitor": False, "no_monitor": True}
    cluster.add_node(**_NODE, **spared, node_ip_address="127.0.0.2")
    nodes = {}
    print(cluster.address, flush=True)
    for line in sys.stdin:
        command, host = line.split()
        if command == "add":
            nodes[host] = cluster.add_node(**_NODE, node_ip_address=host)
        else:
            cluster.remove_node(nodes.pop(host), allow_graceful=False)
        print("done", flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()

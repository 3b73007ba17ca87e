"""The metrics of a process that is a gateway, a replica, or both in one: each of the two is a component.

Their metrics have some names in common, and the label `component` tells whose a series is.
"""

from collections.abc import Callable, Iterable, Iterator

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

# Help texts of metrics that both components have.
CALL_SECONDS = (
    "Where a call's time went. Gateway: queue and run in the replica, transfer for all else, and the total; failed for "
    "the whole of calls that did not succeed. Replica: transfer, queue, run, reply."
)
QUEUE_DEPTH = "Calls that wait: at the gateway for a replica's window, at the replica for a worker."


class Component:
    """The metrics of a gateway or a replica: each series has the label `component`. `collectors` may change."""

    def __init__(self, name: str, collectors: Callable[[], Iterable[Collector]]) -> None:
        self._name = name
        self._collectors = collectors

    def collect(self) -> Iterator[Metric]:
        """Collect the metrics. May be called from any thread."""
        for collector in self._collectors():
            for family in collector.collect():
                for sample in family.samples:
                    sample.labels["component"] = self._name
                yield family


class Merged:
    """All metrics of a process. Series of the same name are one family, as the format of /metrics requires."""

    def __init__(self, collectors: Iterable[Collector]) -> None:
        self._collectors = list(collectors)

    def collect(self) -> Iterable[Metric]:
        """Collect the metrics. May be called from any thread."""
        families: dict[str, Metric] = {}
        for collector in self._collectors:
            for family in collector.collect():
                if family.name in families:
                    families[family.name].samples += family.samples
                else:
                    families[family.name] = family
        return families.values()

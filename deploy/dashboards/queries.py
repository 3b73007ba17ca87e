"""PromQL that the boards have in common. What stands after a `$` is Grafana's to fill in."""

# The label `job` is a pod's app.kubernetes.io/name, by PodMonitor and plain Prometheus alike.
GATEWAY = 'job="unlatch-gateway", namespace=~"$namespace", pod=~"$gateway"'
COMPUTE = 'job="unlatch-compute", namespace=~"$namespace"'
ANY_POD = 'namespace=~"$namespace", pod=~"$pod"'
# What calls end in by a fault of ours or of a kernel, not of their callers'. Once a kernel was called it has them all.
FAULTS = "DEADLINE_EXCEEDED|INTERNAL|UNAVAILABLE"


def rate(metric: str, where: str, by: str = "") -> str:
    """How much a counter grows a second, summed for each value of the labels `by`."""
    return f"sum {_by(by)}(rate({metric}{{{where}}}[$__rate_interval]))"


def mean(histogram: str, where: str, by: str = "") -> str:
    """The mean of what a histogram has seen."""
    return f"{rate(f'{histogram}_sum', where, by)} / {rate(f'{histogram}_count', where, by)}"


def quantile(q: float, histogram: str, where: str, by: str = "") -> str:
    """A quantile of what a histogram has seen, as finely as its buckets tell."""
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, {rate(f'{histogram}_bucket', where, labels)})"


def born_or_grown(counter: str, where: str) -> str:
    """By how much each series has grown, one that was born meanwhile by all that it has counted.

    `increase` does not see what a series is born with, and of what is rare that is most of it.
    """
    selected = f"{counter}{{{where}}}"
    return f"(({selected} unless {selected} offset $__rate_interval) or increase({selected}[$__rate_interval]))"


def _by(labels: str) -> str:
    return f"by ({labels}) " if labels else ""

"""PromQL that the boards share. Grafana fills in the names after a `$`."""

# The label `job` is a pod's app.kubernetes.io/name, by PodMonitor and plain Prometheus alike.
GATEWAY = 'component="gateway", namespace=~"$namespace", pod=~"$gateway"'
COMPUTE = 'component="compute", namespace=~"$namespace"'
ANY_POD = 'namespace=~"$namespace", pod=~"$pod"'
# Statuses of calls that fail by a fault of Unlatch or a kernel, not of the caller. Each called kernel has all of them.
FAULTS = "ABORTED|DEADLINE_EXCEEDED|INTERNAL|UNAVAILABLE"


def rate(metric: str, where: str, by: str = "") -> str:
    """A counter's growth a second, summed for each value of the labels `by`."""
    return f"sum {_by(by)}(rate({metric}{{{where}}}[$__rate_interval]))"


def mean(histogram: str, where: str, by: str = "") -> str:
    """The mean of a histogram's observations."""
    return f"{rate(f'{histogram}_sum', where, by)} / {rate(f'{histogram}_count', where, by)}"


def quantile(q: float, histogram: str, where: str, by: str = "") -> str:
    """A quantile of a histogram's observations, as exact as its buckets allow."""
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, {rate(f'{histogram}_bucket', where, labels)})"


def born_or_grown(counter: str, where: str) -> str:
    """The growth of each series; for a new series, all that it has counted.

    `increase` alone misses the first value of a new series, which for rare events is most of it.
    """
    selected = f"{counter}{{{where}}}"
    return f"(({selected} unless {selected} offset $__rate_interval) or increase({selected}[$__rate_interval]))"


def owned(expr: str) -> str:
    """Add the label `owner` to series that have a pod: the pod and, where it has several, the unit."""
    numbered = f'label_replace({expr}, "unit", " unit $1", "unit", "(.+)")'
    return f'label_join({numbered}, "owner", "", "pod", "unit")'


def _by(labels: str) -> str:
    return f"by ({labels}) " if labels else ""

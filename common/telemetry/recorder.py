"""Metrics for code on a call's path: counters, histograms and gauges that cost a fraction of a microsecond.

Only the event loop's thread writes, so nothing here locks. A scrape reads from a thread of its own, and three rules
keep what it reads consistent. A series' value is one reference, replaced whole. Dicts and lists are copied in one step
of the interpreter before they are walked. A histogram keeps no separate count, so its buckets and its count, made from
one copy, always agree. Only its sum can be one observation ahead or behind.

Label values may come from callers. So a metric keeps at most `max_series` series, with values of moderate length.
Others are counted under labels that are all `other`, so that totals stay right.
"""

import logging
import re
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, ClassVar, Generic, TypeVar

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

OTHER = "other"
# Seconds. A cheap call on a warm lane takes a few hundred microseconds; the longest deadlines are minutes.
LATENCY_BUCKETS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
_MAX_LABEL_CHARACTERS = 256
_log = logging.getLogger(__name__)


class CounterSeries:
    """A counter under one set of labels."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def add(self, amount: float = 1.0) -> None:
        """Add `amount`, which must not be negative; this is not checked."""
        self.value += amount


class GaugeSeries:
    """A gauge under one set of labels."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def set(self, value: float) -> None:
        """Set the present value."""
        self.value = value


class HistogramSeries:
    """A histogram under one set of labels. `counts` are those of each bucket, not cumulative; the last is +Inf's."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count `value` in the first bucket whose bound is not below it."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


Series = TypeVar("Series", CounterSeries, GaugeSeries, HistogramSeries)


class _Metric(ABC, Generic[Series]):
    """A named family of series, one for each combination of label values seen."""

    # Makes the family for prometheus_client, still without samples.
    _family: ClassVar[type[CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily]]

    def __init__(self, name: str, text: str, label_names: Sequence[str], max_series: int) -> None:
        # prometheus_client would accept any UTF-8 as a name.
        if not all(re.fullmatch("[a-z][a-z0-9_]*", word) for word in (name, *label_names)):
            raise ValueError(f"metric {name!r} or a label of {tuple(label_names)} is not a valid Prometheus name")
        if not text:
            raise ValueError(f"metric {name} needs a HELP text")
        self.name = name
        self.text = text
        self.label_names = tuple(label_names)
        self._max_series = max_series
        self._series: dict[tuple[str, ...], Series] = {}
        if not self.label_names:
            self.labels()

    def labels(self, *values: str) -> Series:
        """The series with these label values, created if it is new. Bind it once if the labels are known beforehand.

        A bound series is exported from then on, with 0 until something is counted. Raises ValueError unless there is
        one string for each label name.
        """
        return self._series.get(values) or self._add_series(values)

    def seen(self, *values: str) -> Series | None:
        """The series with these label values; None if it has not been created."""
        return self._series.get(values)

    def collect(self) -> Metric:
        """Collect all series at their present values. Called from a scrape's thread."""
        family = self._family(self.name, self.text, labels=self.label_names)
        for labels, sample in self._samples():
            family.add_metric(labels, *sample)
        return family

    @abstractmethod
    def _new_series(self) -> Series: ...

    @abstractmethod
    def _samples(self) -> Iterable[tuple[tuple[str, ...], tuple[Any, ...]]]:
        """The series' labels, each with the arguments of its family's `add_metric`."""

    def _add_series(self, values: tuple[str, ...]) -> Series:
        if len(values) != len(self.label_names) or not all(isinstance(value, str) for value in values):
            raise ValueError(f"metric {self.name}: wanted a string for each of {self.label_names}, got {values!r:.200}")
        if len(self._series) >= self._max_series or not all(map(_is_presentable, values)):
            values = (OTHER,) * len(values)
        return self._series.setdefault(values, self._new_series())


class Counter(_Metric[CounterSeries]):
    """A sum that only grows: `counter.add(1, kernel, code)`."""

    _family = CounterMetricFamily

    def add(self, amount: float, *labels: str) -> None:
        """Add `amount`, which must not be negative."""
        try:
            self._series[labels].value += amount
        except KeyError:
            self._add_series(labels).value += amount

    def _new_series(self) -> CounterSeries:
        return CounterSeries()

    def _samples(self) -> Iterable[tuple[tuple[str, ...], tuple[float]]]:
        return [(labels, (series.value,)) for labels, series in self._series.copy().items()]


class Histogram(_Metric[HistogramSeries]):
    """A distribution of values over buckets, in base units: `histogram.observe(seconds, kernel, stage)`."""

    _family = HistogramMetricFamily

    def __init__(
        self, name: str, text: str, label_names: Sequence[str], max_series: int, buckets: Sequence[float]
    ) -> None:
        self._bounds = tuple(map(float, buckets))
        if not self._bounds or sorted(set(self._bounds)) != list(self._bounds):
            raise ValueError(f"metric {name}: buckets must increase, got {self._bounds}")
        self._bucket_names = [*map(repr, self._bounds), "+Inf"]
        super().__init__(name, text, label_names, max_series)

    def observe(self, value: float, *labels: str) -> None:
        """Count `value`. A bound series does the same at half the cost."""
        try:
            series = self._series[labels]
        except KeyError:
            series = self._add_series(labels)
        series.counts[bisect_left(series.bounds, value)] += 1
        series.sum += value

    def _new_series(self) -> HistogramSeries:
        return HistogramSeries(self._bounds)

    def _samples(self) -> Iterable[tuple[tuple[str, ...], tuple[list[tuple[str, int]], float]]]:
        for labels, series in self._series.copy().items():
            counts = accumulate(series.counts.copy())
            yield labels, (list(zip(self._bucket_names, counts, strict=True)), series.sum)


class Gauge(_Metric[GaugeSeries]):
    """A present value: set by the loop with `gauge.set(value, *labels)`, or read by `read` at each scrape."""

    _family = GaugeMetricFamily

    def __init__(
        self, name: str, text: str, label_names: Sequence[str], max_series: int, read: "GaugeReader | None" = None
    ) -> None:
        self._read = read
        super().__init__(name, text, label_names, max_series)

    def set(self, value: float, *labels: str) -> None:
        """Set the present value under these labels."""
        try:
            self._series[labels].value = value
        except KeyError:
            self._add_series(labels).value = value

    def _new_series(self) -> GaugeSeries:
        return GaugeSeries()

    def _samples(self) -> Iterable[tuple[tuple[str, ...], tuple[float]]]:
        if self._read is None:
            return [(labels, (series.value,)) for labels, series in self._series.copy().items()]
        try:
            values = self._read()
        except Exception:  # noqa: BLE001 (only this metric is left out: in trouble the others are needed most)
            _log.exception("metric %s could not be read", self.name)
            return []
        found = dict(values) if isinstance(values, Mapping) else {(): values}
        return [(labels, (value,)) for labels, value in found.items()]


# Returns a number for a gauge without labels, else numbers by label values. Called from a scrape's thread.
GaugeReader = Callable[[], float | Mapping[tuple[str, ...], float]]


class Recorder:
    """All metrics of one process. It is a collector for prometheus_client.

    Create metrics at start and keep them; report only from the event loop's thread. `max_series` bounds each metric.
    """

    def __init__(self, *, max_series: int = 1000) -> None:
        self._max_series = max_series
        self._metrics: dict[str, Counter | Histogram | Gauge] = {}

    def counter(self, name: str, text: str, label_names: Sequence[str] = ()) -> Counter:
        """Create a counter, whose name ends in `_total`. Raises ValueError for a taken or invalid name."""
        if not name.endswith("_total"):
            raise ValueError(f"the name of counter {name} must end in _total")
        return self._add(Counter(name, text, label_names, self._max_series))

    def histogram(
        self, name: str, text: str, label_names: Sequence[str] = (), buckets: Sequence[float] = LATENCY_BUCKETS
    ) -> Histogram:
        """Create a histogram, whose name ends in a base unit such as `_seconds`. The bound +Inf is added."""
        return self._add(Histogram(name, text, label_names, self._max_series, buckets))

    def gauge(self, name: str, text: str, label_names: Sequence[str] = (), read: GaugeReader | None = None) -> Gauge:
        """Create a gauge that is set; or, given `read`, read at each scrape, in the scrape's thread."""
        return self._add(Gauge(name, text, label_names, self._max_series, read))

    def collect(self) -> Iterator[Metric]:
        """Yield every metric with its present values. May be called from any thread."""
        for metric in list(self._metrics.values()):
            yield metric.collect()

    def _add(self, metric: "_AnyMetric") -> "_AnyMetric":
        if metric.name in self._metrics:
            raise ValueError(f"metric {metric.name} already exists")
        self._metrics[metric.name] = metric
        return metric


_AnyMetric = TypeVar("_AnyMetric", Counter, Histogram, Gauge)


def _is_presentable(value: str) -> bool:
    """Whether a label value may be kept. A lone surrogate would fail the whole scrape; long values fill memory."""
    return len(value) <= _MAX_LABEL_CHARACTERS and value.isprintable()

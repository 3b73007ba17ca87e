"""What a call's path reports to: counters, histograms and gauges that cost a fraction of a microsecond.

The event loop's thread is the only writer, so nothing here locks. A scrape reads from a thread of its own, and three
things keep what it sees true: a series' value is one reference, replaced whole; dicts and lists are copied in one step
of the interpreter before anything walks them; and a histogram keeps no count of its own, so that its buckets and its
count, made from one copy, always agree. Only its sum can be one observation ahead or behind.

Label values may come from callers. So a metric keeps at most `max_series` series, with values of moderate length; what
does not fit is counted under labels that are all `other`, and the totals stay right.
"""

import logging
import re
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Generic, TypeVar

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

OTHER = "other"
# Seconds: a cheap call through a warm lane takes a few hundred microseconds, the longest deadline is minutes.
LATENCY_BUCKETS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
_MOST_LABEL_CHARACTERS = 256
_log = logging.getLogger(__name__)


class CounterSeries:
    """One counter under one set of labels."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def add(self, amount: float = 1.0) -> None:
        """Count `amount`, which must not be negative: nothing here checks it."""
        self.value += amount


class GaugeSeries:
    """One gauge under one set of labels."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def set(self, value: float) -> None:
        """What is true from now on."""
        self.value = value


class HistogramSeries:
    """One histogram under one set of labels. `counts` are each bucket's own, not cumulative; the last is +Inf's."""

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
    """A named family of series, one for each combination of label values that was seen."""

    def __init__(self, name: str, text: str, label_names: Sequence[str], max_series: int) -> None:
        # prometheus_client lets any UTF-8 be a name.
        if not all(re.fullmatch("[a-z][a-z0-9_]*", word) for word in (name, *label_names)):
            raise ValueError(f"metric {name!r} or one of its labels {tuple(label_names)} is no Prometheus name")
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
        """The series under these values, made if it is new: bind it once where the labels are known beforehand.

        A series that is bound is exported from then on, at 0 until something is counted. Raises ValueError when the
        values are not one string for each label name.
        """
        return self._series.get(values) or self._add_series(values)

    def seen(self, *values: str) -> Series | None:
        """The series under these values, if there is one of its own."""
        return self._series.get(values)

    @abstractmethod
    def _family(self) -> Metric:
        """What prometheus_client exports, still without samples."""

    @abstractmethod
    def _new_series(self) -> Series: ...

    @abstractmethod
    def collect(self) -> Metric:
        """Every series as it stands; called from a scrape's thread."""

    def _add_series(self, values: tuple[str, ...]) -> Series:
        if len(values) != len(self.label_names) or not all(isinstance(value, str) for value in values):
            raise ValueError(f"metric {self.name} wants a string for each of {self.label_names}, not {values!r:.200}")
        if len(self._series) >= self._max_series or not all(map(_is_presentable, values)):
            values = (OTHER,) * len(values)
        return self._series.setdefault(values, self._new_series())


class Counter(_Metric[CounterSeries]):
    """A sum that only grows. `counter.add(1, kernel, code)`."""

    def add(self, amount: float, *labels: str) -> None:
        """Count `amount`, which must not be negative."""
        try:
            self._series[labels].value += amount
        except KeyError:
            self._add_series(labels).value += amount

    def _new_series(self) -> CounterSeries:
        return CounterSeries()

    def _family(self) -> CounterMetricFamily:
        return CounterMetricFamily(self.name, self.text, labels=self.label_names)

    def collect(self) -> Metric:
        family = self._family()
        for labels, series in self._series.copy().items():
            family.add_metric(labels, series.value)
        return family


class Histogram(_Metric[HistogramSeries]):
    """How values spread over buckets, in base units. `histogram.observe(seconds, kernel, stage)`."""

    def __init__(
        self, name: str, text: str, label_names: Sequence[str], max_series: int, buckets: Sequence[float]
    ) -> None:
        self._bounds = tuple(map(float, buckets))
        if not self._bounds or sorted(set(self._bounds)) != list(self._bounds):
            raise ValueError(f"metric {name}: buckets must rise, but they are {self._bounds}")
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

    def _family(self) -> HistogramMetricFamily:
        return HistogramMetricFamily(self.name, self.text, labels=self.label_names)

    def collect(self) -> Metric:
        family = self._family()
        for labels, series in self._series.copy().items():
            counts = accumulate(series.counts.copy())
            family.add_metric(labels, list(zip(self._bucket_names, counts, strict=True)), series.sum)
        return family


class Gauge(_Metric[GaugeSeries]):
    """What is true now: set by the loop with `gauge.set(value, *labels)`, or read by `read` at each scrape."""

    def __init__(
        self, name: str, text: str, label_names: Sequence[str], max_series: int, read: "GaugeReader | None" = None
    ) -> None:
        self._read = read
        super().__init__(name, text, label_names, max_series)

    def set(self, value: float, *labels: str) -> None:
        """What is true from now on, under these labels."""
        try:
            self._series[labels].value = value
        except KeyError:
            self._add_series(labels).value = value

    def _new_series(self) -> GaugeSeries:
        return GaugeSeries()

    def _family(self) -> GaugeMetricFamily:
        return GaugeMetricFamily(self.name, self.text, labels=self.label_names)

    def collect(self) -> Metric:
        family = self._family()
        for labels, value in self._values().items():
            family.add_metric(labels, value)
        return family

    def _values(self) -> dict[tuple[str, ...], float]:
        if self._read is None:
            return {labels: series.value for labels, series in self._series.copy().items()}
        try:
            values = self._read()
        except Exception:  # noqa: BLE001 (an operator in trouble needs the other metrics most: this one is only missing)
            _log.exception("metric %s could not be read", self.name)
            return {}
        return dict(values) if isinstance(values, Mapping) else {(): values}


# A number for a gauge without labels; else a number for each tuple of label values. Called from a scrape's thread.
GaugeReader = Callable[[], float | Mapping[tuple[str, ...], float]]


class Recorder:
    """All that one process reports, and a prometheus_client collector of it.

    Make metrics at start-up and keep them; report from the event loop's thread alone. `max_series` bounds each metric.
    """

    def __init__(self, *, max_series: int = 1000) -> None:
        self._max_series = max_series
        self._metrics: dict[str, Counter | Histogram | Gauge] = {}

    def counter(self, name: str, text: str, label_names: Sequence[str] = ()) -> Counter:
        """A counter; its name ends in `_total`. Raises ValueError for a name that is taken or badly formed."""
        if not name.endswith("_total"):
            raise ValueError(f"a counter's name ends in _total, but this is {name}")
        return self._add(Counter(name, text, label_names, self._max_series))

    def histogram(
        self, name: str, text: str, label_names: Sequence[str] = (), buckets: Sequence[float] = LATENCY_BUCKETS
    ) -> Histogram:
        """A histogram; its name ends in a base unit, such as `_seconds`. The bound +Inf is added to `buckets`."""
        return self._add(Histogram(name, text, label_names, self._max_series, buckets))

    def gauge(self, name: str, text: str, label_names: Sequence[str] = (), read: GaugeReader | None = None) -> Gauge:
        """A gauge that is set or, given `read`, asked for at each scrape, in the scrape's thread."""
        return self._add(Gauge(name, text, label_names, self._max_series, read))

    def collect(self) -> Iterator[Metric]:
        """Every metric as it stands; safe from any thread."""
        for metric in list(self._metrics.values()):
            yield metric.collect()

    def _add(self, metric: "_AnyMetric") -> "_AnyMetric":
        if metric.name in self._metrics:
            raise ValueError(f"metric {metric.name} exists already")
        self._metrics[metric.name] = metric
        return metric


_AnyMetric = TypeVar("_AnyMetric", Counter, Histogram, Gauge)


def _is_presentable(value: str) -> bool:
    """Whether a label value may be kept: a lone surrogate would fail the whole scrape, a long one fill the memory."""
    return len(value) <= _MOST_LABEL_CHARACTERS and value.isprintable()

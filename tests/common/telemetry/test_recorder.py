"""The recorder: what it counts, what it exports, and that a concurrent scrape sees nothing impossible."""

import logging
import threading
import timeit

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from unlatch.common.telemetry.recorder import LATENCY_BUCKETS, Recorder

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scraped(recorder: Recorder) -> Samples:
    """Return what a scrape of this recorder says, parsed from the text that Prometheus would get."""
    registry = CollectorRegistry()
    registry.register(recorder)
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def at(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def test_counter_adds_under_its_labels() -> None:
    """A counter and its bound series add to the same value."""
    recorder = Recorder()
    calls = recorder.counter("calls_total", "Calls.", ("kernel", "code"))
    calls.add(2, "fft", "OK")
    calls.labels("fft", "OK").add()
    calls.labels("svd", "OK")
    samples = scraped(recorder)
    assert at(samples, "calls_total", kernel="fft", code="OK") == 3
    assert at(samples, "calls_total", kernel="svd", code="OK") == 0


def test_histogram_counts_at_and_below_each_bound() -> None:
    """A value equal to a bound counts in that bound's bucket, and a value above all bounds in +Inf alone."""
    recorder = Recorder()
    waits = recorder.histogram("wait_seconds", "Waits.", ("stage",), (0.1, 1))
    for value in (0.05, 0.1, 0.5, 7):
        waits.observe(value, "run")
    waits.labels("run").observe(0.5)
    samples = scraped(recorder)
    assert [at(samples, "wait_seconds_bucket", stage="run", le=le) for le in ("0.1", "1.0", "+Inf")] == [2, 4, 5]
    assert at(samples, "wait_seconds_count", stage="run") == 5
    assert at(samples, "wait_seconds_sum", stage="run") == pytest.approx(8.15)


def test_gauges_are_set_or_read_at_the_scrape() -> None:
    """A gauge shows what was set last, or what its reader returns when it is scraped."""
    recorder = Recorder()
    depth = recorder.gauge("depth", "Depth.")
    depth.set(3)
    depth.set(2)
    state: dict[tuple[str, ...], float] = {("a",): 1.0}
    recorder.gauge("up", "Up.", ("worker",), lambda: state)
    recorder.gauge("level", "Level.", read=lambda: 0.5)
    state["b",] = 0.0
    samples = scraped(recorder)
    assert (at(samples, "depth"), at(samples, "level")) == (2, 0.5)
    assert (at(samples, "up", worker="a"), at(samples, "up", worker="b")) == (1, 0)


def test_metric_without_labels_is_exported_at_zero() -> None:
    """A counter without labels exists from the start, so that its first increase is seen as one."""
    recorder = Recorder()
    recorder.counter("lost_total", "Lost.")
    assert at(scraped(recorder), "lost_total") == 0


def test_series_are_bounded() -> None:
    """Beyond the bound, values go to a series whose labels are all `other`. The total is right; known series go on."""
    recorder = Recorder(max_series=3)
    calls = recorder.counter("calls_total", "Calls.", ("kernel", "code"))
    waits = recorder.histogram("wait_seconds", "Waits.", ("kernel",), (1.0,))
    for number in range(10):
        calls.add(1, f"k{number}", "OK")
        waits.observe(0.5, f"k{number}")
    calls.add(1, "k0", "OK")
    samples = scraped(recorder)
    assert at(samples, "calls_total", kernel="k0", code="OK") == 2
    assert at(samples, "calls_total", kernel="other", code="other") == 7
    assert at(samples, "wait_seconds_count", kernel="other") == 7
    assert sum(name == "calls_total" for name, _ in samples) == 4


def test_labels_that_would_break_a_scrape_are_not_kept() -> None:
    """A lone surrogate, a control character or a megabyte in a caller's kernel name counts as `other`."""
    recorder = Recorder()
    calls = recorder.counter("calls_total", "Calls.", ("kernel",))
    for name in ("\ud800", "a\nb", "x" * 2**20, 'quote"and\\slash', "größe"):
        calls.add(1, name)
    samples = scraped(recorder)
    assert at(samples, "calls_total", kernel="other") == 3
    assert at(samples, "calls_total", kernel='quote"and\\slash') == at(samples, "calls_total", kernel="größe") == 1


def test_misuse_is_refused_at_once() -> None:
    """A wrong number of labels, a repeated or malformed name, missing help and unsorted buckets raise ValueError."""
    recorder = Recorder()
    calls = recorder.counter("calls_total", "Calls.", ("kernel",))
    with pytest.raises(ValueError, match="kernel"):
        calls.add(1, "a", "b")
    with pytest.raises(ValueError, match="already exists"):
        recorder.counter("calls_total", "Calls.")
    with pytest.raises(ValueError, match="_total"):
        recorder.counter("calls", "Calls.")
    with pytest.raises(ValueError, match="HELP"):
        recorder.gauge("depth", "")
    with pytest.raises(ValueError, match="Prometheus name"):
        recorder.gauge("a depth", "Depth.")
    with pytest.raises(ValueError, match="buckets"):
        recorder.histogram("wait_seconds", "Waits.", (), (2.0, 1.0))


def test_gauge_that_fails_is_only_missing(caplog: pytest.LogCaptureFixture) -> None:
    """A gauge whose reader raises is absent and logged. The rest of the scrape is complete."""
    recorder = Recorder()
    recorder.gauge("broken", "Broken.", read=lambda: 1 / 0)
    recorder.gauge("whole", "Whole.").set(1)
    with caplog.at_level(logging.ERROR):
        samples = scraped(recorder)
    assert at(samples, "whole") == 1
    assert ("broken", frozenset()) not in samples
    assert "broken" in caplog.text


def test_scrapes_beside_a_writer_see_nothing_impossible() -> None:
    """While another thread adds new series, no scrape fails, no value falls, and every histogram adds up."""
    recorder = Recorder()
    calls = recorder.counter("calls_total", "Calls.", ("kernel",))
    waits = recorder.histogram("wait_seconds", "Waits.", ("kernel",))
    done = threading.Event()

    def write() -> None:
        for number in range(100_000):
            kernel = f"k{number // 200}"
            calls.add(1, kernel)
            waits.observe(number % 97 / 1000, kernel)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    before: Samples = {}
    scrapes = 0
    while not done.is_set() or scrapes < 5:
        now = scraped(recorder)
        assert all(now[key] >= value for key, value in before.items())
        assert_histograms_rise(recorder)
        before, scrapes = now, scrapes + 1
    writer.join()
    assert sum(value for (name, _), value in scraped(recorder).items() if name == "calls_total") == 100_000


def assert_histograms_rise(recorder: Recorder) -> None:
    """Check that within each series the buckets never fall, and that the last equals the count."""
    for family in recorder.collect():
        last: dict[str, float] = {}
        for sample in family.samples:
            kernel = sample.labels["kernel"]
            if sample.name.endswith("_bucket"):
                assert sample.value >= last.get(kernel, 0)
                last[kernel] = sample.value
            elif sample.name.endswith("_count"):
                assert sample.value == last[kernel]


@pytest.mark.alone
def test_counting_is_cheap() -> None:
    """An add takes under 0.4 µs and an observe under 0.7 µs. Three times that is allowed on a slow or busy machine."""
    recorder = Recorder()
    calls = recorder.counter("calls_total", "Calls.", ("kernel", "code"))
    waits = recorder.histogram("wait_seconds", "Waits.", ("kernel", "stage"))
    number = 20_000
    add = min(timeit.repeat(lambda: calls.add(1, "fft", "OK"), number=number, repeat=9)) / number
    observe = min(timeit.repeat(lambda: waits.observe(0.003, "fft", "run"), number=number, repeat=9)) / number
    assert add < 3 * 0.4e-6
    assert observe < 3 * 0.7e-6


def test_default_buckets_span_a_call() -> None:
    """The default buckets rise from 100 µs to 60 s."""
    assert (LATENCY_BUCKETS[0], LATENCY_BUCKETS[-1], len(LATENCY_BUCKETS)) == (0.0001, 60.0, 18)
    assert sorted(LATENCY_BUCKETS) == list(LATENCY_BUCKETS)

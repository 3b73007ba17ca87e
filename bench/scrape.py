"""Reading of a /metrics."""

import urllib.request
from collections.abc import Mapping

from prometheus_client.parser import text_string_to_metric_families

# Values by series: a sample's name and its labels.
Scrape = Mapping[tuple[str, frozenset[tuple[str, str]]], float]

# What only grows, in counters and in histograms, none of which counts anything below 0.
_GROWING = ("_total", "_count", "_bucket", "_sum")


def scrape(port: int) -> Scrape:
    """Read all series."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5.0) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    samples = (sample for family in families for sample in family.samples)
    return {(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples}


def total(seen: Scrape, name: str) -> float:
    """The sum of all series of one name."""
    return sum(value for (found, _), value in seen.items() if found == name)


def fallen(before: Scrape, after: Scrape) -> list[str]:
    """Counters that have fallen or disappeared."""
    return [
        f"{name}{dict(labels)}: {value} -> {after.get((name, labels))}"
        for (name, labels), value in before.items()
        if name.endswith(_GROWING) and after.get((name, labels), -1.0) < value
    ]

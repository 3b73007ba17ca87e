"""A running mesh as a real Prometheus sees it."""

from functools import partial

import pytest

from tests.deploy.monitoring.prometheus import NAMESPACE, Target, Watched
from tests.support.watching import Scrape, wait_until

pytestmark = pytest.mark.timeout(180)


def scraped(watched: Watched, target: Target, exported: set[str]) -> bool:
    """Whether Prometheus has these metrics of a target, with the expected labels."""
    labels = f'job="{target.job}",namespace="{NAMESPACE}",pod="{target.pod}"'
    return exported <= {one.labels["__name__"] for one in watched.prometheus.query(f"{{{labels}}}")}


def test_every_metric_of_the_mesh_has_been_scraped(watched: Watched) -> None:
    """Every metric that gateway or dispatcher exports has samples.

    Each target has the labels that Kubernetes would give it.
    """
    for target in watched.targets:
        exported = {name for name, _ in Scrape(target.address).samples}
        assert len(exported) > 30
        wait_until(partial(scraped, watched, target, exported), f"all of {target.pod} is known: {exported}")


def test_series_that_rates_are_taken_of_are_there_before_they_count(watched: Watched) -> None:
    """A called kernel has series for faults that it has not had, and every kind of retry has a series."""
    (faults,) = watched.ask('unlatch_calls_total{job="unlatch-gateway",kernel="identity",code="INTERNAL"}')
    assert faults.value == 0
    reasons = {one.labels["reason"] for one in watched.ask("unlatch_retries_refused_total")}
    assert reasons == {"not_pure", "attempts", "budget"}
    assert {one.labels["reason"] for one in watched.ask("unlatch_retries_total")} == {"not_begun", "lost", "failed"}

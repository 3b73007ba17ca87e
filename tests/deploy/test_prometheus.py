"""A running mesh as a real Prometheus sees it."""

from functools import partial

import pytest

from tests.deploy.prometheus import NAMESPACE, Target, Watched
from tests.support.watching import Scrape, wait_until

pytestmark = pytest.mark.timeout(180)


def scraped(watched: Watched, target: Target, exported: set[str]) -> bool:
    """Whether Prometheus has these of a target, under the labels that it is to have."""
    labels = f'job="{target.job}",namespace="{NAMESPACE}",pod="{target.pod}"'
    return exported <= {one.labels["__name__"] for one in watched.prometheus.query(f"{{{labels}}}")}


def test_every_metric_of_the_mesh_has_been_scraped(watched: Watched) -> None:
    """Whatever gateway and front export has samples, of each target under the labels that Kubernetes would give it."""
    for target in watched.targets:
        exported = {name for name, _ in Scrape(target.address).samples}
        assert len(exported) > 30
        wait_until(partial(scraped, watched, target, exported), f"all of {target.pod} is known: {exported}")


def test_series_that_rates_are_taken_of_are_there_before_they_count(watched: Watched) -> None:
    """A kernel that has been called has series of the faults that it has not had, and every kind of retry has one."""
    (faults,) = watched.ask('unlatch_calls_total{job="unlatch-gateway",kernel="identity",code="INTERNAL"}')
    assert faults.value == 0
    reasons = {one.labels["reason"] for one in watched.ask("unlatch_retries_refused_total")}
    assert reasons == {"not_pure", "attempts", "budget"}
    assert {one.labels["reason"] for one in watched.ask("unlatch_retries_total")} == {"not_begun", "lost", "failed"}

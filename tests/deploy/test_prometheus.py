"""A running mesh as a real Prometheus sees it."""

import pytest

from tests.deploy.prometheus import Watched
from tests.faults.watching import Scrape

pytestmark = pytest.mark.timeout(180)


def test_every_metric_of_the_mesh_has_been_scraped(watched: Watched) -> None:
    """Whatever gateway and front export has samples, of each target under the labels that Kubernetes would give it."""
    for target in watched.targets:
        scraped = {name for name, _ in Scrape(target.address).samples}
        assert len(scraped) > 30
        wanted = f'{{job="{target.job}",namespace="unlatch",pod="{target.pod}"}}'
        known = {one.labels["__name__"] for one in watched.ask(wanted)}
        assert scraped <= known, scraped - known


def test_series_that_rates_are_taken_of_are_there_before_they_count(watched: Watched) -> None:
    """A kernel that has been called has series of the faults that it has not had, and every kind of retry has one."""
    for code in ("DEADLINE_EXCEEDED", "INTERNAL", "UNAVAILABLE"):
        (faults,) = watched.ask(f'unlatch_calls_total{{job="unlatch-gateway",kernel="gaussian_blur",code="{code}"}}')
        assert faults.value <= watched.ask('unlatch_calls_total{kernel="gaussian_blur",code="OK"}')[0].value
    reasons = {one.labels["reason"] for one in watched.ask("unlatch_retries_refused_total")}
    assert reasons == {"not pure", "attempts", "budget"}
    assert {one.labels["reason"] for one in watched.ask("unlatch_retries_total")} == {"not begun", "lost", "failed"}

"""KEDA's queries to Prometheus: the metrics exist, and the answers are what replicas are to be scaled by."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.manifests import composed, overlay
from tests.support.mesh import ROOT

promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is missing: apt install prometheus (.ci/run does)"
)
# Two replicas of four workers, scraped every 15 s: each was busy for 10 s of them, with 150 calls of 1/15 s. With 30
# calls waiting, at the gateway and at the replicas, 2 s of runs are to come, for 8 workers.
SERIES = {
    'unlatch_worker_busy_seconds_total{{namespace="unlatch",pod="compute-{pod}",worker="{worker}"}}': "0+10x40",
    'unlatch_worker_calls_total{{namespace="unlatch",pod="compute-{pod}",worker="{worker}",kernel="k",outcome="ok"}}': (
        "0+150x40"
    ),
    'unlatch_worker_up{{namespace="unlatch",pod="compute-{pod}",worker="{worker}"}}': "1x40",
}
WAITING = {
    'unlatch_queue_depth{namespace="unlatch",pod="gateway-0"}': "20x40",
    'unlatch_queue_depth{namespace="unlatch",pod="compute-0"}': "6x40",
    'unlatch_queue_depth{namespace="unlatch",pod="compute-1"}': "4x40",
    # Series of another mesh do not count.
    'unlatch_queue_depth{namespace="another",pod="gateway-0"}': "1000x40",
    'unlatch_worker_up{namespace="another",pod="compute-0",worker="0"}': "1x40",
}


def triggers() -> dict[str, dict[str, str]]:
    """Return the queries by name."""
    spec = overlay("prod").one("ScaledObject", "unlatch-compute")["spec"]
    return {trigger["name"]: trigger["metadata"] for trigger in spec["triggers"]}


def test_names_are_those_of_metrics() -> None:
    """Every metric in a query is listed in docs/operations/metrics.md, which lists all that exist."""
    listed = set(re.findall(r"^\| `(\w+)", (ROOT / "docs/operations/metrics.md").read_text(), re.MULTILINE))
    for name, trigger in triggers().items():
        assert (asked := set(re.findall(r"\bunlatch_\w+", trigger["query"]))) <= listed, name
        assert asked, name


@promtool
@pytest.mark.parametrize(
    ("trigger", "wanted"), [("queue-wait", 30 * (10 / 150) / 8), ("utilization", 8 * (10 / 15) / 8)]
)
def test_answers(trigger: str, wanted: float, tmp_path: Path) -> None:
    """Prometheus' own engine computes the answers.

    They are the time that waiting calls need, and how busy workers are.
    """
    workers = [{"pod": pod, "worker": worker} for pod in range(2) for worker in range(4)]
    series = {name.format(**worker): values for name, values in SERIES.items() for worker in workers} | WAITING
    assert _evaluated(triggers()[trigger]["query"], series, tmp_path) == pytest.approx(wanted, rel=1e-6)


@promtool
def test_nobody_waits_where_nothing_ended(tmp_path: Path) -> None:
    """Before the first run has ended there is no answer, which KEDA takes for none, and no infinite one."""
    series = {
        'unlatch_queue_depth{namespace="unlatch",pod="gateway-0"}': "20x40",
        'unlatch_worker_up{namespace="unlatch",pod="compute-0",worker="0"}': "1x40",
        'unlatch_worker_busy_seconds_total{namespace="unlatch",pod="compute-0",worker="0"}': "0+15x40",
    }
    assert _evaluated(triggers()["queue-wait"]["query"], series, tmp_path) is None
    assert _evaluated(triggers()["utilization"]["query"], series, tmp_path) == pytest.approx(1.0)


def _evaluated(query: str, series: dict[str, str], directory: Path) -> float | None:
    """Evaluate a query after ten minutes of these series, scraped every 15 s."""
    # promtool prints the value where it is not the expected one.
    impossible = {"labels": "{}", "value": -1}
    case: dict[str, Any] = {
        "interval": "15s",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [{"expr": query, "eval_time": "10m", "exp_samples": [impossible]}],
    }
    file = directory / "case.yml"
    file.write_text(yaml.safe_dump({"evaluation_interval": "15s", "tests": [case]}))
    ran = subprocess.run(["promtool", "test", "rules", file], capture_output=True, text=True, timeout=30, check=False)
    said = ran.stdout + ran.stderr
    if re.search(r"got: *nil", said):
        return None
    found = re.search(r"got:\s*(?:\{\} )?([-+\d.eE]+)", said)
    assert found is not None, said
    return float(found[1])


def test_the_base_has_none_to_be_in_its_way() -> None:
    """KEDA refuses a Deployment that has an autoscaler.

    With the component the base's own is gone; without it, it is there.
    """
    for components, scalers in (((), {"HorizontalPodAutoscaler"}), (("keda",), {"ScaledObject"})):
        manifests = composed("base", *components)
        found = manifests.of("HorizontalPodAutoscaler", "ScaledObject")
        assert {one["kind"] for one in found if one["spec"]["scaleTargetRef"]["name"] == "unlatch-compute"} == scalers

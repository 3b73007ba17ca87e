"""What KEDA asks Prometheus: of metrics that are exported, with the answers that replicas are to be scaled by."""

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
# calls that wait, at the gateway and at the replicas, 2 s of run are to come, for 8 workers.
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
    # Another mesh's are none of ours.
    'unlatch_queue_depth{namespace="another",pod="gateway-0"}': "1000x40",
    'unlatch_worker_up{namespace="another",pod="compute-0",worker="0"}': "1x40",
}


def triggers() -> dict[str, dict[str, str]]:
    """The questions, by name."""
    spec = overlay("prod").one("ScaledObject", "unlatch-compute")["spec"]
    return {trigger["name"]: trigger["metadata"] for trigger in spec["triggers"]}


def test_names_are_those_of_metrics() -> None:
    """Every metric that is asked for is one that docs/operations/metrics.md lists, which lists what there is."""
    listed = set(re.findall(r"^\| `(\w+)", (ROOT / "docs/operations/metrics.md").read_text(), re.MULTILINE))
    for name, trigger in triggers().items():
        assert (asked := set(re.findall(r"\bunlatch_\w+", trigger["query"]))) <= listed, name
        assert asked, name


@promtool
@pytest.mark.parametrize(
    ("trigger", "wanted"), [("queue-wait", 30 * (10 / 150) / 8), ("utilization", 8 * (10 / 15) / 8)]
)
def test_answers(trigger: str, wanted: float, tmp_path: Path) -> None:
    """Prometheus' own engine says how long what waits would take, and how busy workers are, over the whole mesh."""
    workers = [{"pod": pod, "worker": worker} for pod in range(2) for worker in range(4)]
    series = {name.format(**worker): values for name, values in SERIES.items() for worker in workers} | WAITING
    assert _evaluated(triggers()[trigger]["query"], series, tmp_path) == pytest.approx(wanted, rel=1e-6)


@promtool
def test_nobody_waits_where_nothing_ended(tmp_path: Path) -> None:
    """Before a first run has ended there is no answer, which KEDA takes for none; not one without end."""
    series = {
        'unlatch_queue_depth{namespace="unlatch",pod="gateway-0"}': "20x40",
        'unlatch_worker_up{namespace="unlatch",pod="compute-0",worker="0"}': "1x40",
        'unlatch_worker_busy_seconds_total{namespace="unlatch",pod="compute-0",worker="0"}': "0+15x40",
    }
    assert _evaluated(triggers()["queue-wait"]["query"], series, tmp_path) is None
    assert _evaluated(triggers()["utilization"]["query"], series, tmp_path) == pytest.approx(1.0)


def _evaluated(query: str, series: dict[str, str], directory: Path) -> float | None:
    """What a query gives after ten minutes of these series, scraped every 15 s."""
    # It tells what it got where that is not what was expected.
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
    """KEDA refuses a Deployment that has an autoscaler: with it the base's own is gone, and without it is there."""
    for components, scalers in (((), {"HorizontalPodAutoscaler"}), (("keda",), {"ScaledObject"})):
        manifests = composed("base", *components)
        found = manifests.of("HorizontalPodAutoscaler", "ScaledObject")
        assert {one["kind"] for one in found if one["spec"]["scaleTargetRef"]["name"] == "unlatch-compute"} == scalers

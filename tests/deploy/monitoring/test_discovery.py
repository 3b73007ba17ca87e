"""Discovery of pods: the operator's PodMonitor, and Prometheus' own configuration for clusters without it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.monitoring.prometheus import RULES, Target, Watched, promtool, running_prometheus
from tests.support.mesh import ROOT
from tests.support.watching import wait_until
from unlatch.common.net.settings import Settings
from unlatch.compute.settings import ComputeSettings
from unlatch.gateway.settings import GatewaySettings

pytestmark = pytest.mark.timeout(180)

PLAIN = ROOT / "deploy" / "k8s" / "components" / "plain-prometheus"
OPERATORS = ROOT / "deploy" / "k8s" / "components" / "monitoring"
SETTINGS: dict[str, type[Settings]] = {"unlatch-gateway": GatewaySettings, "unlatch-compute": ComputeSettings}
META = "__meta_kubernetes_"


def found(target: Target, **pod: str) -> list[dict[str, Any]]:
    """Return what Kubernetes' service discovery says of a pod: a target for each port of its container."""
    of_pod = {
        f"{META}namespace": "unlatch",
        f"{META}pod_name": target.pod,
        f"{META}pod_phase": "Running",
        f"{META}pod_label_app_kubernetes_io_name": target.job,
        f"{META}pod_container_name": target.job.removeprefix("unlatch-"),
        f"{META}pod_annotation_prometheus_io_scrape": "true",
        f"{META}pod_annotation_prometheus_io_port": target.address.rpartition(":")[2],
        f"{META}pod_annotation_prometheus_io_path": "/metrics",
    } | {f"{META}pod_{name}": value for name, value in pod.items()}
    return [
        {
            "targets": [address],
            "labels": {**of_pod, f"{META}pod_container_port_number": address.rpartition(":")[2]},
        }
        for address in (target.address, "127.0.0.1:1", "127.0.0.1:2")
    ]


def plain_configuration(*pods: list[dict[str, Any]]) -> dict[str, Any]:
    """The shipped configuration with a list of these pods. Debian's Prometheus cannot ask an API server for them."""
    config: dict[str, Any] = yaml.safe_load((PLAIN / "prometheus.yml").read_text())
    (scraped,) = config["scrape_configs"]
    assert scraped.pop("kubernetes_sd_configs") == [{"role": "pod", "namespaces": {"own_namespace": True}}]
    return config | {
        "global": dict.fromkeys(config["global"], "500ms"),
        "rule_files": [str(RULES.parent / name) for name in config["rule_files"]],
        "scrape_configs": [scraped | {"static_configs": [target for pod in pods for target in pod]}],
    }


def test_plain_configuration_is_sound(tmp_path: Path) -> None:
    """Promtool finds nothing wrong with the configuration."""
    file = tmp_path / "prometheus.yml"
    file.write_text(json.dumps(plain_configuration()))
    assert "SUCCESS" in promtool("check", "config", "--lint-fatal", str(file))


def test_pods_are_found_by_their_annotations(watched: Watched, tmp_path: Path) -> None:
    """Each pod is one target, with the labels that the rules use.

    A pod without the annotation, or an ended one, is none.
    """
    stranger = Target(job="another", pod="another-0", address="127.0.0.1:3")
    config = plain_configuration(
        *map(found, watched.targets),
        found(stranger, annotation_prometheus_io_scrape=""),
        found(Target(job="unlatch-gateway", pod="gateway-ended", address="127.0.0.1:4"), phase="Succeeded"),
    )
    with running_prometheus(tmp_path, config) as prometheus:
        wait_until(lambda: len(prometheus.query("up == 1")) == len(watched.targets), "all are scraped", within=60.0)
        scraped = prometheus.get("targets", state="active")["activeTargets"]
        assert sorted(one["labels"]["pod"] for one in scraped) == sorted(one.pod for one in watched.targets)
        for target in watched.targets:
            (labels,) = [one["labels"] for one in scraped if one["labels"]["pod"] == target.pod]
            assert labels == {
                "job": target.job,
                "namespace": "unlatch",
                "pod": target.pod,
                "container": target.job.removeprefix("unlatch-"),
                "instance": target.address,
            }
        wait_until(
            lambda: prometheus.query("unlatch:worker_utilization:ratio_rate1m"), "rules are evaluated", within=60.0
        )


def test_pods_say_where_their_metrics_are() -> None:
    """The annotations' ports are the settings' own, and so are those in the PodMonitor."""
    patched = {one["metadata"]["name"]: one for one in yaml.safe_load_all((PLAIN / "scraped.yaml").read_text())}
    assert patched.keys() == SETTINGS.keys()
    for name, settings in SETTINGS.items():
        annotations = patched[name]["spec"]["template"]["metadata"]["annotations"]
        port = settings.model_fields["metrics_listen"].default.rpartition(":")[2]
        assert annotations == {
            "prometheus.io/scrape": "true",
            "prometheus.io/port": port,
            "prometheus.io/path": "/metrics",
        }


def test_operator_is_told_of_both() -> None:
    """The operator scrapes their port named metrics, with `job` as in the rules, often enough for rates of a minute."""
    monitor = yaml.safe_load((OPERATORS / "pod-monitor.yaml").read_text())["spec"]
    assert monitor["jobLabel"] == "app.kubernetes.io/name"
    (chosen,) = monitor["selector"]["matchExpressions"]
    assert (chosen["key"], chosen["operator"], set(chosen["values"])) == (monitor["jobLabel"], "In", set(SETTINGS))
    (endpoint,) = monitor["podMetricsEndpoints"]
    assert endpoint["port"] == "metrics"
    plain = yaml.safe_load((PLAIN / "prometheus.yml").read_text())["global"]
    assert (endpoint["interval"], endpoint["scrapeTimeout"]) == (plain["scrape_interval"], plain["scrape_timeout"])


def objects(file: str) -> dict[str, Any]:
    """Return the objects in a file of the plain variant, by kind."""
    return {one["kind"]: one for one in yaml.safe_load_all((PLAIN / file).read_text())}


def test_plain_prometheus_may_do_what_it_needs() -> None:
    """Prometheus keeps to the restricted standard, writes to its own volume alone, and may only list pods."""
    template = objects("deployment.yaml")["Deployment"]["spec"]["template"]
    pod, (container,) = template["spec"], template["spec"]["containers"]
    assert (
        pod["securityContext"].items() >= {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}.items()
    )
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    written = {mount["name"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    assert written == {"data"}
    (data,) = [volume for volume in pod["volumes"] if volume["name"] == "data"]
    assert "sizeLimit" in data["emptyDir"]
    assert re.fullmatch(r"[\w./-]+:v\d+\.\d+\.\d+", container["image"])
    assert container["resources"].keys() == {"requests", "limits"}
    account = objects("service-account.yaml")
    assert pod["serviceAccountName"] == account["ServiceAccount"]["metadata"]["name"]
    assert account["RoleBinding"]["subjects"][0]["name"] == pod["serviceAccountName"]
    assert account["RoleBinding"]["roleRef"]["name"] == account["Role"]["metadata"]["name"]
    assert account["Role"]["rules"] == [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}]
    service = objects("service.yaml")["Service"]
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    assert [port["targetPort"] for port in service["spec"]["ports"]] == [port["name"] for port in container["ports"]]


def test_plain_prometheus_reads_what_is_shipped() -> None:
    """Its configuration and rules are in the ConfigMap that it mounts, at the paths in its arguments."""
    (made,) = yaml.safe_load((PLAIN / "kustomization.yaml").read_text())["configMapGenerator"]
    pod = objects("deployment.yaml")["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (mounted,) = [volume for volume in pod["volumes"] if volume.get("configMap") == {"name": made["name"]}]
    (mount,) = [mount for mount in container["volumeMounts"] if mount["name"] == mounted["name"]]
    assert f"--config.file={mount['mountPath']}/prometheus.yml" in container["args"]
    config = yaml.safe_load((PLAIN / "prometheus.yml").read_text())
    assert set(made["files"]) == {"prometheus.yml", *config["rule_files"]}

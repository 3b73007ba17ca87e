"""`make deploy`: what it checks, in which order it asks a cluster to change, and what it removes.

`kubectl kustomize` is real. No API server is here, so a kubectl of the test notes the other commands.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.deploy.manifests import K8S
from tests.support.mesh import ROOT

BUILT_IN = ("v1", "apps/v1", "autoscaling/v2", "networking.k8s.io/v1", "policy/v1")
OPERATORS = ("cert-manager.io/v1", "keda.sh/v1alpha1", "monitoring.coreos.com/v1")
KUBECTL = """#!/bin/sh
case "$1" in
kustomize) exec {real} "$@" ;;
api-versions) cat {known} ;;
*) printf "%s\\n" "$*" >> {noted} ;;
esac
"""


def deployed(directory: Path, overlay: str, *known: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Deploy to a cluster that knows these versions of kinds. Returns what was asked of the cluster, too."""
    real = shutil.which("kubectl")
    assert real is not None
    noted = directory / "noted"
    noted.touch()
    (directory / "known").write_text("\n".join(known) + "\n")
    kubectl = directory / "bin" / "kubectl"
    kubectl.parent.mkdir()
    kubectl.write_text(KUBECTL.format(real=real, known=directory / "known", noted=noted))
    kubectl.chmod(0o755)
    environment = os.environ | {"PATH": f"{kubectl.parent}:{os.environ['PATH']}"}
    ran = subprocess.run(
        ["make", "deploy", f"OVERLAY={overlay}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return ran, noted.read_text().splitlines()


def test_overlay_is_applied_then_awaited_then_pruned(tmp_path: Path) -> None:
    """An autoscaler that KEDA would refuse goes first. What other overlays had goes last, and never a certificate."""
    ran, asked = deployed(tmp_path, "prod", *BUILT_IN, *OPERATORS)
    assert ran.returncode == 0, ran.stderr
    deleted, applied, *waited, pruned = asked
    assert deleted == "-n unlatch delete --ignore-not-found horizontalpodautoscaler unlatch-compute"
    assert applied.startswith("apply -f ")
    assert "--prune" not in applied
    assert [line.split(" --timeout")[0] for line in waited] == [
        f"-n unlatch rollout status deployment/unlatch-{name}" for name in ("compute", "gateway")
    ]
    assert "--prune --selector app.kubernetes.io/part-of=unlatch" in pruned
    allowed = [word for word in pruned.split() if word.count("/") == 2 and not word.startswith("/")]
    assert "core/v1/ConfigMap" in allowed
    assert "autoscaling/v2/HorizontalPodAutoscaler" in allowed
    assert not [kind for kind in allowed if "cert" in kind.lower() or "Secret" in kind or "Namespace" in kind]


def test_without_operators_dev_is_applied(tmp_path: Path) -> None:
    """Kinds that the cluster does not know are not pruned either: kubectl would fail."""
    ran, asked = deployed(tmp_path, "dev", *BUILT_IN)
    assert ran.returncode == 0, ran.stderr
    assert not any("delete" in line or "keda" in line or "monitoring" in line for line in asked)


@pytest.mark.parametrize("missing", OPERATORS)
def test_cluster_that_lacks_a_kind_gets_nothing(tmp_path: Path, missing: str) -> None:
    """The message names what is missing."""
    ran, asked = deployed(tmp_path, "prod", *BUILT_IN, *(version for version in OPERATORS if version != missing))
    assert "Error 1\n" in ran.stderr
    assert asked == []
    assert f"nothing was applied: this cluster does not know {missing}" in ran.stderr


def test_every_object_can_be_pruned_by_its_label() -> None:
    """Without the label, an object of an overlay would stay when another overlay takes its place."""
    for overlay in ("dev", "prod"):
        rendered = subprocess.run(
            ["kubectl", "kustomize", K8S / "overlays" / overlay], capture_output=True, text=True, check=True
        ).stdout
        objects = rendered.split("\n---\n")
        assert all("    app.kubernetes.io/part-of: unlatch\n" in text for text in objects)

"""Operators apply the manifests again, empty a node, and look into a pod: what the manifests and pages need for it."""

import re
from collections.abc import Iterator

import pytest

from tests.deploy.manifests import K8S, OVERLAYS, SERVICES, Manifests, in_words, named, overlay, problems
from tests.support.mesh import ROOT

# The first test waits until all combinations are rendered.
pytestmark = pytest.mark.timeout(180)
# Where the pages for operators are.
PAGES = [K8S / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_defaults_of_the_server_are_written() -> None:
    """`kubectl apply` of the same objects says "unchanged", since the server fills in nothing that it compares."""

    def look(manifests: Manifests) -> Iterator[str]:
        for found in manifests.of("Deployment", "Service", "NetworkPolicy"):
            for ports in in_words(found, "ports"):
                yield from (f"{named(found)}: port {port} has no protocol" for port in ports if "protocol" not in port)
            strategy = found["spec"].get("strategy", {})
            if "rollingUpdate" in strategy and "type" not in strategy:
                yield f"{named(found)}: the strategy has no type"

    assert problems(look) == {}


@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize("name", OVERLAYS)
def test_autoscaler_may_empty_a_node(name: str, service: str) -> None:
    """The annotation names every volume of a pod that lies on the node, so the cluster autoscaler may move the pod."""
    manifests = overlay(name)
    template = manifests.one("Deployment", f"unlatch-{service}")["spec"]["template"]
    local = {volume["name"] for volume in manifests.pod(service)["volumes"] if "emptyDir" in volume}
    movable = template["metadata"]["annotations"]["cluster-autoscaler.kubernetes.io/safe-to-evict-local-volumes"]
    assert local == set(movable.split(","))


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        (r"kubectl [^`\n]*\bdrain [^`\n]*", "--delete-emptydir-data"),
        (r"kubectl [^`\n]*\b(?:debug|run) [^`\n]*", "--profile=restricted"),
    ],
)
def test_commands_of_the_pages_are_admitted(command: str, flag: str) -> None:
    """Pods have an empty directory, and the namespace admits restricted pods only, so these commands need a flag."""
    commands = [line for page in PAGES for line in re.findall(command, page.read_text())]
    assert commands
    assert [line for line in commands if flag not in line] == []

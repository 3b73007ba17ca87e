"""deploy/k8s as kubectl renders it, and questions that tests ask about it."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

import pytest
import yaml

from tests.support.mesh import ROOT
from unlatch.common.net.settings import Settings, parse
from unlatch.compute.settings import ComputeSettings
from unlatch.gateway.settings import GatewaySettings

Object = dict[str, Any]
S = TypeVar("S", bound=Settings)

KUBECTL = str(Path(sys.executable).parent / "kubectl")
K8S = ROOT / "deploy" / "k8s"
SERVICES: Mapping[str, type[Settings]] = {"gateway": GatewaySettings, "compute": ComputeSettings}
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
COMPONENTS = sorted(path.name for path in (K8S / "components").iterdir())
# Components that add to objects of others.
ADDS_TO = {"ingress-mtls": {"ingress", "mtls"}}


@dataclass(frozen=True)
class Manifests:
    """A rendering, and its name in the messages of tests."""

    name: str
    objects: tuple[Object, ...]

    def of(self, *kinds: str) -> list[Object]:
        return [found for found in self.objects if found["kind"] in kinds]

    def one(self, kind: str, name: str) -> Object:
        (found,) = (found for found in self.of(kind) if found["metadata"]["name"] == name)
        return found

    def pod(self, service: str) -> Object:
        """Return the spec of a service's pods."""
        spec: Object = self.one("Deployment", f"unlatch-{service}")["spec"]["template"]["spec"]
        return spec

    def container(self, service: str) -> Object:
        """Return the one container of a service's pods."""
        (container,) = self.pod(service)["containers"]
        return dict(container)

    def environment(self, service: str) -> dict[str, str]:
        """Return the variables that Kubernetes gives to the container."""
        container = self.container(service)
        found: dict[str, str] = {}
        for source in container.get("envFrom", []):
            found |= self.one("ConfigMap", source["configMapRef"]["name"])["data"]
        return found | {given["name"]: given["value"] for given in container.get("env", [])}

    def settings(self, service: str, kind: type[S]) -> S:
        """Return the settings as the service itself reads them. Raises SystemExit where the service would not start."""
        with pytest.MonkeyPatch.context() as patch:
            for name in [name for name in os.environ if name.startswith("UNLATCH_")]:
                patch.delenv(name)
            for name, value in self.environment(service).items():
                patch.setenv(name, value)
            return parse(kind, service, self.container(service).get("args", []), self.environment(service))


def named(found: Object) -> str:
    """Return an object's name for messages."""
    return f"{found['kind']}/{found['metadata']['name']}"


def render(directory: Path) -> tuple[Object, ...]:
    """Return the objects of a directory that has a kustomization."""
    ran = subprocess.run([KUBECTL, "kustomize", directory], capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    assert not ran.stderr, f"kustomize warns: {ran.stderr}"
    # The loader of libyaml, not Python's own: boards are long, and are rendered in every other combination.
    return tuple(yaml.load_all(ran.stdout, Loader=yaml.CSafeLoader))


@cache
def overlay(name: str) -> Manifests:
    """Render an overlay unchanged."""
    return Manifests(name, render(K8S / "overlays" / name))


@cache
def composed(beneath: str, *components: str) -> Manifests:
    """Render `base` or an overlay with components added, as a user's own kustomization does."""
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory).resolve()
        kustomization = {
            "resources": [os.path.relpath(K8S / beneath, place)],
            "components": [os.path.relpath(K8S / "components" / name, place) for name in components],
        }
        (place / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        return Manifests("+".join([beneath, *components]), render(place))


@cache
def every_combination() -> tuple[Manifests, ...]:
    """Return the overlays, and every allowed set of components added to the overlay that has none."""
    return (*map(overlay, OVERLAYS), composed("base"), *(composed("overlays/dev", *chosen) for chosen in _sets()))


def _sets() -> Iterator[tuple[str, ...]]:
    for size in range(1, len(COMPONENTS) + 1):
        for chosen in combinations(COMPONENTS, size):
            if all(ADDS_TO.get(name, set()) <= set(chosen) for name in chosen):
                yield chosen


def problems(look: Callable[[Manifests], Iterator[str]]) -> dict[str, list[str]]:
    """Apply a check to every combination; return each problem with the combinations that have it."""
    found: dict[str, list[str]] = {}
    for manifests in every_combination():
        for problem in look(manifests):
            found.setdefault(problem, []).append(manifests.name)
    return found


def in_words(of: Any, word: str) -> Iterator[Any]:
    """Return every value under a key, at any depth."""
    if isinstance(of, Mapping):
        for name, value in of.items():
            yield from [value] if name == word else in_words(value, word)
    elif isinstance(of, list | tuple):
        for value in of:
            yield from in_words(value, word)


BYTES = {"Mi": 1024**2, "Gi": 1024**3}


def in_bytes(quantity: str) -> int:
    """Read an amount of memory as Kubernetes writes it."""
    return int(quantity[:-2]) * BYTES[quantity[-2:]]


def in_cores(quantity: str) -> float:
    """Read an amount of processor time as Kubernetes writes it."""
    return int(quantity[:-1]) / 1000 if quantity.endswith("m") else float(quantity)

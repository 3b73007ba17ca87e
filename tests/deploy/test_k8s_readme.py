"""A newcomer's walk through deploy/k8s/README.md, word by word, as far as it goes without a cluster.

```bash, ```python, ```yaml    run, or saved under the name in the first line, as they are
```console                     what needs a cluster. `kubectl apply -k` renders, and the result stands for the cluster:
                               names, ports and labels in later commands must be in it. `unlatch` runs unchanged,
                               against processes with the variables of those pods (pods.py)
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import pytest
import yaml
from jsonschema import validate

from tests.deploy.cert_manager import CertManager, Secret
from tests.deploy.manifests import K8S, SERVICES, Manifests, in_words, render
from tests.deploy.pods import Mounts, Pods, running
from tests.deploy.test_custom_resources import CERTIFICATE
from tests.support.mesh import ROOT

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"# ([\w/.-]+\.\w+)\n")
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


@pytest.mark.timeout(180)
def test_readme_leads_to_answers(tmp_path: Path) -> None:
    """Every block works. A laptop's mesh, one with own kernels and one with certificates answer calls."""
    (tmp_path / "deploy").symlink_to(ROOT / "deploy")
    with Walk(tmp_path) as walk:
        for language, code in BLOCK.findall((K8S / "README.md").read_text()):
            walk.block(language, code)
    assert walk.answered == 4


class Walk:
    """The state of a reader who follows the page from its first line."""

    def __init__(self, directory: Path) -> None:
        self.answered = 0
        self._directory = directory
        self._stack = ExitStack()
        self._manifests: Manifests | None = None
        self._issuer: CertManager | None = None
        self._pods: Pods | None = None
        self._certificates: dict[str, dict[str, Any]] = {}
        self._secrets: dict[str, Secret] = {}
        self._commands: dict[str, Callable[..., None]] = {
            r"make image": lambda: None,
            r"kind create cluster --name unlatch": lambda: None,
            r"kind load docker-image --name unlatch (.+)": self._load,
            r"kubectl apply -k (\S+)": self._apply,
            r"make deploy OVERLAY=(\S+)": lambda name: self._apply(f"deploy/k8s/overlays/{name}"),
            r"kubectl apply -f (\S+)": self._certificate,
            r"kubectl -n unlatch rollout status deployment/(\S+) --timeout \w+": self._rolls_out,
            r"kubectl -n unlatch port-forward service/(\S+) (\d+)": self._forwards,
            r"kubectl -n unlatch wait --for condition=Ready certificate/(\S+)": self._is_issued,
            r"kubectl -n unlatch get secret (\S+) -o go-template='\{\{index \.data \"(\S+)\"\}\}'"
            r" \| base64 -d > (\S+)": self._file,
            r"kubectl label namespace \S+ (\S+)=(\S+)": self._labels,
            r"unlatch (.+)": self._unlatch,
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def block(self, language: str, code: str) -> None:
        """Follow a block."""
        if language == "console":
            for line in code.splitlines():
                self._command(line)
        elif language == "bash":
            self._run(["bash", "-euo", "pipefail", "-c", code])
        else:
            named = NAMED.match(code)
            assert named is not None, code
            path = self._directory / named[1]
            path.parent.mkdir(exist_ok=True)
            path.write_text(code)

    def _command(self, line: str) -> None:
        for pattern, does in self._commands.items():
            if found := re.fullmatch(pattern, line):
                does(*found.groups())
                return
        pytest.fail(f"nobody here knows what it does: {line}")

    def _run(self, command: list[str]) -> None:
        ran = subprocess.run(
            command,
            cwd=self._directory,
            env=os.environ | {"PATH": PATH},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert ran.returncode == 0, f"{command}: {ran.stdout[-2000:]}{ran.stderr[-2000:]}"

    def _there(self) -> Manifests:
        assert self._manifests is not None, "nothing has been applied yet"
        return self._manifests

    def _apply(self, directory: str) -> None:
        self._stack.close()
        self._pods = None
        self._manifests = Manifests(directory, render(self._directory / directory))
        self._issuer = CertManager(self._manifests)

    def _load(self, images: str) -> None:
        rendered = Manifests("dev", render(self._directory / "deploy/k8s/overlays/dev"))
        assert images.split() == [rendered.container(service)["image"] for service in SERVICES]

    def _rolls_out(self, name: str) -> None:
        assert self._there().one("Deployment", name)

    def _forwards(self, name: str, port: str) -> None:
        (there,) = self._there().one("Service", name)["spec"]["ports"]
        assert there["port"] == int(port)

    def _labels(self, name: str, value: str) -> None:
        policies = self._there().of("NetworkPolicy") or render(self._directory / "deploy/k8s/overlays/prod")
        assert {name: value} in list(in_words(policies, "matchLabels"))

    def _certificate(self, file: str) -> None:
        found = yaml.safe_load((self._directory / file).read_text())
        validate(found["spec"], CERTIFICATE)
        assert found["metadata"]["namespace"] == "unlatch"
        self._certificates[found["metadata"]["name"]] = found["spec"]

    def _is_issued(self, name: str) -> None:
        assert self._issuer is not None
        spec = self._certificates[name]
        self._secrets[spec["secretName"]] = self._issuer.issued(spec)

    def _file(self, secret: str, key: str, file: str) -> None:
        (self._directory / file).write_bytes(self._secrets[secret][key])

    def _unlatch(self, arguments: str) -> None:
        self._run(["unlatch", *shlex.split(arguments), "--server", self._running().address])
        self.answered += 1

    def _running(self) -> Pods:
        if self._pods is None:
            assert self._issuer is not None
            root = self._directory / "pods" / self._there().name.replace("/", "-")
            Mounts(self._there(), root, self._issuer)
            self._pods = self._stack.enter_context(running(self._there(), root))
        return self._pods

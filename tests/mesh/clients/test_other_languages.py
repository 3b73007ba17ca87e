"""The code of docs/clients.md runs as it is written: each language's section, against a mesh, where its tools exist.

A ```bash block is run by bash. A ```text block is the output of the block before it, blanks aside. A ```go or ```java
block is saved under the name in its first line.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.mesh import ROOT, Mesh

SECTION = re.compile(r"^## (.+?)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```(bash|text|go|java)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DEBIANS_GO, DEBIANS_JARS = Path("/usr/share/gocode"), Path("/usr/share/java")
# npm's words for a registry that it cannot reach.
UNREACHABLE = re.compile(r"ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|ENETUNREACH|ETIMEDOUT")

SECTIONS = dict(SECTION.findall((ROOT / "docs" / "clients.md").read_text()))
COMMANDS = {
    "grpcurl": ["grpcurl", "python3", "base64", "od"],
    "Node": ["node", "npm"],
    "Go": ["go", "protoc", "protoc-gen-go", "protoc-gen-go-grpc"],
    "Java": ["java", "javac", "protoc", "grpc_java_plugin"],
}
LIBRARIES = {
    "Go": [DEBIANS_GO / "src/google.golang.org" / name for name in ("grpc", "genproto", "protobuf")],
    "Java": [DEBIANS_JARS / f"{name}.jar" for name in ("grpc-netty", "netty-codec-http2", "perfmark-api")],
}


@pytest.mark.timeout(300)  # Go compiles gRPC the first time
@pytest.mark.parametrize("language", COMMANDS)
def test_section_runs_as_written(language: str, mesh: Mesh, tmp_path: Path) -> None:
    """The client prints what the section says."""
    _skip_without(language)
    # Go finds the package here that the section generates, without any module from a registry.
    directory = tmp_path / "src" / "example.org" / "caller"
    installed = shutil.ignore_patterns("node_modules")
    shutil.copytree(ROOT / "examples" / "clients", directory / "examples" / "clients", ignore=installed)
    (directory / "protos").symlink_to(ROOT / "protos")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "UNLATCH"))},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "GO111MODULE": "off",
        "GOPATH": f"{tmp_path}:{DEBIANS_GO}",
        "JARS": str(DEBIANS_JARS),
        "npm_config_fetch_retry_mintimeout": "1000",  # milliseconds: a registry that is not there is soon found out
        "npm_config_fetch_retry_maxtimeout": "2000",
    }
    printed = ""
    for kind, written in BLOCK.findall(SECTIONS[language]):
        code = written.replace("127.0.0.1:8001", mesh.gateway).replace("127.0.0.1:8003", mesh.gateway_health)
        if kind == "bash":
            printed = _run(code, directory, environment)
        elif kind == "text":
            assert printed.split()[-len(code.split()) :] == code.split()
        else:
            (directory / code.partition("\n")[0].removeprefix("// ")).write_text(code)
    assert printed


def test_every_section_that_has_code_is_run() -> None:
    """Each section with code is run here, except k6's, which has its own test."""
    assert {name for name, text in SECTIONS.items() if "```bash" in text} == {*COMMANDS, "k6"}


def _run(code: str, directory: Path, environment: dict[str, str]) -> str:
    """Run a block; return its output. Skips where npm cannot reach its registry, and fails with the block's output."""
    ran = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code],
        cwd=directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    if ran.returncode and "npm" in code and UNREACHABLE.search(ran.stderr):
        pytest.skip(f"npm cannot reach its registry: {UNREACHABLE.findall(ran.stderr)[0]}")
    assert ran.returncode == 0, f"{code}\n{ran.stdout}\n{ran.stderr}"
    return ran.stdout


def _skip_without(language: str) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    missing = [command for command in COMMANDS[language] if shutil.which(command, path=path) is None]
    missing += [str(library) for library in LIBRARIES.get(language, ()) if not library.exists()]
    if missing:
        pytest.skip(f"not on this machine: {', '.join(missing)}")

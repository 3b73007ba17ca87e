"""The docs list what exists: settings, metrics, built-in kernels, modules."""

import re
from pathlib import Path
from urllib.request import urlopen

import pytest

from tests.support.mesh import ROOT, Mesh
from unlatch.common.net.settings import Settings
from unlatch.compute.settings import ComputeSettings
from unlatch.compute.worker.catalogue import load
from unlatch.gateway.settings import GatewaySettings
from unlatch.unit.settings import ServeSettings

SETTINGS = (ROOT / "docs" / "operations" / "settings.md").read_text()
METRICS = (ROOT / "docs" / "operations" / "metrics.md").read_text()
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
KERNELS = (ROOT / "docs" / "kernels.md").read_text()
MiB = 1024 * 1024
ONE = "(?:gateway|dispatcher)"  # process that exports a metric


def settings_table(kind: type[Settings]) -> str:
    """Return a service's settings as docs/operations/settings.md lists them."""
    rows = ["| flag | default | meaning |", "|---|---|---|"]
    for name, field in kind.model_fields.items():
        default = "the host's name" if field.default_factory else field.default
        if isinstance(default, tuple):
            default = ",".join(default)
        if isinstance(default, int) and default >= MiB:
            default = f"{default} ({default // MiB} MiB)"
        rows.append(f"| `--{name.replace('_', '-')}` | {default} | {field.description} |")
    return "\n".join(rows)


@pytest.mark.parametrize("kind", [ServeSettings, GatewaySettings, ComputeSettings])
def test_every_setting_is_listed_with_its_default(kind: type[Settings]) -> None:
    """The tables are those that the settings classes give."""
    assert settings_table(kind) in SETTINGS


def test_every_metric_is_listed(mesh: Mesh) -> None:
    """The table has everything that gateway and dispatcher export, with its labels, and nothing else."""
    exported: dict[str, set[str]] = {}
    for address in (mesh.gateway_metrics, mesh.dispatcher_metrics):
        with urlopen(f"http://{address}/metrics") as scraped:
            for name in re.findall(r"^# TYPE (\S+) ", scraped.read().decode(), re.MULTILINE):
                exported.setdefault(name, set()).add("gateway" if address == mesh.gateway_metrics else "dispatcher")
    listed = {
        name: set(where.split(", "))
        for name, where in re.findall(rf"^\| `(\w+)(?:{{[\w,]*}})?` \| ({ONE}(?:, {ONE})?) \|", METRICS, re.MULTILINE)
    }
    assert listed == exported


def test_every_built_in_kernel_is_listed() -> None:
    """The table in docs/kernels.md has each kernel by name, with its first sentence's arguments."""
    listed = re.findall(r"^\| `(\w+)\(", KERNELS, re.MULTILINE)
    assert sorted(listed) == sorted(load(()).specs)


def test_every_module_has_its_place_in_the_architecture() -> None:
    """Each module, or its folder, is named in docs/architecture.md, and each name there exists."""
    rooms = [path for name in ("gateway", "compute", "common", "unlatch") for path in (ROOT / name).rglob("*.py")]
    folders = {ROOT / name for name in re.findall(r"`(\w+/[\w/]+)/`", ARCHITECTURE)}
    named = set(re.findall(r"`([\w/]+\.py)`", ARCHITECTURE))
    assert {folder for folder in folders if not folder.is_dir()} == set()
    assert {name for name in named if not any(str(path).endswith(f"/{name}") for path in rooms)} == set()
    alone = {path.name for path in rooms if not {*path.parents} & folders and not path.name.startswith("__")}
    assert alone - {Path(name).name for name in named} == set()


def test_every_make_target_is_phony() -> None:
    """A target that has the name of a directory, such as `deploy`, does nothing unless it is phony."""
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony is not None
    assert sorted(phony[1].split()) == sorted(re.findall(r"^([\w-]+):.* ## ", makefile, re.MULTILINE))

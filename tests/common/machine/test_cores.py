"""Granted cores: the smallest of affinity and all quotas up to the cgroup's root, for cgroups version 1 and 2."""

import os
from pathlib import Path

import pytest

from unlatch.common.machine.cgroups import granted_cores


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def own(directory: Path, *lines: str) -> Path:
    path = directory / "own"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of eight cores, so that quotas can be less."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "1000 100000\n"}, 1),
        ({"cpu.max": "1600000 100000\n"}, 8),
        ({"pods/one/cpu.max": "300000 100000\n"}, 3),
        ({"pods/cpu.max": "400000 100000\n", "pods/one/cpu.max": "max 100000\n"}, 4),
        ({"pods/cpu.max": "200000 100000\n", "pods/one/cpu.max": "300000 100000\n"}, 2),
        ({"pods/two/cpu.max": "100000 100000\n"}, 8),
        ({"cpu.max": "200000\n"}, 8),
        ({"cpu.max": "\n"}, 8),
    ],
)
def test_version_2(files: dict[str, str], cores: int, tmp_path: Path) -> None:
    """`cpu.max` counts for the cgroup itself and for all above it. A part of a core counts as a whole one."""
    assert granted_cores(tree(tmp_path / "cgroup", files), own(tmp_path, "0::/pods/one")) == cores


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/pods/cpu.cfs_quota_us": "100000\n", "cpu/pods/cpu.cfs_period_us": "50000\n"}, 2),
        ({"cpu,cpuacct/pods/cpu.cfs_quota_us": "100000\n", "cpu,cpuacct/pods/cpu.cfs_period_us": "100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "250000\n"}, 8),
    ],
)
def test_version_1(files: dict[str, str], cores: int, tmp_path: Path) -> None:
    """`cpu.cfs_quota_us` is divided by `cpu.cfs_period_us`, under either name of the controller's mount."""
    lines = ("12:memory:/elsewhere", "4:cpu,cpuacct:/pods/one", "1:name=systemd:/pods")
    assert granted_cores(tree(tmp_path / "cgroup", files), own(tmp_path, *lines)) == cores


def test_path_outside_of_the_mount(tmp_path: Path) -> None:
    """A container without its own cgroup namespace sees the host's path; the limits at the mount's root still count."""
    root = tree(tmp_path / "cgroup", {"cpu.max": "200000 100000\n"})
    assert granted_cores(root, own(tmp_path, "0::/../../kubepods/pod7/abc")) == 2


def test_nothing_to_read(tmp_path: Path) -> None:
    """Without cgroups, affinity alone decides."""
    assert granted_cores(tmp_path / "none", tmp_path / "none either") == 8


def test_this_machine() -> None:
    """This machine grants at least one core, and at most all of them."""
    assert 1 <= granted_cores() <= 8

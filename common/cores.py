"""How many cores this process may use: what the cgroup grants, not what the machine has.

Sources: Linux's cgroup-v2.rst (`cpu.max`) and sched-bwc.rst (`cpu.cfs_quota_us`, v1). A quota may be set at any level
of the hierarchy, so every one up to the root is read.
"""

import math
import os
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def granted_cores(root: Path = _ROOT, own: Path = _OWN) -> int:
    """Whole cores, at least 1: the least of affinity and every quota. A part of a core counts as one."""
    quotas = [quota for quota in (*_quotas_v2(root, own), *_quotas_v1(root, own)) if quota > 0]
    return max(1, min(len(os.sched_getaffinity(0)), *(math.ceil(quota) for quota in quotas), 1 << 16))


def _quotas_v2(root: Path, own: Path) -> list[float]:
    found = []
    for directory in _ancestry(root, _path_of(own, "")):
        quota, _, period = _read(directory / "cpu.max").partition(" ")
        if quota.isdecimal() and period.isdecimal():
            found.append(int(quota) / int(period))
    return found


def _quotas_v1(root: Path, own: Path) -> list[float]:
    found = []
    for controller in ("cpu", "cpu,cpuacct"):
        for directory in _ancestry(root / controller, _path_of(own, "cpu")):
            quota, period = _read(directory / "cpu.cfs_quota_us"), _read(directory / "cpu.cfs_period_us")
            if quota.isdecimal() and period.isdecimal():
                found.append(int(quota) / int(period))
    return found


def _path_of(own: Path, controller: str) -> str:
    """This process's cgroup under a controller; the empty one is v2's."""
    for line in _read(own).splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return path
    return "/"


def _ancestry(root: Path, path: str) -> list[Path]:
    """The directory of a cgroup and all above it. In a container the path may not exist; the root does."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    return [root.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)]


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""

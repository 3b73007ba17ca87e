"""The cores and the memory that this process's cgroups grant, version 1 and 2.

Sources: Linux's cgroup-v2.rst, and cgroup-v1/ for older systems. A limit may be set at any level of the hierarchy, so
every level up to the root is read.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")
# Version 1 cannot express "no limit": it reports the largest number of whole pages that fits in 63 bits.
_NO_LIMIT_BYTES = 1 << 62


def granted_cores(root: Path = _ROOT, own: Path = _OWN) -> int:
    """Whole cores, at least 1: the minimum of affinity and all quotas. A fraction of a core counts as one."""
    version_2 = (_said(level / "cpu.max").partition(" ")[::2] for level in _levels(root, own, ""))
    version_1 = (
        (_said(level / "cpu.cfs_quota_us"), _said(level / "cpu.cfs_period_us"))
        for level in _levels(root, own, "cpu", "cpu", "cpu,cpuacct")
    )
    quotas = [
        math.ceil(int(quota) / int(period))
        for quota, period in (*version_2, *version_1)
        if quota.isdecimal() and period.isdecimal() and int(quota)
    ]
    return max(1, min(len(os.sched_getaffinity(0)), *quotas, 1 << 16))


def granted_memory(root: Path = _ROOT, own: Path = _OWN) -> int:
    """The lowest memory limit, in bytes, of this process's cgroup and all above it; 0 if there is none.

    The machine's own memory does not count as a limit: it is not reserved for this process, and running out of it does
    not end a whole container.
    """
    limits = [
        *(_said(level / "memory.max") for level in _levels(root, own, "")),
        *(_said(level / "memory.limit_in_bytes") for level in _levels(root, own, "memory", "memory")),
    ]
    return min((int(limit) for limit in limits if limit.isdecimal() and int(limit) < _NO_LIMIT_BYTES), default=0)


def own_cgroup(root: Path = _ROOT, own: Path = _OWN) -> Path:
    """The directory of this process's cgroup, of version 2; the root where the system mounts no other."""
    unified = root / "unified"
    levels = _levels(unified if unified.is_dir() else root, own, "")
    return next((level for level in reversed([*levels]) if level.is_dir()), root)


def _levels(root: Path, own: Path, controller: str, *mounts: str) -> Iterator[Path]:
    """Directories of this process's cgroup under a controller, and of all cgroups above it, the root first.

    The empty controller is version 2's. Version 1 mounts each controller below the root, under one of `mounts`.
    """
    parts = [part for part in _path_of(own, controller).split("/") if part not in ("", "..")]
    for mount in mounts or ("",):
        # In a container the path may not exist, but the root does.
        yield from (root.joinpath(mount, *parts[:depth]) for depth in range(len(parts) + 1))


def _said(path: Path) -> str:
    """The content of a file; "" if it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _path_of(own: Path, controller: str) -> str:
    for line in _said(own).splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return path
    return "/"

"""The number of cores that this process may use: what its cgroup grants (`cpu.max`, `cpu.cfs_quota_us`)."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

from unlatch.common.machine import cgroups


def granted_cores(root: Path = cgroups.ROOT, own: Path = cgroups.OWN) -> int:
    """Whole cores, at least 1: the minimum of affinity and all quotas. A fraction of a core counts as one."""
    quotas = [quota for quota in (*_quotas_v2(root, own), *_quotas_v1(root, own)) if quota > 0]
    return max(1, min(len(os.sched_getaffinity(0)), *(math.ceil(quota) for quota in quotas), 1 << 16))


def _quotas_v2(root: Path, own: Path) -> Iterator[float]:
    for level in cgroups.levels(root, own, ""):
        quota, _, period = cgroups.said(level / "cpu.max").partition(" ")
        if quota.isdecimal() and period.isdecimal():
            yield int(quota) / int(period)


def _quotas_v1(root: Path, own: Path) -> Iterator[float]:
    for level in cgroups.levels(root, own, "cpu", "cpu", "cpu,cpuacct"):
        quota, period = cgroups.said(level / "cpu.cfs_quota_us"), cgroups.said(level / "cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal():
            yield int(quota) / int(period)

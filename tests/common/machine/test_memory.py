"""Granted memory: the smallest of all limits up to the cgroup's root, for cgroups version 1 and 2."""

from pathlib import Path

import pytest

from tests.common.machine.test_cores import own, tree
from unlatch.common.machine.cgroups import granted_memory

MiB = 1024 * 1024
NONE_IN_VERSION_1 = f"{2**63 - 4096}\n"


@pytest.mark.parametrize(
    ("files", "granted"),
    [
        ({}, 0),
        ({"memory.max": "max\n"}, 0),
        ({"memory.max": "\n"}, 0),
        ({"memory.max": f"{512 * MiB}\n"}, 512 * MiB),
        ({"pods/one/memory.max": f"{512 * MiB}\n"}, 512 * MiB),
        ({"pods/memory.max": f"{256 * MiB}\n", "pods/one/memory.max": f"{512 * MiB}\n"}, 256 * MiB),
        ({"pods/memory.max": f"{512 * MiB}\n", "pods/one/memory.max": "max\n"}, 512 * MiB),
        ({"pods/two/memory.max": f"{256 * MiB}\n"}, 0),
    ],
)
def test_version_2(files: dict[str, str], granted: int, tmp_path: Path) -> None:
    """`memory.max` counts for the cgroup itself and for all above it."""
    assert granted_memory(tree(tmp_path / "cgroup", files), own(tmp_path, "0::/pods/one")) == granted


@pytest.mark.parametrize(
    ("files", "granted"),
    [
        ({"memory/memory.limit_in_bytes": NONE_IN_VERSION_1}, 0),
        ({"memory/memory.limit_in_bytes": f"{512 * MiB}\n"}, 512 * MiB),
        (
            {
                "memory/memory.limit_in_bytes": NONE_IN_VERSION_1,
                "memory/pods/memory.limit_in_bytes": f"{512 * MiB}\n",
                "memory/pods/one/memory.limit_in_bytes": NONE_IN_VERSION_1,
            },
            512 * MiB,
        ),
        ({"memory/elsewhere/memory.limit_in_bytes": f"{512 * MiB}\n"}, 0),
    ],
)
def test_version_1(files: dict[str, str], granted: int, tmp_path: Path) -> None:
    """`memory.limit_in_bytes` says "no limit" with the largest number of whole pages."""
    lines = ("12:memory:/pods/one", "4:cpu,cpuacct:/elsewhere", "0::/")
    assert granted_memory(tree(tmp_path / "cgroup", files), own(tmp_path, *lines)) == granted


def test_both_versions(tmp_path: Path) -> None:
    """Where both versions are mounted, the smallest of all limits holds."""
    files = {"memory.max": f"{512 * MiB}\n", "memory/memory.limit_in_bytes": f"{256 * MiB}\n"}
    assert granted_memory(tree(tmp_path / "cgroup", files), own(tmp_path, "4:memory:/", "0::/")) == 256 * MiB


def test_nothing_to_read(tmp_path: Path) -> None:
    """Without cgroups no limit is known, and nothing is refused."""
    assert granted_memory(tmp_path / "none", tmp_path / "none either") == 0

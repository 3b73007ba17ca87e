"""Limits of this process's cgroups, version 1 and 2: the only code that reads a container's limits.

Sources: Linux's cgroup-v2.rst, and cgroup-v1/ for older systems. A limit may be set at any level of the hierarchy, so
every level up to the root is read.
"""

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def levels(root: Path, own: Path, controller: str, *mounts: str) -> Iterator[Path]:
    """Directories of this process's cgroup under a controller, and of all cgroups above it, the root first.

    The empty controller is version 2's. Version 1 mounts each controller below the root, under one of `mounts`.
    """
    parts = [part for part in _path_of(own, controller).split("/") if part not in ("", "..")]
    for mount in mounts or ("",):
        # In a container the path may not exist, but the root does.
        yield from (root.joinpath(mount, *parts[:depth]) for depth in range(len(parts) + 1))


def said(path: Path) -> str:
    """The content of a file; "" if it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _path_of(own: Path, controller: str) -> str:
    for line in said(own).splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return path
    return "/"

"""What the cgroups of this process say, version 1 and 2: the one way in which limits of a container are read.

Sources: Linux's cgroup-v2.rst, and cgroup-v1/ for what older systems have. A limit may be set at any level of the
hierarchy, so every one up to the root is read.
"""

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def levels(root: Path, own: Path, controller: str, *mounts: str) -> Iterator[Path]:
    """The directories of this process's cgroup under a controller and of all above it, the root first.

    The empty controller is version 2's. Version 1 mounts each controller below the root, under one of these names.
    """
    parts = [part for part in _path_of(own, controller).split("/") if part not in ("", "..")]
    for mount in mounts or ("",):
        # In a container the path may not exist; the root does.
        yield from (root.joinpath(mount, *parts[:depth]) for depth in range(len(parts) + 1))


def said(path: Path) -> str:
    """What a file says; nothing where there is none."""
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

"""File descriptors: how many a process may have, and how many it has."""

import os
import resource

# What Linux grants at most unless told otherwise (fs.nr_open).
_MAX_LIMIT = 1024 * 1024


def raise_limit() -> None:
    """Raise the soft limit of descriptors to the hard limit. The usual soft limit is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_LIMIT if hard == resource.RLIM_INFINITY else min(hard, _MAX_LIMIT)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def descriptor_limit() -> int:
    """The number of descriptors that this process may have."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MAX_LIMIT if soft == resource.RLIM_INFINITY else soft


def open_descriptors() -> int:
    """The number of descriptors that this process has."""
    # Without the one that lists them.
    return len(os.listdir("/proc/self/fd")) - 1  # noqa: PTH208 (a thousand paths would take longer)

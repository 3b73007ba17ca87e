"""The versions of Python and of the packages that a worker needs, as its interpreter finds them.

A forkserver sends them first of all. `worker/interpreter.py` also gives this file's text to interpreters without
Unlatch, and to old ones. So nothing is imported here but Python's own library.
"""

import json
import platform
import sys

# What the worker's side of Unlatch imports.
NEEDED = ("unlatch", "numpy", "msgspec", "jaxtyping", "threadpoolctl")


def found() -> "dict[str, str]":  # in quotes for an old Python, which says only that it is old
    """Return the version of each, and of `python` with its ABI flags ("3.13.5t"); "" for a package that is missing."""
    versions = {"python": platform.python_version() + sys.abiflags}
    for name in NEEDED:
        try:
            from importlib.metadata import version

            versions[name] = version(name)
        except ImportError:  # PackageNotFoundError is one, too
            versions[name] = ""
    return versions


if __name__ == "__main__":
    print(json.dumps(found()))  # noqa: T201 (its caller reads stdout)

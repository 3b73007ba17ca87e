"""A user's project whose packages are named as folders of this repository are, and kernels and a client that use them.

Every package has a module and in that a number: what a kernel answers tells which packages it has imported.
"""

from collections.abc import Collection
from pathlib import Path

FACTORS = {"common": 2, "protos": 3, "gateway": 5, "compute": 7, "utils": 11, "tests": 13}
# They have no __init__.py: a package of that name which has one wins over them, wherever it lies.
NAMESPACES = frozenset({"gateway", "tests", "utils"})
# Modules that ours of the same name have too.
_MODULES = {"common": "errors", "protos": "unlatch_pb2", "gateway": "server", "compute": "call", "tests": "support"}

_IMPORTS = "\n".join(f"from {name}.{_MODULES.get(name, name)} import FACTOR as {name.upper()}" for name in FACTORS)
_PRODUCT = " * ".join(name.upper() for name in FACTORS)

_KERNEL = f"""{_IMPORTS}
import numpy as np
from jaxtyping import Float64

from unlatch import kernel


@kernel
def {{name}}(x: Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
    \"\"\"`x` times the factors of all packages.\"\"\"
    return x * ({_PRODUCT})
"""

_CLIENT = f"""{_IMPORTS}
import sys

import numpy as np

from unlatch import BlockingClient

address, *kernels = sys.argv[1:]
x = np.arange(3.0)
with BlockingClient(address, timeout=20.0) as client:
    for kernel in kernels:
        np.testing.assert_array_equal(getattr(client, kernel)(x), x * ({_PRODUCT}))
        print(kernel)
"""


def write_packages(directory: Path, namespaces: Collection[str] = NAMESPACES) -> None:
    """Write the packages into a directory; those that are named `namespaces` without an __init__.py."""
    for name, factor in FACTORS.items():
        package = directory / name
        package.mkdir(parents=True)
        if name not in namespaces:
            (package / "__init__.py").touch()
        (package / f"{_MODULES.get(name, name)}.py").write_text(f"FACTOR = {factor}\n")


def write_project(directory: Path) -> None:
    """Write a client, the kernel `by_path` and, as the module `theirs.by_name`, the kernel `by_name`."""
    (directory / "theirs").mkdir(parents=True)
    (directory / "by_path.py").write_text(_KERNEL.format(name="by_path"))
    (directory / "theirs" / "by_name.py").write_text(_KERNEL.format(name="by_name"))
    (directory / "client.py").write_text(_CLIENT)

"""A user's project: its packages have the names of folders of this repository, and its kernels and client import them.

Each package has a module that holds a number. A kernel's result shows which packages the kernel has imported.
"""

from collections.abc import Collection
from pathlib import Path

FACTORS = {"common": 2, "protos": 3, "gateway": 5, "compute": 7, "utils": 11, "tests": 13}
# These packages have no __init__.py. A package of the same name that has one wins over them, wherever it lies.
NAMESPACES = frozenset({"gateway", "tests", "utils"})
# Names of modules that exist in our folder of the same name too.
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
    """Write the packages into a directory. Those in `namespaces` get no __init__.py."""
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

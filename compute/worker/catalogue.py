"""The kernels that a worker serves: Unlatch's own and the user's modules, found and loaded.

They are loaded once, in the forkserver, before any worker is forked, so that workers share the pages.
"""

import importlib
import importlib.util
import pkgutil
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from unlatch.common.kernel.spec import KernelSpec
from unlatch.declaration import DECLARED, DeclarationError, spec_of

BUILT_IN = "unlatch.compute.kernels"


class LoadError(Exception):
    """A kernel module that cannot be served. The message names file and line."""


class LoadedKernels:
    """Loaded kernels by name."""

    def __init__(self) -> None:
        self.functions: dict[str, Callable[..., Any]] = {}
        self.specs: dict[str, KernelSpec] = {}

    def add(self, module: ModuleType) -> None:
        """Add every kernel of a module. Raises LoadError for a name that another kernel has."""
        for function, spec in kernels_in(module):
            # A kernel that one module imports from another is the same object, and not a second kernel.
            known = self.functions.get(spec.name)
            if known is not None and known is not function:
                raise LoadError(f"{place(function)}: kernel {spec.name!r} is already defined at {place(known)}")
            self.functions[spec.name] = function
            self.specs[spec.name] = spec


def kernels_in(module: ModuleType) -> Iterator[tuple[Callable[..., Any], KernelSpec]]:
    """All kernels that a module declares (also those hidden by a later one) or imports. Some are yielded twice."""
    for candidate in (*vars(module).get(DECLARED, ()), *vars(module).values()):
        spec = spec_of(candidate)
        if spec is not None:
            yield candidate, spec


def place(function: Callable[..., Any]) -> str:
    """The place where a kernel is defined, as file:line."""
    return f"{function.__code__.co_filename}:{function.__code__.co_firstlineno}"


def load(modules: Iterable[str]) -> LoadedKernels:
    """Load Unlatch's own kernels, and those of `modules`: dotted names or paths to files.

    Raises LoadError, naming file and line, for a module that cannot be imported or defines a name twice.
    """
    catalogue = LoadedKernels()
    package = importlib.import_module(BUILT_IN)
    for found in pkgutil.iter_modules(package.__path__, f"{BUILT_IN}."):
        catalogue.add(importlib.import_module(found.name))
    for name in modules:
        catalogue.add(imported(name))
    return catalogue


def imported(name: str) -> ModuleType:
    """Import a module by dotted name or path to a file. Raises LoadError, naming file and line."""
    try:
        if name.endswith(".py"):
            return _import_file(Path(name))
        if "" not in sys.path:
            sys.path.insert(0, "")
        return importlib.import_module(name)
    except LoadError:
        raise
    except DeclarationError as error:
        raise LoadError(str(error)) from error
    except BaseException as error:  # a module may raise anything, even SystemExit
        raise LoadError(f"{_origin(name, error)}: {type(error).__name__}: {error}") from error


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise LoadError(f"{path}: no such kernel file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise LoadError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    # The file can import modules that lie beside it, as if it were run.
    sys.path.insert(0, str(path.parent.resolve()))
    spec.loader.exec_module(module)
    return module


def _origin(name: str, error: BaseException) -> str:
    """File and line of the module's own code that failed: the last frame outside the import system."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    frames = [frame for frame in frames if frame.filename != __file__]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else name

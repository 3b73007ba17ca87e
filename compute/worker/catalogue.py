"""The kernels that a worker serves: Unlatch's own and the user's modules, found and loaded.

They are loaded once, in the forkserver, before any worker is forked, so that workers share the pages.
"""

import importlib
import inspect
import os
import pkgutil
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from unlatch.common.kernel.spec import KernelSpec
from unlatch.declaration import DECLARED, DeclarationError, is_async, place_of, spec_of
from unlatch.hooks import SETUPS, TEARDOWNS, hooks_of

BUILT_IN = "unlatch.compute.kernels"


class LoadError(Exception):
    """A kernel module that cannot be served. The message names file and line."""


class LoadedKernels:
    """Loaded kernels by name."""

    def __init__(self) -> None:
        self.functions: dict[str, Callable[..., Any]] = {}
        self.specs: dict[str, KernelSpec] = {}

    def hooks(self, which: str, *, of_async: bool) -> list[Callable[[], Any]]:
        """Return the setups or teardowns for async workers, or for others: of the modules with kernels that they run.

        An `async def` hook is for async workers alone.
        """
        namespaces = {id(space): space for space in self._namespaces(of_async=of_async)}
        found = (hook for space in namespaces.values() for hook in hooks_of(space, which))
        return [hook for hook in found if of_async or not is_async(hook)]

    def _namespaces(self, *, of_async: bool) -> Iterator[dict[str, Any]]:
        for name, function in self.functions.items():
            if (self.specs[name].concurrency is not None) is of_async:
                yield inspect.unwrap(function).__globals__

    def add(self, module: ModuleType) -> None:
        """Add every kernel of a module. Raises LoadError for a name that another kernel has."""
        _refuse_hidden(module)
        _refuse_unrun_hooks(module)
        for function, spec in kernels_in(module):
            # A kernel that another module imports, or that a decorator above @kernel has wrapped, keeps its spec.
            if self.specs.setdefault(spec.name, spec) is not spec:
                known = place_of(self.functions[spec.name])
                raise LoadError(f"{place_of(function)}: kernel {spec.name!r} is already defined at {known}")
            self.functions[spec.name] = function


def kernels_in(module: ModuleType) -> Iterator[tuple[Callable[..., Any], KernelSpec]]:
    """All kernels that a module declares (also those hidden by a later one) or imports.

    Some are yielded twice: the second time as the module's other decorators have wrapped them.
    """
    for candidate in (*vars(module).get(DECLARED, ()), *vars(module).values()):
        spec = spec_of(candidate)
        if spec is not None:
            yield candidate, spec


def _refuse_hidden(module: ModuleType) -> None:
    """Refuse a decorator above @kernel that returns a function without the kernel's attributes."""
    for function in vars(module).get(DECLARED, ()):
        name = function.__qualname__
        shown = vars(module).get(name)
        if callable(shown) and spec_of(shown) is None:
            raise LoadError(
                f"{place_of(function)}: kernel {name}: another function has replaced it; if that is a decorator above "
                "@kernel, write @kernel above it, or use functools.wraps in it"
            )


def _refuse_unrun_hooks(module: ModuleType) -> None:
    """Refuse an `async def` hook in a module without an async kernel: no worker would run it."""
    declared = [spec_of(function) for function in vars(module).get(DECLARED, ())]
    if any(spec is not None and spec.concurrency is not None for spec in declared):
        return
    for hook in (*hooks_of(vars(module), SETUPS), *hooks_of(vars(module), TEARDOWNS)):
        if is_async(hook):
            raise LoadError(
                f"{place_of(hook)}: {hook.__name__}: an async hook runs in async workers, and this module declares no "
                "`async def` kernel"
            )


def load(modules: Iterable[str]) -> LoadedKernels:
    """Load Unlatch's own kernels, and those of `modules`: dotted names or paths to files.

    Raises LoadError for a module that cannot be imported, has no kernel, or defines a name twice.
    """
    catalogue = LoadedKernels()
    package = importlib.import_module(BUILT_IN)
    for found in pkgutil.iter_modules(package.__path__, f"{BUILT_IN}."):
        catalogue.add(importlib.import_module(found.name))
    for name in modules:
        module = imported(name)
        if not any(kernels_in(module)):
            raise LoadError(f"{name}: declares no kernel")
        catalogue.add(module)
    return catalogue


def imported(name: str) -> ModuleType:
    """Import a module by dotted name or path to a file. Raises LoadError, naming file and line."""
    try:
        # Python's own errors for an empty name or a relative one do not name the file.
        if name.endswith(".py") or os.sep in name or not name.partition(".")[0]:
            return _import_file(Path(name))
        _search_first("")
        return importlib.import_module(name)
    except LoadError:
        raise
    except DeclarationError as error:
        raise LoadError(str(error)) from error
    except BaseException as error:  # a module may raise anything, even SystemExit
        raise LoadError(described(name, error)) from error


def _import_file(path: Path) -> ModuleType:
    """Import a file under its module name, so that modules beside it and processes that it starts can import it too."""
    if path.suffix != ".py" or not path.is_file():
        raise LoadError(f"{path}: no such kernel file; wanted path/to/file.py or pkg.module")
    folder, name = path.parent.resolve(), path.stem
    while (folder / "__init__.py").is_file():
        folder, name = folder.parent, f"{folder.name}.{name}"
    _search_first(str(folder))
    module = importlib.import_module(name)
    found = getattr(module, "__file__", None)
    if found is None or not path.samefile(found):
        raise LoadError(f"{path}: rename the file, since Python has another module {name!r}: {found or 'a built-in'}")
    return module


def _search_first(folder: str) -> None:
    if sys.path[0] != folder:
        sys.path.insert(0, folder)


def is_installed(file: str) -> bool:
    """Whether a file belongs to Python or was installed by pip, so that no developer of kernels works on it."""
    paths = sysconfig.get_paths()
    folders = (os.path.realpath(paths[kind]) + os.sep for kind in ("stdlib", "platstdlib", "purelib", "platlib"))
    return os.path.realpath(file).startswith(tuple(folders))


def described(name: str, error: BaseException) -> str:
    """Describe an error after the line of the author's own code that led to it. A library's line comes last."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}: {text}"
    frames = _outside_imports(error)
    if not frames:
        where = f", neither installed nor in {Path.cwd()}" if isinstance(error, ModuleNotFoundError) else ""
        return f"{name}: {text}{where}"
    own = [frame for frame in frames if not is_installed(frame.filename)] or frames
    raised = "" if own[-1] is frames[-1] else f" (raised at {frames[-1].filename}:{frames[-1].lineno})"
    return f"{own[-1].filename}:{own[-1].lineno}: {text}{raised}"


def _outside_imports(error: BaseException) -> list[traceback.FrameSummary]:
    """Return the frames of an error that belong neither to Python's imports nor to this module."""
    frames = traceback.extract_tb(error.__traceback__)
    return [frame for frame in frames if "importlib" not in frame.filename and frame.filename != __file__]

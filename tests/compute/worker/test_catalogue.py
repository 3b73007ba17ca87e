"""Kernel modules that cannot be served stop the start, with file and line for their author."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from unlatch.compute.worker.catalogue import LoadError, load

HEAD = """import numpy as np
from jaxtyping import Float64
from unlatch import kernel
"""
FINE = """
@kernel
def fine(x: Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
    return x
"""
AGAIN = FINE.replace("return x", "return x + 1")


@pytest.fixture(autouse=True)
def imports_as_they_were() -> Iterator[None]:
    """Forget the modules that a test loads after it."""
    modules, path = set(sys.modules), list(sys.path)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if not name.startswith(("unlatch", "numpy", "scipy", "jaxtyping")):
            del sys.modules[name]


# A module's text, the line of its error, and what the message says besides file and line.
WRONG = {
    "syntax": ("def f(:\n", 1, "SyntaxError"),
    "import": ("\nimport no_such_module\n", 2, "ModuleNotFoundError: .*no_such_module"),
    "raises": ("\n\nraise RuntimeError('no GPU')\n", 3, "RuntimeError: no GPU"),
    "exits": ("import sys\nsys.exit('bye')\n", 2, "SystemExit: bye"),
    "deep": ("def f():\n    return 1 / 0\nf()\n", 2, "ZeroDivisionError"),
    # The line is the module's. The library's line comes last.
    "library": ("import numpy as np\nnp.load('no.npy')\n", 2, r"FileNotFoundError: .*no\.npy.*raised at .*numpy"),
    "twice": (HEAD + FINE + AGAIN, 9, "kernel 'fine' is already defined at .*:5"),
    "built-in": (HEAD + FINE.replace("fine", "fft"), 5, "kernel 'fft' is already defined at .*signals.py:"),
    "async hook": (
        HEAD + "from unlatch import setup\n@setup\nasync def connect(): ...\n" + FINE,
        5,
        "connect: an async hook runs in async workers, and this module declares no `async def` kernel",
    ),
    "no annotation": (HEAD + "\n@kernel\ndef f(x):\n    return x\n", 5, "'x' needs a jaxtyping annotation"),
    "no result": (HEAD + "\n@kernel\ndef f(x: Float64[np.ndarray, 'n']):\n    return x\n", 5, "the result needs"),
    "default": (
        HEAD + "\n@kernel\ndef f(x: Float64[np.ndarray, 'n'] = 1) -> Float64[np.ndarray, 'n']:\n    return x\n",
        5,
        "array 'x' has a default",
    ),
    "scalar": (
        HEAD + "\n@kernel\ndef f(*, x: list) -> Float64[np.ndarray, 'n']:\n    return x\n",
        5,
        "'x' must be a bool",
    ),
    "no time": (
        HEAD + FINE.replace("@kernel", "@kernel(timeout=0)"),
        5,
        "timeout=0 is not a number of seconds above 0",
    ),
    "endless time": (HEAD + FINE.replace("@kernel", "@kernel(timeout=1e999)"), 5, "timeout=inf is not a number"),
    "no memory": (HEAD + FINE.replace("@kernel", "@kernel(memory=0)"), 5, "memory=0 is not a whole number of bytes"),
    "part of a byte": (HEAD + FINE.replace("@kernel", "@kernel(memory=1e9)"), 5, "memory=1000000000.0 is not a whole"),
    "no batch": (HEAD + FINE.replace("@kernel", "@kernel(max_batch_size=0)"), 5, "max_batch_size=0 is not a whole"),
}

# What is no module, and the message.
NO_MODULE = {
    "acme.kernelz": r"acme\.kernelz: ModuleNotFoundError: No module named 'acme', neither installed nor in /",
    "a/directory": "a/directory: no such kernel file; wanted path/to/file.py or pkg.module",
    "a/file.txt": "a/file.txt: no such kernel file; wanted path/to/file.py or pkg.module",
    "missing.py": "missing.py: no such kernel file",
    "": r"\.: no such kernel file; wanted path/to/file.py or pkg.module",
    "..": r"\.\.: no such kernel file",
    ".kernels": r"\.kernels: no such kernel file",
    "json": "json: declares no kernel",
}

BATCH = """
@kernel(batch=True)
def f(x: Float64[np.ndarray, {0!r}], y: Float64[np.ndarray, {1!r}]) -> Float64[np.ndarray, {2!r}]:
    return x
"""
# First axes that a kernel of batches may not have: the dims of two inputs and the output, and the message's text.
NO_BATCH = {
    "a length": (("3 n", "3", "3"), "first axis has a name"),
    "anything": (("_ n", "_", "_"), "first axis has a name"),
    "any number": (("*rows", "*rows", "*rows"), "first axis has a name"),
    "several": (("...", "rows", "rows"), "first axis has a name"),
    "no axes": (("", "rows", "rows"), "first axis has a name"),
    "another": (("rows", "cols", "rows"), "'y' has 'cols'"),
    "none": (("rows", "", "rows"), "'y' has 'no axis'"),
    "not first": (("rows", "n rows", "rows"), "'y' has 'n rows'"),
    "twice": (("rows", "rows rows", "rows"), "'y' has 'rows rows'"),
    "no rows out": (("rows n", "rows", "n"), "'output0' has 'n'"),
    "a scalar out": (("rows n", "rows", ""), "'output0' has 'no axis'"),
    "more rows out": (("rows", "rows", "rows+1"), "'output0' has 'rows\\+1'"),
}


@pytest.mark.parametrize("name", NO_MODULE)
def test_name_of_no_kernel_module_is_refused(name: str) -> None:
    """The message says what was looked for, since there is no line to name."""
    with pytest.raises(LoadError, match=f"^{NO_MODULE[name]}"):
        load([name])


@pytest.mark.parametrize(("dims", "says"), NO_BATCH.values(), ids=NO_BATCH)
def test_kernel_whose_calls_cannot_run_as_one_is_refused(dims: tuple[str, ...], says: str, tmp_path: Path) -> None:
    """With `batch=True` every array has the rows first, under one name. Errors name file, line and the wrong array."""
    path = tmp_path / "wrong_kernels.py"
    path.write_text(HEAD + BATCH.format(*dims))
    with pytest.raises(LoadError, match=rf"^{re.escape(str(path))}:5: .*batch=True.*{says}"):
        load([str(path)])


def test_kernel_of_no_arrays_is_no_batch(tmp_path: Path) -> None:
    """A kernel without arrays has nothing to put side by side."""
    path = tmp_path / "wrong_kernels.py"
    path.write_text(HEAD + "\n@kernel(batch=True)\ndef f(*, n: int) -> Float64[np.ndarray, 'rows']:\n    return n\n")
    with pytest.raises(LoadError, match=r":5: .*needs arrays"):
        load([str(path)])


@pytest.mark.parametrize("name", ["priority", "timeout"])
def test_parameter_that_is_the_calls_own_is_refused(name: str, tmp_path: Path) -> None:
    """Such a parameter would never reach the kernel."""
    path = tmp_path / "wrong_kernels.py"
    path.write_text(HEAD + FINE.replace('"n"])', f'"n"], *, {name}: str = "")'))
    with pytest.raises(LoadError, match=rf":5: .*the parameter name '{name}' is reserved"):
        load([str(path)])


@pytest.mark.parametrize("size", ["0", "-1"])
def test_rows_of_a_run_are_one_at_least(size: str, tmp_path: Path) -> None:
    """`max_batch_size` is the number of rows that run as one."""
    path = tmp_path / "wrong_kernels.py"
    path.write_text(
        HEAD + BATCH.format("rows", "rows", "rows").replace("batch=True", f"batch=True, max_batch_size={size}")
    )
    with pytest.raises(LoadError, match=r":5: .*max_batch_size"):
        load([str(path)])


def test_kernels_of_a_file_are_served_beside_the_built_in(tmp_path: Path) -> None:
    """A file is found by path, with what it imports from beside it. A kernel imported from there counts once."""
    (tmp_path / "beside_it.py").write_text(HEAD + FINE)
    (tmp_path / "mine.py").write_text("from beside_it import fine\n")
    catalogue = load([str(tmp_path / "mine.py")])
    assert {"fine", "identity", "matmul"} <= catalogue.specs.keys()
    assert catalogue.functions.keys() == catalogue.specs.keys()


TIMED = """
from functools import wraps

def timed(function):
    {wraps}
    def wrapper(*arguments):
        return function(*arguments) * 3
    return wrapper

@timed
@kernel
def fine(x: Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
    return x
"""


def test_decorator_above_kernel_is_served(tmp_path: Path) -> None:
    """Callers get the function that has the kernel's name in its module, also if another module imports it."""
    (tmp_path / "inner.py").write_text(HEAD + TIMED.format(wraps="@wraps(function)"))
    (tmp_path / "outer.py").write_text("from inner import fine\n")
    for order in (("inner", "outer"), ("outer", "inner")):
        catalogue = load([str(tmp_path / f"{name}.py") for name in order])
        assert catalogue.functions["fine"](2.0) == 6.0


def test_decorator_above_kernel_that_hides_it_is_refused(tmp_path: Path) -> None:
    """Without functools.wraps nothing tells that it is the kernel, so it would be left out in silence."""
    path = tmp_path / "hidden.py"
    path.write_text(HEAD + TIMED.format(wraps=""))
    with pytest.raises(LoadError, match=rf"^{re.escape(str(path))}:13: kernel fine: .*use functools.wraps"):
        load([str(path)])


def test_method_may_have_the_name_of_a_kernel(tmp_path: Path) -> None:
    """Only a function that has replaced the kernel in its module hides it."""
    path = tmp_path / "methods.py"
    path.write_text(HEAD + "class A:\n  @staticmethod\n" + FINE.replace("\n", "\n  ") + "\ndef fine():\n  pass\n")
    assert "fine" in load([str(path)]).specs


def test_file_of_a_package_is_loaded_as_its_module(tmp_path: Path) -> None:
    """By path or by dotted name it is the same module, with its relative imports and its parents' own code."""
    for package in ("acme", "acme/models"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("LOADED = True\n")
    (tmp_path / "acme" / "tables.py").write_text("SCALE = 2.0\n")
    path = tmp_path / "acme" / "models" / "scaling.py"
    path.write_text(
        HEAD + "from ..tables import SCALE\nfrom . import LOADED\n" + FINE.replace("return x", "return x * SCALE")
    )
    function = load([str(path), "acme.models.scaling"]).functions["fine"]
    assert (function.__module__, function(2.0)) == ("acme.models.scaling", 4.0)


@pytest.mark.parametrize("name", ["json", "time"])
def test_file_with_the_name_of_another_module_is_refused(name: str, tmp_path: Path) -> None:
    """Such a file could not be imported by the processes of its kernels, or would hide a module of Python."""
    path = tmp_path / f"{name}.py"
    path.write_text(HEAD + FINE)
    with pytest.raises(LoadError, match=rf"^{re.escape(str(path))}: rename the file, .* another module '{name}'"):
        load([str(path)])


def test_files_with_the_same_name_are_refused(tmp_path: Path) -> None:
    """Both would be one module for the processes of their kernels."""
    paths = [tmp_path / folder / "mine.py" for folder in ("one", "two")]
    for path, name in zip(paths, ("first", "second"), strict=True):
        path.parent.mkdir()
        path.write_text(HEAD + FINE.replace("fine", name))
    with pytest.raises(LoadError, match=rf"^{re.escape(str(paths[1]))}: rename the file, .*{re.escape(str(paths[0]))}"):
        load(list(map(str, paths)))


@pytest.mark.parametrize(("text", "line", "says"), WRONG.values(), ids=WRONG)
def test_module_that_cannot_be_served_names_file_and_line(text: str, line: int, says: str, tmp_path: Path) -> None:
    """The message names the line that fails in the user's file."""
    path = tmp_path / "wrong_kernels.py"
    path.write_text(text)
    with pytest.raises(LoadError, match=rf"^{re.escape(str(path))}:{line}: .*{says}"):
        load([str(path)])


def test_same_name_in_two_files_names_both(tmp_path: Path) -> None:
    """The second definition is refused, and the message names the first."""
    one, two = tmp_path / "one_kernel.py", tmp_path / "two_kernels.py"
    one.write_text(HEAD + FINE)
    two.write_text(HEAD + "\n" + FINE)
    with pytest.raises(LoadError, match=rf"^{re.escape(str(two))}:6: .*'fine' .* {re.escape(str(one))}:5$"):
        load([str(one), str(two)])


@pytest.mark.parametrize("name", ["no/such/file.py", "no_such_module", "no_such_package.module"])
def test_module_that_is_not_there_is_named(name: str) -> None:
    """A missing module is named, by path or by dotted name."""
    with pytest.raises(LoadError, match=re.escape(name.partition(".module")[0])):
        load([name])

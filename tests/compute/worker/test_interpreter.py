"""Reports about an interpreter for workers: its lacks, and modules that have turned its lock on."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from unlatch.common.service.version import VERSION
from unlatch.compute.worker import versions
from unlatch.compute.worker.interpreter import ask, why_unfit
from unlatch.compute.worker.interpreter_lock import locked_by, modules_told_of

FIT = {
    "python": "3.13.5t",
    "unlatch": VERSION,
    "numpy": "2.3",
    "msgspec": "0.20",
    "jaxtyping": "0.3",
    "threadpoolctl": "3",
}


@pytest.mark.parametrize(
    ("differs", "says"),
    [
        ({}, ""),
        ({"python": "3.11.0"}, ""),
        ({"python": "3.10.13"}, "--worker-python p (Python 3.10.13): wanted Python 3.11 or newer"),
        (
            {"msgspec": ""},
            "--worker-python p (Python 3.13.5t): it lacks msgspec; install them there: p -m pip install msgspec",
        ),
        (
            {"unlatch": "0.0.9", "numpy": ""},
            (
                "--worker-python p (Python 3.13.5t): it lacks numpy; "
                f"it has Unlatch 0.0.9, and this service is Unlatch {VERSION}; "
                f"install them there: p -m pip install unlatch=={VERSION} numpy"
            ),
        ),
    ],
)
def test_what_an_interpreter_lacks_is_one_sentence(differs: dict[str, str], says: str) -> None:
    """A sentence names the interpreter, what is missing or differs, and the command that installs it."""
    assert why_unfit("p", FIT | differs) == says


async def test_own_interpreter_is_fit() -> None:
    """This one has all that workers need, asked as another one would be."""
    assert await ask(sys.executable) == ""


def test_versions_are_told_by_the_file_alone() -> None:
    """An interpreter without Unlatch runs the file's text."""
    text = Path(versions.__file__).read_text()
    told = subprocess.run([sys.executable, "-I", "-c", text], capture_output=True, text=True, check=True).stdout
    assert json.loads(told).keys() == FIT.keys()


def test_module_that_turns_the_lock_on_is_named() -> None:
    """Python names it in a warning only, which is shown as ever. The text is that of CPython 3.13."""
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with modules_told_of() as modules:
            warnings.warn(
                "The global interpreter lock (GIL) has been enabled to load module 'old._native', which has not "
                "declared that it can run safely without the GIL.",
                RuntimeWarning,
                stacklevel=1,
            )
            warnings.warn("something else", RuntimeWarning, stacklevel=1)
    assert modules == ["old._native"]
    assert len(shown) == 2


def test_nothing_is_told_of_a_python_that_has_the_lock() -> None:
    """Where the lock is always on, no import turns it on."""
    with locked_by() as modules:
        assert modules == []

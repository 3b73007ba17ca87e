"""`unlatch check` as its user runs it: each kind of fault is found, and clean kernels have no findings."""

import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import unlatch.compute.kernels
from tests.support.mesh import ROOT
from tests.support.watching import wait_until
from unlatch.check.command import parser
from unlatch.compute.worker.catalogue import kernels_in

HERE = ROOT / "tests" / "unlatch" / "check"
CLEAN, FAULTY = HERE / "clean_kernels.py", HERE / "faulty_kernels.py"
NOTES = {"refuses", "refuses-everything", "prints", "warns", "raises-unless-finite", "leaves-threads", "many-threads"}
HEAD = """import numpy as np
from jaxtyping import Float64
from unlatch import kernel
"""
FINE = """
@kernel
def fine(x: Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
    return x
"""


def check(*arguments: object, within: float = 50, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command. It must end by itself, and without a traceback of ours."""
    command = [sys.executable, "-m", "unlatch", "check", *map(str, arguments)]
    ran = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=within,
        check=False,
    )
    assert "Traceback" not in ran.stderr, ran.stderr
    return ran


def found(*arguments: object, within: float = 50) -> tuple[int, dict[str, Any]]:
    """Return the command's exit code and what it found."""
    ran = check(*arguments, "--json", within=within)
    assert ran.stdout, ran.stderr
    return ran.returncode, json.loads(ran.stdout)


def kinds(report: dict[str, Any]) -> dict[str, set[str]]:
    """Return the kinds of findings for each kernel."""
    every: dict[str, set[str]] = {kernel: set() for kernel in report["kernels"]}
    for finding in report["findings"]:
        every.setdefault(finding["kernel"], set()).add(finding["kind"])
    return every


@pytest.fixture(scope="module")
def faulty() -> dict[str, Any]:
    """The findings in the module of faults."""
    code, report = found(FAULTY, "--seconds", 2, "--most-mib", 0)
    assert code == 1
    return report


def test_finds_a_seeded_fault_of_each_kind_and_no_other(faulty: dict[str, Any]) -> None:
    """Each kernel of the module has exactly the fault that it is named after."""
    wanted = {kernel: {kernel.partition("__")[0].replace("_", "-")} for kernel in faulty["kernels"]}
    wanted["refuses_everything"].add("refuses")
    wanted["ends_its_worker__and_keeps_state"].add("keeps-state")
    wanted["keeps_state__generator"].add("draws-the-same")
    assert kinds(faulty) == wanted
    assert all(finding["is_fault"] == (finding["kind"] not in NOTES) for finding in faulty["findings"])


def test_faults_name_file_and_line(faulty: dict[str, Any]) -> None:
    """A finding names the line of the kernel's own code that did it, or else the kernel's definition."""
    lines = FAULTY.read_text().splitlines()
    for finding in faulty["findings"]:
        file, _, line = finding["place"].rpartition(":")
        assert file == str(FAULTY)
        text = lines[int(line) - 1]
        assert text.startswith("@kernel") or re.search("here it|svd", text), finding
    places = {finding["kernel"]: lines[int(finding["place"].rpartition(":")[2]) - 1] for finding in faulty["findings"]}
    assert "here it writes" in places["writes_to_input"]
    assert "here it raises" in places["raises__zero_length"]


def test_a_line_says_what_why_and_what_to_do_and_no_process_is_left() -> None:
    """The report has a line for each finding, the end of a traceback below it, and a count.

    Kernels that hung are killed.
    """
    mark = f"{os.getpid()}-checks"
    ran = check(FAULTY, "--seconds", 2, "--most-mib", 0, UNLATCH_CHECK_TEST=mark)
    assert ran.returncode == 1
    line = rf"^fault {re.escape(str(FAULTY))}:\d+: keeps_input: keeps an input .*the next call.*: keep a copy"
    assert re.search(line, ran.stdout, re.MULTILINE)
    assert re.search(r"^ +ValueError: zero-size array", ran.stdout, re.MULTILINE)
    assert re.search(r"^\d+ kernels, \d+ faults, \d+ notes$", ran.stdout, re.MULTILINE)
    wait_until(lambda: not who_has(mark), "nothing of it runs")


def who_has(mark: str) -> list[str]:
    """Return the processes that have this in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdecimal() and mark.encode() in (entry / "environ").read_bytes():
                found.append(entry.name)
    return found


def test_finds_nothing_in_clean_kernels() -> None:
    """Clean kernels have neither faults nor notes, and a row for each size of each kernel that has sizes."""
    code, report = found(CLEAN, "--set", "scalars_alone.count=3")
    assert report["findings"] == []
    assert code == 0
    growth = report["growth"]
    assert growth["scalars_alone"]["rows"] == []
    for kernel in ("normalise", "ranges", "several_dtypes", "anything", "brightest", "apart", "cubic", "waited"):
        sizes = [row["input_bytes"] for row in growth[kernel]["rows"]]
        assert sizes == sorted(set(sizes)), kernel
        assert len(sizes) == 6 or growth[kernel]["ended_by"], kernel
        assert sizes[-1] <= 8 * 2**20


@pytest.mark.timeout(120)
def test_finds_nothing_in_kernels_that_a_service_runs_well() -> None:
    """Processes, strings, libraries that refuse empty arrays, threads that add in any order, generators at import."""
    code, report = found(HERE / "served_kernels.py", "--most-mib", 0, "--seconds", 20, within=110)
    assert report["findings"] == []
    assert code == 0


COMPILED = """
import numba

@kernel
@numba.njit("float64[:](float64[:])")
def eager(x: Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
    return x * 2

@numba.njit(parallel=True)
def total(x):
    sum = 0.0
    for at in numba.prange(len(x)):
        sum += x[at]
    return sum

# From here on, OpenMP would not survive a fork.
TOTAL = total(np.ones(10))

@kernel(pure=True)
def parallel(x: Float64[np.ndarray, "n"]) -> Float64[np.ndarray, ""]:
    return np.array(total(x) * TOTAL / 10)
"""


@pytest.mark.timeout(120)
def test_compiled_kernels(tmp_path: Path) -> None:
    """Numba's threads work in workers. Types that exclude read-only arrays are a fault with its remedy."""
    path = tmp_path / "compiled_kernels.py"
    path.write_text(HEAD + COMPILED)
    _, report = found(path, "--most-mib", 0, "--seconds", 30, within=110)
    (fault,) = [finding for finding in report["findings"] if finding["is_fault"]]
    assert (fault["kernel"], fault["kind"]) == ("eager", "needs-writable-input")
    assert fault["what"] == "is compiled for writable arrays (x: float64[3])"
    assert "readonly=True" in fault["what_to_do"]
    assert not [finding for finding in report["findings"] if finding["kind"] == "many-threads"]


def test_names_the_generator_that_gives_each_worker_the_same_numbers(faulty: dict[str, Any]) -> None:
    """A variable is named; a generator that no variable holds is described by its class."""
    told = {finding["kernel"]: finding["what"] for finding in faulty["findings"] if finding["kind"] == "draws-the-same"}
    made = "draws from a generator that its module has made at import: "
    assert told == {
        "keeps_state__generator": f"{made}faulty_kernels.generator",
        "draws_the_same__generator": f"{made}faulty_kernels.generator",
        "draws_the_same__attribute": f"{made}a RandomState",
        "draws_the_same__python": f"{made}faulty_kernels.dice",
    }


def test_reason_for_no_larger_sizes_is_the_kernels_own_exception(tmp_path: Path) -> None:
    """There is no server whose log could have it."""
    path = tmp_path / "small_kernels.py"
    path.write_text(
        HEAD + FINE.replace("    return x", "    if len(x) > 30:\n        raise ValueError('too large')\n    return x")
    )
    _, report = found(path)
    assert report["growth"]["fine"]["ended_by"] == "ValueError: too large"


def test_measures_the_memory_of_temporaries() -> None:
    """NumPy's allocations count at their peak: a temporary that is gone by the end counts, and the input does not."""
    _, report = found(HERE / "memory_kernels.py")
    for name, multiple in (("no_temporary", 0.0), ("one_temporary", 1.0), ("three_at_once", 3.0)):
        last = report["growth"][name]["rows"][-1]
        assert last["memory_bytes"] / last["input_bytes"] == pytest.approx(multiple, abs=0.15), name


OWN = [f"unlatch.compute.kernels.{module.name}" for module in pkgutil.iter_modules(unlatch.compute.kernels.__path__)]
# Some modules hold what others share, and no kernel.
BUILT_IN = [name for name in OWN if any(kernels_in(importlib.import_module(name)))]


CHECKED = [*BUILT_IN, "examples/own_kernels.py"]


@pytest.fixture(scope="module")
def own() -> dict[str, Any]:
    """The findings in all of these modules, by one command: its start takes as long as the check of a module."""
    return found(*CHECKED, "--most-mib", 0.25, within=900)[1]


@pytest.mark.parametrize("module", CHECKED)
@pytest.mark.timeout(960)
def test_own_kernels_pass(module: str, own: dict[str, Any]) -> None:
    """Unlatch's own kernels and the examples' pass the same check."""
    imported = importlib.import_module(module.removesuffix(".py").replace("/", "."))
    kernels = {spec.name for _, spec in kernels_in(imported)}
    assert kernels
    assert kernels <= set(own["kernels"])
    faults = [finding for finding in own["findings"] if finding["is_fault"]]
    assert [fault for fault in faults if fault["kernel"] in {*kernels, "(module)"}] == []


def test_same_seed_same_findings(faulty: dict[str, Any]) -> None:
    """Inputs depend on the seed alone: two checks print the same text."""
    _, again = found(FAULTY, "--seconds", 2, "--most-mib", 0)
    assert again["findings"] == faulty["findings"]


def test_survives_whatever_a_kernel_does_to_its_worker() -> None:
    """Death at any moment, a closed channel and child processes are reported, and the rest is still measured."""
    mark = f"{os.getpid()}-rough"
    ran = check(HERE / "rough_kernels.py", "--seconds", 5, "--most-mib", 0.1, "--json", UNLATCH_CHECK_TEST=mark)
    report = json.loads(ran.stdout)
    found_kinds = kinds(report)
    assert found_kinds["dies_soon_after"] & {"ends-its-worker", "leaves-threads"}
    assert found_kinds["closes_every_file"] == {"ends-its-worker"}
    assert len(report["growth"]["leaves_children"]["rows"]) == 6
    wait_until(lambda: not who_has(mark), "nothing of it runs")


# A module's text, and the line and the text of its finding.
MODULES = {
    "syntax": ("def f(:\n", "does-not-load", 1, "SyntaxError"),
    "import": ("\nimport no_such_module\n", "does-not-load", 2, "no_such_module"),
    "duplicate": (HEAD + FINE + FINE, "does-not-load", 9, "kernel 'fine' is already defined at .*:5"),
    "built-in name": (HEAD + FINE.replace("fine", "fft"), "does-not-load", 5, "already defined at .*signals.py"),
    "signature": (
        HEAD + "\n@kernel\ndef f(x):\n    return x\n",
        "does-not-load",
        5,
        "'x' needs a jaxtyping annotation",
    ),
    "exits": ("import os\nos._exit(0)\n", "does-not-load", None, "the import ended the process"),
    "empty": ("x = 1\n", "no-kernel", None, "declares no kernel"),
    "threads": (
        HEAD
        + "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True, name='mine').start()\n"
        + FINE,
        "threads-at-import",
        None,
        "mine",
    ),
    "slow": (HEAD + "import time\ntime.sleep(1.1)\n" + FINE, "imports-slowly", None, r"takes [1-9]\.\d s"),
}


@pytest.mark.parametrize(("text", "kind", "line", "says"), MODULES.values(), ids=MODULES)
def test_finds_what_is_wrong_with_a_module(text: str, kind: str, line: int | None, says: str, tmp_path: Path) -> None:
    """The finding has what the import shows, with file and line where there is one.

    A second module is still checked.
    """
    path, beside = tmp_path / "wrong.py", tmp_path / "beside.py"
    path.write_text(text)
    beside.write_text(HEAD + FINE.replace("fine", "beside"))
    code, report = found(path, beside, "--most-mib", 0)
    (finding,) = (finding for finding in report["findings"] if finding["kernel"] == "(module)")
    assert finding["kind"] == kind
    assert re.search(says, finding["what"]), finding
    assert finding["place"].startswith(str(path))
    assert line is None or finding["place"] == f"{path}:{line}"
    assert code == (1 if finding["is_fault"] else 0)
    assert (kind == "does-not-load" and line is None) or "beside" in report["kernels"]


def test_scalars_are_given_by_name(tmp_path: Path) -> None:
    """A kernel that refuses guessed scalars is checked with the ones that its user gives."""
    kernel = FINE.replace('"n"])', '"n"], *, order: int)').replace("return x", "return [x][10 - order]")
    (tmp_path / "mine.py").write_text(HEAD + kernel)
    _, guessed = found(tmp_path / "mine.py", "--most-mib", 0)
    assert kinds(guessed)["fine"] == {"raises"}
    _, given = found(tmp_path / "mine.py", "--most-mib", 0, "--set", "fine.order=10")
    assert kinds(given)["fine"] == set()


def test_positive_numbers_are_tried_where_negative_ones_are_refused() -> None:
    """A price is never negative: its kernel is still checked, and its refusal of negative numbers is a note."""
    code, report = found("unlatch.compute.kernels.finance", "--most-mib", 0.01)
    assert code == 0
    assert {finding["kind"] for finding in report["findings"]} == {"refuses"}
    assert report["growth"]["monte_carlo_option"]["rows"]


WRONG_USAGE: dict[str, Sequence[object]] = {
    "nothing to check": (),
    "no such file": (HERE / "no_such_kernels.py",),
    "no such option": (CLEAN, "--no-such-option"),
    "no value": (CLEAN, "--set", "normalise.eps"),
    "no such kernel": (CLEAN, "--set", "normalize.eps=1"),
    "no such scalar": (CLEAN, "--set", "normalise.epsilon=1"),
    "no such number": (CLEAN, "--set", "normalise.eps=small"),
    "another float": (CLEAN, "--set", "normalise.eps=1e400"),
    "an empty name": ("",),
}


@pytest.mark.parametrize(
    ("flag", "values", "wanted"),
    [
        ("--seconds", ("nan", "0", "-1", "inf"), "a number of seconds from 0.001 to 1e+09"),
        ("--most-mib", ("nan", "-1", "inf"), "a number of MiB from 0 to 1.04858e+06"),
        ("--memory-mib", ("0", "-1", "1.5", "9" * 20), "a whole number of MiB from 1 to 1.04858e+06"),
        ("--seed", ("-1", "x", "9" * 30), "a whole number from 0 to 9.22337e+18"),
    ],
)
def test_flags_have_bounds(flag: str, values: Sequence[str], wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A number out of bounds is wrong usage. The run would report faults of the kernel, or fail by itself."""
    for value in values:
        with pytest.raises(SystemExit) as ended:
            parser().parse_args([f"{flag}={value}", "kernels.py"])
        assert ended.value.code == 2
        assert f"argument {flag}: wanted {wanted}, got '{value}'" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", WRONG_USAGE.values(), ids=WRONG_USAGE)
def test_wrong_usage_ends_with_2(arguments: Sequence[object]) -> None:
    """The command ends with 2 and a line that says what was wanted."""
    ran = check(*arguments)
    assert ran.returncode == 2
    assert "unlatch check: " in ran.stderr

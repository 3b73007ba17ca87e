"""`unlatch check`: options, the order of steps, the exit code."""

import argparse
import asyncio
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from unlatch.check.cases import Cases
from unlatch.check.findings import Finding
from unlatch.check.growth import Growth, measure
from unlatch.check.report import for_people, for_programs
from unlatch.check.rules import Examination
from unlatch.check.worker import CheckWorkers
from unlatch.common.errors import InvalidArgument, near
from unlatch.common.flags import bounded_number, seconds
from unlatch.common.kernel.spec import KernelSpec
from unlatch.common.net.settings import MiB, variable
from unlatch.compute.errors import StartError
from unlatch.compute.ipc.frames import Parameters
from unlatch.compute.worker.interpreter import ask
from unlatch.compute.worker.trial import Trial, TriedKernel, TriedModule, tried

_IMPORT_SECONDS = 60.0
_SLOW_IMPORT_SECONDS = 1.0
_MAX_MIB = 2**20

Scalars = dict[str, Parameters]


def main(arguments: Sequence[str]) -> int:
    """Check kernel modules. Returns 0 without faults, 1 with a fault, 2 for wrong usage."""
    options = parser().parse_args(arguments)
    try:
        _check_files(options.modules)
        return asyncio.run(_check(options))
    except (InvalidArgument, StartError) as error:
        print(f"unlatch check: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    """The parser of the command's flags."""
    made = argparse.ArgumentParser(
        prog="unlatch check",
        description="Run kernels in real workers, with random inputs of the declared shapes and dtypes, and report "
        "faults. Exit codes: 0 no fault, 1 a fault was found, 2 wrong usage.",
    )
    made.add_argument("modules", nargs="+", metavar="module", help="path/to/file.py or pkg.module")
    made.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="kernel.scalar=value",
        help="value of a scalar in every run; of a list, JSON",
    )
    made.add_argument("--seed", type=_seed, default=0, help="seed of the random inputs (default: 0)")
    made.add_argument("--seconds", type=seconds, default=10.0, help="maximum seconds of a run (default: 10)")
    made.add_argument(
        "--memory-mib", type=_memory, default=2048, help="maximum MiB of a worker's memory (default: 2048)"
    )
    made.add_argument(
        "--most-mib", type=_most, default=8.0, help="maximum MiB of the inputs that are timed; 0 is none (default: 8)"
    )
    made.add_argument(
        "--worker-python",
        metavar="PATH",
        default=os.environ.get(variable("worker_python"), ""),
        help="Python interpreter that runs the kernels (default: this one, or the variable UNLATCH_WORKER_PYTHON)",
    )
    made.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return made


def _seed(text: str) -> int:
    return bounded_number(text, int, 0, 2**63 - 1, "a whole number")


def _memory(text: str) -> int:
    return bounded_number(text, int, 1, _MAX_MIB, "a whole number of MiB")


def _most(text: str) -> float:
    return bounded_number(text, float, 0.0, _MAX_MIB, "a number of MiB")


def _check_files(modules: Sequence[str]) -> None:
    for name in modules:
        if not name or (name.endswith(".py") and not Path(name).is_file()):
            raise InvalidArgument(f"{name or 'an empty name'}: no such file")


async def _check(options: argparse.Namespace) -> int:
    python = options.worker_python
    if python and (why := await ask(python)):
        raise StartError(why)
    trial = await tried(
        options.modules, within_seconds=_IMPORT_SECONDS, memory_bytes=options.memory_mib * MiB, python=python
    )
    kernels = {kernel.spec.name: kernel for module in trial.modules for kernel in module.kernels}
    scalars = _given(options.set, {name: kernel.spec for name, kernel in kernels.items()})
    findings = [finding for module in trial.modules for finding in _of_module(module)]
    growths: dict[str, Growth] = {}
    if kernels:
        found, growths = await _of_kernels(trial, kernels, scalars, options)
        findings += found
    if options.json:
        for_programs(findings, growths, list(kernels), options.seed)
    else:
        for_people(findings, growths, len(kernels))
    return 1 if any(finding.is_fault for finding in findings) else 0


async def _of_kernels(
    trial: Trial, kernels: Mapping[str, TriedKernel], scalars: Scalars, options: argparse.Namespace
) -> tuple[list[Finding], dict[str, Growth]]:
    workers = CheckWorkers(
        [module.name for module in trial.modules if not module.unservable],
        seconds=options.seconds,
        memory_bytes=options.memory_mib * MiB,
        # The default of a service: one worker for each core, one thread for each worker.
        blas_threads=1,
        python=options.worker_python,
    )
    findings: list[Finding] = []
    growths: dict[str, Growth] = {}
    try:
        for name, kernel in kernels.items():
            cases = Cases(kernel.spec, options.seed, scalars.get(name, {}))
            found, growths[name] = await _of_kernel(kernel, cases, workers, options.most_mib)
            findings += found
    finally:
        await workers.close()
    return findings, growths


async def _of_kernel(
    kernel: TriedKernel, cases: Cases, workers: CheckWorkers, most_mib: float
) -> tuple[list[Finding], Growth]:
    examination = Examination(kernel, cases, workers)
    runs = await examination.run()
    growth = await measure(kernel.spec, cases, workers, int(most_mib * MiB)) if runs and most_mib else Growth()
    if growth.failed is not None:
        examination.judge_large(*growth.failed)
    return examination.findings, growth


def _of_module(module: TriedModule) -> list[Finding]:
    """Findings from importing a module."""
    if module.failure:
        place, _, why = module.failure.partition(": ")
        return [Finding(place=place, kernel="(module)", kind="does-not-load", what=why)]
    found = []
    if not module.kernels:
        found.append(Finding(place=module.name, kernel="(module)", kind="no-kernel", what="declares no kernel"))
    if module.threads:
        what = f"starts threads on import: {', '.join(module.threads)}"
        found.append(Finding(place=module.name, kernel="(module)", kind="threads-at-import", what=what))
    if module.import_seconds > _SLOW_IMPORT_SECONDS:
        what = f"takes {module.import_seconds:.1f} s to import"
        found.append(Finding(place=module.name, kernel="(module)", kind="imports-slowly", what=what))
    return found


def _given(settings: Sequence[str], specs: dict[str, KernelSpec]) -> Scalars:
    """Parse --set options into scalars by kernel. Raises InvalidArgument."""
    scalars: Scalars = {}
    for setting in settings:
        target, equals, text = setting.partition("=")
        kernel, dot, name = target.partition(".")
        if not equals or not dot:
            raise InvalidArgument(f"--set {setting}: wanted kernel.scalar=value")
        if kernel not in specs:
            raise InvalidArgument(f"--set {setting}: no kernel {kernel!r}{near(kernel, specs)}")
        known = {scalar.name: scalar for scalar in specs[kernel].scalars}
        if name not in known:
            raise InvalidArgument(f"--set {setting}: kernel {kernel} has no scalar {name!r}{near(name, known)}")
        scalars.setdefault(kernel, {})[name] = known[name].read(text)
    return scalars

"""The rules for kernels: each is run in real workers, and its behaviour is compared with its declaration."""

import re
from collections import deque
from collections.abc import Sequence

import numpy as np

from unlatch.check.cases import Case, Cases
from unlatch.check.findings import Finding
from unlatch.check.worker import CheckWorkers, Ended, Lost, Outcome, Refused
from unlatch.common.errors import InvalidArgument, ResourceExhausted
from unlatch.common.kernel.tensors import Array
from unlatch.compute.worker.trial import TriedKernel

_BATCH_ROWS = 4
# Sums may be computed in another order; these are a thousand times the rounding error.
_TOLERANCE = {"float16": 1e-2, "float32": 1e-4, "complex64": 1e-4}
_FINE_TOLERANCE = 1e-9
# Parts of the worker's texts for an unexpected error, and for a result whose elements are neither bytes nor str.
_UNEXPECTED = "the server's log has it"
_NOT_BYTES = "cannot be sent as BYTES"
_WARNING = re.compile(r":\d+: \w*Warning: ")
_FRAME = re.compile(r'^  File "(.+)", line (\d+), in ', re.MULTILINE)


class Examination:
    """The examination of one kernel. `findings` has each kind once a place, with the first case that shows it."""

    def __init__(self, kernel: TriedKernel, cases: Cases, workers: CheckWorkers) -> None:
        self._kernel = kernel
        self._spec = kernel.spec
        self._cases = cases
        self._workers = workers
        self._found: dict[tuple[str, str], Finding] = {}
        self._good: list[Case] = []

    @property
    def findings(self) -> list[Finding]:
        """All findings, in the order in which they were found."""
        return list(self._found.values())

    async def run(self) -> bool:
        """Check every rule but growth. Returns whether growth can be measured."""
        await self._dry()
        if not self._good:
            if any(kind == "refuses" for kind, _ in self._found):
                self._add("refuses-everything", "refuses every case, so no run completed")
            return False
        if self._spec.pure:
            await self._pure()
        if self._spec.batch:
            await self._batch()
        return not any(kind == "does-not-end" for kind, _ in self._found)

    async def _dry(self) -> None:
        """Run every case once. If negative numbers are refused, try positive ones, and keep to them if they work."""
        for positive in (False, True):
            self._cases.positive = positive
            typical = self._cases.typical(0)
            outcome = await self._each([*self._cases.dry(), typical])
            if not isinstance(outcome, Refused) or outcome.code != InvalidArgument.code:
                return
        self._cases.positive = False

    async def _each(self, cases: Sequence[Case]) -> Outcome:
        """Run cases and return the last outcome. A fatal case ends its worker only; one that hangs ends them all."""
        left = deque(cases)
        while True:
            async with self._workers.worker(self._spec) as worker:
                threads, *_ = await worker.settle()
                while left:
                    case = left.popleft()
                    outcome = await worker.run(self._spec.name, case)
                    self.judge(case, outcome)
                    if worker.lost:
                        break
                else:
                    active, pool, _ = await worker.settle()
                    self._threads(threads, active, pool)
            if not left or (isinstance(outcome, Lost) and outcome.seconds):
                return outcome

    def judge_large(self, case: Case, outcome: Outcome) -> None:
        """Judge a run with large inputs. That it takes too much time or memory is no fault."""
        limited = isinstance(outcome, Refused) and outcome.code in (InvalidArgument.code, ResourceExhausted.code)
        if not (limited or (isinstance(outcome, Lost) and outcome.seconds)):
            self.judge(case, outcome)

    def judge(self, case: Case, outcome: Outcome) -> None:
        """Add the findings of one run."""
        if isinstance(outcome, Ended):
            self._good.append(case)
            if outcome.keeps_input:
                self._add("keeps-input", f"keeps an input after it has returned ({case.says})")
            if outcome.drawn:
                names = " and ".join(outcome.drawn)
                self._add("draws-the-same", f"draws from a generator that its module has made at import: {names}")
            # NumPy warns about NaN and infinity, which the caller has sent on purpose.
            if outcome.printed.strip() and case.finite:
                first = outcome.printed.strip().splitlines()[0]
                if _WARNING.search(first):
                    self._add("warns", f"warns: {first} ({case.says})")
                else:
                    self._add("prints", f"writes to stdout or stderr: {first[:100]!r}")
        elif isinstance(outcome, Lost):
            kind = "does-not-end" if outcome.seconds else "ends-its-worker"
            self._add(kind, f"{outcome.reason} ({case.says})")
        else:
            self._refused(case, outcome)

    def _refused(self, case: Case, outcome: Refused) -> None:
        said = outcome.message.removeprefix(f"kernel {self._spec.name} ")
        last = outcome.last_lines
        if outcome.code == InvalidArgument.code:
            self._add("refuses", f"refuses {case.says}: {said!r}")
        elif outcome.code == ResourceExhausted.code:
            self._add("needs-memory", f"{said} ({case.says})")
        elif _NOT_BYTES in outcome.story:
            self._add("wrong-result", f"returns a result that cannot be sent: {last[-1]} ({case.says})")
        elif _UNEXPECTED in outcome.message:
            raises_anyway = ("raises", self._place(outcome.story)) in self._found
            kind = "raises" if case.finite or raises_anyway else "raises-unless-finite"
            self._add(kind, f"raises {last[-1].strip()} ({case.says})", outcome.story, "\n".join(last))
        elif "inputs are read-only" in outcome.message:
            kind = "needs-writable-input" if "compiled" in outcome.message else "writes-to-input"
            self._add(kind, f"{said.partition(';')[0]} ({case.says})", outcome.story, "\n".join(last))
        else:
            self._add("wrong-result", f"{said} ({case.says})")

    def _threads(self, before: int, active: int, pool: int) -> None:
        if active > before:
            self._add("leaves-threads", f"leaves {active - before} threads running after its calls")
        if pool > self._workers.blas_threads:
            self._add("many-threads", f"a library in the worker uses {pool} threads, not {self._workers.blas_threads}")

    async def _pure(self) -> None:
        """Check that the same arguments give the same result: in another worker, again, and after other calls."""
        one, other = self._cases.typical(0), self._cases.typical(1)
        if not any(case.says == one.says for case in self._good):
            one = other = self._good[0]
        first, before, again = await self._in_a_row(one, other, one)
        (elsewhere,) = await self._in_a_row(one)
        alone, last = await self._in_a_row(other, one)
        if not _same(first, elsewhere):
            self._add(
                "not-deterministic", f"returns another result in another worker for the same arguments ({one.says})"
            )
        elif not (_same(first, again) and _same(first, last) and _same(alone, before)):
            self._add("keeps-state", f"returns another result for the same arguments after another call ({one.says})")

    async def _in_a_row(self, *cases: Case) -> list[Outcome]:
        """Outcomes of these calls, one after another in a fresh worker."""
        async with self._workers.worker(self._spec) as worker:
            outcomes = [await worker.run(self._spec.name, case) for case in cases]
        for case, outcome in zip(cases, outcomes, strict=True):
            if isinstance(outcome, Lost):
                self.judge(case, outcome)
        return outcomes

    async def _batch(self) -> None:
        """Check that each row of a batch gives the same result as the row alone."""
        batch = self._cases.batch(_BATCH_ROWS)
        together, *alone = await self._in_a_row(batch, *(batch.row(number) for number in range(_BATCH_ROWS)))
        if not isinstance(together, Ended):
            self.judge(batch, together)
            return
        rows = [row.outputs for row in alone if isinstance(row, Ended)]
        if len(rows) < _BATCH_ROWS:
            self._add("batch-differs", f"accepts {batch.says} but not each of its rows")
            return
        for declared, whole, *parts in zip(self._spec.outputs, together.outputs, *rows, strict=True):
            shapes = {part.shape[1:] for part in parts}
            if fault := "rows have different shapes" if len(shapes) > 1 else _differs(whole, np.concatenate(parts)):
                self._add(
                    "batch-differs", f"{declared.name} of a batch differs from that of its rows: {fault} ({batch.says})"
                )

    def _add(self, kind: str, what: str, story: str = "", detail: str = "") -> None:
        finding = Finding(place=self._place(story), kernel=self._spec.name, kind=kind, what=what, detail=detail)
        # Two lines that raise are two faults; two refused arrays are one note.
        self._found.setdefault((kind, finding.place), finding)

    def _place(self, story: str) -> str:
        """The last line of the kernel's own file in a traceback, or else the kernel's definition."""
        file = self._kernel.place.rpartition(":")[0]
        lines = [line for name, line in _FRAME.findall(story) if name == file]
        return f"{file}:{lines[-1]}" if lines else self._kernel.place


def _same(one: Outcome, other: Outcome) -> bool:
    """Whether two runs gave the same result, but for the rounding of sums whose order may vary."""
    if not (isinstance(one, Ended) and isinstance(other, Ended)):
        return type(one) is type(other)
    return len(one.outputs) == len(other.outputs) and not any(map(_differs, one.outputs, other.outputs))


def _differs(one: Array, other: Array) -> str:
    """Describe how two results differ; empty if they do not differ by more than rounding."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return f"{one.dtype}{list(one.shape)} and {other.dtype}{list(other.shape)}"
    if one.dtype.kind not in "fc":
        return "" if np.array_equal(one, other) else "elements differ"
    tolerance = _TOLERANCE.get(one.dtype.name, _FINE_TOLERANCE)
    with np.errstate(all="ignore"):
        if np.allclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True):
            return ""
    return f"elements differ by up to {np.nanmax(abs(one - other)):.3g}, more than {tolerance:g}"

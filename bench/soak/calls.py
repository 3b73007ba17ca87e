"""Calls of the soak, and the ends that the failure table in docs/architecture.md allows for each."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.subjects import work
from unlatch.common.errors import POSSIBLE_EFFECT

Array = np.ndarray[Any, Any]

OK = "OK"
LEFT = "left"
# Limit of a patient caller: longer than any call takes here, so that no call may exceed it.
PATIENT_SECONDS = 30.0

# Interval and length of lulls, in which no call is begun: memory that services then hold is what they keep.
LULL_EVERY_SECONDS, LULL_SECONDS = 5.0, 1.0

_DIED = {"ABORTED": r"worker \d+ ended while it ran the call: \S"}
_DIED_TWICE = {"FAILED_PRECONDITION": r"\d+ workers ended while they ran this call"}
# The call's own limit passed; or it was refused on arrival, since it could not have been answered in time.
_TOO_LATE = {"DEADLINE_EXCEEDED": "", "RESOURCE_EXHAUSTED": ""}
# The connection to a unit that was killed broke, or another unit lost the call with it. As long as one unit serves, no
# connection is refused.
_UNIT_DIED = {"UNAVAILABLE": r"^(?!.*refused)"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of call: vectors of a random length from `doubles`, or as many rows of `columns`, of one of `dtypes`.

    `may` has the failures that are not our fault: a status, and text that its message must contain. A caller that
    `leaves` does so after up to that many seconds. `refusal` is the kernel's error for a vector that it refuses.
    """

    name: str
    kernel: str
    share: float
    function: Callable[[Array], Array]
    may: Mapping[str, str] = field(default_factory=dict)
    doubles: tuple[int, int] = (16, 1024)
    columns: int = 0
    dtypes: tuple[str, ...] = ("float64",)
    seconds: float = PATIENT_SECONDS
    leaves: float = 0.0
    refuses: bool = False

    def arguments(self, random: np.random.Generator, noise: Array) -> Array:
        """A vector, or rows, cut out of the noise, so that two calls are rarely identical."""
        if self.kernel == "python_loop":
            return random.integers(10**10, 10**11, 1)
        length = int(random.integers(*self.doubles, endpoint=True))
        start = int(random.integers(0, len(noise) - length))
        x = noise[start : start + length]
        if (dtype := random.choice(self.dtypes)) != "float64":
            x = (x * 100.0).astype(dtype)
        return x[: length - length % self.columns].reshape(-1, self.columns) if self.columns else x

    def wrong(self, x: Array, code: str, said: str | Array, *, units_die: bool = False) -> str | None:
        """The fault in how a call ended, while workers or units are killed; None if there is none."""
        if code == OK and not self.refuses:
            y, expected = said, self.function(x)
            right = isinstance(y, np.ndarray) and y.dtype == expected.dtype and np.array_equal(y, expected)
            return None if right else f"{self.name}: the content is wrong"
        refused = self.refuses and code == "INVALID_ARGUMENT" and said == f"the first value is {x[0]!r}"
        if refused or (code == LEFT and self.leaves) or _may_fail(self.may, code, said):
            return None
        if units_die and _may_fail(self._may_if_a_unit_dies, code, said):
            return None
        return f"{self.name}: {code} {str(said)[:200]}"

    @property
    def _may_if_a_unit_dies(self) -> Mapping[str, str]:
        is_pure = "ABORTED" not in self.may
        return _UNIT_DIED if is_pure else _UNIT_DIED | {"ABORTED": POSSIBLE_EFFECT}


def _may_fail(may: Mapping[str, str], code: str, said: str | Array) -> bool:
    return code in may and isinstance(said, str) and re.search(may[code], said, re.DOTALL) is not None


_MIB_DOUBLES = (1 << 20) // 8
_LARGE = (_MIB_DOUBLES, 8 * _MIB_DOUBLES)

KINDS = (
    Kind(name="small, pure", kernel="doubled", share=28, function=lambda x: x * 2.0, may=_DIED_TWICE),
    Kind(name="small", kernel="negated", share=20, function=np.negative, may=_DIED),
    Kind(
        name="batched",
        kernel="light_together",
        share=20,
        function=work.light,
        may=_DIED_TWICE,
        doubles=(16, 64),
        columns=16,
    ),
    Kind(
        name="1 to 8 MiB, pure", kernel="doubled", share=4, function=lambda x: x * 2.0, may=_DIED_TWICE, doubles=_LARGE
    ),
    Kind(name="1 to 8 MiB", kernel="negated", share=3, function=np.negative, may=_DIED, doubles=_LARGE),
    Kind(name="50 ms, pure", kernel="doubled_slowly", share=2, function=lambda x: x * 2.0, may=_DIED_TWICE),
    Kind(name="50 ms", kernel="negated_slowly", share=1.5, function=np.negative, may=_DIED),
    Kind(
        name="any dtype, pure",
        kernel="reversed_any",
        share=8,
        function=lambda x: x[::-1],
        may=_DIED_TWICE,
        dtypes=("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float16", "float32"),
    ),
    Kind(name="refused by its kernel", kernel="refused", share=8, function=np.negative, may=_DIED, refuses=True),
    Kind(name="caller leaves", kernel="doubled", share=4, function=lambda x: x * 2.0, may=_DIED_TWICE, leaves=0.2),
    Kind(
        name="caller leaves, 50 ms",
        kernel="negated_slowly",
        share=1,
        function=np.negative,
        may=_DIED,
        leaves=0.2,
    ),
    Kind(name="short deadline", kernel="negated", share=2, function=np.negative, may=_DIED | _TOO_LATE, seconds=0.3),
    Kind(
        name="short deadline, 50 ms",
        kernel="negated_slowly",
        share=1,
        function=np.negative,
        may=_DIED | _TOO_LATE,
        seconds=0.3,
    ),
    # This kernel never ends and never asks whether it is cancelled, so its worker is killed.
    Kind(
        name="endless, caller leaves",
        kernel="python_loop",
        share=0.2,
        function=np.negative,
        may=_DIED_TWICE,
        leaves=0.4,
    ),
    Kind(
        name="endless, short deadline",
        kernel="python_loop",
        share=0.2,
        function=np.negative,
        may=_DIED_TWICE | _TOO_LATE,
        seconds=0.4,
    ),
)

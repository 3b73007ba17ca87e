"""Progress of a map: a bar on a terminal, a line every 2 s elsewhere, or a JSON line for each item."""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Literal, Protocol

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TimeRemainingColumn
from rich.text import Text

from unlatch.cli import error_object, plain
from unlatch.common.errors import UnlatchError

_LINE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class ItemOutcome:
    """The outcome of one item. `source` is its file or row."""

    item: str
    source: str
    status: Literal["done", "skipped", "failed"]
    files: Sequence[Path] = ()
    seconds: float = 0.0
    error: UnlatchError | None = None


class _Face(Protocol):
    """A way to show a map's progress."""

    def show(self, outcome: ItemOutcome) -> None: ...

    def end(self, summary: str) -> None: ...


class Progress:
    """Counts items and shows each."""

    def __init__(self, total: int, face: _Face) -> None:
        self._total = total
        self._face = face
        self._counts: Counter[str] = Counter()

    @property
    def complete(self) -> bool:
        """Whether every item's files exist."""
        return self._counts["done"] + self._counts["skipped"] == self._total

    @property
    def summary(self) -> str:
        """Counts of all outcomes, as one line."""
        counts = self._counts
        left = self._total - counts.total()
        parts = [f"{counts['done']} done", f"{counts['skipped']} already there", f"{counts['failed']} failed"]
        return ", ".join([*parts, *([f"{left} left: run the same command again to continue"] if left else [])])

    def told(self, outcome: ItemOutcome) -> None:
        """Count and show an item that is over."""
        self._counts[outcome.status] += 1
        self._face.show(outcome)


@contextmanager
def progress(total: int, *, as_json: bool) -> Iterator[Progress]:
    """Show the progress of `total` items, and a summary at the end, even after an error."""
    face: _Face = _Json() if as_json else _Bar(total) if sys.stderr.isatty() else _Lines(total)
    counted = Progress(total, face)
    try:
        yield counted
    finally:
        face.end(counted.summary)


class _Json:
    def show(self, outcome: ItemOutcome) -> None:
        told: dict[str, object] = {"item": outcome.item, "status": outcome.status}
        if outcome.status == "done":
            told |= {"files": [str(path) for path in outcome.files], "seconds": round(outcome.seconds, 6)}
        if outcome.error is not None:
            told |= {"source": outcome.source, "error": error_object(outcome.error)}
        print(json.dumps(told), flush=True)

    def end(self, summary: str) -> None:
        """Print nothing: the lines of items are complete."""


class _Lines:
    def __init__(self, total: int) -> None:
        self._total = total
        self._over = self._worked = 0
        self._began = self._last = monotonic()

    def show(self, outcome: ItemOutcome) -> None:
        self._over += 1
        self._worked += outcome.status != "skipped"
        if outcome.error is not None:
            print(_failure(outcome, outcome.error), file=sys.stderr)
        now = monotonic()
        if now - self._last >= _LINE_SECONDS and self._worked:
            self._last = now
            rate = self._worked / (now - self._began)
            left_seconds = (self._total - self._over) / rate
            print(f"{self._over} of {self._total}, {rate:.3g}/s, {left_seconds:.0f} s left", file=sys.stderr)

    def end(self, summary: str) -> None:
        print(summary, file=sys.stderr)


class _Bar:
    def __init__(self, total: int) -> None:
        self._console = Console(stderr=True)
        columns = BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn()
        self._progress = rich.progress.Progress(*columns, console=self._console)
        self._skipped = 0
        self._task = self._progress.add_task("", total=total)
        self._progress.start()

    def show(self, outcome: ItemOutcome) -> None:
        if outcome.status == "skipped":
            # The bar is reset, so that its rate counts only items that were worked on.
            self._skipped += 1
            self._progress.reset(self._task, completed=self._skipped)
        else:
            self._progress.advance(self._task)
        if outcome.error is not None:
            self._console.print(_failure(outcome, outcome.error), markup=False, highlight=False)

    def end(self, summary: str) -> None:
        self._progress.stop()
        self._console.print(summary, markup=False, highlight=False)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.3g}/s" if task.speed else "")


def _failure(outcome: ItemOutcome, error: UnlatchError) -> str:
    return plain(f"{outcome.item}: {error.status}: {error.message} ({outcome.source})")

"""The share of time in which work waits for a core, from files as Linux writes them."""

from pathlib import Path

import pytest

from unlatch.common.machine.core_pressure import CorePressure


class Files:
    """The files that are read, and a clock that the test sets."""

    def __init__(self, directory: Path) -> None:
        self.cgroup, self.machine, self.waits = (directory / name for name in ("cgroup", "machine", "waits"))
        self.now = 100.0
        self.set(self.cgroup, 0.0)
        self.set(self.machine, 0.0)
        self.set_waits(0.0)

    def set(self, file: Path, seconds: float) -> None:
        total = round(seconds * 1e6)
        file.write_text(
            f"some avg10=0.00 avg60=0.00 avg300=0.00 total={total}\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=9\n"
        )

    def set_waits(self, seconds: float) -> None:
        self.waits.write_text(f"123456789 {round(seconds * 1e9)} 77\n")

    def pressure(self) -> CorePressure:
        return CorePressure(self.cgroup, self.machine, self.waits, lambda: self.now)


@pytest.mark.parametrize(("whole_machine", "share"), [(False, 0.25), (True, 0.75)])
def test_greatest_share_since_the_last_reading_counts(tmp_path: Path, *, whole_machine: bool, share: float) -> None:
    """The whole machine's counts only where it matters. A second reading at once gives the same."""
    files = Files(tmp_path)
    pressure = files.pressure()
    files.now += 2.0
    files.set(files.cgroup, 0.5)
    files.set(files.machine, 1.5)
    files.set_waits(0.2)
    assert pressure.share(whole_machine=whole_machine) == pytest.approx(share)
    files.set(files.cgroup, 100.0)
    assert pressure.share(whole_machine=whole_machine) == pytest.approx(share)
    files.now += 4.0
    files.set(files.cgroup, 0.5)
    assert pressure.share(whole_machine=False) == 0.0


def test_waits_of_this_process_stand_for_a_pressure_that_is_not_measured(tmp_path: Path) -> None:
    """A kernel without PSI has no such files, or cannot read them."""
    files = Files(tmp_path)
    files.machine.unlink()
    files.cgroup.write_text("")
    pressure = files.pressure()
    files.now += 1.0
    files.set_waits(0.4)
    assert pressure.share(whole_machine=True) == pytest.approx(0.4)


def test_system_that_tells_nothing_has_no_pressure(tmp_path: Path) -> None:
    """No file is there."""
    pressure = CorePressure(tmp_path / "no", tmp_path / "nor", tmp_path / "neither", lambda: 0.0)
    assert pressure.share(whole_machine=True) == 0.0


def test_this_machine_is_read() -> None:
    """The share is one, whatever this system tells."""
    assert 0.0 <= CorePressure().share(whole_machine=True) <= 1.0

"""The rations of a log: each kind of line has its own, whatever logs it."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from structlog.testing import capture_logs

from tests.support.watching import wait_until
from unlatch.common.telemetry import log_ration
from unlatch.common.telemetry.log import configure
from unlatch.common.telemetry.log_ration import LogRations


class Clock:
    """The clock of the rations, which a test moves."""

    now = 1000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(log_ration, "monotonic", lambda: clock.now)
    return clock


def counts(lines: list[structlog.typing.EventDict]) -> list[tuple[str, int]]:
    return [(line["event"], line.get("left_out", 0)) for line in lines]


def test_each_kind_has_its_ration(clock: Clock) -> None:
    """Lines about different replicas, kernels or workers are of different kinds; lines of different peers are not."""
    log = structlog.get_logger()
    with capture_logs([LogRations()]) as lines:
        for number in range(500):
            log.warning("lane closed", peer=f"ipv4:127.0.0.1:{number}", message="garbage")
        for number in range(30):
            log.info("replica is ready", replica=f"10.0.0.{number}:8011", kernels=3)
        for number in range(30):
            log.error("kernel failed", kernel="blur", worker=number)
            log.error("kernel failed", kernel="sharpen", worker=number)
        clock.now += 0.5
        for _ in range(6):
            log.warning("lane closed", peer="ipv4:127.0.0.1:1", message="garbage")
    seen = counts(lines)
    assert seen.count(("replica is ready", 0)) == 30
    assert seen.count(("kernel failed", 0)) == 20
    closed = [left_out for event, left_out in seen if event == "lane closed"]
    assert closed == [0] * 10 + [490] + [0] * 4


def test_places_of_grpc_are_one_kind_and_calls_are_bounded_elsewhere(clock: Clock) -> None:
    """A caller can cause lines of several places of gRPC. Lines of calls have bounds by settings."""
    log = structlog.get_logger()
    with capture_logs([LogRations()]) as lines:
        for number in range(50):
            log.warning("grpc", place=f"handshake.cc:{number}", message="it failed")
            log.warning("call", kernel="blur", code="INTERNAL")
            log.error("internal error", place="lane")
            log.error("internal error", place="rpc")
    events = [line["event"] for line in lines]
    assert [events.count(event) for event in ("grpc", "call", "internal error")] == [10, 50, 20]


@pytest.fixture
def stderr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file that the log writes to, configured as in a service. pytest's capfd can lose a line when it is read."""
    configuration, root = structlog.get_config(), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    path = tmp_path / "stderr"
    with path.open("wb") as file:
        monkeypatch.setattr("unlatch.common.telemetry.log._STDERR", file.fileno())
        configure("tested", "info")
        yield path
    structlog.configure(**configuration)
    root.handlers[:] = handlers
    root.setLevel(level)


def test_lines_of_the_standard_library_are_rationed_by_their_place(clock: Clock, stderr: Path) -> None:
    """Libraries log through it. A place in their code is a kind, whatever the text is."""
    logger = logging.getLogger("a library")

    def tell(text: str) -> None:
        logger.warning(text)

    for number in range(100):
        tell(f"the task of caller {number} failed")
    logger.warning("another place")
    clock.now += 1.0
    tell("the last one failed")
    wait_until(lambda: "the last one failed" in stderr.read_text(), "the log has written the last line")
    entries = [json.loads(line) for line in stderr.read_text().splitlines()]
    assert [entry["event"] for entry in entries[10:]] == ["another place", "the last one failed"]
    assert [entry.get("left_out", 0) for entry in entries] == [0] * 11 + [90]
    assert {entry["process"] for entry in entries} == {"tested"}

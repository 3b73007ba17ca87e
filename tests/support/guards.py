"""Guards in tests: exceptions that no code expected fail the test, or are counted where the test makes them."""

from typing import NoReturn

from unlatch.common.errors import Internal
from unlatch.common.telemetry.internal_errors import InternalErrors
from unlatch.common.telemetry.recorder import Recorder


def unexpected(place: str, error: BaseException) -> NoReturn:
    """Fail: the code under test met an exception that it did not expect."""
    raise AssertionError(f"an internal error in {place}") from error


class Caught:
    """Counts exceptions by the place where they were caught, as a service does."""

    def __init__(self) -> None:
        self.places: list[str] = []
        self._errors = InternalErrors(Recorder())

    def __call__(self, place: str, error: BaseException) -> Internal:
        self.places.append(place)
        return self._errors.caught(place, error)

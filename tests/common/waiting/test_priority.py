"""Priorities that callers ask for: by name, or by Triton's numbers."""

import pytest

from unlatch.common.errors import InvalidArgument
from unlatch.common.kernel.lists import Value
from unlatch.common.kernel.parameters import parameter
from unlatch.common.waiting.priority import take_priority
from unlatch.protos.unlatch_pb2 import Priority, Request


def taken(value: Value) -> Priority.ValueType | None:
    """Take the priority of a request, which then has none."""
    request = Request()
    request.parameters["priority"].CopyFrom(parameter(value))
    try:
        return take_priority(request)
    finally:
        assert not request.parameters


@pytest.mark.parametrize(
    ("value", "priority"),
    [
        ("interactive", Priority.INTERACTIVE),
        ("normal", Priority.NORMAL),
        ("background", Priority.BACKGROUND),
        (1, Priority.INTERACTIVE),
        (2, Priority.NORMAL),
        (3, Priority.BACKGROUND),
        (0, None),
        (4, None),
        (2**64 - 1, None),
    ],
)
def test_priority_is_a_name_or_one_of_tritons_numbers(value: Value, priority: Priority.ValueType | None) -> None:
    """The lower the number, the sooner; 0 and a number without a level stand for the default, as in Triton."""
    assert taken(value) == priority


@pytest.mark.parametrize("value", ["", "Normal", "1", True, -1, 1.0])
def test_other_priorities_are_refused(value: Value) -> None:
    """The error names the parameter, what is wanted and what came."""
    wanted = "priority: wanted interactive or normal or background, or a number from 1 to 3, got"
    with pytest.raises(InvalidArgument, match=wanted) as told:
        taken(value)
    assert told.value.field == "priority"

"""Triton's own parameters of a request mean here what they mean there, or are refused by name."""

import re
import time

import pytest

from tests.support.doors import Oip, arrays_of, request, vector
from unlatch.common.kernel.lists import Value


@pytest.mark.parametrize("priority", [0, 1, 2, 3, 4, 2**63])
def test_priority_may_be_tritons_number(priority: int, oip: Oip) -> None:
    """As int64 or uint64; no kernel sees it."""
    (answer,) = arrays_of(oip.infer(vector("identity", 1.0, priority=priority)))
    assert list(answer) == [1.0]


def test_timeout_is_a_deadline_in_microseconds(oip: Oip) -> None:
    """The call ends when it has passed, whatever longer time the RPC has."""
    began = time.monotonic()
    refusal = oip.refusal(request("sleeps", seconds=5.0, timeout=50_000))
    assert (refusal.code, refusal.message) == ("DEADLINE_EXCEEDED", "kernel sleeps did not answer within 0.05 s")
    assert time.monotonic() - began < 4.0


def test_timeout_does_not_lengthen_the_deadline_of_the_rpc(oip: Oip) -> None:
    """The shorter of the two holds."""
    assert oip.refusal(request("sleeps", seconds=5.0, timeout=60_000_000), timeout=0.2).code == "DEADLINE_EXCEEDED"


@pytest.mark.parametrize("timeout", [-1, 0.5, "1000", True])
def test_timeout_that_is_no_number_of_microseconds_is_refused(timeout: Value, oip: Oip) -> None:
    """The error names the parameter and what was wanted."""
    refusal = oip.refusal(vector("identity", 1.0, timeout=timeout))
    assert (refusal.code, refusal.fields) == ("INVALID_ARGUMENT", ("timeout",))
    assert "wanted a whole number of microseconds" in refusal.message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sequence_id", 5),
        ("sequence_id", "a"),
        ("sequence_start", True),
        ("sequence_end", True),
        ("headers", "x"),
        ("triton_enable_empty_final_response", True),
        ("triton_of_a_later_version", 1),
    ],
)
def test_other_parameters_of_tritons_are_unimplemented(name: str, value: Value, oip: Oip) -> None:
    """The error names the parameter."""
    refusal = oip.refusal(vector("identity", 1.0, **{name: value}))
    assert (refusal.code, refusal.fields) == ("UNIMPLEMENTED", (name,))
    assert refusal.message.startswith(f"{name}: ")


def test_parameters_that_ask_for_nothing_are_taken(oip: Oip) -> None:
    """A sequence of id 0 is none, a timeout of 0 is none, and what is False is not wanted."""
    neutral: dict[str, Value] = {"sequence_id": 0, "sequence_start": False, "sequence_end": False, "timeout": 0}
    message = vector("identity", 1.0, **neutral, triton_enable_empty_final_response=False)
    assert list(arrays_of(oip.infer(message))[0]) == [1.0]


def test_parameter_that_is_no_ones_is_refused_as_before(oip: Oip) -> None:
    """A name that neither Triton nor the kernel has is the caller's mistake."""
    refusal = oip.refusal(vector("identity", 1.0, sequence=1))
    assert (refusal.code, refusal.fields) == ("INVALID_ARGUMENT", ("sequence",))


def test_empty_model_name_is_said_plainly(oip: Oip) -> None:
    """The error says which field is empty, and lists kernels."""
    refusal = oip.refusal(vector("", 1.0))
    assert (refusal.code, refusal.fields) == ("NOT_FOUND", ("model_name",))
    assert refusal.message.startswith("the call names no kernel: model_name is empty; known names: ")
    # The list is cut, and says so.
    assert re.search(r" and \d+ more$", refusal.message)


def test_scalar_of_another_type_is_said_plainly(oip: Oip) -> None:
    """The error names the type without an article that may not fit it."""
    refusal = oip.refusal(request("required_scalars", flag=True, count=1.5, ratio=1.0, label="x"))
    assert "count: wanted a parameter of type int, got the float 1.5" in refusal.message


def test_message_that_grpc_refuses_names_twice_the_setting(oip: Oip) -> None:
    """A message of 100 MB is refused by gRPC, whose limit is twice max_message_bytes."""
    refusal = oip.refusal(vector("identity", *([1.0] * 12_500_000)), timeout=60)
    assert refusal.code == "RESOURCE_EXHAUSTED"
    assert refusal.message.endswith(f"{2 * 32 * 1024 * 1024})")

"""Splitting messages agrees with protobuf's own runtime, on right bytes and on wrong ones."""

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from unlatch.common.lane.protowire import Malformed, bulk_entry, split, varint
from unlatch.protos.inference_pb2 import ModelInferRequest
from unlatch.protos.unlatch_pb2 import LaneMessage, Request

RAW = ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER
MOST = 1000

names = st.text(max_size=8)
requests = st.builds(
    ModelInferRequest,
    model_name=names,
    model_version=names,
    id=names,
    inputs=st.lists(
        st.builds(
            ModelInferRequest.InferInputTensor,
            name=names,
            datatype=names,
            shape=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4),
        ),
        max_size=3,
    ),
    raw_input_contents=st.lists(st.binary(max_size=300), max_size=4),
)


@given(requests)
def test_split_gives_header_and_bulk(message: ModelInferRequest) -> None:
    """The bulk is the repeated field's entries, and the rest parses to the message without them."""
    header, bulk = split(message.SerializeToString(), RAW, MOST)
    assert [bytes(entry) for entry in bulk] == list(message.raw_input_contents)
    expected = ModelInferRequest()
    expected.CopyFrom(message)
    del expected.raw_input_contents[:]
    assert ModelInferRequest.FromString(header) == expected
    assert Request.FromString(header).kernel == message.model_name


@given(requests, requests)
def test_split_takes_fields_in_any_order(one: ModelInferRequest, other: ModelInferRequest) -> None:
    """Two messages one after the other are one message, whose fields then come twice and out of order."""
    joined = one.SerializeToString() + other.SerializeToString()
    header, bulk = split(joined, RAW, MOST)
    whole = ModelInferRequest.FromString(joined)
    assert [bytes(entry) for entry in bulk] == list(whole.raw_input_contents)
    assert len(ModelInferRequest.FromString(header).inputs) == len(whole.inputs)


@given(st.binary(max_size=60))
def test_split_of_any_bytes_agrees_with_protobuf(message: bytes) -> None:
    """Bytes that both split and protobuf's runtime accept mean the same; nothing but Malformed is raised."""
    try:
        _, bulk = split(message, LaneMessage.PAYLOAD_FIELD_NUMBER, MOST)
    except Malformed:
        return
    try:
        parsed = LaneMessage.FromString(message)
    except DecodeError:
        return
    assert [bytes(entry) for entry in bulk] == list(parsed.payload)


@given(requests, st.data())
def test_cut_message_never_gives_bytes_that_are_not_there(message: ModelInferRequest, data: st.DataObject) -> None:
    """A message cut within a field is Malformed; cut between two, it is the message up to there."""
    encoded = message.SerializeToString()
    cut = encoded[: data.draw(st.integers(0, len(encoded)))]
    try:
        header, bulk = split(cut, RAW, MOST)
    except Malformed:
        return
    assert [bytes(entry) for entry in bulk] == list(message.raw_input_contents)[: len(bulk)]
    assert sum(map(len, bulk)) + len(header) <= len(cut)


def test_bulk_is_sliced_not_copied() -> None:
    """An entry is a view into the message itself."""
    message = LaneMessage(payload=[b"x" * 1000]).SerializeToString()
    _, (entry,) = split(message, LaneMessage.PAYLOAD_FIELD_NUMBER, MOST)
    assert entry.obj is message


@pytest.mark.parametrize(
    "message",
    [b"\x0a", b"\x0a\x05abc", b"\x80", b"\x08", b"\x08\x80", b"\x09" + bytes(7), b"\x0d" + bytes(3), b"\x0b", b"\x0e"],
    ids=["no length", "short", "half a tag", "no number", "half a number", "short 64", "short 32", "group", "type 6"],
)
def test_what_protobuf_cannot_walk_is_malformed(message: bytes) -> None:
    """A field that ends too early, or is of no kind that proto3 has."""
    with pytest.raises(Malformed):
        split(message, 2, MOST)


def test_number_without_end_is_malformed() -> None:
    """A varint has at most 10 bytes: no caller makes a loop walk megabytes of them as one."""
    with pytest.raises(Malformed, match="10 bytes"):
        split(b"\x08" + b"\x80" * 1_000_000, 2, MOST)


def test_message_of_too_many_entries_is_malformed() -> None:
    """Entries of nothing cost their sender two bytes and their reader far more: their number is bounded."""
    _, bulk = split(b"\x3a\x00" * MOST, RAW, MOST)
    assert len(bulk) == MOST
    with pytest.raises(Malformed, match="1000 entries"):
        split(b"\x3a\x00" * (MOST + 1), RAW, MOST)


@given(st.integers(0, 2**64 - 1), st.integers(1, 2**29 - 1), st.integers(0, 2**40))
def test_entries_are_written_as_they_are_read(value: int, field: int, size: int) -> None:
    """A varint is what a varint field carries; an entry's head is what its bytes need before them."""
    _, bulk = split(b"\x08" + varint(value) + bulk_entry(field, 3) + b"abc", field if field != 1 else 2, MOST)
    assert [bytes(entry) for entry in bulk] == ([b"abc"] if field != 1 else [])
    assert bulk_entry(field, size).endswith(varint(size))

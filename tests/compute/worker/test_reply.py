"""Outputs on their way to a reply: what is copied, because something else can still write to it."""

import mmap

import numpy as np
import pytest

from tests.support.dispatch import kernel
from unlatch.common.kernel.spec import ArraySpec
from unlatch.common.kernel.tensors import Array
from unlatch.compute.ipc.frames import Member
from unlatch.compute.worker.reply import own_copies, packed

SPEC = kernel(outputs=(ArraySpec(name="output0", dtypes=(), dims=("...",)),))
KEPT = np.zeros(1000)


def fresh() -> Array:
    return np.zeros(1000)


def of_input() -> Array:
    """Return a view of memory that can only be read."""
    return np.ndarray((100,), "f8", mmap.mmap(-1, 4096, prot=mmap.PROT_READ))


def of_kept() -> Array:
    view = KEPT[:10]
    view.flags.writeable = False
    return view


@pytest.mark.parametrize(
    ("make", "is_copied"),
    [(fresh, False), (of_input, False), (lambda: KEPT, True), (of_kept, True), (lambda: fresh()[::2], True)],
    ids=["fresh", "view of an input", "kept by the kernel", "view of what the kernel keeps", "view of a fresh one"],
)
def test_an_output_is_copied_if_something_else_can_write_to_it(make: object, *, is_copied: bool) -> None:
    """A fresh array and a view of an input are sent as they are: a large result is copied once and not twice."""
    assert callable(make)
    reply = packed(SPEC, [make()], (Member(1, -1, ()),), 1 << 20)
    own = own_copies(reply)
    assert (own.contents[0][0] is not reply.contents[0][0]) == is_copied
    np.testing.assert_array_equal(own.contents[0][0], reply.contents[0][0])

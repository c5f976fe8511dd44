"""Intervals and masks are the same sets."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mot_megatron.data.intervals import NONE, intervals_of, mask_of


@given(st.lists(st.booleans(), max_size=30), st.integers(0, 9), st.data())
def test_masks_and_intervals_are_inverse(bits: list[bool], start: int, data: st.DataObject) -> None:
    mask = np.array(bits, dtype=bool)
    found = intervals_of(mask, start)
    assert found.dtype == np.int64
    flat = found.ravel()
    assert (np.diff(flat) > 0).all()  # sorted, not empty, and as few as possible
    assert np.array_equal(mask_of(found, start, start + len(mask)), mask)
    begin = data.draw(st.integers(0, len(mask)))
    end = data.draw(st.integers(begin, len(mask)))
    assert np.array_equal(mask_of(found, start + begin, start + end), mask[begin:end])


def test_no_intervals() -> None:
    assert not mask_of(NONE, 3, 7).any()
    assert len(intervals_of(np.zeros(4, dtype=bool))) == 0

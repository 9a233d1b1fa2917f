import numpy as np
import pytest

from rmjax.data.segments import position_in_segments, segment


@pytest.mark.parametrize(
    "segment_length, num_segments", [(1, None), (3, None), (7, None), (20, None), (3, 9)]
)
def test_segments_hold_the_valid_items_in_order_and_nothing_else(segment_length, num_segments):
    rng = np.random.default_rng(0)
    items, length = rng.integers(1, 99, (5, 14)).astype(np.int32), np.array([14, 0, 1, 6, 13])
    cut, mask = segment(items, length, segment_length, num_segments)
    assert cut.shape == mask.shape == (5, num_segments or -(-14 // segment_length), segment_length)
    assert cut.dtype == np.int32 and mask.dtype == bool
    for row in range(5):
        np.testing.assert_array_equal(cut[row][mask[row]], items[row, : length[row]])
        assert not cut[row][~mask[row]].any()
        assert mask[row].ravel()[: length[row]].all()  # front aligned


def test_a_position_counts_only_segments_that_are_full_by_then():
    position, N = np.arange(50), 7
    _, mask = segment(np.ones((50, 49), np.int32), position, N)
    np.testing.assert_array_equal(position_in_segments(position, N), mask.all(2).sum(1))


def test_a_cut_that_would_lose_items_is_refused():
    with pytest.raises(ValueError, match="9 items does not fit 2 segments of 4"):
        segment(np.zeros((1, 9), np.int32), np.array([9]), 4, 2)
    segment(np.zeros((1, 9), np.int32), np.array([8]), 4, 2)
    with pytest.raises(ValueError, match="at least 1"):
        segment(np.zeros((1, 9), np.int32), np.array([9]), 0)

"""Sorting: the rule by hand, the drawn frequencies, and how far one gets with a part of the counts."""

from collections import Counter

import numpy as np
import pytest

from rmjax.config import base
from rmjax.data import make_source
from rmjax.data.texts.sorting import Sorting, fitting_length

LENGTH = 230
SOURCE = Sorting(length=LENGTH, segment_length=64, train=3000, valid=40, test=400)


def test_the_answers_are_the_symbols_by_frequency():
    got = SOURCE.fetch("train", np.arange(50))
    assert (
        got["items"].shape == (50, LENGTH + 20)
        and got["target"].shape == (50, 20)
        and set(got["length"]) == {LENGTH + 20}
    )
    for items, target in zip(got["items"], got["target"], strict=True):
        sequence = items[:LENGTH].tolist()
        counts = Counter(sequence)  # most_common keeps the order of first occurrence among equals
        expected = [symbol for symbol, _ in counts.most_common()] + sorted(
            set(range(20)) - set(counts)
        )
        assert target.tolist() == expected
        assert items[LENGTH] == 20 and items[LENGTH + 1 :].tolist() == expected[:-1]


def test_absent_symbols_come_last_in_order():
    short = Sorting(length=5, train=20, valid=1, test=1)
    for items, target in zip(
        *(short.fetch("train", np.arange(20))[name] for name in ("items", "target")), strict=True
    ):
        present = len(set(items[:5]))
        assert sorted(target[present:]) == list(target[present:]) and not set(
            target[present:]
        ) & set(items[:5])


def test_frequencies_drift_from_one_distribution_to_another():
    """Of one stream's ends with the same drawn distributions: averaged over streams all symbols are alike, and within
    a stream the first tenth and the last are less alike than neighbouring tenths."""
    items = SOURCE.fetch("train", np.arange(3000))["items"][:, :LENGTH]
    np.testing.assert_allclose(
        np.bincount(items.reshape(-1), minlength=20) / items.size, 0.05, atol=0.004
    )
    tenths = (items.reshape(3000, 10, 23, 1) == np.arange(20)).mean(2)
    alike = lambda a, b: np.corrcoef(tenths[:, a].reshape(-1), tenths[:, b].reshape(-1))[0, 1]
    assert alike(0, 1) > 0.13 and alike(8, 9) > 0.13 and abs(alike(0, 9)) < 0.06


def test_a_stream_depends_on_seed_split_and_index_alone():
    one, other = SOURCE.fetch("test", np.array([3, 7])), SOURCE.fetch("test", np.array([7, 1, 2]))
    for name, values in one.items():
        np.testing.assert_array_equal(values[1], other[name][0])
    streams = {
        SOURCE.fetch(split, np.array([3]))["items"].tobytes()
        for split in ("train", "valid", "test")
    }
    assert len(streams) == 3
    again = Sorting(length=LENGTH, seed=1).fetch("test", np.array([3]))["items"]
    assert again.tobytes() not in streams


def test_the_more_is_counted_the_better():
    """No counts: one of the symbols that are left by chance, (1 / 20) sum 1 / i = 18.0 %."""
    target = SOURCE.fetch("test", np.arange(400))["target"]
    rates = [(answers == target).mean() for answers in SOURCE.references("test").values()]
    assert rates[0] == pytest.approx(0.18, abs=0.02) and rates[3] == 1.0
    assert rates[0] + 0.05 < rates[1] < rates[2] - 0.05 and rates[2] < 0.7


def test_values_that_cannot_be_are_named():
    with pytest.raises(ValueError, match="length=0: must be at least 1"):
        Sorting(length=0)
    with pytest.raises(ValueError, match=r"indices=\[40\]: must be in \[0, 40\) for split 'valid'"):
        SOURCE.fetch("valid", np.array([40]))
    with pytest.raises(ValueError, match="split='tests'"):
        SOURCE.size("tests")


def test_a_sequence_fills_its_segments_with_thousands():
    assert [fitting_length(n, 1024) for n in (4, 8, 16, 32, 47)] == [
        4000,
        8000,
        16_000,
        32_000,
        48_000,
    ]
    assert [fitting_length(16, 64), fitting_length(4, 256), fitting_length(32, 256)] == [
        1000,
        1000,
        8000,
    ]
    for segments, length in ((1, 21), (3, 64), (40, 20)):  # answers and separator have room
        assert fitting_length(segments, length) + 20 <= segments * length
    with pytest.raises(
        ValueError, match="no room for a sequence and its 20 answers.*data.sorting.segments"
    ):
        fitting_length(1, 20)
    assert fitting_length(1, 20, answers=5) == 15


def test_fewer_symbols_are_all_that_is_asked_for():
    config = base().data
    config.name, config.segment_length, config.sorting.symbols, config.sorting.segments = (
        "sorting",
        8,
        3,
        2,
    )
    source = make_source(config, 0)
    found = source.fetch("train", np.arange(4))
    assert source.length == 13 and found["items"].max() == 3 and found["target"].shape == (4, 3)
    assert source.questions.classes == 3

"""Sorting: the rule by hand, the drawn frequencies, and readers that count in a part only."""

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
    assert got["items"].shape == (50, LENGTH + 20) and got["target"].shape == (50, 20)
    assert set(got["length"]) == {LENGTH + 20}
    for items, target in zip(got["items"], got["target"], strict=True):
        sequence = items[:LENGTH].tolist()
        counts = Counter(sequence)  # most_common keeps the order of first occurrence among equals
        absent = sorted(set(range(20)) - set(counts))
        expected = [symbol for symbol, _ in counts.most_common()] + absent
        assert target.tolist() == expected
        assert items[LENGTH] == 20 and items[LENGTH + 1 :].tolist() == expected[:-1]


def test_absent_symbols_come_last_in_order():
    short = Sorting(length=5, train=20, valid=1, test=1).fetch("train", np.arange(20))
    for items, target in zip(short["items"], short["target"], strict=True):
        absent = target[len(set(items[:5])) :]
        assert sorted(absent) == list(absent) and not set(absent) & set(items[:5])


def test_frequencies_drift_from_one_distribution_to_another():
    """Neighbouring tenths of a stream are more alike than the first and the last tenth.

    Averaged over the streams, all symbols are equally frequent.
    """
    items = SOURCE.fetch("train", np.arange(3000))["items"][:, :LENGTH]
    share = np.bincount(items.reshape(-1), minlength=20) / items.size
    np.testing.assert_allclose(share, 0.05, atol=0.004)
    tenths = (items.reshape(3000, 10, 23, 1) == np.arange(20)).mean(2)
    alike = lambda a, b: np.corrcoef(tenths[:, a].reshape(-1), tenths[:, b].reshape(-1))[0, 1]
    assert alike(0, 1) > 0.13 and alike(8, 9) > 0.13 and abs(alike(0, 9)) < 0.06


def test_a_stream_depends_on_seed_split_and_index_alone():
    one, other = SOURCE.fetch("test", np.array([3, 7])), SOURCE.fetch("test", np.array([7, 1, 2]))
    for name, values in one.items():
        np.testing.assert_array_equal(values[1], other[name][0])
    third = lambda split: SOURCE.fetch(split, np.array([3]))["items"].tobytes()
    streams = {third(split) for split in ("train", "valid", "test")}
    assert len(streams) == 3
    again = Sorting(length=LENGTH, seed=1).fetch("test", np.array([3]))["items"]
    assert again.tobytes() not in streams


def test_a_reader_is_better_if_it_counts_more():
    """Without counts a reader guesses among the remaining symbols: (1 / 20) sum 1 / i = 18.0 %."""
    target = SOURCE.fetch("test", np.arange(400))["target"]
    rates = [(answers == target).mean() for answers in SOURCE.references("test").values()]
    assert rates[0] == pytest.approx(0.18, abs=0.02) and rates[3] == 1.0
    assert rates[0] + 0.05 < rates[1] < rates[2] - 0.05 and rates[2] < 0.7


def test_wrong_values_are_named():
    with pytest.raises(ValueError, match="length=0: must be at least 1"):
        Sorting(length=0)
    with pytest.raises(ValueError, match=r"indices=\[40\]: must be in \[0, 40\) for split 'valid'"):
        SOURCE.fetch("valid", np.array([40]))
    with pytest.raises(ValueError, match="split='tests'"):
        SOURCE.size("tests")


def test_a_fitting_length_is_a_multiple_of_1000_if_possible():
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
    for segments, length in ((1, 21), (3, 64), (40, 20)):  # the answers and the separator fit
        assert fitting_length(segments, length) + 20 <= segments * length
    says = "no room for a sequence and its 20 answers.*data.sorting.segments"
    with pytest.raises(ValueError, match=says):
        fitting_length(1, 20)
    assert fitting_length(1, 20, answers=5) == 15


def test_fewer_symbols_are_fewer_questions():
    config = base().data
    config.name, config.segment_length = "sorting", 8
    config.sorting.symbols, config.sorting.segments = 3, 2
    source = make_source(config, 0)
    got = source.fetch("train", np.arange(4))
    assert source.length == 13 and got["items"].max() == 3 and got["target"].shape == (4, 3)
    assert source.questions.classes == 3

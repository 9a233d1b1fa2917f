"""Texts as carried streams: each row reads its part of the text in order, and knows its resets."""

import numpy as np
import pytest

from rmjax.data.pipeline import batches
from rmjax.data.texts.documents import Documents
from rmjax.data.texts.streams import Texts
from rmjax.data.texts.tokenizers import make_tokenizer

N, B, T = 5, 3, 2
LENGTHS = [23, 4, 61, 12, 40, 33]  # tokens of each document


def documents(lengths=LENGTHS):
    tokens = np.arange(sum(lengths), dtype=np.uint8)
    starts = np.cumsum([0, *lengths[:-1]])
    names = [str(i) for i in range(len(lengths))]
    return Documents(tokens, starts, names, 40, len(tokens), make_tokenizer("bytes"))


def texts(**how):
    splits = {split: documents() for split in ("train", "valid", "test")}
    return Texts(splits, N, T, **how)


def test_a_row_reads_its_part_step_by_step():
    source = texts(aligned=False)
    steps, every = source.parts("train", B).steps, 172 // N
    assert steps == every // B // T
    made = [source.batch("train", step, B) for step in range(2 * steps)]
    for row in range(B):
        read = np.concatenate([batch.items[row].reshape(-1) for batch in made[:steps]])
        np.testing.assert_array_equal(read, row * (every // B) * N + np.arange(steps * T * N))
    for one, again in zip(made[:steps], made[steps:], strict=True):  # the next epoch
        np.testing.assert_array_equal(one.items, again.items)
        assert not np.intersect1d(one.example_id, again.example_id).size
    for batch in made:
        np.testing.assert_array_equal(batch.target, batch.items.reshape(B, -1) + 1)
        assert batch.query_mask.all()
    assert [batch.reset.tolist() for batch in made[: steps + 1]] == (
        [[[True, False]] * B] + [[[False, False]] * B] * (steps - 1) + [[[True, False]] * B]
    )


@pytest.mark.parametrize("resets", [False, True])
def test_aligned_documents_share_no_segment(resets):
    source = texts(reset_documents=resets)
    begins, firsts = source.segments("train")
    starts = documents().starts
    assert len(begins) == sum(length // N for length in LENGTHS)
    assert firsts.sum() == 5  # one document is too short for a segment
    of = lambda token: np.searchsorted(starts, token, "right") - 1
    for batch in (source.batch("train", step, B) for step in range(source.parts("train", B).steps)):
        segments = of(batch.items)
        assert (segments == segments[..., :1]).all()
        np.testing.assert_array_equal(batch.target, batch.items.reshape(B, -1) + 1)
        begun = np.isin(batch.items[..., 0], starts)
        assert (batch.reset >= begun).all() if resets else batch.reset.sum() in (0, B)


def test_reset_segments_and_skip_first():
    source = texts(aligned=False, reset_segments=3, skip_first=True)
    resets = np.concatenate([source.batch("train", step, B).reset for step in range(4)], 1)
    np.testing.assert_array_equal(resets, np.broadcast_to(np.arange(8) % 3 == 0, (B, 8)))
    asked = source.batch("train", 0, B).query_mask.reshape(B, T, N)
    assert asked[..., :-1].all() and not asked[..., -1].any()


def test_the_pipeline_gives_each_process_its_rows():
    source = texts()
    how = dict(seed=0, batch_size=4, segment_length=N, start_step=1, num_steps=4)
    made = list(batches(source, **how))
    halves = [list(batches(source, **how, process_index=i, process_count=2)) for i in (0, 1)]
    for one, two, every in zip(*halves, made, strict=True):
        for name in ("items", "target", "reset", "example_id"):
            joined = np.concatenate([getattr(one, name), getattr(two, name)])
            np.testing.assert_array_equal(joined, getattr(every, name))
    np.testing.assert_array_equal(made[0].items, source.batch("train", 1, 4).items)


def test_a_short_text_and_resets_inside_segments_are_refused():
    says = "split 'train' has 32 segments of 5 tokens: too few for 40 rows of 2"
    with pytest.raises(ValueError, match=says):
        texts().batch("train", 0, 40)
    with pytest.raises(ValueError, match="reset_documents needs aligned"):
        texts(aligned=False, reset_documents=True)


def test_evaluation_ignores_reset_segments_unless_reset_evaluation_is_set():
    plain = texts(reset_segments=3).evaluation("test", B)
    every = np.concatenate([batch.reset for batch in plain], 1)
    assert every[:, 0].all() and not every[:, 1:].any() and every.shape[1] > 3
    asked = texts(reset_segments=3, reset_evaluation=True).evaluation("test", B)
    every = np.concatenate([batch.reset for batch in asked], 1)
    expected = np.broadcast_to(np.arange(every.shape[1]) % 3 == 0, every.shape)
    np.testing.assert_array_equal(every, expected)


def test_the_first_token_of_a_document_is_not_predicted_if_streams_reset_there():
    """The documents fill their segments, so their last target is a token of the next document."""
    splits = {split: documents([2 * N, 3 * N, 4 * N]) for split in ("train", "valid", "test")}
    for resets in (True, False):
        source = Texts(splits, N, 1, reset_documents=resets)
        every = [source.batch("train", step, 1) for step in range(source.parts("train", 1).steps)]
        last = np.concatenate([batch.query_mask.reshape(-1, N)[:, -1] for batch in every])
        ends = np.array([0, 1, 0, 0, 1, 0, 0, 0, 1], bool)  # the last segment has nothing after it
        np.testing.assert_array_equal(last, ~ends if resets else np.arange(9) < 8)

"""A live stream equals offline evaluation at every prefix, however the items arrive."""

from __future__ import annotations

import functools

import chex
import jax
import numpy as np
import pytest

from rmjax.machines import current_memory, feed, memorize, open_stream
from tests.small import ITEMS, MACHINES, N, small

LENGTH = 6 * N


def chunks(kind: str, items: np.ndarray):
    """Yields chunks [B, 7] of items [B, L], and their masks.

    Ones hold one item. Irregular chunks have gaps, at different places in each row.
    """
    rng, taken = np.random.default_rng(3), np.zeros(len(items), int)
    share = {"sevens": 1.0, "irregular": [[0.9], [0.5], [0.1]]}
    while (taken + 7 <= items.shape[1]).all():
        if kind == "ones":
            mask = np.arange(7) == rng.integers(7, size=(len(items), 1))
        else:
            mask = rng.random((len(items), 7)) < share[kind]
        chunk = np.full(mask.shape, 2**31 - 1, np.int32)
        for row, m in enumerate(mask):
            chunk[row, m] = items[row, taken[row] : taken[row] + m.sum()]
        taken += mask.sum(1)
        yield chunk, mask


@functools.cache
def jitted(name):
    machine = small(name).machine
    return [jax.jit(functools.partial(f, machine)) for f in (feed, current_memory, memorize)]


@pytest.mark.parametrize("kind", ["ones", "sevens", "irregular"])
@pytest.mark.parametrize("name", MACHINES)
def test_a_live_stream_equals_offline_evaluation_at_every_prefix(name, kind):
    machine, params = small(name)[:2]
    live, current, offline = jitted(name)
    items = np.random.default_rng(0).integers(0, ITEMS, (3, LENGTH)).astype(np.int32)
    seen, state = np.zeros((3, 1), int), open_stream(machine, params, 3, N)
    for chunk, mask in chunks(kind, items):
        state, seen = live(params, state, chunk, mask), seen + mask.sum(1, keepdims=True)
        prefix = (np.arange(LENGTH) < seen).reshape(3, -1, N)
        expected = offline(params, items.reshape(3, -1, N), prefix).memory
        chex.assert_trees_all_close(current(params, state), expected, atol=1e-5)
        assert (state.memory.segments == seen[:, 0] // N).all()
        assert (state.tail_len == seen[:, 0] % N).all()
    assert seen.min() > 0 and seen.max() > LENGTH - 7


def test_chunks_of_any_length_give_the_same_stream():
    machine, params = small("gru")[:2]
    live, current, _ = jitted("gru")
    items = np.random.default_rng(0).integers(0, ITEMS, (3, LENGTH)).astype(np.int32)
    memories = []
    for step in (1, 6, LENGTH):
        state = open_stream(machine, params, 3, N)
        for chunk in np.split(items, LENGTH // step, 1):
            state = live(params, state, chunk, np.ones(chunk.shape, bool))
        memories.append(current(params, state))
    for memory in memories[1:]:
        chex.assert_trees_all_close(memory, memories[0], atol=1e-5)


def test_feeding_no_items_and_reading_leave_the_stream_as_it_is():
    machine, params = small("rehearsal")[:2]
    live, current, _ = jitted("rehearsal")
    items = np.ones((3, 7), np.int32)
    state = live(params, open_stream(machine, params, 3, N), *next(chunks("sevens", items)))
    chex.assert_trees_all_equal(feed(machine, params, state, items[:, :0]), state)
    chex.assert_trees_all_equal(live(params, state, items, np.zeros((3, 7), bool)), state)
    assert (current(params, state).segments == 2).all() and (state.memory.segments == 1).all()


def test_feed_names_the_shape_it_refuses():
    machine, params = small("gru")[:2]
    state = open_stream(machine, params, 3, N)
    for wrong in ((2, 5), (3,)):
        with pytest.raises(ValueError, match="B = 3"):
            feed(machine, params, state, np.zeros(wrong, np.int32))
